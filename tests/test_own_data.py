"""collect/from_arrays.py: what becomes of arrays, of robomimic's and D4RL's files, bad input, the page."""

import json
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest

from collect import from_arrays

ROOT = Path(__file__).parents[1]
LENGTHS = (3, 5, 4)  # the first and the last terminate with a success, the second is cut off


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path


def make_columns(obs_dim: int = 3, action_dim: int = 2) -> dict[str, np.ndarray]:
    rng, steps = np.random.default_rng(0), sum(LENGTHS)
    last = np.isin(np.arange(steps), np.cumsum(LENGTHS) - 1)
    first_and_last = last & (np.arange(steps) != np.cumsum(LENGTHS)[1] - 1)
    return {
        "observations": rng.standard_normal((steps, obs_dim)).astype(np.float32),
        "actions": rng.uniform(-0.5, 0.25, (steps, action_dim)).astype(np.float32),
        "rewards": first_and_last.astype(np.float64),
        "terminations": first_and_last,
        "truncations": last & ~first_and_last,
    }


def with_next(columns: dict) -> dict:
    """The same with next observations, which at the ends are 7s."""
    following = np.roll(columns["observations"], -1, axis=0)
    following[columns["terminations"] | columns["truncations"]] = 7
    return columns | {"next_observations": following}


def convert(folder: Path, columns: dict, *flags: str) -> list:
    """The dataset's episodes, by way of a file and the command line."""
    np.savez(folder / "steps.npz", **columns)
    assert from_arrays.main([str(folder / "steps.npz"), "--dataset-id", "mine/test-v0", *flags]) == 0
    return list(minari.load_dataset("mine/test-v0").iterate_episodes())


def test_arrays_with_next_observations_are_kept_to_the_last_step(folder):
    columns = with_next(make_columns())
    columns["infos/success"] = columns["terminations"]
    episodes = convert(folder, columns)
    starts = np.cumsum([0, *LENGTHS])
    for episode, start, end in zip(episodes, starts, starts[1:], strict=False):
        np.testing.assert_array_equal(episode.observations[:-1], columns["observations"][start:end])
        assert (episode.observations[-1] == 7).all()
        for name in ("actions", "rewards", "terminations", "truncations"):
            np.testing.assert_array_equal(getattr(episode, name), columns[name][start:end])
        assert not episode.infos["success"][0]  # of the reset
        np.testing.assert_array_equal(episode.infos["success"][1:], columns["terminations"][start:end])
    assert len(episodes) == 3


def test_without_them_a_cut_off_episode_loses_its_last_step(folder, capsys):
    columns = make_columns()
    first, second, third = convert(folder, columns)
    assert [len(each.rewards) for each in (first, second, third)] == [3, 4, 4]
    np.testing.assert_array_equal(second.observations, columns["observations"][3:8])  # T + 1 real states
    assert second.truncations.tolist() == [False] * 3 + [True] and not second.terminations.any()
    np.testing.assert_array_equal(first.observations[3], first.observations[2])  # of no use after a termination
    assert "1 steps left out" in capsys.readouterr().out


def test_cut_off_episode_of_one_step_is_left_out(folder):
    columns = make_columns()
    columns["truncations"][3] = True  # of the second episode's five steps the first is an episode of its own
    episodes = convert(folder, columns)
    assert [len(each.rewards) for each in episodes] == [3, 3, 4] and [each.id for each in episodes] == [0, 1, 2]


def test_unfinished_last_episode_is_cut_off(folder):
    columns = with_next(make_columns())
    columns["terminations"][-1] = False
    episodes = convert(folder, columns)
    assert len(episodes) == 3 and episodes[2].truncations[-1] and not episodes[2].terminations.any()


def test_box_is_the_one_that_the_actions_fill(folder, capsys):
    columns = with_next(make_columns())
    columns["actions"][:, 1] = 0.5  # never moves
    convert(folder, columns)
    box = minari.load_dataset("mine/test-v0").action_space
    assert box.low[0] == columns["actions"][:, 0].min() and box.high[0] == columns["actions"][:, 0].max()
    assert 0.49 < box.low[1] < 0.5 < box.high[1] < 0.51
    convert(folder, columns, "--box", "-1", "1", "--overwrite")
    box = minari.load_dataset("mine/test-v0").action_space
    assert box.low.tolist() == [-1, -1] and box.high.tolist() == [1, 1]
    assert "few actions use most of this box" in capsys.readouterr().out


def test_environment_is_checked_and_named(folder, capsys):
    columns = with_next(make_columns(obs_dim=11, action_dim=3))
    convert(folder, columns, "--env-id", "Hopper-v5")
    assert minari.load_dataset("mine/test-v0").env_spec.id == "Hopper-v5"
    assert "of the environment's own box" in capsys.readouterr().out
    assert "observes (11,) and the data (3,)" in refusal(folder, capsys, make_columns(), "--env-id", "Hopper-v5")
    assert "takes actions (3,)" in refusal(folder, capsys, make_columns(11), "--env-id", "Hopper-v5")
    assert "cannot be made" in refusal(folder, capsys, make_columns(), "--env-id", "Missing-v0")


