"""From Minari's episodes and environments to the paper's tasks, on tiny datasets in the hosted ones' schemas."""

import copy
import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium_robotics.envs.franka_kitchen.kitchen_env import OBS_ELEMENT_GOALS, OBS_ELEMENT_INDICES
from minari.data_collector import EpisodeBuffer

import cal_ql_continuous as script
from cal_ql_continuous import TASKS, Args, InputError, ReplayBuffer, load_data, make_env
from collect import pick_place

rng = np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def datasets_path(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("minari")
        patch.setenv("MINARI_DATASETS_PATH", str(path))
        yield path


def write_dataset(dataset_id: str, episodes: list[dict], env: EnvSpec | None = None, **kwargs) -> None:
    """Writes episodes of observations (T+1), actions, rewards and perhaps infos; nothing terminates, as hosted."""
    buffers = []
    for k, episode in enumerate(episodes):
        never = [False] * len(episode["rewards"])
        ends = dict(terminations=never, truncations=never[1:] + [True])
        buffers.append(EpisodeBuffer(id=k, **(ends | episode)))
    shutil.rmtree(minari.storage.get_dataset_path(dataset_id), ignore_errors=True)
    minari.create_dataset_from_buffers(dataset_id, buffers, env=env, **kwargs)


def make_spec(env_id: str, max_episode_steps: int | None = None, **kwargs) -> EnvSpec:
    spec = copy.deepcopy(gym.spec(env_id))
    spec.kwargs |= kwargs
    spec.max_episode_steps = max_episode_steps or spec.max_episode_steps
    return spec


def make_args(env_id: str, *flags: str, **changes) -> Args:
    return dataclasses.replace(script.parse_args(["--env-id", env_id, *flags])[0], buffer_size=50, **changes)


def open_task(env_id: str, **changes) -> SimpleNamespace:
    """The task's settings, data and environment, put together as train() does it."""
    args = make_args(env_id, **changes)
    task, dataset, offline = load_data(args)
    return SimpleNamespace(args=args, task=task, dataset=dataset, offline=offline, env=make_env(dataset, task, args))


def read_episodes(opened: SimpleNamespace) -> list[script.Episode]:
    """Relabelled, but rewards are the task's own and actions not clipped."""
    return [script.to_episode(data, opened.dataset, opened.task) for data in opened.dataset]


def play(env: gym.Env, moves: dict):
    """An episode of zeros; before its n-th step, moves[n] is called with the simulation. Rewards, ends, best score."""
    rewards, ends, scores, over = [], [], [], False
    env.reset(seed=1)
    while not over:
        moves.get(len(rewards), lambda simulation: None)(env.unwrapped)
        _, reward, terminated, truncated, info = env.step(np.zeros(env.action_space.shape, np.float32))
        rewards.append(reward), ends.append(terminated), scores.append(info["score"])
        over = terminated or truncated
    return rewards, ends, max(scores)


def check_starts(env: gym.Env) -> None:
    """Two seeds start differently, and one seed repeats: else an evaluation plays one and the same episode."""
    first, other, again = (env.reset(seed=seed)[0] for seed in (1, 2, 1))
    assert np.array_equal(first, again) and np.abs(first - other).max() > 1e-3
    assert not np.array_equal(env.step(np.zeros(env.action_space.shape))[0], first)  # it moves on from there


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
        observations=others | dict(achieved_goal=positions),
        actions=rng.uniform(-1, 1, (count - 1, 8)).astype(np.float32),
        rewards=1.0 - np.array(arrivals),
        infos={"success": 1 - np.array([1, *arrivals])},
    )


@pytest.fixture(scope="module", params=ANTMAZE)
def ant(request):
    env_id, start, goal = ANTMAZE[request.param]
    maze = gym.spec(env_id).kwargs["maze_map"]
    spec = make_spec(env_id, 70, maze_map=maze, continuing_task=True, reset_target=False)
    mirrored = make_spec(env_id, maze_map=[row[::-1] for row in maze])  # Minari's own evaluation maps are so for umaze
    episodes = [make_ant_episode(goal, arrivals) for arrivals in ARRIVALS]
    write_dataset(TASKS[request.param].datasets[0], episodes, spec, eval_env=mirrored)
    opened = open_task(request.param)
    yield SimpleNamespace(**vars(opened), maze=maze, start=start, goal=goal, recorded=episodes)
    opened.env.close()


