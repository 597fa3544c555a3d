"""Whole runs, tiny ones: what they write, how they stop and go on, what they say to a slip on the command line."""

import importlib
import itertools
import json
import math
import os
import pickle
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
import wandb
from minari.data_collector import EpisodeBuffer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cal_ql_continuous as cal_ql
from collect import from_run, pick_place

ROOT = Path(__file__).parents[1]
NAMES = ["cal_ql_continuous", "cql_continuous", "sac_offline_data"]
# 120 updates with evaluations at 0, 50, 100 and 120, then 3 episodes of 5 steps with two updates a step.
TINY = """--env-id pick-place --episode-length 5 --offline-steps 120 --online-steps 15 --offline-eval-interval 50
--online-eval-interval 8 --eval-episodes 2 --utd-ratio 2 --actor-interval 2 --buffer-size 12 --actor-layers 8
--critic-layers 8 --batch-size 8 --device cpu --reward-bias -2""".split()
STOPPED = "\nstopped; `--resume` with the run's folder goes on from its last checkpoint."
COLUMNS = "phase updates env_steps score return mean_q mean_mc_return bound_rate wall_time".split()


@pytest.fixture(scope="session")
def demonstrations(tmp_path_factory):
    path = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(path))
        pick_place.collect(pick_place.Args())
    return path


@pytest.fixture(autouse=True)
def surroundings(demonstrations, tmp_path, monkeypatch):
    """An empty working directory; what a run changes in its process is put back."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(demonstrations))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    handlers, precision = signal.getsignal(signal.SIGTERM), torch.get_float32_matmul_precision()
    yield
    signal.signal(signal.SIGTERM, handlers)
    torch.set_float32_matmul_precision(precision)
    torch.set_flush_denormal(False)


@pytest.fixture(params=NAMES)
def script(request) -> types.ModuleType:
    return importlib.import_module(request.param)


def start(script, *flags: str) -> Path:
    """Trains in this process; returns the run's folder."""
    before = {*Path("runs").glob("*")}
    script.train(*script.parse_args([*flags]))
    new = {*Path("runs").glob("*")} - before
    return new.pop().absolute() if new else Path(flags[flags.index("--resume") + 1]).absolute()


def refusal(*flags: str) -> str:
    """The one sentence that Cal-QL has for these flags, with which it has not begun a run."""
    before = {*Path("runs").glob("*")}
    with pytest.raises(cal_ql.InputError) as error:
        start(cal_ql, *flags)
    assert "\n" not in str(error.value) and {*Path("runs").glob("*")} == before
    return str(error.value)


def run_as_process(patch, *flags: str):
    """What the file as a program exits with: a number, or a text that stands for 1 and is printed."""
    patch.setattr(sys, "argv", ["cal_ql_continuous.py", *flags])
    try:
        runpy.run_path(cal_ql.__file__, run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return 0


def read(run: Path) -> dict:
    return torch.load(run / "checkpoint.pt", weights_only=True)


def change(run: Path, **parts) -> None:
    """Puts other parts into a run's checkpoint; a dictionary is merged into the one that is there."""
    state = read(run)
    for key, value in parts.items():
        state[key] = state[key] | value if isinstance(value, dict) else value
    torch.save(state, run / "checkpoint.pt")


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


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def killed(script) -> Path:
    """The run of a fork of this process, which must be ended by SIGKILL."""
    child = os.fork()
    if not child:
        try:
            start(script, *TINY)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    return next(Path("runs").absolute().iterdir())


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)


def check_equal(run: Path, other: Path, but: Sequence[str] = ()) -> None:
    """All that a run holds in the end is equal, to the bit, but for the time that it took."""
    states = [read(run), read(other)]
    for state in states:
        del state["progress"]["wall_time"]
        for row in state["progress"]["rows"]:
            del row["wall_time"]
    assert states[0].keys() == states[1].keys() == {"agent", "optimizer", "buffer", "rng", "args", "progress"}
    for key in states[0].keys() - {"args", *but}:
        assert same(states[0][key], states[1][key]), key
    if "progress" not in but:
        tables = [[row | {"wall_time": ""} for row in table(path)] for path in (run, other)]
        assert tables[0] == tables[1] and tables[0]


# ---- What a run writes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=NAMES)
def whole(request, demonstrations, tmp_path_factory) -> tuple[types.ModuleType, Path]:
    """A script and its run from beginning to end."""
    script = importlib.import_module(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(demonstrations))
        patch.chdir(tmp_path_factory.mktemp("whole"))
        return script, start(script, *TINY)


cal_ql_only = pytest.mark.parametrize("whole", NAMES[:1], indirect=True)


