"""tools/diagnose.py: the faults that it is there to find, each in a dataset that has it and in one that has not."""

from types import SimpleNamespace

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer

pytest.importorskip("matplotlib").use("Agg")

from collect import ant_maze  # noqa: E402
from tools import diagnose  # noqa: E402


class Line(gym.Env):
    """A point on a line; `spread` is the range of its starts."""

    observation_space, action_space = gym.spaces.Box(-9, 9, (2,)), gym.spaces.Box(-1, 1, (2,))

    def __init__(self, spread: float = 1.0):
        self.spread = spread

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-self.spread, self.spread, 2).astype(np.float32)
        return self.state, {}

    def step(self, action):
        self.state = (self.state + 0.1 * np.asarray(action)).clip(-9, 9).astype(np.float32)
        return self.state, 0.0, False, False, {}


gym.register("test/Line-v0", entry_point=f"{__name__}:Line", max_episode_steps=30)


def write(dataset_id: str, env: gym.Env, episodes: list[dict], box: gym.spaces.Box | None = None) -> None:
    """Each episode's `actions` are played; its other entries are kept, where they are not the usual ones."""
    buffers = []
    for k, episode in enumerate(episodes):
        observations = [env.reset(seed=k)[0]]
        observations += [env.step(action)[0] for action in episode["actions"]]
        if isinstance(observations[0], dict):
            observations = {key: np.array([each[key] for each in observations]) for key in observations[0]}
        never = [False] * len(episode["actions"])
        usual = {"rewards": np.zeros(len(never)), "terminations": never, "truncations": [*never[1:], True]}
        buffers.append(EpisodeBuffer(id=k, observations=observations, **usual | episode))
    minari.create_dataset_from_buffers(dataset_id, buffers, env=env.spec, action_space=box)


@pytest.fixture(autouse=True)
def datasets_path(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path


def look(datasets_path, name: str, updates: int = 0) -> dict[str, diagnose.Finding]:
    """The findings by name; the printed table and the picture are there too."""
    args = diagnose.Args(name, updates=updates, out=datasets_path / "picture.png")
    found = {each.name: each for each in diagnose.diagnose(args)}
    assert (datasets_path / "picture.png").stat().st_size > 10_000
    return found


def test_both_faults_of_the_first_antmaze_data(datasets_path, monkeypatch):
    """Actions in a fifth of a box of -1 to 1, and starts without noise: neither was told by a score."""
    rng, env = np.random.default_rng(0), gym.make(ant_maze.make_spec("umaze"))
    episodes = [{"actions": 0.2 * rng.uniform(-1, 1, (40, 8)).astype(np.float32)} for _ in range(2)]
    write("D4RL/antmaze/umaze-v1", env, episodes, gym.spaces.Box(-1, 1, (8,), np.float32))
    make_env = diagnose.script.make_env

    def make_env_without_noise(*args):
        env = make_env(*args)
        env.unwrapped.ant_env._reset_noise_scale = 0.0
        return env

    monkeypatch.setattr(diagnose.script, "make_env", make_env_without_noise)
    found = look(datasets_path, "antmaze-umaze")
    box, starts = found["action box used"], found["starts of the environment"]
    assert box.look and 0.18 <= float(box.value.rstrip("%")) / 100 <= 0.2 and "smaller box" in box.meaning
    assert starts.look and starts.value.startswith("differ by 0 over 5 seeds") and "one episode" in starts.meaning

    monkeypatch.undo()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(datasets_path / "cured"))
    write("D4RL/antmaze/umaze-v1", env, episodes, gym.spaces.Box(-0.2, 0.2, (8,), np.float32))
    found = look(datasets_path, "antmaze-umaze")
    assert not found["action box used"].look and not found["starts of the environment"].look
    assert found["successes"].look  # none in 40 random steps


def make_episodes(count: int = 6, steps: int = 30, **entries) -> list[dict]:
    rng = np.random.default_rng(0)
    return [{"actions": rng.uniform(-1, 1, (steps, 2)).astype(np.float32), **entries} for _ in range(count)]


