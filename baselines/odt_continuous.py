"""ODT: the Online Decision Transformer (Zheng, Zhang & Grover 2022, arXiv:2202.05607).

Control as sequence modelling. A causal transformer reads the last K steps, each as three tokens: the return R still to
come, the state, the action; it says which action comes next. Asked for a high return, it does what was done in the
trajectories that had one. The likelihood of their actions is maximised, with an entropy as in SAC:

    min_pi  E_D[ -log pi(a_t | R_{t-K+1}, s_{t-K+1}, a_{t-K+1}, ..., R_t, s_t) ] - lambda H(pi),   lambda: H >= -dim(A)

Online an episode is asked for more than an evaluation is, and is stored with the returns that it had. Offline and new
trajectories share one replay. There is no critic, hence no mean_q and no bound_rate in eval.csv (NaN), and its
mean_mc_return is the mean undiscounted return of the replay's trajectories.

    python baselines/odt_continuous.py --env-id antmaze-large-diverse
    python baselines/odt_continuous.py --resume runs/<run>
"""

import os
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C amid the imports ends the process without a traceback
elif __name__ == "__mp_main__":  # a process of --eval-async, which ends with the run, without a word
    sys.stderr = open(os.devnull, "w")

import dataclasses
import functools
import hashlib
import importlib
import json
import math
import re
import threading
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import gymnasium as gym
import minari
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# --- Settings ---------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Args:
    """The settings of a run. `task_defaults(env_id)` gives those of the paper, where there are any, for a task."""

    # --- Run and protocol
    env_id: str = "antmaze-large-diverse"  # a task of the table TASKS, or any Minari dataset id
    seed: int = 1  # of networks, batches and episodes
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to train; auto takes CUDA where there is one
    threads: int = 0  # CPU threads; 0 leaves the choice to torch
    resume: str | None = None  # folder of a run to continue; step totals, intervals, device, threads, track may change
    init_from: str | None = None  # folder of a run whose offline phase this one starts after, with its settings
    track: bool = False  # log to Weights & Biases too; WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE are obeyed
    offline_steps: int = 7_000  # gradient updates of the offline phase
    online_steps: int = 500_000  # environment steps of the online phase, completed to whole episodes
    offline_eval_interval: int = 1_000  # updates between two evaluations offline
    online_eval_interval: int = 5_000  # environment steps between two evaluations online
    eval_episodes: int = 20  # episodes of an evaluation, with the deterministic policy
    eval_async: bool = False  # play each of them in a process of its own, instead of all in this one
    episode_length: int = 0  # time limit of an episode in steps; 0 keeps the environment's own
    # --- Sequences
    buffer_trajectories: int = 1_500  # trajectories kept; a new one replaces the worst of the data first
    batch_size: int = 256  # sequences in a batch
    context_length: int = 20  # steps K of a sequence
    eval_context_length: int = 5  # steps that the policy looks back on when it acts
    updates_per_episode: int = 300  # gradient updates after each online episode
    eval_return: float = 1.0  # return asked for in evaluations ...
    online_return: float = 2.0  # ... and in online episodes, in the task's own rewards
    reward_scale: float = 1.0  # the network reads returns multiplied by this
    # --- Transformer
    embedding_dim: int = 512  # width D of a token
    num_layers: int = 4  # transformer blocks
    num_heads: int = 4  # attention heads in each
    dropout: float = 0.1  # on embeddings, attention and residuals, in updates only
    lr: float = 1e-4  # learning rate of the transformer, reached ...
    warmup_updates: int = 10_000  # ... linearly over this many updates, which both phases count
    max_grad_norm: float = 0.25  # its gradient is scaled down to this norm
    initial_temperature: float = 0.1  # weight lambda of the entropy at first; 0 leaves the entropy out
    temperature_lr: float = 1e-4  # learning rate of its logarithm


# --- Batch and network ------------------------------------------------------------------------------------------------
# B sequences of K steps: returns [B, K] still to come, scaled; observations [B, K, O], actions [B, K, A] in (-1, 1),
# time_steps [B, K] since the trajectory began, mask [B, K]: 1.0 at a step, 0.0 at padding, which comes first.
Batch = namedtuple("Batch", "returns observations actions time_steps mask")
MAX_TIME = 1_000  # time steps with an embedding of their own; later ones share the last


class Transformer(nn.Module):
    """From sequences to a Gaussian under a tanh at each step, given what came before it, its return and its state."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        dim, self.num_heads = args.embedding_dim, args.num_heads
        self.embed_return, self.embed_state = nn.Linear(1, dim), nn.Linear(obs_dim, dim)
        self.embed_action, self.embed_time = nn.Linear(action_dim, dim), nn.Embedding(MAX_TIME, dim)
        self.norm, self.dropout = nn.LayerNorm(dim), nn.Dropout(args.dropout)
        block = nn.TransformerEncoderLayer(
            dim, args.num_heads, 4 * dim, args.dropout, "relu", batch_first=True, norm_first=True
        )
        block.dropout.p = 0.0  # within the perceptron GPT-2 has none; `dropout1` and `dropout2` are the residuals'
        self.blocks = nn.TransformerEncoder(block, args.num_layers, nn.LayerNorm(dim), enable_nested_tensor=False)
        for name, parameter in self.blocks.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        self.mean, self.log_std = nn.Linear(dim, action_dim), nn.Linear(dim, action_dim)
        for head in (self.mean, self.log_std):
            nn.init.orthogonal_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-deviation [B, K, A]; the last entry of `actions` has no influence on them."""
        # Tokens R_1, s_1, a_1, R_2, ... [B, 3K, D], each with its step's time.
        tokens = [self.embed_return(batch.returns.unsqueeze(2)), self.embed_state(batch.observations)]
        tokens = torch.stack([*tokens, self.embed_action(batch.actions)], dim=2)  # [B, K, 3, D]
        tokens = tokens + self.embed_time(batch.time_steps.clamp(max=MAX_TIME - 1)).unsqueeze(2)
        tokens = self.dropout(self.norm(tokens.flatten(1, 2)))

        # A token attends to itself and to earlier ones that are no padding: padding, having itself, stays finite.
        length = tokens.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
        itself = torch.eye(length, dtype=torch.bool, device=tokens.device)
        padding = (batch.mask == 0).repeat_interleave(3, dim=1).unsqueeze(1)  # [B, 1, 3K]
        blocked = later | (padding & ~itself)  # [B, 3K, 3K]
        hidden = self.blocks(tokens, mask=blocked.repeat_interleave(self.num_heads, dim=0))
        hidden = hidden[:, 1::3]  # at the states, which see their return but not their action
        return self.mean(hidden), -5.0 + 3.5 * (torch.tanh(self.log_std(hidden)) + 1)  # in [-5, 2]


