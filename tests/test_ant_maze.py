"""AntMaze data that are collected here: schema, control step, and the environment that a run makes of them."""

import gymnasium as gym
import minari
import numpy as np
import pytest

import cal_ql_continuous as script
from collect import ant_maze


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
    frame_skip, data = dataset
    task = script.find_task("antmaze-umaze")
    opened = script.open_dataset(data.id)
    env = script.make_env(opened, task, 0)
    assert env.unwrapped.ant_env.dt == pytest.approx(0.01 * frame_skip)
    episodes = script.load_episodes([opened], task, env)
    assert [len(episode.rewards) for episode in episodes] == [60, 60] and episodes[0].observations.shape == (61, 29)
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
