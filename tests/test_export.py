"""tools/export.py: exported policies against the agents of the scripts, without torch, and bad input."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer

from collect import pick_place

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from tools import export  # noqa: E402

ROOT = Path(__file__).parents[1]
gym.register("test/Dot-v0", entry_point="dot_env:DotEnv", max_episode_steps=8)
# Not the environment's box of -1 to 1, and beyond it at one corner: both rescaling and clipping do something.
BOX = gym.spaces.Box(np.float32([-2, -0.5]), np.float32([0.5, 0.25]), dtype=np.float32)
# One of each kind of actor; cql, sac and the learned value have Cal-QL's.
SCRIPTS = [f"{name}_{kind}" for kind in ("continuous", "pixels") for name in ("cal_ql", "iql", "awac")]
SCRIPTS += ["td3_bc_continuous"]


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
        last = np.arange(7) == 6
        buffers.append(EpisodeBuffer(id=k, observations=observations, actions=actions, rewards=1.0 * last,
                                     terminations=~last & last, truncations=last))  # fmt: skip
    minari.create_dataset_from_buffers(dataset_id, buffers, env=env.spec, action_space=box, jpeg_encoding=False)


@pytest.fixture(scope="module", autouse=True)
def datasets_path(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        write_dataset("test/maze-v0", "PointMaze_UMaze-v3", BOX, max_episode_steps=7)
        write_dataset("test/dot-v0", "test/Dot-v0", gym.spaces.Box(-1, 2, (2,), np.float32), size=13)
        yield


def make_run(folder: Path, name: str, *flags: str):
    """A run's folder with the checkpoint of an agent of random weights, and that agent."""
    script = importlib.import_module(name)
    flags = flags or ("--env-id", "test/dot-v0" if "pixels" in name else "test/maze-v0")
    args, _ = script.parse_args([*flags, "--device", "cpu"])
    vars(args).update(dict.fromkeys(vars(args).keys() & {"actor_layers", "critic_layers"}, (16, 8)))
    agent, _ = script.make_agent(script.load_data(args)[2], args)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.normal_(0, 0.3 if "pixels" in name else 0.5)
        for buffer in (getattr(agent, "state_mean", None), getattr(agent, "state_std", None)):
            if buffer is not None:
                buffer.uniform_(0.5, 2.0)
    run = folder / f"test__{name}__1__2"
    run.mkdir()
    progress = {"updates": 3, "env_steps": 0}
    torch.save({"args": vars(args), "progress": progress, "agent": agent.state_dict()}, run / "checkpoint.pt")
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


@pytest.mark.parametrize("name", SCRIPTS)
def test_both_policies_act_as_the_agent_does(tmp_path, capsys, name):
    run, agent = make_run(tmp_path, name)
    assert export.main([str(run), "--out", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    rng = np.random.default_rng(1)
    if "pixels" in name:
        observations = rng.integers(0, 256, (1000, 13, 13, 3), np.uint8)
        box, low, high = gym.spaces.Box(-1, 2, (2,)), -2, 2
    else:
        observations, box, low, high = 2 * rng.standard_normal((1000, 8), np.float32), BOX, -1, 1
    with torch.no_grad():
        wanted = agent.act(torch.from_numpy(observations), explore=False).numpy()
    assert wanted.std(0).min() > 0.01
    wanted = np.clip(box.low + (wanted + 1) / 2 * (box.high - box.low), low, high)
    assert "pixels" in name or 0 < (wanted[:, 0] == -1).mean() < 1

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
    observations = [episode.observations for episode in minari.load_dataset("test/maze-v0")]
    keys = [("achieved_goal", 2), ("desired_goal", 2), ("observation", 4)]  # in the order of the data's space
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
    assert export.entry_names(space, ("b", "a")) == ["b.x[0]", "b.x[1]", "a[0, 0]", "a[0, 1]"]


def test_bad_input_is_refused_in_one_sentence(tmp_path, capsys, monkeypatch):
    def refused(run: Path, *flags: str) -> str:
        assert export.main([str(run), *flags]) == 2 and not (run / "policy").exists()
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line

    assert "add --script" in refused(tmp_path / "missing")
    assert "checkpoint.pt" in refused(tmp_path / "missing", "--script", "cal_ql_continuous")
    run, _ = make_run(tmp_path, "td3_bc_continuous")
    state = torch.load(run / "checkpoint.pt")
    torch.save(state | {"agent": {}}, run / "checkpoint.pt")
    assert "cannot be exported by td3_bc_continuous" in refused(run)
    torch.save(state, run / "checkpoint.pt")
    assert "cannot be exported by odt_continuous" in refused(make_run(tmp_path, "odt_continuous")[0])
    monkeypatch.setattr(export, "TOLERANCE", 0.0)  # an actor that is none of those known
    assert "does not know such an actor" in refused(run)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr(minari, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    assert "cannot use test/maze-v0" in refused(run)


def test_program_of_the_docs_runs_without_torch(tmp_path):
    """As it stands but for the number of episodes, with an agent of random weights."""
    pick_place.collect(pick_place.Args(episodes=3))
    run, _ = make_run(tmp_path, "cal_ql_continuous", "--env-id", "pick-place")
    assert export.main([str(run)]) == 0
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    assert "range(40)" in program and 'sys.modules["torch"] = None' in program
    path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{run / 'policy'}"}
    command = [sys.executable, "-c", program.replace("range(40)", "range(2)")]
    process = subprocess.run(command, cwd=tmp_path, env=os.environ | path, capture_output=True, text=True)
    assert "score without torch: 0." in process.stdout and "over 2 episodes" in process.stdout, process.stderr
