"""From Minari's episodes and environments to the paper's tasks, on tiny datasets in the hosted ones' schemas."""

import copy
import itertools
import os
import subprocess
import sys
from types import SimpleNamespace

import gymnasium as gym
import gymnasium_robotics
import minari
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium_robotics.envs.franka_kitchen.kitchen_env import OBS_ELEMENT_GOALS, OBS_ELEMENT_INDICES
from minari.data_collector import EpisodeBuffer

import cal_ql_continuous
from cal_ql_continuous import TASKS, ReplayBuffer, load_episodes, main, make_env, open_dataset, parse_args, roll_out
from collect import pick_place, point_maze

gym.register_envs(gymnasium_robotics)
rng = np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def datasets_path(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("minari")))
        yield


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
    task, args = TASKS[name], parse_args(["--env-id", name, "--buffer-size", "50", "--device", "cpu"])
    datasets = [open_dataset(dataset_id) for dataset_id in task.datasets]
    return task, datasets, make_env(datasets[-1], task, args.episode_length), args


def play(env: gym.Env, task, moves: dict):
    """Rolls out an actor that sends zeros and, before its n-th step, calls moves[n] with the simulation."""
    steps = itertools.count()

    def act(state, generator):
        moves.get(next(steps), lambda simulation: None)(env.unwrapped)
        return np.zeros(env.action_space.shape, np.float32)

    return roll_out(env, task, SimpleNamespace(act=act), 1, False, lambda: None)


# ---- AntMaze ---------------------------------------------------------------------------------------------------------

# Environment id, position (x, y) of start and goal, time limit. A cell is 4 m wide, the maze's centre is at (0, 0).
ANTMAZE = {
    "antmaze-umaze": ("AntMaze_UMaze-v4", (-4, -4), (-4, 4), 700),
    "antmaze-umaze-diverse": ("AntMaze_UMaze-v4", (-4, 4), (-4, -4), 700),
    "antmaze-medium-play": ("AntMaze_Medium-v4", (-10, 10), (10, -10), 1000),
    "antmaze-medium-diverse": ("AntMaze_Medium_Diverse_GR-v4", (-10, 10), (6, -10), 1000),
    "antmaze-large-play": ("AntMaze_Large-v4", (-18, 12), (14, -12), 1000),
    "antmaze-large-diverse": ("AntMaze_Large_Diverse_GR-v4", (-18, 12), (14, -12), 1000),
}
# Which rows arrive at the goal, and their returns with gamma 0.99, scale 10 and bias -5, by hand.
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
        actions=rng.uniform(-1, 1, (count - 1, 8)).astype(np.float32), rewards=1.0 - np.array(arrivals),
        infos={"success": 1 - np.array([1, *arrivals])},
    )  # fmt: skip


@pytest.fixture(scope="module", params=ANTMAZE)
def ant(request):
    name = request.param
    env_id, start, goal, limit = ANTMAZE[name]
    maze = gym.spec(env_id).kwargs["maze_map"]
    spec = make_spec(env_id, maze_map=maze, continuing_task=True, reset_target=False)
    mirrored = make_spec(env_id, maze_map=[row[::-1] for row in maze])  # Minari's own evaluation maps are so for umaze
    episodes = [make_ant_episode(goal, arrivals) for arrivals in ARRIVALS]
    write_dataset(TASKS[name].datasets[0], episodes, spec, eval_env=mirrored)
    task, datasets, env, args = open_task(name)
    yield SimpleNamespace(task=task, datasets=datasets, env=env, args=args, maze=maze, start=start, goal=goal,
                          limit=limit, recorded=episodes)  # fmt: skip
    env.close()


def test_antmaze_is_relabelled_to_one_goal(ant):
    episodes = load_episodes(ant.datasets, ant.task, ant.env)
    for episode, arrivals, recorded in zip(episodes, ARRIVALS, ant.recorded, strict=True):
        # Rows go on after an arrival, and the one that arrives is the row whose next position is at the goal.
        assert episode.rewards.tolist() == list(arrivals)
        assert episode.terminations.tolist() == [bool(arrival) for arrival in arrivals]
        parts = recorded["observations"]
        expected = np.concatenate([parts["achieved_goal"], parts["observation"]], axis=1, dtype=np.float32)
        assert episode.observations.shape[1] == 29
        assert np.array_equal(episode.observations, expected)


def test_antmaze_returns_by_hand(ant):
    buffer = ReplayBuffer(load_episodes(ant.datasets, ant.task, ant.env), ant.args, True, torch.device("cpu"))
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
    assert env.spec.max_episode_steps == ant.limit

    def arrive(simulation):
        simulation.data.qpos[:2] = ant.goal

    episode, score = play(env, ant.task, {2: arrive})
    assert (episode.rewards.tolist(), episode.terminations.tolist(), score) == ([0, 0, 1], [False, False, True], 1.0)


# ---- Adroit ----------------------------------------------------------------------------------------------------------