def test_antmaze_is_relabelled_to_one_goal(ant):
    for episode, arrivals, recorded in zip(read_episodes(ant), ARRIVALS, ant.recorded, strict=True):
        # The data goes on after an arrival; what arrives is the transition whose next position is at the goal.
        assert episode.rewards.tolist() == list(arrivals)
        assert episode.terminations.tolist() == [bool(arrival) for arrival in arrivals]
        parts = recorded["observations"]
        expected = np.concatenate([parts["achieved_goal"], parts["observation"]], axis=1, dtype=np.float32)
        assert episode.observations.shape[1] == 29 and np.array_equal(episode.observations, expected)
    for batch, returns in zip(ant.offline, ARRIVALS.values(), strict=True):
        assert batch.mc_returns.tolist() == pytest.approx(returns, rel=1e-6)


def test_antmaze_environment(ant):
    env = ant.env
    made, own = (np.array(maze, object) for maze in (env.unwrapped.maze.maze_map, ant.maze))
    assert np.array_equal(made == 1, own == 1)  # the data's own, not the mirrored one
    assert sorted(made[(made != 0) & (made != 1)]) == ["g", "r"]
    for seed in range(5):
        state = env.reset(seed=seed)[0]
        assert np.array_equal([env.unwrapped.reset_pos, env.unwrapped.goal], [ant.start, ant.goal])
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
    opened = open_task("door-binary")
    yield SimpleNamespace(**vars(opened), human=human, cloned=cloned)
    opened.env.close()


def test_adroit_keeps_what_succeeds_up_to_the_last_success(door):
    human, cloned = door.offline  # one episode of each survives
    assert human.rewards.tolist() == [-5, 5, -5, 5]  # step t succeeded if the info's entry t + 1 says so
    assert human.terminations.tolist() == [False, True, False, True]
    assert np.array_equal(human.observations, door.human[0]["observations"][:4].astype(np.float32))
    assert np.array_equal(human.next_observations, door.human[0]["observations"][1:5].astype(np.float32))
    np.testing.assert_allclose(human.actions, door.human[0]["actions"][:4].clip(-0.99999, 0.99999), atol=1e-7)
    assert cloned.rewards.tolist() == [-5, -5, 5]
    assert np.array_equal(cloned.next_observations, door.cloned[1]["observations"][1:].astype(np.float32))


def test_datasets_that_are_given_replace_the_tasks_own(door):
    """The task's rules hold for them, here Adroit's, which keeps two of three episodes; the first one's box counts."""
    episodes = [make_adroit_episode(success) for success in ([0, 1, 0], [0, 0], [0, 0, 0, 1])]
    spec, box = make_spec("AdroitHandDoor-v1", 300), gym.spaces.Box(-3, 3, (28,), np.float32)
    write_dataset("mine/more-v0", episodes, spec, action_space=box)
    args = make_args("door-binary", "--datasets", "D4RL/door/cloned-v2", "mine/more-v0")
    _, dataset, offline = load_data(args)
    assert [len(batch.rewards) for batch in offline] == [3, 1, 3] and dataset.id == "D4RL/door/cloned-v2"
    assert offline[1].rewards.tolist() == [5] and np.array_equal(offline[1].actions, episodes[0]["actions"][:1])
    write_dataset("mine/more-v0", episodes[1:2], spec)
    with pytest.raises(InputError, match=r"^no episode of \['mine/more-v0'\] has a reward in door-binary\.$"):
        load_data(make_args("door-binary", datasets=("mine/more-v0",)))


@pytest.mark.parametrize("name", ADROIT)
def test_adroit_environment(name, door):
    spec = make_spec(f"AdroitHand{name.capitalize()}-v1", 300)
    for which in ("human", "cloned") if name != "door" else ():
        write_dataset(f"D4RL/{name}/{which}-v2", [make_adroit_episode([0, 1], name)], spec)
    env = open_task(f"{name}-binary").env
    assert env.spec.max_episode_steps == ADROIT[name][2]
    check_starts(env)
    if name == "door":  # its reward is success, which ends it

        def push_open(simulation):
            simulation.data.qpos[simulation.door_hinge_addrs] = 1.5

        assert play(env, {2: push_open}) == ([0, 0, 1], [False, False, True], 1.0)


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
    opened = open_task(name)
    yield SimpleNamespace(**vars(opened), goals=goals, states=observations["observation"])
    opened.env.close()