def test_dictionary_observations_by_their_keys(folder):
    columns = make_columns()
    del columns["observations"]
    rng = np.random.default_rng(0)
    for key, size in (("achieved_goal", 2), ("desired_goal", 2), ("observation", 4)):
        columns[f"observations/{key}"] = rng.standard_normal((12, size))
    (first, *_) = convert(folder, columns, "--env-id", "PointMaze_UMaze-v3")
    np.testing.assert_array_equal(first.observations["observation"][:3], columns["observations/observation"][:3])
    assert isinstance(minari.load_dataset("mine/test-v0").observation_space, gym.spaces.Dict)


# ---- Files of others -------------------------------------------------------------------------------------------------
def test_d4rl_file_becomes_a_dataset_of_its_environment(folder):
    columns = make_columns(obs_dim=45, action_dim=24)
    with h5py.File(folder / "pen-human-v1.hdf5", "w") as file:
        for name, column in (("terminals", "terminations"), ("timeouts", "truncations")):
            file[name] = columns[column]
        for name in ("observations", "actions", "rewards"):
            file[name] = columns[name]
        file["infos/qpos"] = np.zeros((12, 30))
    flags = [str(folder / "pen-human-v1.hdf5"), "--dataset-id", "mine/pen-v0"]
    assert from_arrays.main(flags) == 0
    dataset = minari.load_dataset("mine/pen-v0")
    assert dataset.env_spec.id == "AdroitHandPen-v1" and dataset.total_episodes == 3 and dataset.total_steps == 11
    np.testing.assert_array_equal(dataset[2].rewards, columns["rewards"][8:])


def write_robomimic(path: Path, demos: int = 11, **changes) -> dict:
    """Demonstrations of two steps with a vector, a pose and an image; the last of all has no `done`."""
    rng, written = np.random.default_rng(0), {}
    with h5py.File(path, "w") as file:
        file.create_group("data").attrs["env_args"] = json.dumps({"env_name": "Lift"})
        for k in range(demos):
            states = {"object": rng.standard_normal((3, 4)), "eef": rng.standard_normal((3, 2)),
                      "image": np.zeros((3, 8, 8, 3), np.uint8)}  # fmt: skip
            demo = {f"obs/{key}": values[:2] for key, values in states.items()}
            demo |= {f"next_obs/{key}": values[1:] for key, values in states.items()}
            demo |= {"actions": rng.uniform(-1, 1, (2, 3)), "rewards": np.array([0.0, k < 10])}
            demo |= {"dones": np.array([0, k < 10])} | changes
            for name, values in demo.items():
                if values is not None:
                    file[f"data/demo_{k}/{name}"] = values
            written[k] = demo
    return written


def test_robomimic_file_keeps_its_demonstrations(folder, capsys):
    written = write_robomimic(folder / "demo.hdf5")
    assert from_arrays.main([str(folder / "demo.hdf5"), "--dataset-id", "mine/lift-v0"]) == 0
    assert "(left out: image)" in capsys.readouterr().out
    dataset = minari.load_dataset("mine/lift-v0")
    assert dataset.total_episodes == 11 and dataset.env_spec is None
    for k in (0, 9, 10):  # by number, not by letter: demo_10 is the last
        episode = dataset[k]
        np.testing.assert_allclose(episode.actions, written[k]["actions"], rtol=1e-6)
        np.testing.assert_array_equal(episode.observations["object"][1:], written[k]["next_obs/object"])
        assert set(episode.observations) == {"object", "eef"}
        assert bool(episode.terminations[-1]) is (k < 10) and bool(episode.truncations[-1]) is (k == 10)
    flags = [str(folder / "demo.hdf5"), "--dataset-id", "mine/lift-v0", "--overwrite", "--keys", "eef"]
    assert from_arrays.main(flags) == 0 and set(minari.load_dataset("mine/lift-v0")[0].observations) == {"eef"}
    assert from_arrays.main([*flags, "missing"]) == 2
    write_robomimic(folder / "raw.hdf5", rewards=None)
    assert from_arrays.main([str(folder / "raw.hdf5"), "--dataset-id", "mine/raw-v0"]) == 2
    assert "dataset_states_to_obs" in capsys.readouterr().err