@pytest.fixture
def finished(whole) -> Path:
    return Path(shutil.copytree(whole[1], Path("runs/finished").absolute()))


@pytest.fixture
def pretrained() -> Path:
    """Cal-QL's run that ends after three updates, before the online phase."""
    return start(cal_ql, *TINY, "--offline-steps", "3", "--online-steps", "0")


def test_evaluations_and_settings(whole):
    script, run = whole
    assert run.name.startswith(f"pick-place__{script.__name__}__1__")
    rows = table(run)
    assert list(rows[0]) == COLUMNS
    steps = [(row["phase"], int(row["updates"]), int(row["env_steps"])) for row in rows]
    assert steps[:4] == [("offline", updates, 0) for updates in (0, 50, 100, 120)]
    assert steps[4:] == [("online", 140, 10), ("online", 150, 15)]  # online steps are the episodes' sum
    for row in rows:
        assert all(math.isfinite(float(row[name])) for name in ("score", "return", "mean_q", "mean_mc_return"))
        assert 0 <= float(row["bound_rate"]) <= 1
    seconds = [float(row["wall_time"]) for row in rows]
    assert seconds == sorted(seconds) and seconds[-1] > 0
    config = json.loads((run / "config.json").read_text())
    assert (config["env_id"], config["utd_ratio"], config["actor_layers"]) == ("pick-place", 2, [8])
    assert (config["reward_bias"], config["reward_scale"], config["gamma"]) == (-2, 11, 0.96)  # given, and the task's


def test_tensorboard_has_the_curves(whole):
    script, run = whole
    events = EventAccumulator(str(run)).Reload()
    assert {
        "losses/qf_loss", "losses/actor_loss", "losses/alpha", "charts/episodic_return", "charts/episodic_length",
        "charts/SPS", "eval/score", "eval/mean_q", "eval/mean_mc_return", "eval/bound_rate",
    } <= set(events.Tags()["scalars"])  # fmt: skip
    assert ("losses/cql_gap" in events.Tags()["scalars"]) == (script.__name__ != "sac_offline_data")
    # The x-axis: offline updates, and from there on environment steps, whatever the updates per step.
    assert [event.step for event in events.Scalars("eval/score")] == [0, 50, 100, 120, 130, 135]
    assert [event.step for event in events.Scalars("charts/SPS")] == [100, 125, 130, 135]
    assert [event.value for event in events.Scalars("charts/episodic_length")] == [5, 5, 5]
    sps, seconds = (events.Scalars(name)[-1] for name in ("charts/SPS", "eval/wall_time"))
    assert seconds.value >= 135 / sps.value > 0


# ---- As a program ----------------------------------------------------------------------------------------------------


