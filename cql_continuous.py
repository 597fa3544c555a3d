# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = [
#   "gymnasium==1.4.0",
#   "gymnasium-robotics==1.4.2",
#   "minari[hdf5,hf]==0.5.4",
#   "mujoco==3.3.7",
#   "numpy==2.4.6",
#   "tensorboard==2.21.0",
#   "torch==2.13.0",
#   "tqdm==4.70.1",
#   "tyro==1.0.17",
#   "wandb==0.31.0",
# ]
# ///
"""CQL: conservative Q-learning (Kumar et al. 2020, arXiv:2006.04779), pre-trained offline and fine-tuned online.

The baseline of Cal-QL, and the same file less one statement: the regulariser pushes Q down on the policy's actions
without a floor and up on the data's,

    min_Q  w * ( E_{s~D, a~pi}[ Q(s,a) ] - E_{s,a~D}[ Q(s,a) ] )  +  E_D[ (Q - target)^2 ]

which on narrow data can leave Q below the return of even a poor policy. The bound rate, the share of the policy's
actions whose Q is below the Monte-Carlo return of the row, is logged all the same. Read on from `Args`, or run:

    python cql_continuous.py --env-id pick-place                     # quick start: python -m collect.pick_place first
    python cql_continuous.py --env-id antmaze-large-diverse          # the paper's experiment; downloads its data
    python cql_continuous.py --env-id pen-binary --online-cql-weight 0   # CQL+SAC: online, the regulariser is left out
    python cql_continuous.py --resume runs/<run>                     # continues exactly where the run stopped
"""

import argparse
import concurrent.futures
import copy
import ctypes
import dataclasses
import difflib
import functools
import itertools
import json
import math
import multiprocessing.pool
import os
import signal
import sys
import threading
import time
import warnings
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import gymnasium as gym
import minari
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Args:
    # --- Run
    env_id: str = "antmaze-large-diverse"
    """the task: a name from the table of tasks, or any Minari dataset id such as D4RL/pointmaze/umaze-v2"""
    seed: int = 1
    """seed of networks, batches and episodes"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train; auto takes CUDA where there is one"""
    tf32: bool = True
    """on CUDA, round the factors of matrix products to TF32 (10 bits of mantissa), which is much faster"""
    runs_dir: str = "runs"
    """folder for the run's own folder"""
    resume: str = ""
    """folder of a run to continue; only step totals, intervals, device, tf32, eval_workers and track may be changed"""
    track: bool = False
    """log to Weights & Biases too; WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE=offline are obeyed"""

    # --- Protocol
    offline_steps: int = 500_000
    """gradient updates of the offline phase"""
    online_steps: int = 500_000
    """environment steps of the online phase, completed to whole episodes"""
    offline_eval_interval: int = 50_000
    """updates between two evaluations offline"""
    online_eval_interval: int = 5_000
    """environment steps between two evaluations online"""
    eval_episodes: int = 20
    """episodes of an evaluation, with the deterministic policy"""
    eval_workers: int = 0
    """processes that play the evaluations while training goes on; with 0 training waits for them (to stop, and to write
    a checkpoint, it waits in either case)"""
    overlap: bool = False
    """play each online episode in a process of its own, during the updates owed for the one before it; other than in
    the paper, its policy has not learned from that one yet"""
    episode_length: int = 0
    """time limit of an episode in steps; 0 keeps the environment's own"""
    checkpoint_interval: int = 25_000
    """updates between two checkpoints"""
    log_interval: int = 100
    """updates between two readings of the losses"""

    # --- Data
    reward_scale: float = 1.0
    """rewards are multiplied by this ..."""
    reward_bias: float = 0.0
    """... and this is added"""
    buffer_size: int = 1_000_000
    """online rows kept; the oldest are overwritten"""
    mixing_ratio: float = 0.5
    """share of offline rows in an online batch; -1 samples offline and online rows alike"""

    # --- Actor-critic
    batch_size: int = 256
    """rows of a batch"""
    gamma: float = 0.99
    """discount"""
    tau: float = 0.005
    """step of the target critics towards the critics"""
    actor_lr: float = 1e-4
    """learning rate of the actor and the temperature"""
    critic_lr: float = 3e-4
    """learning rate of the critics and the Lagrange multiplier"""
    actor_layers: tuple[int, ...] = (256, 256)
    """hidden layers of the actor"""
    critic_layers: tuple[int, ...] = (256, 256)
    """hidden layers of each critic"""
    target_entropy: float | None = None
    """entropy the temperature steers to; None is minus the number of action dimensions"""
    backup_entropy: bool = False
    """subtract alpha log pi(a'|s') from the Q-values in the Bellman target, as SAC does"""
    utd_ratio: int = 1
    """critic updates per environment step"""
    actor_interval: int = 1
    """critic updates per update of the actor and the temperature"""
    num_critics: int = 2
    """critics in the ensemble"""
    num_target_critics: int = 2
    """critics drawn for each Bellman target, whose minimum it takes"""
    critic_layer_norm: bool = False
    """layer norm before each ReLU of the critics"""
    actor_reduce: Literal["min", "mean"] = "min"
    """how the actor's objective combines the critics"""

    # --- Conservatism
    num_actions: int = 10
    """actions sampled per state: for the target's maximum and for each of the regulariser's three kinds"""
    cql_weight: float = 5.0
    """weight of the regulariser"""
    online_cql_weight: float | None = None
    """the same online; None keeps it, 0 leaves the regulariser out"""
    cql_lagrange: bool = False
    """tune the regulariser's weight by a Lagrange multiplier so that its gap meets the target"""
    target_action_gap: float = 0.8
    """that target"""
    importance_sampling: bool = True
    """subtract the log-densities of the sampled actions in the regulariser's log-sum-exp"""


# The settings of each domain; what is not named has its default above. From the paper's appendices G and H, and from
# the authors' code where the paper is silent (layers, rewards, intervals offline). Ours: kitchen's 280 steps (the
# paper's: 1,000), pick-place, pointmaze, and the first three domains' intervals online, at which evaluations play
# hardly more steps than training does; at the authors' (2,000, kitchen 5,000) they would play up to ten times as many.
DOMAINS: dict[str, dict] = {
    "antmaze": dict(critic_layers=(256, 256, 256, 256), cql_lagrange=True, reward_scale=10.0, reward_bias=-5.0,
                    offline_steps=1_000_000, online_steps=1_000_000, online_eval_interval=20_000, episode_length=1000),
    "adroit": dict(actor_layers=(512, 512), critic_layers=(512, 512, 512), cql_weight=1.0, reward_scale=10.0,
                   reward_bias=-5.0, offline_steps=20_000, online_steps=1_000_000, offline_eval_interval=2_000,
                   online_eval_interval=5_000, episode_length=200),
    "kitchen": dict(actor_layers=(512, 512, 512), critic_layers=(512, 512, 512), importance_sampling=False,
                    mixing_ratio=0.25, online_steps=1_250_000, online_eval_interval=10_000, episode_length=280),
    "pick-place": dict(gamma=0.96, batch_size=128, critic_layer_norm=True, num_actions=4, reward_scale=11.0,
                       reward_bias=-1.0, offline_steps=2_400, online_steps=7_000, offline_eval_interval=600,
                       online_eval_interval=500, eval_episodes=40),
    "pointmaze": dict(batch_size=128, actor_lr=3e-4, num_actions=4, reward_scale=10.0, reward_bias=-5.0,
                      offline_steps=2_000, online_steps=2_000, offline_eval_interval=500, online_eval_interval=500),
}


