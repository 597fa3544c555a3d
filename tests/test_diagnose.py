"""tools/diagnose.py: the faults that it is there to find, each in a dataset that has it and in one that has not."""

import shutil
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer

pytest.importorskip("matplotlib").use("Agg")

from tools import diagnose  # noqa: E402


class Line(gym.Env):
    """A point on a line; `spread` is the range of its starts."""

    observation_space, action_space = gym.spaces.Box(-9, 9, (2,)), gym.spaces.Box(-1, 1, (2,))

    def __init__(self, spread: float = 1.0, render_mode=None):
        self.spread = spread

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-self.spread, self.spread, 2).astype(np.float32)
        return self.state, {}

    def step(self, action):
        self.state = (self.state + 0.1 * np.asarray(action)).clip(-9, 9).astype(np.float32)
        return self.state, 0.0, False, False, {}


gym.register("test/Line-v0", entry_point=f"{__name__}:Line", max_episode_steps=30)


def write(episodes: list[dict], box: gym.spaces.Box | None = None, dataset_id: str = "test/line-v0", **kwargs):
    """Each episode's `actions` are played; its other entries are kept, where they are not the usual ones."""
    env, buffers = gym.make("test/Line-v0", **kwargs), []
    for k, episode in enumerate(episodes):
        observations = [env.reset(seed=k)[0]]
        observations += [env.step(action)[0] for action in episode["actions"]]
        first = np.arange(len(episode["actions"])) == 0
        usual = {
            "rewards": -0.1 - 0.1 * (np.arange(len(first)) % 3),
            "terminations": first & ~first,
            "truncations": first[::-1],
        }
        buffers.append(EpisodeBuffer(id=k, observations=observations, **usual | episode))
    shutil.rmtree(minari.storage.get_dataset_path(dataset_id), ignore_errors=True)
    return minari.create_dataset_from_buffers(dataset_id, buffers, env=env.spec, action_space=box)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path


def look(folder, *flags: str, name: str = "test/line-v0", updates: int = 0) -> dict[str, diagnose.Finding]:
    """The findings by name; the picture is there too."""
    args = diagnose.Args(name, updates=updates, out=folder / "new" / "pictures")
    found, path = diagnose.diagnose(args, list(flags))
    assert path == folder / "new" / "pictures" / f"diagnosis-{name.replace('/', '-')}.png"
    assert path.stat().st_size > 10_000
    return {each.name: each for each in found}


def make_episodes(count: int = 6, steps: int = 30, **entries) -> list[dict]:
    rng = np.random.default_rng(0)
    return [{"actions": rng.uniform(-1, 1, (steps, 2)).astype(np.float32), **entries} for _ in range(count)]


def test_actions_in_a_fifth_of_their_box_switch_the_lagrange_version_off(folder):
    episodes = [{"actions": 0.2 * each["actions"]} for each in make_episodes()]
    write(episodes, gym.spaces.Box(-1, 1, (2,)))
    found = look(folder, "--cql-lagrange")["action box used"]
    assert found.look and 0.18 <= float(found.value.split("%")[0]) / 100 <= 0.2 and found.value.count("%") == 1 + 2
    assert "multiplier goes to 0" in found.meaning and "--no-cql-lagrange" in found.meaning
    fixed = look(folder, "--no-cql-lagrange")["action box used"]
    assert not fixed.look and fixed.value == found.value and "fixed weight" in fixed.meaning
    write(episodes, gym.spaces.Box(-0.2, 0.2, (2,)))
    assert not look(folder, "--cql-lagrange")["action box used"].look


def test_healthy_data_raise_nothing(folder):
    episodes, last = make_episodes(), np.arange(30) == 29
    for episode in episodes[:3]:  # success ends these, at the longest length too
        episode |= {"rewards": 1.0 * last, "terminations": last, "truncations": last & ~last}
    for episode in episodes[3:]:
        episode |= {"rewards": 0.0 * last}
    write(episodes)
    found = look(folder)
    assert [each for each in found.values() if each.look] == []
    assert found["successes"].value == "3 of 6 (50%)" and found["go on after success"].value.startswith("0 of 6")
    assert found["steps missing"].value == "0" and found["box wider than the environment's"].value[0] == "0"


def test_faults_of_episodes(folder):
    """Time-outs marked as terminations, success that ends nothing, and steps that the file has lost."""
    last, infos = np.arange(30) == 29, {"success": np.arange(31) > 10}
    dataset = write(make_episodes(terminations=last, truncations=last & ~last))
    found = look(folder)["time-outs as terminations"]
    assert found.look and found.value == "6 of 6" and "after 30 steps" in found.meaning
    dataset = write(make_episodes(infos=infos))
    path = Path(dataset.spec.data_path) / "metadata.json"
    path.write_text(path.read_text().replace('"total_steps": 180', '"total_steps": 187'))
    found = look(folder)
    assert found["go on after success"].look and found["go on after success"].value.startswith("6 of 6")
    assert found["successes"].value == "6 of 6 (100%)"
    assert found["steps missing"].look and found["steps missing"].value == "7"


