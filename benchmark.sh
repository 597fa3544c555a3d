#!/usr/bin/env bash
# Set-up, quick start, tests, and the exact command of every result; see --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# Keep an update's memory for the next one instead of returning it to the system (glibc): 10% faster on the CPU.
export MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_MMAP_THRESHOLD_=33554432

# One thread: another number of them rounds differently, and results must not depend on how many cores a machine has.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

usage() {
  cat <<'EOF'
./benchmark.sh quickstart [FLAGS]   install, collect pick-place demonstrations, pre-train and fine-tune on them, draw the
                                    run: minutes on a CPU; FLAGS go to cal_ql_continuous.py, for example --seed 2
./benchmark.sh test [FLAGS]         install, then run the tests; FLAGS go to pytest
./benchmark.sh GROUP [OPTIONS] [-- FLAGS]   run a group of experiments; FLAGS are added to each command

They use the active virtual environment or conda environment; without one they make .venv here.
PYTHON=python3.12 ./benchmark.sh ... chooses the interpreter that .venv is made with (3.11 to 3.13).
OMP_NUM_THREADS=4 ./benchmark.sh ... gives each run four threads instead of one, which rounds differently.

GROUP      antmaze, kitchen, adroit   the state tasks of the paper's tables 1 and 2
           visual                     visual manipulation, on a task of ours: cal_ql to hybrid_rl, iql, awac
           figure2                    the start of the paper: offline methods in fine-tuning, on pick-place
           figure7                    a high update-to-data ratio: Cal-QL, Cal-QL at 20, RLPD at 20
           figure8                    narrow against broad data, on pick-place
           figure11                   a learned reference value, in Kitchen
           antmaze-umaze              the smallest AntMaze, on data collected here: cal_ql, cql; a run takes over an hour
                                      on a CPU
           pick-place                 the quick start's comparison
           maze, maze-third           point mazes: all systems, minutes a run; Cal-QL and CQL on a third of the data
           all                        all of these
OPTIONS    --algos A,B   of cal_ql, cql, cql_sac, sac, sac_offline_data, hybrid_rl, cal_ql_utd20, rlpd, iql, awac, o3f,
                         td3_bc, odt, cal_ql_learned
           --seeds N     seeds 1 to N of each (default 6, as in the paper)
           --workers K   runs at a time (default 1); they share one GPU, or have a core each
           --dry-run     print one command a line and do nothing else
           --slurm       write a Slurm job array over these commands instead of running them

A failed run does not stop the others and is named at the end. Called again, a group leaves out finished runs and resumes
interrupted ones. Output goes to runs/logs/.
EOF
}

die() {
  echo "error: $*" >&2
  exit 2
}

# Installs into the active environment, or into .venv, which is made if need be.
install() {
  if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    echo "using .venv; for commands of your own: source .venv/bin/activate"
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    # shellcheck disable=SC1091
    source .venv/bin/activate
  fi
  python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' ||
    die "$(python --version) is active, but 3.11, 3.12 or 3.13 is needed; remove .venv and set PYTHON=python3.12 or so."
  local place stamp
  place="$(python -c 'import sys; print(sys.prefix)')"
  stamp="$place/.cal-ql.installed"
  if ! cat requirements*.txt | cmp -s - "$stamp"; then
    echo "installing into $place what is missing there: all of it is a download of some 0.5 GB, on Linux of some 3 GB"
    echo "(torch with CUDA; requirements.txt says how to take the small build); it takes minutes"
    python -m pip install --disable-pip-version-check -r requirements-dev.txt
    cat requirements*.txt >"$stamp"
  fi
}