# --- Agent and update -------------------------------------------------------------------------------------------------
class Agent(nn.Module):
    """All that learns, transformer and temperature; with the offline states' statistics."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.action_dim, self.transformer = action_dim, Transformer(obs_dim, action_dim, args)
        self.log_temperature = nn.Parameter(torch.tensor(args.initial_temperature).log())
        self.register_buffer("state_mean", torch.zeros(obs_dim))
        self.register_buffer("state_std", torch.ones(obs_dim))

    def prepare(self, episodes: list["Episode"], args: Args) -> torch.optim.Optimizer:
        """Takes mean and deviation of the offline states, which hold for ever after, and makes the optimizer."""
        states = np.concatenate([episode.observations[:-1] for episode in episodes])
        self.state_mean.copy_(torch.as_tensor(states.mean(0, dtype=np.float64)))
        self.state_std.copy_(torch.as_tensor(states.std(0, dtype=np.float64) + 1e-6))
        # The authors use LAMB. It scales a layer's step by its trust ratio only where there is weight decay, and its
        # own limit on the gradient's norm, 1.0, is above --max-grad-norm: with decay 0, as here, it is exactly Adam.
        transformer = {"params": self.transformer.parameters(), "lr": args.lr}
        temperature = {"params": [self.log_temperature], "lr": args.temperature_lr}
        return torch.optim.Adam([transformer, temperature], fused=True, capturable=self.log_temperature.is_cuda)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-deviation [B, K, A] for states as they are."""
        states = (batch.observations - self.state_mean) / self.state_std
        return self.transformer(batch._replace(observations=states))

    @torch.no_grad()
    def act(self, batch: Batch, explore: bool) -> torch.Tensor:
        """Actions [B, A] of the last step: drawn from the policy in online episodes, deterministic in evaluations."""
        self.eval()
        mean, log_std = (values[:, -1] for values in self(batch))
        u = mean + log_std.exp() * torch.randn_like(mean) if explore else mean
        return torch.tanh(u).clamp(-0.99999, 0.99999)  # as the data's