def test_kitchen(kitchen):
    (episode,) = read_episodes(kitchen)
    assert episode.rewards.tolist() == [0, 1, 2, 1] and not episode.terminations.any()  # tasks that are done right now
    assert np.array_equal(episode.observations, kitchen.states.astype(np.float32))  # 59 entries and no goals

    assert {*kitchen.env.unwrapped.goal} == {*kitchen.goals} and kitchen.env.spec.max_episode_steps == 280
    first, last = "microwave", kitchen.goals[-1]

    def put(*tasks, share=1):
        def move(simulation):
            for task in tasks:
                simulation.data.qpos[OBS_ELEMENT_INDICES[task]] = share * OBS_ELEMENT_GOALS[task]

        return move

    env = make_env(kitchen.dataset, kitchen.task, dataclasses.replace(kitchen.args, episode_length=6))
    check_starts(env)
    rewards, ends, score = play(env, {1: put(first), 2: put(first, last), 3: put(first, share=0)})
    assert rewards[:4] == [0, 1, 2, 1] and score == 2 / 4  # what is done now, and what was ever done
    assert len(rewards) == 6 and not any(ends)
    rewards, ends, score = play(env, {1: put(*kitchen.goals)})
    assert rewards[1] == 4 and score == 1 and len(rewards) == 6 and not any(ends)
    assert play(env, {})[2] == 0  # the environment's list of what was done is cleared


# ---- Any other dataset, and an environment that is not the paper's ---------------------------------------------------


class Toy(gym.Env):
    """Gives what a test sets: one observation, and each step's results from `episodes` while there are any."""

    observation_space = gym.spaces.Dict(
        joints=gym.spaces.Box(-9, 9, (2, 3), np.float64),
        goal=gym.spaces.Dict(y=gym.spaces.Box(-9, 9, (2,)), b=gym.spaces.Box(0, 255, (2,), np.uint8)),
    )
    action_space = gym.spaces.Box(np.array([0, -4], np.float32), np.array([10, 4], np.float32))
    observation = {"joints": np.eye(2, 3), "goal": {"y": np.array([1, 2], np.float32), "b": np.array([3, 200], "u1")}}
    results, episodes, seeds = (1.0, False, False, {}), iter(()), []

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        self.received, self.steps = [], iter(next(self.episodes, ()))
        self.seeds.append(seed)
        return self.observation, {}

    def step(self, action):
        self.received.append(action)
        return self.observation, *next(self.steps, self.results)


FLAT_TOY = [3, 200, 1, 2, 1, 0, 0, 0, 1, 0]  # goal before joints, b before y: the data's order, not Toy's
gym.register("Toy-v0", entry_point=f"{__name__}:Toy", max_episode_steps=3)
NARROW = gym.spaces.Box(np.array([2, -8], np.float32), np.array([6, 8], np.float32))
BYTES = gym.spaces.Box(0, 255, (2,), np.uint8)


def open_toy(actions=((0, 0), (0, 0), (0, 0)), spec=None, dataset_id="test/toy-v0", **kwargs) -> SimpleNamespace:
    """Three steps with rewards 1, 2, 3; `kwargs` are spaces or columns that replace its own."""
    spaces = {name: kwargs.pop(name, getattr(Toy, name)) for name in ("observation_space", "action_space")}
    goal = {"b": np.array([[3, 200]] * 4, np.uint8), "y": np.array([[k, 2] for k in (1, 7, 8, 9)], np.float32)}
    columns = dict(observations={"joints": np.array([np.eye(2, 3)] * 4), "goal": goal}, rewards=[1, 2, 3])
    columns["actions"] = np.array(actions, spaces["action_space"].dtype)
    write_dataset(dataset_id, [columns | kwargs], spec or gym.spec("Toy-v0"), **spaces)
    return open_task(dataset_id)


@pytest.fixture
def toy():
    return open_toy()


def test_data_and_environment_are_flattened_in_one_order(toy):
    assert list(Toy.observation_space) == ["joints", "goal"] != list(toy.dataset.observation_space)
    assert toy.offline[0].observations.tolist() == [FLAT_TOY[:2] + [k, 2] + FLAT_TOY[4:] for k in (1, 7, 8)]
    assert toy.env.reset(seed=1)[0].tolist() == FLAT_TOY == toy.env.step(np.zeros(2, np.float32))[0].tolist()


