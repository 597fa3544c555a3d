"""ODT: the Online Decision Transformer (Zheng, Zhang & Grover 2022, arXiv:2202.05607).

Control as sequence modelling. A causal transformer reads the last K steps, each as three tokens: the return R still to
come, the state, the action; it says which action comes next. Asked for a high return, it does what was done in the
trajectories that had one. The likelihood of their actions is maximised, with an entropy as in SAC:

    min_pi  E_D[ -log pi(a_t | R_{t-K+1}, s_{t-K+1}, a_{t-K+1}, ..., R_t, s_t) ] - lambda H(pi),   lambda: H >= -dim(A)

Online an episode is asked for more than an evaluation is, and is stored with the returns that it had. There is no
critic, hence no mean_q and no bound_rate in eval.csv (NaN); mean_mc_return is the mean return R, undiscounted.

    python baselines/odt_continuous.py --env-id antmaze-large-diverse    # --resume runs/<run> goes on
"""

import json
import math
import signal
import sys
import time
import zipfile
from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import gymnasium as gym
import gymnasium_robotics  # noqa: F401  registers the environments of the paper
import minari
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# --- Settings ---------------------------------------------------------------------------------------------------------
@dataclass
class Args:
    # --- Run and protocol
    env_id: str = "antmaze-large-diverse"  # a task of the table TASKS, or the id of any Minari dataset
    datasets: tuple[str, ...] = ()  # Minari ids of the offline data; none given, they are the task's own
    online_env: str | None = None  # module:EnvId-v0, an environment to play in instead of the one that the data name
    seed: int = 1  # of networks, batches and episodes
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to train
    resume: str | None = None  # folder of a run to continue, with its settings and the flags given beside this one
    track: bool = False  # log to Weights & Biases too; WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE are obeyed
    offline_steps: int = 7_000  # gradient updates of the offline phase
    online_steps: int = 500_000  # environment steps of the online phase, completed to whole episodes
    offline_eval_interval: int = 1_000  # updates between two evaluations offline
    online_eval_interval: int = 5_000  # environment steps between two evaluations online
    eval_episodes: int = 20  # episodes of an evaluation, with the deterministic policy; 0 plays none
    episode_length: int = 0  # time limit of an episode in steps; 0 keeps the environment's own
    # --- Sequences
    buffer_trajectories: int = 1_500  # trajectories kept online: the best of the data, then new ones in their place
    batch_size: int = 256  # sequences in a batch
    context_length: int = 20  # steps K of a sequence
    eval_context_length: int = 5  # steps that the policy looks back on when it acts
    updates_per_episode: int = 300  # gradient updates after each online episode
    eval_return: float = 1.0  # return asked for in evaluations ...
    online_return: float = 2.0  # ... and in online episodes, in the task's own rewards
    reward_scale: float = 1.0  # the transformer reads returns multiplied by this
    # --- Transformer
    embedding_dim: int = 512  # width D of a token
    num_layers: int = 4  # transformer blocks
    num_heads: int = 4  # attention heads in each
    dropout: float = 0.1  # on embeddings, attention and residuals, in updates only
    lr: float = 1e-4  # learning rate of the transformer, reached ...
    warmup_updates: int = 10_000  # ... linearly over this many updates, which both phases count
    max_grad_norm: float = 0.25  # its gradient is scaled down to this norm
    initial_temperature: float = 0.1  # weight lambda of the entropy at first
    temperature_lr: float = 1e-4  # learning rate of its logarithm


# --- Sequences and transformer ----------------------------------------------------------------------------------------
# T steps: states [T+1, O], actions [T, A] with their box scaled to [-1, 1], the task's rewards [T], terminations [T].
Episode = namedtuple("Episode", "observations actions rewards terminations")
# B sequences of K steps: returns [B, K] still to come, undiscounted and of the task's own rewards, observations
# [B, K, O], actions [B, K, A] in (-1, 1), time_steps [B, K] since the trajectory began, mask [B, K]: 1.0 at a step,
# 0.0 at padding, which is zeros and comes first. Where trajectories are stored, rows [T] stand in place of [B, K].
Batch = namedtuple("Batch", "returns observations actions time_steps mask")
MAX_TIME = 1_000  # time steps with an embedding of their own; later ones share the last


