"""IQL from camera images: implicit Q-learning (Kostrikov et al. 2021, arXiv:2110.06169).

The algorithm of iql_continuous.py on the frames, replay and encoder of cal_ql_pixels.py. V learns an upper expectile of
Q over the data's actions; Q learns the reward and V of the next state; the policy imitates the data's actions, each
weighted by the exponential of its advantage:

    min_V   E_D[ |expectile - 1{u < 0}| u^2 ],  u = min_i Qtarget_i(s,a) - V(s)
    max_pi  E_D[ min( exp(beta (min_i Qtarget_i(s,a) - V(s))), 100 ) log pi(a|s) ]
    min_Q   E_D[ sum_i ( Q_i(s,a) - r - gamma (1 - d) V(s') )^2 ]

Expectile and beta are the paper's for its visual task. The paper describes no encoder: what trains it here is ours.

    python baselines/iql_pixels.py --env-id pick-place-pixels    # after `python -m collect.pick_place --camera`
    python baselines/iql_pixels.py --resume runs/<run>           # continues from its last checkpoint
"""

import os
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C amid the imports ends the process without a traceback
elif __name__ == "__mp_main__":  # a process of --eval-async, which ends with the run, without a word
    sys.stderr = open(os.devnull, "w")

import copy
import dataclasses
import functools
import hashlib
import importlib
import itertools
import json
import math
import re
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
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
from tensordict.nn import CudaGraphModule
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


# --- Settings ---------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Args:
    """The settings of a run. `task_defaults(env_id)` gives those for a task."""

    env_id: str = "pick-place-pixels"  # a task of the table TASKS, or a Minari dataset id with images as observations
    # --- Run and protocol
    seed: int = 1  # of networks, batches and episodes
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to train; auto takes CUDA where there is one
    threads: int = 0  # CPU threads; 0 leaves the choice to torch
    resume: str | None = None  # folder of a run to continue; step totals, intervals, device, threads, track may change
    init_from: str | None = None  # folder of a run whose offline phase this one starts after, with its settings
    track: bool = False  # log to Weights & Biases too; WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE are obeyed
    offline_steps: int = 500_000  # gradient updates of the offline phase
    online_steps: int = 500_000  # environment steps of the online phase, completed to whole episodes
    warmup_steps: int = 0  # of them, how many the policy plays before the first online update
    offline_eval_interval: int = 50_000  # updates between two evaluations offline
    online_eval_interval: int = 5_000  # environment steps between two evaluations online
    eval_episodes: int = 20  # episodes of an evaluation, with the deterministic policy
    eval_async: bool = False  # play each of them in a process of its own, instead of all in this one
    episode_length: int = 0  # time limit of an episode in steps; 0 keeps the environment's own
    online_env: str | None = None  # module:function that makes the environment, instead of the one that the data names
    reward_scale: float = 1.0  # rewards are multiplied by this ...
    reward_bias: float = 0.0  # ... and this is added
    buffer_size: int = 1_000_000  # online frames kept, T + 1 of an episode of T steps; the oldest are overwritten
    mixing_ratio: float = 0.5  # share of offline transitions in an online batch; below 0 all are sampled alike
    batch_size: int = 256  # transitions in a batch
    gamma: float = 0.99  # discount
    utd_ratio: int = 1  # updates per environment step
    actor_interval: int = 1  # updates of the critics per update of the actor
    # --- Images
    latent_dim: int = 50  # features that the encoder makes of a frame
    random_shift: int = 4  # most pixels that a sampled frame is shifted by, up or down and left or right
    # --- IQL
    expectile: float = 0.7  # the expectile of Q over the data's actions that V learns; 0.5 is their mean
    beta: float = 3.0  # advantages are multiplied by this in the exponent of the policy's weights
    actor_std: float | None = None  # deviation of the policy; None learns one vector, the same for all states
    actor_dropout: float = 0.0  # share of the actor's hidden units that are dropped in training
    tau: float = 0.005  # rate at which target critics and target encoder follow the learned ones
    actor_lr: float = 3e-4  # learning rate of the actor
    critic_lr: float = 3e-4  # learning rate of encoder, critics and V
    actor_layers: tuple[int, ...] = (256, 256)  # hidden layers of the actor
    critic_layers: tuple[int, ...] = (256, 256)  # hidden layers of each critic and of V
    num_critics: int = 2  # critics in the ensemble
    critic_layer_norm: bool = False  # layer norm before each ReLU of the critics