@pytest.mark.parametrize("box, actions, scaled, played", [
    (Toy.action_space, [[5, 4], [2.5, -2], [0, 0]], [[0, 1], [-0.5, -0.5], [-1, 0]], [[7.5, -1], [0, -4], [10, 4]]),
    (NARROW, [[5, 8], [3, -4], [2, 0]], [[0.5, 1], [-0.5, -0.5], [-1, 0]], [[5, -2], [2, -4], [6, 4]]),
    (BYTES, [[0, 255], [51, 204], [255, 0]], [[-1, 1], [-0.6, 0.6], [1, -1]], [[191, 96], [0, 0], [255, 255]]),
])  # fmt: skip
def test_the_datasets_box_says_what_minus_one_and_one_are(box, actions, scaled, played, monkeypatch):
    """For the data's actions and for the environment's, whose own box may be another: what is outside is clipped."""
    monkeypatch.setattr(Toy, "action_space", BYTES if box is BYTES else Toy.action_space)
    toy = open_toy(actions, action_space=box)
    np.testing.assert_allclose(read_episodes(toy)[0].actions, scaled, atol=1e-7)
    toy.env.reset(seed=1)
    for action in ([0.5, -0.25], [-1, -1], [1, 1]):
        toy.env.step(np.array(action, np.float32))
    np.testing.assert_allclose(toy.env.unwrapped.received, played, atol=1e-5)
    assert toy.env.unwrapped.received[0].dtype == Toy.action_space.dtype


@pytest.mark.parametrize("info, score", [
    ({"success": True}, 1), ({"success": False, "is_success": 1.0}, 0), ({"is_success": np.float32(1)}, 1), ({}, None),
    ({"success": np.array([True])}, 1),
])  # fmt: skip
def test_success_has_two_names_and_arrays_of_one_entry_are_numbers(info, score, toy, monkeypatch):
    monkeypatch.setattr(Toy, "results", (np.array([2.0]), np.array([False]), np.array([[False]]), info))
    toy.env.reset(seed=1)
    _, reward, terminated, truncated, info = toy.env.step(np.zeros(2, np.float32))
    assert (reward, terminated, truncated) == (2.0, False, False)
    assert info["score"] == score or score is None and math.isnan(info["score"])


def test_an_adroit_environment_must_tell_success(toy, monkeypatch):
    """The task's reward is its success: without one it would be NaN, and the loss soon too."""
    with pytest.raises(InputError, match="Toy-v0's reset or step gives the reward nan"):
        make_env(toy.dataset, TASKS["door-binary"], toy.args)
    monkeypatch.setattr(Toy, "results", (7.0, False, False, {"success": True}))
    env = make_env(toy.dataset, TASKS["door-binary"], toy.args)
    env.reset(seed=1)
    assert env.step(np.zeros(2, np.float32))[1:] == (1.0, True, False, {"score": 1.0})


@pytest.mark.parametrize("name, value, message", [
    ("observation", {"joints": 0, "a": 0}, "KeyError("),
    ("observation", Toy.observation | {"joints": np.eye(3, 2)}, "'s reset or step: observations (3, 2) are not (2, 3)"),
    ("observation", Toy.observation | {"joints": np.full((2, 3), math.nan)}, "'s reset or step: observations (2, 3) a"),
    ("results", (math.nan, False, False, {}), "'s reset or step gives the reward nan."),
    ("results", (-math.inf, False, False, {}), "'s reset or step gives the reward -inf."),
    ("results", (0.0, False, {}), "expected 5, got 4"),  # the interface of old Gym
    ("results", (np.zeros(2), False, False, {}), "can only convert an array of size 1"),
])  # fmt: skip
def test_what_does_not_fit_is_one_sentence_that_names_the_environment(name, value, message, toy, monkeypatch):
    toy.env.reset(seed=1)
    monkeypatch.setattr(Toy, name, value)
    with pytest.raises(InputError, match=f"^cannot make the environment Toy-v0: [^\n]*{re.escape(message)}"):
        make_env(toy.dataset, toy.task, dataclasses.replace(toy.args, online_env="Toy-v0"))
    if "reset or step" in message:  # that can come later, too
        with pytest.raises(InputError, match=f"^Toy-v0{re.escape(message)}[^\n]*$"):
            toy.env.step(np.zeros(2, np.float32))


