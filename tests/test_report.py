"""tools/report.py and the tools together: the regret of published runs, tables of the paper, and missing packages."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rliable")
from tools import plot, report  # noqa: E402

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "folder", sorted(ROOT.glob("results/*/*/")), ids=lambda folder: f"{folder.parent.name}-{folder.name}"
)
def test_regret_is_the_mean_of_failures_online(folder):
    """So far, at each evaluation; runs of earlier versions logged it."""
    with (folder / "eval.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["phase"] == "online"]
    scores = [float(row["score"]) for row in rows]
    expected = [1 - sum(scores[: k + 1]) / (k + 1) for k in range(len(rows))]
    assert plot.read_run(folder).online.regret.tolist() == pytest.approx(expected)
    logged = [float(row["regret"]) for row in rows if "regret" in row]
    assert logged == pytest.approx(expected[: len(logged)])


def test_tables_of_the_paper():
    groups = {"pen-binary": {"Cal-QL": [plot.read_run(ROOT / "results/pen-binary/cal_ql-seed1")]}}
    table, sentence = report.paper_table(groups, "Cal-QL").split("\n\n")
    lines = table.splitlines()
    assert len(lines) == 3 and lines[2].startswith("| pen-binary | 79 | 99 | 0.11 | 75 | 70 | 0.25 |")
    assert sentence.startswith("Not run yet: antmaze-large-diverse, ") and "pen-binary" not in sentence
    lines = report.paper_table(groups, "Cal-QL", whole=True).splitlines()
    assert len(lines) == 2 + 11 and lines[2].startswith("| pen-binary |") and "not run yet" in lines[3]
    assert report.paper_table({}, "Cal-QL").startswith("Not run yet: ")


@pytest.mark.parametrize("tool, package", [
    ("bench", "tensordict"), ("diagnose", "matplotlib"), ("export", "onnx"), ("report", "pandas"), ("report", "tyro"),
])  # fmt: skip
def test_a_missing_package_is_one_sentence(tmp_path, tool, package):
    """For --help too; a module that fails as a missing one does stands in for it."""
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('No module named {package}')")
    code = f"import runpy, sys; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = ['x', '--help']; " \
           f"runpy.run_path({str(ROOT / 'tools' / f'{tool}.py')!r}, run_name='__main__')"  # fmt: skip
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 2 and not process.stdout
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: ") and package in line and "pip install -r requirements-dev.txt" in line