def test_a_renamed_copy_alone_is_killed_stopped_and_goes_on(tmp_path, monkeypatch):
    """SIGKILL, then SIGTERM amid online updates, as processes; resumed, the end is that of an undisturbed run."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    env, episodes = gym.make("Pendulum-v1"), []
    for k in range(3):
        states = np.array([env.observation_space.sample() for _ in range(2)])
        episodes.append(EpisodeBuffer(k, None, None, states, [env.action_space.sample()], [-1], [False], [True]))
    minari.create_dataset_from_buffers("mine/pendulum-v0", episodes, env=env.spec)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(cal_ql.__file__, alone / "mine.py")
    flags = """--env-id mine/pendulum-v0 --offline-steps 20 --eval-episodes 1 --episode-length 10 --batch-size 4
    --online-eval-interval 50 --num-actions 2 --actor-layers 8 --critic-layers 8 --buffer-size 9 --device cpu""".split()

    def run_until(number: int, after: float, *flags) -> tuple[int, str, str]:
        """Exit code and outputs of a process, which gets the signal once its checkpoint has more than `after` steps."""
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        pipes = dict(cwd=alone, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process, saved = subprocess.Popen([sys.executable, "mine.py", *flags], **pipes), -1
        while number and process.poll() is None and saved <= after:
            time.sleep(0.05)
            for checkpoint in alone.glob("runs/*/checkpoint.pt"):
                saved = read(checkpoint.parent)["progress"]["env_steps"]
        process.send_signal(number)
        output, errors = process.communicate()
        return process.returncode, output, errors

    endless = ["--online-steps", "90000"]
    assert run_until(signal.SIGKILL, 0, *flags, *endless)[0] == -signal.SIGKILL
    (run,) = alone.glob("runs/mine-pendulum-v0__mine__1__*")
    code, _, errors = run_until(signal.SIGTERM, read(run)["progress"]["env_steps"], "--resume", run, *endless)
    assert (code, errors.strip()) == (1, STOPPED.strip())
    steps = ["--online-steps", str(read(run)["progress"]["env_steps"] + 20)]
    code, output, errors = run_until(0, 0, "--resume", run, *steps)
    # What is piped has no progress bar; but for the run's own path, no line is wider than a terminal of old.
    assert (code, errors) == (0, "") and "\r" not in output
    lines = output.replace(str(run), "<run>").splitlines()
    assert lines[0] == "data: mine/pendulum-v0"
    assert lines[1:3] == ["run: <run>", "  env_id mine/pendulum-v0"] and max(map(len, lines)) <= 80
    assert re.fullmatch(r"online +\d+  score -\d+\.\d{3}  Q -?\d+\.\d  Monte-Carlo return -?\d+\.\d", lines[-2])
    assert re.fullmatch(r"done: [\d,]+ updates, [\d,]+ environment steps, <run>/eval\.csv", lines[-1])
    check_equal(run, start(cal_ql, *flags, *steps))


@cal_ql_only
@pytest.mark.parametrize("call, saved", [(70, 50), (145, 140)])
def test_ctrl_c_stops_the_program_and_it_resumes(call, saved, whole, monkeypatch):
    step = torch.optim.Adam.step
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", at_call(call, step, lambda: signal.raise_signal(signal.SIGINT)))
        assert run_as_process(patch, *TINY) == STOPPED
    (run,) = Path("runs").iterdir()
    assert read(run)["progress"]["updates"] == saved and run_as_process(monkeypatch, "--resume", str(run)) == 0
    check_equal(run, whole[1])


@pytest.mark.parametrize("flags, code, message", [
    ("--gama 0.9", 2, "--gama"), ("--seed one", 2, "--seed"), ("--device tpu", 2, "--device"), ("--gamma", 2, "--ga"),
    ("--device cuda", 2, "error: --gamma must be below 1, --mixing-ratio at most 1, CUDA there for cuda; too small: ["),
    ("--seed -1 --batch-size 0 --utd-ratio -1", 2, "; too small: ['seed', 'batch_size', 'utd_ratio']."),
    ("--online-eval-interval 0", 2, "['online_eval_interval']"), ("--gamma 1", 2, "error: --gamma must be below 1"),
    ("--offline-eval-interval 0", 2, "['offline_eval_interval']"), ("--mixing-ratio 2", 2, "--mixing-ratio at most"),
    ("--env-id antmaze-large-divers", 2, "tasks are antmaze-umaze"), ("--resume x", 2, "error: cannot go on from x/c"),
    ("--resume ", 2, "error: cannot go on from checkpoint.pt: FileNotFoundError"), ("--help", 0, "pick-place"),
    ("--seed 1", 2, "error: [Errno 20] Not a directory: "),  # runs is a file
])  # fmt: skip
def test_a_slip_on_the_command_line_is_one_sentence(flags, code, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("runs").write_text("")
    assert run_as_process(monkeypatch, *TINY, *flags.split(" ")) == code
    output, errors = capsys.readouterr()
    assert message in output + errors and "Traceback" not in errors
    assert "error: " not in errors or errors.startswith("error: ") and errors.count("\n") == 1


def test_a_tasks_settings():
    assert cal_ql.parse_args(["--env-id", "antmaze-large-play"])[0].critic_layers == (256, 256, 256, 256)
    pen = cal_ql.parse_args(["--env-id", "pen-binary", "--reward-bias", "0"])[0]  # domain's, task's, given
    assert (pen.actor_layers, pen.episode_length, pen.reward_scale, pen.reward_bias) == ((512, 512), 100, 10, 0)
    assert cal_ql.parse_args(["--env-id", "any/other-v0"])[0].reward_scale == 1


# ---- Stopping and going on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call, saved", [(75, 50), (145, 140)], ids=["offline", "online"])
def test_killed_run_resumes(call, saved, whole, monkeypatch):
    """SIGKILL amid the updates: what came after the last checkpoint is done again, to the bit."""
    script, uninterrupted = whole
    with monkeypatch.context() as patch:
        patch.setattr(script, "update", at_call(call, script.update, kill))
        run = killed(script)
    assert read(run)["progress"]["updates"] == saved
    torch.manual_seed(99)  # the random state comes from the checkpoint
    start(script, "--resume", str(run))
    check_equal(run, uninterrupted)


def test_killed_while_saving_keeps_the_last_checkpoint(monkeypatch):
    """In the second save, before it takes the place of the first, which was before all updates."""
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", at_call(2, Path.replace, kill))
        run = killed(cal_ql)
    assert (run / "checkpoint.partial").exists() and read(run)["progress"]["updates"] == 0
    start(cal_ql, "--resume", str(run), "--offline-steps", "10", "--online-steps", "0")
    assert read(run)["progress"]["updates"] == 10 and not (run / "checkpoint.partial").exists()


def test_a_run_saves_every_ten_minutes_also_after_it_was_resumed(monkeypatch):
    """Each update takes a minute; evaluations, which save too, come at the start and at the end."""
    now, saves, update, save = [1e6], [], cal_ql.update, torch.save

    def slow_update(*arguments):
        now[0] += 60
        return update(*arguments)

    def counted_save(state, path):
        saves.append(state["progress"]["updates"])
        save(state, path)

    monkeypatch.setattr(cal_ql, "time", types.SimpleNamespace(time=lambda: now[0], time_ns=time.time_ns))
    monkeypatch.setattr(cal_ql, "update", slow_update)
    monkeypatch.setattr(torch, "save", counted_save)
    run = start(cal_ql, *TINY, *"--offline-steps 25 --offline-eval-interval 100 --online-steps 0".split())
    assert saves == [0, 10, 20, 25]
    saves.clear()
    now[0] += 1e5  # the time between two processes is not the run's
    start(cal_ql, "--resume", str(run), "--offline-steps", "40")
    assert saves == [35, 40]


@pytest.mark.parametrize("flags, but", [
    ("--offline-eval-interval 60 --online-eval-interval 5 --eval-episodes 1", ["progress"]), ("--no-cuda-graphs", [])
])  # fmt: skip
def test_neither_evaluations_nor_graphs_leave_a_trace_in_the_training(flags, but, whole):
    check_equal(start(whole[0], *TINY, *flags.split()), whole[1], but)


@cal_ql_only
def test_a_finished_run_can_be_extended(finished, capsys):
    before, resume = table(finished), ["--resume", str(finished)]
    start(cal_ql, *resume)  # nothing is left to do, and that is said
    done = f"done: 150 updates, 15 environment steps, {finished}/eval.csv"
    assert capsys.readouterr().out.splitlines()[-1] == done and table(finished) == before
    (finished / "config.json").write_text("")  # it is for readers: settings come from the checkpoint
    state = read(finished)  # as if written on a GPU: Adam can be captured, and there are more random states
    state["optimizer"]["param_groups"][0]["capturable"] = True
    change(finished, optimizer=state["optimizer"], rng=[*state["rng"], state["rng"][0]], args={"device": "cuda"})
    flags = "--device cpu --online-steps 25 --online-eval-interval 20 --critic-lr 0.01 --eval-episodes 1"
    start(cal_ql, *resume, *flags.split())
    rows = table(finished)
    assert rows[: len(before)] == before
    assert [int(row["env_steps"]) for row in rows[len(before) :]] == [20, 25]
    config = json.loads((finished / "config.json").read_text())
    assert (config["online_steps"], config["utd_ratio"], config["actor_layers"]) == (25, 2, [8])
    groups = read(finished)["optimizer"]["param_groups"]
    assert [(group["lr"], group["capturable"]) for group in groups] == [(1e-4, False), (0.01, False)]
    assert read(finished)["progress"]["updates"] == 150 + 2 * 10


CHANGES = {  # the first two are never allowed, the others until there are online transitions
    "env_id": "--env-id antmaze-umaze", "datasets": "--datasets cal-ql/pick-place/twin-v0", "gamma": "--gamma 0.9",
    "reward_scale": "--reward-scale 10", "reward_bias": "--reward-bias 0", "online_env": "--online-env Hopper-v5",
    "episode_length": "--episode-length 6", "offline_steps": "--offline-steps 9",
}  # fmt: skip


@cal_ql_only
@pytest.mark.parametrize("name", CHANGES)
def test_what_would_change_the_meaning_of_stored_transitions_is_refused(name, finished, pretrained):
    flags = CHANGES[name].split()
    for run in (finished, pretrained) if name in ("env_id", "datasets") else (finished,):
        assert refusal("--resume", str(run), *flags) == f"{run} cannot go on with another {name}: start a new run."
    if name not in ("env_id", "datasets"):
        args, checkpoint = cal_ql.parse_args(["--resume", str(pretrained), *flags])
        assert str(getattr(args, name)).removesuffix(".0") == flags[1] and checkpoint is not None
        assert args.offline_steps == (9 if name == "offline_steps" else 3) and args.utd_ratio == 2


@cal_ql_only
@pytest.mark.parametrize("flags, message", [
    ("--buffer-size 13", "the dataset or --buffer-size has changed since"), ("--critic-layers 9", "critic.weights"),
    ("--actor-layers 8 8", "actor.net"), ("--num-critics 3", "critic.weights"), ("", "the dataset or --buffer-s"),
])  # fmt: skip
def test_what_does_not_fit_the_checkpoint_is_refused(flags, message, finished, demonstrations, monkeypatch):
    """The last has no flag, but one episode less in its dataset."""
    if not flags:
        shutil.copytree(demonstrations, "minari")
        path = Path("minari/cal-ql/pick-place/narrow-v0/data/metadata.json")
        path.write_text(path.read_text().replace('"total_episodes": 10', '"total_episodes": 9'))
        monkeypatch.setenv("MINARI_DATASETS_PATH", "minari")
    line = refusal("--resume", str(finished), *flags.split())
    assert line.startswith(f"cannot go on from {finished} with these settings: ") and message in line


def test_two_fine_tunings_of_one_pre_training_by_a_sibling(pretrained):
    """A copy of Cal-QL's run goes on with CQL; networks and moments are the pre-training's, a new seed draws anew."""
    cql = importlib.import_module("cql_continuous")
    runs = [Path(shutil.copytree(pretrained, f"runs/{k}")) for k in range(4)]
    for steps in ("0", "5"):  # what is left of the offline phase, and the online phase
        flags = ["--offline-steps", "5", "--online-steps", steps, "--reward-bias", "1", "--mixing-ratio", "0"]
        for run, seed, script in zip(runs, "1222", (cal_ql, cal_ql, cql, cql), strict=True):
            start(script, "--resume", str(run), "--seed", seed, *flags)
        agents = [read(run)["agent"] for run in runs]
        assert not same(agents[0], agents[1]) and not same(agents[1], agents[2]) and same(agents[2], agents[3])
    assert {int(state["step"]) for state in read(runs[3])["optimizer"]["state"].values()} == {7, 15}
    assert [row["updates"] for row in table(runs[3])] == ["0", "3", "5", "15"]
    assert (read(runs[3])["args"]["reward_bias"], read(runs[3])["args"]["actor_layers"]) == (1, (8,))


def test_a_checkpoint_of_a_sibling_with_other_settings_is_one_sentence(pretrained):
    sac = importlib.import_module("sac_offline_data")
    with pytest.raises(sac.InputError, match=f"^cannot go on from {pretrained}/checkpoint.pt: [^\n]*num_actions"):
        sac.parse_args(["--resume", str(pretrained)])


def test_a_checkpoint_without_a_new_setting_resumes(pretrained):
    state = read(pretrained)
    del state["args"]["cuda_graphs"], state["args"]["datasets"]
    torch.save(state, pretrained / "checkpoint.pt")
    start(cal_ql, "--resume", str(pretrained), "--offline-steps", "4")
    assert read(pretrained)["args"]["datasets"] == () and read(pretrained)["progress"]["updates"] == 4


class Code:
    def __reduce__(self):  # pickled, it makes a file when it is loaded
        return open, ("pwned", "w")


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:3000]),
    "one byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "code": lambda path: path.write_bytes(pickle.dumps(Code())),
    "code in a zip file": lambda path: torch.save({"args": Code()}, path),
}


@cal_ql_only
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_bad_checkpoint_is_refused_and_kept(damage, finished, monkeypatch, capsys):
    """Before the data are looked at."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", "nowhere")
    path = finished / "checkpoint.pt"
    damage(path)
    before = {each: each.read_bytes() for each in finished.iterdir()}
    assert run_as_process(monkeypatch, "--resume", str(finished)) == 2
    output, errors = capsys.readouterr()
    assert errors.startswith(f"error: cannot go on from {path}: ") and errors.count("\n") == 1 and not output
    assert before == {each: each.read_bytes() for each in finished.iterdir()} and not Path("pwned").exists()


