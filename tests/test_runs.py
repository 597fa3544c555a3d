"""Whole runs, tiny ones, of each script: what they write, how they stop and go on, what they say to bad input."""

import copy
import dataclasses
import hashlib
import importlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
import wandb
from minari.data_collector import EpisodeBuffer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from collect import from_run, pick_place

NAMES = ["cal_ql_continuous", "cql_continuous", "sac_offline_data"]
# 200 updates with evaluations at 0, 80, 160 and 200, then 3 episodes of 5 steps with two updates a step.
TINY = """--env-id pick-place --episode-length 5 --offline-steps 200 --online-steps 15 --offline-eval-interval 80
--online-eval-interval 8 --eval-episodes 2 --utd-ratio 2 --actor-interval 2 --buffer-size 12 --actor-layers 8
--critic-layers 8 --batch-size 8 --device cpu --reward-bias -2""".split()
COLUMNS = "phase updates env_steps score return regret mean_q mean_mc_return bound_rate wall_time".split()


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory):
    path = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(path))
        pick_place.collect(pick_place.Args())
    return path


@pytest.fixture(autouse=True)
def surroundings(demonstrations, monkeypatch):
    """What a run changes in its process is put back after each test."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(demonstrations))
    monkeypatch.setattr(sys, "path", [*sys.path])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name in NAMES:
        importlib.import_module(name).SIGNALS.clear()


@pytest.fixture(params=NAMES)
def script(request) -> types.ModuleType:
    return importlib.import_module(request.param)


@pytest.fixture
def cal_ql() -> types.ModuleType:
    """For what is the same to the letter in all scripts."""
    return importlib.import_module("cal_ql_continuous")


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The folder for the test's runs; nothing else lies in the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def start(script, *flags: str) -> int:
    """The exit code of a run in this process; as a process does, it prints a text that it exits with."""
    script.SIGNALS.clear()
    try:
        return script.main([*flags])
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code


def only(runs: Path) -> Path:
    (run,) = runs.iterdir()
    return run


def read(run: Path) -> dict:
    return torch.load(run / "checkpoint.pt", weights_only=True)


def table(run: Path) -> list[dict[str, str]]:
    columns, *rows = [line.split(",") for line in (run / "eval.csv").read_text().splitlines()]
    return [dict(zip(columns, row, strict=True)) for row in rows]


def at_call(count: int, function, then):
    """`function`, which calls `then` before its call number `count`."""
    calls = itertools.count(1)

    def wrapped(*args, **kwargs):
        if next(calls) == count:
            then()
        return function(*args, **kwargs)

    return wrapped


def in_child(function) -> int:
    """Runs the function in a fork of this process, and returns the number of the signal that ended that."""
    child = os.fork()
    if not child:
        try:
            function()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def error_line(capsys) -> str:
    """The one line of an error; no traceback beside it."""
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if "error: " in line]
    return line


# ---- What a run writes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=NAMES)
def whole(request, demonstrations, tmp_path_factory) -> tuple[types.ModuleType, Path]:
    """A script and its run from beginning to end."""
    script = importlib.import_module(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(demonstrations))
        patch.chdir(tmp_path_factory.mktemp("whole"))
        assert start(script, *TINY) == 0
        return script, only(Path("runs").absolute())


def test_evaluations(whole):
    script, run = whole
    assert run.name.startswith(f"pick-place__{script.__name__}__1__")
    rows = table(run)
    assert list(rows[0]) == COLUMNS
    steps = [(row["phase"], int(row["updates"]), int(row["env_steps"])) for row in rows]
    assert steps[:4] == [("offline", updates, 0) for updates in (0, 80, 160, 200)]
    assert steps[4:] == [("online", 220, 10), ("online", 230, 15)]  # online steps are the episodes' sum
    for row in rows:
        assert all(math.isfinite(float(row[name])) for name in ("score", "return", "mean_q", "mean_mc_return"))
        assert 0 <= float(row["bound_rate"]) <= 1
        assert math.isfinite(float(row["regret"])) == (row["phase"] == "online")
    seconds = [float(row["wall_time"]) for row in rows]
    assert seconds == sorted(seconds) and seconds[-1] > 0


def test_settings_are_recorded(whole):
    config = json.loads((whole[1] / "config.json").read_text())
    assert (config["env_id"], config["utd_ratio"], config["actor_layers"]) == ("pick-place", 2, [8])
    assert (config["reward_bias"], config["reward_scale"], config["gamma"]) == (-2, 11, 0.96)  # given, and the task's


def test_tensorboard_has_the_curves(whole):
    script, run = whole
    events = EventAccumulator(str(run)).Reload()
    assert {
        "losses/qf_loss", "losses/actor_loss", "losses/alpha", "charts/episodic_return", "charts/episodic_length",
        "eval/score", "eval/mean_q", "eval/mean_mc_return", "eval/bound_rate",
    } <= set(events.Tags()["scalars"])  # fmt: skip
    assert ("losses/cql_gap" in events.Tags()["scalars"]) == (script.__name__ != "sac_offline_data")
    # The x-axis: offline updates, and from there on environment steps, whatever the updates per step.
    assert [event.step for event in events.Scalars("eval/score")] == [0, 80, 160, 200, 210, 215]
    assert [event.step for event in events.Scalars("charts/episodic_length")] == [205, 210, 215]
    assert [event.value for event in events.Scalars("charts/episodic_length")] == [5, 5, 5]


def test_standard_output(cal_ql, runs, capsys):
    assert start(cal_ql, *TINY, "--offline-steps", "0", "--online-steps", "5") == 0
    output = capsys.readouterr().out
    assert "data: 10 episodes" in output and "actions fill" in output
    assert f"run: {only(runs).relative_to(runs.parent)} on cpu" in output and "reward_bias -2.0" in output
    assert "phase offline" in output and "phase online" in output and "score" in output


@pytest.mark.parametrize("name", NAMES)
def test_script_runs_alone(name, demonstrations, tmp_path):
    """Copied into an empty folder it runs as a process; it says what it misses where a task needs more than itself."""
    code = Path(importlib.import_module(name).__file__)
    shutil.copy(code, tmp_path)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, tmp_path / code.name, *TINY]
    kwargs = dict(cwd=tmp_path, env=env, capture_output=True, text=True)
    result = subprocess.run(command, **kwargs)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") and "No module named 'collect'" in result.stderr
    if name == NAMES[0]:  # with it there, the working directory's modules are found
        os.symlink(code.parent / "collect", tmp_path / "collect")
        result = subprocess.run([*command, "--offline-steps", "3", "--online-steps", "5"], **kwargs)
        assert result.returncode == 0, result.stderr
        assert len(table(only(tmp_path / "runs"))) == 3


# ---- Stopping and going on -------------------------------------------------------------------------------------------


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def check_equal(run: Path, other: Path, but: tuple[str, ...] = ()) -> None:
    """All that a run holds in the end is equal, to the bit, but for the time that it took."""
    states = [read(run), read(other)]
    for state in states:
        del state["progress"]["wall_time"]
        for row in state["progress"]["rows"]:
            del row["wall_time"]
    for key in {"progress", "agent", "optimizer", "buffer", "rng"} - {*but}:
        assert same(states[0][key], states[1][key]), key
    if "progress" not in but:
        tables = [[row | {"wall_time": ""} for row in table(path)] for path in (run, other)]
        assert tables[0] == tables[1] and tables[0]


@pytest.mark.parametrize("call", [100, 225], ids=["offline", "online"])
def test_killed_run_resumes(call, whole, runs, monkeypatch):
    """SIGKILL amid the updates: what came after the last checkpoint is done again, to the bit."""
    script, uninterrupted = whole

    def killed_run():
        def kill():
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(script, "update", at_call(call, script.update, kill))
        start(script, *TINY)

    assert in_child(killed_run) == signal.SIGKILL
    run = only(runs)
    assert read(run)["progress"]["updates"] == {100: 80, 225: 220}[call]
    torch.manual_seed(99)  # the random state comes from the checkpoint
    assert start(script, "--resume", str(run)) == 0
    check_equal(run, uninterrupted)


@pytest.mark.parametrize("number, call, saved", [
    (signal.SIGTERM, 70, 70), (signal.SIGINT, 203, 210), (signal.SIGTERM, 230, 230),
])  # fmt: skip
def test_stopped_run_resumes(number, call, saved, whole, runs, monkeypatch, capsys):
    """Offline the run stops after the update, online after the episode's updates."""
    script, uninterrupted = whole
    with monkeypatch.context() as patch:
        patch.setattr(script, "update", at_call(call, script.update, lambda: signal.raise_signal(number)))
        assert start(script, *TINY) == 128 + number
    run = only(runs)
    assert f"--resume {run.relative_to(runs.parent)} continues" in capsys.readouterr().err
    assert read(run)["progress"]["updates"] == saved
    assert start(script, "--resume", str(run)) == 0
    check_equal(run, uninterrupted)