def to_transitions(episode: Episode, _args: Args) -> Batch:
    """An episode's steps with the returns that followed them, whatever was asked for; time begins anew after an end."""
    states, actions, rewards, terminations = episode
    returns, following = np.zeros(len(rewards), np.float32), 0.0
    for t in reversed(range(len(rewards))):
        returns[t] = following = float(rewards[t]) + (0.0 if terminations[t] else following)
    time_steps, t = np.zeros(len(rewards), np.int64), 0
    for k, terminated in enumerate(terminations):
        time_steps[k], t = t, 0 if terminated else t + 1
    actions = actions.clip(-1 + 1e-6, 1 - 1e-6)  # as the authors clip data and new actions: atanh is infinite at 1
    return Batch(returns, states[:-1], actions, time_steps, np.ones_like(returns))


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

        # A token attends to itself and to earlier ones that are no padding. So padding attends to itself alone, which
        # keeps it finite, and no loss counts it. The authors' attends to earlier padding, and their entropy counts it.
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
    """All that learns, transformer and temperature; with the settings, and the offline states' statistics."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.args, self.transformer = args, Transformer(obs_dim, action_dim, args)
        self.log_temperature = nn.Parameter(torch.tensor(args.initial_temperature).log())
        self.register_buffer("state_mean", torch.zeros(obs_dim))
        self.register_buffer("state_std", torch.ones(obs_dim))

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-deviation [B, K, A] for returns and states as they are."""
        states = (batch.observations - self.state_mean) / self.state_std
        return self.transformer(batch._replace(returns=batch.returns * self.args.reward_scale, observations=states))

    def act(self, batch: Batch, explore: bool) -> torch.Tensor:
        """Actions [B, A] of the last step: drawn from the policy in online episodes, deterministic in evaluations."""
        self.eval()  # no dropout
        mean, log_std = (values[:, -1] for values in self(batch))
        return torch.tanh(mean + log_std.exp() * torch.randn_like(mean) if explore else mean)


def make_agent(offline: list[Batch], args: Args) -> tuple[Agent, torch.optim.Optimizer]:
    """The agent for these data, whose states' mean and deviation hold for ever after, and its optimizer."""
    states = np.concatenate([episode.observations for episode in offline])
    agent = Agent(states.shape[1], offline[0].actions.shape[1], args).to(args.device)
    agent.state_mean.copy_(torch.from_numpy(states.mean(0, dtype=np.float64)))
    agent.state_std.copy_(torch.from_numpy(states.std(0, dtype=np.float64) + 1e-6))
    # The authors use LAMB, which scales a layer's step by its trust ratio only where there is weight decay. With the
    # paper's decay of 0 in AntMaze it is exactly Adam: LAMB's limit of 1.0 on the gradient's norm lies above ours.
    # Elsewhere their decay is 5e-4; ours stays Adam without decay, as the paper has no ODT there to compare with.
    transformer = {"params": [*agent.transformer.parameters()], "lr": args.lr}
    temperature = {"params": [agent.log_temperature], "lr": args.temperature_lr}
    return agent, torch.optim.Adam([transformer, temperature], fused=True)


def log_density(mean: torch.Tensor, log_std: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Log-density [B, K] of the action tanh(u) under the tanh-Gaussian, for u [B, K, A]."""
    log_normal = -0.5 * ((u - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
    log_det = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh^2), without cancellation
    return (log_normal - log_det).sum(2)


def update(agent: Agent, optimizer, args: Args, count: int, batch: Batch) -> dict:
    """The run's update number `count`, the first being 1; returns scalars to log, on the device."""
    agent.train()
    mean, log_std = agent(batch)
    nll = -(log_density(mean, log_std, batch.actions.atanh()) * batch.mask).sum() / batch.mask.sum()
    u = mean + log_std.exp() * torch.randn_like(mean)  # one draw at each step
    entropy = -(log_density(mean, log_std, u) * batch.mask).sum() / batch.mask.sum()
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


def probe(agent: Agent, batch: Batch, args: Args) -> dict[str, float]:
    """Mean return still to come, over the steps of the sequences; there is no Q."""
    mean_return = (batch.returns.sum() / batch.mask.sum()).item()  # padding has 0 in both
    return {"mean_q": math.nan, "mean_mc_return": mean_return, "bound_rate": math.nan}


# --- Tasks (common) ---------------------------------------------------------------------------------------------------
class InputError(Exception):
    """Something the user can put right; its message is one sentence that says how."""


# Key of its SETTINGS, datasets whose episodes are joined; a maze's start and goal (row, column), a cell's size in m.
Task = namedtuple("Task", "domain datasets cells cell_size", defaults=[(), 4.0])
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
    **{f"kitchen-{kind}": Task("kitchen", (f"D4RL/kitchen/{kind}-v2",)) for kind in ("complete", "partial", "mixed")},
    "pick-place": Task("pick-place", ("cal-ql/pick-place/narrow-v0",)),
    "point-maze-medium": Task("point-maze", ("cal-ql/point-maze/medium-v0",), ((6, 6),), 1.0),  # any start
    "point-maze-large": Task("point-maze", ("cal-ql/point-maze/large-v0",), ((7, 9),), 1.0),
}
# The entries of a dictionary observation that make up the state, where the task's one goal tells nothing; else all.
STATE_KEYS = {"antmaze": ("achieved_goal", "observation"), "kitchen": ("observation",), "point-maze": ("observation",)}


