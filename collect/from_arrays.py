"""Your own data as a Minari dataset: NumPy arrays, a robomimic file, or one of D4RL's files, checked on the way.

    python -m collect.from_arrays steps.npz --dataset-id mine/robot-v0 --env-id MyRobot-v0
    python -m collect.from_arrays demo.hdf5 --dataset-id mine/lift-v0 --keys object robot0_eef_pos    # robomimic
    python -m collect.from_arrays hopper_medium-v2.hdf5 --dataset-id mine/hopper-v0    # D4RL, whose name tells it

    .npz         one row a step, in order: observations [N, ...], or observations/<key> of a dictionary; actions [N, A],
                 rewards [N], terminations [N] (the environment ended the episode), truncations [N] (a time limit did),
                 or D4RL's names; optional: next_observations [N, ...], infos/<name> [N, ...] as `step` returned them
    robomimic    data/demo_*: obs, next_obs, actions, rewards, dones; images are left out
    D4RL         observations, actions, rewards, terminals, and if there are any timeouts, next_observations

An episode needs the state after its last step. Without next observations, the last step of an episode that terminated
gets its own state there, which nothing uses; that of an episode that was cut off is left out. Where a row is not what
follows the one before it, an episode was cut off too. The dataset's action box is the one that the actions fill.
"""

import dataclasses
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import gymnasium as gym
import gymnasium_robotics
import h5py
import minari
import numpy as np
import tyro
from minari.data_collector import EpisodeBuffer

# D4RL's files that fit an environment of today, by the first word of their names. AntMaze, maze2d and kitchen do not:
# today they observe dictionaries, and the ant acts twice as often.
D4RL_ENVS = {
    "halfcheetah": "HalfCheetah-v5",
    "hopper": "Hopper-v5",
    "walker2d": "Walker2d-v5",
    "pen": "AdroitHandPen-v1",
    "door": "AdroitHandDoor-v1",
    "hammer": "AdroitHandHammer-v1",
    "relocate": "AdroitHandRelocate-v1",
}


class InputError(Exception):
    """Something the user can put right; its message is one sentence that says how."""


@dataclasses.dataclass
class Args:
    """Make a Minari dataset of arrays."""

    file: tyro.conf.Positional[Path]
    """.npz, or .hdf5 of robomimic or D4RL"""
    dataset_id: str
    """the Minari id to write, like mine/robot-v0"""
    env_id: str | None = None
    """the Gymnasium environment that the data come from; without it, the dataset names none"""
    keys: tuple[str, ...] = ()
    """robomimic: which observations to take; none takes all vectors"""
    box: tuple[float, float] | None = None
    """low and high of the action box in every dimension; None is the smallest box around the actions"""
    time_limit: int | None = None
    """terminations after this many steps are time-outs; None asks the environment for its own limit"""
    true_ends: bool = False
    """terminations at the time limit, or after the longest length, are no time-outs"""
    jumps: Literal["refuse", "split", "keep"] = "refuse"
    """without next observations: what becomes of a jump between two rows that looks like an episode's unmarked end"""
    overwrite: bool = False
    """replace the dataset where one of that id exists"""


@dataclasses.dataclass
class Data:
    """N steps in order; each of `observations` and `infos` has N rows, the dictionary's key "" stands for an array."""

    observations: dict[str, np.ndarray]
    next_observations: dict[str, np.ndarray]  # empty where the file has none
    actions: np.ndarray
    rewards: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray
    infos: dict[str, np.ndarray]
    starts: list[int] | None = None  # first steps of the episodes, where the file tells them; else ends tell


# --- Reading ----------------------------------------------------------------------------------------------------------
def read_columns(arrays: dict) -> Data:
    """A file with one array a column, by D4RL's names or Gymnasium's. Raises InputError where one is missing."""
    renamed = {"terminals": "terminations", "timeouts": "truncations"}
    if "terminals" in arrays and "truncations" not in arrays:  # in some of D4RL's files terminals alone end episodes
        arrays = {"timeouts": np.zeros(len(arrays["terminals"]), bool), **arrays}
    nested = {name: {} for name in ("observations", "next_observations", "infos")}
    columns = {}
    for name in arrays:
        column, _, key = renamed.get(name, name).partition("/")
        if column in nested:
            nested[column][key] = arrays[name][:]
        elif column in ("actions", "rewards", "terminations", "truncations"):
            columns[column] = arrays[name][:]
    missing = [name for name in ("actions", "rewards", "terminations", "truncations") if name not in columns]
    missing += [] if nested["observations"] else ["observations"]
    if missing:
        raise InputError(
            f"the file has no {' and no '.join(missing)}, only {', '.join(arrays) or 'nothing'}: add them."
        )
    return Data(**columns, **nested)


