"""Mazes that are collected here: schema, control step, starts and goals, the environment that a run makes of them."""

import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest

import cal_ql_continuous as script
from collect import ant_maze, point_maze


@pytest.fixture(params=[5, 10])
def dataset(request, tmp_path, monkeypatch) -> tuple[int, minari.MinariDataset]:
    """Two episodes of 60 steps, collected as the script collects them, with gymnasium's control step or D4RL's."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    make_spec = ant_maze.make_spec

    def make_short_spec(task, frame_skip):
        spec = make_spec(task, frame_skip)
        spec.max_episode_steps = 60
        return spec

    monkeypatch.setattr(ant_maze, "make_spec", make_short_spec)
    args = ant_maze.Args("umaze", episodes=2, frame_skip=request.param, workers=1)
    return request.param, ant_maze.collect(args)


def test_a_run_plays_with_the_step_of_its_data(dataset):
    """By `--datasets`, under a name of its own: nothing poses as D4RL's data."""
    frame_skip, data = dataset
    assert data.id == "cal-ql/antmaze/umaze-v0" and minari.list_local_datasets().keys() == {data.id}
    args, _ = script.parse_args(["--env-id", "antmaze-umaze", "--datasets", data.id])
    task = script.TASKS["antmaze-umaze"]
    episodes = [script.to_episode(episode, data, task) for episode in data]
    assert [len(episode.rewards) for episode in episodes] == [60, 60] and episodes[0].observations.shape == (61, 29)
    env = script.make_env(minari.load_dataset(args.datasets[0]), task, args)
    assert env.unwrapped.ant_env.dt == pytest.approx(0.01 * frame_skip)
    starts = [env.reset(seed=seed)[0] for seed in (1, 2, 1)]
    assert np.abs(starts[0] - starts[1]).max() > 0.05 and np.array_equal(starts[0], starts[2])


def test_the_box_is_that_of_the_walker_and_the_schema_the_hosted_one(dataset):
    _, data = dataset
    assert data.action_space == gym.spaces.Box(-0.2, 0.2, (8,), np.float32)
    first, second = data.iterate_episodes()
    assert {key: values.shape for key, values in first.observations.items()} == {
        "observation": (61, 27), "achieved_goal": (61, 2), "desired_goal": (61, 2)
    }  # fmt: skip
    assert first.observations["observation"].dtype == np.float64 and not np.array_equal(first.actions, second.actions)
    assert np.abs(first.actions).max() <= 0.2 and np.abs(first.actions).max() > 0.15
    assert not first.terminations.any() and first.truncations.tolist() == 59 * [False] + [True]


def test_another_dataset_of_the_same_name_is_not_taken_for_the_one_asked_for(dataset, monkeypatch, capsys):
    step = ["--episodes", "2", "--frame-skip", str(dataset[0])]
    monkeypatch.setattr("sys.argv", ["ant_maze", "umaze", *step])
    assert ant_maze.main() == 0 and "exists already" in capsys.readouterr().out
    for flags in ([], [*step, "--noise", "0.1"], [*step, "--seed", "2"], [*step[:3], str(15 - dataset[0])]):
        monkeypatch.setattr("sys.argv", ["ant_maze", "umaze", *flags])
        assert ant_maze.main() == 2 and f"noise 0.2, frame skip {dataset[0]}, seed 1" in capsys.readouterr().err


def test_a_longer_step_walks_as_far_in_fewer_steps():
    """The walker covers more ground in a step of 0.1 s than in one of 0.05 s."""
    walked = []
    for frame_skip in (5, 10):
        env = gym.make(ant_maze.make_spec("umaze", frame_skip), max_episode_steps=100)
        walker = ant_maze.Walker(env.unwrapped.maze, 0.0, np.random.default_rng(0))
        observation, _ = env.reset(seed=0)
        path = [observation["achieved_goal"]]
        for _ in range(100):
            observation, *_ = env.step(walker(observation))
            path.append(observation["achieved_goal"])
        walked.append(np.linalg.norm(np.diff(path, axis=0), axis=1).sum())
    assert walked[1] > 1.4 * walked[0]