class Task(NamedTuple):
    """What makes Minari's data the paper's task.

    domain: key of `DOMAINS`. datasets: Minari ids, whose episodes are joined. settings: departures from the domain's.
    state_keys: entries of a dictionary observation that make up the state; None takes all.
    cells: (row, column) of a maze's one start and one goal.
    """

    domain: str
    datasets: tuple[str, ...]
    settings: dict = {}
    state_keys: tuple[str, ...] | None = None
    cells: tuple[tuple[int, int], ...] = ()


def antmaze(name: str, *cells: tuple[int, int], **settings) -> Task:
    return Task("antmaze", (f"D4RL/antmaze/{name}-v1",), settings, ("achieved_goal", "observation"), cells)


TASKS: dict[str, Task] = {
    "antmaze-umaze": antmaze("umaze", (3, 1), (1, 1), episode_length=700),
    "antmaze-umaze-diverse": antmaze("umaze-diverse", (1, 1), (3, 1), episode_length=700),
    "antmaze-medium-play": antmaze("medium-play", (1, 1), (6, 6)),
    "antmaze-medium-diverse": antmaze("medium-diverse", (1, 1), (6, 5)),  # (6, 6) is not among this data's goals
    "antmaze-large-play": antmaze("large-play", (1, 1), (7, 9)),
    "antmaze-large-diverse": antmaze("large-diverse", (1, 1), (7, 9)),
    "pen-binary": Task("adroit", ("D4RL/pen/human-v2", "D4RL/pen/cloned-v2"),
                       dict(online_steps=300_000, episode_length=100)),
    "door-binary": Task("adroit", ("D4RL/door/human-v2", "D4RL/door/cloned-v2")),
    "relocate-binary": Task("adroit", ("D4RL/relocate/human-v2", "D4RL/relocate/cloned-v2")),
    "kitchen-complete": Task("kitchen", ("D4RL/kitchen/complete-v2",), {}, ("observation",)),
    "kitchen-partial": Task("kitchen", ("D4RL/kitchen/partial-v2",), {}, ("observation",)),
    "kitchen-mixed": Task("kitchen", ("D4RL/kitchen/mixed-v2",), {}, ("observation",)),
    "pick-place": Task("pick-place", ("cal-ql/pick-place/narrow-v0",)),
    "pick-place-broad": Task("pick-place", ("cal-ql/pick-place/broad-v0",)),
    "pointmaze-narrow": Task("pointmaze", ("cal-ql/pointmaze/narrow-v0",), {}, ("observation",)),
}

# What a resumed run may be told anew; every other setting has to be the checkpoint's.
CHANGEABLE = ["resume", "runs_dir", "device", "tf32", "track", "offline_steps", "online_steps", "eval_workers",
              "offline_eval_interval", "online_eval_interval", "checkpoint_interval", "log_interval"]


class InputError(Exception):
    """Something the user can put right; its message is one sentence that says how."""


def find_task(env_id: str) -> Task:
    """Looks up a task by name; a Minari id becomes a task as it stands. Raises InputError for anything else."""
    known = [*TASKS, *minari.list_local_datasets()]
    if env_id not in known and "/" not in env_id:
        near = ", ".join(difflib.get_close_matches(env_id, known, cutoff=0.3) or TASKS)
        raise InputError(f"unknown --env-id {env_id!r}; did you mean {near}? Any Minari dataset id will do too.")
    return TASKS.get(env_id, Task("any other", (env_id,)))


def describe_domains() -> str:
    """The domains' and the tasks' settings as text for --help."""
    named = {**DOMAINS, **{name: task.settings for name, task in TASKS.items() if task.settings}}
    lines = [f"{name}: {', '.join(f'{k} {v}' for k, v in settings.items())}" for name, settings in named.items()]
    lines += [f"Tasks: {', '.join(TASKS)}; or any Minari dataset id."]
    return "\n\n".join(["The defaults below are those of --env-id. What each domain or task sets:", *lines])