def test_a_run_saves_every_ten_minutes_also_after_it_was_resumed(cal_ql, runs, monkeypatch):
    """Each update takes a minute; evaluations, which save too, come at the start and at the end."""
    now, saves, update, save = [1e6], [], cal_ql.update, cal_ql.save

    def slow_update(*arguments):
        now[0] += 60
        return update(*arguments)

    def counted_save(run, args, progress, **parts):
        saves.append(progress.updates)
        save(run, args, progress, **parts)

    clock = types.SimpleNamespace(time=lambda: now[0], time_ns=cal_ql.time.time_ns)
    for name, value in (("time", clock), ("update", slow_update), ("save", counted_save)):
        monkeypatch.setattr(cal_ql, name, value)
    flags = ["--offline-steps", "35", "--offline-eval-interval", "100", "--online-steps", "0"]
    assert start(cal_ql, *TINY, *flags) == 0
    assert saves == [0, 11, 22, 33, 35]
    saves.clear()
    now[0] += 1e5  # the time between two processes is not the run's
    assert start(cal_ql, "--resume", str(only(runs)), "--offline-steps", "60") == 0
    assert saves == [46, 57, 60]


def test_a_second_signal_stops_at_once(cal_ql, runs, monkeypatch):
    def stop():
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        signal.raise_signal(signal.SIGTERM)

    def run():
        monkeypatch.setattr(cal_ql, "update", at_call(100, cal_ql.update, stop))
        start(cal_ql, *TINY)

    assert in_child(run) == signal.SIGTERM
    assert read(only(runs))["progress"]["updates"] == 80


@pytest.mark.parametrize("call", [3, 4], ids=["before offline.pt", "before checkpoint.pt"])
def test_killed_while_saving_keeps_the_last_checkpoint(call, cal_ql, runs, monkeypatch):
    """In the second save of the offline phase; each replaces two files."""

    def run():
        def kill():
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(cal_ql.os, "replace", at_call(call, os.replace, kill))
        start(cal_ql, *TINY)

    assert in_child(run) == signal.SIGKILL
    (run,) = runs.iterdir()
    assert [*run.glob("checkpoint.*.partial")] and read(run)["progress"]["updates"] == 0
    offline = cal_ql.read_checkpoint(str(run), "offline.pt")["progress"]["updates"]
    assert offline == (0 if call == 3 else 80)
    assert start(cal_ql, "--resume", str(run), "--offline-steps", "10", "--online-steps", "0") == 0


def test_evaluations_leave_no_trace_in_training(whole, runs):
    script, uninterrupted = whole
    intervals = ["--offline-eval-interval", "60", "--online-eval-interval", "5", "--eval-episodes", "1"]
    assert start(script, *TINY, *intervals) == 0
    check_equal(only(runs), uninterrupted, but=("progress",))


@pytest.mark.parametrize("whole", NAMES[:1], indirect=True)
def test_evaluations_in_processes_are_those_of_the_run_itself(whole, runs):
    script, uninterrupted = whole
    assert start(script, *TINY, "--eval-async") == 0
    check_equal(only(runs), uninterrupted)


@pytest.fixture
def finished(whole, runs):
    """The script and a copy of its finished run."""
    return whole[0], Path(shutil.copytree(whole[1], runs / "finished"))


cal_ql_only = pytest.mark.parametrize("whole", NAMES[:1], indirect=True)


@cal_ql_only
def test_finished_run_can_be_extended(finished):
    script, run = finished
    before = table(run)
    changes = "--online-steps 25 --online-eval-interval 20 --offline-eval-interval 7 --threads 1 --eval-async"
    assert start(script, "--resume", str(run), *changes.split()) == 0
    rows = table(run)
    assert rows[: len(before)] == before
    assert [int(row["env_steps"]) for row in rows[len(before) :]] == [20, 25]
    assert json.loads((run / "config.json").read_text())["online_steps"] == 25
    assert start(script, "--resume", str(run)) == 0 and table(run) == rows  # nothing is left to do
    # Once online there are no more offline updates, whatever their total is said to be now.
    assert start(script, "--resume", str(run), "--offline-steps", "900", "--online-steps", "30") == 0
    assert read(run)["progress"]["updates"] == 230 + 2 * 15


