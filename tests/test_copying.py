"""docs/copying.md, followed to the letter: a copy of the main file with sections replaced by the page's own blocks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> Path:
    """A folder with reach.py and my_cal_ql.py, made as the page says, and the data."""
    folder = tmp_path_factory.mktemp("copy")
    reach, data, make_env = re.findall(r"```python\n(.*?)```", (ROOT / "docs/copying.md").read_text(), re.DOTALL)
    (folder / "reach.py").write_text(reach)
    text = (ROOT / "cal_ql_continuous.py").read_text()
    first, last = text.index("# --- Tasks (common)"), text.index("# --- Replay (common)")
    text = text[:first] + data + text[last:]
    first, last = text.index("class TaskEnv"), text.index("@torch.no_grad()\ndef play_episode")
    text = text[:first] + make_env + text[last:]
    text = re.sub(r"import (minari|gymnasium_robotics).*\n", "", text)
    (folder / "my_cal_ql.py").write_text(text)
    subprocess.run([sys.executable, "reach.py"], cwd=folder, check=True)
    return folder


def run(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error::SyntaxWarning", "my_cal_ql.py", *flags]
    return subprocess.run(command, cwd=folder, env={**os.environ}, capture_output=True, text=True)


def test_the_copy_trains_through_both_phases_and_resumes(copied):
    """It learns: most episodes succeed online, where the first policy reaches nothing on purpose."""
    flags = "--env-id reach --offline-steps 400 --offline-eval-interval 200 --online-eval-interval 200".split()
    flags += "--actor-layers 32 32 --critic-layers 32 32 --eval-episodes 10 --actor-lr 1e-3 --critic-lr 1e-3".split()
    result = run(copied, *flags, "--online-steps", "200")
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith(("offline", "online"))]
    assert [row[0] for row in rows] == ["offline"] * 3 + ["online"]
    assert float(rows[-1][3]) > float(rows[0][3]) and float(rows[-1][3]) >= 0.5
    (folder,) = (copied / "runs").iterdir()
    result = run(copied, "--resume", str(folder), "--online-steps", "400")
    assert result.returncode == 0 and len((folder / "eval.csv").read_text().splitlines()) == 6, result.stderr


def test_the_page_counts_the_lines_that_are_left(copied):
    lines = len((copied / "my_cal_ql.py").read_text().splitlines())
    assert abs(lines - 510) <= 20