def parse_args(argv: list[str] | None = None) -> Args:
    """Reads the command line on top of the task's settings or, with --resume, on top of the run's own.

    Raises:
        InputError: an unknown task, a value out of range, or a resumed run told to change what it cannot.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # which task's settings are the defaults
    first.add_argument("--env-id", "--env_id", default=Args.env_id)
    first.add_argument("--resume")
    known = first.parse_known_args(argv)[0]
    if known.resume:
        defaults = Args(**read_checkpoint(known.resume)["args"])
    else:
        task = find_task(known.env_id)
        defaults = Args(env_id=known.env_id, **(DOMAINS.get(task.domain, {}) | task.settings))
    args = tyro.cli(Args, default=defaults, args=argv, description=describe_domains())
    args.online_cql_weight = args.cql_weight if args.online_cql_weight is None else args.online_cql_weight
    check_args(args)
    changed = [k for k, value in vars(args).items() if value != getattr(defaults, k) and k not in CHANGEABLE]
    if known.resume and changed:
        raise InputError(f"a resumed run cannot change {', '.join(changed)}: leave that out, or start a new run.")
    return args


def check_args(args: Args) -> None:
    """Raises InputError for the first setting that is out of range."""
    rules = [
        ("eval_episodes offline_eval_interval online_eval_interval checkpoint_interval log_interval buffer_size "
         "batch_size num_actions num_critics utd_ratio actor_interval", lambda value: value >= 1, "at least 1"),
        ("seed offline_steps online_steps episode_length", lambda value: 0 <= value < 2**63, "at least 0, below 2**63"),
        ("eval_workers", lambda value: 0 <= value <= 60, "in [0, 60]"),  # Windows has no room for more
        ("cql_weight online_cql_weight", lambda value: 0 <= value < math.inf, "a finite number of at least 0"),
        ("actor_layers critic_layers", lambda value: min(value, default=0) >= 1, "one or more sizes of at least 1"),
        ("actor_lr critic_lr reward_scale", lambda value: 0 < value < math.inf, "a finite number greater than 0"),
        ("reward_bias target_action_gap target_entropy", lambda value: math.isfinite(value or 0), "a finite number"),
        ("mixing_ratio", lambda value: value == -1 or 0 <= value <= 1, "in [0, 1], or -1"),
        ("gamma", lambda value: 0 <= value < 1, "in [0, 1)"),
        ("tau", lambda value: 0 < value <= 1, "in (0, 1]"),
        ("num_target_critics", lambda value: 1 <= value <= args.num_critics, "from 1 to --num-critics"),
        ("device", lambda value: value != "cuda" or torch.cuda.is_available(), "cpu: torch finds no CUDA device"),
    ]
    for names, holds, bounds in rules:
        for name in names.split():
            if not holds(getattr(args, name)):
                raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be {bounds}.")


# ----------------------------------------------------------------------------------------------------------------------
# Data: from Minari's episodes to the paper's tasks
# ----------------------------------------------------------------------------------------------------------------------


class Episode(namedtuple("Episode", "observations actions rewards terminations")):
    """One trajectory of T steps as arrays, with rewards as the task gives them (before scale and bias).

    observations: [T+1, O] float32. actions: [T, A] float32 in (-1, 1). rewards: [T] float32. terminations: [T] bool.
    """


def open_dataset(dataset_id: str) -> minari.MinariDataset:
    """Opens a Minari dataset, downloading it where it is missing.

    Raises:
        InputError: it is not to be had (within 40 s, even on a network that swallows packets), or cannot be used.
    """
    path = minari.storage.get_dataset_path(dataset_id)
    try:
        if not (path / "data").exists():
            if dataset_id.startswith("cal-ql/"):
                raise LookupError("make it with `python -m collect.pick_place` or `python -m collect.point_maze`")
            with multiprocessing.pool.ThreadPool(1) as pool:  # a thread, because the look-up may never come back
                found = pool.apply_async(minari.list_remote_datasets, (), {"prefix": dataset_id}).get(timeout=30)
            if dataset_id not in found:
                raise LookupError("the server does not have it")
            minari.download_dataset(dataset_id)
        dataset = minari.load_dataset(dataset_id)
        next(iter(dataset), None)  # load_dataset reads the metadata only
    except Exception as error:  # whatever Minari's back-ends raise, and whatever a damaged file does
        raise InputError(f"cannot open {dataset_id} at {path} ({str(error) or 'no answer from the server'}): delete "
                         f"what is damaged, run `minari download {dataset_id}` where there is a network, or begin with "
                         f"./benchmark.sh quickstart, which makes its own data.") from error
    box = dataset.action_space
    if not isinstance(box, gym.spaces.Box) or len(box.shape) != 1 or not box.is_bounded():
        raise InputError(f"{dataset_id} has actions {box}: only vectors of continuous, bounded actions can be learned.")
    return dataset


def to_state(observation, space: gym.Space, keys: tuple[str, ...] | None) -> np.ndarray:
    """Flattens observations to states [..., O] float32, in the order of gymnasium's FlattenObservation.

    Args:
        observation: as `space` has it; leading dimensions (time) are kept.
        keys: the entries of a dictionary to take; None takes all.
    """
    if isinstance(space, gym.spaces.Dict):
        parts = [to_state(observation[key], space[key], None) for key in space if not keys or key in keys]
        return np.concatenate(parts, axis=-1)
    if not isinstance(space, gym.spaces.Box):
        raise InputError(f"observations with a part {space} cannot be learned from, only Boxes and Dicts of them.")
    leading = np.shape(observation)[: np.ndim(observation) - len(space.shape)]
    return np.asarray(observation, np.float32).reshape(*leading, -1)


def make_env(dataset: minari.MinariDataset, task: Task, episode_length: int) -> gym.Env:
    """Recovers the task's environment from the dataset's own specification. Raises InputError where it cannot."""
    kwargs: dict = {"max_episode_steps": episode_length} if episode_length else {}
    if task.domain == "antmaze":
        # The maze of the data itself (Minari's evaluation maps are mirrored for umaze), with one start and one goal.
        maze = [[1 if cell == 1 else 0 for cell in row] for row in dataset.env_spec.kwargs["maze_map"]]
        for (row, column), letter in zip(task.cells, "rg", strict=True):
            maze[row][column] = letter
        kwargs |= dict(maze_map=maze, continuing_task=False, reset_target=False)
    elif task.domain == "kitchen":
        kwargs |= dict(remove_task_when_completed=False, terminate_on_tasks_completed=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gymnasium advises newer versions, whose observations are not the data's
            env = gym.wrappers.RescaleAction(dataset.recover_environment(disable_env_checker=True, **kwargs), -1.0, 1.0)
    except (ModuleNotFoundError, TypeError, ValueError, gym.error.Error) as error:  # no module, wrong specification
        raise InputError(f"{dataset.id}'s environment cannot be made: {error}.") from error
    if env.spec.max_episode_steps is None:
        raise InputError(f"{dataset.id}'s environment has no time limit: set one with --episode-length.")
    dims = [[gym.spaces.flatdim(x.observation_space), gym.spaces.flatdim(x.action_space)] for x in (dataset, env)]
    if dims[0] != dims[1]:
        raise InputError(f"{dataset.id} has {dims[0]} entries in observations and actions, its environment {dims[1]}.")
    if task.domain == "antmaze":
        env.unwrapped.position_noise_range = 0.0  # start and goal at their cells' centres; no argument reaches it
    space, keys = env.observation_space, task.state_keys
    return gym.wrappers.TransformObservation(env, lambda observation: to_state(observation, space, keys), None)


def load_episodes(datasets: list[minari.MinariDataset], task: Task, env: gym.Env) -> list[Episode]:
    """Reads all episodes and relabels them to the task. Raises InputError for NaN or infinity, or if none is left."""
    episodes, clipped, entries, not_finite = [], 0, 0, []
    for dataset in datasets:
        box = dataset.action_space
        for data in tqdm(dataset, f"read {dataset.id}", unit="episode", leave=False, mininterval=1):
            states = to_state(data.observations, dataset.observation_space, task.state_keys)
            actions = (2 * (data.actions - box.low) / (box.high - box.low) - 1).astype(np.float32)
            rewards, terminations = np.asarray(data.rewards, np.float32), np.asarray(data.terminations, bool)
            if not (np.isfinite(states).all() and np.isfinite(actions).all() and np.isfinite(rewards).all()):
                not_finite.append(f"{data.id} of {dataset.id}")
            if task.domain == "antmaze":
                # Every row that arrives at the task's one goal succeeds and ends, whatever the data's own goal was.
                goal = env.unwrapped.maze.cell_rowcol_to_xy(np.array(task.cells[1]))
                rewards = env.unwrapped.compute_reward(data.observations["achieved_goal"][1:], goal, {})
                terminations = rewards > 0
            elif task.domain == "adroit":
                # infos have T+1 entries, the first of them the reset's: row t succeeded if success[t+1].
                success = np.asarray(data.infos["success"], bool)[1:]
                end = len(success) - int(success[::-1].argmax()) if success.any() else 0
                if end == 0:
                    continue  # failures are discarded, the rest cut after their last success (appendix G.3)
                states, actions, rewards, terminations = states[: end + 1], actions[:end], success[:end], success[:end]
            clipped, entries = clipped + int((np.abs(actions) > 1).sum()), entries + actions.size
            actions = actions.clip(-0.99999, 0.99999)  # tanh reaches +-1 only at infinity
            episodes.append(Episode(states, actions, rewards.astype(np.float32), terminations))
    if not_finite:
        raise InputError(f"NaN or infinity in {len(not_finite)} episodes; repair or drop {', '.join(not_finite[:9])}.")
    if not episodes:
        raise InputError(f"{' and '.join(task.datasets)} hold no usable episode: collect or download them anew.")
    successes = sum(bool((episode.rewards > 0).any()) for episode in episodes)
    print(f"data: {len(episodes)} episodes, {sum(len(episode.rewards) for episode in episodes)} steps, {successes} "
          f"episodes with reward > 0; {clipped} of {entries} action entries lay outside of the box and were clipped")
    if task.domain in DOMAINS and successes < 10:
        print(f"warning: only {successes} episodes succeed; below 10, seeds differ much and learning may fail.")
    return episodes


def monte_carlo_returns(rewards: np.ndarray, terminations: np.ndarray, gamma: float, tail: float) -> np.ndarray:
    """Discounted return of every row, G_t = r_t + gamma (1 - d_t) G_{t+1} [T] float32.

    Args:
        rewards: [T], scaled. terminations: [T]; a termination ends one return and starts the next.
        tail: G_T, what is assumed to come after the last row where that is no termination.
    """
    returns, following = [], tail
    for reward, terminated in zip(rewards[::-1].tolist(), terminations[::-1].tolist(), strict=True):
        following = reward + (0.0 if terminated else gamma * following)
        returns.append(following)
    return np.array(returns[::-1], np.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Replay: offline rows first, then a ring of online rows
# ----------------------------------------------------------------------------------------------------------------------


class Batch(namedtuple("Batch", "observations actions rewards next_observations terminations mc_returns")):
    """B rows of the replay as tensors, for O state and A action entries.

    observations: [B, O]. actions: [B, A]. rewards: [B], scaled and biased. next_observations: [B, O].
    terminations: [B], 1.0 where the environment ended the episode; a time-out is 0.0. mc_returns: [B].
    """


class ReplayBuffer:
    """All rows in one set of tensors on the training device: the offline rows, then a ring of `args.buffer_size`.

    Episodes enter whole and with their returns: no row is ever sampled before its return is known. `sparse` says that
    the task is one of the table, with sparse or count rewards, so that episodes cut off by time get a tail.
    """

    def __init__(self, episodes: list[Episode], args: Args, sparse: bool, device: torch.device):
        self.args, self.sparse, self.device = args, sparse, device
        ends = np.cumsum([len(episode.rewards) for episode in episodes]).tolist()
        self.num_offline, self.num_online, self.cursor = ends[-1], 0, 0
        state, action = episodes[0].observations.shape[1:], episodes[0].actions.shape[1:]
        rows, sizes = self.num_offline + args.buffer_size, (state, action, (), state, (), ())
        self.columns = Batch(*(torch.empty(rows, *size, device=device) for size in sizes))
        for episode, end in zip(episodes, ends, strict=True):
            self.write(episode, torch.arange(end - len(episode.rewards), end, device=device))
        # Device scalars: they change between episodes, while sampling keeps its shapes and needs no host.
        self.offline_share, self.online_rows = torch.zeros(2, dtype=torch.float64, device=device)
        self.update_share()

    def write(self, episode: Episode, index: torch.Tensor) -> None:
        """Writes the last len(index) rows of an episode, with their returns, to the rows `index`."""
        rewards = episode.rewards * self.args.reward_scale + self.args.reward_bias
        # Cut off by time, the last reward is assumed to go on for ever (the authors' code does so).
        tail = float(rewards[-1]) / (1 - self.args.gamma) if self.sparse else 0.0
        returns = monte_carlo_returns(rewards, episode.terminations, self.args.gamma, tail)
        states, actions, _, terminations = episode
        rows = Batch(states[:-1], actions, rewards, states[1:], terminations, returns)
        for column, values in zip(self.columns, rows, strict=True):
            column[index] = torch.as_tensor(values[-len(index) :], dtype=torch.float32).to(self.device)

    def add(self, episode: Episode) -> None:
        """Appends an online episode; the oldest online rows make room for it."""
        size, count = self.args.buffer_size, min(len(episode.rewards), self.args.buffer_size)
        self.write(episode, self.num_offline + (self.cursor + torch.arange(count, device=self.device)) % size)
        self.cursor, self.num_online = (self.cursor + count) % size, min(self.num_online + count, size)
        self.update_share()

    def update_share(self) -> None:
        """Sets the share of offline rows in a batch (appendix H.2); it is 1 without online rows."""
        share = self.num_offline / (self.num_offline + self.num_online)
        self.offline_share.fill_(self.args.mixing_ratio if self.num_online and self.args.mixing_ratio != -1 else share)
        self.online_rows.fill_(self.num_online)

    def sample(self, batch_size: int) -> Batch:
        """Draws int(share * B) offline rows and the rest online, with replacement."""
        chance = torch.rand(batch_size, dtype=torch.float64, device=self.device)
        offline = torch.arange(batch_size, device=self.device) < (self.offline_share * batch_size).floor()
        index = torch.where(offline, chance * self.num_offline, self.num_offline + chance * self.online_rows).long()
        return Batch(*(column[index] for column in self.columns))

    def state_dict(self) -> dict:
        """The online rows; the offline rows are read from the dataset again."""
        # Copied, because a view would be saved with the whole of its storage.
        online = [column[self.num_offline :][: self.num_online].to("cpu", copy=True) for column in self.columns]
        return {"online": online, "cursor": self.cursor, "num_offline": self.num_offline}

    def load_state_dict(self, state: dict) -> None:
        self.cursor, self.num_online = state["cursor"], len(state["online"][0])
        for column, values in zip(self.columns, state["online"], strict=True):
            column[self.num_offline :][: self.num_online] = values.to(self.device)
        self.update_share()


# ----------------------------------------------------------------------------------------------------------------------
# Networks
# ----------------------------------------------------------------------------------------------------------------------


class Critic(nn.Module):
    """An ensemble of N critics on concat(s, a): every layer is one batched matrix product over the N."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.split, self.layer_norm, n = [obs_dim, action_dim], args.critic_layer_norm, args.num_critics
        widths = [obs_dim + action_dim, *args.critic_layers, 1]
        self.weights = nn.ParameterList(torch.empty(n, i, o) for i, o in zip(widths, widths[1:], strict=False))
        self.biases = nn.ParameterList(torch.zeros(n, 1, o) for o in widths[1:])
        for layer in self.weights:
            for weight in layer.data:
                nn.init.orthogonal_(weight, 0.01 if layer is self.weights[-1] else 2**0.5)

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Q-values [N, B, K] of K actions for each state: observations [B, O], actions [B, K, A]."""
        # The states' part of the first layer is computed once per state, not once per action.
        obs_weight, action_weight = self.weights[0].split(self.split, dim=1)
        h_obs = observations @ obs_weight + self.biases[0]  # [N, B, H]
        h = (actions.flatten(0, 1) @ action_weight).unflatten(1, actions.shape[:2])  # [N, B, K, H]
        h = (h + h_obs.unsqueeze(2)).flatten(1, 2)  # [N, B*K, H]
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            if self.layer_norm:
                h = nn.functional.layer_norm(h, h.shape[-1:])
            h = torch.baddbmm(bias, torch.relu(h), weight)
        return h.squeeze(2).unflatten(1, actions.shape[:2])


class Actor(nn.Module):
    """A tanh-Gaussian policy; its log-deviation is rescaled by two learnable scalars (the authors' code)."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        widths = [obs_dim, *args.actor_layers]
        layers = [layer for i, o in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], 2 * action_dim))
        self.log_std_multiplier, self.log_std_offset = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(-1.0))
        for layer in self.net[::2]:
            nn.init.orthogonal_(layer.weight, 0.01 if layer is self.net[-1] else 2**0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-deviation [B, A] of the Gaussian under the tanh, for observations [B, O]."""
        mean, log_std = self.net(observations).chunk(2, dim=1)
        return mean, (self.log_std_multiplier * log_std + self.log_std_offset).clamp(-20.0, 2.0)

    @torch.no_grad()
    def act(self, state: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
        """An action [A] for one state [O]: drawn with the generator or, without one, the deterministic tanh(mean)."""
        mean, log_std = self(torch.from_numpy(state).unsqueeze(0))
        noise = torch.randn(mean.shape, generator=generator) if generator else torch.zeros_like(mean)
        return torch.tanh(mean + log_std.exp() * noise).squeeze(0).numpy()


Gaussian = tuple[torch.Tensor, torch.Tensor]  # what the actor gives for a batch of states: mean, log-deviation [B, A]


def sample_actions(policy: Gaussian, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K actions a state, tanh(mean + deviation * noise) [B, K, A], and their log-densities [B, K]; noise: [B, K, A]."""
    mean, log_std = (x.unsqueeze(1) for x in policy)
    u = mean + log_std.exp() * noise
    log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_slope = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))  # log(1 - tanh(u)^2), without cancellation
    return torch.tanh(u), (log_normal - log_slope).sum(2)