@cal_ql_only
@pytest.mark.parametrize("flags", [
    "--gamma 0.9", "--batch-size 16", "--env-id antmaze-umaze", "--utd-ratio 1", "--seed 2", "--buffer-size 13",
    "--critic-layers 9", "--num-actions 5", "--cql-lagrange", "--reward-bias -1", "--episode-length 6",
    "--eval-episodes 3", "--mixing-ratio 0.25",
])  # fmt: skip
def test_resume_refuses_other_settings(flags, finished, capsys):
    script, run = finished
    assert start(script, "--resume", str(run), *flags.split()) == 2
    name = flags.split()[0].removeprefix("--").replace("-", "_")
    assert error_line(capsys).startswith(f"error: a resumed run cannot change {name}:")


class Code:
    """Pickled, it makes a file when it is loaded."""

    def __reduce__(self):
        return open, ("pwned", "w")


def sign(path: Path, content: bytes) -> None:
    path.write_bytes(content + hashlib.sha256(content).hexdigest().encode())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def save_as(path: Path, change) -> None:
    """A checkpoint that is whole, and that another program could have written."""
    torch.save(read(path.parent) | change, path)
    sign(path, path.read_bytes())


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:3000]),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "one bit flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "missing": lambda path: path.unlink(),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "another script's": lambda path: save_as(path, {"script": "cal_ql_pixels.py"}),
    "code": lambda path: path.write_bytes(pickle.dumps(Code())),
    # Whole, but of another version.
    "a setting more": lambda path: save_as(path, {"args": read(path.parent)["args"] | {"new": 1}}),
    "no settings": lambda path: save_as(path, {"args": {}}),
    "no networks": lambda path: save_as(path, {"agent": {}}),
    "no progress": lambda path: save_as(path, {"progress": {}}),
    "no evaluations": lambda path: save_as(path, {"progress": read(path.parent)["progress"] | {"rows": []}}),
    "no moments": lambda path: save_as(path, {"optimizer": {"state": {}}}),
    "no random state": lambda path: save_as(path, {"rng": []}),
    "no replay": lambda path: save_as(path, {"buffer": {}}),
    "another dataset's replay": lambda path: save_as(
        path, {"buffer": read(path.parent)["buffer"] | {"num_offline": 1}}
    ),
}


@cal_ql_only
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_bad_checkpoint_is_refused_and_kept(damage, finished, capsys):
    script, run = finished
    path = run / "checkpoint.pt"
    damage(path)
    before = path.read_bytes() if path.is_file() else path.exists()
    others = {each: each.read_bytes() for each in run.iterdir() if each != path}
    assert start(script, "--resume", str(run)) == 2
    line = error_line(capsys)
    assert line.startswith("error: ") and ("finished" in line or "cannot go on from there" in line)
    assert ("cal_ql_pixels.py" in line) == (damage is DAMAGES["another script's"])
    assert before == (path.read_bytes() if path.is_file() else path.exists())
    assert others == {each: each.read_bytes() for each in run.iterdir() if each != path}


@cal_ql_only
def test_a_signed_checkpoint_runs_no_code_either(finished):
    """Whoever makes a checkpoint can make its digest too; only tensors and plain values are read."""
    script, run = finished
    path = run / "checkpoint.pt"
    torch.save({"script": "cal_ql_continuous.py", "args": Code()}, path)
    sign(path, path.read_bytes())
    with pytest.raises(Exception, match="(?i)weights"):
        script.read_checkpoint(str(run))
    assert not Path("pwned").exists()


@pytest.mark.parametrize("folder", ["", "runs/nowhere", "."])
def test_missing_run_is_refused(folder, cal_ql, runs, capsys):
    assert start(cal_ql, "--resume", folder) == 2
    assert "missing" in error_line(capsys)
    assert not runs.exists()


@cal_ql_only
def test_checkpoint_of_another_device_is_continued(finished):
    """Written on a GPU it says that Adam can be captured, and holds more random states than there are devices here."""
    script, run = finished
    state = read(run)
    for group in state["optimizer"]["param_groups"]:
        group["capturable"] = True
    save_as(run / "checkpoint.pt", {"optimizer": state["optimizer"], "rng": [*state["rng"], state["rng"][0]]})
    assert start(script, "--resume", str(run), "--online-steps", "20") == 0
    assert [group["capturable"] for group in read(run)["optimizer"]["param_groups"]] == [False, False]


@cal_ql_only
def test_resume_refuses_a_changed_dataset(finished, demonstrations, tmp_path, monkeypatch, capsys):
    script, run = finished
    shutil.copytree(demonstrations, tmp_path / "minari")
    path = tmp_path / "minari/cal-ql/pick-place/narrow-v0/data/metadata.json"
    path.write_text(path.read_text().replace('"total_episodes": 10', '"total_episodes": 9'))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    assert start(script, "--resume", str(run)) == 2
    assert error_line(capsys).startswith("error: ")


def test_weights_that_are_not_finite_end_the_run(script, runs, monkeypatch, capsys):
    update, calls = script.update, itertools.count(1)

    def broken(agent, *rest):
        if next(calls) == 100:
            agent.log_alpha.data.fill_(math.nan)
        return update(agent, *rest)

    monkeypatch.setattr(script, "update", broken)
    assert start(script, *TINY) == 1
    line = error_line(capsys)
    assert "is not finite after 160 updates" in line and str(only(runs).relative_to(runs.parent)) in line
    assert read(only(runs))["progress"]["updates"] == 80
    assert len(table(only(runs))) == 2


def test_a_loss_that_is_not_finite_ends_the_run_by_its_name(script, runs, monkeypatch, capsys):
    update = script.update
    monkeypatch.setattr(script, "update", lambda *rest: update(*rest) | {"losses/qf_loss": torch.tensor(math.inf)})
    assert start(script, *TINY, "--utd-ratio", "1") == 1
    assert "losses/qf_loss is not finite after 100 updates" in error_line(capsys)
    assert read(only(runs))["progress"]["updates"] == 80


@cal_ql_only
@pytest.mark.parametrize("share", [0.1, 0.9, 0.9999])
def test_a_full_disk_keeps_the_last_checkpoint(share, finished, capsys):
    """No file may grow beyond a limit, which stands for the end of a disk; the last one cuts off the digest alone."""
    script, run = finished
    before = (run / "checkpoint.pt").read_bytes()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * len(before)), hard))
    try:
        assert start(script, "--resume", str(run), "--online-steps", "20") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "File too large" in error_line(capsys)
    assert (run / "checkpoint.pt").read_bytes() == before
    assert start(script, "--resume", str(run), "--online-steps", "20") == 0


def test_a_killed_process_of_the_evaluation(cal_ql, runs, monkeypatch, capsys):
    def kill():
        multiprocessing.active_children()[0].kill()

    with monkeypatch.context() as patch:
        patch.setattr(cal_ql, "update", at_call(100, cal_ql.update, kill))
        assert start(cal_ql, *TINY, "--eval-async") == 2
    assert "--eval-async was killed" in error_line(capsys)
    assert read(only(runs))["progress"]["updates"] == 80