def test_healthy_data_raise_nothing(datasets_path):
    episodes = make_episodes()
    for episode in episodes[:3]:  # success ends these, at the longest length too
        last = np.arange(30) == 29
        episode |= {"rewards": last.astype(float), "terminations": last, "truncations": [False] * 30}
    write("test/line-v0", gym.make("test/Line-v0"), episodes)
    found = look(datasets_path, "test/line-v0")
    assert [name for name, each in found.items() if each.look] == []
    assert found["successes"].value == "3 of 6 (50%)" and found["go on after success"].value == "0 of 6"
    assert "Broad" in found["coverage"].meaning or float(found["coverage"].value.split("%")[0]) < 25


def test_timeouts_marked_as_terminations(datasets_path):
    last = [False] * 29 + [True]
    write("test/line-v0", gym.make("test/Line-v0"), make_episodes(terminations=last, truncations=[False] * 30))
    found = look(datasets_path, "test/line-v0")["time-outs as terminations"]
    assert found.look and found.value == "6 of 6" and "after 30 steps" in found.meaning


def test_episodes_that_go_on_after_success(datasets_path):
    infos = {"success": np.arange(31) > 10}
    write("test/line-v0", gym.make("test/Line-v0"), make_episodes(infos=infos))
    found = look(datasets_path, "test/line-v0")
    assert found["go on after success"].look and found["go on after success"].value == "6 of 6"
    assert found["successes"].value == "6 of 6 (100%)"


def test_clipped_actions_and_equal_starts(datasets_path):
    write("test/line-v0", gym.make("test/Line-v0", spread=0.0), make_episodes(), gym.spaces.Box(-0.9, 0.9, (2,)))
    found = look(datasets_path, "test/line-v0")
    share = float(found["actions clipped"].value.rstrip("%"))
    assert found["actions clipped"].look and 5 < share < 20
    assert found["starts of the environment"].look


def test_narrow_and_broad_data_are_told_apart(datasets_path):
    """A controller that always does the same at a state, against random actions."""
    env, steady = gym.make("test/Line-v0"), []
    for k in range(20):
        state, actions = env.reset(seed=k)[0], []
        for _ in range(30):
            actions.append(np.float32([0.9 * np.sin(3 * state[0]), 0.9 * np.cos(3 * state[1])]))
            state = env.step(actions[-1])[0]
        steady.append({"actions": np.array(actions)})
    write("test/steady-v0", env, steady)
    write("test/random-v0", env, make_episodes(20))
    shares = {}
    for name in ("steady", "random"):
        found = look(datasets_path, f"test/{name}-v0")["coverage"]
        shares[name] = float(found.value.split("differ ")[1].split("%")[0])
    assert shares["steady"] < 40 and 80 < shares["random"] < 120


def test_kitchen_counts_the_tasks_done(datasets_path, capsys):
    args = diagnose.script.task_defaults("kitchen-mixed")
    rewards = [[0, 0], [0, 1, 1], [0, 2, 1], [1, 2, 3]]
    episodes = [diagnose.script.Episode(None, None, np.float32(each), None) for each in rewards]
    case = diagnose.Case(diagnose.script.find_task("kitchen-mixed"), args, None, episodes, [], 0.0)
    assert diagnose.describe_episodes(case)[-1].value == "0: 1, 1: 1, 2: 1, 3: 1, 4: 0"

    space, buffers = gym.spaces.Dict({"observation": gym.spaces.Box(-9, 9, (59,), np.float64)}), []
    for k, each in enumerate(rewards):
        states, never = {"observation": np.zeros((len(each) + 1, 59))}, [False] * len(each)
        buffers.append(EpisodeBuffer(id=k, observations=states, actions=np.zeros((len(each), 9), np.float32),
                                     rewards=np.float64(each), terminations=never, truncations=never))  # fmt: skip
    box = gym.spaces.Box(-1, 1, (9,), np.float32)
    dataset = minari.create_dataset_from_buffers("test/kitchen-v0", buffers, observation_space=space, action_space=box)
    env = SimpleNamespace(observation_space=gym.spaces.Box(-9, 9, (59,)))
    assert len(diagnose.script.load_episodes([dataset], case.task, env)) == 4
    assert "episodes with 0, 1, ... tasks done at once: 1 1 1 1" in capsys.readouterr().out