class Agent(nn.Module):
    """All that learns: actor, critics, target critics, log-temperature, logarithm of the Lagrange multiplier."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.actor, self.critic = Actor(obs_dim, action_dim, args), Critic(obs_dim, action_dim, args)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha, self.log_cql_alpha = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.tensor(1.0))
        self.target_entropy = -float(action_dim) if args.target_entropy is None else args.target_entropy

    def make_optimizer(self, args: Args) -> torch.optim.Optimizer:
        """One Adam, in which the actor's side and the critics' side have learning rates of their own."""
        actor_side, critic_side = [*self.actor.parameters(), self.log_alpha], [*self.critic.parameters()]
        groups = [dict(params=actor_side, lr=args.actor_lr), dict(params=[*critic_side, self.log_cql_alpha])]
        return torch.optim.Adam(groups, lr=args.critic_lr, fused=True, capturable=self.log_alpha.is_cuda)


# ----------------------------------------------------------------------------------------------------------------------
# The update
# ----------------------------------------------------------------------------------------------------------------------


class Noise(namedtuple("Noise", "actor target uniform current following critics")):
    """What an update draws, all of it independent, and shared between the critics. n = num_actions.

    actor: [B, 1, A] normal, for the actor's loss. target: [B, n, A] normal, for the Bellman target's a' ~ pi(s').
    uniform: [B, n, A] in [-1, 1]. current, following: [B, n, A] normal, for the regulariser's a ~ pi(s), a ~ pi(s').
    critics: [num_target_critics] indices of the critics whose minimum makes the target.
    """


def draw_noise(actions: torch.Tensor, args: Args) -> Noise:
    """Draws an update's noise for a batch of actions [B, A], on their device."""
    n, (batch_size, action_dim), device = args.num_actions, actions.shape, actions.device
    actor, *normal = torch.randn(batch_size, 1 + 3 * n, action_dim, device=device).split([1, n, n, n], dim=1)
    uniform = torch.rand(batch_size, n, action_dim, device=device) * 2 - 1
    critics = torch.rand(args.num_critics, device=device).topk(args.num_target_critics).indices
    return Noise(actor, normal[0], uniform, normal[1], normal[2], critics)