@pytest.mark.parametrize("message, columns", [
    ("actions of Discrete(3) are not supported", dict(action_space=gym.spaces.Discrete(3))),
    ("must be one vector within finite bounds", dict(action_space=gym.spaces.Box(-np.inf, np.inf, (2,)))),
    ("must be one vector", dict(action_space=gym.spaces.Box(-1, 1, ()), actions=np.zeros(3))),
    ("observations of Tuple(", dict(observation_space=gym.spaces.Tuple([NARROW]), observations=(np.zeros((4, 2)),))),
    ("observations of Text(", dict(observation_space=gym.spaces.Text(5), observations=["a"] * 4)),
    ("images are for cal_ql_pixels.py", dict(observation_space=gym.spaces.Box(0, 255, (8, 8, 3), np.uint8),
                                             observations=np.zeros((4, 8, 8, 3), np.uint8))),
])  # fmt: skip
def test_spaces_that_are_not_supported(message, columns):
    with pytest.raises(InputError, match=f"^cannot use test/toy-v0: [^\n]*{re.escape(message)}") as refusal:
        open_toy(**columns)
    assert "damage" not in str(refusal.value) and "remove" not in str(refusal.value)


def test_what_else_a_good_dataset_may_have():
    """An id without a namespace; a render mode, which is dropped. A wrapper is refused: it would be the data's code."""
    assert open_toy(dataset_id="toy-v0").dataset.id == "toy-v0"
    assert open_toy(spec=make_spec("Toy-v0", render_mode="human")).env.unwrapped.render_mode is None
    with pytest.raises(
        InputError, match="^cannot make the environment test/toy-v0: .*the data name none to be had: --online-env, or "
    ):
        open_toy(spec=gym.wrappers.ClipAction(gym.make("Toy-v0")).spec)


def test_an_environment_need_not_take_a_render_mode(monkeypatch):
    monkeypatch.delattr(Toy, "__init__")
    open_toy()


# ---- Evaluation ------------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluate(toy, monkeypatch):
    """Plays the given episodes, lists of (reward, terminated, truncated, info); those before it are remembered."""
    progress = SimpleNamespace(rows=[], updates=7, env_steps=0, tells_success=None)

    def evaluate(*episodes, seed: int = 1) -> dict:
        sizes = dict(batch_size=2, num_actions=2, actor_layers=(4,), critic_layers=(4,))
        args = dataclasses.replace(toy.args, seed=seed, eval_episodes=len(episodes), device="cpu", **sizes)
        monkeypatch.setattr(Toy, "episodes", iter(episodes))
        row = script.evaluate(toy.env, script.Agent(10, 2, args), ReplayBuffer(toy.offline, args), progress, args)
        progress.rows.append(row)
        return row

    evaluate.progress = progress
    return evaluate


@pytest.mark.parametrize("told, scores", [(True, [(1 + 0) / 2, 0, 1]), (False, [(6 - 3) / 2, -3, -5])])
def test_one_rule_for_the_score_of_a_run(told, scores, evaluate):
    """Whether an info of the first evaluation tells success; then it counts, at its best, and where none tells 0."""
    row = evaluate()
    assert list(row) == "phase updates env_steps score return mean_q mean_mc_return bound_rate".split()
    assert math.isnan(row["score"]) and evaluate.progress.tells_success is None  # no episode decides nothing
    silent = [(-1, False, False, {})] * 3  # cut off by time
    infos = {}, {"is_success": True} if told else {}, {"is_success": False} if told else {}
    row = evaluate([(k + 1, False, False, info) for k, info in enumerate(infos)], silent)
    assert (row["score"], row["return"], row["phase"], row["updates"]) == (scores[0], (6 - 3) / 2, "offline", 7)
    evaluate.progress.env_steps = 5
    row = evaluate(silent)
    assert (row["score"], row["return"], row["phase"], row["env_steps"]) == (scores[1], -3, "online", 5)
    assert evaluate([(-5, True, False, {"success": 1})])["score"] == scores[2]


