"""The files themselves: requirements, imports, help, commands, README and docs."""

import csv
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import minari
import pytest
import torch

import cal_ql_continuous as script

pytest.importorskip("rliable")
from tools import plot, report  # noqa: E402

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(ROOT.glob("*.py"))
TOOLS = sorted([*ROOT.glob("tools/*.py"), *ROOT.glob("collect/*.py")])
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("results/*.md"))]
DATASET = "cal-ql/pick-place/narrow-v0"


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read_requirements(name: str) -> list[str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return sorted(line for line in lines if line and not line.startswith("-"))


def test_requirements_are_exact():
    lines = read_requirements("requirements.txt") + read_requirements("requirements-dev.txt")
    assert len(lines) > 10 and all(re.fullmatch(r"[\w-]+(\[[\w,]+\])?==[\w.]+", line) for line in lines)


@pytest.mark.parametrize("path", [path for path in SCRIPTS if "# /// script" in path.read_text()], ids=name_of)
def test_script_lists_the_requirements(path):
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)*?)# ///$", path.read_text())
    metadata = tomllib.loads(re.sub(r"(?m)^# ?", "", block[1]))
    assert sorted(metadata["dependencies"]) == read_requirements("requirements.txt")
    assert metadata["requires-python"] == ">=3.11,<3.14"


def test_import_has_no_side_effects(tmp_path):
    modules = [name_of(path)[:-3].replace("/", ".") for path in SCRIPTS + TOOLS]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(modules)}"
    # An unknown flag would end a script that reads its arguments on import.
    process = subprocess.run([sys.executable, "-B", "-c", code, "--no-such-flag"], cwd=tmp_path, capture_output=True)
    assert process.returncode == 0 and not process.stdout, process.stderr.decode()
    assert not list(tmp_path.iterdir())


def test_help_shows_each_task_and_its_settings(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())  # lines are wrapped to the terminal
    for name, settings in script.SETTINGS.items():
        shown = re.search(rf"(?<![\w-]){name}: (.*?) (?=[\w-]+: |╭|usage|options)", printed)[1]
        for setting, value in settings.items():
            assert f"{setting} {value}" in shown, f"{name}: {setting} {value}"
    assert all(name in printed for name in script.TASKS)


