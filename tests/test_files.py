"""The files themselves: requirements, imports, help, benchmark.sh, and every command, link and name in the pages."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
import tyro

import cal_ql_continuous as script

pytest.importorskip("rliable")
from tools import plot, report  # noqa: E402

ROOT = Path(__file__).parents[1]
FAMILY = sorted([*ROOT.glob("*.py"), *ROOT.glob("baselines/*.py")])
TOOLS = sorted([*ROOT.glob("tools/*.py"), *ROOT.glob("collect/*.py")])
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("results/*.md"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def load(path: str):
    return importlib.import_module(path.removesuffix(".py").replace("/", "."))


def parse(path: str, flags: list[str]):
    if "--resume" in flags:
        flags = flags[: flags.index("--resume")] + flags[flags.index("--resume") + 2 :]
    return load(path).parse_args(flags)[0]


def read_requirements(name: str) -> list[str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return sorted(line for line in lines if line and not line.startswith("-"))


def test_requirements_are_exact_and_each_script_lists_them():
    lines = read_requirements("requirements.txt")
    for line in lines + read_requirements("requirements-dev.txt"):
        assert re.fullmatch(r"[\w-]+(\[[\w,]+\])?==[\w.]+", line), line
    assert "farama-notifications==0.0.4" in lines  # later ones print a paragraph about Adroit at every start
    for path in FAMILY:
        block = re.search(r"(?m)^# /// script\n((?:#.*\n)*?)# ///$", path.read_text())
        metadata = tomllib.loads(re.sub(r"(?m)^# ?", "", block[1]))
        assert sorted(metadata["dependencies"]) == lines and metadata["requires-python"] == ">=3.11,<3.14", path


def test_import_has_no_side_effects(tmp_path):
    modules = [name_of(path)[:-3].replace("/", ".") for path in FAMILY + TOOLS]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(modules)}"
    # An unknown flag would end a script that reads its arguments on import.
    process = subprocess.run([sys.executable, "-B", "-c", code, "--no-such-flag"], cwd=tmp_path, capture_output=True)
    assert process.returncode == 0 and not process.stdout + process.stderr, process.stderr.decode()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("env_id", [*script.TASKS, "mine/any-v0"])
def test_help_shows_the_settings_of_the_task(env_id, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--env-id", env_id, "--help"])
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())  # lines are wrapped to the terminal
    assert stop.value.code == 0 and all(task in printed for task in script.TASKS)
    for name, value in vars(script.parse_args(["--env-id", env_id])[0]).items():
        shown = rf"--{name.replace('_', '-')} .*?\(default: {value}\)"
        assert type(value) not in (int, float) or re.search(shown, printed), name


@cache
def help_of(tool: str) -> str:
    process = subprocess.run([sys.executable, ROOT / tool, "--help"], cwd="/", capture_output=True, text=True)
    assert process.returncode == 0 and not process.stderr and f"python {tool}" in process.stdout, process.stderr
    return process.stdout


# --- benchmark.sh -----------------------------------------------------------------------------------------------------
def benchmark(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", ROOT / "benchmark.sh", *flags], capture_output=True, text=True, timeout=60)


def commands_of(group: str, *flags: str) -> list[tuple[str, object]]:
    """Script and settings of each line that a dry run prints; every flag of it is known, every task too."""
    commands = []
    for line in benchmark(group, "--seeds", "1", "--dry-run", *flags).stdout.splitlines():
        python, path, *words = shlex.split(line)
        commands.append((path, parse(path, words)))
        assert python == "python" and commands[-1][1].env_id in load(path).TASKS, line
    return commands


def test_dry_run_prints_commands_that_parse():
    commands = commands_of("all")
    assert len(commands) > 60 and len({str(command) for command in commands}) == len(commands)
    others = sorted({(args.env_id, *args.datasets) for _, args in commands if args.datasets})
    assert others == [
        ("antmaze-umaze", "cal-ql/antmaze/umaze-v0"), ("pick-place", "cal-ql/pick-place/broad-v0"),
        ("point-maze-large", "cal-ql/point-maze/large-third-v0"),
    ]  # fmt: skip


def test_rlpd_begins_and_is_rewarded_as_its_authors_have_it():
    for _, args in commands_of("figure7", "--algos", "rlpd"):
        bias = 0 if args.env_id.startswith("kitchen") else -1
        assert (args.random_steps, args.warmup_steps, args.reward_scale, args.reward_bias) == (5000, 5000, 1, bias)


def test_visual_group_has_each_cell_of_table_2():
    commands = commands_of("visual")
    assert {args.env_id for _, args in commands} == {"pick-place-pixels"}
    names = [plot.name_algorithm(Path(path).stem, vars(args)) for path, args in commands]
    assert names == ["Cal-QL", "CQL", "CQL+SAC", "SAC", "SAC + offline data", "Hybrid RL", "IQL", "AWAC"]


@pytest.fixture
def sandbox(tmp_path):
    """Calls benchmark.sh with a `python` that writes down threads and arguments, and prints a run's folder."""
    for name in ("benchmark.sh", "requirements.txt", "requirements-dev.txt", "cql_continuous.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "python").write_text(f"""#!/bin/bash
cd "{tmp_path}"
if [ "$1" = -c ]; then if [[ "$2" == *prefix* ]]; then pwd; fi; exit; fi
printf '%q ' "$OMP_NUM_THREADS" "$@" >>calls; echo >>calls
if [[ "$1" == c* ]]; then mkdir -p "a run"; touch "a run/checkpoint.pt"; echo "run: $PWD/a run"; fi
""")
    (tmp_path / "python").chmod(0o755)

    def call(*flags: str) -> tuple[subprocess.CompletedProcess, list[list[str]]]:
        (tmp_path / "calls").write_text("")
        path = {"PATH": f"{tmp_path}:/usr/bin:/bin", "VIRTUAL_ENV": "there is one"}
        process = subprocess.run(["bash", tmp_path / "benchmark.sh", *flags], capture_output=True, text=True, env=path)
        return process, [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]

    return call


def test_quick_start_installs_collects_trains_and_draws(sandbox, tmp_path):
    process, calls = sandbox("quickstart", "--seed", "2")
    assert process.returncode == 0 and "GB" in process.stdout.split("run: ")[0], process.stderr
    pip = "1 -m pip install --disable-pip-version-check -r requirements-dev.txt".split()  # which shows its progress
    train = "1 cal_ql_continuous.py --env-id pick-place --seed 2".split()
    draw = ["1", "tools/plot.py", "--run", f"{tmp_path}/a run"]
    assert calls == [pip, ["1", "-m", "collect.pick_place"], train, draw]
    assert len(sandbox("quickstart")[1]) == 3  # installed before


def test_group_collects_runs_resumes_and_leaves_out(sandbox, tmp_path):
    flags = ["--online-env", "a|b&c\\d", "x y", "$(touch pwned)", "'", "*"]  # which reach the command as they are
    group = ["antmaze-umaze", "--algos", "cql", "--seeds", "1", "--", *flags]
    _, (_, collect, train) = sandbox(*group)
    assert collect[:4] == ["1", "-m", "collect.ant_maze", "umaze"] and not list(tmp_path.glob("**/pwned"))
    assert train[1] == "cql_continuous.py" and train[-len(flags) :] == flags
    process, calls = sandbox(*group)
    assert calls == [collect] and "finished before" in process.stdout
    next(tmp_path.glob("runs/logs/*.done")).unlink()
    assert sandbox(*group)[1] == [collect, [*train, "--resume", f"{tmp_path}/a run"]]  # interrupted, it goes on


@pytest.mark.parametrize("flags", [
    ["nonsense"], ["umaze"], ["antmaze", "--nonsense"], ["antmaze", "--algos"], ["antmaze", "--algos", ","],
    ["antmaze", "--algos", "cal_ql,nonsense", "--dry-run"], ["visual", "--algos", "cql,o3f", "--dry-run"],
    ["antmaze", "--seeds", "99999999999999999999", "--dry-run"], ["antmaze", "--seeds", "0", "--dry-run"],
    ["antmaze", "--workers", "-1", "--dry-run"], ["run-one"], ["run-one", "a", "b"], ["run-one", "touch x"],
    ["run-one", "python missing.py --env-id pen-binary --seed 1"], ["run-one", "'"],
])  # fmt: skip
def test_benchmark_refuses_nonsense_in_one_sentence(flags):
    process = benchmark(*flags)
    assert process.returncode == 2 and not process.stdout
    assert len(process.stderr.splitlines()) == 1 and process.stderr.startswith("error: ")


# --- README and docs --------------------------------------------------------------------------------------------------
def read_commands(page: Path) -> list[str]:
    """The commands of the page's bash blocks, each in one line, without comments and without variables in front."""
    text = "\n".join(re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)).replace("\\\n", " ")
    lines = [" ".join(re.sub(r"^(\w+=\S* +)*|\s*#.*", "", line).split()) for line in text.splitlines()]
    return [re.sub("^uv run", "python", line) for line in lines if line]