def actor_losses(agent: Agent, batch: Batch, policy: Gaussian, noise: Noise, args: Args):
    """SAC's losses of the actor and of the temperature, scalars."""
    action, log_prob = sample_actions(policy, noise.actor)  # [B, 1, A], [B, 1]
    q = agent.critic(batch.observations, action)  # [N, B, 1]
    q = q.amin(0) if args.actor_reduce == "min" else q.mean(0)
    actor_loss = (agent.log_alpha.exp().detach() * log_prob - q).mean()
    alpha_loss = -(agent.log_alpha * (log_prob.detach() + agent.target_entropy)).mean()
    return actor_loss, alpha_loss


@torch.no_grad()
def bellman_target(agent: Agent, batch: Batch, next_policy: Gaussian, noise: Noise, args: Args) -> torch.Tensor:
    """r + gamma (1 - d) max_k min_i Q_i(s', a'_k) [B]: minimum over critics, then maximum over actions (H.3)."""
    next_actions, next_log_prob = sample_actions(next_policy, noise.target)
    next_q = agent.target_critic(batch.next_observations, next_actions)[noise.critics].amin(0)  # [B, n]
    if args.backup_entropy:
        next_q = next_q - agent.log_alpha.exp() * next_log_prob
    return batch.rewards + args.gamma * (1 - batch.terminations) * next_q.amax(1)


