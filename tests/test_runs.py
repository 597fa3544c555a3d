"""Whole runs, tiny ones: what they write, how they stop and go on, and what they say to bad input."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.pool import ApplyResult
from pathlib import Path

import gymnasium as gym
import httpx
import minari
import numpy as np
import pytest
import torch
import wandb
from minari.data_collector import EpisodeBuffer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import cal_ql_continuous
import sac_offline_data
from cal_ql_continuous import Actor, main
from collect import pick_place, point_maze

SCRIPT = Path(cal_ql_continuous.__file__)
# 12 updates with evaluations at 0, 5, 10 and 12, then 3 episodes of 10 steps with 20 updates each and an evaluation.
TINY = """--env-id pointmaze-narrow --episode-length 10 --offline-steps 12 --online-steps 30 --offline-eval-interval 5
--online-eval-interval 10 --eval-episodes 2 --checkpoint-interval 4 --log-interval 2 --utd-ratio 2 --buffer-size 100
--actor-layers 8 --critic-layers 8 --batch-size 8 --num-actions 2 --device cpu""".split()


@pytest.fixture(scope="module", autouse=True)
def datasets_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("minari")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(path))
        pick_place.collect(pick_place.Args())
        point_maze.collect(point_maze.Args(episodes=10))
        yield path


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The folder for the test's runs; nothing else lies in the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def only(runs: Path) -> Path:
    (run,) = runs.iterdir()
    return run


def checkpoint(run: Path) -> dict:
    return torch.load(run / "checkpoint.pt", weights_only=True)


def table(run: Path) -> list[dict[str, str]]:
    columns, *rows = [line.split(",") for line in (run / "eval.csv").read_text().split()]
    return [dict(zip(columns, row, strict=True)) for row in rows]


def spawn(script: Path, *flags: str, **kwargs) -> subprocess.Popen:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, script, *flags], env=env, **pipes, **kwargs)


def at_call(count: int, function, then):
    """`function`, which calls `then` before its call number `count`."""
    calls = itertools.count(1)

    def wrapped(*args, **kwargs):
        if next(calls) == count:
            then()
        return function(*args, **kwargs)

    return wrapped


def terminate() -> None:
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL  # else pytest itself would end here
    os.kill(os.getpid(), signal.SIGTERM)


# ---- What a run writes -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of the script copied alone into an empty folder, as a process."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copy(SCRIPT, folder)
    process = spawn(folder / SCRIPT.name, *TINY, cwd=folder)
    process.output, process.errors = process.communicate()
    process.folder = folder
    return process


def test_script_runs_alone(alone):
    assert alone.returncode == 0, alone.errors
    run, last = only(alone.folder / "runs"), alone.output.splitlines()[-1]
    rows = table(run)
    before, after, regret = (f"{float(x):.3f}" for x in (rows[3]["score"], rows[-1]["score"], rows[-1]["regret"]))
    assert f"score {before} before fine-tuning -> {after} after, regret {regret}" in last


def test_evaluations(alone):
    run = only(alone.folder / "runs")
    rows = table(run)
    assert (run / "eval.csv").read_text().splitlines()[0] == (
        "phase,updates,env_steps,score,return,regret,mean_q,mean_mc_return,bound_rate,wall_time"
    )
    steps = [(row["phase"], int(row["updates"]), int(row["env_steps"])) for row in rows]
    assert steps[:4] == [("offline", updates, 0) for updates in (0, 5, 10, 12)]
    assert steps[4:] == [("online", 32, 10), ("online", 52, 20), ("online", 72, 30)]
    assert all(math.isfinite(float(row[name])) for row in rows for name in ("score", "mean_q", "mean_mc_return"))
    assert all(0 <= float(row["bound_rate"]) <= 1 for row in rows)


def test_regret_is_the_mean_shortfall_of_online_evaluations(runs, monkeypatch):
    scores = iter([1, 1, 1, 0.25, 0.5, 0, 1])  # at 0, 5, 10, the switch, and three times online
    roll_out = cal_ql_continuous.roll_out

    def scored(env, task, actor, seed, stochastic, check):
        episode, _ = roll_out(env, task, actor, seed, stochastic, check)
        return episode, None if stochastic else next(scores)

    monkeypatch.setattr(cal_ql_continuous, "roll_out", scored)
    assert main([*TINY, "--eval-episodes", "1"]) == 0
    regrets = [float(row["regret"]) for row in table(only(runs))]
    assert np.isnan(regrets[:4]).all()
    assert regrets[4:] == pytest.approx([0.5, 0.75, 0.5])


def test_settings_are_recorded(alone):
    config = json.loads((only(alone.folder / "runs") / "config.json").read_text())
    assert (config["env_id"], config["utd_ratio"], config["actor_layers"]) == ("pointmaze-narrow", 2, [8])
    assert config["reward_bias"] == -5  # the domain's, not named on the command line


def test_tensorboard_has_the_curves(alone):
    events = EventAccumulator(str(only(alone.folder / "runs"))).Reload()
    assert {
        "losses/qf1_loss", "losses/qf2_loss", "losses/actor_loss", "losses/alpha", "losses/cql_gap",
        "calibration/bound_rate", "charts/episodic_return", "charts/UPS", "charts/SPS", "charts/cumulative_regret",
        "eval/success_rate", "eval/normalized_score",
    } <= set(events.Tags()["scalars"])  # fmt: skip
    # The x-axis: offline updates, and from there on environment steps, whatever the updates per step.
    assert [event.step for event in events.Scalars("eval/success_rate")] == [0, 5, 10, 12, 22, 32, 42]
    assert events.Scalars("losses/qf1_loss")[-1].step == 42


def test_script_alone_misses_the_module_of_pick_place(alone):
    process = spawn(alone.folder / SCRIPT.name, "--env-id", "pick-place", cwd=alone.folder)
    errors = process.communicate()[1]
    assert process.returncode == 2
    (line,) = [line for line in errors.splitlines() if line.startswith("error:")]
    assert "No module named 'collect'" in line and "Traceback" not in errors


# ---- Stopping and going on -------------------------------------------------------------------------------------------


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def check_equal(run: Path, other: Path) -> None:
    """All that a run holds in the end is equal, to the bit, but for the time that it took."""
    a, b = checkpoint(run), checkpoint(other)
    for state in (a, b):
        del state["progress"]["wall_time"]
        state["progress"]["rows"] = [row.rsplit(",", 1)[0] for row in state["progress"]["rows"]]
    for key in ("progress", "agent", "optimizer", "buffer", "rng"):
        assert same(a[key], b[key]), key
    tables = [[row | {"wall_time": ""} for row in table(path)] for path in (run, other)]
    assert tables[0] == tables[1] and tables[0]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert main([*TINY, "--runs-dir", str(folder)]) == 0
    return only(folder)


@pytest.mark.parametrize("owner, name, call, at", [
    (cal_ql_continuous, "update", 7, dict(phase="offline", updates=7, env_steps=0)),
    (cal_ql_continuous, "update", 15, dict(phase="online", updates=15, env_steps=10, owed=17)),  # amid a step's two
    (Actor, "act", 25, dict(phase="offline", updates=5, episodes=0)),  # in an evaluation: 20 steps at 0, then at 5
    (Actor, "act", 65, dict(phase="offline", updates=12, episodes=0)),  # in that at the switch
    (Actor, "act", 85, dict(phase="online", env_steps=0, owed=0)),  # in the first online episode
    (Actor, "act", 95, dict(phase="online", env_steps=10, owed=0, episodes=1)),  # in the evaluation after it
    (Actor, "act", 115, dict(phase="online", env_steps=10, owed=0, episodes=1)),  # in the second online episode
])  # fmt: skip
def test_resumed_run_equals_uninterrupted(owner, name, call, at, uninterrupted, runs, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, at_call(call, getattr(owner, name), terminate))
        assert main(TINY) == 143
    run = only(runs)
    assert f"stopped by SIGTERM; --resume {run.relative_to(runs.parent)}" in capsys.readouterr().err
    stopped = checkpoint(run)["progress"]
    assert {key: stopped[key] for key in at} == at
    torch.manual_seed(99)  # the random state comes from the checkpoint
    assert main(["--resume", str(run)]) == 0
    check_equal(run, uninterrupted)


def test_evaluations_leave_no_trace_in_training(uninterrupted, runs):
    assert main([*TINY, "--offline-eval-interval", "4", "--online-eval-interval", "20", "--eval-episodes", "1"]) == 0
    ours, other = checkpoint(only(runs)), checkpoint(uninterrupted)
    assert all(same(ours[key], other[key]) for key in ("agent", "optimizer", "buffer", "rng"))


def test_crashed_run_resumes_from_its_last_checkpoint(uninterrupted, runs, monkeypatch):
    def crash():
        raise KeyError("crash")  # an evaluation and an online episode after the checkpoint of update 32

    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(cal_ql_continuous, "update", at_call(34, cal_ql_continuous.update, crash))
        main(TINY)
    run = only(runs)
    assert checkpoint(run)["progress"]["updates"] == 32 and len(table(run)) == 5
    assert main(["--resume", str(run)]) == 0
    check_equal(run, uninterrupted)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_killed_process_resumes(number, code, runs):
    process = spawn(SCRIPT, *TINY, "--offline-steps", "1000000", "--offline-eval-interval", "50", "--runs-dir", runs)
    deadline = time.time() + 60
    while not list(runs.glob("*/checkpoint.pt")) and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    errors = process.communicate()[1]
    assert "Traceback" not in errors and ("stopped by SIGINT" in errors) == (number == signal.SIGINT)
    assert process.returncode == code
    run = only(runs)
    # Where it was stopped is chance; so the run to compare with ends soon after that.
    ends = ["--offline-steps", str(checkpoint(run)["progress"]["updates"] + 3), "--online-steps", "10"]
    assert main(["--resume", str(run), *ends]) == 0
    assert main([*TINY, "--offline-eval-interval", "50", *ends, "--runs-dir", "other"]) == 0
    check_equal(run, only(Path("other")))


@pytest.fixture
def finished(uninterrupted, runs):
    """A copy of a finished run."""
    return Path(shutil.copytree(uninterrupted, runs / "finished"))


def test_finished_run_can_be_extended(finished):
    before = table(finished)
    changes = "--online-steps 50 --online-eval-interval 20 --checkpoint-interval 9 --log-interval 3"
    assert main(["--resume", str(finished), *changes.split()]) == 0
    rows = table(finished)
    assert rows[: len(before)] == before
    assert [int(row["env_steps"]) for row in rows[len(before) :]] == [40, 50]


def test_run_from_another_device_is_continued(finished):
    """A checkpoint written on a GPU says that Adam can be captured, which holds for its device alone."""
    path = finished / "checkpoint.pt"
    state = torch.load(path)
    for group in state["optimizer"]["param_groups"]:
        group["capturable"] = True
    torch.save(state, path)
    assert main(["--resume", str(finished), "--online-steps", "40"]) == 0
    assert [group["capturable"] for group in checkpoint(finished)["optimizer"]["param_groups"]] == [False, False]


@pytest.mark.parametrize("flags, named", [
    (["--gamma", "0.9", "--batch-size", "16"], ["gamma", "batch_size"]),
    (["--env-id", "pick-place"], ["env_id"]),
    (["--utd-ratio", "1"], ["utd_ratio"]),
    (["--seed", "2"], ["seed"]),
])  # fmt: skip
def test_resume_refuses_other_settings(flags, named, finished, capsys):
    assert main(["--resume", str(finished), *flags]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and all(name in message for name in named)
    assert "num_actions" not in message


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def rename_script(path: Path) -> None:
    torch.save(torch.load(path) | {"script": "cal_ql_pixels"}, path)


@pytest.mark.parametrize("damage, word", [
    (truncate, "damaged"), (lambda path: path.write_bytes(b""), "damaged"), (rename_script, "cal_ql_pixels.py"),
], ids=["truncated", "empty", "another script's"])  # fmt: skip
def test_bad_checkpoint_is_refused_and_kept(damage, word, finished, capsys):
    path = finished / "checkpoint.pt"
    damage(path)
    before = path.read_bytes()
    assert main(["--resume", str(finished)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and word in line
    assert path.read_bytes() == before


def test_missing_checkpoint_is_refused(runs, capsys):
    assert main(["--resume", "runs/nowhere"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "missing" in line
    assert not runs.exists()


@pytest.mark.parametrize("log_interval", ["1", "1000"])  # at 1000 it is the checkpoint that finds it
def test_loss_that_is_not_finite_ends_the_run(log_interval, runs, monkeypatch, capsys):
    update, calls = cal_ql_continuous.update, itertools.count(1)

    def broken(*args):
        losses = update(*args)
        return losses if next(calls) < 7 else losses | {"losses/qf1_loss": torch.tensor(math.nan)}

    monkeypatch.setattr(cal_ql_continuous, "update", broken)
    assert main([*TINY, "--log-interval", log_interval]) == 1
    assert "error: losses/qf1_loss is nan" in capsys.readouterr().err
    assert checkpoint(only(runs))["progress"]["updates"] == 4


# ---- Variants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, weights, actor_updates", [
    ("--num-critics 4 --num-target-critics 2 --critic-layer-norm --actor-reduce mean --actor-interval 2", (5, 5), 26),
    ("--online-cql-weight 0", (5, 0), 52),
    ("--online-cql-weight 0.5 --mixing-ratio -1", (5, 0.5), 52),
    ("--no-importance-sampling --cql-weight 2", (2, 2), 52),
    ("--cql-lagrange --backup-entropy --target-entropy -1", (5, 5), 52),
    ("--offline-steps 0 --mixing-ratio 1", (5, 5), 40),
])  # fmt: skip
def test_variants_run(flags, weights, actor_updates, runs, monkeypatch):
    update, calls = cal_ql_continuous.update, []

    def recorded(agent, optimizer, batch, noise, cql_weight, with_actor, args):
        calls.append((cql_weight, with_actor))
        return update(agent, optimizer, batch, noise, cql_weight, with_actor, args)

    monkeypatch.setattr(cal_ql_continuous, "update", recorded)
    assert main([*TINY, "--online-steps", "20", *flags.split()]) == 0
    offline = len(calls) - 2 * 20  # two updates for each environment step
    assert {weight for weight, _ in calls[:offline]} <= {weights[0]}
    assert {weight for weight, _ in calls[offline:]} == {weights[1]}
    assert sum(with_actor for _, with_actor in calls) == actor_updates
    agent = checkpoint(only(runs))["agent"]
    assert all(value.isfinite().all() for value in agent.values())
    assert (agent["log_cql_alpha"] != 1) == ("--cql-lagrange" in flags)


# ---- Workers ---------------------------------------------------------------------------------------------------------


def test_evaluations_in_workers_are_those_of_the_run_itself(uninterrupted, runs):
    assert main([*TINY, "--eval-workers", "2"]) == 0
    check_equal(only(runs), uninterrupted)
    steps = [[(event.step, event.value) for event in read_events(run).Scalars("eval/score")]
             for run in (only(runs), uninterrupted)]
    assert steps[0] == steps[1] and len(steps[0]) == 7  # each at the step of its snapshot


def read_events(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run)).Reload()


@pytest.fixture(scope="module")
def overlapped(tmp_path_factory):
    """A run with --overlap, and the actor as it was at the switch and whenever an episode had been added."""
    folder, actors = tmp_path_factory.mktemp("overlapped"), []
    with pytest.MonkeyPatch.context() as patch:
        load, save = Actor.load_state_dict, cal_ql_continuous.ReplayBuffer.add
        seen = []

        def load_state_dict(self, state, **kwargs):  # only `acting` is loaded
            seen.append({name: value.clone() for name, value in state.items()})
            return load(self, state, **kwargs)

        def add(self, episode):
            actors.append((seen[-1], episode))
            save(self, episode)

        patch.setattr(Actor, "load_state_dict", load_state_dict)
        patch.setattr(cal_ql_continuous.ReplayBuffer, "add", add)
        assert main([*TINY, "--overlap", "--runs-dir", str(folder)]) == 0
    return only(folder), seen, actors


def test_overlapped_episode_is_played_by_the_policy_before_the_updates_for_the_last(overlapped, uninterrupted):
    run, states, added = overlapped
    args = cal_ql_continuous.Args(**checkpoint(run)["args"])
    task = cal_ql_continuous.find_task(args.env_id)
    env = cal_ql_continuous.make_env(cal_ql_continuous.open_dataset(task.datasets[0]), task, args.episode_length)
    # Loaded at the switch, and after every episode's arrival as the actor was then: after the updates for the last one.
    assert len(states) == 1 + len(added) == 4
    assert same(states[0], states[1])  # no update between the switch and the first episode's arrival
    assert not same(states[1], states[2]) and not same(states[2], states[3])
    for k, (_, episode) in enumerate(added):
        actor = Actor(4, 2, args)
        actor.load_state_dict(states[k])
        seed = cal_ql_continuous.derive_seed(args.seed, cal_ql_continuous.TRAINING, k)
        expected, _ = cal_ql_continuous.roll_out(env, task, actor, seed, True, lambda: None)
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(episode, expected, strict=True))
    # The paper's protocol differs from the second episode on.
    ours, theirs = (checkpoint(path)["buffer"]["online"][1] for path in (run, uninterrupted))
    assert torch.equal(ours[:10], theirs[:10]) and not torch.equal(ours[10:20], theirs[10:20])


@pytest.mark.parametrize("call", [7, 13, 40])  # offline, right after the first episode, amid the third one's flight
def test_overlapped_run_resumes(call, overlapped, runs, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cal_ql_continuous, "update", at_call(call, cal_ql_continuous.update, terminate))
        assert main([*TINY, "--overlap", "--eval-workers", "1"]) == 143
    torch.manual_seed(99)
    assert main(["--resume", str(only(runs)), "--eval-workers", "0"]) == 0
    check_equal(only(runs), overlapped[0])


@pytest.mark.parametrize("flags", [[], ["--overlap"]])
def test_sac_begins_with_random_actions_and_resumes(flags, runs, monkeypatch):
    text = " ".join(TINY).replace("--offline-steps 12 ", "").replace("--offline-eval-interval 5 ", "")
    flags = [*text.replace("--num-actions 2", "").split(), "--random-steps", "15", *flags]
    assert sac_offline_data.main([*flags, "--runs-dir", "whole"]) == 0
    whole = only(Path("whole"))
    # Two episodes begin before step 15.
    actions = checkpoint(whole)["buffer"]["online"][1]
    assert len(actions) == 30
    generators = [torch.Generator().manual_seed(sac_offline_data.derive_seed(1, sac_offline_data.TRAINING, k))
                  for k in range(3)]
    for k, generator in enumerate(generators):
        expected = []
        for _ in range(10):
            torch.randn(1, 2, generator=generator)  # the policy's draw, which is not used
            expected.append(torch.rand(2, generator=generator) * 2 - 1)
        assert torch.allclose(actions[10 * k : 10 * k + 10], torch.stack(expected)) == (k < 2)
    with monkeypatch.context() as patch:
        patch.setattr(sac_offline_data, "update", at_call(30, sac_offline_data.update, terminate))
        assert sac_offline_data.main(flags) == 143
    assert sac_offline_data.main(["--resume", str(only(runs))]) == 0
    check_equal(only(runs), whole)


def test_worker_ends_with_its_parent(runs):
    flags = [*TINY, "--overlap", "--eval-workers", "1", "--online-steps", "100000"]
    process = spawn(SCRIPT, *flags, cwd=runs.parent)
    deadline = time.monotonic() + 60
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        process.kill()
        pytest.skip("needs /proc")
    while "online" not in "".join(path.read_text() for path in runs.glob("*/eval.csv")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    workers = children.read_text().split()
    assert len(workers) >= 2
    process.kill()
    process.communicate()
    while any(Path(f"/proc/{pid}/stat").exists() and "Z" != Path(f"/proc/{pid}/stat").read_text().split()[2]
              for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("flags", [[], ["--actor-interval", "3", "--online-cql-weight", "0", "--no-tf32"]])
def test_cuda(flags, runs, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Actor, "act", at_call(85, Actor.act, terminate))  # in the first online episode
        assert main([*TINY, "--device", "cuda", *flags]) == 143
    run = only(runs)
    assert checkpoint(run)["progress"]["updates"] == 12
    assert len(checkpoint(run)["rng"]) == 1 + torch.cuda.device_count()
    assert main(["--resume", str(run)]) == 0  # captures anew, after loading
    assert int(table(run)[-1]["env_steps"]) == 30 and checkpoint(run)["progress"]["updates"] == 72


# ---- Bad input -------------------------------------------------------------------------------------------------------


def check_refused(flags: list[str], capsys, *words: str) -> None:
    """Exit code 2, one line that has the words, and no trace of a run."""
    assert main([*TINY, *flags]) == 2
    errors = capsys.readouterr().err
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert all(word in line for word in words), line
    assert "Traceback" not in errors
    assert not Path("runs").exists()


@pytest.mark.parametrize("flags", [
    "--gamma 1", "--gamma -0.1", "--gamma nan", "--tau 0", "--tau 1.5", "--mixing-ratio 1.01", "--mixing-ratio -0.5",
    "--batch-size 0", "--eval-episodes 0", "--num-actions 0", "--utd-ratio 0", "--actor-interval 0", "--buffer-size 0",
    "--offline-steps -1", "--seed -1", "--actor-layers 8 0", "--critic-lr 0", "--actor-lr inf", "--reward-bias nan",
    "--cql-weight -1", "--online-cql-weight -1", "--num-target-critics 3", "--num-target-critics 0",
    "--eval-workers -1", "--offline-eval-interval 0", "--checkpoint-interval 0", "--log-interval 0",
    "--episode-length -1",
])  # fmt: skip
def test_settings_out_of_range(flags, runs, capsys):
    check_refused(flags.split(), capsys, *flags.split()[:1], "it must be")


def test_cuda_without_cuda(runs, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_refused(["--device", "cuda"], capsys, "--device", "no CUDA device")


def test_unknown_flag(runs):
    with pytest.raises(SystemExit) as stop:
        main([*TINY, "--gama", "0.9"])
    assert stop.value.code == 2 and not runs.exists()


def test_unknown_task_names_the_nearest(runs, capsys):
    check_refused(["--env-id", "antmaze-large-divers"], capsys, "did you mean antmaze-large-diverse")


@pytest.mark.parametrize("answer", ["unreachable", "never"])
def test_absent_dataset_without_a_network(answer, runs, capsys, monkeypatch):
    def list_remote_datasets(*args, **kwargs):
        if answer == "unreachable":
            raise httpx.ConnectError("Name or service not known")
        threading.Event().wait(60)  # a network that swallows packets; the thread is left behind

    get = ApplyResult.get
    monkeypatch.setattr(minari, "list_remote_datasets", list_remote_datasets)
    monkeypatch.setattr(ApplyResult, "get", lambda self, timeout=600: get(self, timeout / 60))  # 0.5 s instead of 30
    started = time.time()
    check_refused(["--env-id", "antmaze-umaze"], capsys, "D4RL/antmaze/umaze-v1", "minari download", "quickstart")
    assert time.time() - started < 8


def test_absent_dataset_of_ours_names_its_collector(runs, capsys):
    check_refused(["--env-id", "cal-ql/pick-place/other-v0"], capsys, "python -m collect.pick_place")


def write_variant(dataset_id: str, count: int, spoil=lambda episode: None, **kwargs) -> None:
    """Writes the first episodes of the PointMaze data anew, each after spoil(episode)."""
    source, buffers = minari.load_dataset("cal-ql/pointmaze/narrow-v0"), []
    for episode in source.iterate_episodes(range(count)):
        spoil(episode)
        columns = {name: getattr(episode, name) for name in ("observations", "actions", "rewards", "terminations")}
        buffers.append(EpisodeBuffer(id=episode.id, truncations=episode.truncations, **columns))
    minari.create_dataset_from_buffers(dataset_id, buffers, env=source.env_spec, **kwargs)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("column", ["observations", "actions", "rewards"])
def test_data_that_is_not_finite(column, value, runs, capsys):
    def spoil(episode):
        values = getattr(episode, column)
        if episode.id in (1, 4):
            (values["observation"] if column == "observations" else values)[-1] = value

    dataset_id = f"test/{column}{value}-v0"
    write_variant(dataset_id, 5, spoil)
    check_refused(["--env-id", dataset_id], capsys, "in 2 episodes", f"1 of {dataset_id}, 4 of {dataset_id}.")


@pytest.mark.parametrize("name, space, words", [
    ("discrete", gym.spaces.Discrete(3), ["Discrete(3)", "continuous, bounded"]),
    ("unbounded", gym.spaces.Box(-1, np.array([1, np.inf], np.float32)), ["inf", "continuous, bounded"]),
    ("empty", None, ["no usable episode"]),
])  # fmt: skip
def test_data_that_cannot_be_used(name, space, words, runs, capsys):
    write_variant(f"test/{name}-v0", 0, action_space=space)
    check_refused(["--env-id", f"test/{name}-v0"], capsys, f"test/{name}-v0", *words)


def test_few_successes_are_warned_of(runs, capsys):
    dataset = minari.load_dataset("cal-ql/pick-place/narrow-v0")
    count = sum(episode.rewards.max() > 0 for episode in dataset)
    assert count < 10
    assert main([*TINY, "--env-id", "pick-place", "--offline-steps", "0", "--online-steps", "0"]) == 0
    assert f"warning: only {count} episodes succeed" in capsys.readouterr().out


def test_track_without_login(runs, capsys, monkeypatch):
    def init(*args, **kwargs):
        raise wandb.errors.UsageError("api_key not configured")

    monkeypatch.setattr(wandb, "init", init)
    check_refused(["--track"], capsys, "--track: api_key not configured", "wandb login")


def test_track_offline(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    try:
        assert main([*TINY, "--track", "--online-steps", "0"]) == 0
        assert wandb.run.name == only(runs).name
        assert wandb.run.config["env_id"] == "pointmaze-narrow"
        assert list(tmp_path.glob("wandb/offline-run-*"))
    finally:
        wandb.finish()
        wandb.tensorboard.unpatch()


def test_damaged_data_and_unusable_folders(runs, datasets_path, tmp_path, monkeypatch, capfd):
    shutil.copytree(datasets_path, tmp_path / "minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "file").write_text("")
    assert main([*TINY, "--runs-dir", str(tmp_path / "file")]) == 2
    data = tmp_path / "minari/cal-ql/pointmaze/narrow-v0/data/main_data.hdf5"
    data.write_bytes(data.read_bytes()[:20_000])
    assert main(TINY) == 2
    errors = capfd.readouterr().err
    assert errors.count("error: ") == 2 and "Traceback" not in errors and "delete what is damaged" in errors
    assert not runs.exists()