@pytest.mark.parametrize("name", NAMES)
def test_ctrl_c_amid_the_imports_says_nothing(name, tmp_path):
    code = Path(importlib.import_module(name).__file__)
    shutil.copy(code, tmp_path)
    (tmp_path / "gymnasium.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
    result = subprocess.run([sys.executable, tmp_path / code.name], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, "", "")


def test_two_processes_may_continue_one_run(cal_ql, runs):
    """Each writes a file of its own before it replaces the checkpoint."""
    assert start(cal_ql, *TINY, "--offline-steps", "3", "--online-steps", "0") == 0
    run = only(runs)
    (run / "checkpoint.1.partial").write_text("another process's")
    assert start(cal_ql, "--resume", str(run), "--offline-steps", "5") == 0
    assert (run / "checkpoint.1.partial").read_text() == "another process's" and read(run)["progress"]["updates"] == 5


def test_a_file_in_the_place_of_runs(cal_ql, runs, capsys):
    runs.write_text("")
    assert start(cal_ql, *TINY) == 2
    assert "runs" in error_line(capsys)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_moves_from_cpu_to_gpu(script, runs, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(script, "update", at_call(70, script.update, lambda: signal.raise_signal(signal.SIGTERM)))
        assert start(script, *TINY) == 143
    run = only(runs)
    assert start(script, "--resume", str(run), "--device", "cuda") == 0
    assert int(table(run)[-1]["env_steps"]) == 15 and read(run)["progress"]["updates"] == 230
    assert start(script, "--resume", str(run), "--device", "cpu", "--online-steps", "20") == 0


# ---- From the offline phase of another run ---------------------------------------------------------------------------


def test_offline_phase_is_kept(whole):
    """What --init-from starts from is the checkpoint at the switch, whole and with its rows."""
    script, run = whole
    kept = script.read_checkpoint(str(run), "offline.pt")
    assert (kept["progress"]["updates"], kept["progress"]["env_steps"]) == (200, 0)
    assert [row["updates"] for row in kept["progress"]["rows"]] == [0, 80, 160, 200]
    assert not same(kept["agent"], read(run)["agent"])


def test_online_phase_from_what_is_kept_is_that_of_the_run(whole, runs):
    script, run = whole
    copied = Path(shutil.copytree(run, runs / "copied"))
    (copied / "offline.pt").replace(copied / "checkpoint.pt")
    assert start(script, "--resume", str(copied)) == 0
    check_equal(copied, run)


def test_two_fine_tunings_of_one_pre_training(whole, runs, monkeypatch):
    """Networks and Adam's moments are the pre-training's, learning rates, draws and all other settings their own."""
    script, source = whole
    kept, found = script.read_checkpoint(str(source), "offline.pt"), []
    play = script.play_episode

    def play_episode(env, agent, seed, device):
        found.append(copy.deepcopy(agent.state_dict()))
        return play(env, agent, seed, device)

    monkeypatch.setattr(script, "play_episode", play_episode)
    flags = "--critic-lr 0.01 --mixing-ratio 0 --gamma 0.5 --online-steps 10 --buffer-size 30".split()
    for seed in ("1", "2", "2"):
        assert start(script, "--init-from", str(source), "--seed", seed, *flags) == 0
    one, two, again = sorted(runs.iterdir(), key=lambda run: run.stat().st_mtime)
    assert same(found[0], kept["agent"]) and same(found[2], kept["agent"])
    assert not same(read(one)["agent"], read(two)["agent"]) and same(read(two)["agent"], read(again)["agent"])
    assert [row["updates"] for row in table(one)] == ["200", "220"]
    for run, seed in ((one, 1), (two, 2)):
        args = read(run)["args"]
        assert (args["seed"], args["gamma"], args["actor_layers"], args["init_from"]) == (seed, 0.5, (8,), str(source))
        assert [group["lr"] for group in read(run)["optimizer"]["param_groups"]][1] == 0.01
        assert read(run)["progress"]["offline_updates"] == 200
        assert max(int(state["step"]) for state in read(run)["optimizer"]["state"].values()) == 220
    assert same(script.read_checkpoint(str(one), "offline.pt")["agent"], kept["agent"])


def test_fine_tuning_resumes_without_its_source(whole, runs, monkeypatch):
    script, source = whole
    source = Path(shutil.copytree(source, runs / "source"))
    flags = ["--init-from", str(source), "--seed", "5"]
    assert start(script, *flags) == 0
    (uninterrupted,) = {*runs.iterdir()} - {source}
    with monkeypatch.context() as patch:
        patch.setattr(script, "update", at_call(3, script.update, lambda: signal.raise_signal(signal.SIGTERM)))
        assert start(script, *flags) == 143
    (run,) = {*runs.iterdir()} - {source, uninterrupted}
    shutil.rmtree(source)
    assert start(script, "--resume", str(run)) == 0
    check_equal(run, uninterrupted)


@cal_ql_only
def test_an_offline_phase_that_was_interrupted_is_completed(whole, runs, monkeypatch):
    script, whole_run = whole
    with monkeypatch.context() as patch:
        patch.setattr(script, "update", at_call(70, script.update, lambda: signal.raise_signal(signal.SIGTERM)))
        assert start(script, *TINY) == 143
    source = only(runs)
    assert start(script, "--init-from", str(source), "--online-steps", "0") == 0
    (run,) = {*runs.iterdir()} - {source}
    assert [row["updates"] for row in table(run)] == ["70", "80", "160", "200"]
    # Killed while this was written, a run has its former checkpoint, and writes it anew.
    (run / "offline.pt").write_bytes((run / "offline.pt").read_bytes()[:-1])
    assert start(script, "--init-from", str(run)) == 2


@cal_ql_only
@pytest.mark.parametrize("flags, message", [
    ("--critic-layers 9", "critic.weights.0"), ("--actor-layers 8 8", "actor.net"),
    ("--num-critics 3", "critic.weights"), ("--reference-value learned", "v_mu"),
])  # fmt: skip
def test_networks_of_other_shapes_are_refused(flags, message, finished, capsys):
    script, run = finished
    assert start(script, "--init-from", str(run), *flags.split()) == 2
    line = error_line(capsys)
    assert "cannot go on from there" in line and message in line
    assert [*run.parent.iterdir()] == [run]


@cal_ql_only
def test_init_from_what_is_no_run(finished, runs, capsys):
    script, run = finished
    for folder in ("", "runs/nowhere"):
        assert start(script, "--init-from", folder) == 2
        assert "its offline.pt: ValueError('missing or damaged')" in error_line(capsys)
    assert start(importlib.import_module("cql_continuous"), "--init-from", str(run)) == 2
    assert "cal_ql_continuous.py" in error_line(capsys)
    assert start(script, "--resume", str(run), "--init-from", str(run)) == 2
    assert "cannot change init_from" in error_line(capsys)


@cal_ql_only
def test_learned_reference_value_goes_with_the_run(whole, runs, monkeypatch):
    """Fitted once: a run that is resumed, or starts from this one, has it from there, to the bit."""
    script, fits = whole[0], []

    class Recorded(tqdm):
        def __init__(self, *args, **kwargs):
            fits.extend(args[1:])
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(script, "tqdm", Recorded)
    assert start(script, *TINY, "--reference-value", "learned") == 0
    uninterrupted = only(runs)
    kept = read(uninterrupted)["agent"]
    assert fits == ["V^mu"]
    shutil.copytree(uninterrupted, runs / "copied")
    shutil.copy(uninterrupted / "offline.pt", runs / "copied/checkpoint.pt")
    torch.manual_seed(99)
    assert start(script, "--resume", str(runs / "copied")) == 0
    check_equal(runs / "copied", uninterrupted)
    assert start(script, "--init-from", str(uninterrupted), "--seed", "2") == 0
    (run,) = {*runs.iterdir()} - {uninterrupted, runs / "copied"}
    assert fits == ["V^mu"]
    names = [name for name in kept if name.startswith("v_mu.")]
    assert len(names) == 4 and all(torch.equal(read(run)["agent"][name], kept[name]) for name in names)


def test_warm_up_and_no_offline_data(whole, runs, monkeypatch):
    """Whole episodes of the frozen policy first, then updates from online transitions alone: WSRL's protocol."""
    script, source = whole
    update, add, learned, offline = script.update, script.ReplayBuffer.add, [], []

    def recorded(agent, optimizer, args, online, with_actor, batch):
        learned.append((played[0], batch.observations))
        return update(agent, optimizer, args, online, with_actor, batch)

    def add_episode(self, episode):
        played[0] += 1
        add(self, episode)
        online = self.columns.observations[self.num_offline :][: self.num_online]
        offline.append([rows for _, rows in learned if not (rows[:, None] == online).all(2).any(1).all()])

    played = [0]
    monkeypatch.setattr(script, "update", recorded)
    monkeypatch.setattr(script.ReplayBuffer, "add", add_episode)
    flags = "--mixing-ratio 0 --warmup-steps 10 --online-steps 20 --buffer-size 20 --online-eval-interval 5".split()
    assert start(script, "--init-from", str(source), *flags) == 0
    # Episodes of 5 steps and two updates a step: none after the first, as 5 steps are less than 10.
    assert [episode for episode, _ in learned] == [2] * 10 + [3] * 10 + [4] * 10
    assert not any(offline)
    rows = table(only(runs))[1:]
    assert [(row["env_steps"], row["updates"]) for row in rows] == [
        ("5", "200"), ("10", "210"), ("15", "220"), ("20", "230")
    ]  # fmt: skip
    events = EventAccumulator(str(only(runs))).Reload()
    assert [event.step for event in events.Scalars("eval/score")] == [200, 205, 210, 215, 220]


@pytest.mark.parametrize("ratio", ["0", "-1"])
def test_offline_updates_with_no_share_for_offline_data(ratio, cal_ql, runs):
    """Before there are online transitions all are offline ones, whatever the share."""
    assert start(cal_ql, *TINY, "--mixing-ratio", ratio, "--warmup-steps", "1000", "--offline-steps", "10") == 0
    assert read(only(runs))["progress"]["updates"] == 10 and table(only(runs))[-1]["env_steps"] == "15"


# ---- Data without an environment, and an environment of the user's ---------------------------------------------------

POINT = """
import gymnasium
import numpy


class Point(gymnasium.Env):
    observation_space = gymnasium.spaces.Dict({
        "position": gymnasium.spaces.Box(-9, 9, (2,)), "goal": gymnasium.spaces.Box(-9, 9, (1,))})
    action_space = gymnasium.spaces.Box(-0.5, 0.5, (2,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.goal = numpy.zeros(2, numpy.float32), self.np_random.uniform(-2, 2, 1).astype("f")
        return self.observe(), {}

    def observe(self):
        return {"position": self.position.copy(), "goal": self.goal}

    def step(self, action):
        assert abs(action).max() <= 0.5
        self.position += action
        done = bool(abs(self.position[0] - self.goal[0]) < 0.3)
        return self.observe(), 2.0 * done, done, False, {"success": done}


def make():
    return gymnasium.wrappers.TimeLimit(Point(), 6)


def endless():
    return Point()


def other():
    return gymnasium.make("Pendulum-v1")
"""
WITHOUT = """--env-id mine/point-v0 --offline-steps 20 --offline-eval-interval 10 --actor-layers 8 --critic-layers 8
--batch-size 8 --buffer-size 100 --device cpu --reward-scale 3 --reward-bias -1""".split()


@pytest.fixture
def point(tmp_path, monkeypatch):
    """A module `robot`, and 21 episodes of it as a dataset that names no environment; gives the episodes."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "robot", raising=False)
    (tmp_path / "robot.py").write_text(POINT)
    env, buffers = importlib.import_module("robot").make(), []
    env.action_space.seed(0)
    for k in range(21):
        states, steps, over = [env.reset(seed=k)[0]], [], False
        while not over:
            action = env.action_space.sample()
            state, *rest, _ = env.step(action)
            states.append(state), steps.append((action, *rest))
            over = rest[1] or rest[2]
        actions, rewards, terminations, truncations = map(np.array, zip(*steps, strict=True))
        observations = {key: np.array([state[key] for state in states]) for key in states[0]}
        buffers.append(EpisodeBuffer(k, None, None, observations, actions, rewards, terminations, truncations))
    spaces = dict(action_space=env.action_space, observation_space=env.observation_space)
    minari.create_dataset_from_buffers("mine/point-v0", buffers, **spaces)
    return buffers


def test_data_without_an_environment(script, point, runs, monkeypatch):
    """Every tenth episode is not trained on; evaluations are about these, and have no score."""
    buffers, evaluate = [], script.evaluate

    def record(envs, agent, buffer, progress, args):
        row = evaluate(envs, agent, buffer, progress, args)
        torch.manual_seed(args.seed)
        batch = buffer.sample(4 * args.batch_size)
        with torch.no_grad():
            error = np.abs(torch.tanh(agent.actor(batch.observations)[0]).numpy() - batch.actions.numpy()).mean()
        assert envs is None and row["action_error"] == pytest.approx(error, rel=1e-5)
        buffers.append(buffer)
        return row

    monkeypatch.setattr(script, "evaluate", record)
    assert start(script, *WITHOUT, "--offline-steps", "20", "--online-steps", "0") == 0
    rows = table(only(runs))
    assert [row["updates"] for row in rows] == ["0", "10", "20"]
    for row in rows:
        assert [name for name in row if row[name] == "nan"] == ["score", "return", "regret"]
    held_out = [episode for k, episode in enumerate(point) if k % 10 == 1]
    expected = np.concatenate([episode.actions for episode in held_out]) / 0.5
    kept = buffers[0].columns.actions[: buffers[0].num_offline]
    np.testing.assert_allclose(kept, expected.clip(-0.99999, 0.99999), atol=1e-6)
    total = sum(len(episode.rewards) for episode in point)
    assert read(only(runs))["buffer"]["num_offline"] == total - len(expected)


def test_what_has_no_environment_cannot_be_played(script, point, runs, capsys):
    assert start(script, *WITHOUT, "--online-steps", "10") == 2
    line = error_line(capsys)
    assert "--online-env" in line and "--online-steps 0" in line and not runs.exists()


def test_one_episode_without_an_environment(cal_ql, point, runs, tmp_path, capsys):
    spaces = minari.load_dataset("mine/point-v0")
    spaces = dict(action_space=spaces.action_space, observation_space=spaces.observation_space)
    minari.create_dataset_from_buffers("mine/single-v0", point[:1], **spaces)
    assert start(cal_ql, *WITHOUT, "--online-steps", "0", "--env-id", "mine/single-v0") == 2
    assert error_line(capsys)


def test_the_users_environment(script, point, runs, capsys):
    """Played and scored in; a run that was pre-trained without one goes on with it."""
    assert start(script, *WITHOUT, "--offline-steps", "20", "--online-steps", "0") == 0
    source = only(runs)
    flags = ["--init-from", str(source), "--online-env", "robot:make", "--online-steps", "30", "--eval-episodes", "2"]
    assert start(script, *flags) == 0
    (run,) = {*runs.iterdir()} - {source}
    last = table(run)[-1]
    assert last["phase"] == "online" and 30 <= int(last["env_steps"]) < 36 and 0 <= float(last["score"]) <= 1
    online = read(run)["buffer"]["online"]
    assert {*online[2].tolist()} <= {-1.0, 5.0}
    # Its time limit counts unless another is given.
    assert start(script, *flags, "--episode-length", "3") == 0
    # A checkpoint, which may be a stranger's, says nothing about which code runs.
    capsys.readouterr()
    assert start(script, "--resume", str(run), "--online-steps", "40") == 2
    assert "repeat" in error_line(capsys)
    assert start(script, "--resume", str(run), "--online-steps", "40", "--online-env", "robot:other") == 2
    assert error_line(capsys)
    assert start(script, "--resume", str(run), "--online-steps", "40", "--online-env", "robot:make") == 0


@pytest.mark.parametrize("name, message", [
    ("robot:other", "(3, (1,)) are not the data's (3, (2,))"), ("robot:endless", "--episode-length"),
    ("robot:nothing", "nothing"), ("nowhere:make", "nowhere"), ("nowhere", "nowhere"), ("robot", "make"),
    ("", "module"), ("a:b:c", "a:b:c"),
])  # fmt: skip
def test_no_environment_of_the_users(name, message, cal_ql, point, runs, capsys):
    if name == "robot":
        Path("robot.py").write_text(POINT.replace("def make(", "def made("))
        del sys.modules["robot"]
    assert start(cal_ql, *WITHOUT, "--online-env", name) == 2
    line = error_line(capsys)
    assert "environment cannot be made" in line and message in line and not runs.exists()


HAND = """
import gymnasium
import numpy


class Hand(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-9, 9, (39,))
    action_space = gymnasium.spaces.Box(-1, 1, (28,))

    def __init__(self, tells):
        self.tells = tells

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return numpy.zeros(39, numpy.float32), {}

    def step(self, action):
        return numpy.zeros(39, numpy.float32), 7.0, False, False, {"success": True} if self.tells else {}


def silent():
    return Hand(tells=False)


def telling():
    return Hand(tells=True)
"""


def test_an_adroit_environment_of_the_users_must_tell_success(script, runs, tmp_path, monkeypatch, capsys):
    """The task's reward is its success: without one it would be NaN, and the loss soon too."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hand", raising=False)
    (tmp_path / "hand.py").write_text(HAND)
    episode = dict(observations=np.zeros((4, 39)), actions=np.zeros((3, 28), np.float32), rewards=np.zeros(3))
    episode |= dict(infos={"success": np.array([0, 0, 0, 1], bool)}, terminations=[False] * 3)
    spaces = dict(action_space=gym.spaces.Box(-1, 1, (28,)), observation_space=gym.spaces.Box(-9, 9, (39,)))
    for which in ("human", "cloned"):
        buffers = [EpisodeBuffer(id=0, truncations=[False, False, True], **episode)]
        minari.create_dataset_from_buffers(f"D4RL/door/{which}-v2", buffers, **spaces)
    flags = [*TINY, "--env-id", "door-binary", "--offline-steps", "2", "--online-steps", "5", "--online-env"]
    for processes in [[], ["--eval-async"]] if script.__name__ == NAMES[0] else [[]]:
        assert start(script, *flags, "hand:silent", *processes) == 2
        assert "NaN reward" in (line := error_line(capsys)) and "info['success']" in line
    assert start(script, *flags, "hand:telling") == 0


def test_the_robot_of_the_documentation(cal_ql, runs, tmp_path, monkeypatch):
    """The page's code and its two commands, with fewer steps."""
    page = (Path(cal_ql.__file__).parent / "docs/no_environment.md").read_text()
    (tmp_path / "robot.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "robot", raising=False)
    importlib.import_module("robot").record()
    first, second = re.findall(r"^python cal_ql_continuous.py (.*)$", page.replace("\\\n", ""), re.MULTILINE)
    assert start(cal_ql, *first.split(), "--offline-steps", "30") == 0
    flags = second.replace("runs/<run>", str(only(runs))).split()
    assert start(cal_ql, *flags, "--online-steps", "50", "--eval-episodes", "2") == 0


# ---- Online episodes as a dataset ------------------------------------------------------------------------------------


def save_online(run: Path, dataset_id: str = "mine/online-v0") -> int:
    return from_run.main([str(run), "--dataset-id", dataset_id])


def test_online_episodes_become_a_dataset(script, point, runs, monkeypatch):
    """As the environment had them: its observations, actions, rewards, ends; and a script reads them again."""
    robot, played = importlib.import_module("robot"), []
    step, reset = robot.Point.step, robot.Point.reset

    def record_reset(self, **kwargs):
        values = reset(self, **kwargs)
        played.append([values])
        return values

    def record_step(self, action):
        values = step(self, action)
        played[-1].append((action, *values))
        return values

    monkeypatch.setattr(robot.Point, "reset", record_reset)
    monkeypatch.setattr(robot.Point, "step", record_step)
    evaluate = script.evaluate
    monkeypatch.setattr(script, "evaluate", lambda *args: (evaluate(*args), played.clear(), online.extend(episodes))[0])
    online, episodes, play = [], [], script.play_episode

    def play_episode(*args):
        played.clear()
        episode = play(*args)
        episodes.append(played[-1])
        return episode

    monkeypatch.setattr(script, "play_episode", play_episode)
    flags = [*WITHOUT, "--online-env", "robot:make", "--online-steps", "40", "--eval-episodes", "1"]
    assert start(script, *flags) == 0
    assert save_online(only(runs)) == 0
    dataset = minari.load_dataset("mine/online-v0")
    assert dataset.env_spec is None and dataset.action_space == robot.Point.action_space
    assert dataset.observation_space == robot.Point.observation_space
    assert len(dataset) == len(episodes) and {episode.terminations[-1] for episode in dataset} == {True, False}
    for saved, ((first, _), *steps) in zip(dataset, episodes, strict=True):
        actions, states, rewards, ends, _, _ = zip(*steps, strict=True)
        for key in ("position", "goal"):
            np.testing.assert_array_equal(saved.observations[key], [first[key], *(state[key] for state in states)])
        np.testing.assert_allclose(saved.actions, actions, atol=1e-6)
        np.testing.assert_allclose(saved.rewards, rewards, atol=1e-6)
        np.testing.assert_array_equal(saved.terminations, ends)
        assert saved.truncations.tolist() == [False] * (len(ends) - 1) + [not ends[-1]]
    assert start(script, *WITHOUT, "--env-id", "mine/online-v0", "--online-steps", "0") == 0


@cal_ql_only
def test_online_episodes_name_their_environment(whole, runs, demonstrations, monkeypatch, tmp_path, capsys):
    """The ring of twelve has lost the first of three episodes; what is left can be played on."""
    script, run = whole
    shutil.copytree(demonstrations, tmp_path / "minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    assert save_online(run) == 0
    assert "mine/online-v0: 2 episodes, 10 steps" in capsys.readouterr().out
    spec = minari.load_dataset("mine/online-v0").env_spec
    assert (spec.id, spec.max_episode_steps) == ("cal-ql/PickPlace-v0", 5)
    flags = [*TINY, "--env-id", "mine/online-v0", "--offline-steps", "3", "--online-steps", "5"]
    assert start(script, *flags) == 0
    assert save_online(run) == 2
    assert "already exists" in error_line(capsys)


@cal_ql_only
def test_runs_without_online_episodes(finished, tmp_path, capsys):
    _, run = finished
    assert save_online(tmp_path) == 2
    assert "missing or damaged" in error_line(capsys)
    shutil.copy(run / "offline.pt", run / "checkpoint.pt")
    assert save_online(run) == 2
    assert "no online episode" in error_line(capsys)
    for script in ("cal_ql_pixels.py", "odt_continuous.py"):
        save_as(run / "checkpoint.pt", {"script": script})
        assert save_online(run) == 2
        assert script in error_line(capsys)
    save_as(run / "checkpoint.pt", {"script": "cal_ql_continuous.py", "buffer": {}})
    assert save_online(run) == 2
    assert "missing or damaged" in error_line(capsys)


def test_episodes_that_the_paper_relabels_are_saved_as_the_policy_saw_them(finished, tmp_path, monkeypatch):
    _, run = finished
    source = types.SimpleNamespace(action_space=gym.spaces.Box(-2, 2, (4,)), env_spec="AntMaze",
                                   observation_space=gym.spaces.Dict())  # fmt: skip
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr(from_run, "open_dataset", lambda dataset_id: source)
    save_as(run / "checkpoint.pt", {"args": read(run)["args"] | {"env_id": "antmaze-umaze"}})
    assert save_online(run) == 0
    dataset = minari.load_dataset("mine/online-v0")
    assert dataset.env_spec is None and dataset.observation_space.shape == (11,)


# ---- The protocol ----------------------------------------------------------------------------------------------------

COMMON_VARIANTS = {
    "--actor-interval 1 --num-critics 4 --num-target-critics 2 --critic-layer-norm --actor-reduce mean": (False, 7, 20),
    "--offline-steps 0 --mixing-ratio -1 --actor-interval 3": (False, 0, 6),
    "--online-steps 0": (False, 3, 0),
}


@pytest.mark.parametrize("flags", COMMON_VARIANTS)
def test_updates_of_each_phase(flags, script, runs, monkeypatch):
    """As many as the phase asks for, the actor's turn at every `actor_interval`-th; seven updates offline."""
    update, calls = script.update, []

    def recorded(agent, optimizer, args, online, with_actor, batch):
        calls.append((online, with_actor))
        assert len(batch.rewards) == 8
        return update(agent, optimizer, args, online, with_actor, batch)

    monkeypatch.setattr(script, "update", recorded)
    assert start(script, *TINY, "--offline-steps", "7", "--online-steps", "10", *flags.split()) == 0
    args = script.Args(**read(only(runs))["args"])
    offline, online = args.offline_steps, 2 * args.online_steps
    assert [each for each, _ in calls] == offline * [False] + online * [True]
    assert [each for _, each in calls] == [k % args.actor_interval == 0 for k in range(1, offline + online + 1)]
    assert all(value.isfinite().all() for value in read(only(runs))["agent"].values())


def test_online_episodes(script, runs, monkeypatch):
    """Each has a seed of its own; the policy does not learn meanwhile; what it plays is what the replay gets."""
    played, added = [], []
    play, add = script.play_episode, script.ReplayBuffer.add

    def play_episode(env, agent, seed, device):
        before = [parameter.clone() for parameter in agent.parameters()]
        episode = play(env, agent, seed, device)
        assert all(map(torch.equal, before, agent.parameters()))
        played.append((seed, episode, env))
        return episode

    def add_episode(self, episode):
        added.append(episode)
        add(self, episode)

    monkeypatch.setattr(script, "play_episode", play_episode)
    monkeypatch.setattr(script.ReplayBuffer, "add", add_episode)
    assert start(script, *TINY, "--offline-steps", "3") == 0
    assert len({seed for seed, _, _ in played}) == 3 == len(added)
    for (seed, episode, env), entered in zip(played, added, strict=True):
        assert entered is episode
        assert episode.observations.shape == (6, 11) and episode.actions.shape == (5, 4)
        assert np.abs(episode.actions).max() < 1 and not episode.terminations.any()  # cut off by time
        assert np.array_equal(env.reset(seed=seed)[0], episode.observations[0])
        for action, state, reward in zip(episode.actions, episode.observations[1:], episode.rewards, strict=True):
            values = env.step(action)
            assert np.array_equal(values[0], state) and values[1] == reward
    assert not np.array_equal(played[0][1].actions, played[1][1].actions)


def test_random_actions_of_sac_come_first_and_are_counted_over_a_resume(runs, monkeypatch):
    script = importlib.import_module("sac_offline_data")
    flags = [*TINY, "--offline-steps", "0", "--random-steps", "7"]
    assert start(script, *flags) == 0
    uninterrupted = only(runs).rename("uninterrupted")
    with monkeypatch.context() as patch:
        patch.setattr(script, "update", at_call(3, script.update, lambda: signal.raise_signal(signal.SIGTERM)))
        assert start(script, *flags) == 143
    assert start(script, "--resume", str(only(runs))) == 0
    check_equal(only(runs), uninterrupted)

    args = script.Args(random_steps=2, actor_layers=(4,), critic_layers=(4,))
    agent, states = script.Agent(3, 400, args), torch.zeros(1, 3)
    with torch.no_grad():
        spreads = [agent.act(states, explore=True).abs().max().item() for _ in range(4)]
        assert all(spread > 0.97 for spread in spreads[:2]), "uniform"
        agent.actor.log_std_offset.data.fill_(-5.0)
        assert agent.act(states, explore=True).abs().max() < 0.3, "the policy's"
        assert agent.acted_steps == 5
        agent.act(states, explore=False)
        assert agent.acted_steps == 5, "evaluations do not count"


# ---- Bad input -------------------------------------------------------------------------------------------------------

NONSENSE = """--gamma 1|--gamma -0.1|--gamma nan|--tau 0|--tau 1.5|--mixing-ratio 1.01|
--mixing-ratio -2|--batch-size 0|--eval-episodes 0|--utd-ratio 0|--actor-interval 0|--buffer-size 0|--offline-steps -1|
--online-steps -1|--seed -1|--actor-layers 8 0|--critic-layers -1|--critic-lr 0|--actor-lr inf|--reward-bias nan|
--reward-scale 0|--reward-scale inf|--num-critics 0|--num-target-critics 0|--threads -1|
--offline-eval-interval 0|--online-eval-interval 0|--episode-length -1""".replace("\n", "").split("|")
NONSENSE_OF_CQL = """--num-actions 0|--cql-weight -1|--cql-weight nan|--online-cql-factor -1|--target-action-gap inf
""".strip().split("|")


def check_refused(script, flags: list[str], capsys) -> str:
    """Exit code 2, one line, and no trace of a run."""
    assert start(script, *TINY, *flags) == 2
    line = error_line(capsys)
    assert line.startswith("error: ") and not Path("runs").exists()
    return line


@pytest.mark.parametrize("flags", NONSENSE)
def test_settings_out_of_range(flags, script, runs, capsys):
    assert flags.split()[0] in check_refused(script, flags.split(), capsys)


@pytest.mark.parametrize("flags", NONSENSE_OF_CQL)
@pytest.mark.parametrize("script", NAMES[:2], indirect=True)
def test_settings_of_the_regulariser_out_of_range(flags, script, runs, capsys):
    assert flags.split()[0] in check_refused(script, flags.split(), capsys)


def test_cuda_without_cuda(cal_ql, runs, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA" in check_refused(cal_ql, ["--device", "cuda"], capsys)


def test_sizes_beyond_memory(cal_ql, runs, capsys):
    assert "memory" in check_refused(cal_ql, ["--buffer-size", str(10**12)], capsys)


@pytest.mark.parametrize("flags", ["--gama 0.9", "--seed one", "--device tpu", "--actor-layers x", "--gamma"])
def test_unreadable_flags(flags, script, runs):
    with pytest.raises(SystemExit) as stop:
        script.main([*TINY, *flags.split()])
    assert stop.value.code == 2 and not runs.exists()


@pytest.mark.parametrize("name", ["antmaze-large-divers", "../etc/narrow-v0", ""])
def test_unknown_task(name, script, runs, capsys):
    assert "antmaze-large-diverse" in check_refused(script, ["--env-id", name], capsys)


def test_absent_dataset(script, runs, capsys, monkeypatch):
    monkeypatch.setattr(minari, "load_dataset", lambda *_, **__: 1 / 0)
    assert "minari download" in check_refused(script, ["--env-id", "D4RL/antmaze/none-v1"], capsys)
    assert "collect" in check_refused(script, ["--env-id", "pick-place-broad"], capsys)


def test_task_defaults(script, capsys):
    """`task_defaults` gives what the command line has; --help shows the tasks."""
    for name in script.TASKS:
        assert dataclasses.asdict(script.parse_args(["--env-id", name])) == vars(script.task_defaults(name))
    assert script.task_defaults("antmaze-large-play").critic_layers == (256, 256, 256, 256)
    assert script.task_defaults("pen-binary").episode_length == 100
    assert script.task_defaults("pen-binary").actor_layers == (512, 512)
    assert script.task_defaults("any/other-v0").reward_scale == 1
    assert script.parse_args(["--env-id", "antmaze-umaze", "--reward-bias", "0"]).reward_bias == 0
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--help"])
    output = capsys.readouterr().out
    assert stop.value.code == 0 and "pick-place-broad" in output and "reward_scale 10.0" in output


def test_track_that_fails(cal_ql, runs, capsys, monkeypatch):
    def init(*args, **kwargs):
        raise wandb.errors.UsageError("api_key not configured")

    monkeypatch.setattr(wandb, "init", init)
    line = check_refused(cal_ql, ["--track"], capsys)
    assert "--track: api_key not configured" in line and "wandb login" in line


def test_track_offline(cal_ql, runs, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    try:
        assert start(cal_ql, *TINY, "--track", "--offline-steps", "3", "--online-steps", "0") == 0
        assert wandb.run.name == only(runs).name
        assert wandb.run.config["env_id"] == "pick-place"
        assert list(tmp_path.glob("wandb/offline-run-*"))
    finally:
        wandb.finish()
        wandb.tensorboard.unpatch()


def test_damaged_data(cal_ql, runs, demonstrations, tmp_path, monkeypatch, capfd):
    shutil.copytree(demonstrations, tmp_path / "minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    data = tmp_path / "minari/cal-ql/pick-place/narrow-v0/data/main_data.hdf5"
    data.write_bytes(data.read_bytes()[:20_000])
    assert start(cal_ql, *TINY) == 2
    errors = capfd.readouterr().err
    assert errors.count("error: ") == 1 and "cal-ql/pick-place/narrow-v0" in errors and "Traceback" not in errors
    assert not runs.exists()