def read_robomimic(file: h5py.File, keys: tuple[str, ...]) -> Data:
    """Every demonstration is an episode; what its last step has no `done` for was cut off."""
    demos = sorted(file["data"].values(), key=lambda demo: int(re.sub(r"\D", "", demo.name) or 0))
    if not demos or any(name not in demo for demo in demos for name in ("obs", "actions", "rewards", "dones")):
        raise InputError(
            "the robomimic file lacks obs, actions, rewards or dones in some demonstration: run robomimic's "
            "dataset_states_to_obs on it first."
        )
    found = {key: demos[0]["obs"][key].ndim for key in demos[0]["obs"]}
    taken = keys or [key for key, ndim in found.items() if ndim <= 2]
    if not taken or any(key not in demo["obs"] for demo in demos for key in taken):
        raise InputError(
            f"--keys {' '.join(taken)}: every demonstration has to have them; the first has {list(found)}."
        )
    print("observations:", *taken, *[f"(left out: {', '.join(found.keys() - set(taken))})"] * (len(found) > len(taken)))

    def join(*path: str) -> np.ndarray:
        return np.concatenate([demo["/".join(path)][:] for demo in demos])

    lengths = [len(demo["actions"]) for demo in demos]
    ends = np.cumsum(lengths)
    dones = join("dones").astype(bool)
    return Data(
        observations={key: join("obs", key) for key in taken},
        next_observations={key: join("next_obs", key) for key in taken} if "next_obs" in demos[0] else {},
        actions=join("actions"),
        rewards=join("rewards"),
        terminations=dones,
        truncations=np.isin(np.arange(len(dones)), ends - 1) & ~dones,
        infos={},
        starts=[0, *ends[:-1].tolist()],
    )


def read(args: Args) -> tuple[Data, str | None]:
    """The file's steps, and the environment that its name tells. Raises InputError."""
    try:
        if args.file.suffix == ".npz":
            with np.load(args.file) as arrays:
                return read_columns(dict(arrays)), None
        with h5py.File(args.file) as file:
            if "data" in file:
                return read_robomimic(file, args.keys), None
            columns = {name: column for name, column in file.items() if isinstance(column, h5py.Dataset)}  # no infos
            return read_columns(columns), D4RL_ENVS.get(re.split(r"[-_.]", args.file.name.lower())[0])
    except InputError as error:
        raise InputError(f"{args.file}: {error}") from error
    except Exception as error:  # whatever NumPy and h5py raise for a damaged file
        raise InputError(
            f"{args.file} cannot be read ({error!r}): name an .npz, or an HDF5 file as robomimic or D4RL write it."
        ) from error


# --- Checking ---------------------------------------------------------------------------------------------------------
def check_columns(data: Data) -> None:
    """Brings rewards and ends to [N]. Raises InputError for the first column that does not fit."""
    for name in ("rewards", "terminations", "truncations"):
        values = getattr(data, name)
        setattr(data, name, values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values)
    columns = {
        "actions": data.actions,
        "rewards": data.rewards,
        "terminations": data.terminations,
        "truncations": data.truncations,
    }
    for column in ("observations", "next_observations", "infos"):
        columns |= {f"{column}/{key}".rstrip("/"): values for key, values in getattr(data, column).items()}
    steps = len(data.actions)
    for name, values in columns.items():
        ends, plain = name in ("terminations", "truncations"), name in ("rewards", "terminations", "truncations")
        if len(values) != steps or steps == 0:
            raise InputError(f"{name} has {len(values)} rows and actions {steps}: every array needs one row a step.")
        if (plain and values.ndim != 1) or (name == "actions" and values.ndim != 2) or values.dtype.kind not in "biuf":
            raise InputError(
                f"{name} is {values.dtype}{list(values.shape)}: it has to hold numbers, "
                f"{'one' if plain else 'a vector'} a row."
            )
        bad = ~np.isin(values, (0, 1)) if ends else ~np.isfinite(values)
        if bad.any():
            remedy = "it has to be 0 or 1" if ends else "repair that step or leave its episode out"
            raise InputError(f"{name} is {values[bad][0]} in row {np.argwhere(bad)[0][0]}: {remedy}.")
    shapes = [
        {key: values.shape for key, values in each.items()} for each in (data.observations, data.next_observations)
    ]
    if data.next_observations and shapes[0] != shapes[1]:
        raise InputError(f"next_observations is {shapes[1]} and observations {shapes[0]}: they have to be the same.")
    data.terminations, data.truncations = data.terminations.astype(bool), data.truncations.astype(bool)