@pytest.mark.parametrize("flags", [["--frame-skip", "0"], ["--episodes", "-1"], ["--noise", "nan"], ["--workers", "0"]])
def test_nonsense_is_refused_in_one_sentence(flags, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ant_maze", "umaze", *flags])
    assert ant_maze.main() == 2
    assert capsys.readouterr().err.count("\n") == 1


# --- Point mazes ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("maze, cells, reach", [("Medium", 26, 10), ("Large", 46, 18)])
def test_point_maze_starts_anywhere_and_has_one_goal(maze, cells, reach):
    env = gym.make(f"cal-ql/PointMaze{maze}-v0")
    board, goal = env.unwrapped.maze, point_maze.MAZES[maze][1]
    towards, starts = point_maze.next_cells(board.maze_map, goal), []
    for seed in range(400):
        state, info = env.reset(seed=seed)
        np.testing.assert_array_equal(state["desired_goal"], board.cell_rowcol_to_xy(goal))
        assert not info["success"]
        starts.append(tuple(board.cell_xy_to_rowcol(state["achieved_goal"])))
    assert len(towards) == cells and {*starts} == {*towards} - {goal}  # every free cell but the goal's
    assert np.unique(starts, axis=0, return_counts=True)[1].max() < 3 * 400 / cells
    again = env.reset(seed=399)[0]["observation"]
    np.testing.assert_array_equal(again, state["observation"])
    steps, cell = 0, max(towards, key=lambda cell: distance(towards, cell, goal))
    assert distance(towards, cell, goal) == reach
    state, done = env.reset(seed=starts.index(cell))[0], False
    while not done:  # the controller walks the longest way within the time limit
        position, velocity = np.split(state["observation"], 2)
        waypoint = board.cell_rowcol_to_xy(towards[tuple(board.cell_xy_to_rowcol(position))])
        state, reward, terminated, truncated, info = env.step(point_maze.control(position, velocity, waypoint))
        far = np.linalg.norm(state["achieved_goal"] - state["desired_goal"])
        assert reward == info["success"] == terminated == (far <= 0.45)
        done, steps = terminated or truncated, steps + 1
    assert terminated and steps < 50


@pytest.mark.parametrize("size, goal", [("medium", (2.5, -2.5)), ("large", (3.5, -3.0))])
def test_point_maze_is_relabelled_to_its_goal(size, goal, tmp_path, monkeypatch):
    """By positions, as AntMaze; the task's environment is that goal's, whatever else the data's kwargs say."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    data = point_maze.collect(point_maze.Args(size, episodes=40))
    args, _ = script.parse_args(["--env-id", f"point-maze-{size}"])
    task, dataset, offline = script.load_data(args)
    arrived = [np.linalg.norm(batch.next_observations[:, :2] - goal, axis=1) <= 0.45 for batch in offline]
    assert len(offline) == 40 and 0 < np.concatenate(arrived).mean() < 0.2
    for batch, at_goal, episode in zip(offline, arrived, data, strict=True):
        assert batch.observations.shape == (100, 4)  # position and velocity
        np.testing.assert_array_equal(batch.observations, episode.observations["observation"][:-1].astype(np.float32))
        np.testing.assert_array_equal(batch.terminations, at_goal)
        np.testing.assert_array_equal(at_goal, episode.infos["success"][1:])
        np.testing.assert_array_equal(batch.rewards, 10 * at_goal.astype(np.float32) - 5)
    env = script.make_env(dataset, task, args)
    assert env.unwrapped.goal.tolist() == list(goal) and env.spec.max_episode_steps == 100 and env.unwrapped.hold == 10
    assert not env.unwrapped.continuing_task and env.reset(seed=3)[0].shape == (4,)


def distance(towards: dict, cell: tuple, goal: tuple) -> int:
    return 0 if cell == goal else 1 + distance(towards, towards[cell], goal)


def test_an_action_is_held_for_ten_steps_or_to_the_goal():
    env = gym.make("cal-ql/PointMazeLarge-v0")
    env.reset(seed=0)
    before = env.unwrapped.data.time
    env.step(np.zeros(2))
    assert env.unwrapped.data.time - before == pytest.approx(10 * env.unwrapped.model.opt.timestep)
    env, cell, seed = gym.make("cal-ql/PointMazeMedium-v0", hold=1000), (), 0
    while cell != (6, 5):  # beside the goal, which the mass would run through
        state, seed = env.reset(seed=seed)[0], seed + 1
        cell = tuple(env.unwrapped.maze.cell_xy_to_rowcol(state["achieved_goal"]))
    state, _, terminated, _, _ = env.step(state["desired_goal"] - state["achieved_goal"])
    assert terminated and np.linalg.norm(state["achieved_goal"] - state["desired_goal"]) > 0.4


def test_play_data_are_the_same_with_and_without_clipping(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    large, third, free = (
        point_maze.collect(point_maze.Args(name, episodes=2, clip=clip))
        for name, clip in (("large", True), ("large-third", True), ("large", False))
    )
    assert minari.list_local_datasets().keys() == {f"cal-ql/point-maze/{name}-v0" for name in (
        "large", "large-third", "large-unclipped")}  # fmt: skip
    for a, b, c in zip(large, third, free, strict=True):
        np.testing.assert_array_equal(a.observations["observation"], b.observations["observation"])
        np.testing.assert_array_equal(a.observations["observation"], c.observations["observation"])
        np.testing.assert_array_equal(a.actions, c.actions.clip(-1, 1))
        assert len(a.rewards) == 100 and np.abs(a.actions).max() == 1 < np.abs(c.actions).max()
        assert not a.terminations.any() and np.array_equal(a.rewards, a.infos["success"][1:])
    assert large.action_space.high.tolist() == [1, 1]
    assert free.action_space.high[0] == max(np.abs(episode.actions).max() for episode in free)
    map_ = np.array(large.env_spec.kwargs["maze_map"])
    assert map_[7, 9] == "g" and large.env_spec.id == "cal-ql/PointMazeLarge-v0"
    monkeypatch.setattr("sys.argv", ["point_maze", "large", "--episodes", "2"])
    assert point_maze.main() == 0 and "exists already" in capsys.readouterr().out
    for flags in (["--episodes", "1"], [], ["--episodes", "2", "--noise", "0.1"], ["--episodes", "2", "--seed", "2"]):
        monkeypatch.setattr("sys.argv", ["point_maze", "large", *flags])
        assert point_maze.main() == 2 and "other settings (2 episodes, waypoints, action noise 0.5, seed 1)" in (
            capsys.readouterr().err)  # fmt: skip
    monkeypatch.setattr("sys.argv", ["point_maze", "large", "--noise", "-1"])
    assert point_maze.main() == 2


@pytest.mark.parametrize("command", ["pick_place", "point_maze large-third", "ant_maze umaze --workers 1"])
def test_collecting_says_nothing_where_nothing_is_wrong(command, tmp_path, monkeypatch):
    """No notice of Gymnasium or Minari, no environment registered twice."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    module, *flags = command.split()
    command = [sys.executable, "-m", f"collect.{module}", *flags, "--episodes", "1"]
    process = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert process.returncode == 0 and process.stderr == "" and process.stdout.count("\n") == 1, process.stderr