def test_cql_begins_at_the_mean_return_and_tells_what_the_scripts_measure(datasets_path, monkeypatch):
    for name in ("actor_layers", "critic_layers"):
        monkeypatch.setitem(diagnose.FAST, name, (32, 32))
    episodes = make_episodes(rewards=np.linspace(0, 1, 30))
    write("test/line-v0", gym.make("test/Line-v0"), episodes)
    case = diagnose.load("test/line-v0")
    agent, buffer, args = diagnose.make_agent(case, 0)
    before = [parameter.clone() for parameter in agent.critic.parameters()]
    rows = diagnose.run_cql(agent, buffer, args, 20)
    mean = buffer.columns.mc_returns[:180].mean().item()
    assert rows[0]["mean_q"] == pytest.approx(mean, abs=0.05) and [row["updates"] for row in rows] == list(
        range(0, 21, 2)
    )
    assert any(not torch.equal(old, new) for old, new in zip(before, agent.critic.parameters(), strict=True))
    wanted = diagnose.script.probe(agent, buffer.sample(4000), args)
    assert rows[-1]["bound_rate"] == pytest.approx(wanted["bound_rate"], abs=0.1)
    found = look(datasets_path, "test/line-v0", updates=5)
    assert found["bound rate"].value and found["will Cal-QL help?"].value in ("yes", "some", "little")


@pytest.mark.parametrize("rate, mean_q, answer, word", [
    (0.9, -20.0, "yes", "falls below"),
    (0.9, -10.0, "some", "stays at"),
    (0.5, -20.0, "some", "falls below"),
    (0.1, 5.0, "little", "rises above"),
])  # fmt: skip
def test_answer(rate, mean_q, answer, word):
    rows = [{"mean_q": q, "mean_mc_return": -10.0, "bound_rate": b} for q, b in ((-10.0, 0.5), (mean_q, rate))]
    found = {each.name: each for each in diagnose.describe_cql(rows, torch.tensor([-15.0, -5.0]))}
    assert found["will Cal-QL help?"].value == answer and word in found["mean Q"].meaning
    assert found["bound rate"].value == f"0.50 to {rate:.2f}"


def test_main_prints_one_table(datasets_path, capsys):
    write("test/line-v0", gym.make("test/Line-v0", spread=0.0), make_episodes())
    out = datasets_path / "new" / "picture.png"
    assert diagnose.main(["test/line-v0", "--updates", "0", "--out", str(out)]) == 0 and out.exists()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert lines[0] == "| | value | what it means |" and all(line.count("|") == 4 for line in lines)
    (line,) = [line for line in lines if line.startswith("| starts of the environment")]
    assert "**look**" in line


@pytest.mark.parametrize("flags", [
    ["nonsense"],
    ["test/missing-v0"],
    ["test/dot-v0"],
    ["test/dot-v0", "--updates", "-1"],
    ["test/dot-v0", "--out", "table.md"],
])  # fmt: skip
def test_bad_input_is_refused_in_one_sentence(datasets_path, capsys, monkeypatch, flags):
    frames = gym.spaces.Box(0, 255, (12, 12, 3), np.uint8)
    buffer = EpisodeBuffer(id=0, observations=np.zeros((3, 12, 12, 3), np.uint8), actions=np.zeros((2, 2), np.float32),
                           rewards=[0, 1], terminations=[False, True], truncations=[False, False])  # fmt: skip
    minari.create_dataset_from_buffers("test/dot-v0", [buffer], observation_space=frames, jpeg_encoding=False,
                                       action_space=gym.spaces.Box(-1, 1, (2,), np.float32))  # fmt: skip
    load_dataset = minari.load_dataset
    monkeypatch.setattr(minari, "load_dataset", lambda name, download: load_dataset(name))  # no network
    assert diagnose.main(flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
