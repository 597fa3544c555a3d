"""From Minari's episodes and environments to the paper's tasks, on tiny datasets in the hosted ones' schemas."""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import gymnasium_robotics
import h5py
import minari
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium_robotics.envs.franka_kitchen.kitchen_env import OBS_ELEMENT_GOALS, OBS_ELEMENT_INDICES
from minari.data_collector import EpisodeBuffer

import cal_ql_continuous as script
from cal_ql_continuous import TASKS, Args, InputError, ReplayBuffer, load_episodes, make_env, open_dataset
from collect import pick_place, point_maze

gym.register_envs(gymnasium_robotics)
rng = np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def datasets_path(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("minari")
        patch.setenv("MINARI_DATASETS_PATH", str(path))
        yield path


def write_dataset(dataset_id: str, episodes: list[dict], env: EnvSpec, **kwargs) -> None:
    """Writes episodes of observations (T+1), actions, rewards and perhaps infos; nothing terminates, as hosted."""
    buffers = []
    for k, episode in enumerate(episodes):
        never = [False] * len(episode["rewards"])
        buffers.append(EpisodeBuffer(id=k, terminations=never, truncations=never[1:] + [True], **episode))
    minari.create_dataset_from_buffers(dataset_id, buffers, env=env, **kwargs)


def make_spec(env_id: str, max_episode_steps: int | None = None, **kwargs) -> EnvSpec:
    spec = copy.deepcopy(gym.spec(env_id))
    spec.kwargs |= kwargs
    spec.max_episode_steps = max_episode_steps or spec.max_episode_steps
    return spec


def open_task(name: str):
    """The task's datasets, environment and settings, put together as train() does it."""
    task, args = script.find_task(name), script.task_defaults(name)
    args.buffer_size = 50
    datasets = [open_dataset(dataset_id) for dataset_id in task.datasets]
    return task, datasets, make_env(datasets[-1], task, args.episode_length), args


def play(env: gym.Env, moves: dict):
    """An episode of zeros; before its n-th step, moves[n] is called with the simulation. Rewards, ends, best score."""
    rewards, ends, scores, over = [], [], [], False
    env.reset(seed=1)
    while not over:
        moves.get(len(rewards), lambda simulation: None)(env.unwrapped)
        _, reward, terminated, truncated, info = env.step(np.zeros(env.action_space.shape, np.float32))
        rewards.append(reward)
        ends.append(terminated)
        scores.append(info["score"])
        over = terminated or truncated
    return rewards, ends, max(scores)


def check_starts(env: gym.Env) -> None:
    """Two seeds start differently, and one seed repeats: else an evaluation plays one and the same episode."""
    first, other, again = (env.reset(seed=seed)[0] for seed in (1, 2, 1))
    assert np.array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    zeros = np.zeros(env.action_space.shape, np.float32)
    assert not np.array_equal(env.step(zeros)[0], first)  # it moves on from there


# ---- AntMaze ---------------------------------------------------------------------------------------------------------

# Environment id, position (x, y) of start and goal. A cell is 4 m wide, the maze's centre is at (0, 0).
ANTMAZE = {
    "antmaze-umaze": ("AntMaze_UMaze-v4", (-4, -4), (-4, 4)),
    "antmaze-umaze-diverse": ("AntMaze_UMaze-v4", (-4, 4), (-4, -4)),
    "antmaze-medium-play": ("AntMaze_Medium-v4", (-10, 10), (10, -10)),
    "antmaze-medium-diverse": ("AntMaze_Medium_Diverse_GR-v4", (-10, 10), (6, -10)),
    "antmaze-large-play": ("AntMaze_Large-v4", (-18, 12), (14, -12)),
    "antmaze-large-diverse": ("AntMaze_Large_Diverse_GR-v4", (-18, 12), (14, -12)),
}
# Which transitions arrive at the goal, and their returns with gamma 0.99, scale 10 and bias -5, by hand.
ARRIVALS = {
    (0, 0, 0, 1): [-9.999005, -5.0495, -0.05, 5],
    (0, 1, 1, 0, 1): [-0.05, 5, 5, -0.05, 5],
    (0, 0, 0): [-500, -500, -500],
    (1, 0): [5, -500],
}


def make_ant_episode(goal: tuple[int, int], arrivals: tuple[int, ...]) -> dict:
    """The data's own goal, rewards and success are everywhere wrong: all of that has to be made anew."""
    count = len(arrivals) + 1
    angles = rng.uniform(0, 2 * np.pi, count)
    distances = np.where([1, *arrivals], 0.449, 0.451)  # it starts within the goal, which is not an arrival
    positions = np.array(goal) + distances[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
    others = dict(desired_goal=np.full((count, 2), 99.0), observation=rng.normal(size=(count, 27)))
    return dict(
        observations=dict(achieved_goal=positions) | others,
        actions=rng.uniform(-1, 1, (count - 1, 8)).astype(np.float32),
        rewards=1.0 - np.array(arrivals),
        infos={"success": 1 - np.array([1, *arrivals])},
    )


@pytest.fixture(scope="module", params=ANTMAZE)
def ant(request):
    name = request.param
    env_id, start, goal = ANTMAZE[name]
    maze = gym.spec(env_id).kwargs["maze_map"]
    spec = make_spec(env_id, 70, maze_map=maze, continuing_task=True, reset_target=False)
    mirrored = make_spec(env_id, maze_map=[row[::-1] for row in maze])  # Minari's own evaluation maps are so for umaze
    episodes = [make_ant_episode(goal, arrivals) for arrivals in ARRIVALS]
    write_dataset(TASKS[name].datasets[0], episodes, spec, eval_env=mirrored)
    task, datasets, env, args = open_task(name)
    parts = dict(task=task, datasets=datasets, env=env, args=args, maze=maze, start=start, goal=goal)
    yield SimpleNamespace(**parts, recorded=episodes)
    env.close()


def test_antmaze_is_relabelled_to_one_goal(ant):
    episodes = load_episodes(ant.datasets, ant.task, ant.env)
    for episode, arrivals, recorded in zip(episodes, ARRIVALS, ant.recorded, strict=True):
        # The data goes on after an arrival; what arrives is the transition whose next position is at the goal.
        assert episode.rewards.tolist() == list(arrivals)
        assert episode.terminations.tolist() == [bool(arrival) for arrival in arrivals]
        parts = recorded["observations"]
        expected = np.concatenate([parts["achieved_goal"], parts["observation"]], axis=1, dtype=np.float32)
        assert episode.observations.shape[1] == 29
        assert np.array_equal(episode.observations, expected)
    buffer = ReplayBuffer(episodes, ant.args, True, torch.device("cpu"))
    expected = sum(ARRIVALS.values(), [])
    assert buffer.columns.mc_returns[: len(expected)].tolist() == pytest.approx(expected, rel=1e-6)


def test_antmaze_environment(ant):
    env = ant.env
    walls = [[int(cell == 1) for cell in row] for row in env.unwrapped.maze.maze_map]
    assert walls == [[int(cell == 1) for cell in row] for row in ant.maze]  # the data's own, not the mirrored one
    letters = sorted(str(cell) for row in env.unwrapped.maze.maze_map for cell in row if cell not in (0, 1))
    assert letters == ["g", "r"]
    for seed in range(5):
        state = env.reset(seed=seed)[0]
        assert np.array_equal(env.unwrapped.reset_pos, ant.start) and np.array_equal(env.unwrapped.goal, ant.goal)
        assert state.shape == (29,) and state.dtype == np.float32
        assert state[:2] == pytest.approx(ant.start, abs=0.11)  # the ant's own reset noise is 0.1
    check_starts(env)
    assert env.spec.max_episode_steps == (ant.args.episode_length or 70)

    def arrive(simulation):
        simulation.data.qpos[:2] = ant.goal

    assert play(env, {2: arrive}) == ([0, 0, 1], [False, False, True], 1.0)


# ---- Adroit ----------------------------------------------------------------------------------------------------------

ADROIT = {"pen": (45, 24, 100), "door": (39, 28, 200), "relocate": (39, 30, 200)}  # state, action, time limit


def make_adroit_episode(success: list[int], name: str = "door") -> dict:
    """The infos' entries for success, one more than transitions; dense rewards that must not survive."""
    count, (states, actions, _) = len(success), ADROIT[name]
    return dict(
        observations=rng.normal(size=(count, states)),
        actions=rng.uniform(-1, 1, (count - 1, actions)).astype(np.float32),
        rewards=np.full(count - 1, 7.0),
        infos={"success": np.array(success, bool)},
    )


@pytest.fixture(scope="module")
def door():
    # The hosted data's time limit is not the task's, which has 200 steps.
    spec = make_spec("AdroitHandDoor-v1", 300, reward_type="dense")
    human = [make_adroit_episode(success) for success in ([0, 0, 1, 0, 1, 0, 0], [1, 0, 0, 0])]
    cloned = [make_adroit_episode(success) for success in ([0, 0, 0], [0, 0, 0, 1])]
    human[0]["actions"][[0, 1, 3], [5, 0, 27]] = 1.2, -1.5, 1.001
    write_dataset("D4RL/door/human-v2", human, spec)
    write_dataset("D4RL/door/cloned-v2", cloned, spec)
    task, datasets, env, args = open_task("door-binary")
    yield SimpleNamespace(task=task, datasets=datasets, env=env, args=args, human=human, cloned=cloned)
    env.close()


def test_adroit_keeps_what_succeeds_up_to_the_last_success(door, capsys):
    human, cloned = load_episodes(door.datasets, door.task, door.env)  # one episode of each survives
    assert human.rewards.tolist() == [0, 1, 0, 1]  # step t succeeded if the info's entry t + 1 says so
    assert human.terminations.tolist() == [False, True, False, True]
    assert np.array_equal(human.observations, door.human[0]["observations"][:5].astype(np.float32))
    np.testing.assert_allclose(human.actions, door.human[0]["actions"][:4].clip(-0.99999, 0.99999), atol=1e-7)
    assert cloned.rewards.tolist() == [0, 0, 1]
    assert np.array_equal(cloned.observations, door.cloned[1]["observations"].astype(np.float32))
    assert "data: 2 episodes, 2 with reward > 0" in capsys.readouterr().out


def test_adroit_without_any_success_is_refused(door):
    write_dataset("test/failures-v0", [make_adroit_episode([1, 0, 0])], make_spec("AdroitHandDoor-v1"))
    with pytest.raises(InputError, match="0 usable episodes"):
        load_episodes([open_dataset("test/failures-v0")], door.task, door.env)


def test_adroit_environment_is_binary(door):
    def push_open(simulation):
        simulation.data.qpos[simulation.door_hinge_addrs] = 1.5

    assert play(door.env, {2: push_open}) == ([0, 0, 1], [False, False, True], 1.0)


@pytest.mark.parametrize("name", ADROIT)
def test_adroit_starts_and_time_limits(name):
    spec = make_spec(f"AdroitHand{name.capitalize()}-v1", 300)
    for which in ("human", "cloned"):
        if not minari.storage.get_dataset_path(f"D4RL/{name}/{which}-v2").exists():
            write_dataset(f"D4RL/{name}/{which}-v2", [make_adroit_episode([0, 1], name)], spec)
    _, _, env, _ = open_task(f"{name}-binary")
    assert env.spec.max_episode_steps == ADROIT[name][2]
    check_starts(env)
    env.close()


# ---- Kitchen ---------------------------------------------------------------------------------------------------------

KITCHEN = {
    "kitchen-complete": ["microwave", "kettle", "light switch", "slide cabinet"],
    "kitchen-mixed": ["microwave", "kettle", "bottom burner", "light switch"],
}


@pytest.fixture(scope="module", params=KITCHEN)
def kitchen(request):
    name, goals = request.param, KITCHEN[request.param]
    # The data's own environment forgets what is done, and ends when all is; the task's does neither.
    spec = make_spec("FrankaKitchen-v1", 450, tasks_to_complete=goals)
    positions = {goal: rng.normal(size=(5, len(OBS_ELEMENT_GOALS[goal]))) for goal in goals}
    observations = dict(achieved_goal=positions, desired_goal=positions, observation=rng.normal(size=(5, 59)))
    episode = dict(observations=observations, actions=rng.uniform(-1, 1, (4, 9)), rewards=[0.0, 1.0, 2.0, 1.0])
    write_dataset(TASKS[name].datasets[0], [episode], spec)
    task, datasets, env, args = open_task(name)
    yield SimpleNamespace(task=task, datasets=datasets, env=env, goals=goals, states=observations["observation"])
    env.close()


def test_kitchen_data_is_taken_as_it_is(kitchen):
    (episode,) = load_episodes(kitchen.datasets, kitchen.task, kitchen.env)
    assert episode.rewards.tolist() == [0, 1, 2, 1]  # how many of the tasks are done right now
    assert not episode.terminations.any()
    assert np.array_equal(episode.observations, kitchen.states.astype(np.float32))  # 59 entries and no goals


def test_kitchen_environment(kitchen):
    assert set(kitchen.env.unwrapped.goal) == set(kitchen.goals)
    assert kitchen.env.spec.max_episode_steps == 280
    first, last = "microwave", kitchen.goals[-1]

    def put(*tasks):
        def move(simulation):
            for task in tasks:
                simulation.data.qpos[OBS_ELEMENT_INDICES[task]] = OBS_ELEMENT_GOALS[task]

        return move

    def shut(simulation):
        simulation.data.qpos[OBS_ELEMENT_INDICES[first]] = 0

    env = make_env(kitchen.datasets[0], kitchen.task, 6)
    check_starts(env)
    rewards, ends, score = play(env, {1: put(first), 2: put(first, last), 3: shut})
    assert rewards[:4] == [0, 1, 2, 1]  # counts what is done now ...
    assert score == 2 / 4  # ... while the score counts what was ever done
    assert len(rewards) == 6 and not any(ends)
    rewards, ends, score = play(env, {1: put(*kitchen.goals)})
    assert rewards[1] == 4 and score == 1 and len(rewards) == 6 and not any(ends)
    assert play(env, {})[2] == 0  # the environment's list of what was done is cleared
    env.close()


# ---- Any other dataset, and the box of its actions -------------------------------------------------------------------


class Toy(gym.Env):
    """Nested observations, an action box of its own, reward 1 a step, never an end; keeps the actions it is given."""

    observation_space = gym.spaces.Dict(
        {
            "z": gym.spaces.Box(-9, 9, (2, 3), np.float64),
            "a": gym.spaces.Dict({"y": gym.spaces.Box(-9, 9, (2,)), "b": gym.spaces.Box(0, 255, (2,), np.uint8)}),
        }
    )
    action_space = gym.spaces.Box(np.array([0, -4], np.float32), np.array([10, 4], np.float32))

    observation = {"a": {"y": np.array([1, 2], np.float32), "b": np.array([3, 200], np.uint8)}, "z": np.eye(2, 3)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.received = []
        return self.observation, {}

    def step(self, action):
        self.received.append(action.tolist())
        return self.observation, 1.0, False, False, {}


gym.register("Toy-v0", entry_point=f"{__name__}:Toy", max_episode_steps=3)
NARROW = gym.spaces.Box(np.array([2, -8], np.float32), np.array([6, 8], np.float32))


@pytest.fixture(scope="module", params=["the environment's box", "the data's own box"])
def toy(request):
    samples = [Toy.observation_space.sample() for _ in range(4)]
    observations = {"z": np.stack([sample["z"] for sample in samples])}
    observations["a"] = {key: np.stack([sample["a"][key] for sample in samples]) for key in ("y", "b")}
    own = request.param == "the data's own box"
    actions = np.array([[5, 8], [3, -4], [2, 0]] if own else [[5, 4], [2.5, -2], [0, 0]], np.float32)
    dataset_id, boxes = ("test/box-v0", {"action_space": NARROW}) if own else ("test/toy-v0", {})
    episode = dict(observations=observations, actions=actions, rewards=[1.0, 2.0, 3.0])
    write_dataset(dataset_id, [episode], gym.spec("Toy-v0"), **boxes)
    task, datasets, env, args = open_task(dataset_id)
    return SimpleNamespace(task=task, datasets=datasets, env=env, args=args, samples=samples, own=own)


def test_any_other_dataset_is_flattened_in_gymnasiums_order(toy):
    (episode,) = load_episodes(toy.datasets, toy.task, toy.env)
    expected = [gym.spaces.utils.flatten(Toy.observation_space, sample) for sample in toy.samples]
    assert np.array_equal(episode.observations, np.array(expected, np.float32))
    expected = gym.spaces.utils.flatten(Toy.observation_space, Toy.observation)
    assert np.array_equal(toy.env.reset(seed=1)[0], expected.astype(np.float32))


def test_the_datasets_box_says_what_minus_one_and_one_are(toy):
    """For the data's actions and for the environment's, whose own box may be another: what is outside is clipped."""
    (episode,) = load_episodes(toy.datasets, toy.task, toy.env)
    expected = [[0.5, 0.99999], [-0.5, -0.5], [-0.99999, 0]] if toy.own else [[0, 0.99999], [-0.5, -0.5], [-0.99999, 0]]
    np.testing.assert_allclose(episode.actions, expected, atol=1e-7)
    toy.env.reset(seed=1)
    for action in ([0.5, -0.25], [-1, -1], [1, 1]):
        toy.env.step(np.array(action, np.float32))
    expected = [[5, -2], [2, -4], [6, 4]] if toy.own else [[7.5, -1], [0, -4], [10, 4]]
    np.testing.assert_allclose(toy.env.unwrapped.received, expected, atol=1e-5)


def test_any_other_run_has_no_tail_no_termination_and_no_score(toy):
    buffer = ReplayBuffer(load_episodes(toy.datasets, toy.task, toy.env), toy.args, False, torch.device("cpu"))
    assert buffer.columns.mc_returns[:3].tolist() == pytest.approx([1 + 0.99 * (2 + 0.99 * 3), 2 + 0.99 * 3, 3])
    assert not buffer.columns.terminations[:3].any()
    rewards, ends, score = play(toy.env, {})
    assert rewards == [1, 1, 1] and not any(ends) and math.isnan(score)  # cut off by time, which ends no return


# ---- Evaluation ------------------------------------------------------------------------------------------------------


class Scripted(gym.Env):
    """Plays the next of its lists of (reward, score, terminated, truncated), one at each reset."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, episodes: list, seeds: list):
        self.episodes, self.seeds = iter(episodes), seeds

    def reset(self, *, seed=None, options=None):
        self.steps = iter(next(self.episodes))
        self.seeds.append(seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        reward, score, terminated, truncated = next(self.steps)
        return np.zeros(1, np.float32), reward, terminated, truncated, {"score": score}


def run_evaluation(episodes: list, rows: list, env_steps: int = 0, seed: int = 1) -> tuple[dict, list]:
    args, seeds = Args(seed=seed, batch_size=2, num_actions=2, actor_layers=(4,), critic_layers=(4,), buffer_size=2), []
    data = script.Episode(np.zeros((3, 1), np.float32), np.zeros((2, 1)), np.ones(2), np.zeros(2, bool))
    buffer = ReplayBuffer([data], args, True, torch.device("cpu"))
    envs = gym.vector.SyncVectorEnv([lambda each=each: Scripted(each, seeds) for each in episodes])
    progress = SimpleNamespace(rows=rows, updates=7, env_steps=env_steps)
    return script.evaluate(envs, script.Agent(1, 1, args), buffer, progress, args), seeds


def test_evaluation_counts_one_episode_of_each_environment():
    """The score is the best of an episode, the return its sum; what a finished environment does then counts nothing."""
    momentary = [(1, 0, False, False), (2, 1, False, False), (3, 0, False, True)]  # cut off by time, after a success
    short = [(10, 0, True, False)]
    after = [(100, 1, False, False)] * 9
    row, _ = run_evaluation([[momentary, after], [short, after]], [], env_steps=0)
    assert (row["score"], row["return"], row["phase"]) == (0.5, (6 + 10) / 2, "offline")
    assert math.isnan(row["regret"]) and (row["updates"], row["env_steps"]) == (7, 0)
    names = "phase updates env_steps score return regret mean_q mean_mc_return bound_rate"
    assert list(row) == names.split()


def test_evaluation_scores_by_the_return_where_nothing_tells_success():
    row, _ = run_evaluation([[[(1, math.nan, False, False), (2, math.nan, False, True)]]], [])
    assert row["score"] == row["return"] == 3


def test_regret_is_the_mean_shortfall_of_the_online_evaluations():
    rows = [{"phase": "offline", "score": 0.9}, {"phase": "online", "score": 0.25}]
    row, _ = run_evaluation([[[(1, 0.75, True, False)]]], rows, env_steps=5)
    assert (row["phase"], row["regret"]) == ("online", 0.5)


def test_every_episode_of_every_evaluation_has_a_seed_of_its_own():
    end, seen = [[(0, 0, True, False)]], []
    for rows, seed in [([], 1), ([{"phase": "offline"}], 1), ([], 2)]:
        seen += run_evaluation([end, end, end], rows, seed=seed)[1]
    assert len(set(seen)) == 9 and None not in seen
    assert run_evaluation([end, end, end], [])[1] == seen[:3]


# ---- Datasets that would run code ------------------------------------------------------------------------------------


def rewrite(source: str, target: str, datasets_path: Path, change) -> None:
    """Copies a dataset under another id; change(metadata) works on its metadata as a dictionary."""
    folder = datasets_path / target
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(datasets_path / source, folder)
    path = folder / "data" / "metadata.json"
    metadata = json.loads(path.read_text()) | {"dataset_id": target}
    metadata["env_spec"] = json.loads(metadata["env_spec"])
    change(metadata)
    if "env_spec" in metadata:
        metadata["env_spec"] = json.dumps(metadata["env_spec"])
    path.write_text(json.dumps(metadata))


WRAPPER = {"name": "Evil", "entry_point": "os:system", "kwargs": {"command": "touch pwned"}}
SPECIFICATIONS = {
    "entry point": dict(entry_point="os:system", kwargs={"command": "touch pwned"}),
    "entry point of an id that is not registered": dict(id="Evil-v0", entry_point="os:system"),
    "wrapper": dict(additional_wrappers=[WRAPPER]),
    "module in the id": dict(id="evil_module:AdroitHandDoor-v1"),
    "vector entry point": dict(vector_entry_point="os:system", kwargs={"command": "touch pwned"}),
    "argument": dict(kwargs={"vector_entry_point": "os:system", "additional_wrappers": [WRAPPER]}),
}


@pytest.mark.parametrize("change", SPECIFICATIONS.values(), ids=SPECIFICATIONS)
@pytest.mark.parametrize("name", ["test/evil-v0", "door-binary"])
def test_a_dataset_runs_no_code(name, change, door, datasets_path, tmp_path, monkeypatch):
    """Not even a module is imported that the data names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil_module.py").write_text("open('pwned', 'w')")
    rewrite("D4RL/door/cloned-v2", "test/evil-v0", datasets_path, lambda data: data["env_spec"].update(change))
    with pytest.raises(InputError, match="^test/evil-v0's environment cannot be made: |^cannot open test/evil-v0 "):
        make_env(open_dataset("test/evil-v0"), script.find_task(name), 0)
    assert not (tmp_path / "pwned").exists()


def test_the_registrys_entry_point_counts(door, datasets_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change = dict(entry_point="os:system", vector_entry_point="os:system")
    rewrite("D4RL/door/cloned-v2", "test/evil-v0", datasets_path, lambda data: data["env_spec"].update(change))
    env = make_env(open_dataset("test/evil-v0"), door.task, 0)
    assert type(env.unwrapped).__name__ == "AdroitHandDoorEnv"
    env.close()


# ---- Spoiled datasets ------------------------------------------------------------------------------------------------


def replace(name: str, change):
    """Replaces a column by what change(values) makes of it."""

    def spoil(episode):
        values = episode[name][()]
        del episode[name]
        episode[name] = change(values)

    return spoil


def put(value, index=1):
    def change(values):
        values = values.astype(np.result_type(values, type(value)))
        values[index] = value
        return values

    return change


def delete(name: str):
    return lambda episode: episode.__delitem__(name)


def text(values):
    return np.full(values.shape, b"text")


# Every way applies to the second of three episodes, so that a look at the first alone does not find it.
SPOILED = {
    "observations missing": delete("observations"),
    "actions missing": delete("actions"),
    "rewards missing": delete("rewards"),
    "terminations missing": delete("terminations"),
    "infos missing": delete("infos"),
    "success missing": delete("infos/success"),
    "all missing": lambda episode: episode.parent.__delitem__(episode.name),
    "T observations": replace("observations", lambda x: x[:-1]),
    "T + 3 observations": replace("observations", lambda x: np.concatenate([x, x[:2]])),
    "narrow observations": replace("observations", lambda x: x[:, :-1]),
    "wide observations": replace("observations", lambda x: np.concatenate([x, x], axis=1)),
    "flat observations": replace("observations", lambda x: x[:, 0]),
    "complex observations": replace("observations", lambda x: x + 1j),
    "text observations": replace("observations", text),
    "NaN in observations": replace("observations", put(math.nan)),
    "infinite observations": replace("observations", put(-math.inf, -1)),
    "T + 1 actions": replace("actions", lambda x: np.concatenate([x, x[:1]])),
    "one action": replace("actions", lambda x: x[:1]),
    "actions of width 1": replace("actions", lambda x: x[:, :1]),
    "wide actions": replace("actions", lambda x: np.concatenate([x, x], axis=1)),
    "text actions": replace("actions", text),
    "complex actions": replace("actions", lambda x: x + 1j),
    "NaN in actions": replace("actions", put(math.nan)),
    "an action far outside": replace("actions", put(1e6)),
    "infinite actions": replace("actions", put(math.inf)),
    "rewards [T, 1]": replace("rewards", lambda x: x[:, None]),
    "short rewards": replace("rewards", lambda x: x[:-1]),
    "one number as rewards": replace("rewards", lambda x: 1.0),
    "no rewards": replace("rewards", lambda x: x[:0]),
    "text rewards": replace("rewards", text),
    "NaN in rewards": replace("rewards", put(math.nan)),
    "short terminations": replace("terminations", lambda x: x[:-1]),
    "one number as terminations": replace("terminations", lambda x: False),
    "text terminations": replace("terminations", text),
    "NaN in terminations": replace("terminations", put(math.nan)),
    "half a termination": replace("terminations", put(0.5)),
    "T success": replace("infos/success", lambda x: x[1:]),
    "one success": replace("infos/success", lambda x: x[:1]),
    "one number as success": replace("infos/success", lambda x: True),
    "success [T + 1, 1]": replace("infos/success", lambda x: x[:, None]),
    "text success": replace("infos/success", text),
    "NaN in success": replace("infos/success", put(math.nan)),
    "success of 0.3": replace("infos/success", put(0.3)),
}


@pytest.fixture(scope="module")
def sound(door):
    episodes = [make_adroit_episode([0, 0, 1, 0, 1]) for _ in range(3)]
    write_dataset("test/sound-v0", episodes, make_spec("AdroitHandDoor-v1"))
    assert len(load_episodes([open_dataset("test/sound-v0")], door.task, door.env)) == 3
    return "test/sound-v0"


def open_spoiled(source: str, datasets_path: Path, spoil):
    rewrite(source, "test/spoiled-v0", datasets_path, lambda metadata: None)
    with h5py.File(datasets_path / "test/spoiled-v0/data/main_data.hdf5", "a") as file:
        spoil(file["episode_1"])
    return open_dataset("test/spoiled-v0")


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_spoiled_columns_are_named(spoil, door, sound, datasets_path):
    with pytest.raises(InputError, match="^episode 1 of test/spoiled-v0: [^\n]+$"):
        load_episodes([open_spoiled(sound, datasets_path, spoil)], door.task, door.env)


ANT_SPOILED = {
    "no position": delete("observations/achieved_goal"),
    "three coordinates": replace("observations/achieved_goal", lambda x: np.concatenate([x, x[:, :1]], axis=1)),
    "a position short": replace("observations/achieved_goal", lambda x: x[:-1]),
    "NaN in a position": replace("observations/achieved_goal", put(math.nan)),
    "wide state": replace("observations/observation", lambda x: np.concatenate([x, x], axis=1)),
}


@pytest.mark.parametrize("spoil", ANT_SPOILED.values(), ids=ANT_SPOILED)
@pytest.mark.parametrize("ant", ["antmaze-umaze"], indirect=True)
def test_spoiled_mazes_are_named(spoil, ant, datasets_path):
    with pytest.raises(InputError, match="^episode 1 of test/spoiled-v0: [^\n]+$"):
        load_episodes([open_spoiled(ant.task.datasets[0], datasets_path, spoil)], ant.task, ant.env)


def set_kwargs(**kwargs):
    return lambda metadata: metadata["env_spec"]["kwargs"].update(kwargs)


MAZE = gym.spec("AntMaze_UMaze-v4").kwargs["maze_map"]
METADATA_SPOILED = {
    "no maze": lambda metadata: metadata["env_spec"]["kwargs"].pop("maze_map"),
    "small maze": set_kwargs(maze_map=[[1, 1], [1, 1]]),
    "maze of text": set_kwargs(maze_map="maze"),
    "goal in a wall": set_kwargs(maze_map=[[1] * 5] * 5),
    "start in a wall": set_kwargs(maze_map=[*MAZE[:3], [1] * 5, MAZE[4]]),
    "unknown argument": set_kwargs(gravity=3),
    "unknown environment": lambda metadata: metadata["env_spec"].update(id="Unknown-v0"),
    "another environment": lambda metadata: metadata["env_spec"].update(id="FrankaKitchen-v1", kwargs={}),
    "another task's dataset": lambda metadata: metadata.update(dataset_id="D4RL/antmaze/large-play-v1"),
    "no environment": lambda metadata: metadata.update(env_spec=None),
    "environment left out": lambda metadata: metadata.pop("env_spec"),
    "other actions": lambda metadata: metadata.update(action_space=box(9, 1.0)),
    "unbounded actions": lambda metadata: metadata.update(action_space=box(8, math.inf)),
    "discrete actions": lambda metadata: metadata.update(action_space='{"type": "Discrete", "dtype": "int64", '
                                                                      '"n": 3, "start": 0}'),
    "box too wide": lambda metadata: metadata.update(action_space=box(8, 10.0)),
    "box too small": lambda metadata: metadata.update(action_space=box(8, 0.5)),
    "more episodes than there are": lambda metadata: metadata.update(total_episodes=9),
    "no episodes": lambda metadata: metadata.update(total_episodes=0),
    "fewer episodes than there are": lambda metadata: metadata.update(total_episodes=2),
    "other observations": lambda metadata: metadata.update(observation_space=box(29, 1.0)),
}  # fmt: skip


def box(size: int, bound: float) -> str:
    space = gym.spaces.Box(-bound, bound, (size,), np.float32)
    return minari.serialization.serialize_space(space)


@pytest.mark.parametrize("change", METADATA_SPOILED.values(), ids=METADATA_SPOILED)
@pytest.mark.parametrize("ant", ["antmaze-umaze"], indirect=True)
def test_spoiled_metadata_is_refused(change, ant, datasets_path):
    rewrite(ant.task.datasets[0], "test/spoiled-v0", datasets_path, change)
    with pytest.raises(InputError, match="^[^\n]*test/spoiled-v0[^\n]*$"):
        dataset = open_dataset("test/spoiled-v0")
        task = ant.task._replace(datasets=("test/spoiled-v0",))
        load_episodes([dataset], task, make_env(dataset, task, 0))


@pytest.mark.parametrize("damage", [
    lambda folder: (folder / "data/metadata.json").write_text("{"),
    lambda folder: (folder / "data/metadata.json").unlink(),
    lambda folder: (folder / "data/main_data.hdf5").write_bytes(b"no HDF5"),
    lambda folder: os.truncate(folder / "data/main_data.hdf5", 3000),
], ids=["metadata cut", "no metadata", "no HDF5", "HDF5 cut"])  # fmt: skip
def test_damaged_files_are_refused(damage, sound, door, datasets_path):
    rewrite(sound, "test/spoiled-v0", datasets_path, lambda metadata: None)
    damage(datasets_path / "test/spoiled-v0")
    with pytest.raises(InputError, match="^[^\n]*test/spoiled-v0[^\n]*$"):
        load_episodes([open_dataset("test/spoiled-v0")], door.task, door.env)


def test_stray_folders_do_not_matter(sound, datasets_path, tmp_path, monkeypatch):
    """Minari itself cannot list what is there then."""
    shutil.copytree(datasets_path / sound, tmp_path / sound)
    (tmp_path / "tmp" / "data").mkdir(parents=True)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert open_dataset(sound).total_episodes == 3


def test_an_absent_dataset_is_named_at_once(monkeypatch, capsys):
    """Before a download begins, that takes its time to fail; ours names its collector and tries none."""

    def load_dataset(dataset_id, download):
        assert download == (dataset_id[:4] == "D4RL")
        assert (f"{dataset_id} is not at" in capsys.readouterr().out) == download
        raise ConnectionError("no network")

    monkeypatch.setattr(minari, "load_dataset", load_dataset)
    with pytest.raises(InputError, match="cannot open D4RL/antmaze/none-v1 .*no network.*minari download"):
        open_dataset("D4RL/antmaze/none-v1")
    with pytest.raises(InputError, match="cannot open cal-ql/pick-place/none-v0 .*collect"):
        open_dataset("cal-ql/pick-place/none-v0")


@pytest.mark.parametrize("name", ["antmaze", "../up-v0", "a/../b-v0", "", "/etc-v0", "a b/c-v0", "antmaze-large-dive"])
def test_unknown_tasks_are_refused(name):
    with pytest.raises(InputError, match="antmaze-large-diverse"):
        script.find_task(name)


def test_pick_place_starts_differ(collected):
    _, _, env, _ = open_task("pick-place")
    check_starts(env)
    assert env.spec.max_episode_steps == 40
    env.close()


# ---- Collectors ------------------------------------------------------------------------------------------------------

COLLECTORS = {  # module: dataset, module of the environment, entries of a state, time limit
    pick_place: ("cal-ql/pick-place/narrow-v0", "collect.pick_place:", 11, 40),
    point_maze: ("cal-ql/pointmaze/narrow-v0", "gymnasium_robotics.", 4, 300),
}


def collect(monkeypatch, module, *flags: str) -> int:
    monkeypatch.setattr("sys.argv", ["collect", *flags])
    return module.main()


@pytest.fixture(scope="module")
def collected():
    with pytest.MonkeyPatch.context() as patch:
        assert [collect(patch, module, "--episodes", "3") for module in COLLECTORS] == [0, 0]


@pytest.mark.parametrize("module", COLLECTORS)
def test_collector_writes_what_it_promises(module, collected):
    dataset_id, source, entries, limit = COLLECTORS[module]
    dataset = minari.load_dataset(dataset_id)
    assert len(dataset) == 3
    for episode in dataset:
        assert len(episode.rewards) <= limit
        assert len(episode.infos["success"]) == len(episode.rewards) + 1
        assert np.array_equal(episode.infos["success"][1:], episode.rewards)
        assert np.array_equal(episode.rewards > 0, episode.terminations)  # the reward is 1 on success, which ends it
        assert bool(episode.truncations[-1]) != bool(episode.terminations[-1])
        assert np.abs(episode.actions).max() <= 1
    assert dataset.env_spec.entry_point.startswith(source)  # wherever the collector was started
    env = dataset.recover_environment()
    assert env.spec.max_episode_steps == limit
    seed = next(dataset.storage.get_episode_metadata([0]))["seed"]
    state = env.reset(seed=seed)[0]  # the recovered environment is the one that the data came from
    first = dataset[0].observations
    if module is point_maze:
        state, first = state["observation"], first["observation"]
    assert state.shape == (entries,) and np.array_equal(state, first[0])
    env.close()


@pytest.mark.parametrize("module", COLLECTORS)
def test_collector_keeps_an_existing_dataset(module, collected, monkeypatch, capsys):
    dataset_id = COLLECTORS[module][0]
    flags = ["--dataset-id", dataset_id.replace("narrow", "kept"), "--episodes"]
    assert collect(monkeypatch, module, *flags, "2") == 0
    assert collect(monkeypatch, module, *flags, "1") == 0
    assert "--overwrite" in capsys.readouterr().out
    assert len(minari.load_dataset(flags[1])) == 2
    assert collect(monkeypatch, module, *flags, "1", "--overwrite") == 0
    assert len(minari.load_dataset(flags[1])) == 1
    assert collect(monkeypatch, module, *flags, "0") == 2


def can_draw() -> bool:
    """Whether there is OpenGL, found out without our own environment, whose mistakes are to show."""
    code = "from mujoco.egl import GLContext; GLContext(8, 8).make_current()"
    environment = {name: value for name, value in os.environ.items() if name != "MUJOCO_GL"}
    return not subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True).returncode


needs_gl = pytest.mark.skipif(not can_draw(), reason="needs OpenGL: libegl1 libegl-mesa0 libgl1-mesa-dri")
both_views = pytest.mark.parametrize("make", [
    pick_place.make_state_env, pytest.param(pick_place.make_camera_env, marks=needs_gl),
])  # fmt: skip


@both_views
def test_pick_place_environment_is_sound(make):
    env = make()
    check_env(env, skip_render_check=True)
    action = np.array([0.5, -0.5, 0.2, 1], np.float32)
    for seed in (3, 4, 3):  # `env` has been used by the check, and by the seeds before
        used = [env.reset(seed=seed)[0], env.step(action)[0]]
        fresh = make()
        assert np.array_equal(used, [fresh.reset(seed=seed)[0], fresh.step(action)[0]])
        fresh.close()
        if make is pick_place.make_state_env:
            assert np.abs(used).max() < 2  # unit scale
    env.close()


@needs_gl
def test_camera_sees_both_cubes_and_the_tray_wherever_they_are():
    env = pick_place.make_camera_env()
    env.reset(seed=0)
    scene, (low, high) = env.unwrapped, (pick_place.CUBES_LOW, pick_place.CUBES_HIGH)
    scene.data.mocap_pos[0, 2] += 0.3  # the arm out of the way
    for _ in range(10):
        scene.step(np.zeros(4, np.float32))
    corners = [(low[0], low[1]), (high[0], high[1]), (low[0], high[1]), (high[0], low[1])]
    for red, blue in zip(corners, corners[::-1], strict=True):
        for joint, place in (("object0:joint", red), ("distractor:joint", blue)):
            scene._utils.set_joint_qpos(scene.model, scene.data, joint, [*place, TABLE, 1, 0, 0, 0])
        scene._mujoco.mj_forward(scene.model, scene.data)
        frame = env.observation(None).astype(int)
        assert frame.shape == (64, 64, 3)
        for channel, least in ((0, 10), (1, 50), (2, 10)):  # red, green, blue: pixels that have no other colour
            others = np.delete(frame, channel, axis=2).max(axis=2)
            assert (frame[..., channel] > others + 60).sum() >= least
    env.close()


FLAT, STACKED, TABLE = 0.435, 0.485, 0.425  # heights of a cube's centre on the tray, on a cube there, on the table


@pytest.mark.parametrize("red, blue, success", [
    ((1.34, 0.95, FLAT), (1.30, 0.65, TABLE), True),
    ((1.40, 0.90, FLAT), (1.30, 0.65, TABLE), True),
    ((1.34, 0.95, 0.50), (1.30, 0.65, TABLE), False),  # in the air above it
    ((1.34, 0.95, STACKED), (1.34, 0.95, FLAT), False),  # on the blue cube
    ((1.34, 0.80, TABLE), (1.34, 0.95, FLAT), False),  # the blue cube in its place
    ((1.44, 0.95, TABLE), (1.30, 0.65, TABLE), False),  # beside the tray
])  # fmt: skip
@both_views
def test_pick_place_success(make, red, blue, success):
    env = make()
    env.reset(seed=1)
    scene = env.unwrapped
    for joint, position in (("object0:joint", red), ("distractor:joint", blue)):
        scene._utils.set_joint_qpos(scene.model, scene.data, joint, [*position, 1, 0, 0, 0])
    _, reward, terminated, _, info = env.step(np.zeros(4, np.float32))
    assert (reward, terminated, info["success"]) == (float(success), success, success)
    env.close()


def test_demonstrator_without_noise_succeeds(monkeypatch):
    flags = ["--dataset-id", "cal-ql/pick-place/clean-v0", "--episodes", "10", "--noise", "0"]
    assert collect(monkeypatch, pick_place, *flags) == 0
    dataset = minari.load_dataset("cal-ql/pick-place/clean-v0")
    assert sum(episode.rewards.max() for episode in dataset) >= 9


def test_about_half_of_the_noisy_demonstrations_succeed():
    env = gym.make(pick_place.STATE_SPEC)
    demonstrations = [pick_place.demonstrate(env, pick_place.Args().noise, 100_000 + k) for k in range(40)]
    assert 0.4 <= np.mean([demonstration["success"].any() for demonstration in demonstrations]) <= 0.7


@pytest.mark.parametrize("flags", [[], pytest.param(["--camera"], marks=needs_gl)])
def test_collecting_goes_on_where_it_stopped(flags, monkeypatch, capsys):
    demonstrate, seeds = pick_place.demonstrate, []

    def interrupted(env, noise, seed):
        if len(seeds) == 2:
            raise KeyboardInterrupt
        seeds.append(seed)
        return demonstrate(env, noise, seed)

    folder = minari.storage.get_dataset_path("cal-ql/pick-place")
    flags = [*flags, "--episodes", "4", "--overwrite", "--dataset-id"]
    with monkeypatch.context() as patch:
        patch.setattr(pick_place, "demonstrate", interrupted)
        assert collect(patch, pick_place, *flags, "cal-ql/pick-place/stopped-v0") == 130
        assert "goes on" in capsys.readouterr().err and len(list(folder.glob(".stopped*/*.npz"))) == 2
        seeds.clear()
        assert collect(patch, pick_place, *flags, "cal-ql/pick-place/stopped-v0") == 0
    assert len(seeds) == 2 and not list(folder.glob(".stopped*"))
    assert collect(monkeypatch, pick_place, *flags, "cal-ql/pick-place/whole-v0") == 0
    stopped, whole = (minari.load_dataset(f"cal-ql/pick-place/{name}-v0") for name in ("stopped", "whole"))
    for ours, theirs in zip(stopped, whole, strict=True):
        assert ours.observations.dtype == (np.uint8 if "--camera" in flags else np.float64)
        for column in ("observations", "actions", "rewards", "terminations", "truncations"):
            assert np.array_equal(getattr(ours, column), getattr(theirs, column))
    env = whole.recover_environment()  # draws what is in the data
    seed = next(whole.storage.get_episode_metadata([0]))["seed"]
    assert np.array_equal(env.reset(seed=seed)[0], whole[0].observations[0])
    env.close()


def test_collecting_without_gl_names_the_packages(monkeypatch, capsys):
    def fail(spec):
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    monkeypatch.setattr(pick_place.gym, "make", fail)
    assert collect(monkeypatch, pick_place, "--camera", "--dataset-id", "cal-ql/pick-place/undrawn-v0") == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: cannot draw") and "libegl1 libegl-mesa0 libgl1-mesa-dri" in errors


@pytest.mark.parametrize("flags", [
    "--episodes 0", "--seed -1", "--noise -1", "--noise nan", "--dataset-id cal-ql", "--dataset-id ../elsewhere-v0",
    "--dataset-id cal-ql/pick-place/unnumbered", "--dataset-id /cal-ql/away-v0",
])  # fmt: skip
def test_collecting_refuses_bad_input(flags, collected, monkeypatch, capsys):
    assert collect(monkeypatch, pick_place, *flags.split()) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert "cal-ql/pick-place/narrow-v0" in minari.list_local_datasets()


def test_a_stopped_collection_is_not_mixed_with_another_view():
    parts = {
        pick_place.Args(dataset_id="a-v0", camera=camera, seed=seed, noise=noise).parts
        for camera in (False, True)
        for seed in (1, 2)
        for noise in (0.3, 0.4)
    }
    assert len(parts) == 8