COMMANDS = [(page, line) for page in PAGES for line in read_commands(page)]
COMMANDS += [(PAGES[0], f"python {name_of(tool)}") for tool in ROOT.glob("tools/*.py") if tool.stem != "policy"]


@pytest.mark.parametrize("page, line", COMMANDS, ids=lambda value: value if isinstance(value, str) else name_of(value))
def test_command_of_a_page_works(page, line):
    """Its flags are known and its files are there: its settings are parsed, or it is run dry, or asked for help."""
    program, first, *rest = shlex.split(line)
    if program == "./benchmark.sh" and first == "quickstart":
        parse("cal_ql_continuous.py", ["--env-id", "pick-place", *rest])
    elif program == "./benchmark.sh":
        assert first == "test" or commands_of(first, *[word for word in rest if word != "--slurm"])  # it writes files
    elif program == "python" and first == "-m":
        tyro.cli(load(rest[0]).Args, args=rest[1:])
    elif program == "python" and first.startswith("tools/"):
        known = help_of(first) + "".join(f" --{name.replace('_', '-')} " for name in script.Args.__dataclass_fields__)
        assert all(re.search(rf"{word}\b", known) for word in rest if word.startswith("--"))
    elif program == "python" and (ROOT / first).exists():
        try:
            parse(first, rest)
        except SystemExit as stop:
            assert "--help" in rest and stop.code == 0
    elif program == "python":  # the page's own
        assert "```python" in page.read_text()
    else:
        known = ("source", "cp", "git", "cd", "sudo", "tensorboard")
        assert program in known or (program == "pip" and (ROOT / rest[-1]).exists()), "nothing checks this program"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_flags_and_files_that_a_page_names_exist(path):
    text = path.read_text()
    assert path.name != "README.md" or len(text.splitlines()) <= 130
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        assert target.startswith("https://") or (path.parent / target).exists(), target
    names = re.findall(r"(?<![\w/.-])((?:tools|collect|tests|docs)/\w+\.\w+|\w+\.(?:sh|py))(?!\w)", text)
    for name in {*names} - {"robot.py", "reach.py", "my_cal_ql.py"}:  # which their pages print
        folders = ("", "tools/", "collect/", "baselines/", "tests/")
        assert any((ROOT / folder / name).exists() for folder in folders), name
    known = "".join(file.read_text() for file in [*FAMILY, *TOOLS, ROOT / "tests/breaking.py", ROOT / "benchmark.sh"])
    for flag in set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", text)) - {"logdir"}:  # TensorBoard's
        name = flag.removeprefix("no-").replace("-", "_")
        assert re.search(rf"\b{name}\b", known) or f"--{flag}" in known, flag