# ---- Refusals --------------------------------------------------------------------------------------------------------
def refusal(folder: Path, capsys, columns: dict, *flags: str) -> str:
    """The one sentence; nothing is written."""
    capsys.readouterr()
    np.savez(folder / "bad.npz", **columns)
    assert from_arrays.main([str(folder / "bad.npz"), "--dataset-id", "mine/bad-v0", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "mine/bad-v0" not in minari.list_local_datasets()
    return line


def change(name: str, value) -> dict:
    """Next observations and all, with `value` for a column; a function is applied to it."""
    columns = with_next(make_columns())
    columns[name] = value(columns[name].copy()) if callable(value) else value
    return columns


def put(row: int, value: float):
    def putting(values: np.ndarray) -> np.ndarray:
        values = values.astype(float)
        values[row] = value
        return values

    return putting


@pytest.mark.parametrize("name, value, sentence", [
    ("actions", lambda values: values[:-1], "observations has 12 rows and actions 11|has 12 rows and actions 11"),
    ("rewards", lambda values: values[:5], "rewards has 5 rows and actions 12"),
    ("observations", put(4, np.nan), r"observations is nan in row 4: repair"),
    ("actions", put(7, np.inf), "actions is inf in row 7"),
    ("rewards", put(2, np.nan), "rewards is nan in row 2"),
    ("terminations", put(3, 2), r"terminations is 2.0 in row 3: it has to be 0 or 1"),
    ("actions", lambda values: values[:, 0], "actions is float32.12. *: it has to hold numbers, a vector a row"),
    ("rewards", lambda values: np.stack([values, values], 1), "rewards is float64.12, 2.: it has to hold numbers, one"),
    ("terminations", np.zeros(12, bool), "terminate after|no step has a termination"),
    ("next_observations", lambda values: values[:, :1], r"next_observations is {'': .12, 1.} and observations"),
    ("next_observations", lambda values: values[::-1], "the next observation of row 0 is not the observation of row 1"),
])  # fmt: skip
def test_bad_columns_are_named(folder, capsys, name, value, sentence):
    columns = change(name, value)
    if name == "terminations" and not np.any(columns[name]):
        columns["truncations"] = np.zeros(12, bool)
    assert re.search(sentence, refusal(folder, capsys, columns))


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "terminations", "truncations"])
def test_missing_column_is_named(folder, capsys, name):
    columns = make_columns()
    del columns[name]
    assert f"has no {name}, only" in refusal(folder, capsys, columns)


def test_terminations_that_are_timeouts(folder, capsys):
    """Four episodes of five steps that all end as terminated; a success there is no suspect."""
    last = np.tile([False] * 4 + [True], 4)
    columns = make_columns() | {"observations": np.zeros((20, 3)), "actions": np.linspace([-1, 0], [0, 1], 20)}
    columns |= {"rewards": np.zeros(20), "terminations": last, "truncations": np.zeros(20, bool)}
    assert "4 of 4 episodes terminate after 5 steps" in refusal(folder, capsys, columns)
    assert "no episode has this length; the longest has 5" in refusal(folder, capsys, columns, "--time-limit", "6")
    made = convert(folder, columns, "--time-limit", "5")
    assert not any(each.terminations.any() for each in made) and all(each.truncations[-1] for each in made)
    made = convert(folder, columns, "--true-ends", "--overwrite")
    assert all(each.terminations[-1] for each in made)
    made = convert(folder, columns | {"rewards": last.astype(float)}, "--overwrite")
    assert all(each.terminations[-1] for each in made)


def test_other_bad_input(folder, capsys):
    columns = with_next(make_columns())
    assert "leaves 100% of the actions outside" in refusal(folder, capsys, columns, "--box", "5", "6")
    assert "has to be above the first" in refusal(folder, capsys, columns, "--box", "1", "-1")
    (folder / "text.npz").write_text("text")
    (folder / "text.hdf5").write_text("text")
    for name in ("text.npz", "text.hdf5", "missing.npz"):
        assert from_arrays.main([str(folder / name), "--dataset-id", "mine/bad-v0"]) == 2
        assert capsys.readouterr().err.count("cannot be read") == 1
    assert from_arrays.main([str(folder / "bad.npz"), "--dataset-id", "../bad-v0"]) == 2


def test_dataset_that_exists_stays(folder, capsys):
    convert(folder, with_next(make_columns()))
    before = minari.load_dataset("mine/test-v0").total_steps
    convert(folder, make_columns())
    assert "exists already" in capsys.readouterr().out
    assert minari.load_dataset("mine/test-v0").total_steps == before


# ---- The page --------------------------------------------------------------------------------------------------------
def test_page_from_arrays_to_a_curve_runs_as_it_stands(folder):
    pytest.importorskip("rliable")
    page = (ROOT / "docs" / "own_data.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (commands,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    for name in ("collect", "tools", "cal_ql_continuous.py", "cql_continuous.py"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "runs").mkdir()
    (folder / "runs" / "make_arrays.py").write_text(program)
    commands = f'python() {{ "{sys.executable}" "$@"; }}\n{commands}'
    process = subprocess.run(["bash", "-e", "-c", commands], cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    assert "mine/maze-v0: 20 episodes, 6000 steps" in process.stdout
    assert (folder / "figures" / "curves.png").stat().st_size > 5000