def make_adroit_episode(success: list[int]) -> dict:
    """The infos' entries for success, one more than rows; dense rewards that must not survive."""
    count = len(success)
    return dict(
        observations=rng.normal(size=(count, 39)), actions=rng.uniform(-1, 1, (count - 1, 28)).astype(np.float32),
        rewards=np.full(count - 1, 7.0), infos={"success": np.array(success, bool)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def door():
    # The hosted data's time limit is not the task's, which has 200 steps.
    spec = make_spec("AdroitHandDoor-v1", 300, reward_type="dense")
    human = [make_adroit_episode(success) for success in ([0, 0, 1, 0, 1, 0, 0], [1, 0, 0, 0])]
    cloned = [make_adroit_episode(success) for success in ([0, 0, 0], [0, 0, 0, 1])]
    human[0]["actions"][[0, 1, 3], [5, 0, 27]] = 1.2, -1.5, 1.001
    human[0]["actions"][5, 3] = human[1]["actions"][0, 0] = 3.0  # in rows that are dropped: not to be counted
    human[0]["actions"][2, 2] = 1.0  # on the edge: moved inwards, but inside of the box
    write_dataset("D4RL/door/human-v2", human, spec)
    write_dataset("D4RL/door/cloned-v2", cloned, spec)
    task, datasets, env, args = open_task("door-binary")
    yield SimpleNamespace(task=task, datasets=datasets, env=env, args=args, human=human, cloned=cloned)
    env.close()


def test_adroit_keeps_what_succeeds_up_to_the_last_success(door, capsys):
    human, cloned = load_episodes(door.datasets, door.task, door.env)  # one episode of each survives
    assert human.rewards.tolist() == [0, 1, 0, 1]  # row t succeeded if the info's entry t + 1 says so
    assert human.terminations.tolist() == [False, True, False, True]
    assert np.array_equal(human.observations, door.human[0]["observations"][:5].astype(np.float32))
    np.testing.assert_allclose(human.actions, door.human[0]["actions"][:4].clip(-0.99999, 0.99999), atol=1e-7)
    assert cloned.rewards.tolist() == [0, 0, 1]
    assert np.array_equal(cloned.observations, door.cloned[1]["observations"].astype(np.float32))
    printed = capsys.readouterr().out
    assert f"3 of {7 * 28} action entries" in printed
    assert "2 episodes, 7 steps" in printed


def test_adroit_environment_is_binary(door):
    def push_open(simulation):
        simulation.data.qpos[simulation.door_hinge_addrs] = 1.5

    episode, score = play(door.env, door.task, {2: push_open})
    assert (episode.rewards.tolist(), episode.terminations.tolist(), score) == ([0, 0, 1], [False, False, True], 1.0)
    assert door.env.spec.max_episode_steps == 200


def test_adroit_without_any_success_is_refused(door):
    write_dataset("test/failures-v0", [make_adroit_episode([1, 0, 0])], make_spec("AdroitHandDoor-v1"))
    with pytest.raises(cal_ql_continuous.InputError, match="no usable episode"):
        load_episodes([open_dataset("test/failures-v0")], door.task, door.env)


@pytest.mark.parametrize("name, limit", [("pen-binary", 100), ("door-binary", 200), ("relocate-binary", 200)])
def test_adroit_time_limits(name, limit):
    assert parse_args(["--env-id", name]).episode_length == limit


# ---- Kitchen ---------------------------------------------------------------------------------------------------------

KITCHEN = {
    "kitchen-complete": ["microwave", "kettle", "light switch", "slide cabinet"],
    "kitchen-mixed": ["microwave", "kettle", "bottom burner", "light switch"],
}


@pytest.fixture(scope="module", params=KITCHEN)
def kitchen(request):
    name, goals = request.param, KITCHEN[request.param]
    spec = make_spec("FrankaKitchen-v1", 450, tasks_to_complete=goals, remove_task_when_completed=False,
                     terminate_on_tasks_completed=False)  # fmt: skip
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
    episode, score = play(env, kitchen.task, {1: put(first), 2: put(first, last), 3: shut})
    assert episode.rewards[:4].tolist() == [0, 1, 2, 1]  # counts what is done now ...
    assert score == 2 / 4  # ... while the score counts what was ever done
    assert len(episode.rewards) == 6 and not episode.terminations.any()
    assert play(env, kitchen.task, {})[1] == 0  # the environment's list of what was done is cleared
    env.close()


# ---- PointMaze, and any other dataset --------------------------------------------------------------------------------


class Toy(gym.Env):
    """Nested observations, an action box of its own, reward 1 a step, never an end; keeps the actions it is given."""

    observation_space = gym.spaces.Dict({
        "z": gym.spaces.Box(-9, 9, (2, 3), np.float64),
        "a": gym.spaces.Dict({"y": gym.spaces.Box(-9, 9, (2,)), "b": gym.spaces.Box(0, 255, (2,), np.uint8)}),
    })  # fmt: skip
    action_space = gym.spaces.Box(np.array([0, -4], np.float32), np.array([10, 4], np.float32))

    observation = {"a": {"y": np.array([1, 2], np.float32), "b": np.array([3, 200], np.uint8)}, "z": np.eye(2, 3)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.received = []
        return self.observation, {}

    def step(self, action):
        self.received.append(action.tolist())
        return self.observation, 1.0, False, False, {}


TOY = EnvSpec("Toy-v0", entry_point=f"{__name__}:Toy", max_episode_steps=3)


@pytest.fixture(scope="module")
def toy():
    samples = [Toy.observation_space.sample() for _ in range(4)]
    observations = {"z": np.stack([sample["z"] for sample in samples])}
    observations["a"] = {key: np.stack([sample["a"][key] for sample in samples]) for key in ("y", "b")}
    actions = np.array([[5, 4], [2.5, -2], [0, 0]], np.float32)
    write_dataset("test/toy-v0", [dict(observations=observations, actions=actions, rewards=[1.0, 2.0, 3.0])], TOY)
    task = cal_ql_continuous.find_task("test/toy-v0")
    dataset = open_dataset("test/toy-v0")
    env = make_env(dataset, task, 0)
    return SimpleNamespace(task=task, datasets=[dataset], env=env, samples=samples)


def test_any_other_dataset_is_flattened_in_gymnasiums_order(toy):
    (episode,) = load_episodes(toy.datasets, toy.task, toy.env)
    expected = [gym.spaces.utils.flatten(Toy.observation_space, sample) for sample in toy.samples]
    assert np.array_equal(episode.observations, np.array(expected, np.float32))
    expected = gym.spaces.utils.flatten(Toy.observation_space, Toy.observation)
    assert np.array_equal(toy.env.reset(seed=1)[0], expected.astype(np.float32))


def test_actions_are_rescaled_to_the_unit_box_and_back(toy):
    (episode,) = load_episodes(toy.datasets, toy.task, toy.env)
    np.testing.assert_allclose(episode.actions, [[0, 0.99999], [-0.5, -0.5], [-0.99999, 0]], atol=1e-7)
    actor = SimpleNamespace(act=lambda state, generator: np.array([0.5, -1], np.float32))
    roll_out(toy.env, toy.task, actor, 1, False, lambda: None)
    np.testing.assert_allclose(toy.env.unwrapped.received, 3 * [[7.5, -4]], atol=1e-4)


def test_any_other_run_has_no_tail_no_termination_and_scores_by_return(toy, tmp_path, monkeypatch):
    buffers = []

    class KeptBuffer(ReplayBuffer):
        def __init__(self, *args):
            super().__init__(*args)
            buffers.append(self)

    monkeypatch.setattr(cal_ql_continuous, "ReplayBuffer", KeptBuffer)
    flags = """--env-id test/toy-v0 --actor-layers 8 --critic-layers 8 --batch-size 8 --num-actions 2 --device cpu
    --eval-episodes 2 --offline-steps 0 --online-steps 3 --buffer-size 50 --runs-dir""".split()
    assert main([*flags, str(tmp_path)]) == 0
    # Three offline rows with rewards 1, 2, 3, and three online rows of 1; both were cut off by time.
    returns = [1 + 0.99 * (2 + 0.99 * 3), 2 + 0.99 * 3, 3, 1 + 0.99 * 1.99, 1.99, 1]
    assert buffers[0].columns.mc_returns[:6].tolist() == pytest.approx(returns)
    assert buffers[0].num_online == 3
    assert not buffers[0].columns.terminations[:6].any()
    (table,) = tmp_path.glob("*/eval.csv")
    columns, *rows = [line.split(",") for line in table.read_text().split()]
    for row in rows:
        row = dict(zip(columns, row, strict=True))
        assert (row["score"], row["return"], row["regret"]) == ("3.0", "3.0", "nan")


def test_pointmaze_state_is_the_observation_alone(collected):
    task, datasets, env, _ = open_task("pointmaze-narrow")
    for episode, data in zip(load_episodes(datasets, task, env), datasets[0], strict=True):
        assert np.array_equal(episode.observations, data.observations["observation"].astype(np.float32))
        assert np.array_equal(episode.terminations, data.terminations)
    assert env.reset(seed=1)[0].shape == (4,)


def test_an_end_by_time_limit_is_no_termination(collected):
    env = make_env(open_dataset("cal-ql/pointmaze/narrow-v0"), TASKS["pointmaze-narrow"], 7)
    episode, score = play(env, TASKS["pointmaze-narrow"], {})
    assert len(episode.rewards) == 7 and len(episode.observations) == 8
    assert not episode.terminations.any() and score == 0


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
    demonstrations = [pick_place.demonstrate(env, pick_place.Args().noise, 100_000 + k) for k in range(60)]
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
    parts = {pick_place.Args(dataset_id="a-v0", camera=camera, seed=seed, noise=noise).parts
             for camera in (False, True) for seed in (1, 2) for noise in (0.3, 0.4)}
    assert len(parts) == 8
