"""tools/export.py: exported policies against the agents of every script, without torch, and bad input."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import gymnasium_robotics
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer

from collect import pick_place

pytest.importorskip("rliable")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from tools import export  # noqa: E402

ROOT = Path(__file__).parents[1]
gym.register_envs(gymnasium_robotics)
gym.register("test/Dot-v0", entry_point="dot_env:DotEnv", max_episode_steps=8)
# Not the environment's box of -1 to 1, and beyond it at one corner: both rescaling and clipping do something.
BOX = gym.spaces.Box(np.float32([-2, -0.5]), np.float32([0.5, 0.25]), dtype=np.float32)
MODULES = ["cal_ql_continuous", "cql_continuous", "sac_offline_data", "baselines.iql_continuous",
           "baselines.awac_continuous", "baselines.td3_bc_continuous"]  # fmt: skip
PIXELS = ["cal_ql_pixels", *(f"baselines.{algorithm}_pixels" for algorithm in ("cql", "sac", "iql", "awac"))]


def write_dataset(dataset_id: str, env_id: str, box: gym.spaces.Box, **kwargs) -> None:
    """Three episodes of seven random steps."""
    env, buffers = gym.make(env_id, **kwargs), []
    box.seed(0)
    for k in range(3):
        observations, actions = [env.reset(seed=k)[0]], []
        for _ in range(7):
            actions.append(box.sample())
            observations.append(env.step(actions[-1])[0])
        if isinstance(observations[0], dict):
            observations = {key: np.array([each[key] for each in observations]) for key in observations[0]}
        ends = [False] * 6 + [True]
        buffers.append(EpisodeBuffer(id=k, observations=observations, actions=actions, rewards=[0.0] * 6 + [1.0],
                                     terminations=[False] * 7, truncations=ends))  # fmt: skip
    minari.create_dataset_from_buffers(dataset_id, buffers, env=env.spec, action_space=box, jpeg_encoding=False)


@pytest.fixture(scope="module", autouse=True)
def datasets_path(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        write_dataset("test/maze-v0", "PointMaze_UMaze-v3", BOX, max_episode_steps=7)
        write_dataset("test/dot-v0", "test/Dot-v0", gym.spaces.Box(-1, 2, (2,), np.float32), size=13)
        yield


def make_run(folder, name: str, env_id: str = "test/maze-v0"):
    """A run's folder with the checkpoint of an agent of random weights, and that agent."""
    script = importlib.import_module(name)
    args, task = script.task_defaults(env_id), script.find_task(env_id)
    args.actor_layers = args.critic_layers = (16, 8)
    env = script.make_env(script.open_dataset(task.datasets[0]), task, 0)
    torch.manual_seed(0)
    agent = script.Agent(*env.observation_space.shape, *env.action_space.shape, args)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.normal_(0, 0.3 if "pixels" in name else 0.5)
        for buffer in (getattr(agent, "state_mean", None), getattr(agent, "state_std", None)):
            if buffer is not None:
                buffer.uniform_(0.5, 2.0)
    run = folder / name
    run.mkdir()
    script.save(run, args, SimpleNamespace(updates=3, env_steps=0), agent=agent)
    return run, agent


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["onnxruntime"] = None  # importing either now fails
import numpy as np
from policy import Policy
policy, observations = Policy(), np.load("observations.npy")
actions = policy(observations)
assert np.allclose(actions[0], policy(observations[0]), atol=1e-6)
np.save("actions.npy", actions)
"""


@pytest.mark.parametrize("name", MODULES + PIXELS)
def test_both_policies_act_as_the_agent_does(tmp_path, capsys, name):
    run, agent = make_run(tmp_path, name, "test/dot-v0" if name in PIXELS else "test/maze-v0")
    assert export.main([str(run), "--out", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    rng = np.random.default_rng(1)
    if name in PIXELS:
        observations = rng.integers(0, 256, (1000, 13, 13, 3), np.uint8)
        box, low, high = gym.spaces.Box(-1, 2, (2,)), -2, 2
    else:
        observations, box, low, high = 2 * rng.standard_normal((1000, 8), np.float32), BOX, -1, 1
    with torch.no_grad():
        wanted = agent.act(torch.from_numpy(observations), explore=False).numpy()
    assert wanted.std(0).min() > 0.1
    wanted = np.clip(box.low + (wanted + 1) / 2 * (box.high - box.low), low, high)
    assert name in PIXELS or 0 < (wanted[:, 0] == -1).mean() < 1

    session = onnxruntime.InferenceSession(tmp_path / "out" / "policy.onnx")
    made = session.run(["action"], {"observation": observations})[0]
    assert np.abs(made - wanted).max() < 1e-5
    assert np.abs(session.run(["action"], {"observation": observations[:1]})[0] - wanted[:1]).max() < 1e-5
    np.save(tmp_path / "out" / "observations.npy", observations)
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH], cwd=tmp_path / "out", check=True)
    made = np.load(tmp_path / "out" / "actions.npy")
    assert made.dtype == np.float32 and np.abs(made - wanted).max() < 1e-5


def test_contract_says_what_a_caller_needs(tmp_path, capsys):
    run, _ = make_run(tmp_path, "cal_ql_continuous")
    assert export.main([str(run), "--episodes", "2"]) == 0
    assert "over 2 episodes, seeds 0 to 1" in capsys.readouterr().out
    contract = json.loads((run / "policy" / "policy.json").read_text())
    dataset = minari.load_dataset("test/maze-v0")
    observations = [episode.observations for episode in dataset.iterate_episodes()]
    keys = [("achieved_goal", 2), ("desired_goal", 2), ("observation", 4)]  # in FlattenObservation's order
    names = [entry["entry"] for entry in contract["observation"]]
    assert names == [f"{key}[{k}]" for key, size in keys for k in range(size)]
    for key, bound in (("low_in_data", np.min), ("high_in_data", np.max)):
        entries = [entry[key] for entry in contract["observation"] if entry["entry"].startswith("observation")]
        data = np.concatenate([each["observation"] for each in observations])
        assert entries == pytest.approx(bound(data, axis=0), abs=1e-6)
    assert contract["action_box"] == {"low": BOX.low.tolist(), "high": BOX.high.tolist()}
    assert contract["action_limits"] == {"low": [-1, -1], "high": [1, 1]}
    assert contract["environment"] == "PointMaze_UMaze-v3" and contract["script"] == "cal_ql_continuous.py"
    policy = export.runner.Policy(run / "policy")
    assert policy(np.zeros((5, 8))).shape == (5, 2)
    with pytest.raises(ValueError, match=r"has shape \(7,\); the policy takes \(8,\)"):
        policy(np.zeros(7))


def test_names_of_chosen_and_of_nested_entries():
    box = gym.spaces.Box(-1, 1, (2,))
    space = gym.spaces.Dict({"b": gym.spaces.Dict({"x": box}), "a": gym.spaces.Box(-1, 1, (1, 2))})
    assert export.entry_names(space) == ["a[0, 0]", "a[0, 1]", "b.x[0]", "b.x[1]"]
    assert export.entry_names(space, ("b",)) == ["b.x[0]", "b.x[1]"]


def refused(capsys, run) -> str:
    assert export.main([str(run)]) == 2 and not (run / "policy").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_bad_input_is_refused_in_one_sentence(tmp_path, capsys, monkeypatch):
    assert "is no checkpoint" in refused(capsys, tmp_path / "missing")
    run, _ = make_run(tmp_path, "baselines.td3_bc_continuous")
    monkeypatch.setattr(export, "TOLERANCE", 0.0)  # an actor that is none of those known
    assert "does not know such an actor" in refused(capsys, run)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(minari, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    assert "cannot open test/maze-v0" in refused(capsys, run)


def test_odt_cannot_be_exported(tmp_path, capsys):
    odt = importlib.import_module("baselines.odt_continuous")
    args = odt.task_defaults("test/maze-v0")
    (tmp_path / "run").mkdir()
    odt.save(tmp_path / "run", args, SimpleNamespace(updates=3, env_steps=0), agent=odt.Agent(8, 2, args))
    assert "cannot be exported" in refused(capsys, tmp_path / "run")


def test_program_of_the_docs_runs_without_torch(tmp_path):
    """As it stands but for the number of episodes, with an agent of random weights."""
    dataset_id = "cal-ql/pick-place/narrow-v0"
    pick_place.collect(pick_place.Args(dataset_id=dataset_id, episodes=1))
    run, _ = make_run(tmp_path, "cal_ql_continuous", dataset_id)
    assert export.main([str(run)]) == 0
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    assert "range(40)" in program and 'sys.modules["torch"] = None' in program
    path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{run / 'policy'}"}
    command = [sys.executable, "-c", program.replace("range(40)", "range(2)")]
    process = subprocess.run(command, cwd=tmp_path, env=os.environ | path, capture_output=True, text=True)
    assert "score without torch: 0." in process.stdout and "over 2 episodes" in process.stdout, process.stderr