# --- Batch and networks -----------------------------------------------------------------------------------------------
# Transitions: observations [B, O], actions [B, A] in (-1, 1), rewards [B] scaled and biased, next_observations [B, O],
# terminations [B] (1.0 where the environment ended the episode, 0.0 at a time limit), mc_returns [B] from here on.
Batch = namedtuple("Batch", "observations actions rewards next_observations terminations mc_returns")


class Critic(nn.Module):
    """An ensemble of N critics on concat(s, a); each layer is one batched matrix product over the N."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.layer_norm = args.critic_layer_norm
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, o in itertools.pairwise([obs_dim + action_dim, *args.critic_layers, 1]):
            self.weights.append(torch.empty(args.num_critics, i, o))
            self.biases.append(torch.zeros(args.num_critics, 1, o))
        for weight in itertools.chain(*(layer.data for layer in self.weights)):
            nn.init.orthogonal_(weight, 2**0.5)  # the output too

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Q-values [N, B, K] of K actions for each state: observations [B, O], actions [B, K, A]."""
        x = torch.cat([observations.unsqueeze(1).expand(-1, actions.shape[1], -1), actions], dim=2).flatten(0, 1)
        x = x @ self.weights[0] + self.biases[0]  # [B*K, O+A] @ [N, O+A, H] + [N, 1, H] -> [N, B*K, H]
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            if self.layer_norm:
                x = F.layer_norm(x, x.shape[-1:])
            x = torch.baddbmm(bias, F.relu(x), weight)
        return x.squeeze(2).unflatten(1, actions.shape[:2])


def linear_layers(*sizes: int) -> nn.ModuleList:
    layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(sizes))
    for layer in layers:
        nn.init.orthogonal_(layer.weight, 2**0.5)  # the output too
        nn.init.zeros_(layer.bias)
    return layers


class Value(nn.Module):
    """V(s)."""

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        self.layers = linear_layers(obs_dim, *args.critic_layers, 1)

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        """Values [B] of observations [B, O]."""
        x = observations
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x).squeeze(1)


class Actor(nn.Module):
    """A Gaussian policy that is not squashed: its mean is a tanh, its deviation the same in all states."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.layers = linear_layers(obs_dim, *args.actor_layers, action_dim)
        self.std = args.actor_std
        self.log_std = nn.Parameter(torch.zeros(action_dim), requires_grad=self.std is None)

    def forward(self, observations: torch.Tensor, dropout: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean [B, A] and deviation [A] for observations [B, O]; `dropout` is for training alone."""
        x = observations
        for layer in self.layers[:-1]:
            x = F.dropout(F.relu(layer(x)), dropout, training=dropout > 0)
        log_std = self.log_std if self.std is None else torch.full_like(self.log_std, math.log(self.std))
        return torch.tanh(self.layers[-1](x)), log_std.clamp(-5.0, 2.0).exp()


# --- Encoder ----------------------------------------------------------------------------------------------------------
# In a Batch or an Episode an observation is a frame [H, W, C] of uint8; what actor and critics see are its O features.
class Encoder(nn.Module):
    """Features of a frame: four convolutions, each of which halves height and width, linear layer, layer norm, tanh."""

    def __init__(self, height: int, width: int, channels: int, args: Args):
        super().__init__()
        layers = []
        for i, o in itertools.pairwise([channels, 16, 32, 32, 32]):
            layers += [nn.Conv2d(i, o, 3, stride=2, padding=1), nn.ReLU()]
        layers += [nn.Flatten(), nn.Linear(32 * math.ceil(height / 16) * math.ceil(width / 16), args.latent_dim)]
        self.net = nn.Sequential(*layers, nn.LayerNorm(args.latent_dim, elementwise_affine=False), nn.Tanh())
        for layer in self.net:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.orthogonal_(layer.weight, 2**0.5)
                nn.init.zeros_(layer.bias)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        """Features [B, O] of frames [B, H, W, C]."""
        return self.net(frames.permute(0, 3, 1, 2) / 255 - 0.5)


def random_shift(frames: torch.Tensor, most: int) -> torch.Tensor:
    """Shifts each of the frames [B, H, W, C] by up to `most` pixels each way, and repeats its edge where it leaves."""
    batch_size, height, width, _ = frames.shape
    down, right = torch.randint(-most, most + 1, (2, batch_size, 1), device=frames.device)  # [B, 1] each
    rows = (torch.arange(height, device=frames.device) - down).clamp(0, height - 1)  # [B, H]
    columns = (torch.arange(width, device=frames.device) - right).clamp(0, width - 1)  # [B, W]
    each = torch.arange(batch_size, device=frames.device)[:, None, None]
    return frames[each, rows.unsqueeze(2), columns.unsqueeze(1)]