# --- Settings of the tasks --------------------------------------------------------------------------------------------
# AntMaze: as run for the paper, which has ODT in no other domain; its intervals and all other domains are ours. The
# defaults are the authors' sizes and rate; kitchen's returns count every step of every task done, up to some hundreds.
SETTINGS: dict[str, dict] = {
    "antmaze": dict(embedding_dim=1024, lr=1e-3, online_steps=1_000_000, online_eval_interval=20_000),
    "adroit": dict(online_steps=1_000_000, episode_length=200),
    "pen-binary": dict(online_steps=300_000, episode_length=100),
    "kitchen": dict(reward_scale=0.001, eval_return=400.0, online_return=800.0, online_steps=1_250_000,
        online_eval_interval=10_000, episode_length=280),
    "pick-place": dict(online_env="collect.pick_place:cal-ql/PickPlace-v0", embedding_dim=128, num_layers=3,
        num_heads=2, batch_size=64, context_length=5, lr=1e-3, warmup_updates=1_000, updates_per_episode=10,
        offline_steps=2_400, online_steps=7_000, offline_eval_interval=600, online_eval_interval=500, eval_episodes=40),
    "point-maze": dict(embedding_dim=128, num_layers=3, num_heads=2, batch_size=64, context_length=5, lr=1e-3,
        warmup_updates=1_000, updates_per_episode=10, offline_steps=3_000, online_steps=6_000,
        offline_eval_interval=500, online_eval_interval=500),
    "point-maze-medium": dict(online_env="collect.point_maze:cal-ql/PointMazeMedium-v0"),
    "point-maze-large": dict(online_env="collect.point_maze:cal-ql/PointMazeLarge-v0"),
}  # fmt: skip


# --- Data (common) ----------------------------------------------------------------------------------------------------
def to_state(observation, space: gym.Space, keys: tuple, leading: tuple[int, ...], source: str) -> np.ndarray:
    """Flattens observations to [*leading, O], in the order of the data's space; no `keys` means all."""
    if isinstance(space, gym.spaces.Dict):
        return np.concatenate([to_state(observation[k], space[k], (), leading, source) for k in keys or space], axis=-1)
    if not isinstance(space, gym.spaces.Box) or (space.dtype == np.uint8 and len(space.shape) == 3):
        raise InputError(f"{source}: observations of {space} are not supported; images are for cal_ql_pixels.py.")
    state = np.asarray(observation).astype(np.float32, casting="same_kind")
    if state.shape != (*leading, *space.shape) or not np.isfinite(state).all():
        raise InputError(f"{source}: observations {state.shape} are not {(*leading, *space.shape)}, or not finite.")
    return state.reshape(*leading, -1)


