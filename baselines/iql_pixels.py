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

import copy
import json
import math
import signal
import sys
import time
import zipfile
from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
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
@dataclass
class Args:
    # --- Run and protocol
    env_id: str = "pick-place-pixels"  # a task of the table TASKS, or the id of a Minari dataset of images
    datasets: tuple[str, ...] = ()  # Minari ids of the offline data; none given, they are the task's own
    online_env: str | None = None  # module:EnvId-v0, an environment to play in instead of the one that the data name
    seed: int = 1  # of networks, batches and episodes
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to train
    cuda_graphs: bool = True  # replay the update as a CUDA graph, which is faster but allows no `print` or `.item()`
    resume: str | None = None  # folder of a run to continue, with its settings and the flags given beside this one
    track: bool = False  # log to Weights & Biases too; WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE are obeyed
    offline_steps: int = 500_000  # gradient updates of the offline phase
    online_steps: int = 500_000  # environment steps of the online phase, completed to whole episodes
    warmup_steps: int = 0  # environment steps before the first online update, completed to whole episodes
    offline_eval_interval: int = 50_000  # updates between two evaluations offline
    online_eval_interval: int = 5_000  # environment steps between two evaluations online
    eval_episodes: int = 20  # episodes of an evaluation, with the deterministic policy; 0 plays none
    episode_length: int = 0  # time limit of an episode in steps; 0 keeps the environment's own
    reward_scale: float = 1.0  # rewards become reward_scale * r + reward_bias
    reward_bias: float = 0.0  # see reward_scale
    buffer_size: int = 110_000  # online frames kept, T + 1 of an episode of T steps; the oldest are overwritten
    mixing_ratio: float = 0.5  # share of offline transitions in an online batch; -1 samples all transitions alike
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


# --- Networks and returns ---------------------------------------------------------------------------------------------
class Critic(nn.Module):
    """An ensemble of N critics on concat(s, a); each layer is one batched matrix product over the N."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.layer_norm = args.critic_layer_norm
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for i, o in pairwise([obs_dim + action_dim, *args.critic_layers, 1]):
            self.weights.append(torch.empty(args.num_critics, i, o))
            self.biases.append(torch.zeros(args.num_critics, 1, o))
            for weight in self.weights[-1].data:
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


class MLP(nn.Module):
    """Linear layers with ReLU in between, of which `dropout` drops a share of the units in training."""

    def __init__(self, *sizes: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight, 2**0.5)  # the output too
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = F.dropout(F.relu(layer(x)), dropout, training=dropout > 0)
        return self.layers[-1](x)


class Actor(nn.Module):
    """A Gaussian policy that is not squashed: its mean is a tanh, its deviation the same in all states."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.net, self.std = MLP(obs_dim, *args.actor_layers, action_dim), args.actor_std
        self.log_std = nn.Parameter(torch.zeros(action_dim), requires_grad=self.std is None)

    def forward(self, observations: torch.Tensor, dropout: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean [B, A] and deviation [A] for observations [B, O]; `dropout` is for training alone."""
        log_std = self.log_std if self.std is None else torch.full_like(self.log_std, math.log(self.std))
        return torch.tanh(self.net(observations, dropout)), log_std.clamp(-5.0, 2.0).exp()


# T steps: states [T+1, O], actions [T, A] with their box scaled to [-1, 1], the task's rewards [T], terminations [T].
Episode = namedtuple("Episode", "observations actions rewards terminations")
# Transitions: observations [B, O], actions [B, A] in (-1, 1), rewards [B] scaled and biased, next_observations [B, O],
# terminations [B] (1.0 where the environment ended the episode, 0.0 at a time limit), mc_returns [B] from here on.
Batch = namedtuple("Batch", "observations actions rewards next_observations terminations mc_returns")


def to_transitions(episode: Episode, args: Args) -> Batch:
    """An episode's transitions, arrays of T rows, with their returns G_t = r_t + gamma (1 - d_t) G_{t+1}."""
    states, actions, rewards, terminations = episode
    rewards = rewards * args.reward_scale + args.reward_bias
    # A time limit is no end: the last reward is taken to repeat for ever, as the authors do for failures. Outside the
    # paper's tasks only a cost repeats: with a gain that may not come, V^mu(s) would be too high a floor for Q.
    mc_return = float(rewards[-1] if args.env_id in TASKS else min(rewards[-1], 0.0)) / (1 - args.gamma)
    mc_returns = np.zeros(len(rewards), np.float32)
    for t in reversed(range(len(rewards))):
        mc_return = float(rewards[t]) + (0.0 if terminations[t] else args.gamma * mc_return)
        mc_returns[t] = mc_return
    return Batch(states[:-1], actions.clip(-0.99999, 0.99999), rewards, states[1:], terminations, mc_returns)


# --- Encoder ----------------------------------------------------------------------------------------------------------
# In a Batch or an Episode an observation is a frame [H, W, C] of uint8; what actor and critics see are its O features.
class Encoder(nn.Module):
    """Features of a frame: four convolutions, each of which halves height and width, linear layer, layer norm, tanh."""

    def __init__(self, height: int, width: int, channels: int, args: Args):
        super().__init__()
        layers = []
        for i, o in pairwise([channels, 16, 32, 32, 32]):
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
        self.value = MLP(args.latent_dim, *args.critic_layers, 1)  # V(s)
        self.critic = Critic(args.latent_dim, action_dim, args)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)

    def act(self, observations: torch.Tensor, explore: bool) -> torch.Tensor:
        """Actions [B, A]: drawn from the policy in online episodes, its mean in evaluations."""
        mean, std = self.actor(self.encoder(observations))
        return (mean + std * torch.randn_like(mean)).clamp(-1.0, 1.0) if explore else mean