# --- Agent and update -------------------------------------------------------------------------------------------------
class Agent(nn.Module):
    """All that learns: encoder, actor, V, critics, and slow copies for targets."""

    def __init__(self, height: int, width: int, channels: int, action_dim: int, args: Args):
        super().__init__()
        self.encoder = Encoder(height, width, channels, args)
        self.actor = Actor(args.latent_dim, action_dim, args)
        self.value = Value(args.latent_dim, args)
        self.critic = Critic(args.latent_dim, action_dim, args)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)

    def prepare(self, buffer: "ReplayBuffer", args: Args) -> torch.optim.Optimizer:
        """Makes the optimizer, in which the actor's and the critics' sides have learning rates of their own."""
        actor_side = {"params": list(self.actor.parameters()), "lr": args.actor_lr}
        critics = [*self.encoder.parameters(), *self.value.parameters(), *self.critic.parameters()]
        critic_side = {"params": critics, "lr": args.critic_lr}
        return torch.optim.Adam([actor_side, critic_side], fused=True, capturable=self.actor.log_std.is_cuda)

    def act(self, frames: torch.Tensor, explore: bool) -> torch.Tensor:
        """Actions [B, A]: drawn from the policy in online episodes, its mean in evaluations."""
        mean, std = self.actor(self.encoder(frames))
        return (mean + std * torch.randn_like(mean)).clamp(-1.0, 1.0) if explore else mean


def descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One step of what this loss depends on: zero_grad drops every gradient, and the optimizer skips what has none."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def update(agent: Agent, optimizer, args: Args, online: bool, with_actor: bool, batch: Batch) -> dict:
    """One update, the same in both phases: V, the actor with the new V, the critics with the new V, the targets.

    `with_actor` says whether the actor steps too. Returns scalars to log, which stay on the device.
    """
    actions = batch.actions.unsqueeze(1)

    # The critics' loss alone trains the encoder: V and actor get its features detached, target critics its slow copy's.
    frames = random_shift(batch.observations, args.random_shift)
    features = agent.encoder(frames)  # [B, O]
    states = features.detach()
    with torch.no_grad():
        next_states = agent.encoder(random_shift(batch.next_observations, args.random_shift))
        q_target = agent.target_critic(agent.target_encoder(frames), actions).amin(0).squeeze(1)  # [B]

    # V regresses on an expectile of Q.
    u = q_target - agent.value(states)
    value_loss = (torch.where(u > 0, args.expectile, 1 - args.expectile) * u.square()).mean()
    descend(optimizer, value_loss)
    metrics = {"losses/value_loss": value_loss}

    # The actor regresses on the data's actions, weighted by their advantage: target critics less the new V.
    if with_actor:
        with torch.no_grad():
            weight = (args.beta * (q_target - agent.value(states))).exp().clamp(max=100.0)
        mean, std = agent.actor(states, args.actor_dropout)
        log_prob = torch.distributions.Normal(mean, std, validate_args=False).log_prob(batch.actions).sum(1)
        actor_loss = -(weight * log_prob).mean()
        descend(optimizer, actor_loss)
        metrics |= {"losses/actor_loss": actor_loss, "losses/actor_weight": weight.mean()}

    # The critics regress on the reward and the new V of the next state.
    with torch.no_grad():
        target = batch.rewards + args.gamma * (1 - batch.terminations) * agent.value(next_states)
    q_data = agent.critic(features, actions).squeeze(2)  # [N, B]
    td_loss = (q_data - target).square().mean(1)  # [N]; there is no 1/2
    descend(optimizer, td_loss.sum())
    with torch.no_grad():
        for follower, learned in ((agent.target_encoder, agent.encoder), (agent.target_critic, agent.critic)):
            for slow, fast in zip(follower.parameters(), learned.parameters(), strict=True):
                slow.lerp_(fast, args.tau)
    metrics |= {"losses/qf_loss": td_loss.mean(), "calibration/mean_q": q_data.mean()}
    return {name: value.detach() for name, value in metrics.items()}


@torch.no_grad()
def probe(agent: Agent, batch: Batch, args: Args) -> dict[str, float]:
    """Mean Q and mean return of the data; the bound rate is not measured here, and is NaN."""
    features = agent.encoder(batch.observations)  # of the frames as they are, not shifted
    q_data = agent.critic(features, batch.actions.unsqueeze(1))
    return {"mean_q": q_data.mean().item(), "mean_mc_return": batch.mc_returns.mean().item(), "bound_rate": math.nan}