def test_every_episode_of_every_evaluation_has_a_seed_of_its_own(evaluate, monkeypatch):
    monkeypatch.setattr(Toy, "seeds", [])
    for seed in (1, 1, 2):
        evaluate([], [], [], seed=seed)
    evaluate.progress.rows.clear()
    evaluate([], [], [])
    assert len({*Toy.seeds[:9]}) == 9 and None not in Toy.seeds and Toy.seeds[9:] == Toy.seeds[:3]


# ---- Datasets that would run code ------------------------------------------------------------------------------------


def rewrite(source: str, target: str, datasets_path: Path, change) -> Path:
    """Copies a dataset under another id; change(metadata, env_spec) works on these dictionaries. Returns its files."""
    folder = datasets_path / target
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(datasets_path / source, folder)
    path = folder / "data" / "metadata.json"
    metadata = json.loads(path.read_text()) | {"dataset_id": target}
    spec = json.loads(metadata["env_spec"])
    change(metadata, spec)
    path.write_text(json.dumps(metadata | {"env_spec": metadata["env_spec"] and json.dumps(spec)}))
    return folder / "data"


WRAPPER = {"name": "Evil", "entry_point": "os:system", "kwargs": {"command": "touch pwned"}}
SPECIFICATIONS = {
    "entry point": dict(entry_point="os:system", kwargs={"command": "touch pwned"}),
    "entry point of an id that is not registered": dict(id="Evil-v0", entry_point="os:system"),
    "wrapper": dict(additional_wrappers=[WRAPPER]),
    "module in the id": dict(id="evil_module:AdroitHandDoor-v1"),
    "vector entry point": dict(vector_entry_point="os:system", kwargs={"command": "touch pwned"}),
    "argument": dict(kwargs={"vector_entry_point": "os:system", "additional_wrappers": [WRAPPER]}),
    "registered": dict(entry_point="os:system", vector_entry_point="os:system"),  # the registry's entry point counts
}


@pytest.mark.parametrize("case", SPECIFICATIONS)
@pytest.mark.parametrize("name", ["test/evil-v0", "door-binary"])
def test_a_dataset_runs_no_code(name, case, door, datasets_path, tmp_path, monkeypatch):
    """Not even a module is imported that the data name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil_module.py").write_text("open('pwned', 'w')")
    rewrite("D4RL/door/cloned-v2", "test/evil-v0", datasets_path, lambda _, spec: spec.update(SPECIFICATIONS[case]))
    if case == "registered":
        opened = open_task(name, datasets=("test/evil-v0",))
        assert type(opened.env.unwrapped).__name__ == "AdroitHandDoorEnv"
    else:
        with pytest.raises(InputError, match="^cannot make the environment |^cannot use test/evil-v0: "):
            open_task(name, datasets=("test/evil-v0",))
    assert not (tmp_path / "pwned").exists()


# ---- Spoiled and absent datasets -------------------------------------------------------------------------------------


def put(value):
    return lambda x: np.concatenate([x[:1], np.full_like(x[:1], value), x[2:]])


CHANGES = {
    "one entry less": lambda x: x[:-1], "[T, 1]": lambda x: x[:, None], "NaN": put(math.nan), "1e39": put(1e39),
    "width 1": lambda x: x[:, :1], "tenfold": lambda x: 10 * x,
}  # fmt: skip
# Of the second of three episodes, so that a look at the first alone does not find it.
SPOILED = [*itertools.product("observations actions rewards terminations infos/success".split(), [*CHANGES][:3])]
SPOILED += [("observations", "1e39"), ("rewards", "1e39"), ("actions", "width 1"), ("actions", "tenfold")]


@pytest.fixture(scope="module")
def sound():
    """A dataset of which nothing is wrong, neither as it is nor as Adroit's."""
    episodes = [make_adroit_episode([0, 0, 1, 0, 1]) for _ in range(3)]
    write_dataset("test/sound-v0", episodes, make_spec("AdroitHandDoor-v1"))
    assert {len(load_data(make_args(name, "--datasets", "test/sound-v0"))[2]) for name in ("a-v0", "door-binary")} == {
        3
    }


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("column, change", SPOILED)
def test_spoiled_columns_are_refused(column, change, sound, datasets_path):
    data = rewrite("test/sound-v0", "test/spoiled-v0", datasets_path, lambda *_: None)
    with h5py.File(data / "main_data.hdf5", "a") as file:
        values = file[f"episode_1/{column}"][()].astype(float)
        del file[f"episode_1/{column}"]
        file[f"episode_1/{column}"] = CHANGES[change](values)
    env_id = "door-binary" if column == "infos/success" else "test/spoiled-v0"
    with pytest.raises(InputError, match="^cannot use test/spoiled-v0: [^\n]+$"):
        load_data(make_args(env_id, datasets=("test/spoiled-v0",)))