def make_agent(offline: list[Batch], args: Args) -> tuple[Agent, torch.optim.Optimizer]:
    """The agent for these data, and its optimizer with a learning rate for each of the actor's and critics' sides."""
    agent = Agent(*offline[0].observations.shape[1:], offline[0].actions.shape[1], args).to(args.device)
    std_fits = args.actor_std is None or 0.01 <= args.actor_std <= 7.0  # within the policy's clamp
    if not (0 < args.expectile < 1 and 0 <= args.actor_dropout < 1 and std_fits):
        raise InputError("--expectile lies in (0, 1), --actor-dropout in [0, 1), --actor-std in [0.01, 7].")
    actor_side = {"params": [*agent.actor.parameters()], "lr": args.actor_lr}
    critics = [*agent.encoder.parameters(), *agent.value.parameters(), *agent.critic.parameters()]
    critic_side = {"params": critics, "lr": args.critic_lr}
    return agent, torch.optim.Adam([actor_side, critic_side], fused=True, capturable=args.device == "cuda")


def descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One step of what this loss depends on: zero_grad drops every gradient, and the optimizer skips what has none."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def update(agent: Agent, optimizer, args: Args, online: bool, with_actor: bool, batch: Batch) -> dict:
    """V; the actor and the critics, both with the new V; the targets. Returns scalars to log, on the device."""
    actions = batch.actions.unsqueeze(1)

    # The critics' loss alone trains the encoder: V and actor get its features detached, target critics its slow copy's.
    frames = random_shift(batch.observations, args.random_shift)
    features = agent.encoder(frames)  # [B, O]
    states = features.detach()
    with torch.no_grad():
        next_states = agent.encoder(random_shift(batch.next_observations, args.random_shift))
        q_target = agent.target_critic(agent.target_encoder(frames), actions).amin(0).squeeze(1)  # [B]

    # V regresses on an expectile of Q.
    u = q_target - agent.value(states).squeeze(1)
    value_loss = (torch.where(u > 0, args.expectile, 1 - args.expectile) * u.square()).mean()
    descend(optimizer, value_loss)
    metrics = {"losses/value_loss": value_loss}

    # The actor regresses on the data's actions, weighted by their advantage: target critics less the new V.
    if with_actor:
        with torch.no_grad():
            weight = (args.beta * (q_target - agent.value(states).squeeze(1))).exp().clamp(max=100.0)
        mean, std = agent.actor(states, args.actor_dropout)
        log_prob = torch.distributions.Normal(mean, std, validate_args=False).log_prob(batch.actions).sum(1)
        actor_loss = -(weight * log_prob).mean()
        descend(optimizer, actor_loss)
        metrics |= {"losses/actor_loss": actor_loss, "losses/actor_weight": weight.mean()}

    # The critics regress on the reward and the new V of the next state.
    with torch.no_grad():
        target = batch.rewards + args.gamma * (1 - batch.terminations) * agent.value(next_states).squeeze(1)
    q_data = agent.critic(features, actions).squeeze(2)  # [N, B]
    td_loss = (q_data - target).square().mean(1)  # [N]; there is no 1/2
    descend(optimizer, td_loss.sum())
    with torch.no_grad():
        for slow, learned in ((agent.target_encoder, agent.encoder), (agent.target_critic, agent.critic)):
            for target_param, param in zip(slow.parameters(), learned.parameters(), strict=True):
                target_param.lerp_(param, args.tau)
    metrics |= {"losses/qf_loss": td_loss.mean(), "calibration/mean_q": q_data.mean()}
    return {name: value.detach() for name, value in metrics.items()}