# --- Settings of the tasks --------------------------------------------------------------------------------------------
# The paper's: expectile, beta, mixing ratio (table 4), steps, updates per step (G.4). Gamma: a co-author's later code.
# Ours: rewards of {-1, 0}, as IQL has in AntMaze and Adroit; a learned deviation (no actor_std below); the intervals.
SETTINGS: dict[str, dict] = {
    "every task": dict(buffer_size=110_000),  # frames: T + 1 of an episode of T steps
    "visual": dict(
        expectile=0.7, beta=10.0, reward_bias=-1.0, gamma=0.96, utd_ratio=5, offline_steps=50_000, online_steps=100_000,
        offline_eval_interval=5_000, online_eval_interval=2_000),
}  # fmt: skip
# The limits of these settings, where they are not those of a positive number.
LIMITS = dict(expectile=(1e-9, 1 - 1e-9), beta=(0, 1e9), actor_std=(0.01, 7), actor_dropout=(0, 0.99),
              latent_dim=(2, 1e4), random_shift=(0, 1e3))  # fmt: skip
Task = namedtuple("Task", "domain datasets")  # the key of its SETTINGS, and the datasets whose episodes are joined
TASKS: dict[str, Task] = {"pick-place-pixels": Task("visual", ("cal-ql/pick-place/pixels-v0",))}


# --- Task lookup ------------------------------------------------------------------------------------------------------
class InputError(Exception):
    """Something the user can put right; its message is one sentence that says how."""


def find_task(env_id: str) -> Task:
    """A task by its name; any Minari id is a task as it stands. Raises InputError for anything else."""
    if env_id not in TASKS and not re.fullmatch(r"([\w-]+/)+[\w-]+-v\d+", env_id):
        raise InputError(f"--env-id {env_id!r} is no Minari dataset id and none of the tasks {', '.join(TASKS)}.")
    return TASKS.get(env_id, Task("any other", (env_id,)))


def task_defaults(env_id: str) -> Args:
    """The settings of a task: those of every task, then its domain's, then its own."""
    of_all, of_domain, own = (SETTINGS.get(name, {}) for name in ("every task", find_task(env_id).domain, env_id))
    return Args(env_id=env_id, **of_all | of_domain | own)


# --- Data -------------------------------------------------------------------------------------------------------------
# T steps: states [T+1, O], actions [T, A] in (-1, 1), rewards [T] as the task gives them, terminations [T].
Episode = namedtuple("Episode", "observations actions rewards terminations")


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


def monte_carlo_returns(rewards: np.ndarray, terminations: np.ndarray, gamma: float, tail: float) -> np.ndarray:
    """G_t = r_t + gamma (1 - d_t) G_{t+1} [T] for scaled rewards [T]; `tail` is G_T, what comes after the last step."""
    returns, following = np.zeros(len(rewards), np.float32), tail
    for t in reversed(range(len(rewards))):
        returns[t] = following = float(rewards[t]) + (0.0 if terminations[t] else gamma * following)
    return returns


# --- Frames and actions -----------------------------------------------------------------------------------------------
def load_episodes(datasets: list[minari.MinariDataset], task: Task, env: gym.Env) -> Iterator:
    """Gives the number of all frames, then each episode as it is read: none is held twice. Raises InputError."""
    frames_left = sum(dataset.total_steps + dataset.total_episodes for dataset in datasets)
    yield frames_left
    seen, outside, successes = [], [], 0
    for dataset, k in ((each, k) for each in datasets for k in range(each.total_episodes)):
        box = dataset.action_space
        try:
            (data,) = dataset.iterate_episodes([k])
            steps = len(data.rewards)
            frames_left -= steps + 1
            names, kinds = ("observations", "actions", "rewards", "terminations"), ("u", "fiu", "fiu", "b")
            columns = data.observations, data.actions, data.rewards, data.terminations
            shapes = (steps + 1, *env.observation_space.shape), (steps, *box.shape), (steps,), (steps,)
            for name, kind, values, shape in zip(names, kinds, columns, shapes, strict=True):
                if values.shape != shape or values.dtype.kind not in kind or not np.isfinite(values).all():
                    raise ValueError(f"{name} {values.dtype}{list(values.shape)} must be finite numbers {list(shape)}")
            if steps == 0 or frames_left < 0:
                raise ValueError("it has no step, or more than the dataset's metadata say")
            actions = (2 * (data.actions - box.low) / (box.high - box.low) - 1).astype(np.float32)
            if np.abs(actions).max() > 10:  # a little beyond is clipped, as in Adroit's human data
                raise ValueError("actions lie far outside of their box")
        except Exception as error:  # whatever a damaged file does
            raise InputError(f"episode {k} of {dataset.id}: {error}; repair it or leave it out.") from error
        outside.append(np.abs(actions) > 1)
        seen.append(actions.clip(-0.99999, 0.99999))
        successes += bool(data.rewards.max() > 0)
        yield Episode(data.observations, seen[-1], data.rewards.astype(np.float32), data.terminations.astype(bool))
    clipped = np.concatenate(outside).mean() if seen else 1.0
    if clipped > 0.2 or frames_left:
        raise InputError(f"{' and '.join(task.datasets)}: no episode, frames missing, or actions outside of their box.")
    low, high = np.quantile(np.concatenate(seen), [0.01, 0.99], axis=0)  # [A]
    print(f"data: {len(seen)} episodes, {successes} with reward > 0; actions fill {np.mean(high - low) / 2:.0%} of "
          f"their box, {clipped:.2%} clipped")  # fmt: skip


