#!/usr/bin/env bash
# Set-up, quick start and tests; see --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

usage() {
  cat <<'EOF'
./benchmark.sh quickstart [FLAGS]   install, collect pick-place demonstrations, train on them (about 5 minutes, no GPU);
                                    FLAGS go to cal_ql_continuous.py, for example --seed 2
./benchmark.sh test [FLAGS]         install, then run the tests; FLAGS go to pytest

Both use the active virtual environment or conda environment; without one they make .venv here.
PYTHON=python3.12 ./benchmark.sh ... chooses the interpreter that .venv is made with (3.11 to 3.13).
EOF
}

# install REQUIREMENTS: into the active environment, or into .venv, which is made if need be.
install() {
  if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    # shellcheck disable=SC1091
    source .venv/bin/activate
  fi
  if ! python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
    echo "error: $(python --version) is active, but Python 3.11, 3.12 or 3.13 is needed; set PYTHON=python3.12 or so" \
      "and remove .venv." >&2
    exit 2
  fi
  local stamp
  stamp="$(python -c 'import sys; print(sys.prefix)')/.$1.installed"
  if ! cat requirements.txt "$1" | cmp -s - "$stamp"; then
    echo "installing $1 ..."
    python -m pip install --quiet --disable-pip-version-check -r "$1"
    cat requirements.txt "$1" >"$stamp"
  fi
}

case "${1:-}" in
  quickstart)
    shift
    install requirements.txt
    python -m collect.pick_place
    exec python cal_ql_continuous.py --env-id pick-place "$@"
    ;;
  test)
    shift
    install requirements-dev.txt
    exec python -m pytest -q "$@"
    ;;
  -h | --help)
    usage
    ;;
  *)
    usage >&2
    exit 2
    ;;
esac
