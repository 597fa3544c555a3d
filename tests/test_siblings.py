"""The scripts repeat each other on purpose: what they share is the same to the letter, what differs is listed here."""

import ast
import difflib
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHAIN = ["sac_offline_data.py", "cql_continuous.py", "cal_ql_continuous.py", "cal_ql_pixels.py"]
# What may differ between a script and the next of the chain, by the name of the class, function or table.
MAY_DIFFER = {
    ("sac_offline_data.py", "cql_continuous.py"): {
        "Args", "DOMAINS", "CHANGEABLE", "parse_args", "check_args", "Agent", "Noise", "draw_noise", "bellman_target",
        "critic_losses", "update", "roll_out", "play", "probe", "train",
    },
    ("cql_continuous.py", "cal_ql_continuous.py"): {"critic_losses"},
    ("cal_ql_continuous.py", "cal_ql_pixels.py"): {
        "Args", "DOMAINS", "Task", "TASKS", "check_args", "Episode", "open_dataset", "make_env", "load_episodes",
        "Batch", "ReplayBuffer", "Actor", "Agent", "Noise", "draw_noise", "update", "roll_out", "start_worker", "play",
        "probe", "train",
    },
}
# What the next script leaves out of the one before, and what it adds.
LEFT_OUT = {"cal_ql_pixels.py": {"antmaze", "to_state"}}
ADDED = {
    "cal_ql_pixels.py": {
        "from collections.abc import Iterator",
        "Observation", "find_boxes", "check_space", "to_observation", "Encoder", "shift_frames",
    },
}


def source(name: str) -> str:
    return (ROOT / name).read_text()


def top_level(name: str) -> dict[str, str]:
    """The text of every top-level definition and statement after the module's docstring, comments inside included."""
    text, parts = source(name), {}
    for node in ast.parse(text).body[1:]:
        target = getattr(node, "target", None) or (node.targets[0] if isinstance(node, ast.Assign) else None)
        label = getattr(node, "name", None) or (ast.unparse(target) if target else ast.unparse(node))
        parts[label] = ast.get_source_segment(text, node)
    return parts


def changed_lines(first: str, second: str) -> int:
    """Lines that `diff first second | grep -c '^[<>]'` counts."""
    result = subprocess.run(["diff", ROOT / first, ROOT / second], capture_output=True, text=True)
    return sum(line[0] in "<>" for line in result.stdout.splitlines())


def test_cal_ql_is_cql_and_one_statement():
    cal_ql, cql = (ast.parse(source(name)) for name in ("cal_ql_continuous.py", "cql_continuous.py"))
    cal_ql.body, cql.body = cal_ql.body[1:], cql.body[1:]  # the docstrings
    ours, theirs = (ast.unparse(tree).splitlines() for tree in (cal_ql, cql))
    assert [line for line in difflib.ndiff(theirs, ours) if line[0] in "+-"] == [
        "+     q_ood = torch.maximum(q_ood, floor)"
    ]


@pytest.mark.parametrize("first, second", MAY_DIFFER)
def test_shared_parts_are_the_same_to_the_letter(first, second):
    ours, theirs = top_level(first), top_level(second)
    left_out, added = LEFT_OUT.get(second, set()), ADDED.get(second, set())
    # The same parts in the same order, but for those.
    assert [name for name in ours if name not in left_out] == [name for name in theirs if name not in added]
    assert left_out == ours.keys() - theirs.keys() and added == theirs.keys() - ours.keys()
    assert {name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name]} == MAY_DIFFER[first, second]


def test_the_masked_maximum_is_the_same_line():
    statement = "    q_ood = torch.maximum(q_ood, floor)"
    assert [source(name).splitlines().count(statement) for name in CHAIN] == [0, 0, 1, 1]


def test_scripts_import_neither_each_other_nor_a_shared_module():
    for name in CHAIN:
        imported = {
            alias.name if isinstance(node, ast.Import) else node.module
            for node in ast.walk(ast.parse(source(name))) if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert not {module for module in imported if (ROOT / f"{module.split('.')[0]}.py").exists()}


def test_readme_states_the_size_of_each_diff_and_the_one_statement():
    readme = source("README.md")
    for first, second in MAY_DIFFER:
        assert f"| `{first}` → `{second}` | {changed_lines(first, second)} |" in readme
    # The statement and the line before it stand in the README as they stand in the file.
    statement = re.search(r"```diff\n(.*?)```", readme, re.S).group(1)
    for line in statement.splitlines():
        assert line[1:] in source("cal_ql_continuous.py").splitlines()
        assert (line[1:] in source("cql_continuous.py").splitlines()) == (line[0] == " ")


def dry_run(group: str, *options: str) -> list[str]:
    command = ["bash", str(ROOT / "benchmark.sh"), group, "--dry-run", *options]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def test_every_benchmark_command_parses_with_its_script():
    commands = dry_run("all", "--seeds", "2")
    assert len(commands) == len(set(commands))
    for line in commands:
        python, script, *flags = line.split()
        assert python == "python"
        args = importlib.import_module(Path(script).stem).parse_args(flags)
        assert args.seed in (1, 2)
    for group, tasks, algorithms in (("antmaze", 4, 6), ("kitchen", 3, 6), ("adroit", 3, 6), ("figure8", 2, 2)):
        assert len(dry_run(group, "--seeds", "3")) == tasks * algorithms * 3
    assert dry_run("adroit", "--algos", "cql_sac", "--seeds", "1", "--", "--online-steps", "5")[0] == (
        "python cql_continuous.py --env-id pen-binary --seed 1 --online-cql-weight 0 --online-steps 5"
    )


@pytest.mark.parametrize("arguments", ["nowhere", "antmaze --algos dqn", "all --seeds 0", "antmaze --x", "all --seeds"])
def test_benchmark_refuses_bad_input_in_one_sentence(arguments):
    command = ["bash", str(ROOT / "benchmark.sh"), *arguments.split()]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


FAKE_SCRIPT = """
import pathlib, sys
run = pathlib.Path("runs/one")
if "--resume" in sys.argv:
    print("resumed", sys.argv[2])
elif "--fail" in sys.argv:
    sys.exit(1)
else:
    run.mkdir(parents=True)
    (run / "checkpoint.pt").touch()
    print(f"run: {run} on cpu")
    sys.exit(143)
"""


def test_benchmark_resumes_an_interrupted_run_and_leaves_out_a_finished_one(tmp_path):
    shutil.copy(ROOT / "benchmark.sh", tmp_path)
    (tmp_path / "fake.py").write_text(FAKE_SCRIPT)

    def run_one(extra: str = "") -> tuple[int, str]:
        command = ["bash", "benchmark.sh", "run-one", f"python fake.py --env-id task --seed 1{extra}"]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        result = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PATH": path}
        )
        return result.returncode, result.stdout + result.stderr

    code, output = run_one()
    assert code == 1 and "exit code 143" in output and list(tmp_path.glob("runs/logs/*.failed"))
    code, output = run_one()
    assert code == 0 and "resumed runs/one" in output and not list(tmp_path.glob("runs/logs/*.failed"))
    code, output = run_one()
    assert code == 0 and output.startswith("finished before: ")
    code, output = run_one(" --fail")
    assert code == 1 and "--fail (exit code 1" in output