@torch.no_grad()
def probe(agent: Agent, batch: Batch, args: Args) -> dict[str, float]:
    """Mean Q and mean return of the data; the bound rate is not measured here, and is NaN."""
    features = agent.encoder(batch.observations)  # of the frames as they are, not shifted
    q_data = agent.critic(features, batch.actions.unsqueeze(1))
    return {"mean_q": q_data.mean().item(), "mean_mc_return": batch.mc_returns.mean().item(), "bound_rate": math.nan}


# --- Tasks and their settings -----------------------------------------------------------------------------------------
class InputError(Exception):
    """Something the user can put right; its message is one sentence that says how."""


Task = namedtuple("Task", "domain datasets")  # key of its SETTINGS, and datasets whose episodes are joined
TASKS: dict[str, Task] = {"pick-place-pixels": Task("visual", ("cal-ql/pick-place/pixels-v0",))}
# The paper's: expectile, beta, mixing ratio (table 4), steps, updates per step (G.4). Gamma: a co-author's later code.
# Ours: rewards of {-1, 0}, as IQL has in AntMaze and Adroit; a learned deviation (no actor_std below); the intervals.
SETTINGS: dict[str, dict] = {
    "visual": dict(online_env="collect.pick_place:cal-ql/PickPlaceCamera-v0", expectile=0.7, beta=10.0,
        reward_bias=-1.0, gamma=0.96, utd_ratio=5, offline_steps=50_000, online_steps=100_000,
        offline_eval_interval=5_000, online_eval_interval=2_000),
}  # fmt: skip


# --- Data -------------------------------------------------------------------------------------------------------------
def check_frames(frames, shape: tuple[int, ...], source: str) -> np.ndarray:
    """A copy of frames [*shape] of uint8: an environment may draw into one array. Raises InputError for others."""
    frames = np.array(frames)
    if frames.shape != shape or frames.dtype != np.uint8:
        raise InputError(f"{source}: frames {frames.dtype}{list(frames.shape)}, not uint8{list(shape)}.")
    return frames