def to_episode(data: minari.EpisodeData, dataset: minari.MinariDataset, task: Task) -> Episode:
    """An episode of the data, relabelled to the task; Adroit's failures become empty. Raises InputError."""
    box, steps = dataset.action_space, len(data.rewards)
    if not isinstance(box, gym.spaces.Box) or box.low.ndim != 1 or not box.is_bounded() or (box.low >= box.high).any():
        raise InputError(f"actions of {box} are not supported: they must be one vector within finite bounds")
    source, keys = f"episode {data.id}", STATE_KEYS.get(task.domain, ())
    states = to_state(data.observations, dataset.observation_space, keys, (steps + 1,), source)
    low, high = box.low.astype(np.float64), box.high.astype(np.float64)  # they say what -1 and 1 mean
    actions = 2 * (np.asarray(data.actions, np.float64) - low) / (high - low) - 1  # human hands leave [-1, 1]
    rewards, terminations = np.asarray(data.rewards, np.float32), data.terminations
    success = data.infos["success"] if task.domain == "adroit" else np.zeros(steps + 1)
    shapes = [np.shape(column) for column in (data.actions, rewards, terminations, success[1:])]
    finite = all(np.isfinite(column).all() for column in (actions, rewards, terminations, success))
    if shapes != [(steps, *box.shape), *[(steps,)] * 3] or not finite or (np.abs(actions) > 1.0001).mean() > 0.2:
        raise InputError(f"{source}: columns of other shapes, values not finite, or actions out of their box")
    if task.cells:  # arriving at the one goal succeeds and ends, whatever the episode's own goal was
        maze, (row, column) = np.array(dataset.env_spec.kwargs["maze_map"]), task.cells[-1]
        goal = task.cell_size * np.array([column + 0.5 - maze.shape[1] / 2, maze.shape[0] / 2 - row - 0.5])
        rewards = terminations = np.linalg.norm(states[1:, :2] - goal, axis=1) <= 0.45  # the environment's threshold
    elif task.domain == "adroit":  # failures are dropped, the rest is cut after the last success (appendix G.3)
        end = np.flatnonzero(success).max(initial=0)  # step t's success is entry t + 1: entry 0 is the reset's
        states, actions = states[: end + 1], actions[:end]
        rewards = terminations = success[1 : end + 1]
    return Episode(states, actions.astype(np.float32), rewards.astype(np.float32), terminations)


def load_data(args: Args) -> tuple[Task, minari.MinariDataset, list[Batch]]:
    """The task, its first dataset, whose spaces bind all, and the episodes of use of all. Raises InputError."""
    task, datasets, episodes = TASKS.get(args.env_id, Task("any other", (args.env_id,))), [], []
    for dataset_id in args.datasets or task.datasets:
        print(f"data: {dataset_id}", flush=True)
        try:
            datasets.append(minari.load_dataset(dataset_id, download=not dataset_id.startswith("cal-ql/")))
            episodes += [to_episode(data, datasets[0], task) for data in datasets[-1]]
        except Exception as error:  # whatever Minari's back-ends raise, and whatever a damaged file does
            there = minari.storage.get_dataset_path(dataset_id).exists()
            hint = "" if there else f"cal-ql/... needs `collect`, others a network; the tasks are {', '.join(TASKS)}; "
            raise InputError(f"cannot use {dataset_id}: {hint}{type(error).__name__}: {error!s:.300}.") from error
    if not any(episode.rewards.any() for episode in episodes):
        raise InputError(f"no episode of {[dataset.id for dataset in datasets]} has a reward in {args.env_id}.")
    return task, datasets[0], [to_transitions(episode, args) for episode in episodes if len(episode.rewards) > 0]