METADATA_SPOILED = {
    "no maze": lambda metadata, spec: spec["kwargs"].pop("maze_map"),
    "unknown argument": lambda metadata, spec: spec["kwargs"].update(gravity=3),
    "another environment": lambda metadata, spec: spec.update(id="FrankaKitchen-v1", kwargs={}),
    "no environment": lambda metadata, spec: metadata.update(env_spec=None),
    "other actions": lambda metadata, spec: metadata.update(action_space=metadata["observation_space"]),
    "other observations": lambda metadata, spec: metadata.update(observation_space=metadata["action_space"]),
    "more episodes than there are": lambda metadata, spec: metadata.update(total_episodes=9),
}


@pytest.mark.parametrize("change", METADATA_SPOILED.values(), ids=METADATA_SPOILED)
@pytest.mark.parametrize("ant", ["antmaze-umaze"], indirect=True)
def test_spoiled_metadata_is_refused(change, ant, datasets_path):
    rewrite(ant.task.datasets[0], "test/spoiled-v0", datasets_path, change)
    with pytest.raises(InputError, match="^cannot [^\n]+$"):
        open_task("antmaze-umaze", datasets=("test/spoiled-v0",))


@pytest.mark.parametrize("name, size", [("metadata.json", 1), ("main_data.hdf5", 3000), ("main_data.hdf5", 0)])
def test_damaged_files_are_refused(name, size, sound, datasets_path):
    os.truncate(rewrite("test/sound-v0", "test/spoiled-v0", datasets_path, lambda *_: None) / name, size)
    with pytest.raises(InputError, match="^cannot use test/spoiled-v0: "):
        load_data(make_args("test/spoiled-v0"))


@pytest.mark.parametrize("dataset_id", ["D4RL/antmaze/none-v1", "cal-ql/pick-place/none-v0"])
def test_an_absent_dataset_is_named_at_once(dataset_id, monkeypatch, capsys, datasets_path):
    """Before a download begins, that takes its time to fail; ours names its collector and tries none."""

    def load_dataset(name, download):
        assert (name, download) == (dataset_id, name.startswith("D4RL/"))
        assert capsys.readouterr().out == f"data: {dataset_id}\n"
        raise ConnectionError("no network")

    monkeypatch.setattr(minari, "load_dataset", load_dataset)
    hint = r"cal-ql/... needs `collect`, others a network; the tasks are antmaze-umaze, [^\n]*; "
    with pytest.raises(InputError, match=rf"^cannot use {dataset_id}: {hint}ConnectionError: no network\.$"):
        load_data(make_args(dataset_id))


@pytest.mark.parametrize("name", ["antmaze", "../up-v0", "a/../b-v0", "", "/etc-v0", "a b/c-v0", "antmaze-large-dive"])
def test_unknown_tasks_are_refused(name):
    with pytest.raises(InputError, match=f"^cannot use {name}: .*(antmaze-large-diverse|Malformed dataset ID)"):
        load_data(make_args(name))


# ---- Collectors ------------------------------------------------------------------------------------------------------

NARROW_ID = "cal-ql/pick-place/narrow-v0"


def collect(monkeypatch, *flags: str) -> int:
    monkeypatch.setattr("sys.argv", ["collect", *flags])
    return pick_place.main()


@pytest.fixture(scope="module")
def collected():
    with pytest.MonkeyPatch.context() as patch:
        assert collect(patch, "--episodes", "3") == 0


def test_another_dataset_of_the_same_name_is_not_taken_for_the_one_asked_for(collected, monkeypatch, capsys):
    assert collect(monkeypatch, "--episodes", "3") == 0 and "exists already" in capsys.readouterr().out
    for flags in ([], ["--episodes", "3", "--noise", "0.1"], ["--episodes", "3", "--seed", "2"]):
        assert collect(monkeypatch, *flags) == 2
        assert "(3 episodes, scripted, action noise 0.4, seed 1)" in capsys.readouterr().err