# command_of ALGO TASK SEED: the exact command of one run.
command_of() {
  local run="--env-id $2 --seed $3"
  case "$2" in
    pick-place-broad) run="--env-id pick-place --seed $3 --datasets cal-ql/pick-place/broad-v0" ;;
    point-maze-third) run="--env-id point-maze-large --seed $3 --datasets cal-ql/point-maze/large-third-v0" ;;
    antmaze-umaze) # shorter than the paper's AntMaze, and with smaller networks: docs/antmaze.md has the curves
      run+=" --datasets cal-ql/antmaze/umaze-v0 --offline-steps 50000 --online-steps 30000"
      run+=" --offline-eval-interval 10000 --online-eval-interval 5000"
      case "$1" in cal_ql* | cql*) run+=" --critic-layers 256 256 --num-actions 4" ;; esac
      ;;
  esac
  local high_utd="--num-critics 10 --critic-layer-norm --actor-reduce mean --utd-ratio 20 --actor-interval 20"
  local algo="$1"
  if [ "$2" = pick-place-pixels ]; then algo="$1_pixels"; fi
  case "$algo" in
    cal_ql_pixels) echo "python cal_ql_pixels.py $run" ;;
    cql_pixels) echo "python baselines/cql_pixels.py $run" ;;
    cql_sac_pixels) echo "python baselines/cql_pixels.py $run --online-cql-factor 0" ;;
    sac_pixels) echo "python baselines/sac_pixels.py $run --mixing-ratio 0" ;;
    sac_offline_data_pixels) echo "python baselines/sac_pixels.py $run --mixing-ratio -1" ;;
    hybrid_rl_pixels) echo "python baselines/sac_pixels.py $run" ;;
    iql_pixels | awac_pixels) echo "python baselines/$algo.py $run" ;;
    cal_ql) echo "python cal_ql_continuous.py $run" ;;
    cal_ql_learned) echo "python baselines/cal_ql_learned_value.py $run" ;;
    cql) echo "python cql_continuous.py $run" ;;
    cql_sac) echo "python cql_continuous.py $run --online-cql-factor 0" ;;
    sac) echo "python sac_offline_data.py $run --mixing-ratio 0" ;;
    sac_offline_data) echo "python sac_offline_data.py $run --mixing-ratio -1" ;;
    hybrid_rl) echo "python sac_offline_data.py $run" ;;
    iql | awac | td3_bc | odt) echo "python baselines/$1_continuous.py $run" ;;
    o3f) echo "python baselines/iql_continuous.py $run --optimistic-actions 100" ;;
    cal_ql_utd20) echo "python cal_ql_continuous.py $run $high_utd --num-target-critics 2" ;;
    rlpd) # as RLPD's own commands: target entropy -dim(A)/2; in AntMaze one target critic, elsewhere two; 5,000 random
      # steps, in which nothing is learned; rewards of -1 and 0 in AntMaze and Adroit
      local critics=2
      if [[ "$2" == antmaze-* ]]; then critics=1; fi
      if [[ "$2" == antmaze-* || "$2" == *-binary ]]; then run+=" --reward-scale 1 --reward-bias -1"; fi
      echo "python sac_offline_data.py $run $high_utd --num-target-critics $critics --mixing-ratio 0.5" \
        "--actor-layers 256 256 256 --critic-layers 256 256 256 --target-entropy-scale -0.5 --no-backup-entropy" \
        "--random-steps 5000 --warmup-steps 5000"
      ;;
    *) die "unknown algorithm $algo; see ./benchmark.sh --help." ;;
  esac
}