def test_metrics_page_lists_what_is_logged():
    pattern = r"((?:losses|calibration|charts)/\w+)"
    names = set(re.findall(f'"{pattern}"', "".join(path.read_text() for path in FAMILY)))
    assert len(names) > 20 and names == set(re.findall(f"`{pattern}`", (ROOT / "docs/metrics.md").read_text()))


def test_published_runs_are_whole_and_tables_are_what_they_say():
    for folder in ROOT.glob("results/*/*/"):
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "eval.csv"]
        config = json.loads((folder / "config.json").read_text())
        assert config["env_id"] == folder.parent.name and folder.name.endswith(f"-seed{config['seed']}")
        assert (ROOT / "docs" / "figures" / folder.parent.name / "curves.png").exists()
    assert report.main(["--check"]) == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two updates and one online episode on three demonstrations, in a folder of its own."""
    pick_place, folder = importlib.import_module("collect.pick_place"), tmp_path_factory.mktemp("policy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder / "data"))
        patch.chdir(folder)
        pick_place.collect(pick_place.Args(episodes=3))
        flags = ["--env-id", "pick-place", "--offline-steps", "2", "--online-steps", "1", "--eval-episodes", "1"]
        script.train(*script.parse_args([*flags, "--buffer-size", "100"]))
        yield next((folder / "runs").iterdir())


def test_policy_of_the_readme_runs_as_it_stands(run):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(block.strip().splitlines()) <= 15 and "weights_only=True" in block
    exec(block.replace("runs/<run>", f"runs/{run.name}"), names := {})
    assert names["done"] and names["info"]["score"] in (0, 1) and names["state"].shape == (11,)


@pytest.mark.parametrize("what, word", [("update", "trained"), ("load", "ReplayBuffer"), ("run", "evaluation")])
def test_bench_measures(run, what, word, capsys, monkeypatch):
    flags = "--env-id pick-place --turns 1 --train-updates 2 --batch-size 8 --offline-steps 2 --online-steps 1"
    monkeypatch.setattr("sys.argv", ["bench", what, *flags.split(), "--eval-episodes", "1", "--buffer-size", "100"])
    assert load("tools/bench.py").main() == 0
    assert re.search(rf"(?m)^{word}\b.* \d", capsys.readouterr().out)