# --- Replay -----------------------------------------------------------------------------------------------------------
class ReplayBuffer:
    """Trajectories end to end, in tensors on the training device; each begins where time_steps is 0.

    The offline ones come first, the worst before the best, all but the one with the lowest return. From the first
    online one on, only the last --buffer-trajectories are kept: a new one replaces the worst of the data, and when
    none of those is left, the oldest online one.
    """

    def __init__(self, offline: list[Batch], args: Args):
        self.args, self.num_online, trajectories = args, 0, []
        for episode in offline:
            bounds = [*np.flatnonzero(episode.time_steps == 0).tolist(), len(episode.returns)]
            trajectories += [Batch(*(column[i:j] for column in episode)) for i, j in pairwise(bounds)]
        # Of equal returns the longer is better: one step within AntMaze's goal teaches less than the way there (ours).
        trajectories.sort(key=lambda trajectory: (trajectory.returns[0], len(trajectory.returns)))
        columns = zip(*(trajectories[1:] or trajectories), strict=True)
        self.columns = Batch(*(torch.from_numpy(np.concatenate(arrays)).to(args.device) for arrays in columns))
        self.num_offline = len(self.columns.returns)

    def last(self, count: int) -> Batch:
        """The steps of the last `count` trajectories, or of all where there are fewer."""
        bounds = [*(self.columns.time_steps == 0).nonzero().flatten().tolist(), len(self.columns.returns)]
        return Batch(*(column[bounds[-1 - count :][0] :] for column in self.columns))

    def add(self, online: Batch, count: int = 1) -> None:
        """Appends online trajectories, and keeps the last of all."""
        size, pairs = self.args.buffer_trajectories, zip(self.columns, online, strict=True)
        self.columns = Batch(*(torch.cat([column, torch.as_tensor(values).to(column)]) for column, values in pairs))
        self.columns, self.num_online = self.last(size), min(self.num_online + count, size)

    def sample(self, batch_size: int) -> Batch:
        """Sequences of up to K steps from uniform steps on, so that a trajectory's share is its length."""
        times, length = self.columns.time_steps, self.args.context_length
        steps = torch.arange(length, device=times.device)
        starts = torch.randint(len(times), (batch_size, 1), device=times.device)
        rows = (starts + steps).clamp(max=len(times) - 1)
        counts = (times[rows] - times[starts] == steps).sum(1, keepdim=True)  # up to the trajectory's end
        steps = steps - length + counts  # below 0 at padding, in front
        mask = steps >= 0
        rows = starts + steps * mask
        return Batch(*(column[rows] * (mask if column.dim() == 1 else mask.unsqueeze(2)) for column in self.columns))

    def state_dict(self) -> dict:
        """The online trajectories; the offline ones are read from the dataset again."""
        online = [column.clone() for column in self.last(self.num_online)]
        return {"online": online, "num_online": self.num_online, "num_offline": self.num_offline}

    def load_state_dict(self, state: dict) -> None:
        if state["num_offline"] != self.num_offline:
            raise ValueError("the dataset has changed since this run began")
        if state["num_online"] > 0:
            self.add(Batch(*state["online"]), state["num_online"])


# --- Environment and evaluation ---------------------------------------------------------------------------------------
class TaskEnv(gym.Wrapper):
    """The task: flat states in the data's order, actions in [-1, 1] for the data's box, the score in each info."""

    def __init__(self, env: gym.Env, dataset: minari.MinariDataset, task: Task):
        super().__init__(env)
        self.task, self.box, self.source = task, dataset.action_space, f"{env.spec.id}'s reset or step"
        keys = STATE_KEYS.get(task.domain, ())
        self.state = partial(to_state, space=dataset.observation_space, keys=keys, leading=(), source=self.source)

    def reset(self, **kwargs):
        return self.state(self.env.reset(**kwargs)[0]), {}

    def step(self, action: np.ndarray):
        low, high, own = self.box.low.astype(np.float64), self.box.high.astype(np.float64), self.env.action_space
        action = np.clip(low + (action.astype(np.float64) + 1) / 2 * (high - low), own.low, own.high)
        action = (action.round() if own.dtype.kind in "iu" else action).astype(own.dtype)
        observation, *results, info = self.env.step(action)
        reward, terminated, truncated = (np.asarray(result).item() for result in results)
        score = np.asarray(info.get("success", info.get("is_success", np.nan)), float).item()  # NaN: nothing tells
        if self.task.domain == "adroit":  # the dense reward is replaced, and success ends the episode
            reward, terminated = score, terminated or score > 0
        if "episode_task_completions" in info:
            score = len(info["episode_task_completions"]) / len(self.unwrapped.goal)
        if not math.isfinite(reward):
            raise InputError(f"{self.source} gives the reward {reward}.")
        return self.state(observation), float(reward), terminated, truncated, {"score": score}