# commands GROUP ALGOS SEEDS: the commands of a group, one a line; empty ALGOS take the group's own.
commands_of() {
  local six="cal_ql,cql,cql_sac,sac,sac_offline_data,hybrid_rl" tasks algos group
  local nine="$six,iql,awac,o3f" visual="$six,iql,awac"
  case "$1" in
    antmaze) tasks="antmaze-large-diverse antmaze-large-play antmaze-medium-diverse antmaze-medium-play" algos=$nine,odt ;;
    kitchen) tasks="kitchen-partial kitchen-mixed kitchen-complete" algos=$nine ;;
    adroit) tasks="pen-binary door-binary relocate-binary" algos=$nine ;;
    visual)
      tasks=pick-place-pixels algos=$visual
      for algo in ${2//,/ }; do
        [[ ",$algos," == *",$algo,"* ]] || die "group visual has the algorithms $algos alone."
      done
      ;;
    figure7)
      tasks="antmaze-large-diverse antmaze-large-play antmaze-medium-diverse antmaze-medium-play kitchen-partial"
      tasks+=" kitchen-mixed kitchen-complete pen-binary door-binary relocate-binary" algos=cal_ql,cal_ql_utd20,rlpd
      ;;
    figure8) tasks="pick-place pick-place-broad" algos=cal_ql,cql ;;
    figure2) tasks=pick-place algos=iql,td3_bc,awac,cql,cal_ql ;;
    figure11) tasks="kitchen-partial kitchen-mixed kitchen-complete" algos=cal_ql,cal_ql_learned ;;
    antmaze-umaze) tasks=antmaze-umaze algos=cal_ql,cql ;;
    pick-place) tasks=pick-place algos=cal_ql,cql,sac_offline_data,iql,awac,o3f,td3_bc,odt ;;
    maze)
      tasks="point-maze-large point-maze-medium"
      algos=cal_ql,cql,cql_sac,sac_offline_data,hybrid_rl,iql,o3f,awac,td3_bc,odt
      ;;
    maze-third) tasks=point-maze-third algos=cal_ql,cql ;;
    all)
      {
        for group in antmaze kitchen adroit figure2 figure7 figure8 figure11 antmaze-umaze pick-place maze maze-third; do
          commands_of "$group" "$2" "$3"
        done
        for algo in ${visual//,/ }; do # those of visual that are asked for
          if [[ ",${2:-$algo}," == *",$algo,"* ]]; then commands_of visual "$algo" "$3"; fi
        done
      } | awk '!seen[$0]++' # groups overlap
      return
      ;;
    *) die "unknown group $1; see ./benchmark.sh --help." ;;
  esac
  local task algo seed
  for task in $tasks; do
    for algo in $(tr , ' ' <<<"${2:-$algos}"); do
      for ((seed = 1; seed <= $3; seed++)); do command_of "$algo" "$task" "$seed"; done
    done
  done
}