@cal_ql_only
def test_a_flipped_bit_is_found_wherever_it_matters(finished):
    """All over the file: it is refused, or what is read is what was written."""
    path, sound = finished / "checkpoint.pt", read(finished)
    content, refused = path.read_bytes(), 0
    places = np.random.default_rng(0).integers(0, 8 * len(content), 80).tolist()
    for place in places:
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            assert same(cal_ql.parse_args(["--resume", str(finished)])[1], sound)
        except cal_ql.InputError as error:
            refused += str(error).startswith(f"cannot go on from {path}: ")
    assert refused > 20


def test_a_strangers_run_chooses_no_code(pretrained, monkeypatch, capsys):
    evil = Path("runs/evil/payload.py")
    pretrained = pretrained.rename(evil.parent.absolute())
    evil.write_text("open('pwned', 'w')")
    change(pretrained, args={"online_env": "runs.evil.payload:X-v0"})
    assert run_as_process(monkeypatch, "--resume", str(pretrained), "--online-steps", "5") == 2
    message = "was made with --online-env runs.evil.payload:X-v0: repeat that to go on.\n"
    assert capsys.readouterr().err == f"error: {pretrained} {message}" and not Path("pwned").exists()


def test_resumed_in_its_own_folder_and_tracked(pretrained, tmp_path, monkeypatch):
    for name, value in (("MODE", "offline"), ("DIR", str(tmp_path)), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.chdir(pretrained)
    try:
        cal_ql.train(*cal_ql.parse_args("--resume . --track --offline-steps 4".split()))
        assert wandb.run.name == wandb.run.id == pretrained.name and wandb.run.config["env_id"] == "pick-place"
        assert list(tmp_path.glob("wandb/offline-run-*")) and read(pretrained)["progress"]["updates"] == 4
    finally:
        wandb.finish()
        wandb.tensorboard.unpatch()


def test_weights_that_are_not_finite_end_the_run():
    with pytest.raises(cal_ql.InputError) as error:
        start(cal_ql, *TINY, "--critic-lr", "inf")
    (run,) = Path("runs").absolute().iterdir()
    assert str(error.value) == f"weights are not finite after 50 updates; {run} keeps its checkpoint."
    assert read(run)["progress"]["updates"] == 0 and len(table(run)) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_moves_from_cpu_to_gpu(script, monkeypatch):
    run = start(script, *TINY, "--offline-steps", "10", "--online-steps", "5")
    start(script, "--resume", str(run), "--device", "cuda", "--online-steps", "15")
    assert read(run)["progress"]["updates"] == 40 and table(run)[-1]["env_steps"] == "15"
    update = script.update  # in which `.item()` is allowed now
    monkeypatch.setattr(script, "update", lambda *rest: {k: torch.tensor(v.item()) for k, v in update(*rest).items()})
    start(script, "--resume", str(run), "--no-cuda-graphs", "--online-steps", "20")
    start(script, "--resume", str(run), "--device", "cpu", "--online-steps", "25")


# ---- The protocol ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, updates, online", [
    ("--actor-interval 1 --num-critics 4 --num-target-critics 2 --critic-layer-norm --actor-reduce mean", 7, 20),
    ("--offline-steps 0 --mixing-ratio -1 --actor-interval 3", 0, 20), ("--online-steps 0", 7, 0),
    ("--mixing-ratio 0 --warmup-steps 1000", 7, 0), ("--warmup-steps 6", 7, 10), ("--warmup-steps 5", 7, 20),
])  # fmt: skip
def test_updates_of_each_phase(flags, updates, online, script, monkeypatch):
    """As many as the phase asks for, the actor's turn at every `actor_interval`-th; two episodes of 5 steps online."""
    update, calls = script.update, []

    def recorded(agent, optimizer, args, online, with_actor, batch):
        calls.append((online, with_actor, len(batch.rewards)))
        return update(agent, optimizer, args, online, with_actor, batch)

    monkeypatch.setattr(script, "update", recorded)
    run = start(script, *TINY, "--offline-steps", "7", "--online-steps", "10", *flags.split())
    interval = read(run)["args"]["actor_interval"]
    assert calls == [(k > updates, k % interval == 0, 8) for k in range(1, updates + online + 1)]
    assert all(value.isfinite().all() for value in read(run)["agent"].values())