# --- Replay -----------------------------------------------------------------------------------------------------------
class ReplayBuffer:
    """The offline frames, then a ring of `args.buffer_size` online ones, in tensors on the training device.

    An episode of T steps fills T + 1 slots in a row, so that each frame is kept once: slot t holds transition t, whose
    next frame is in the next slot; the last slot holds a frame alone and is never sampled. Episodes enter whole and
    with their returns: no transition is sampled before its return is known. `sparse` rewards are those of the tasks of
    the table: the returns of episodes that time cuts off then get a tail.
    """

    def __init__(self, episodes: Iterator, args: Args, sparse: bool, device: torch.device):
        """Takes the number of offline frames, and then their episodes one by one."""
        self.args, self.sparse, self.device = args, sparse, device
        self.ring, first = next(episodes), next(episodes)  # `ring` is where the ring begins
        self.size, self.cursor, self.filled = self.ring + args.buffer_size, 0, 0
        empty = functools.partial(torch.empty, device=device)
        frames = empty(self.size, *first.observations.shape[1:], dtype=torch.uint8)
        # With the frames: actions [A], rewards, terminations, returns, and whether the slot holds a transition.
        self.columns = [frames, empty(self.size, *first.actions.shape[1:]), *empty(4, self.size)]
        self.columns[-1].zero_()
        end = 0
        for episode in itertools.chain([first], episodes):
            end += len(episode.rewards) + 1
            self.write(episode, torch.arange(end - len(episode.rewards) - 1, end))
        self.offline, self.online = self.find_transitions(0, self.ring), self.find_transitions(self.ring, self.ring)

    def find_transitions(self, start: int, end: int) -> torch.Tensor:
        """The slots in [start, end) that may be sampled."""
        return start + self.columns[-1][start:end].nonzero().squeeze(1)

    def write(self, episode: Episode, index: torch.Tensor) -> None:
        """Writes the last len(index) frames of an episode, with their transitions and returns, at `index`."""
        frames, actions, rewards, terminations = episode
        rewards = rewards * self.args.reward_scale + self.args.reward_bias
        # A time limit is not an end: the last reward is assumed to repeat for ever, as the authors do for failures.
        tail = float(rewards[-1]) / (1 - self.args.gamma) if self.sparse else 0.0
        returns = monte_carlo_returns(rewards, terminations, self.args.gamma, tail)
        transitions = actions, rewards, terminations, returns, np.ones_like(returns)
        columns = [frames, *(np.concatenate([values, np.zeros_like(values[:1])]) for values in transitions)]
        for column, values in zip(self.columns, columns, strict=True):
            column[index.to(self.device)] = torch.as_tensor(values[-len(index) :]).to(column)

    def add(self, episode: Episode) -> None:
        """Appends an online episode; the oldest online frames make room for it."""
        size, count = self.args.buffer_size, min(len(episode.rewards) + 1, self.args.buffer_size)
        self.write(episode, self.ring + (self.cursor + torch.arange(count)) % size)
        self.cursor, self.filled = (self.cursor + count) % size, min(self.filled + count, size)
        self.online = self.find_transitions(self.ring, self.ring + self.filled)

    def sample(self, batch_size: int) -> Batch:
        """int(share * B) offline transitions and the rest online (appendix H.2), with replacement."""
        share = self.args.mixing_ratio
        if share < 0 or len(self.online) == 0:
            share = len(self.offline) / (len(self.offline) + len(self.online))
        count = int(share * batch_size)
        offline = torch.randint(len(self.offline), (count,), device=self.device)
        online = torch.randint(max(len(self.online), 1), (batch_size - count,), device=self.device)
        slots = torch.cat([self.offline[offline], self.online[online]])
        following = torch.where(slots + 1 == self.size, self.ring, slots + 1)  # the ring closes
        frames, actions, rewards, terminations, returns, _ = self.columns
        return Batch(
            frames[slots], actions[slots], rewards[slots], frames[following], terminations[slots], returns[slots]
        )

    def state_dict(self) -> dict:
        """The online slots; the offline ones are read from the dataset again."""
        online = [column[self.ring :][: self.filled].clone() for column in self.columns]
        return {"online": online, "cursor": self.cursor, "num_offline": len(self.offline)}

    def load_state_dict(self, state: dict) -> None:
        if state["num_offline"] != len(self.offline) or state["cursor"] not in range(self.args.buffer_size):
            raise ValueError("the dataset has changed since this run began")
        self.cursor, self.filled = state["cursor"], len(state["online"][0])
        for column, values in zip(self.columns, state["online"], strict=True):
            column[self.ring :][: self.filled] = values.reshape(self.filled, *column.shape[1:])
        self.online = self.find_transitions(self.ring, self.ring + self.filled)