def make_env(dataset: minari.MinariDataset, task: Task, args: Args) -> gym.Env:
    """The environment of --online-env or the one that the data name, set to the task. Raises InputError."""
    own, env_id, kwargs = dataset.env_spec, args.online_env, {"max_episode_steps": args.episode_length or None}
    try:
        if env_id is None:  # a stranger's data give a registered id and plain arguments, never code
            if own is None or own.id not in gym.registry or own.additional_wrappers:
                raise ValueError("the data name none to be had: --online-env, or --online-steps 0 --eval-episodes 0")
            env_id, limit = gym.registry[own.id], args.episode_length or own.max_episode_steps
            kwargs = {k: v for k, v in own.kwargs.items() if k != "render_mode"} | {"max_episode_steps": limit}
            if task.domain == "antmaze":
                # The data's own maze (Minari's evaluation maps are mirrored for umaze), with one start and goal.
                maze = [[int(cell == 1) for cell in row] for row in kwargs["maze_map"]]
                for (row, column), letter in zip(task.cells, "rg", strict=True):
                    maze[row][column] = letter
                kwargs |= {"maze_map": maze, "continuing_task": False, "reset_target": False}
            elif task.domain == "kitchen":
                kwargs |= {"remove_task_when_completed": False, "terminate_on_tasks_completed": False}
        env = gym.make(env_id, disable_env_checker=True, **kwargs)
        if args.online_env is None and task.domain == "antmaze":
            env.unwrapped.position_noise_range = 0.0  # start and goal at their cells' centres ...
            env.unwrapped.ant_env._reset_noise_scale = 0.1  # ... but no two starts alike, as in D4RL
        if env.spec.max_episode_steps is None or env.action_space.shape != dataset.action_space.shape:
            raise ValueError("it has no time limit (--episode-length), or other actions than the data")
        env = TaskEnv(env, dataset, task)
        env.reset(seed=args.seed)
        env.step(np.zeros(env.action_space.shape))  # what does not fit fails here, not after the offline phase
        return env
    except Exception as error:  # no such module, arguments that it does not take, no maze
        raise InputError(f"cannot make the environment {args.online_env or dataset.id}: {error!r}.") from error


@torch.no_grad()
def play_episode(env: gym.Env, agent: Agent, seed: int, explore: bool, device: str) -> tuple[Episode, float]:
    """One episode and its score, NaN where nothing tells success; the policy does not learn meanwhile."""
    args, states, steps, scores, done = agent.args, [env.reset(seed=seed)[0]], [], [], False
    asked = [np.float32(args.online_return if explore else args.eval_return)]  # less the rewards that came since
    actions = [np.zeros(env.action_space.shape, np.float32)]  # the last is the action to come, which has no influence
    while not done:
        columns = asked, states, actions, range(len(states)), np.ones(len(states), np.float32)
        columns = (torch.from_numpy(np.array(column[-args.eval_context_length :])) for column in columns)
        batch = Batch(*(column.unsqueeze(0).to(device) for column in columns))
        actions[-1] = agent.act(batch, explore).squeeze(0).cpu().numpy()
        state, reward, terminated, truncated, info = env.step(actions[-1])
        states.append(state)
        steps.append((actions[-1], reward, terminated))  # never the time limit, as in the other scripts
        scores.append(info["score"])
        asked.append(asked[-1] - np.float32(reward))
        actions.append(np.zeros_like(actions[-1]))
        done = terminated or truncated
    return Episode(np.array(states), *map(np.array, zip(*steps, strict=True))), np.fmax.reduce(scores)


def evaluate(env: gym.Env | None, agent: Agent, buffer: ReplayBuffer, progress: SimpleNamespace, args: Args) -> dict:
    """A row of eval.csv: episodes of the deterministic policy (NaN if there are none), and `probe` of four batches."""
    scores, returns = np.full((2, max(args.eval_episodes, 1)), np.nan)
    seeds = np.random.SeedSequence((args.seed, 1, len(progress.rows))).generate_state(args.eval_episodes)
    for k, seed in enumerate(seeds.tolist()):
        episode, scores[k] = play_episode(env, agent, seed, explore=False, device=args.device)
        returns[k] = episode.rewards.sum()
    if progress.tells_success is None and args.eval_episodes > 0:  # one rule for the run: the score is success, or ...
        progress.tells_success = not np.isnan(scores).all()
    score = np.nan_to_num(scores).mean() if progress.tells_success else returns.mean()  # ... the return
    row = {"phase": "online" if progress.env_steps else "offline", "updates": progress.updates}
    row |= {"env_steps": progress.env_steps, "score": float(score), "return": float(returns.mean())}
    with torch.random.fork_rng():  # an evaluation leaves no trace in the training
        torch.manual_seed(args.seed)
        return row | probe(agent, buffer.sample(4 * args.batch_size), args)


# --- Training, checkpoints and command line ---------------------------------------------------------------------------
def log(writer: SummaryWriter, scalars: dict, step: int) -> None:
    for name, value in scalars.items():
        writer.add_scalar(name, value, step)