# run_one COMMAND: runs it unless it has finished before, resuming where there is a checkpoint.
run_one() {
  [ $# -eq 1 ] || die "run-one takes one argument, a line that --dry-run prints."
  local words=() word name log run
  while IFS= read -r word; do words+=("$word"); done < <(xargs printf '%s\n' <<<"$1" 2>/dev/null) # as quoted
  [[ "${words[0]:-} ${words[2]:-} ${words[4]:-}" == "python --env-id --seed" && -f "${words[1]}" ]] ||
    die "run-one takes a line that --dry-run prints, not: $1"
  name="$(basename "${words[1]}" .py)__${words[3]//\//-}__${words[5]}__$(cksum <<<"$1" | cut -d' ' -f1)"
  log="runs/logs/$name.log"
  mkdir -p runs/logs
  if [ -f "runs/logs/$name.done" ]; then
    echo "finished before: $1"
    return
  fi
  touch "$log"
  run="$(sed -n 's/^run: //p' "$log" | tail -1)"
  if [ -n "$run" ] && [ -f "$run/checkpoint.pt" ]; then words+=(--resume "$run"); fi
  echo "started: ${words[*]}   (its output: $log)"
  if "${words[@]}" >>"$log" 2>&1; then
    touch "runs/logs/$name.done"
    rm -f "runs/logs/$name.failed"
    tail -1 "$log"
  else
    echo "$1 (exit code $?, see $log)" | tee "runs/logs/$name.failed" >&2
    return 1
  fi
}

# collect_for COMMANDS: the data that they need and that are made here.
collect_for() {
  if grep -q -- '--env-id pick-place ' <<<"$1"; then python -m collect.pick_place; fi
  if grep -q -- cal-ql/pick-place/broad-v0 <<<"$1"; then
    python -m collect.pick_place --episodes 100 --dataset-id cal-ql/pick-place/broad-v0
  fi
  if grep -q -- point-maze-medium <<<"$1"; then python -m collect.point_maze medium; fi
  if grep -q -- point-maze-large <<<"$1"; then python -m collect.point_maze large; fi
  if grep -q -- cal-ql/point-maze/large-third-v0 <<<"$1"; then python -m collect.point_maze large-third; fi
  if grep -q -- '--env-id pick-place-pixels ' <<<"$1"; then python -m collect.pick_place --camera; fi
  if grep -q -- cal-ql/antmaze/umaze-v0 <<<"$1"; then
    python -m collect.ant_maze umaze --frame-skip 10 --episodes 700 # the control step of D4RL
  fi
}

run_group() {
  local group="$1" algos="" seeds=6 workers=1 mode=run flags=""
  shift
  while [ $# -gt 0 ]; do
    case "$1" in
      --algos | --seeds | --workers)
        [ $# -ge 2 ] || die "$1 needs a value."
        case "$1" in --algos) algos="$2" ;; --seeds) seeds="$2" ;; --workers) workers="$2" ;; esac
        shift 2
        ;;
      --dry-run) mode=dry && shift ;;
      --slurm) mode=slurm && shift ;;
      --)
        shift
        if [ $# -gt 0 ]; then flags="$(printf ' %q' "$@")"; fi
        break
        ;;
      *) die "unknown option $1; see ./benchmark.sh --help." ;;
    esac
  done
  [[ "$seeds" =~ ^[1-9][0-9]{0,3}$ && "$workers" =~ ^[1-9][0-9]{0,3}$ ]] ||
    die "--seeds and --workers take whole numbers from 1 to 9999."
  [[ -z "$algos" || "$algos" =~ [^,] ]] || die "--algos names no algorithm; see ./benchmark.sh --help."
  local line commands
  commands="$(commands_of "$group" "$algos" "$seeds")" || exit 2
  commands="$(while IFS= read -r line; do printf '%s%s\n' "$line" "$flags"; done <<<"$commands")"
  case "$mode" in
    dry) printf '%s\n' "$commands" ;;
    slurm)
      mkdir -p runs/logs
      printf '%s\n' "$commands" >"runs/$group.commands"
      cat >"runs/$group.sbatch" <<EOF
#!/usr/bin/env bash
#SBATCH --job-name=cal-ql-$group
#SBATCH --array=1-$(wc -l <<<"$commands")%$workers
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=2-00:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=runs/logs/slurm-%A_%a.out
# Submitted again after a time limit, the runs resume. Prepare the environment and the data first, once:
# pip install -r requirements.txt, and minari download or python -m collect.pick_place.
srun ./benchmark.sh run-one "\$(sed -n "\${SLURM_ARRAY_TASK_ID}p" "runs/$group.commands")"
EOF
      echo "wrote runs/$group.sbatch over runs/$group.commands; submit it from here: sbatch runs/$group.sbatch"
      ;;
    run)
      install
      collect_for "$commands"
      rm -f runs/logs/*.failed
      tr '\n' '\0' <<<"$commands" | xargs -0 -n 1 -P "$workers" ./benchmark.sh run-one || true
      if compgen -G 'runs/logs/*.failed' >/dev/null; then
        echo "failed:" >&2
        cat runs/logs/*.failed >&2
        exit 1
      fi
      ;;
  esac
}

case "${1:-}" in
  quickstart)
    shift
    install
    mkdir -p runs/logs
    python -m collect.pick_place
    PYTHONUNBUFFERED=1 python cal_ql_continuous.py --env-id pick-place "$@" | tee runs/logs/quickstart.log
    run="$(sed -n 's/^run: //p' runs/logs/quickstart.log)"
    if [ -n "$run" ]; then python tools/plot.py --run "$run"; fi # with --help there is no run
    ;;
  test)
    shift
    install
    exec python -m pytest -q "$@"
    ;;
  run-one)
    shift
    run_one "$@"
    ;;
  "" | -h | --help)
    usage
    [ -n "${1:-}" ] || exit 2
    ;;
  *) run_group "$@" ;;
esac