# --- Environments -----------------------------------------------------------------------------------------------------
class TaskEnv(gym.Wrapper):
    """The task: a new frame each step, actions in [-1, 1] for `box`, the score in each info."""

    def __init__(self, env: gym.Env, box: gym.spaces.Box):
        super().__init__(env)
        self.box = box
        self.action_space = gym.spaces.Box(-1.0, 1.0, box.shape, np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        # A copy: some environments draw into one array, or return it flipped.
        return np.array(self.env.reset(seed=seed, options=options)[0]), {}

    def step(self, action: np.ndarray):
        # The dataset's box says what the policy's -1 and 1 mean; the environment's own may be another.
        action = self.box.low + (action + 1) / 2 * (self.box.high - self.box.low)
        action = np.clip(action, self.env.action_space.low, self.env.action_space.high)
        frame, reward, terminated, truncated, info = self.env.step(action)
        score = float(info.get("success", np.nan))  # NaN where nothing tells
        return np.array(frame), float(reward), terminated, truncated, {"score": score}


def make_env(dataset: minari.MinariDataset, task: Task, episode_length: int, online_env: str | None = None) -> gym.Env:
    """The data's environment or the user's. Raises InputError where the data has no images or nothing can draw them."""
    space, box = dataset.observation_space, dataset.action_space
    image = isinstance(space, gym.spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3
    if not image or space.shape[2] > min(space.shape[:2]):
        raise InputError(f"{dataset.id} has observations {' '.join(str(space).split())}: this script learns from one "
                         "image, a Box [H, W, C] of uint8, and cal_ql_continuous.py from vectors.")  # fmt: skip
    # From the dataset, which may be a stranger's, come only the id of a registered environment, and plain arguments.
    try:
        importlib.import_module("collect.pick_place" if task.domain == "visual" else "gymnasium_robotics")
        gym.logger.min_level = gym.logger.ERROR  # it advises newer versions, which have other observations
        spec = dataset.env_spec
        if online_env is not None:
            gym.register("online-env-v0", entry_point=online_env if ":" in online_env else f"{online_env}:make")
            spec = gym.spec("online-env-v0")
        if spec is None or spec.id not in gym.registry or spec.additional_wrappers:
            raise ValueError(f"{spec and spec.id} is not registered here, or needs wrappers")
        kwargs = dict(spec.kwargs, max_episode_steps=episode_length or spec.max_episode_steps)
        env = gym.make(spec.id, disable_env_checker=True, **kwargs)
        frame = np.asarray(env.reset(seed=0)[0])  # fails here where it cannot draw
        if (frame.shape, frame.dtype, env.action_space.shape) != (space.shape, space.dtype, box.shape):
            raise ValueError(f"its frames {frame.dtype}{list(frame.shape)} or its actions differ from the data's")
        if env.spec.max_episode_steps is None:
            raise ValueError("it has no time limit (--episode-length)")
        return TaskEnv(env, box)
    except Exception as error:  # no such module, a specification that does not fit, OpenGL in its many ways
        raise InputError(f"{online_env or dataset.id}'s environment cannot be made ({error}); if OpenGL is missing: "
                         "`apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri`, and MUJOCO_GL unset or egl."
                         ) from error  # fmt: skip


# --- Evaluation -------------------------------------------------------------------------------------------------------
@torch.no_grad()
def play_episode(env: gym.Env, agent: Agent, seed: int, device: torch.device) -> Episode:
    """One online episode; the policy does not learn meanwhile."""
    states, steps, over = [env.reset(seed=seed)[0]], [], False
    while not over:
        action = agent.act(torch.from_numpy(states[-1]).unsqueeze(0).to(device), explore=True)
        action = action.squeeze(0).cpu().numpy().clip(-0.99999, 0.99999)
        state, reward, terminated, truncated, _ = env.step(action)
        states.append(state)
        steps.append((action, reward, terminated))  # never the time limit: the value of a state does not end there
        over = terminated or truncated
    return Episode(np.array(states), *map(np.array, zip(*steps, strict=True)))


@torch.no_grad()
def evaluate(envs: gym.vector.VectorEnv | None, agent: Agent, buffer: ReplayBuffer, progress, args: Args) -> dict:
    """A row of eval.csv: one episode in each environment with the deterministic policy, and what the buffer tells."""
    scores = returns = np.array([math.nan])
    if envs is not None:
        seeds = np.random.SeedSequence((args.seed, 1, len(progress.rows))).generate_state(envs.num_envs).tolist()
        states, _ = envs.reset(seed=seeds)
        scores, returns, live = np.zeros(len(seeds)), np.zeros(len(seeds)), np.ones(len(seeds), bool)
        while live.any():
            actions = agent.act(torch.from_numpy(states).to(buffer.device), explore=False)
            states, rewards, terminations, truncations, infos = envs.step(actions.cpu().numpy())
            if np.isnan(rewards).any():  # not in TaskEnv: no InputError gets out of a process of --eval-async
                raise InputError("the environment gives a NaN reward; an Adroit task's is its info['success'].")
            scores[live] = np.maximum(scores, infos["score"])[live]
            returns[live] += rewards[live]
            live &= ~(terminations | truncations)  # a finished environment starts again, of which nothing counts
    score = float(returns.mean() if np.isnan(scores).any() else scores.mean())
    online = [row["score"] for row in progress.rows if row["phase"] == "online"] + [scores.mean()]
    regret = 1 - float(np.mean(online)) if progress.env_steps else math.nan  # NaN too where nothing tells success
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        batch = buffer.sample(4 * args.batch_size)
        values = probe(agent, batch, args)
    if envs is None:
        values["action_error"] = (agent.act(batch.observations, explore=False) - batch.actions).abs().mean().item()
    row = {"phase": "online" if progress.env_steps else "offline", "updates": progress.updates}
    row |= {"env_steps": progress.env_steps, "score": score, "return": float(returns.mean()), "regret": regret}
    return row | values


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


# --- Training and command line (common) -------------------------------------------------------------------------------
def check_finite(values: dict, progress: SimpleNamespace, run: Path) -> None:
    """Ends the run at the first loss or weight that is not finite; its last checkpoint stays."""
    for name, value in values.items():
        if not value.isfinite().all():
            sys.exit(f"error: {name} is not finite after {progress.updates} updates; {run} keeps its checkpoint")


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
    make_one_env = functools.partial(make_env, datasets[-1], task, args.episode_length, args.online_env)
    env = make_one_env()
    eval_envs = make_eval_envs(make_one_env, args)
    episodes, sparse, held_out = load_episodes(datasets, task, env), task.domain != "any other", None
    if env.spec is None:  # there is none: every tenth episode is held out to evaluate with
        if args.online_steps > 0 or len(episodes) < 2:
            raise InputError(f"{args.env_id} has no environment: use --online-env, or --online-steps 0 and 2 episodes.")
        held_out = ReplayBuffer(episodes[1::10], dataclasses.replace(args, buffer_size=1), sparse, device)
        eval_envs, episodes = None, [episode for k, episode in enumerate(episodes) if k % 10 != 1]
    buffer = ReplayBuffer(episodes, args, sparse, device)
    torch.manual_seed(args.seed)
    agent = Agent(*env.observation_space.shape, *env.action_space.shape, args).to(device)
    optimizer = agent.prepare(buffer, args)
    steps = {}  # the update for each phase, with the actor and without; on CUDA as graphs, six times faster or more
    for online, with_actor in itertools.product((False, True), (False, True)):
        step = functools.partial(update, agent, optimizer, args, online, with_actor)
        steps[online, with_actor] = CudaGraphModule(step, warmup=3) if device.type == "cuda" else step

    parts = {"agent": agent, "optimizer": optimizer, "buffer": buffer}  # with `progress`, all that resuming needs
    progress = restore(args, **parts)
    name = f"{args.env_id.replace('/', '-')}__{Path(__file__).stem}__{args.seed}__{time.time_ns()}"
    run = Path(args.resume or f"runs/{name}")
    writer = open_logs(run, args, progress.offline_updates + progress.env_steps)
    print(f"run: {run} on {device}\nsettings:", ", ".join(f"{k} {v}" for k, v in vars(args).items()))
    began = time.time() - progress.wall_time
    bar = tqdm(total=args.offline_steps + args.online_steps, initial=progress.offline_updates + progress.env_steps)

    def log(scalars: dict, behind: int = 0) -> None:
        """Logs over offline updates and, from the switch on, environment steps less those still to be learned from."""
        bar.n = progress.offline_updates + progress.env_steps - behind
        bar.refresh()
        for name, value in scalars.items():
            writer.add_scalar(name, value, bar.n)

    def train_step(online: bool, behind: int = 0) -> None:
        progress.updates += 1
        progress.offline_updates += not online
        metrics = steps[online, progress.updates % args.actor_interval == 0](buffer.sample(args.batch_size))
        if progress.updates % (100 * args.utd_ratio) == 0:
            check_finite(metrics, progress, run)
            log(metrics, behind)

    def pause(evaluation_due: bool) -> None:
        """Evaluates if due; saves after that, every ten minutes and at a signal. The run's state is whole here."""
        if not (evaluation_due or SIGNALS or time.time() - began > progress.wall_time + 600):  # the last save's
            return
        check_finite(dict(agent.named_parameters()), progress, run)
        if evaluation_due:
            row = evaluate(eval_envs, agent, held_out or buffer, progress, args) | {"wall_time": time.time() - began}
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
        episode = play_episode(env, agent, seed, device)
        buffer.add(episode)
        length, evaluated = len(episode.rewards), progress.env_steps // args.online_eval_interval
        progress.episodes, progress.env_steps = progress.episodes + 1, progress.env_steps + length
        for left in reversed(range(length * args.utd_ratio if progress.env_steps >= args.warmup_steps else 0)):
            train_step(online=True, behind=left // args.utd_ratio)
        log({"charts/episodic_return": episode.rewards.sum(), "charts/episodic_length": length})
        pause(progress.env_steps // args.online_eval_interval > evaluated or progress.env_steps >= args.online_steps)


# What --resume may change, and limits of settings, where they are not those of a positive number.
CHANGEABLE = {"resume", "device", "threads", "track", "offline_steps", "online_steps", "eval_async",
              "offline_eval_interval", "online_eval_interval"}  # fmt: skip
FROM_ZERO = ["seed", "offline_steps", "online_steps", "warmup_steps", "episode_length"]
PROTOCOL_LIMITS = dict.fromkeys(FROM_ZERO, (0, 2**62)) | {"threads": (0, 1024), "eval_episodes": (1, 10_000)}
PROTOCOL_LIMITS |= dict(mixing_ratio=(-1, 1), gamma=(0, 0.9999), tau=(1e-9, 1), reward_bias=(-1e9, 1e9))


def parse_args(argv: list[str] | None = None) -> Args:
    """Reads the command line on top of the task's settings or, to go on from a run, of the run's. Raises InputError."""
    first, _ = tyro.cli(Args, args=argv, add_help=False, return_unknown_args=True)
    given = {} if first.resume is None else read_checkpoint(first.resume)["args"]
    defaults = Args(**given) if given else task_defaults(first.env_id)
    if first.init_from is not None and first.resume is None:
        defaults = Args(**read_checkpoint(first.init_from, "offline.pt")["args"] | {"resume": None, "online_env": None})
    if given.get("online_env") not in (None, first.online_env):  # or a stranger's checkpoint could run any code
        raise InputError(f"this run was made with --online-env {given['online_env']}: repeat that.")
    table = [f"{name}: {', '.join(f'{k} {v}' for k, v in settings.items())}" for name, settings in SETTINGS.items()]
    args = tyro.cli(Args, default=defaults, args=argv, description="\n\n".join([f"Tasks: {', '.join(TASKS)}.", *table]))
    for name, value in vars(args).items():
        if given and value != getattr(defaults, name) and name not in CHANGEABLE:
            raise InputError(f"a resumed run cannot change {name}: leave that out, or start a new run.")
        low, high = (PROTOCOL_LIMITS | LIMITS).get(name, (1e-9 if isinstance(value, float) else 1, 2**40))
        numbers = value if isinstance(value, tuple) else [value]
        if value == () or any(type(number) in (int, float) and not low <= number <= high for number in numbers):
            raise InputError(f"--{name.replace('_', '-')} is {value}; it must lie between {low} and {high}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device.")
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