def test_faults_of_actions_and_starts(folder):
    episodes = make_episodes()
    for episode in episodes:
        episode["actions"][:10] = 1.0  # a third at the edge
    write(episodes, gym.spaces.Box(-0.95, 1.0, (2,)), spread=0.0)
    found = look(folder)
    edge = found["actions at the edge"]
    assert edge.look and 33 < float(edge.value.rstrip("%")) < 40 and "log-densities" in edge.meaning
    assert found["starts of the environment"].look and not found["actions clipped"].look
    write(make_episodes(), gym.spaces.Box(np.float32([-0.7, -2]), np.float32([1.5, 1])))
    found = look(folder)
    assert found["actions clipped"].look and 5 < float(found["actions clipped"].value.rstrip("%")) < 20
    wider = found["box wider than the environment's"]
    assert wider.look and wider.value == "2 of 2 dimensions" and not found["actions at the edge"].look


def test_narrow_and_broad_data_are_told_apart(folder):
    """A controller that always does the same at a state, against random actions."""
    env, steady, shares = gym.make("test/Line-v0"), [], {}
    for k in range(20):
        state, actions = env.reset(seed=k)[0], []
        for _ in range(30):
            actions.append(np.float32([0.9 * np.sin(3 * state[0]), 0.9 * np.cos(3 * state[1])]))
            state = env.step(actions[-1])[0]
        steady.append({"actions": np.array(actions)})
    for name, episodes in (("test/steady-v0", steady), ("test/random-v0", make_episodes(20))):
        write(episodes, dataset_id=name)
        shares[name] = float(look(folder, name=name)["coverage"].value.split("differ ")[1].split("%")[0])
    assert shares["test/steady-v0"] < 40 and 80 < shares["test/random-v0"] < 120


def test_kitchen_counts_the_tasks_done():
    episodes = [diagnose.script.Episode(None, None, np.float32(each), None) for each in ([0], [0, 1], [2, 1], [1, 3])]
    case = diagnose.Case(None, diagnose.script.TASKS["kitchen-mixed"], None, "", [], 0, episodes, [])
    assert diagnose.describe_episodes(case)[-1].value == "0: 1, 1: 1, 2: 1, 3: 1, 4: 0"


def test_cql_begins_at_the_mean_return_and_tells_what_the_scripts_measure(folder):
    write(make_episodes(20, rewards=np.linspace(0, 1, 30)))
    case = diagnose.load("test/line-v0", [])
    agent, rows = diagnose.run_cql(case, 20, 0)
    mean = np.concatenate([episode.mc_returns for episode in case.offline]).mean()
    assert rows[0]["mean_q"] == pytest.approx(mean, abs=0.05) != rows[-1]["mean_q"]
    assert [row["updates"] for row in rows] == list(range(0, 21, 2))
    states, actions = (torch.cat([torch.from_numpy(each[k]) for each in case.offline]) for k in (0, 1))
    with torch.no_grad():
        error, density = (agent.act(states, False) - actions).abs().mean(), agent.actor.sample(states, 5)[1].mean()
    assert rows[-1]["trained on"] == pytest.approx(error.item(), abs=0.05) and rows[-1]["held out"] > 0
    assert rows[-1]["log_density"] == pytest.approx(density.item(), abs=0.1)
    assert "uniform ones -1.4" in {each.name: each.value for each in diagnose.describe_cql(rows, case)}["log-densities"]


@pytest.mark.parametrize("rate, mean_q, answer, word", [
    (0.9, -20.0, "yes", "falls below"),
    (0.9, -10.0, "some", "stays at"),
    (0.5, -20.0, "some", "falls below"),
    (0.1, 5.0, "little", "rises above"),
])  # fmt: skip
def test_answer(rate, mean_q, answer, word):
    rows = [{"mean_q": q, "mean_mc_return": -10.0, "bound_rate": b, "log_density": 0.0, "trained on": 0.1}
            for q, b in ((-10.0, 0.5), (mean_q, rate))]  # fmt: skip
    batch = diagnose.script.Batch(None, np.zeros((2, 1)), None, None, None, np.float32([-15.0, -5.0]))
    case = diagnose.Case(diagnose.script.Args(), None, None, "", [], 0, [], [batch])
    found = {each.name: each for each in diagnose.describe_cql(rows, case)}
    assert found["will Cal-QL help?"].value == answer and word in found["mean Q"].meaning
    assert found["bound rate"].value == f"0.50 to {rate:.2f}"


def test_main_prints_one_table_or_one_sentence(folder, capsys, monkeypatch):
    write(make_episodes(), spread=0.0)
    out = ["--out", str(folder / "pictures")]
    assert diagnose.main(["test/line-v0", "--updates", "1", *out, "--gamma", "0.9"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert lines[0] == "| | value | what it means |" and all(line.count("|") == 4 for line in lines)
    (line,) = [line for line in lines if line.startswith("| starts of the environment")]
    assert "**look**" in line
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    load_dataset = minari.load_dataset
    monkeypatch.setattr(minari, "load_dataset", lambda name, download=False: load_dataset(name))  # no network
    for flags in (["nonsense"], ["test/missing-v0"], ["test/line-v0", "--updates", "-1"]):
        assert diagnose.main([*flags, *out]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
    written = write(make_episodes()[:1], dataset_id="test/none-v0")
    path = Path(written.spec.data_path) / "metadata.json"
    path.write_text(path.read_text().replace("test/Line-v0", "Gone-v0"))
    assert look(folder, name="test/none-v0")["starts of the environment"].look