def mark_cuts(data: Data, jumps: str) -> None:
    """Marks rows that the next one does not follow as cut off. Raises InputError where that is not clear.

    Without next observations, such a row shows where the entries move more than 4 times as far, on average, as each of
    them does in nine of ten rows. An entry counts 10 times at most, so that a few that mostly rest make no jump.
    """
    (rows,) = np.nonzero(~(data.terminations | data.truncations)[:-1])
    vectors = [values for values in data.observations.values() if values.ndim == 2]
    if data.starts is not None or len(rows) == 0 or (not data.next_observations and not vectors):
        return
    if data.next_observations:
        pairs = [(values[rows], data.observations[key][rows + 1]) for key, values in data.next_observations.items()]
        same = [np.isclose(*pair, rtol=1e-3, atol=1e-4).reshape(len(rows), -1).all(1) for pair in pairs]
        cuts, what = rows[~np.all(same, axis=0)], "the next observation is not the next row's"
        if len(cuts) > len(rows) / 4:
            raise InputError(
                f"the next observation of row {cuts[0]} is not the observation of row {cuts[0] + 1}, and so in "
                f"{len(cuts)} of {len(rows)} rows: rows have to be the steps of whole episodes, in order."
            )
    else:
        moves = np.concatenate([np.abs(np.diff(values.astype(float), axis=0))[rows] for values in vectors], axis=1)
        usual = np.quantile(moves, 0.9, axis=0, method="lower")
        far = np.minimum(moves[:, usual > 0] / usual[usual > 0], 10).mean(1) if usual.any() else np.zeros(len(rows))
        cuts, what = rows[far > 4] if jumps != "keep" else rows[:0], "the observation jumps"
        if len(cuts) and jumps == "refuse":
            raise InputError(
                f"from row {cuts[0]} to row {cuts[0] + 1} the observation moves many times as far as usual, and no "
                f"episode's end is marked there ({len(cuts)} such rows): --jumps split ends episodes there, --jumps "
                "keep takes these rows as one episode's."
            )
    data.truncations[cuts] = True
    if len(cuts):
        print(f"{len(cuts)} episodes end, cut off, in rows without a mark, because {what}: {cuts[:5].tolist()} ...")


def rewarded_at_end(rewards: np.ndarray) -> bool:
    """Whether an episode's last reward is above all its others."""
    return len(rewards) > 1 and bool(rewards[-1] > rewards[:-1].max())