def train(args: Args, checkpoint: dict | None = None) -> None:
    """Both phases, or what is left of them after a checkpoint. Raises InputError."""
    torch.set_flush_denormal(True)  # denormal gradients and moments slow a processor down; threads inherit this
    torch.set_float32_matmul_precision("medium")  # TF32 on CUDA; on a CPU oneDNN's products, of bfloat16 if it has AMX
    task, dataset, offline = load_data(args)
    env = make_env(dataset, task, args) if args.online_steps > 0 or args.eval_episodes > 0 else None

    # Replay and agent; no CUDA graphs, as in the other scripts: the transformer's products keep a GPU busy.
    buffer = ReplayBuffer(offline, args)
    torch.manual_seed(args.seed)
    agent, optimizer = make_agent(offline, args)
    del offline  # the replay has a copy

    # How far the run is: `step`, the x-axis of all curves, counts updates offline and goes on with environment steps.
    progress = SimpleNamespace(step=0, updates=0, env_steps=0, wall_time=0.0, tells_success=None, rows=[])
    parts = {"agent": agent, "optimizer": optimizer, "buffer": buffer}
    if checkpoint is not None:
        try:
            checkpoint["optimizer"]["param_groups"] = optimizer.state_dict()["param_groups"]  # by this run's flags
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
            vars(progress).update(checkpoint["progress"])
            if args.seed == checkpoint["args"]["seed"]:  # another seed draws anew
                torch.set_rng_state(checkpoint["rng"][0])
                torch.cuda.set_rng_state_all(checkpoint["rng"][1 : 1 + torch.cuda.device_count()])
        except Exception as error:  # other networks, other data
            raise InputError(f"cannot go on from {args.resume} with these settings: {error!r:.300}.") from error
    name = f"{args.env_id.replace('/', '-')}__{Path(__file__).stem}__{args.seed}__{time.time_ns()}"
    run = Path(args.resume or f"runs/{name}").resolve()
    if args.track:
        import wandb

        wandb.init(name=run.name, id=run.name, config=vars(args), sync_tensorboard=True, resume="allow")
    writer = SummaryWriter(str(run), purge_step=progress.step + 1)  # after wandb.init, which hooks into it
    writer.add_text("settings", str(vars(args)))
    (run / "config.json").write_text(json.dumps(vars(args), indent=2) + "\n")
    print(f"run: {run}", *(f"  {k} {v}" for k, v in vars(args).items() if v != getattr(Args, k)), sep="\n")
    began = time.time() - progress.wall_time  # as if the run had never paused

    def evaluate_and_save(evaluation_due: bool) -> None:
        """Evaluates if that is due, and saves then and every ten minutes. The run's state is whole here."""
        if not evaluation_due and time.time() - began < progress.wall_time + 600:  # that of the last save
            return
        if not all(parameter.isfinite().all() for parameter in agent.parameters()):
            raise InputError(f"weights are not finite after {progress.updates} updates; {run} keeps its checkpoint.")
        if evaluation_due:
            row = evaluate(env, agent, buffer, progress, args) | {"wall_time": time.time() - began}
            progress.rows.append(row)
            log(writer, {f"eval/{k}": v for k, v in row.items() if isinstance(v, float)}, progress.step)
            tqdm.write(f"{row['phase']:8}{row['env_steps'] or row['updates']:9,}  score {row['score']:.3f}  "
                       f"return {row['return']:.1f}  Monte-Carlo return {row['mean_mc_return']:.1f}")  # fmt: skip
            lines = [row.keys(), *(row.values() for row in progress.rows)]
            (run / "eval.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
        progress.wall_time = time.time() - began
        state = {name: part.state_dict() for name, part in parts.items()}
        state["rng"] = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
        state |= {"args": vars(args), "progress": vars(progress)}
        torch.save(state, run / "checkpoint.partial")  # a killed run keeps either the old checkpoint or the new one
        (run / "checkpoint.partial").replace(run / "checkpoint.pt")

    # Phase 1: offline pre-training, from the first evaluation of a new run to the one at the switch.
    if not progress.rows:
        evaluate_and_save(evaluation_due=True)
    for _ in tqdm(range(progress.updates, args.offline_steps), f"offline from {progress.updates:,}", disable=None):
        progress.updates += 1
        progress.step += 1
        metrics = update(agent, optimizer, args, progress.updates, buffer.sample(args.batch_size))
        if progress.updates % 100 == 0:
            log(writer, metrics | {"charts/SPS": progress.step / (time.time() - began)}, progress.step)
        evaluate_and_save(progress.updates % args.offline_eval_interval == 0 or progress.updates == args.offline_steps)

    # Phase 2: online fine-tuning, one whole episode and then the updates for it; nothing is reinitialised.
    bar = tqdm(total=args.online_steps, initial=progress.env_steps, desc="online", disable=None)
    while progress.env_steps < args.online_steps:
        seed = np.random.SeedSequence((args.seed, 0, progress.env_steps)).generate_state(1).tolist()[0]
        episode, _ = play_episode(env, agent, seed, explore=True, device=args.device)
        buffer.add(to_transitions(episode, args))  # the first one ends the sampling of all offline trajectories
        length = len(episode.rewards)
        progress.env_steps += length
        progress.step += length
        metrics = {"charts/episodic_return": episode.rewards.sum(), "charts/episodic_length": length}
        for _ in range(args.updates_per_episode):
            progress.updates += 1
            metrics |= update(agent, optimizer, args, progress.updates, buffer.sample(args.batch_size))
        log(writer, metrics | {"charts/SPS": progress.step / (time.time() - began)}, progress.step)
        bar.update(length)
        due = progress.env_steps % args.online_eval_interval < length  # a multiple of it lies in this episode
        evaluate_and_save(due or progress.env_steps >= args.online_steps)
    print(f"done: {progress.updates:,} updates, {progress.env_steps:,} environment steps, {run / 'eval.csv'}")


def parse_args(argv: list[str] | None = None) -> tuple[Args, dict | None]:
    """The flags on top of the task's settings or, with --resume, of the checkpoint's, and that. Raises InputError."""
    first, _ = tyro.cli(Args, args=argv, add_help=False, return_unknown_args=True)
    checkpoint, env_id = None, first.env_id
    if first.resume is not None:
        path = Path(first.resume) / "checkpoint.pt"
        try:
            if damaged := zipfile.ZipFile(path).testzip():
                raise ValueError(f"its part {damaged} is damaged")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            env_id = checkpoint["args"]["env_id"]
        except Exception as error:  # whatever another program has put there
            raise InputError(f"cannot go on from {path}: {error!r:.300}.") from error
    domain = getattr(TASKS.get(env_id), "domain", "any other")
    settings = {"env_id": env_id, **SETTINGS.get(domain, {}), **SETTINGS.get(env_id, {})}
    defaults = Args(**(settings if checkpoint is None else checkpoint["args"]))
    summary = f"{__doc__.splitlines()[0]} Tasks: {', '.join(TASKS)}. `--env-id TASK --help` shows that task's settings."
    args = tyro.cli(Args, default=defaults, args=argv, description=summary)
    if checkpoint is not None:
        fixed = ["reward_scale", "online_env", "episode_length", "offline_steps"]
        fixed = ["env_id", "datasets", *(fixed if checkpoint["progress"]["env_steps"] > 0 else [])]
        if changed := [name for name in fixed if getattr(args, name) != getattr(defaults, name)]:
            raise InputError(f"{args.resume} cannot go on with another {' or '.join(changed)}: start a new run.")
        if args.online_env not in (None, first.online_env, settings.get("online_env")):  # it names code
            raise InputError(f"{args.resume} was made with --online-env {args.online_env}: repeat that to go on.")
    may_be_0 = ("seed", "eval_episodes", "episode_length", "updates_per_episode")
    small = [k for k, v in vars(args).items() if type(v) is int and v < (k not in may_be_0 and not k.endswith("steps"))]
    if small or (args.device == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"--device cuda needs CUDA there; too small: {small}.")
    if args.embedding_dim % args.num_heads or not 0 <= args.dropout < 1 or args.initial_temperature <= 0:
        raise InputError("--num-heads must divide --embedding-dim, --dropout be below 1, the temperature positive.")
    return args, checkpoint


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops the run as Ctrl-C does
    sys.path.append("")  # where `collect` is, for a script in another folder
    try:
        train(*parse_args())
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("\nstopped; `--resume` with the run's folder goes on from its last checkpoint.")
# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["farama-notifications==0.0.4", "gymnasium-robotics==1.4.2", "gymnasium==1.4.0",
#   "minari[hdf5,hf]==0.5.4", "mujoco==3.3.7", "numpy==2.4.6", "tensorboard==2.21.0", "tensordict==0.15.3",
#   "torch==2.13.0", "tqdm==4.70.1", "tyro==1.0.17", "wandb==0.31.0"]
# ///