@pytest.mark.parametrize("tool", ["plot", "report", "bench"])
def test_tools_run_from_anywhere(tmp_path, tool):
    command = [sys.executable, ROOT / "tools" / f"{tool}.py", "--help"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0 and f"tools/{tool}.py" in process.stdout, process.stderr


@pytest.mark.parametrize("flags", [
    ["update", "--env-id", "nonsense"],
    ["update", "--repeats", "0"],
    ["update", "--threads", "-1"],
    ["online", "--env-id", "pick-place-pixels"],
    ["load", "--gamma", "7"],
])  # fmt: skip
def test_bench_refuses_nonsense(capsys, flags):
    bench = importlib.import_module("tools.bench")
    assert bench.main(flags) == 2
    assert capsys.readouterr().err.count("error: ") == 1


def test_bench_counts_the_products_that_torch_makes():
    from torch.utils.flop_counter import FlopCounterMode

    bench = importlib.import_module("tools.bench")
    case = bench.Bench(
        ["--env-id", "antmaze-umaze", "--batch-size", "8", "--critic-layers", "32", "16"], "cpu", False, 1
    )
    with FlopCounterMode(display=False) as counter:
        case.update_of("fresh")()
    assert counter.get_total_flops() == pytest.approx(bench.count_work(case.args, *case.sizes)[0], rel=0.02)


def test_bench_update_measures_all_cases(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))  # so that data is made up
    bench = importlib.import_module("tools.bench")
    flags = (
        "--batch-size 8 --critic-layers 16 --actor-layers 16 --num-actions 2 --train-updates 3 --repeats 2 --threads 1"
    )
    assert bench.main(["update", "--env-id", "antmaze-umaze", *flags.split()]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 <= result["denormal_gradients"] <= 1 and result["roofline_ms"] > 0
    assert list(result["cases"]) == [
        f"{state} {case}" for state in ("fresh", "trained")
        for case in ("batched flushed", "batched kept", "plain flushed")
    ]  # fmt: skip
    assert all(case["ms"] > 0 for case in result["cases"].values())


def test_plain_critic_computes_the_same():
    bench = importlib.import_module("tools.bench")
    for norm in (False, True):
        args = script.Args(critic_layers=(16, 8), num_critics=3, critic_layer_norm=norm)
        critic, plain = script.Critic(5, 2, args), bench.PlainCritic(5, 2, args)
        plain.load_state_dict(critic.state_dict())
        states, actions = torch.randn(4, 5), torch.randn(4, 6, 2)
        torch.testing.assert_close(plain(states, actions), critic(states, actions))


# --- benchmark.sh -----------------------------------------------------------------------------------------------------
def benchmark(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", ROOT / "benchmark.sh", *flags], capture_output=True, text=True, timeout=60)


def test_dry_run_prints_commands_that_parse():
    lines = benchmark("all", "--dry-run", "--seeds", "1").stdout.splitlines()
    assert len(lines) > 60 and len(set(lines)) == len(lines)
    for line in lines:
        python, path, *flags = shlex.split(line)
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        args = module.parse_args(flags)
        assert python == "python" and args.seed == 1 and args.env_id in module.TASKS, line


def test_visual_group_has_each_cell_of_table_2():
    names = []
    for line in benchmark("visual", "--dry-run", "--seeds", "1").stdout.splitlines():
        _, path, *flags = shlex.split(line)
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        config = vars(module.parse_args(flags))
        assert config["env_id"] == "pick-place-pixels" and path.endswith("_pixels.py")
        names.append(plot.name_algorithm(Path(path).stem, config))
    assert names == ["Cal-QL", "CQL", "CQL+SAC", "SAC", "SAC + offline data", "Hybrid RL", "IQL", "AWAC"]
    with (ROOT / "tools/paper.csv").open() as file:
        assert {row["algorithm"] for row in csv.DictReader(file) if row["task"] == "manipulation"} == {*names}


def test_flags_of_the_second_quick_start_parse():
    block = re.findall(r'(?m)^UMAZE_FLAGS\+?="(.*)"$', (ROOT / "benchmark.sh").read_text())
    args = script.parse_args(["--env-id", "antmaze-umaze", *" ".join(block).split()])
    assert args.num_actions != script.task_defaults("antmaze-umaze").num_actions


def test_flags_reach_the_command_as_they_are():
    flags = ["--env-id", "a|b&c\\d", "x y", "$(touch pwned)", "'", "*"]
    (line,) = benchmark("pick-place", "--algos", "cql", "--seeds", "1", "--dry-run", "--", *flags).stdout.splitlines()
    assert shlex.split(line)[-len(flags) :] == flags


def test_run_one_runs_a_line_as_it_was_printed(tmp_path):
    shutil.copy(ROOT / "benchmark.sh", tmp_path)
    (tmp_path / "echo.py").write_text("import sys; print(sys.argv[1:])\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    line = r"python echo.py --env-id cal-ql/a-v0 --seed 1 a\|b\&c\\d x\ y \$\(touch\ pwned\) \*"
    path = f"{tmp_path}/bin:/usr/bin:/bin"
    command = ["bash", tmp_path / "benchmark.sh", "run-one", line]
    process = subprocess.run(command, capture_output=True, text=True, env={"PATH": path})
    assert process.returncode == 0 and not (tmp_path / "pwned").exists(), process.stderr
    words = ["--env-id", "cal-ql/a-v0", "--seed", "1", "a|b&c\\d", "x y", "$(touch pwned)", "*"]
    assert process.stdout.splitlines()[-1] == str(words)
    assert "finished before" in subprocess.run(command, capture_output=True, text=True, env={"PATH": path}).stdout


@pytest.mark.parametrize("flags", [
    ["nonsense"],
    ["antmaze", "--algos", ","],
    ["antmaze", "--algos", "cal_ql,nonsense", "--dry-run"],
    ["antmaze", "--algos"],
    ["antmaze", "--seeds", "99999999999999999999", "--dry-run"],
    ["antmaze", "--seeds", "1000000", "--dry-run"],
    ["antmaze", "--seeds", "0", "--dry-run"],
    ["antmaze", "--workers", "-1", "--dry-run"],
    ["antmaze", "--nonsense"],
    ["visual", "--algos", "cql,o3f", "--dry-run"],
    ["run-one"],
    ["run-one", "a", "b"],
    ["run-one", "touch x"],
    ["run-one", "python missing.py --env-id pen-binary --seed 1"],
    ["run-one", "'"],
])  # fmt: skip
def test_benchmark_refuses_nonsense_in_one_sentence(flags):
    process = benchmark(*flags)
    assert process.returncode == 2 and not process.stdout
    assert len(process.stderr.splitlines()) == 1 and process.stderr.startswith("error: ")


# --- README and docs --------------------------------------------------------------------------------------------------
def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_named_files_and_flags_exist(path):
    text = path.read_text()
    names = re.findall(r"(?<![\w/.-])((?:tools|collect|tests|docs)/\w+\.\w+|\w+\.(?:sh|py))(?!\w)", text)
    for name in {*names} - {"robot.py"}:  # which its page prints
        folders = ("", "tools/", "collect/", "baselines/", "tests/")
        assert any((ROOT / folder / name).exists() for folder in folders), name
    known = "".join(file.read_text() for file in [*SCRIPTS, *TOOLS, ROOT / "benchmark.sh", ROOT / "tests/breaking.py"])
    for flag in set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", text)) - {"logdir"}:  # TensorBoard's
        name = flag.removeprefix("no-").replace("-", "_")
        assert re.search(rf"\b{name}\b", known) or f"--{flag}" in known, flag


def test_metrics_page_lists_what_is_logged():
    page = (ROOT / "docs" / "metrics.md").read_text()
    scripts = "".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("baselines/*.py")])
    names = set(re.findall(r'"((?:losses|calibration|charts)/\w+)"', scripts))
    assert len(names) > 20
    listed = set(re.findall(r"`((?:losses|calibration|charts)/\w+)`", page))
    assert listed == names


def test_tables_are_what_results_say():
    assert report.main(["--check"]) == 0


@pytest.mark.parametrize("folder", sorted(ROOT.glob("results/*/*/")), ids=name_of)
def test_published_runs_are_whole(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "eval.csv"]
    config = json.loads((folder / "config.json").read_text())
    assert config["env_id"] == folder.parent.name and folder.name.endswith(f"-seed{config['seed']}")
    assert (ROOT / "docs" / "figures" / folder.parent.name / "curves.png").exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two updates and one online episode on three demonstrations, in a folder of its own."""
    pick_place, folder = importlib.import_module("collect.pick_place"), tmp_path_factory.mktemp("policy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder / "data"))
        patch.chdir(folder)
        pick_place.collect(pick_place.Args(dataset_id=DATASET, episodes=3))
        flags = ["--env-id", "pick-place", "--offline-steps", "2", "--online-steps", "1", "--eval-episodes", "1"]
        assert script.main([*flags, "--buffer-size", "100"]) == 0
        assert DATASET in minari.list_local_datasets()
        yield next((folder / "runs").iterdir())


def test_policy_of_the_readme_runs_as_it_stands(run):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1 and len(blocks[0].strip().splitlines()) <= 15 and "weights_only=True" in blocks[0]
    names = {}
    exec(blocks[0].replace("runs/<run>", f"runs/{run.name}"), names)
    assert names["over"] and names["info"]["score"] in (0, 1) and names["state"].shape == (11,)


def test_plot_reads_what_a_run_writes(run):
    ((name, (read,)),) = plot.read_runs([str(run)])["pick-place"].items()
    assert name == "Cal-QL" and read.goal == 1 and read.finished and len(read.offline) == 2 and len(read.online) == 1


def test_film_strip(run, tmp_path, capsys):
    code = plot.main(["--film", str(run), "--out", str(tmp_path), "--attempts", "1", "--frames", "4"])
    printed = capsys.readouterr().err
    if code and "cannot be drawn" in printed:
        pytest.skip("no OpenGL")
    assert code == 0 and (tmp_path / "film.png").exists() and "40 steps" in printed


@pytest.mark.parametrize("spoil", ["missing", "text", "cut", "script"])
def test_film_of_a_damaged_checkpoint(run, tmp_path, capsys, spoil):
    path, content = tmp_path / "checkpoint.pt", (run / "checkpoint.pt").read_bytes()
    if spoil == "script":  # only the scripts that are here are ever imported
        torch.save(torch.load(run / "checkpoint.pt", weights_only=True) | {"script": "../tests/conftest.py"}, path)
    elif spoil != "missing":
        path.write_bytes(b"text" if spoil == "text" else content[: len(content) // 2])
    assert plot.main(["--film", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and not (tmp_path / "out").exists()
