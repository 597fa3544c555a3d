"""The online episodes of a run as a Minari dataset, which the scripts read again by its id.

    python -m collect.from_run runs/<run> --dataset-id mine/online-v0

They are taken from the run's checkpoint, so a run needs no flag for it, and one that was resumed holds none twice. An
episode ends where the environment ended it, or where the next transition starts in another state than this one led to.
Actions are those of the data's box and rewards the environment's, as float32 keeps them. Of more online steps than
--buffer-size the last are left, less an episode that lost its beginning.

In the paper's tasks state, reward and end are the task's (docs/tasks.md) and not the environment's: such episodes are
saved as the policy saw them, without an environment's name. All others go back into the data's own observation space.
"""

import copy
import dataclasses
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import torch
import tyro
from minari.data_collector import EpisodeBuffer

from cal_ql_continuous import SETTINGS, TASKS, InputError, Task


@dataclasses.dataclass
class Args:
    run: tyro.conf.Positional[str]  # folder of the run
    dataset_id: str  # of the new dataset, such as mine/online-v0


def from_state(states: np.ndarray, space: gym.Space):
    """States [T, O] as observations of the space that they were flattened from, in its order."""
    if not isinstance(space, gym.spaces.Dict):
        return states.reshape(-1, *space.shape).astype(space.dtype)
    ends = np.cumsum([gym.spaces.flatdim(part) for part in space.values()])
    parts = np.split(states, ends[:-1], axis=1)
    return {key: from_state(part, space[key]) for key, part in zip(space, parts, strict=True)}


def split_episodes(columns: list[np.ndarray], whole: bool) -> list[slice]:
    """Where each episode lies in the columns of the replay, the oldest transition first; all are complete."""
    observations, _, _, next_observations, terminations, _ = columns
    leaps = (observations[1:] != next_observations[:-1]).any(1)
    ends = np.flatnonzero(np.append(leaps | (terminations[:-1] > 0), True)) + 1
    starts = np.append(0, ends[:-1])
    return [slice(*bounds) for bounds in zip(starts, ends, strict=True)][0 if whole else 1 :]


def read_run(run: str) -> tuple[dict, list[np.ndarray], list[slice]]:
    """The run's settings, the columns of its replay, and its episodes there. Raises InputError."""
    path = Path(run) / "checkpoint.pt"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        settings, env_steps, buffer = checkpoint["args"], checkpoint["progress"]["env_steps"], checkpoint["buffer"]
        columns = [np.roll(column.numpy(), -buffer.get("cursor", 0), axis=0) for column in buffer["online"]]
    except Exception as error:  # whatever a missing or damaged file does
        raise InputError(f"{path} is missing or damaged ({type(error).__name__}); name a run's folder.") from error
    if "cursor" not in buffer or columns[0].ndim != 2:
        raise InputError(f"{run} has no replay of vectors: runs of ODT or from pixels cannot be saved.")
    episodes = split_episodes(columns, whole=len(columns[0]) == env_steps) if len(columns[0]) else []
    if not episodes:
        raise InputError(f"{run} has no online episode yet.")
    return settings, columns, episodes


def save(args: Args) -> minari.MinariDataset:
    """Writes the dataset. Raises InputError."""
    settings, columns, episodes = read_run(args.run)
    task = TASKS.get(settings["env_id"], Task("any other", (settings["env_id"],)))
    own_env = SETTINGS.get(task.domain, {}).get("online_env")  # of another one the data tell nothing
    source_id = (settings["datasets"] or task.datasets)[0]
    try:
        source = minari.load_dataset(source_id)
    except Exception as error:
        raise InputError(f"cannot open {source_id}, the data of {args.run}, whose action box is needed.") from error
    box, space, spec = source.action_space, source.observation_space, copy.deepcopy(source.env_spec)
    if task.domain not in ("any other", "pick-place"):
        space = gym.spaces.Box(-np.inf, np.inf, columns[0].shape[1:], np.float32)
    if task.domain not in ("any other", "pick-place") or settings["online_env"] != own_env:
        spec = None
    elif spec is not None and settings["episode_length"]:
        spec.max_episode_steps = settings["episode_length"]

    buffers = []
    for k, steps in enumerate(episodes):
        states, actions, rewards, next_states, terminations, _ = (column[steps] for column in columns)
        actions = box.low + (actions + 1) / 2 * (box.high - box.low)
        terminations = terminations > 0
        buffers.append(
            EpisodeBuffer(
                id=k,
                observations=from_state(np.concatenate([states, next_states[-1:]]), space),
                actions=actions.clip(box.low, box.high).astype(box.dtype),
                rewards=(rewards.astype(np.float64) - settings["reward_bias"]) / settings["reward_scale"],
                terminations=terminations,
                truncations=np.append(np.zeros(len(rewards) - 1, bool), not terminations[-1]),
            )
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", r"`\w+` is set to None|env_spec is None"
            )  # Minari asks for more than that
            return minari.create_dataset_from_buffers(
                args.dataset_id, buffers, env=spec, action_space=box, observation_space=space,
                algorithm_name=f"online episodes of {Path(args.run).name}", author="Cal-QL",
            )  # fmt: skip
    except Exception as error:  # whatever Minari raises where the id is taken or is none, or the disk is full
        raise InputError(f"cannot write {args.dataset_id}: {str(error).splitlines()[0]}") from error


def main(argv: list[str] | None = None) -> int:
    args = tyro.cli(Args, args=argv, description=__doc__)
    try:
        dataset = save(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    succeeded = sum(bool(episode.rewards.max() > 0) for episode in dataset)
    print(f"{dataset.id}: {len(dataset)} episodes, {dataset.total_steps} steps, {succeeded} with reward > 0")
    return 0


if __name__ == "__main__":
    sys.exit(main())
