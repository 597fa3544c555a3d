"""collect/from_arrays.py: what becomes of arrays, of robomimic's and D4RL's files, bad input, the page."""

import re
import subprocess
import sys
from pathlib import Path

import h5py
import minari
import numpy as np
import pytest

from collect import from_arrays

ROOT = Path(__file__).parents[1]
PARTS = {"achieved_goal": 2, "desired_goal": 2, "observation": 4}  # of a point maze's observation


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path


def make_columns(obs_dim: int = 3, action_dim: int = 2) -> dict[str, np.ndarray]:
    """Three episodes of 3, 5 and 4 steps: the first and the last terminate with a success, the second is cut off."""
    rng, success = np.random.default_rng(0), np.isin(np.arange(12), (2, 11))
    return {
        "observations": rng.standard_normal((12, obs_dim)).astype(np.float32),
        "actions": rng.uniform(-0.5, 0.25, (12, action_dim)).astype(np.float32),
        "rewards": success.astype(np.float64),
        "terminations": success,
        "truncations": np.arange(12) == 7,
    }


def with_next(columns: dict) -> dict:
    """The same with next observations, which at the ends are 7s."""
    following = np.roll(columns["observations"], -1, axis=0)
    following[columns["terminations"] | columns["truncations"]] = 7
    return columns | {"next_observations": following}


def convert(folder: Path, columns: dict, *flags: str) -> list:
    np.savez(folder / "steps.npz", **columns)
    assert from_arrays.main([str(folder / "steps.npz"), "--dataset-id", "mine/test-v0", "--overwrite", *flags]) == 0
    return list(minari.load_dataset("mine/test-v0"))