def test_warm_up_and_no_offline_data(monkeypatch):
    """Whole episodes of the frozen policy first, then updates from online transitions alone: WSRL's protocol."""
    update, learned = cal_ql.update, []
    monkeypatch.setattr(cal_ql, "update", lambda *rest: (learned.append(rest[-1].observations), update(*rest))[1])
    flags = "--mixing-ratio 0 --warmup-steps 10 --online-steps 20 --buffer-size 20 --online-eval-interval 5"
    run = start(cal_ql, *TINY, "--offline-steps", "0", *flags.split())
    # Episodes of 5 steps and two updates a step: none after the first, as 5 steps are less than 10.
    rows = [(int(row["env_steps"]), int(row["updates"])) for row in table(run)]
    assert rows == [(0, 0), (5, 0), (10, 10), (15, 20), (20, 30)]
    online = read(run)["buffer"]["online"][0]
    for k, states in enumerate(learned):
        assert (states[:, None] == online[: 10 + 5 * (k // 10)]).all(2).any(1).all()


def test_online_episodes(monkeypatch):
    """Each has a seed of its own; the policy does not learn meanwhile; what it plays is what the replay gets."""
    played, added, play, add = [], [], cal_ql.play_episode, cal_ql.ReplayBuffer.add

    def play_episode(env, agent, seed, explore, device):
        before = [parameter.clone() for parameter in agent.parameters()]
        episode, score = play(env, agent, seed, explore, device)
        assert all(map(torch.equal, before, agent.parameters()))
        if explore:
            played.append((seed, episode, env))
        return episode, score

    monkeypatch.setattr(cal_ql, "play_episode", play_episode)
    monkeypatch.setattr(cal_ql.ReplayBuffer, "add", lambda self, batch: (added.append(batch), add(self, batch)))
    start(cal_ql, *TINY, "--offline-steps", "3")
    assert len({seed for seed, _, _ in played}) == 3 == len(added)
    for (seed, episode, env), batch in zip(played, added, strict=True):
        assert np.abs(episode.actions).max() < 1 and not episode.terminations.any()  # cut off by time
        assert np.array_equal(env.reset(seed=seed)[0], episode.observations[0])
        for action, state, reward in zip(episode.actions, episode.observations[1:], episode.rewards, strict=True):
            values = env.step(action)
            assert np.array_equal(values[0], state) and values[1] == reward
        states = [*batch.observations, batch.next_observations[-1]]
        assert np.array_equal(states, episode.observations) and np.array_equal(states[1:], batch.next_observations)
        assert batch.rewards.tolist() == [-2.0] * 5  # 11 * 0 - 2, and so on for ever: -2 / (1 - 0.96)
        np.testing.assert_allclose(batch.mc_returns, [-50.0] * 5, rtol=1e-6)
    assert not np.array_equal(played[0][1].actions, played[1][1].actions)


def test_random_actions_of_sac_come_first_and_are_counted_over_a_resume(monkeypatch):
    script = importlib.import_module("sac_offline_data")
    flags = [*TINY, "--offline-steps", "0", "--random-steps", "12", "--online-eval-interval", "5"]
    uninterrupted = start(script, *flags)
    run = start(script, *flags, "--online-steps", "5")
    start(script, "--resume", str(run), "--online-steps", "15")
    check_equal(run, uninterrupted)

    agent = script.Agent(3, 400, script.Args(random_steps=2, actor_layers=(4,), critic_layers=(4,)))
    agent.actor.log_std_offset.data.fill_(-5.0)
    with torch.no_grad():
        agent.act(torch.zeros(1, 3), explore=False)  # of an evaluation, which does not count
        spreads = [agent.act(torch.zeros(1, 3), explore=True).abs().max().item() for _ in range(4)]
    assert min(spreads[:2]) > 0.97 and max(spreads[2:]) < 0.3 and agent.acted_steps == 4


# ---- Data without an environment, and an environment of the user's ---------------------------------------------------


@pytest.fixture
def robot(tmp_path, monkeypatch):
    """The module of docs/no_environment.md, whose data are collected, and the flags of the page's two runs."""
    page = (ROOT / "docs/no_environment.md").read_text()
    Path("robot.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "robot", raising=False)
    module = importlib.import_module("robot")
    module.record()
    commands = re.findall(r"^python cal_ql_continuous.py (.*)$", page.replace("\\\n", ""), re.MULTILINE)
    module.first, module.second = (command.split() for command in commands)
    module.first += "--offline-steps 4 --offline-eval-interval 2 --buffer-size 99".split()
    module.second += "--online-steps 90 --online-eval-interval 50 --eval-episodes 2 --device cpu".split()
    return module


def test_the_robot_of_the_documentation(robot):
    """Trained on without an environment, then played in; a checkpoint, which may be a stranger's, chooses no code."""
    run = start(cal_ql, *robot.first, "--device", "cpu")
    rows = table(run)
    assert [row["updates"] for row in rows] == ["0", "2", "4"]
    assert all([name for name in row if row[name] == "nan"] == ["score", "return"] for row in rows)
    without = [flag for flag in robot.first if flag not in ("--eval-episodes", "--online-steps", "0")]
    hint = "the data name none to be had: --online-env, or --online-steps 0 --eval-episodes 0"
    assert refusal(*without) == f"cannot make the environment mine/reach-v0: ValueError('{hint}')."
    second = [str(run) if flag == "runs/<run>" else flag for flag in robot.second]
    start(cal_ql, *second)
    assert 90 <= int(table(run)[-1]["env_steps"]) < 130 and 0 <= float(table(run)[-1]["score"]) <= 1
    assert {*read(run)["buffer"]["online"][2].tolist()} <= {-1.0, 9.0}
    assert refusal("--resume", str(run)) == f"{run} was made with --online-env robot:Reach-v0: repeat that to go on."


@pytest.mark.parametrize("name, message", [
    ("Pendulum-v1", "or other actions than the data"), ("robot:Endless-v0", "no time limit (--episode-length)"),
    ("robot:Missing-v0", "Missing"), ("nowhere:Reach-v0", "No module named 'nowhere'"), ("", "Malformed"),
])  # fmt: skip
def test_no_environment_of_the_users(name, message, robot):
    gym.register("Endless-v0", entry_point="robot:Robot")
    line = refusal(*robot.first, "--eval-episodes", "1", "--online-env", name)
    assert line.startswith(f"cannot make the environment {name}") and message in line


def test_returns_of_time_outs(robot, monkeypatch):
    """By hand, gamma 0.5 and three steps: a cost repeats for ever and a gain does not, in data and online alike."""
    monkeypatch.setattr(robot.Robot, "step", lambda self, action: (self.observe(), 1.0, False, False, {}))
    flags = [*robot.first, *"--online-env robot:Reach-v0 --episode-length 3 --online-steps 3 --gamma 0.5".split()]
    for scale, bias, expected in (("1", "0", [1.75, 1.5, 1]), ("2", "-4", [-4, -4, -4]), ("0", "2", [3.5, 3, 2])):
        run = start(cal_ql, *flags, "--reward-scale", scale, "--reward-bias", bias, "--offline-steps", "0")
        assert read(run)["buffer"]["online"][5].tolist() == expected


# ---- Online episodes as a dataset ------------------------------------------------------------------------------------


def save_online(run: Path) -> int:
    return from_run.main([str(run), "--dataset-id", "mine/online-v0"])


def test_online_episodes_become_a_dataset(robot, monkeypatch):
    """As the environment had them: its observations, actions, rewards, ends; and a script reads them again."""
    played, step, reset = [], robot.Robot.step, robot.Robot.reset

    def record_reset(self, **kwargs):
        played.append([reset(self, **kwargs)])
        return played[-1][0]

    def record_step(self, action):
        played[-1].append((action, *step(self, action)))
        return played[-1][-1][1:]

    monkeypatch.setattr(robot.Robot, "reset", record_reset)
    monkeypatch.setattr(robot.Robot, "step", record_step)
    flags = "--online-env robot:Reach-v0 --online-steps 95 --buffer-size 200 --device cpu"
    run = start(cal_ql, *robot.first, *flags.split())
    assert save_online(run) == 0
    dataset = minari.load_dataset("mine/online-v0")
    spaces = dataset.action_space, dataset.observation_space
    assert dataset.env_spec is None and spaces == (robot.Robot.action_space, robot.Robot.observation_space)
    episodes = played[1:]  # the first is the step that is tried when the environment is made
    assert len(dataset) == len(episodes) >= 3
    for saved, ((first, _), *steps) in zip(dataset, episodes, strict=True):
        actions, states, rewards, ends, _, _ = zip(*steps, strict=True)
        for key in ("position", "goal"):
            np.testing.assert_array_equal(saved.observations[key], [first[key], *(state[key] for state in states)])
        np.testing.assert_allclose(saved.actions, actions, atol=1e-6)
        np.testing.assert_allclose(saved.rewards, rewards, atol=1e-6)
        np.testing.assert_array_equal(saved.terminations, ends)
        assert saved.truncations.tolist() == [False] * (len(ends) - 1) + [not ends[-1]]
    start(cal_ql, *robot.first, "--datasets", "mine/reach-v0", "mine/online-v0")


@cal_ql_only
def test_online_episodes_name_their_environment(whole, pretrained, demonstrations, monkeypatch, tmp_path, capsys):
    """The ring of twelve has lost the first of three episodes; what is left can be played on."""
    shutil.copytree(demonstrations, tmp_path / "minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    assert save_online(whole[1]) == 0
    assert "mine/online-v0: 2 episodes, 10 steps" in capsys.readouterr().out
    spec = minari.load_dataset("mine/online-v0").env_spec
    assert (spec.id, spec.max_episode_steps) == ("cal-ql/PickPlace-v0", 5)
    flags = "--env-id mine/online-v0 --datasets mine/online-v0 cal-ql/pick-place/narrow-v0 --offline-steps 3"
    start(cal_ql, *TINY, *flags.split())
    for run, message in (
        (whole[1], "already exists"),
        (tmp_path, "missing or damaged"),
        (pretrained, "no online episode"),
    ):
        assert save_online(run) == 2 and message in capsys.readouterr().err


@cal_ql_only
def test_episodes_that_the_paper_relabels_are_saved_as_the_policy_saw_them(finished, tmp_path, monkeypatch):
    source = types.SimpleNamespace(action_space=gym.spaces.Box(-2, 2, (4,)), env_spec=1, observation_space=None)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    load = minari.load_dataset
    monkeypatch.setattr(minari, "load_dataset", lambda dataset_id: source)
    change(finished, args={"env_id": "antmaze-umaze"})
    assert save_online(finished) == 0
    dataset = load("mine/online-v0")
    assert dataset.env_spec is None and dataset.observation_space.shape == (11,)