def find_bounds(data: Data, args: Args, limit: int | None) -> list[tuple[int, int]]:
    """First step and end of every episode. Raises InputError.

    What terminates in the last step of the time `limit` with no success and no higher reward there becomes a time-out.
    Two or more such ends after the longest length are refused where no limit is known, and noted where it is another.
    """
    steps = len(data.actions)
    if data.starts is None:
        ends = np.flatnonzero(data.terminations | data.truncations) + 1
        if len(ends) == 0:
            raise InputError("no step has a termination or a truncation: mark the last step of every episode.")
        starts = [0, *ends.tolist()]
    else:
        starts = data.starts
    bounds = [(start, end) for start, end in zip(starts, [*starts[1:], steps], strict=True) if start < end]
    lengths = np.array([end - start for start, end in bounds])
    last = np.array([end - 1 for _, end in bounds])
    longest = lengths.max()
    rewarded = np.array([rewarded_at_end(data.rewards[start:end]) for start, end in bounds])
    rewarded |= data.infos.get("success", np.zeros(steps)).reshape(steps, -1)[last].any(1)
    if args.time_limit is not None:
        limit, rewarded = args.time_limit, np.zeros(len(bounds), bool)  # whatever the reward
        if limit not in lengths:
            raise InputError(f"--time-limit {limit}: no episode has this length; the longest has {longest}.")
    late = data.terminations[last] & ~rewarded
    suspects, equal = last[late & (lengths == (limit or longest))], np.sum(late & (lengths == longest))
    if args.true_ends:
        return bounds
    if limit is None and len(suspects) > 1:
        raise InputError(
            f"{len(suspects)} of {len(bounds)} episodes terminate after {longest} steps, the longest length, with no "
            f"higher reward there: --time-limit {longest} makes them time-outs, --true-ends keeps them."
        )
    if limit is not None and len(suspects):
        print(
            f"{len(suspects)} episodes that terminate after {limit} steps, the time limit, are saved as cut off there"
        )
        data.terminations[suspects], data.truncations[suspects] = False, True
    if args.time_limit is None and limit not in (None, longest) and equal > 1:
        print(
            f"note: {equal} of {len(bounds)} episodes terminate after {longest} steps, the longest length, with no "
            f"higher reward there; the environment's limit is {limit}: if time was up, use --time-limit {longest}"
        )
    return bounds


def find_box(actions: np.ndarray, box: tuple[float, float] | None) -> gym.spaces.Box:
    """The smallest box around the actions [N, A], or the given one; a dimension that never moves gets a little room.

    Raises InputError.
    """
    if box is not None and not -np.inf < box[0] < box[1] < np.inf:
        raise InputError(f"--box {box[0]} {box[1]}: the second number has to be above the first.")
    low, high = actions.min(0).astype(np.float32), actions.max(0).astype(np.float32)
    room = np.where(low < high, 0, 1e-3 * np.maximum(1, np.abs(low))).astype(np.float32)
    if box is not None:
        low, high, room = np.full_like(low, box[0]), np.full_like(high, box[1]), 0
    return gym.spaces.Box(low - room, high + room, dtype=np.float32)


def find_env(env_id: str, observation_space: gym.Space, actions: np.ndarray) -> gym.Env:
    """The environment, whose spaces have to have the data's shapes. Raises InputError."""
    gym.register_envs(gymnasium_robotics)
    try:
        env = gym.make(env_id)
    except Exception as error:  # whatever a stranger's environment raises
        reason = " ".join(str(error).split())
        raise InputError(
            f"--env-id {env_id} cannot be made ({reason}): name a registered one, as module:Name-v0 if its module "
            "registers it, or leave it out."
        ) from error
    shapes = [
        {key: each.shape for key, each in space.items()} if isinstance(space, gym.spaces.Dict) else space.shape
        for space in (env.observation_space, observation_space)
    ]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"{env_id} observes {shapes[0]} and the data {shapes[1]}: name the environment that the data come from, "
            "or bring the observations to its shape."
        )
    if env.action_space.shape != actions.shape[1:]:
        raise InputError(
            f"{env_id} takes actions {env.action_space.shape} and the data have {actions.shape[1:]}: name the "
            "environment that the data come from."
        )
    return env


# --- Writing ----------------------------------------------------------------------------------------------------------
def space_of(observations: dict[str, np.ndarray]) -> gym.Space:
    """The space of one observation; frames are bytes [H, W, C]."""
    spaces = {
        key: gym.spaces.Box(0, 255, values.shape[1:], np.uint8)
        if values.dtype == np.uint8
        else gym.spaces.Box(-np.inf, np.inf, values.shape[1:], np.result_type(values.dtype, np.float32))
        for key, values in observations.items()
    }
    return spaces[""] if "" in spaces else gym.spaces.Dict(spaces)