def critic_losses(agent: Agent, batch: Batch, target: torch.Tensor, policy: Gaussian, next_policy: Gaussian,
                  noise: Noise, cql_weight: float, args: Args):
    """The losses of the critics (their sum) and of the Lagrange multiplier, scalars, and scalars to log.

    Args:
        target: [B]. policy, next_policy: the actor's output at s and at s'.
        cql_weight: weight of the regulariser; at 0 it is not computed.
    """
    n = args.num_actions if cql_weight else 0
    with torch.no_grad():  # sampled actions carry no gradient into the critics' loss
        current_actions, current_log_prob = sample_actions(policy, noise.current[:, :n])
        next_actions, next_log_prob = sample_actions(next_policy, noise.following[:, :n])
    # One call for all actions, those of pi(s') too are evaluated at s: [B, 1 + 3n, A].
    actions = torch.cat([batch.actions.unsqueeze(1), noise.uniform[:, :n], next_actions, current_actions], dim=1)
    q_data, q_ood = agent.critic(batch.observations, actions).split([1, 3 * n], dim=2)  # [N, B, 1], [N, B, 3n]
    td_loss = (q_data.squeeze(2) - target).square().mean(1)  # [N]
    metrics = {f"losses/qf{i + 1}_values": q for i, q in enumerate(q_data.mean((1, 2)))}
    metrics |= {f"losses/qf{i + 1}_loss": loss for i, loss in enumerate(td_loss)}
    metrics |= {"calibration/mean_q": q_data.mean(), "calibration/mean_mc_return": batch.mc_returns.mean()}
    if not cql_weight:
        return td_loss.sum(), td_loss.new_zeros(()), metrics

    # The reference value V^mu(s), the row's Monte-Carlo return, bounds the policy's actions but not the uniform ones.
    # The bound rate is the share of the policy's actions, of pi(s) and of pi(s'), whose Q lies below it.
    floor = nn.functional.pad(batch.mc_returns.unsqueeze(1).expand(-1, 2 * n), (n, 0), value=-math.inf)  # [B, 3n]
    metrics["calibration/bound_rate"] = (q_ood.detach() < floor)[..., n:].float().mean()
    # Here Cal-QL has its one statement more, the maximum of q_ood and floor (its equation 5.1).

    # CQL's soft maximum over all sampled actions, each weighted by one over its density.
    if args.importance_sampling:
        log_uniform = torch.full_like(current_log_prob, batch.actions.shape[1] * math.log(0.5))  # density 0.5^A
        z = q_ood - torch.cat([log_uniform, next_log_prob, current_log_prob], dim=1)
    else:
        z = torch.cat([q_ood, q_data], dim=2)
    cql_gap = (z.logsumexp(2) - q_data.squeeze(2)).mean(1)  # [N]
    if args.cql_lagrange:
        cql_alpha, gap = agent.log_cql_alpha.exp().clamp(0.0, 1e6), cql_gap - args.target_action_gap
        cql_loss, cql_alpha_loss = cql_alpha.detach() * cql_weight * gap, -cql_alpha * cql_weight * gap.detach().mean()
        metrics |= {"losses/cql_alpha": cql_alpha, "losses/cql_alpha_loss": cql_alpha_loss}
    else:
        cql_loss, cql_alpha_loss = cql_weight * cql_gap, td_loss.new_zeros(())
    metrics |= {"losses/cql_loss": cql_loss.sum(), "losses/cql_gap": cql_gap.mean()}
    return (td_loss + cql_loss).sum(), cql_alpha_loss, metrics