def to_episode(data: minari.EpisodeData, dataset: minari.MinariDataset, task: Task) -> Episode:
    """An episode of the data, its observations frames [T+1, H, W, C] of uint8. Raises InputError."""
    space, box, steps = dataset.observation_space, dataset.action_space, len(data.rewards)
    image = isinstance(space, gym.spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3
    if not image or space.shape[2] > min(space.shape[:2]):
        found = f"{type(space).__name__} {space.shape} {space.dtype}"
        raise InputError(f"observations are {found}, not one image [H, W, C] of uint8; vectors: cal_ql_continuous.py")
    if not isinstance(box, gym.spaces.Box) or box.low.ndim != 1 or not box.is_bounded() or (box.low >= box.high).any():
        raise InputError(f"actions of {box} are not supported: they must be one vector within finite bounds")
    frames = check_frames(data.observations, (steps + 1, *space.shape), f"episode {data.id}")
    low, high = box.low.astype(np.float64), box.high.astype(np.float64)  # they say what -1 and 1 mean
    actions = 2 * (np.asarray(data.actions, np.float64) - low) / (high - low) - 1
    rewards, terminations = np.asarray(data.rewards, np.float32), data.terminations
    shapes = [np.shape(column) for column in (data.actions, rewards, terminations)]
    finite = all(np.isfinite(column).all() for column in (actions, rewards, terminations))
    if shapes != [(steps, *box.shape), (steps,), (steps,)] or not finite or (np.abs(actions) > 1.0001).mean() > 0.2:
        raise InputError(f"episode {data.id}: columns of other shapes, values not finite, or actions out of their box")
    return Episode(frames, actions.astype(np.float32), rewards, terminations)


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
    """The offline frames, then a ring of online ones, each once and as bytes, in tensors on the training device.

    An episode of T transitions takes T + 1 slots; the last holds a frame alone. The next frame is in the slot after.
    """

    def __init__(self, offline: list[Batch], args: Args):
        self.size, self.mixing_ratio, self.device = args.buffer_size, args.mixing_ratio, args.device
        self.ring = sum(len(episode.rewards) + 1 for episode in offline)  # the slot where the ring begins
        self.cursor = self.filled = 0  # where in the ring the next frame goes, and how many slots it fills
        slots, first = self.ring + self.size, offline[0]
        frames = torch.empty(slots, *first.observations.shape[1:], dtype=torch.uint8, device=self.device)
        actions = torch.empty(slots, first.actions.shape[1], device=self.device)
        # With these: rewards, terminations, returns, and whether the slot holds a transition.
        self.columns = [frames, actions, *torch.zeros(4, slots, device=self.device)]
        end = 0
        for episode in offline:
            end += len(episode.rewards) + 1
            self.write(episode, torch.arange(end - len(episode.rewards) - 1, end, device=self.device))
        self.offline, self.online = self.find_transitions(0, self.ring), self.find_transitions(self.ring, self.ring)

    def find_transitions(self, start: int, end: int) -> torch.Tensor:
        """The slots in [start, end) that may be sampled."""
        return start + self.columns[-1][start:end].nonzero().squeeze(1)

    def write(self, episode: Batch, index: torch.Tensor) -> None:
        """Writes the last len(index) frames of an episode, with what belongs to them, at `index`."""
        frames = np.concatenate([episode.observations, episode.next_observations[-1:]])
        others = episode.actions, episode.rewards, episode.terminations, episode.mc_returns, np.ones(len(frames) - 1)
        columns = [frames, *(np.concatenate([values, np.zeros_like(values[:1])]) for values in others)]
        for column, values in zip(self.columns, columns, strict=True):
            column[index] = torch.as_tensor(values[-len(index) :]).to(column)

    def add(self, episode: Batch) -> None:
        """Appends an online episode; the oldest online frames make room for it."""
        count = min(len(episode.rewards) + 1, self.size)
        self.write(episode, self.ring + (self.cursor + torch.arange(count, device=self.device)) % self.size)
        self.cursor, self.filled = (self.cursor + count) % self.size, min(self.filled + count, self.size)
        self.online = self.find_transitions(self.ring, self.ring + self.filled)

    def sample(self, batch_size: int) -> Batch:
        """int(share * B) offline transitions and the rest online (appendix H.2), with replacement."""
        if self.mixing_ratio < 0 or len(self.online) == 0:
            both = torch.cat([self.offline, self.online])
            slots = both[torch.randint(len(both), (batch_size,), device=self.device)]
        else:
            count = int(self.mixing_ratio * batch_size)
            offline = torch.randint(len(self.offline), (count,), device=self.device)
            online = torch.randint(len(self.online), (batch_size - count,), device=self.device)
            slots = torch.cat([self.offline[offline], self.online[online]])
        following = torch.where(slots + 1 == self.ring + self.size, self.ring, slots + 1)  # the ring closes
        frames, *others, _ = self.columns
        actions, *rest = (column[slots] for column in others)
        return Batch(frames[slots], actions, rest[0], frames[following], *rest[1:])

    def state_dict(self) -> dict:
        """The online slots; the offline ones are read from the dataset again."""
        online = [column[self.ring :][: self.filled].clone() for column in self.columns]
        return {"online": online, "cursor": self.cursor, "sizes": [self.ring, self.size]}

    def load_state_dict(self, state: dict) -> None:
        if state["sizes"] != [self.ring, self.size]:
            raise ValueError("the dataset or --buffer-size has changed since this run began")
        self.cursor, self.filled = state["cursor"], len(state["online"][0])
        for column, values in zip(self.columns, state["online"], strict=True):
            column[self.ring :][: self.filled] = values
        self.online = self.find_transitions(self.ring, self.ring + self.filled)


# --- Environment and evaluation ---------------------------------------------------------------------------------------
class TaskEnv(gym.Wrapper):
    """The task: a frame each step, actions in [-1, 1] for the data's box, the score in each info."""

    def __init__(self, env: gym.Env, dataset: minari.MinariDataset):
        super().__init__(env)
        self.box, self.source = dataset.action_space, f"{env.spec.id}'s reset or step"
        self.frame = partial(check_frames, shape=dataset.observation_space.shape, source=self.source)

    def reset(self, **kwargs):
        return self.frame(self.env.reset(**kwargs)[0]), {}

    def step(self, action: np.ndarray):
        low, high, own = self.box.low.astype(np.float64), self.box.high.astype(np.float64), self.env.action_space
        action = np.clip(low + (action.astype(np.float64) + 1) / 2 * (high - low), own.low, own.high)
        action = (action.round() if own.dtype.kind in "iu" else action).astype(own.dtype)
        observation, *results, info = self.env.step(action)
        reward, terminated, truncated = (np.asarray(result).item() for result in results)
        score = np.asarray(info.get("success", info.get("is_success", np.nan)), float).item()  # NaN: nothing tells
        if not math.isfinite(reward):
            raise InputError(f"{self.source} gives the reward {reward}.")
        return self.frame(observation), float(reward), terminated, truncated, {"score": score}


def make_env(dataset: minari.MinariDataset, task: Task, args: Args) -> gym.Env:
    """The environment of --online-env or the one that the data name, set to the task. Raises InputError."""
    own, env_id, kwargs = dataset.env_spec, args.online_env, {"max_episode_steps": args.episode_length or None}
    try:
        if env_id is None:  # a stranger's data give a registered id and plain arguments, never code
            if own is None or own.id not in gym.registry or own.additional_wrappers:
                raise ValueError("the data name none to be had: --online-env, or --online-steps 0 --eval-episodes 0")
            env_id, limit = gym.registry[own.id], args.episode_length or own.max_episode_steps
            kwargs = {k: v for k, v in own.kwargs.items() if k != "render_mode"} | {"max_episode_steps": limit}
        env = gym.make(env_id, disable_env_checker=True, **kwargs)
        if env.spec.max_episode_steps is None or env.action_space.shape != dataset.action_space.shape:
            raise ValueError("it has no time limit (--episode-length), or other actions than the data")
        env = TaskEnv(env, dataset)
        env.reset(seed=args.seed)
        env.step(np.zeros(env.action_space.shape))  # what does not fit fails here, not after the offline phase
        return env
    except Exception as error:  # no such module, arguments that it does not take, OpenGL in its many ways
        hint = "if OpenGL is missing, install libegl1 libegl-mesa0 libgl1-mesa-dri, and leave MUJOCO_GL unset"
        raise InputError(f"cannot make the environment {args.online_env or dataset.id}: {error!r}; {hint}.") from error


@torch.no_grad()
def play_episode(env: gym.Env, agent: Agent, seed: int, explore: bool, device: str) -> tuple[Episode, float]:
    """One episode and its score, NaN where nothing tells success; the policy does not learn meanwhile."""
    states, steps, scores, done = [env.reset(seed=seed)[0]], [], [], False
    while not done:
        action = agent.act(torch.from_numpy(states[-1]).unsqueeze(0).to(device), explore).squeeze(0).cpu().numpy()
        state, reward, terminated, truncated, info = env.step(action)
        states.append(state)
        steps.append((action, reward, terminated))  # never the time limit: the value of a state does not end there
        scores.append(info["score"])
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


# --- Training, checkpoints and command line (common) ------------------------------------------------------------------
def log(writer: SummaryWriter, scalars: dict, step: int) -> None:
    for name, value in scalars.items():
        writer.add_scalar(name, value, step)


def train(args: Args, checkpoint: dict | None = None) -> None:
    """Both phases, or what is left of them after a checkpoint. Raises InputError."""
    torch.set_flush_denormal(True)  # denormal gradients and moments slow a processor down; threads inherit this
    torch.set_float32_matmul_precision("medium")  # TF32 on CUDA; on a CPU oneDNN's products, of bfloat16 if it has AMX
    task, dataset, offline = load_data(args)
    env = make_env(dataset, task, args) if args.online_steps > 0 or args.eval_episodes > 0 else None

    # Replay and agent, and its update in each phase, with the actor and without; as CUDA graphs six times faster.
    buffer = ReplayBuffer(offline, args)
    torch.manual_seed(args.seed)
    agent, optimizer = make_agent(offline, args)
    del offline  # the replay has a copy
    modes = product(("offline", "online"), (False, True))
    update_fns = {(phase, a): partial(update, agent, optimizer, args, phase == "online", a) for phase, a in modes}
    if args.device == "cuda" and args.cuda_graphs:
        from tensordict.nn import CudaGraphModule

        update_fns = {mode: CudaGraphModule(update_fn, warmup=3) for mode, update_fn in update_fns.items()}

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
                       f"Q {row['mean_q']:.1f}  Monte-Carlo return {row['mean_mc_return']:.1f}")  # fmt: skip
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
        metrics = update_fns["offline", progress.updates % args.actor_interval == 0](buffer.sample(args.batch_size))
        if progress.updates % 100 == 0:
            log(writer, metrics | {"charts/SPS": progress.step / (time.time() - began)}, progress.step)
        evaluate_and_save(progress.updates % args.offline_eval_interval == 0 or progress.updates == args.offline_steps)

    # Phase 2: online fine-tuning, one whole episode and then the updates for its steps; nothing is reinitialised.
    bar = tqdm(total=args.online_steps, initial=progress.env_steps, desc="online", disable=None)
    while progress.env_steps < args.online_steps:
        seed = np.random.SeedSequence((args.seed, 0, progress.env_steps)).generate_state(1).tolist()[0]
        episode, _ = play_episode(env, agent, seed, explore=True, device=args.device)
        buffer.add(to_transitions(episode, args))  # with its returns: none is sampled before it is known
        length = len(episode.rewards)
        progress.env_steps += length
        progress.step += length
        metrics = {"charts/episodic_return": episode.rewards.sum(), "charts/episodic_length": length}
        for _ in range(args.utd_ratio * length if progress.env_steps >= args.warmup_steps else 0):
            progress.updates += 1
            metrics |= update_fns["online", progress.updates % args.actor_interval == 0](buffer.sample(args.batch_size))
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
            env_id = Args(**checkpoint["args"]).env_id  # fails on a script with other settings
        except Exception as error:  # whatever another program has put there
            raise InputError(f"cannot go on from {path}: {error!r:.300}.") from error
    domain = getattr(TASKS.get(env_id), "domain", "any other")
    settings = {"env_id": env_id, **SETTINGS.get(domain, {}), **SETTINGS.get(env_id, {})}
    defaults = Args(**(settings if checkpoint is None else checkpoint["args"]))
    summary = f"{__doc__.splitlines()[0]} Tasks: {', '.join(TASKS)}. `--env-id TASK --help` shows that task's settings."
    args = tyro.cli(Args, default=defaults, args=argv, description=summary)
    if checkpoint is not None:
        fixed = ["gamma", "reward_scale", "reward_bias", "online_env", "episode_length", "offline_steps"]
        fixed = ["env_id", "datasets", *(fixed if checkpoint["progress"]["env_steps"] > 0 else [])]
        if changed := [name for name in fixed if getattr(args, name) != getattr(defaults, name)]:
            raise InputError(f"{args.resume} cannot go on with another {' or '.join(changed)}: start a new run.")
        if args.online_env not in (None, first.online_env, settings.get("online_env")):  # it names code
            raise InputError(f"{args.resume} was made with --online-env {args.online_env}: repeat that to go on.")
    may_be_0 = ("seed", "eval_episodes", "episode_length", "utd_ratio", "random_shift")
    small = [k for k, v in vars(args).items() if type(v) is int and v < (k not in may_be_0 and not k.endswith("steps"))]
    if small or args.gamma >= 1 or args.mixing_ratio > 1 or (args.device == "cuda" and not torch.cuda.is_available()):
        raise InputError(f"--gamma must be below 1, --mixing-ratio at most 1, CUDA there for cuda; too small: {small}.")
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