def make_buffers(data: Data, bounds: list[tuple[int, int]], space: gym.Space) -> Iterator[EpisodeBuffer]:
    """Minari's episodes: T steps and T + 1 observations."""
    plain = {"": space} if "" in data.observations else space
    made = 0
    for start, end in bounds:
        known = data.next_observations or data.observations
        final = {key: values[end - 1 : end] for key, values in known.items()}
        if not data.next_observations and not data.terminations[end - 1]:
            end -= 1  # cut off in a state that is not there: the one before it becomes the last
        if start == end:
            continue
        observations = {
            key: np.concatenate([values[start:end], final[key]]).astype(plain[key].dtype)
            for key, values in data.observations.items()
        }
        terminations = data.terminations[start:end]
        yield EpisodeBuffer(
            id=made,
            observations=observations[""] if "" in observations else observations,
            actions=data.actions[start:end].astype(np.float32),
            rewards=data.rewards[start:end].astype(np.float64),
            terminations=terminations,
            truncations=(np.arange(start, end) == end - 1) & ~terminations,
            infos={
                key: np.concatenate([np.zeros_like(values[:1]), values[start:end]])  # row 0 is the reset's
                for key, values in data.infos.items()
            },
        )
        made += 1


def convert(args: Args) -> minari.MinariDataset:
    """Reads, checks, writes, and prints what became of the data. Raises InputError before anything is written."""
    data, told = read(args)
    check_columns(data)
    space, env_id = space_of(data.observations), args.env_id or told
    env = find_env(env_id, space, data.actions) if env_id else None
    mark_cuts(data, args.jumps)
    bounds = find_bounds(data, args, env and env.spec.max_episode_steps)
    box = find_box(data.actions, args.box)
    outside = ((data.actions < box.low) | (data.actions > box.high)).mean()
    if outside > 0.2:
        raise InputError(f"--box leaves {outside:.0%} of the actions outside: choose a larger one.")
    buffers = list(make_buffers(data, bounds, space))
    if not buffers:
        raise InputError("no episode has a step and a state after it: add next_observations.")

    shutil.rmtree(minari.storage.get_dataset_path(args.dataset_id), ignore_errors=True)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", r"`\w+` is set to None|env_spec is None"
        )  # Minari asks for more than there is
        dataset = minari.create_dataset_from_buffers(
            args.dataset_id,
            buffers,
            env=env and env.spec,
            observation_space=space,
            action_space=box,
            author="collect.from_arrays",
            algorithm_name="unknown",
            description=f"Made of {args.file.name}.",
            jpeg_encoding=False,
        )
    terminated = sum(bool(data.terminations[end - 1]) for _, end in bounds)
    print(
        f"{dataset.id}: {len(buffers)} episodes, {dataset.total_steps} steps; {terminated} terminate, the others are "
        f"cut off; environment {env_id or 'none'}"
    )
    if len(data.actions) > dataset.total_steps:
        print(
            f"{len(data.actions) - dataset.total_steps} steps left out, after which no state is known: add "
            "next_observations"
        )
    returns = [buffer.rewards.sum() for buffer in buffers]
    print(f"returns from {min(returns):.4g} to {max(returns):.4g}, median {np.median(returns):.4g}")
    low, high = np.quantile(data.actions, [0.01, 0.99], axis=0)
    fill = np.mean((high - low) / (box.high - box.low))
    print(
        f"action box from {np.round(box.low, 3).tolist()} to {np.round(box.high, 3).tolist()}; 98% of the actions "
        f"fill {fill:.0%} of it, {outside:.2%} lie outside"
    )
    if fill < 0.5:
        print(
            "note: most of this box is empty, where Q is low anyway, so that --cql-lagrange all but switches the "
            "regulariser off: leave outliers out, or name a smaller --box (docs/tasks.md)"
        )
    if env is not None and isinstance(env.action_space, gym.spaces.Box) and env.action_space.is_bounded():
        share = np.mean((box.high - box.low) / (env.action_space.high - env.action_space.low))
        print(f"that is {share:.0%} of the environment's own box, {env.action_space}")
    return dataset


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    args = tyro.cli(Args, args=argv)
    try:
        if not re.fullmatch(r"([\w-]+/)+[\w-]+-v\d+", args.dataset_id):  # the folder of that name will be replaced
            raise InputError(f"--dataset-id {args.dataset_id} must be like mine/robot-v0.")
        if (minari.storage.get_dataset_path(args.dataset_id) / "data").exists() and not args.overwrite:
            print(f"{args.dataset_id} exists already; --overwrite makes it anew.")
            return 0
        convert(args)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