def test_collector_writes_what_it_promises(collected):
    dataset = minari.load_dataset(NARROW_ID)
    assert len(dataset) == 3
    for episode in dataset:
        assert len(episode.rewards) <= 40 and np.abs(episode.actions).max() <= 1
        assert episode.infos["success"].tolist() == [False, *episode.terminations]
        assert np.array_equal(episode.rewards, episode.terminations)  # the reward is 1 on success, which ends it
        assert bool(episode.truncations[-1]) != bool(episode.terminations[-1])
    assert dataset.env_spec.entry_point.startswith("collect.pick_place:")  # wherever the collector was started
    env = dataset.recover_environment()
    assert env.spec.max_episode_steps == 40
    seed = next(dataset.storage.get_episode_metadata([0]))["seed"]
    state = env.reset(seed=seed)[0]  # the recovered environment is the one that the data came from
    assert state.shape == (11,) and np.array_equal(state, dataset[0].observations[0])
    check_starts(open_task("pick-place").env)


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
        assert make is pick_place.make_camera_env or np.abs(used).max() < 2  # unit scale
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


@pytest.mark.parametrize("noise, low, high", [(0, 0.9, 1), (pick_place.Args().noise, 0.4, 0.7)])
def test_demonstrations_succeed_without_noise_and_about_half_of_the_noisy_ones(noise, low, high):
    env = gym.make(pick_place.STATE_SPEC)
    demonstrations = [pick_place.demonstrate(env, noise, 100_000 + k) for k in range(40 if noise else 10)]
    assert low <= np.mean([demonstration["success"].any() for demonstration in demonstrations]) <= high


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
        assert collect(patch, *flags, "cal-ql/pick-place/stopped-v0") == 130
        assert "goes on" in capsys.readouterr().err and len(list(folder.glob(".stopped*/*.npz"))) == 2
        seeds.clear()
        assert collect(patch, *flags, "cal-ql/pick-place/stopped-v0") == 0
        assert collect(patch, *flags[:-2], "--dataset-id", "cal-ql/pick-place/stopped-v0") == 0  # is there and kept
    assert len(seeds) == 2 and not list(folder.glob(".stopped*")) and "--overwrite" in capsys.readouterr().out
    assert collect(monkeypatch, *flags, "cal-ql/pick-place/whole-v0") == 0
    stopped, whole = (minari.load_dataset(f"cal-ql/pick-place/{name}-v0") for name in ("stopped", "whole"))
    for ours, theirs in zip(stopped, whole, strict=True):
        assert ours.observations.dtype == (np.uint8 if "--camera" in flags else np.float64)
        for column in ("observations", "actions", "rewards", "terminations", "truncations"):
            assert np.array_equal(getattr(ours, column), getattr(theirs, column))
    env = whole.recover_environment()  # draws what is in the data
    seed = next(whole.storage.get_episode_metadata([0]))["seed"]
    assert np.array_equal(env.reset(seed=seed)[0], whole[0].observations[0])


def test_collecting_without_gl_names_the_packages(monkeypatch, capsys):
    def fail(spec):
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    monkeypatch.setattr(pick_place.gym, "make", fail)
    assert collect(monkeypatch, "--camera", "--dataset-id", "cal-ql/pick-place/undrawn-v0") == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: cannot draw") and "libegl1 libegl-mesa0 libgl1-mesa-dri" in errors


@pytest.mark.parametrize("flags", [
    "--episodes 0", "--seed -1", "--noise -1", "--noise nan", "--dataset-id cal-ql", "--dataset-id ../else-v0",
    "--dataset-id cal-ql/pick-place/unnumbered", "--dataset-id /cal-ql/away-v0",
])  # fmt: skip
def test_collecting_refuses_bad_input(flags, collected, monkeypatch, capsys):
    assert collect(monkeypatch, *flags.split()) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert NARROW_ID in minari.list_local_datasets()


def test_a_stopped_collection_is_not_mixed_with_another_view():
    kinds = itertools.product((False, True), (1, 2), (0.3, 0.4))
    parts = {pick_place.Args(c, "a-v0", seed=s, noise=n).parts for c, s, n in kinds}
    assert len(parts) == 8