def update(agent: Agent, optimizer: torch.optim.Optimizer, batch: Batch, noise: Noise, cql_weight: float,
           with_actor: bool, args: Args) -> dict[str, torch.Tensor]:
    """One update: all gradients at the old parameters, then one step of everything, then the target critics'.

    Args:
        with_actor: whether actor and temperature step too.

    Returns:
        scalars to log, still on the device: reading one waits for it.
    """
    policy = agent.actor(batch.observations)
    with torch.no_grad():
        next_policy = agent.actor(batch.next_observations)
    target = bellman_target(agent, batch, next_policy, noise, args)
    critic_loss, cql_alpha_loss, metrics = critic_losses(
        agent, batch, target, policy, next_policy, noise, cql_weight, args)
    optimizer.zero_grad()
    (critic_loss + cql_alpha_loss).backward()
    metrics |= {"losses/qf_loss": critic_loss, "losses/alpha": agent.log_alpha.exp()}
    if with_actor:
        actor_loss, alpha_loss = actor_losses(agent, batch, policy, noise, args)
        # `inputs` keeps the actor's loss out of the critics' gradients.
        (actor_loss + alpha_loss).backward(inputs=[*agent.actor.parameters(), agent.log_alpha])
        metrics |= {"losses/actor_loss": actor_loss, "losses/alpha_loss": alpha_loss}
    optimizer.step()  # what has no gradient stays as it is
    with torch.no_grad():
        torch._foreach_lerp_(list(agent.target_critic.parameters()), list(agent.critic.parameters()), args.tau)
    return {name: value.detach() for name, value in metrics.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Episodes and evaluation
# ----------------------------------------------------------------------------------------------------------------------

TRAINING, EVALUATION, PROBE = range(3)  # streams of seeds


def derive_seed(seed: int, stream: int, index: int) -> int:
    """A seed of its own for every episode: environments hold random states that no checkpoint can save."""
    return int(np.random.SeedSequence((seed, stream, index)).generate_state(1)[0])


def roll_out(env: gym.Env, task: Task, actor: Actor, seed: int, stochastic: bool, check):
    """Plays one whole episode with a frozen actor on the CPU.

    Args:
        seed: of the environment and of the policy's noise.
        stochastic: whether to draw from the policy (online episodes) or to take tanh(mean) (evaluation).
        check: called before every step; what it raises ends the episode, of which nothing has counted then.

    Returns:
        the episode, and its score: the share of the kitchen's tasks done, else whether there was a success; None where
        the environment tells neither.
    """
    generator, score = torch.Generator().manual_seed(seed) if stochastic else None, None
    states, actions, rewards, terminations, truncated = [env.reset(seed=seed)[0]], [], [], [False], False
    while not (terminations[-1] or truncated):
        check()
        actions.append(actor.act(states[-1], generator).clip(-0.99999, 0.99999))
        state, reward, terminated, truncated, info = env.step(actions[-1])
        if task.domain == "adroit":  # the binary tasks: the dense reward is replaced, success ends the episode
            reward, terminated = float(info["success"]), terminated or bool(info["success"])
        if "episode_task_completions" in info:  # a list that reset() clears: take its length now
            score = len(info["episode_task_completions"]) / len(env.unwrapped.goal)
        elif "success" in info:
            score = max(score or 0.0, float(info["success"]))
        states.append(state)
        rewards.append(reward)
        terminations.append(terminated)  # never the time limit: the value of a state does not end there
    return Episode(*map(np.array, (states, actions, rewards, terminations[1:]))), score


def play(actor: Actor, seed: int, stochastic: bool):
    """`roll_out` in a worker process, which `start_worker` has made ready."""
    return roll_out(*play.place, actor, seed, stochastic, lambda: None)


def start_worker(args: Args) -> None:
    """Readies a worker process for `play`. Signals are the main process's to answer; when that ends, so does this."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(0)), daemon=True).start()
    torch.set_num_threads(1)
    task = find_task(args.env_id)
    play.place = make_env(open_dataset(task.datasets[-1]), task, args.episode_length), task


def make_workers(count: int, args: Args) -> concurrent.futures.Executor:
    """Processes with an environment each."""
    context = multiprocessing.get_context("spawn")  # forked ones would share locks and graphics with this process
    workers = concurrent.futures.ProcessPoolExecutor(count, context, start_worker, (args,))
    list(workers.map(abs, range(count)))  # waits until all have started: half-made ones would die of a signal
    return workers


@torch.no_grad()
def probe(agent: Agent, buffer: ReplayBuffer, seed: int, args: Args) -> dict[str, float]:
    """Mean Q, mean Monte-Carlo return and bound rate over four batches' rows, with random numbers of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        batch = buffer.sample(4 * args.batch_size)
        policies = map(agent.actor, (batch.observations, batch.next_observations))
        # The rewards stand in for a target: of the results only what is logged is used.
        metrics = critic_losses(agent, batch, batch.rewards, *policies, draw_noise(batch.actions, args), 1.0, args)[2]
    return {name.split("/")[1]: value.item() for name, value in metrics.items() if name.startswith("calibration/")}


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def read_checkpoint(run: str) -> dict:
    """Reads a run's checkpoint. Raises InputError where there is none, it is damaged, or another script wrote it."""
    path = Path(run) / "checkpoint.pt"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        script = checkpoint["script"]
    except Exception as error:  # a damaged file can fail in any of the unpickler's ways
        raise InputError(f"--resume {run}: {path} is missing or damaged ({type(error).__name__}).") from error
    if script != Path(__file__).stem:
        raise InputError(f"{run} was made by {script}.py; resume it with that script.")
    return checkpoint


class Stopped(Exception):
    """Ends a run with an exit code and a message; it can be resumed from its last checkpoint."""


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def keep_memory() -> None:
    """Lets glibc keep an update's memory for the next one, instead of returning it to the system each time."""
    if sys.platform == "linux":
        set_option = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)  # other libraries have no such option
        set_option(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        set_option(-3, 2**25)  # M_MMAP_THRESHOLD


def capture(function):
    """Makes of a function that leaves all work to the GPU one CUDA graph: one launch a call, nothing from the host.

    The first three calls run as they are, for CUDA sets itself up in them, and the fourth is captured. From then on
    every call repeats it: tensors that it reads may have changed in place, numbers are those of the capture.
    """
    graph, stream, results, calls = torch.cuda.CUDAGraph(), torch.cuda.Stream(), {}, itertools.count(1)

    def call() -> dict[str, torch.Tensor]:
        number = next(calls)
        if number <= 3:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results.update(function())
            torch.cuda.current_stream().wait_stream(stream)
            return results
        if number == 4:
            with torch.cuda.graph(graph):
                results.update(function())
        graph.replay()
        return results

    return call


EVAL_COLUMNS = "phase,updates,env_steps,score,return,regret,mean_q,mean_mc_return,bound_rate,wall_time"


def train(args: Args) -> None:
    """Runs or resumes both phases. Raises InputError, before anything is written, or Stopped."""
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    keep_memory()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    task, started = find_task(args.env_id), time.time()
    datasets = [open_dataset(dataset_id) for dataset_id in task.datasets]
    env = make_env(datasets[-1], task, args.episode_length)
    buffer = ReplayBuffer(load_episodes(datasets, task, env), args, task.domain in DOMAINS, device)
    torch.manual_seed(args.seed)
    agent = Agent(buffer.columns.observations.shape[1], buffer.columns.actions.shape[1], args).to(device)
    optimizer = agent.make_optimizer(args)
    # Where the run stands: with networks, online rows and random state all that resuming needs. `owed` are the updates
    # still to be made for the last episode, `evals` the evaluations begun, `offline_evals` those up to the switch,
    # `evaluated_at` the last one's step(); `rows` are the lines of eval.csv, `scores` one of each; `wall_time` is in
    # seconds.
    progress = SimpleNamespace(phase="offline", updates=0, offline_updates=0, env_steps=0, episodes=0, owed=0, evals=0,
                               offline_evals=0, evaluated_at=-1, rows=[], scores=[], regret=math.nan, wall_time=0.0)
    acting, begun = copy.deepcopy(agent.actor).cpu(), []  # plays online episodes; the evaluation that has no row yet

    if args.resume:
        run, checkpoint = Path(args.resume), read_checkpoint(args.resume)
        if checkpoint["buffer"]["num_offline"] != buffer.num_offline:
            raise InputError(f"{args.env_id}'s data has changed since {run} began: restore it, or start a new run.")
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        for group in optimizer.param_groups:  # loaded too, but of the device that the checkpoint was written on
            group["capturable"] = device.type == "cuda"
        buffer.load_state_dict(checkpoint["buffer"])
        progress = SimpleNamespace(**checkpoint["progress"])
        acting.load_state_dict(checkpoint["acting"])
        torch.set_rng_state(checkpoint["rng"][0])
        torch.cuda.set_rng_state_all(checkpoint["rng"][1 : 1 + torch.cuda.device_count()])
        started -= progress.wall_time
    else:
        name = f"{args.env_id.replace('/', '-')}__{Path(__file__).stem}__{args.seed}__{time.time_ns() // 1_000_000}"
        run = Path(args.runs_dir) / name
    if args.track:
        try:
            import wandb

            wandb.init(name=run.name, id=run.name, config=vars(args), sync_tensorboard=True, resume="allow")
        except Exception as error:
            raise InputError(f"--track: {error} (log in with `wandb login`, or set WANDB_MODE=offline)") from error
    run.mkdir(parents=True, exist_ok=True)
    (run / "eval.csv").write_text("\n".join([EVAL_COLUMNS, *progress.rows, ""]))  # cut back to the checkpoint
    (run / "config.json").write_text(json.dumps(vars(args), indent=2) + "\n")

    def step() -> int:
        """The x-axis of all logs: offline updates, then on with the environment steps whose updates have been made."""
        return progress.offline_updates + progress.env_steps - math.ceil(progress.owed / args.utd_ratio)

    writer = SummaryWriter(str(run), purge_step=step() if args.resume else None)
    writer.add_text("settings", json.dumps(vars(args)))
    print(f"run: {run} on {device}\nsettings:", ", ".join(f"{k} {v}" for k, v in vars(args).items()))
    latest, signals = {}, []  # the last update's losses, on the device; signals that arrived

    def log(scalars: dict[str, float], at: int | None = None) -> None:
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, step() if at is None else at)

    def read_losses() -> dict[str, float]:
        losses = {name: latest.pop(name).item() for name in list(latest)}  # emptied, so that nothing is logged twice
        for name, value in losses.items():
            if not math.isfinite(value):
                raise Stopped(1, f"error: {name} is {value} at update {progress.updates}; {run} keeps its checkpoint")
        return losses

    def save() -> None:
        read_losses()
        write_evaluation()
        progress.wall_time = time.time() - started
        torch.save({
            "script": Path(__file__).stem, "args": vars(args), "progress": vars(progress), "agent": agent.state_dict(),
            "optimizer": optimizer.state_dict(), "buffer": buffer.state_dict(), "acting": acting.state_dict(),
            "rng": [torch.get_rng_state(), *torch.cuda.get_rng_state_all()],
        }, run / "checkpoint.partial")
        os.replace(run / "checkpoint.partial", run / "checkpoint.pt")  # in one step: one of the two is always whole

    def check() -> None:  # called only where the run's state is whole
        if signals:
            save()
            raise Stopped(128 + signals[0], f"stopped by {signal.Signals(signals[0]).name}; --resume {run} continues")

    @functools.cache  # on CUDA a graph for each phase's weight, with the actor's part and without
    def prepare_update(cql_weight: float, with_actor: bool):
        def sample_and_update() -> dict[str, torch.Tensor]:
            batch = buffer.sample(args.batch_size)
            return update(agent, optimizer, batch, draw_noise(batch.actions, args), cql_weight, with_actor, args)

        return capture(sample_and_update) if device.type == "cuda" else sample_and_update

    def make_update(cql_weight: float, bar: tqdm) -> None:
        check()
        latest.update(prepare_update(cql_weight, (progress.updates + 1) % args.actor_interval == 0)())
        progress.updates, progress.owed = progress.updates + 1, max(progress.owed - 1, 0)
        progress.offline_updates += progress.phase == "offline"
        bar.update(step() - bar.n)
        if progress.updates % args.log_interval == 0:
            seconds = time.time() - started
            log(read_losses() | {"charts/UPS": progress.updates / seconds, "charts/SPS": progress.env_steps / seconds})
        if progress.updates % args.checkpoint_interval == 0:
            save()

    def evaluate() -> None:
        """Evaluates the policy as it is now. With workers its row is written by the next evaluation or checkpoint."""
        write_evaluation()
        actor, count = copy.deepcopy(agent.actor).cpu(), progress.evals
        seeds = [derive_seed(args.seed, EVALUATION, count * args.eval_episodes + k) for k in range(args.eval_episodes)]
        if args.eval_workers:
            played = evaluators.map(play, itertools.repeat(actor), seeds, itertools.repeat(False))
        else:
            played = [roll_out(env, task, actor, seed, False, check) for seed in seeds]
        progress.evals, progress.evaluated_at = count + 1, step()
        values = probe(agent, buffer, derive_seed(args.seed, PROBE, count), args)
        begun.append((vars(progress) | values | {"wall_time": time.time() - started}, played))
        if not args.eval_workers:
            write_evaluation()

    def write_evaluation() -> None:
        """Writes the row of the evaluation begun last, if it has none yet, once all its episodes have been played."""
        if not begun:
            return
        row, played = begun.pop()
        episodes, scores = zip(*played, strict=True)
        row["return"] = sum(float(episode.rewards.sum()) for episode in episodes) / len(episodes)
        scored = None not in scores
        progress.scores.append(sum(scores) / len(scores) if scored else row["return"])
        if row["phase"] == "online" and scored:  # regret: mean of 1 - score over the online evaluations (section 6)
            progress.regret = 1 - float(np.mean(progress.scores[progress.offline_evals :]))
        row |= {"score": progress.scores[-1], "regret": progress.regret}
        progress.rows.append(",".join(str(row[column]) for column in EVAL_COLUMNS.split(",")))
        (run / "eval.csv").write_text("\n".join([EVAL_COLUMNS, *progress.rows, ""]))
        values = {column: row[column] for column in EVAL_COLUMNS.split(",")[3:-1]}
        success = {"success_rate": row["score"], "normalized_score": 100 * row["score"]} if scored else {}
        log({"charts/cumulative_regret": progress.regret} | {f"eval/{k}": v for k, v in (values | success).items()},
            row["evaluated_at"])
        tqdm.write(f"{row['phase']:7}  updates {row['updates']}  env_steps {row['env_steps']}  "
                   + "  ".join(f"{name} {value:.3f}" for name, value in values.items()))

    evaluators, player = (make_workers(count, args) if count else None for count in (args.eval_workers, args.overlap))
    handlers = {n: signal.signal(n, lambda number, _: signals.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        # Phase 1: offline pre-training, up to the evaluation at the switch.
        if progress.phase == "offline":
            with tqdm(total=args.offline_steps, initial=step(), desc="offline", mininterval=1) as bar:
                while progress.updates < args.offline_steps:
                    if progress.updates % args.offline_eval_interval == 0 and step() > progress.evaluated_at:
                        evaluate()
                    make_update(args.cql_weight, bar)
            evaluate()
            progress.phase, progress.offline_evals = "online", progress.evals  # and nothing is reinitialised
            acting.load_state_dict(agent.actor.state_dict())
            save()

        # Phase 2: online fine-tuning, one whole episode and then the updates owed for it.
        last = progress.offline_updates + args.online_steps
        with tqdm(total=last, initial=step(), desc="online", mininterval=1) as bar:
            while True:
                seed = derive_seed(args.seed, TRAINING, progress.episodes)
                if args.overlap and progress.env_steps < args.online_steps:
                    ahead = player.submit(play, acting, seed, True)  # plays during the updates
                while progress.owed:
                    make_update(args.online_cql_weight, bar)
                evaluated, interval = progress.evaluated_at - progress.offline_updates, args.online_eval_interval
                due = progress.env_steps // interval > evaluated // interval or progress.env_steps >= args.online_steps
                if due and progress.env_steps > evaluated:
                    evaluate()
                if progress.env_steps >= args.online_steps:
                    break
                if args.overlap:
                    episode, _ = ahead.result()
                acting.load_state_dict(agent.actor.state_dict())
                if not args.overlap:
                    episode, _ = roll_out(env, task, acting, seed, True, check)
                buffer.add(episode)
                length, progress.episodes = len(episode.rewards), progress.episodes + 1
                progress.env_steps, progress.owed = progress.env_steps + length, length * args.utd_ratio
                log({"charts/episodic_return": float(episode.rewards.sum()), "charts/episodic_length": length})
        save()
        print(f"{args.env_id} seed {args.seed}: score {progress.scores[progress.offline_evals - 1]:.3f} before "
              f"fine-tuning -> {progress.scores[-1]:.3f} after, regret {progress.regret:.3f} ({run})")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for worker in multiprocessing.active_children():  # what they play is not needed any more
            worker.kill()
        for workers in filter(None, (evaluators, player)):
            workers.shutdown()
        writer.close()
        env.close()


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 for a loss that is not finite, 2 for bad input, 130 for SIGINT, 143 for SIGTERM."""
    try:
        train(parse_args(argv))
        return 0
    except (InputError, OSError) as error:  # OSError: a folder that cannot be made, a full disk
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        print(stop.args[1], file=sys.stderr)
        return stop.args[0]
    except KeyboardInterrupt:  # before training began: there is nothing to save
        return 130


if __name__ == "__main__":
    sys.exit(main())