def refusal(folder: Path, capsys, columns: dict, *flags: str) -> str:
    capsys.readouterr()
    np.savez(folder / "bad.npz", **columns)
    assert from_arrays.main([str(folder / "bad.npz"), "--dataset-id", "mine/bad-v0", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "mine/bad-v0" not in minari.list_local_datasets()
    return line


def lengths_of(episodes: list) -> list[int]:
    return [len(episode.rewards) for episode in episodes]


def terminated(episodes: list) -> list[bool]:
    assert all(episode.terminations[-1] != episode.truncations[-1] for episode in episodes)
    return [bool(episode.terminations[-1]) for episode in episodes]


def test_arrays_with_next_observations_are_kept_to_the_last_step(folder):
    columns = with_next(make_columns())
    columns["infos/success"] = columns["terminations"].copy()
    columns["terminations"][-1] = False  # an unfinished last episode is cut off
    episodes = convert(folder, columns)
    for episode, (start, end) in zip(episodes, [(0, 3), (3, 8), (8, 12)], strict=True):
        np.testing.assert_array_equal(episode.observations[:-1], columns["observations"][start:end])
        assert (episode.observations[-1] == 7).all()
        for name in ("actions", "rewards", "terminations"):
            np.testing.assert_array_equal(getattr(episode, name), columns[name][start:end])
        assert not episode.infos["success"][0]  # of the reset
        np.testing.assert_array_equal(episode.infos["success"][1:], columns["infos/success"][start:end])
    assert terminated(episodes) == [True, False, False]


def test_without_them_a_cut_off_episode_loses_its_last_step(folder, capsys):
    columns = make_columns()
    first, second, third = convert(folder, columns)
    assert lengths_of([first, second, third]) == [3, 4, 4] and terminated([first, second]) == [True, False]
    np.testing.assert_array_equal(second.observations, columns["observations"][3:8])  # T + 1 real states
    np.testing.assert_array_equal(first.observations[3], first.observations[2])  # of no use after a termination
    assert "1 steps left out" in capsys.readouterr().out
    columns["truncations"][3] = True  # now the second episode has one step, which is left out, and the third four
    episodes = convert(folder, columns)
    assert lengths_of(episodes) == [3, 3, 4] and [each.id for each in episodes] == [0, 1, 2]


def test_box_is_the_one_that_the_actions_fill(folder, capsys):
    columns = with_next(make_columns())
    columns["actions"][:, 1] = 0.5  # never moves
    convert(folder, columns)
    box = minari.load_dataset("mine/test-v0").action_space
    assert box.low[0] == columns["actions"][:, 0].min() and box.high[0] == columns["actions"][:, 0].max()
    assert 0.49 < box.low[1] < 0.5 < box.high[1] < 0.51
    convert(folder, columns, "--box", "-1", "1")
    box = minari.load_dataset("mine/test-v0").action_space
    assert box.low.tolist() == [-1, -1] and box.high.tolist() == [1, 1]
    assert "most of this box is empty" in capsys.readouterr().out


def test_environment_is_checked_and_named(folder, capsys):
    convert(folder, with_next(make_columns(obs_dim=11, action_dim=3)), "--env-id", "Hopper-v5")
    assert minari.load_dataset("mine/test-v0").env_spec.id == "Hopper-v5"
    printed = capsys.readouterr().out
    assert "of the environment's own box" in printed and "most of this box is empty" not in printed
    assert "observes (11,) and the data (3,)" in refusal(folder, capsys, make_columns(), "--env-id", "Hopper-v5")
    assert "takes actions (3,)" in refusal(folder, capsys, make_columns(11), "--env-id", "Hopper-v5")
    assert "cannot be made" in refusal(folder, capsys, make_columns(), "--env-id", "Missing-v0")
    columns = make_columns() | {f"observations/{key}": np.full((12, n), n) for key, n in PARTS.items()}
    del columns["observations"]
    (first, *_) = convert(folder, columns, "--env-id", "PointMaze_UMaze-v3")
    assert {key: values.tolist() for key, values in first.observations.items()} == {
        key: 4 * [n * [n]] for key, n in PARTS.items()
    }


# --- Files of others --------------------------------------------------------------------------------------------------
def test_d4rl_files_and_names(folder):
    columns = make_columns(obs_dim=45, action_dim=24)
    renamed = {"terminals": columns.pop("terminations"), "timeouts": columns.pop("truncations")} | columns
    with h5py.File(folder / "pen-human-v1.hdf5", "w") as file:
        for name, values in (renamed | {"infos/qpos": np.zeros((12, 30))}).items():
            file[name] = values
    assert from_arrays.main([str(folder / "pen-human-v1.hdf5"), "--dataset-id", "mine/pen-v0"]) == 0
    dataset = minari.load_dataset("mine/pen-v0")
    assert dataset.env_spec.id == "AdroitHandPen-v1" and lengths_of(dataset) == [3, 4, 4]
    np.testing.assert_array_equal(dataset[2].rewards, columns["rewards"][8:])
    assert lengths_of(convert(folder, renamed)) == [3, 4, 4]
    del renamed["timeouts"]  # terminals alone end episodes
    assert lengths_of(convert(folder, renamed)) == [3, 9]


def write_robomimic(path: Path, without: str = "") -> dict:
    """Eleven demonstrations of two steps with a vector, a pose and an image; the last of all has no `done`."""
    rng, written = np.random.default_rng(0), {}
    with h5py.File(path, "w") as file:
        for k in range(11):
            states = {"object": rng.standard_normal((3, 4)), "eef": rng.standard_normal((3, 2)),
                      "image": np.zeros((3, 8, 8, 3), np.uint8)}  # fmt: skip
            demo = {f"obs/{key}": values[:2] for key, values in states.items()}
            demo |= {f"next_obs/{key}": values[1:] for key, values in states.items()}
            demo |= {"actions": rng.uniform(-1, 1, (2, 3)), "rewards": [0.0, k < 10], "dones": [0, k < 10]}
            for name in demo.keys() - {without}:
                file[f"data/demo_{k}/{name}"] = demo[name]
            written[k] = demo
    return written


def test_robomimic_file_keeps_its_demonstrations(folder, capsys):
    written = write_robomimic(folder / "demo.hdf5")
    flags = [str(folder / "demo.hdf5"), "--dataset-id", "mine/lift-v0", "--overwrite"]
    assert from_arrays.main(flags) == 0 and "(left out: image)" in capsys.readouterr().out
    dataset = minari.load_dataset("mine/lift-v0")
    assert terminated(dataset) == 10 * [True] + [False] and dataset.env_spec is None
    for k in (0, 9, 10):  # by number, not by letter: demo_10 is the last
        np.testing.assert_allclose(dataset[k].actions, written[k]["actions"], rtol=1e-6)
        np.testing.assert_array_equal(dataset[k].observations["object"][1:], written[k]["next_obs/object"])
        assert set(dataset[k].observations) == {"object", "eef"}
    assert from_arrays.main([*flags, "--keys", "eef"]) == 0
    assert set(minari.load_dataset("mine/lift-v0")[0].observations) == {"eef"}
    assert from_arrays.main([*flags, "--keys", "missing"]) == 2
    write_robomimic(folder / "demo.hdf5", without="rewards")
    assert from_arrays.main(flags) == 2 and "dataset_states_to_obs" in capsys.readouterr().err


# --- Ends, marked and unmarked ----------------------------------------------------------------------------------------
def test_terminations_that_are_timeouts(folder, capsys):
    """Four episodes of five steps that all end as terminated; a success there is no suspect."""
    columns = {"observations": np.zeros((20, 3)), "actions": np.linspace([-1, 0], [0, 1], 20), "rewards": np.zeros(20)}
    columns |= {"terminations": np.tile([False] * 4 + [True], 4), "truncations": np.zeros(20, bool)}
    assert "4 of 4 episodes terminate after 5 steps" in refusal(folder, capsys, columns)
    assert "no episode has this length; the longest has 5" in refusal(folder, capsys, columns, "--time-limit", "6")
    assert terminated(convert(folder, columns, "--time-limit", "5")) == 4 * [False]
    assert terminated(convert(folder, columns, "--true-ends")) == 4 * [True]
    assert terminated(convert(folder, columns | {"rewards": columns["terminations"].astype(float)})) == 4 * [True]


def test_the_environment_tells_the_time_limit(folder, capsys):
    """Hopper's is 1,000 steps: two equal falls are falls, one in the last step of the time is a time-out."""
    columns = {"observations": np.zeros((1010, 11)), "actions": np.linspace([-1, 0, 0], [0, 1, 1], 1010)}
    columns |= {"rewards": np.zeros(1010), "truncations": np.zeros(1010, bool)}
    columns["terminations"] = np.isin(np.arange(1010), (4, 9, 1009))
    assert terminated(convert(folder, columns, "--env-id", "Hopper-v5")) == [True, True, False]
    assert terminated(convert(folder, columns, "--env-id", "Hopper-v5", "--true-ends")) == [True, True, True]
    assert "the environment's limit is" not in capsys.readouterr().out
    falls = {name: values[:10] for name, values in columns.items()}
    assert terminated(convert(folder, falls, "--env-id", "Hopper-v5")) == [True, True]
    assert "the environment's limit is 1000" in capsys.readouterr().out  # 5 may have been the recording's


def test_unmarked_ends(folder, capsys):
    """Where the next row does not follow, an episode ends; a jump, which may be one or not, is asked about."""
    columns = with_next(make_columns())
    columns["truncations"][7] = False
    episodes = convert(folder, columns)
    assert lengths_of(episodes) == [3, 5, 4] and terminated(episodes) == [True, False, True]
    assert (episodes[1].observations[-1] == 7).all() and "1 episodes end, cut off, in" in capsys.readouterr().out
    path = np.linspace([0, 0, 0], [11, 22, 33], 12)
    path[8:] += 100
    jumping = make_columns() | {"observations": path, "truncations": np.zeros(12, bool)}
    assert "from row 7 to row 8 the observation moves many times as far" in refusal(folder, capsys, jumping)
    assert lengths_of(convert(folder, jumping, "--jumps", "split")) == [3, 4, 4]
    assert lengths_of(convert(folder, jumping, "--jumps", "keep")) == [3, 9]
    jumping["terminations"] = np.zeros(12, bool)
    assert "no step has a termination" in refusal(folder, capsys, jumping, "--jumps", "keep")


@pytest.mark.parametrize("rest, size", [(0.8, 0), (0, 6), (0.8, 20)])
def test_a_jump_is_told_from_the_bursts_of_a_hand_that_mostly_rests(folder, capsys, rest, size):
    """Ten entries; in a share `rest` of the rows they move by noise alone, and `size` times as far at the jump."""
    rng = np.random.default_rng(0)
    moves = rng.uniform(0.5, 1, (200, 10)) * rng.choice([-1, 1], (200, 10))
    moves[rng.uniform(size=200) < rest] *= 1e-4
    moves[120] = size or 1
    columns = {"observations": moves.cumsum(0), "actions": np.linspace([-1, 0], [0, 1], 200), "rewards": np.zeros(200)}
    columns |= {"terminations": np.zeros(200, bool), "truncations": np.arange(200) == 199}
    assert lengths_of(convert(folder, columns, "--jumps", "split")) == ([119, 79] if size else [199])
    if size:
        assert "from row 119 to row 120" in refusal(folder, capsys, columns)
    else:
        assert lengths_of(convert(folder, columns)) == [199]


# --- Refusals ---------------------------------------------------------------------------------------------------------
def put(row: int, value: float):
    return lambda values: np.where((np.arange(len(values)) == row)[(..., *[None] * (values.ndim - 1))], value, values)


@pytest.mark.parametrize("name, change, sentence", [
    ("actions", lambda values: values[:-1], "has 12 rows and actions 11"),
    ("rewards", lambda values: values[:5], "rewards has 5 rows and actions 12"),
    ("observations", put(4, np.nan), r"observations is nan in row 4: repair"),
    ("actions", put(7, np.inf), "actions is inf in row 7"),
    ("rewards", put(2, np.nan), "rewards is nan in row 2"),
    ("terminations", put(3, 2), r"terminations is 2 in row 3: it has to be 0 or 1"),
    ("actions", lambda values: values[:, 0], "actions is float32.12. *: it has to hold numbers, a vector a row"),
    ("rewards", lambda values: np.stack([values, values], 1), "rewards is float64.12, 2.: it has to hold numbers, one"),
    ("next_observations", lambda values: values[:, :1], r"next_observations is {'': .12, 1.} and observations"),
    ("next_observations", lambda values: values[::-1], "observation of row 0 is not .* row 1, and so in 9 of 9 rows"),
    *[(name, None, f"has no {name}, only") for name in make_columns()],
])  # fmt: skip
def test_bad_columns_are_named(folder, capsys, name, change, sentence):
    values = (columns := with_next(make_columns())).pop(name)
    assert re.search(sentence, refusal(folder, capsys, columns | ({name: change(values)} if change else {})))


def test_other_bad_input(folder, capsys):
    columns = make_columns()
    assert "leaves 100% of the actions outside" in refusal(folder, capsys, columns, "--box", "5", "6")
    assert "has to be above the first" in refusal(folder, capsys, columns, "--box", "1", "-1")
    for name in ("text.npz", "text.hdf5", "missing.npz"):
        (folder / name.replace("missing", "other")).write_text("text")
        assert from_arrays.main([str(folder / name), "--dataset-id", "mine/bad-v0"]) == 2
        assert capsys.readouterr().err.count("cannot be read") == 1
    assert from_arrays.main([str(folder / "bad.npz"), "--dataset-id", "../bad-v0"]) == 2
    convert(folder, columns)
    assert from_arrays.main([str(folder / "bad.npz"), "--dataset-id", "mine/test-v0"]) == 0  # what exists stays
    assert "exists already" in capsys.readouterr().out


def test_page_from_arrays_to_a_curve_runs_as_it_stands(folder):
    page = (ROOT / "docs" / "own_data.md").read_text()
    program, commands = (re.findall(rf"```{name}\n(.*?)```", page, re.DOTALL)[0] for name in ("python", "bash"))
    for name in ("collect", "tools", "cal_ql_continuous.py", "cql_continuous.py"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "runs").mkdir()
    (folder / "runs" / "make_arrays.py").write_text(program)
    commands = f'python() {{ "{sys.executable}" "$@"; }}\n{commands}'
    process = subprocess.run(["bash", "-e", "-c", commands], cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0 and "mine/maze-v0: 20 episodes, 6000 steps" in process.stdout, process.stderr[-2000:]
    assert (folder / "figures" / "curves.png").stat().st_size > 5000