def log_density(mean: torch.Tensor, log_std: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Log-density [B, K] of the action tanh(u) under the tanh-Gaussian, for u [B, K, A]."""
    log_normal = -0.5 * ((u - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
    log_slope = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh(u)^2), without cancellation
    return (log_normal - log_slope).sum(2)


def update(agent: Agent, optimizer: torch.optim.Optimizer, args: Args, count: int, batch: Batch) -> dict:
    """The run's update number `count`, the first being 1. Returns scalars to log, which stay on the device."""
    agent.train()
    mean, log_std = agent(batch)
    nll = -(log_density(mean, log_std, batch.actions.atanh()) * batch.mask).sum() / batch.mask.sum()
    u = mean + log_std.exp() * torch.randn_like(mean)
    entropy = -log_density(mean, log_std, u).mean()  # by one draw at each step, padding included (the authors' code)
    temperature = agent.log_temperature.exp()
    loss = nll - temperature.detach() * entropy
    target_entropy = -batch.actions.shape[2]
    temperature_loss = temperature * (entropy.detach() - target_entropy)
    optimizer.zero_grad()
    (loss + temperature_loss).backward()
    norm = nn.utils.clip_grad_norm_(agent.transformer.parameters(), args.max_grad_norm)
    optimizer.param_groups[0]["lr"] = args.lr * min(count / args.warmup_updates, 1.0)
    optimizer.step()
    metrics = {"losses/loss": loss, "losses/nll": nll, "losses/entropy": entropy, "losses/temperature": temperature}
    return {name: value.detach() for name, value in metrics.items()} | {"losses/gradient_norm": norm}


# --- Settings of the tasks --------------------------------------------------------------------------------------------
# AntMaze: as run for the paper, which has ODT in no other domain; its intervals and all other domains are ours. The
# defaults are the authors' sizes and rate; kitchen's returns count every step of every task done, up to some hundreds.
SETTINGS: dict[str, dict] = {
    "antmaze": dict(embedding_dim=1024, lr=1e-3, online_steps=1_000_000, online_eval_interval=20_000),
    "adroit": dict(online_steps=1_000_000, episode_length=200),
    "pen-binary": dict(online_steps=300_000, episode_length=100),
    "kitchen": dict(
        reward_scale=0.001, eval_return=400.0, online_return=800.0, online_steps=1_250_000,
        online_eval_interval=10_000, episode_length=280),
    "pick-place": dict(
        threads=1, embedding_dim=128, num_layers=3, num_heads=2, batch_size=64, context_length=5, lr=1e-3,
        warmup_updates=1_000, updates_per_episode=10, offline_steps=2_400, online_steps=7_000,
        offline_eval_interval=600, online_eval_interval=500, eval_episodes=40),
}  # fmt: skip
# The limits of these settings, where they are not those of a positive number.
LIMITS = dict.fromkeys(["eval_return", "online_return"], (-1e9, 1e9))
LIMITS |= dict(dropout=(0, 0.9), initial_temperature=(0, 1e9))


# --- Tasks (common) ---------------------------------------------------------------------------------------------------
class InputError(Exception):
    """Something the user can put right; its message is one sentence that says how."""


# Key of its SETTINGS, datasets whose episodes are joined, and cells (row, column) of a maze's one start and one goal.
Task = namedtuple("Task", "domain datasets cells", defaults=[()])
TASKS: dict[str, Task] = {
    "antmaze-umaze": Task("antmaze", ("D4RL/antmaze/umaze-v1",), ((3, 1), (1, 1))),
    "antmaze-umaze-diverse": Task("antmaze", ("D4RL/antmaze/umaze-diverse-v1",), ((1, 1), (3, 1))),
    "antmaze-medium-play": Task("antmaze", ("D4RL/antmaze/medium-play-v1",), ((1, 1), (6, 6))),
    "antmaze-medium-diverse": Task("antmaze", ("D4RL/antmaze/medium-diverse-v1",), ((1, 1), (6, 5))),  # (6, 6): no data
    "antmaze-large-play": Task("antmaze", ("D4RL/antmaze/large-play-v1",), ((1, 1), (7, 9))),
    "antmaze-large-diverse": Task("antmaze", ("D4RL/antmaze/large-diverse-v1",), ((1, 1), (7, 9))),
    "pen-binary": Task("adroit", ("D4RL/pen/human-v2", "D4RL/pen/cloned-v2")),
    "door-binary": Task("adroit", ("D4RL/door/human-v2", "D4RL/door/cloned-v2")),
    "relocate-binary": Task("adroit", ("D4RL/relocate/human-v2", "D4RL/relocate/cloned-v2")),
    "kitchen-complete": Task("kitchen", ("D4RL/kitchen/complete-v2",)),
    "kitchen-partial": Task("kitchen", ("D4RL/kitchen/partial-v2",)),
    "kitchen-mixed": Task("kitchen", ("D4RL/kitchen/mixed-v2",)),
    "pick-place": Task("pick-place", ("cal-ql/pick-place/narrow-v0",)),
    "pick-place-broad": Task("pick-place", ("cal-ql/pick-place/broad-v0",)),
}


def find_task(env_id: str) -> Task:
    """A task by its name; any Minari id is a task as it stands. Raises InputError for anything else."""
    if env_id not in TASKS and not re.fullmatch(r"([\w-]+/)+[\w-]+-v\d+", env_id):
        raise InputError(f"--env-id {env_id!r} is no Minari dataset id and none of the tasks {', '.join(TASKS)}.")
    return TASKS.get(env_id, Task("any other", (env_id,)))


def task_defaults(env_id: str) -> Args:
    """The settings of a task: those of every task, then its domain's, then its own."""
    of_all, of_domain, own = (SETTINGS.get(name, {}) for name in ("every task", find_task(env_id).domain, env_id))
    return Args(env_id=env_id, **of_all | of_domain | own)


# --- Data (common) ----------------------------------------------------------------------------------------------------
# T steps: states [T+1, O], actions [T, A] in (-1, 1), rewards [T] as the task gives them, terminations [T].
Episode = namedtuple("Episode", "observations actions rewards terminations")
# The entries of a dictionary observation that make up the state, where the task's one goal tells nothing; else all.
STATE_KEYS = {"antmaze": ("achieved_goal", "observation"), "kitchen": ("observation",)}


def open_dataset(dataset_id: str) -> minari.MinariDataset:
    """Opens a Minari dataset, downloading it where it is missing. Raises InputError where that fails."""
    path, ours = minari.storage.get_dataset_path(dataset_id), dataset_id.startswith("cal-ql/")
    remedy = "the Cal-QL repository's `collect` makes it" if ours else f"run `minari download {dataset_id}`"
    try:
        if not ours and not (path / "data").exists():
            print(f"{dataset_id} is not at {path}: downloading it ...", flush=True)
        dataset = minari.load_dataset(dataset_id, download=not ours)
        box = dataset.action_space
        if dataset.id != dataset_id or len(box.shape) != 1 or not box.is_bounded() or (box.low >= box.high).any():
            raise ValueError(f"it is {dataset.id} with actions {box}, and these must be a bounded vector")
    except Exception as error:  # whatever Minari's back-ends raise, and whatever a damaged file does
        raise InputError(f"cannot open {dataset_id} at {path} ({error!r}): if damaged, remove it; {remedy}.") from error
    return dataset


def to_state(observation, space: gym.Space, keys: tuple[str, ...] = ()) -> np.ndarray:
    """Flattens observations [..., O] in FlattenObservation's order; leading dimensions stay, no `keys` means all."""
    if isinstance(space, gym.spaces.Dict):
        parts = [to_state(observation[key], space[key]) for key in space if not keys or key in keys]
        return np.concatenate(parts, axis=-1)
    leading = np.shape(observation)[: np.ndim(observation) - len(space.shape)]
    return np.asarray(observation).astype(np.float32, casting="same_kind").reshape(*leading, -1)


def load_episodes(datasets: list[minari.MinariDataset], task: Task, env: gym.Env) -> list[Episode]:
    """Reads all episodes and relabels them to the task. Raises InputError for the first that cannot be used."""
    episodes, outside, unread = [], [], sum(dataset.total_steps for dataset in datasets)
    for dataset, k in ((each, k) for each in datasets for k in range(each.total_episodes)):
        box = dataset.action_space
        try:
            (data,) = dataset.iterate_episodes([k])
            states = to_state(data.observations, dataset.observation_space, STATE_KEYS.get(task.domain, ()))
            steps = len(data.rewards)
            success = data.infos["success"] if task.domain == "adroit" else np.zeros(steps + 1, bool)
            names = ("observations", "actions", "rewards", "terminations", "infos['success']")
            columns = states, data.actions, data.rewards, data.terminations, success
            shapes = (steps + 1, *env.observation_space.shape), (steps, *box.shape), (steps,), (steps,), (steps + 1,)
            for name, values, shape in zip(names, columns, shapes, strict=True):
                kinds = "b" if name in names[3:] else "fiu"  # booleans, or numbers
                if values.shape != shape or values.dtype.kind not in kinds or not np.isfinite(values).all():
                    raise ValueError(f"{name} {values.dtype}{list(values.shape)}, not {kinds}{list(shape)} and finite")
            actions = (2 * (data.actions - box.low) / (box.high - box.low) - 1).astype(np.float32)
            if np.abs(actions).max() > 10:  # a little beyond is clipped, as in Adroit's human data
                raise ValueError("actions lie far outside of their box")
        except Exception as error:  # whatever a damaged file does
            raise InputError(f"episode {k} of {dataset.id}: {error}; repair it or leave it out.") from error
        outside.append(np.abs(actions) > 1)
        unread -= steps
        rewards, terminations = data.rewards.astype(np.float32), data.terminations
        if task.domain == "antmaze":  # arriving at the one goal succeeds and ends, whatever the episode's own goal was
            goal = env.unwrapped.maze.cell_rowcol_to_xy(np.array(task.cells[1]))
            terminations = np.linalg.norm(states[1:, :2] - goal, axis=1) <= 0.45  # the environment's own threshold
            rewards = terminations.astype(np.float32)
        elif task.domain == "adroit":  # failures are dropped, the rest is cut after the last success (appendix G.3)
            end = np.flatnonzero(success).max(initial=0)  # step t's success is entry t + 1: entry 0 is the reset's
            states, actions, terminations = states[: end + 1], actions[:end], success[1 : end + 1]
            rewards = terminations.astype(np.float32)
        if len(rewards):
            episodes.append(Episode(states, actions.clip(-0.99999, 0.99999), rewards, terminations))
    clipped = np.concatenate(outside).mean() if outside else 0.0
    if not episodes or clipped > 0.2 or unread != 0:
        raise InputError(f"{' and '.join(task.datasets)}: {len(episodes)} usable episodes, {unread} steps missing, "
                         f"{clipped:.0%} of actions outside of their box; get the data anew.")  # fmt: skip
    low, high = np.quantile(np.concatenate([episode.actions for episode in episodes]), [0.01, 0.99], axis=0)  # [A]
    print(f"data: {len(episodes)} episodes, {sum(bool(episode.rewards.max() > 0) for episode in episodes)} with reward "
          f"> 0; actions fill {np.mean(high - low) / 2:.0%} of their box, {clipped:.2%} clipped")  # fmt: skip
    if task.domain == "kitchen":
        print("episodes with 0, 1, ... tasks done at once:", *np.bincount([int(e.rewards.max()) for e in episodes]))
    return episodes


def monte_carlo_returns(rewards: np.ndarray, terminations: np.ndarray, gamma: float, tail: float) -> np.ndarray:
    """G_t = r_t + gamma (1 - d_t) G_{t+1} [T] for scaled rewards [T]; `tail` is G_T, what comes after the last step."""
    returns, following = np.zeros(len(rewards), np.float32), tail
    for t in reversed(range(len(rewards))):
        returns[t] = following = float(rewards[t]) + (0.0 if terminations[t] else gamma * following)
    return returns


# --- Replay -----------------------------------------------------------------------------------------------------------
class ReplayBuffer:
    """The offline trajectories, worst first, and after them the online ones, in tensors on the training device.

    A new trajectory takes the next free row and, once all `args.buffer_trajectories` are taken, the first, and so on.
    Each step has the return that followed it, whatever was asked for: undiscounted, of the rewards as the task gives.
    """

    def __init__(self, episodes: list[Episode], args: Args, max_length: int, device: torch.device):
        self.args, self.device, self.num_added = args, device, 0
        trajectories = [part for episode in episodes for part in split_at_terminations(episode)]
        # Of equal returns the longer is better: one step within AntMaze's goal teaches less than the way there (ours).
        trajectories.sort(key=lambda part: (part.rewards.sum(), len(part.rewards)))
        trajectories = trajectories[-args.buffer_trajectories :]
        self.num_offline = len(trajectories)
        size, length = args.buffer_trajectories, max(max_length, *(len(part.rewards) for part in trajectories))
        state, action = episodes[0].observations.shape[1:], episodes[0].actions.shape[1:]
        self.columns = [torch.zeros(size, length, *shape, device=device) for shape in ((), state, action)]
        self.lengths = torch.zeros(size, dtype=torch.long, device=device)
        for row, trajectory in enumerate(trajectories):
            self.write(trajectory, row)
        self.offline_transitions = int(self.lengths.sum())

    def write(self, trajectory: Episode, row: int) -> None:
        returns = monte_carlo_returns(trajectory.rewards, trajectory.terminations, gamma=1.0, tail=0.0)
        self.lengths[row] = len(returns)
        values_of = returns, trajectory.observations[:-1], trajectory.actions
        for column, values in zip(self.columns, values_of, strict=True):
            column[row, : len(returns)] = torch.as_tensor(values).to(column)

    def add(self, episode: Episode) -> None:
        """Appends an online trajectory, or replaces the first one that no other online one has replaced."""
        self.write(episode, (self.num_offline + self.num_added) % len(self.lengths))
        self.num_added += 1

    def sample(self) -> Batch:
        """Sequences of up to K steps: of a trajectory drawn by its length, from a uniform start, padded in front."""
        batch_size, context_length = self.args.batch_size, self.args.context_length
        rows = torch.multinomial(self.lengths.double(), batch_size, replacement=True)
        lengths = self.lengths[rows]
        # A float32 below 1 times a length may round up to that length.
        starts = (torch.rand(batch_size, device=self.device) * lengths).long().minimum(lengths - 1)
        counts = (lengths - starts).clamp(max=context_length).unsqueeze(1)  # [B, 1]
        steps = torch.arange(context_length, device=self.device) - context_length + counts  # [B, K] from the start
        valid = steps >= 0
        times = (starts.unsqueeze(1) + steps) * valid
        returns, states, actions = (column[rows.unsqueeze(1), times] for column in self.columns)
        mask = valid.to(returns)
        returns = returns * mask * self.args.reward_scale
        return Batch(returns, states * mask.unsqueeze(2), actions * mask.unsqueeze(2), times, mask)

    def mean_return(self) -> float:
        """Mean undiscounted return of the trajectories."""
        return self.columns[0][self.lengths > 0, 0].mean().item()

    def rows_added(self) -> torch.Tensor:
        """The rows that online trajectories have."""
        count = min(self.num_added, len(self.lengths))
        return (self.num_offline + torch.arange(count, device=self.device)) % len(self.lengths)

    def state_dict(self) -> dict:
        """The online trajectories; the offline ones are read from the dataset again."""
        online = [column[self.rows_added()] for column in (self.lengths, *self.columns)]
        return {"online": online, "num_added": self.num_added, "offline_transitions": self.offline_transitions}

    def load_state_dict(self, state: dict) -> None:
        if state["offline_transitions"] != self.offline_transitions:
            raise ValueError("the dataset has changed since this run began")
        self.num_added = state["num_added"]
        for column, values in zip((self.lengths, *self.columns), state["online"], strict=True):
            rows = self.rows_added()
            column[rows] = values.to(self.device).reshape(len(rows), *column.shape[1:])


def split_at_terminations(episode: Episode) -> list[Episode]:
    """The parts of an episode of T steps that end with a termination, and what is left after the last."""
    ends = [*(np.flatnonzero(episode.terminations[:-1]) + 1).tolist(), len(episode.rewards)]
    parts = zip([0, *ends[:-1]], ends, strict=True)
    return [Episode(episode.observations[i : j + 1], *(column[i:j] for column in episode[1:])) for i, j in parts]


# --- Environments and evaluation --------------------------------------------------------------------------------------
class TaskEnv(gym.Wrapper):
    """The paper's task: flat states, actions in [-1, 1] for `box`, Adroit's binary reward, the score in each info."""

    def __init__(self, env: gym.Env, task: Task, box: gym.spaces.Box):
        super().__init__(env)
        self.task, self.box = task, box
        self.state = functools.partial(to_state, space=env.observation_space, keys=STATE_KEYS.get(task.domain, ()))
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, self.state(env.observation_space.sample()).shape)
        self.action_space = gym.spaces.Box(-1.0, 1.0, box.shape, np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        return self.state(self.env.reset(seed=seed, options=options)[0]), {}

    def step(self, action: np.ndarray):
        # The dataset's box says what the policy's -1 and 1 mean; the environment's own may be another.
        action = self.box.low + (action + 1) / 2 * (self.box.high - self.box.low)
        action = np.clip(action, self.env.action_space.low, self.env.action_space.high)
        observation, reward, terminated, truncated, info = self.env.step(action)
        score = float(info.get("success", np.nan))  # NaN where nothing tells
        if self.task.domain == "adroit":  # the dense reward is replaced, and success ends the episode
            reward, terminated = score, terminated or score > 0
        if "episode_task_completions" in info:
            score = len(info["episode_task_completions"]) / len(self.unwrapped.goal)
        return self.state(observation), float(reward), terminated, truncated, {"score": score}


def make_env(dataset: minari.MinariDataset, task: Task, episode_length: int, online_env: str | None = None) -> gym.Env:
    """The data's environment or the user's, set to the task; its spaces alone, if none is named. Raises InputError."""
    # From the dataset, which may be a stranger's, come only the id of a registered environment, and plain arguments.
    try:
        spec, box = dataset.env_spec, dataset.action_space
        importlib.import_module("collect.pick_place" if spec and spec.id[:7] == "cal-ql/" else "gymnasium_robotics")
        gym.logger.min_level = gym.logger.ERROR  # it advises newer versions, which have other observations
        if online_env is not None:
            gym.register("online-env-v0", entry_point=online_env if ":" in online_env else f"{online_env}:make")
            spec = gym.spec("online-env-v0")
        if spec is None and task.domain != "antmaze":  # which needs its maze
            env = gym.Env()
            env.observation_space, env.action_space = dataset.observation_space, box
            return TaskEnv(env, task, box)
        if spec is None or spec.id not in gym.registry or spec.additional_wrappers:
            raise ValueError(f"{spec and spec.id} is not registered here, or needs wrappers (--online-env)")
        kwargs = dict(spec.kwargs, max_episode_steps=episode_length or spec.max_episode_steps)
        if task.domain == "antmaze" and online_env is None:
            # The maze of the data itself (Minari's evaluation maps are mirrored for umaze), with one start and goal.
            maze = [[int(cell == 1) for cell in row] for row in kwargs["maze_map"]]
            for (row, column), letter in zip(task.cells, "rg", strict=True):
                if maze[row][column] == 1:
                    raise ValueError(f"cell {(row, column)} of its maze is a wall")
                maze[row][column] = letter
            kwargs |= {"maze_map": maze, "continuing_task": False, "reset_target": False}
        elif task.domain == "kitchen" and online_env is None:
            kwargs |= {"remove_task_when_completed": False, "terminate_on_tasks_completed": False}
        env = gym.make(spec.id, disable_env_checker=True, **kwargs)
        sizes = [(gym.spaces.flatdim(each.observation_space), each.action_space.shape) for each in (env, dataset)]
        if sizes[0] != sizes[1] or env.spec.max_episode_steps is None:
            raise ValueError(f"its sizes {sizes[0]} are not the data's {sizes[1]}, or no --episode-length limits it")
        wider = (box.low < env.action_space.low) | (box.high > env.action_space.high)
        if task.domain != "any other" and wider.any():
            raise ValueError(f"the data's actions {box} are wider than its own {env.action_space}")
        if task.domain == "antmaze":
            env.unwrapped.position_noise_range = 0.0  # start and goal at their cells' centres ...
            env.unwrapped.ant_env._reset_noise_scale = 0.1  # ... but no two starts alike, as in D4RL
        return TaskEnv(env, task, box)
    except Exception as error:  # no such module, a specification that does not fit
        raise InputError(f"{online_env or dataset.id}'s environment cannot be made: {error}.") from error


class Context:
    """What the policy acts on in N episodes that began together: their last `args.eval_context_length` steps."""

    def __init__(self, agent: Agent, args: Args, asked_return: float):
        self.agent, self.args, self.asked, self.steps, self.time = agent, args, asked_return, [], 0

    def act(self, observations: np.ndarray, rewards: np.ndarray | float, explore: bool) -> np.ndarray:
        """Actions [N, A] for observations [N, O]; the rewards [N] that came with them lower the asked return."""
        states = torch.from_numpy(observations).to(self.agent.state_mean)
        self.asked = self.asked - torch.as_tensor(rewards).to(states).expand(len(states))  # [N]
        action = torch.zeros(len(states), self.agent.action_dim).to(states)  # not known yet
        self.steps = [*self.steps, (self.asked * self.args.reward_scale, states, action)]
        self.steps = self.steps[-self.args.eval_context_length :]
        self.time += 1
        times = torch.arange(self.time - len(self.steps), self.time, device=states.device).expand(len(states), -1)
        columns = [torch.stack(column, dim=1) for column in zip(*self.steps, strict=True)]
        action.copy_(self.agent.act(Batch(*columns, times, torch.ones_like(columns[0])), explore))
        return action.cpu().numpy()


def play_episode(env: gym.Env, agent: Agent, args: Args, seed: int) -> Episode:
    """One online episode; the policy does not learn meanwhile."""
    states, actions, rewards, terminations = [env.reset(seed=seed)[0]], [], [], []
    context = Context(agent, args, args.online_return)
    terminated = truncated = False
    while not (terminated or truncated):
        actions.append(context.act(states[-1][None], rewards[-1] if rewards else 0.0, explore=True)[0])
        state, reward, terminated, truncated, _ = env.step(actions[-1])
        states.append(state)
        rewards.append(reward)
        terminations.append(terminated)
    return Episode(*map(np.array, (states, actions, rewards, terminations)))


def evaluate(envs: gym.vector.VectorEnv, agent: Agent, buffer: ReplayBuffer, progress, args: Args) -> dict:
    """A row of eval.csv: one episode in each environment with the deterministic policy."""
    seeds = np.random.SeedSequence((args.seed, 1, len(progress.rows))).generate_state(envs.num_envs).tolist()
    states, _ = envs.reset(seed=seeds)
    scores, returns, live = np.zeros(len(seeds)), np.zeros(len(seeds)), np.ones(len(seeds), bool)
    context, rewards = Context(agent, args, args.eval_return), np.zeros(len(seeds))
    while live.any():
        actions = context.act(states, rewards, explore=False)
        states, rewards, terminations, truncations, infos = envs.step(actions)
        scores[live] = np.maximum(scores, infos["score"])[live]
        returns[live] += rewards[live]
        live &= ~(terminations | truncations)  # a finished environment starts again, of which nothing counts
    score = float(returns.mean() if np.isnan(scores).any() else scores.mean())
    phase = "online" if progress.env_steps else "offline"
    online = [row["score"] for row in progress.rows if row["phase"] == "online"] + [scores.mean()]
    regret = 1 - float(np.mean(online)) if phase == "online" else math.nan  # NaN too where nothing tells success
    values = {"mean_q": math.nan, "mean_mc_return": buffer.mean_return(), "bound_rate": math.nan}
    row = {"phase": phase, "updates": progress.updates, "env_steps": progress.env_steps, "score": score}
    return row | {"return": float(returns.mean()), "regret": regret, **values}


# --- Checkpoints (common) ---------------------------------------------------------------------------------------------
SIGNALS: list[int] = []  # SIGINT or SIGTERM that arrived: the run saves and stops where its state is whole next


def on_signal(number: int, _frame) -> None:
    SIGNALS.append(number)
    signal.signal(number, signal.SIG_DFL)
    print("\nstopping after this update, or this episode and its updates; once more stops at once", file=sys.stderr)


def save(run: Path, args: Args, progress: SimpleNamespace, **parts) -> None:
    """Replaces the run's checkpoint in one step: a killed run keeps either the old or the new one."""
    partial = run / f"checkpoint.{os.getpid()}.partial"  # another process's has another name
    rng = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    state = {"script": Path(__file__).name, "args": vars(args), "progress": vars(progress), "rng": rng}
    with partial.open("w+b") as file:
        torch.save(state | {name: part.state_dict() for name, part in parts.items()}, file)
        file.seek(0)  # its digest goes after the end, where torch.load does not look
        file.write(hashlib.file_digest(file, "sha256").hexdigest().encode())
    if progress.env_steps == 0:  # the last of the offline phase stays, for --init-from
        partial.with_suffix(".offline").write_bytes(partial.read_bytes())
        os.replace(partial.with_suffix(".offline"), run / "offline.pt")
    os.replace(partial, run / "checkpoint.pt")


def open_logs(run: Path, args: Args, step: int) -> SummaryWriter:
    """Makes the run's folder, with its settings; what was logged after `step` is dropped. Raises InputError."""
    try:
        if args.track:  # before the writer exists: wandb hooks into it
            wandb = importlib.import_module("wandb")
            wandb.init(name=run.name, id=run.name, config=vars(args), sync_tensorboard=True, resume="allow")
    except Exception as error:  # no login, no network
        raise InputError(f"--track: {error} (log in with `wandb login`, or set WANDB_MODE=offline).") from error
    writer = SummaryWriter(str(run), purge_step=step + 1)
    (run / "config.json").write_text(json.dumps(vars(args), indent=2) + "\n")
    return writer


def read_checkpoint(run: str, name: str = "checkpoint.pt") -> dict:
    """Reads a run's checkpoint. Raises InputError where there is none, it is damaged, or another script wrote it."""
    path = Path(run) / name
    try:
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content[:-64]).hexdigest().encode() != content[-64:]:
            raise ValueError("missing or damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if (checkpoint["script"], {*checkpoint["args"]}) != (Path(__file__).name, {*vars(Args())}):
            raise ValueError(f"made by {checkpoint['script']}, which is another script or had other settings then")
    except Exception as error:  # whatever another program has put there
        raise InputError(f"{run!r} is no run of this script to go on from; its {name}: {error!r:.200}.") from error
    return checkpoint


def restore(args: Args, agent: nn.Module, optimizer: torch.optim.Optimizer, buffer: ReplayBuffer) -> SimpleNamespace:
    """Puts a run's parts to where --resume or --init-from begins, if there is one, and returns how far that is."""
    start = SimpleNamespace(updates=0, offline_updates=0, env_steps=0, episodes=0, wall_time=0.0, rows=[])
    if args.resume is None and args.init_from is None:
        return start
    checkpoint = read_checkpoint(args.init_from, "offline.pt") if args.resume is None else read_checkpoint(args.resume)
    groups = optimizer.state_dict()["param_groups"]  # learning rates and what depends on the device are this run's
    try:
        agent.load_state_dict(checkpoint["agent"])
        optimizer.load_state_dict({"state": checkpoint["optimizer"]["state"], "param_groups": groups})
        if args.resume is not None:  # else there is no online transition yet, and the draws are this run's own
            buffer.load_state_dict(checkpoint["buffer"])
            torch.set_rng_state(checkpoint["rng"][0])
            torch.cuda.set_rng_state_all(checkpoint["rng"][1 : 1 + torch.cuda.device_count()])
        moments = [{weight.shape, m["exp_avg"].shape, m["exp_avg_sq"].shape} for weight, m in optimizer.state.items()]
        done = SimpleNamespace(**checkpoint["progress"])
        fits = all(len(shapes) == 1 for shapes in moments) and bool(moments) == (done.updates > 0)
        if not fits or not done.rows or vars(done).keys() != vars(start).keys():
            raise ValueError("its progress or its moments are another script's")
    except Exception as error:  # other networks, another version's parts, another dataset
        raise InputError(f"this run cannot go on from there ({error!r:.200}): start a new one.") from error
    if args.resume is None:  # its record begins here
        done.rows, done.wall_time = [], 0.0
    return done


# --- Training and command line ----------------------------------------------------------------------------------------
def make_eval_envs(make_one_env, args: Args) -> gym.vector.VectorEnv:
    """The environments of an evaluation, all in this process or, with --eval-async, in one each."""
    if not args.eval_async:
        return gym.vector.SyncVectorEnv([make_one_env] * args.eval_episodes)
    gym.vector.AsyncVectorEnv.__del__ = lambda envs: None  # its processes end with this one, and need no farewell
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # they inherit this: Ctrl-C is the run's to answer
    envs = gym.vector.AsyncVectorEnv([make_one_env] * args.eval_episodes, context="spawn")  # forks would share CUDA
    signal.signal(signal.SIGINT, before)
    return envs


def train(args: Args) -> None:
    """Runs both phases, or what is left of them when resumed. Raises InputError; exits at a signal or a NaN."""
    torch.set_flush_denormal(True)  # denormal gradients and moments slow a processor down; threads inherit this
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.set_float32_matmul_precision("high")  # TF32 on CUDA
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    task = find_task(args.env_id)
    datasets = [open_dataset(dataset_id) for dataset_id in task.datasets]
    make_one_env = functools.partial(make_env, datasets[-1], task, args.episode_length)
    env = make_one_env()
    if env.spec is None:
        raise InputError(f"{args.env_id} names no environment, and this script evaluates in one.")
    eval_envs = make_eval_envs(make_one_env, args)
    episodes = load_episodes(datasets, task, env)
    buffer = ReplayBuffer(episodes, args, env.spec.max_episode_steps, device)
    torch.manual_seed(args.seed)
    agent = Agent(*env.observation_space.shape, *env.action_space.shape, args).to(device)
    optimizer = agent.prepare(episodes, args)

    # With networks, online trajectories and random state, `progress` is all that resuming needs.
    parts = {"agent": agent, "optimizer": optimizer, "buffer": buffer}
    progress = restore(args, **parts)
    name = f"{args.env_id.replace('/', '-')}__{Path(__file__).stem}__{args.seed}__{time.time_ns()}"
    run = Path(args.resume or f"runs/{name}")
    writer = open_logs(run, args, progress.offline_updates + progress.env_steps)
    print(f"run: {run} on {device}\nsettings:", ", ".join(f"{k} {v}" for k, v in vars(args).items()))
    began = time.time() - progress.wall_time
    bar = tqdm(total=args.offline_steps + args.online_steps, initial=progress.offline_updates + progress.env_steps)

    def log(scalars: dict) -> None:
        """Logs over offline updates and, from the switch on, environment steps."""
        bar.n = progress.offline_updates + progress.env_steps
        bar.refresh()
        for name, value in scalars.items():
            if name.startswith("losses/") and not math.isfinite(value):
                sys.exit(f"error: {name} is not finite after {progress.updates} updates; {run} keeps its checkpoint")
            writer.add_scalar(name, value, bar.n)

    def train_step(online: bool) -> None:
        progress.updates += 1
        progress.offline_updates += not online
        metrics = update(agent, optimizer, args, progress.updates, buffer.sample())
        if progress.updates % 100 == 0:
            log(metrics)

    def pause(evaluation_due: bool) -> None:
        """Evaluates if due; saves after that, every ten minutes and at a signal. The run's state is whole here."""
        if not (evaluation_due or SIGNALS or time.time() - began > progress.wall_time + 600):  # the last save's
            return
        if bad := [name for name, weight in agent.transformer.named_parameters() if not weight.isfinite().all()]:
            sys.exit(f"error: {bad[0]} is not finite after {progress.updates} updates; {run} keeps its checkpoint")
        if evaluation_due:
            row = evaluate(eval_envs, agent, buffer, progress, args) | {"wall_time": time.time() - began}
            progress.rows.append(row)
            log({f"eval/{name}": value for name, value in row.items() if isinstance(value, float)})
            tqdm.write("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
            lines = [row.keys(), *(row.values() for row in progress.rows)]
            (run / "eval.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
        progress.wall_time = time.time() - began
        save(run, args, progress, **parts)
        writer.flush()
        if SIGNALS:
            print(f"stopped by a signal; --resume {run} continues", file=sys.stderr)
            sys.exit(128 + SIGNALS[0])

    # Phase 1: offline pre-training, from the first evaluation of a new run to the one at the switch.
    pause(evaluation_due=args.resume is None)
    while progress.env_steps == 0 and progress.updates < args.offline_steps:
        train_step(online=False)
        pause(progress.updates % args.offline_eval_interval == 0 or progress.updates == args.offline_steps)

    # Phase 2: online fine-tuning, one whole episode and then the updates for it; nothing is reinitialised.
    while progress.env_steps < args.online_steps:
        seed = np.random.SeedSequence((args.seed, 0, progress.episodes)).generate_state(1).tolist()[0]
        episode = play_episode(env, agent, args, seed)
        buffer.add(episode)
        length, evaluated = len(episode.rewards), progress.env_steps // args.online_eval_interval
        progress.episodes, progress.env_steps = progress.episodes + 1, progress.env_steps + length
        for _ in range(args.updates_per_episode):
            train_step(online=True)
        log({"charts/episodic_return": episode.rewards.sum(), "charts/episodic_length": length})
        pause(progress.env_steps // args.online_eval_interval > evaluated or progress.env_steps >= args.online_steps)


# What --resume may change, and limits of settings, where they are not those of a positive number.
CHANGEABLE = {"resume", "device", "threads", "track", "offline_steps", "online_steps", "eval_async",
              "offline_eval_interval", "online_eval_interval"}  # fmt: skip
FROM_ZERO = ["seed", "offline_steps", "online_steps", "episode_length"]
PROTOCOL_LIMITS = dict.fromkeys(FROM_ZERO, (0, 2**62)) | {"threads": (0, 1024), "eval_episodes": (1, 10_000)}


def parse_args(argv: list[str] | None = None) -> Args:
    """Reads the command line on top of the task's settings or, to go on from a run, of the run's. Raises InputError."""
    first, _ = tyro.cli(Args, args=argv, add_help=False, return_unknown_args=True)
    new = first.resume is None
    defaults = task_defaults(first.env_id) if new else Args(**read_checkpoint(first.resume)["args"])
    if first.init_from is not None and new:
        defaults = Args(**read_checkpoint(first.init_from, "offline.pt")["args"] | {"resume": None})
    table = [f"{name}: {', '.join(f'{k} {v}' for k, v in settings.items())}" for name, settings in SETTINGS.items()]
    args = tyro.cli(Args, default=defaults, args=argv, description="\n\n".join([f"Tasks: {', '.join(TASKS)}.", *table]))
    for name, value in vars(args).items():
        if not new and value != getattr(defaults, name) and name not in CHANGEABLE:
            raise InputError(f"a resumed run cannot change {name}: leave that out, or start a new run.")
        low, high = (PROTOCOL_LIMITS | LIMITS).get(name, (1e-9 if isinstance(value, float) else 1, 2**40))
        numbers = value if isinstance(value, tuple) else [value]
        if value == () or any(type(number) in (int, float) and not low <= number <= high for number in numbers):
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must lie between {low} and {high}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device.")
    if args.embedding_dim % args.num_heads:
        raise InputError(f"--embedding-dim {args.embedding_dim} is no multiple of --num-heads {args.num_heads}.")
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 2 for bad input; `train` exits with 1 at a NaN, 130 at SIGINT and 143 at SIGTERM."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    threading.excepthook = lambda failure: None  # of TensorBoard's thread, which the next call to it raises anew
    sys.path.append(os.getcwd())  # where `collect` is, for a script in a folder of its own
    try:
        train(parse_args(argv))
    except (InputError, OSError, EOFError, RuntimeError) as error:
        reason = error.__context__ if isinstance(error.__context__, OSError) and type(error) is RuntimeError else error
        if isinstance(reason, RuntimeError) and not re.search("memory|overflow", str(reason)):
            raise
        if isinstance(reason, EOFError | ConnectionError):
            reason = "a process of --eval-async was killed; --resume goes on from the last checkpoint"
        reason = str(reason).splitlines()[0]
        if "memory" in reason and Path("/proc/meminfo").exists():
            reason += f" ({re.search('MemAvailable: *(.*)', Path('/proc/meminfo').read_text())[1]} are free)"
        print(f"error: {reason}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
