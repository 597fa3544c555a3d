"""SAC from camera images, with offline data: online reinforcement learning without pre-training.

The algorithm of sac_offline_data.py on the frames, replay and encoder of cal_ql_pixels.py: soft actor-critic (Haarnoja
et al. 2018, arXiv:1812.05905) has no regulariser and no offline phase. Its target takes one action at s', entropy
included:

    min_Q  E[ (Q(s,a) - target)^2 ],   target = r + gamma (1 - d) ( min_i Q_i(s',a') - alpha log pi(a'|s') ),  a' ~ pi

How much of a batch is offline data makes the baselines of the paper's visual task:

    python baselines/sac_pixels.py --env-id pick-place-pixels                      # Hybrid RL: the task's mixing ratio
    python baselines/sac_pixels.py --env-id pick-place-pixels --mixing-ratio -1    # SAC + offline data: all alike
    python baselines/sac_pixels.py --env-id pick-place-pixels --mixing-ratio 0     # SAC from scratch
    python baselines/sac_pixels.py --resume runs/<run>                             # continues a run
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
    # --- Online from the start
    random_steps: int = 0  # environment steps at the start whose actions are uniformly random
    # --- Actor-critic
    tau: float = 0.005  # rate at which target critics and target encoder follow the learned ones
    actor_lr: float = 3e-4  # learning rate of the actor and the temperature
    critic_lr: float = 3e-4  # learning rate of encoder and critics
    actor_layers: tuple[int, ...] = (256, 256)  # hidden layers of the actor
    critic_layers: tuple[int, ...] = (256, 256)  # hidden layers of each critic
    num_critics: int = 2  # critics in the ensemble
    num_target_critics: int = 2  # critics drawn for each Bellman target, whose minimum it takes; at most all
    critic_layer_norm: bool = False  # layer norm before each ReLU of the critics
    actor_reduce: Literal["min", "mean"] = "min"  # how the actor's objective combines the critics
    target_entropy_scale: float = -1.0  # times the number of action dimensions: the entropy that alpha steers to
    backup_entropy: bool = True  # subtract alpha log pi(a'|s') from Q in the Bellman target


# --- Networks and returns (common) ------------------------------------------------------------------------------------
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
                nn.init.orthogonal_(weight, 0.01 if o == 1 else 2**0.5)

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Q-values [N, B, K] of K actions for each state: observations [B, O], actions [B, K, A]."""
        x = torch.cat([observations.unsqueeze(1).expand(-1, actions.shape[1], -1), actions], dim=2).flatten(0, 1)
        x = x @ self.weights[0] + self.biases[0]  # [B*K, O+A] @ [N, O+A, H] + [N, 1, H] -> [N, B*K, H]
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            if self.layer_norm:
                x = F.layer_norm(x, x.shape[-1:])
            x = torch.baddbmm(bias, F.relu(x), weight)
        return x.squeeze(2).unflatten(1, actions.shape[:2])


class Actor(nn.Module):
    """A tanh-Gaussian policy; two learnable scalars rescale its log standard deviation (the authors' code)."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        sizes = pairwise([obs_dim, *args.actor_layers, 2 * action_dim])
        layers = [layer for i, o in sizes for layer in (nn.Linear(i, o), nn.ReLU())]
        self.net = nn.Sequential(*layers[:-1])  # no ReLU after the last
        for layer in self.net[::2]:
            nn.init.orthogonal_(layer.weight, 0.01 if layer is self.net[-1] else 2**0.5)
            nn.init.zeros_(layer.bias)
        self.log_std_multiplier = nn.Parameter(torch.tensor(1.0))
        self.log_std_offset = nn.Parameter(torch.tensor(-1.0))

    def forward(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log standard deviation [B, A] of the Gaussian under the tanh, for observations [B, O]."""
        mean, log_std = self.net(observations).chunk(2, dim=1)
        return mean, (self.log_std_multiplier * log_std + self.log_std_offset).clamp(-20.0, 2.0)

    def sample(self, observations: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """k actions for each state [B, k, A] and their log-densities [B, k], for observations [B, O]."""
        mean, log_std = (output.unsqueeze(1) for output in self(observations))  # [B, 1, A] each
        noise = torch.randn(len(mean), k, mean.shape[2], device=mean.device, dtype=mean.dtype)
        pre_tanh = mean + log_std.exp() * noise
        log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_det = 2 * (math.log(2) - pre_tanh - F.softplus(-2 * pre_tanh))  # log(1 - tanh^2), without cancellation
        return torch.tanh(pre_tanh), (log_normal - log_det).sum(2)


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
    """All that learns: encoder, actor, critics, slow copies for targets, temperature. It counts its steps online."""

    def __init__(self, height: int, width: int, channels: int, action_dim: int, args: Args):
        super().__init__()
        self.encoder = Encoder(height, width, channels, args)
        self.actor = Actor(args.latent_dim, action_dim, args)
        self.critic = Critic(args.latent_dim, action_dim, args)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(0.0))
        self.random_steps = args.random_steps
        self.register_buffer("acted_steps", torch.tensor(0))  # in the checkpoint: a resumed run goes on counting

    def act(self, observations: torch.Tensor, explore: bool) -> torch.Tensor:
        """Actions [B, A]: online uniform ones at first, then drawn from the policy; deterministic in evaluations."""
        features = self.encoder(observations)
        if not explore:
            return torch.tanh(self.actor(features)[0])
        actions = self.actor.sample(features, 1)[0].squeeze(1)
        self.acted_steps += len(observations)
        return actions if self.acted_steps > self.random_steps else 2 * torch.rand_like(actions) - 1


def make_agent(offline: list[Batch], args: Args) -> tuple[Agent, torch.optim.Optimizer]:
    """The agent for these data, and its optimizer with a learning rate for each of the actor's and critics' sides."""
    agent = Agent(*offline[0].observations.shape[1:], offline[0].actions.shape[1], args).to(args.device)
    actor_side = {"params": [*agent.actor.parameters(), agent.log_alpha], "lr": args.actor_lr}
    critic_side = {"params": [*agent.encoder.parameters(), *agent.critic.parameters()], "lr": args.critic_lr}
    return agent, torch.optim.Adam([actor_side, critic_side], fused=True, capturable=args.device == "cuda")


def update(agent: Agent, optimizer, args: Args, online: bool, with_actor: bool, batch: Batch) -> dict:
    """All gradients at the old parameters, one Adam step, the targets; returns scalars to log, on the device."""
    actor, critic, device = agent.actor, agent.critic, batch.actions.device
    action_dim = batch.actions.shape[1]
    alpha = agent.log_alpha.exp().detach()

    # Each state is encoded once by an encoder that learns from the critics' loss alone.
    features = agent.encoder(random_shift(batch.observations, args.random_shift))  # [B, O]
    with torch.no_grad():
        next_frames = random_shift(batch.next_observations, args.random_shift)
        next_features, target_features = agent.encoder(next_frames), agent.target_encoder(next_frames)
    batch = batch._replace(observations=features, next_observations=next_features)

    # Bellman target [B]: minimum over critics at one action of pi(s'), and the entropy of pi(s').
    with torch.no_grad():
        next_action, next_log_prob = actor.sample(batch.next_observations, 1)
        drawn = torch.rand(args.num_critics, device=device).argsort()[: args.num_target_critics]  # a random subset
        target_q = agent.target_critic(target_features, next_action)[drawn].amin(0)  # [B, 1]
        if args.backup_entropy:
            target_q = target_q - alpha * next_log_prob
        target = batch.rewards + args.gamma * (1 - batch.terminations) * target_q.squeeze(1)

    # Critics: the Bellman error alone, the same online as offline.
    q_data = critic(batch.observations, batch.actions.unsqueeze(1))  # [N, B, 1]
    td_loss = (q_data.squeeze(2) - target).square().mean(1)  # [N]; there is no 1/2
    metrics = {"losses/qf_loss": td_loss.mean(), "losses/alpha": alpha, "calibration/mean_q": q_data.mean()}
    optimizer.zero_grad()
    td_loss.sum().backward()

    # Actor and temperature.
    if with_actor:
        pi_action, log_prob = actor.sample(batch.observations, 1)
        q = critic(batch.observations, pi_action)  # [N, B, 1]
        q = q.amin(0) if args.actor_reduce == "min" else q.mean(0)
        actor_loss = (alpha * log_prob - q).mean()
        alpha_loss = -(agent.log_alpha * (log_prob.detach() + args.target_entropy_scale * action_dim)).mean()
        (actor_loss + alpha_loss).backward(inputs=[*actor.parameters(), agent.log_alpha])  # not into critics, encoder
        metrics |= {"losses/actor_loss": actor_loss, "losses/alpha_loss": alpha_loss}

    optimizer.step()  # Adam skips parameters without a gradient
    with torch.no_grad():
        for slow, learned in ((agent.target_encoder, agent.encoder), (agent.target_critic, critic)):
            for target_param, param in zip(slow.parameters(), learned.parameters(), strict=True):
                target_param.lerp_(param, args.tau)
    return {name: value.detach() for name, value in metrics.items()}


@torch.no_grad()
def probe(agent: Agent, batch: Batch, args: Args) -> dict[str, float]:
    """Mean Q and mean return of the data, and the share of policy actions with Q below the return (figures 3, 8)."""
    features = agent.encoder(batch.observations)  # of the frames as they are, not shifted
    q_data = agent.critic(features, batch.actions.unsqueeze(1))
    q_pi = agent.critic(features, agent.actor.sample(features, 1)[0])  # [N, B, 1]
    bound_rate = (q_pi < batch.mc_returns.unsqueeze(1)).float().mean().item()
    return {"mean_q": q_data.mean().item(), "mean_mc_return": batch.mc_returns.mean().item(), "bound_rate": bound_rate}


# --- Tasks and their settings -----------------------------------------------------------------------------------------
class InputError(Exception):
    """Something the user can put right; its message is one sentence that says how."""


Task = namedtuple("Task", "domain datasets")  # key of its SETTINGS, and datasets whose episodes are joined
TASKS: dict[str, Task] = {"pick-place-pixels": Task("visual", ("cal-ql/pick-place/pixels-v0",))}
# Steps and updates per step are the paper's (appendix G.4); gamma and rewards are those of a co-author's later code,
# intervals ours.
SETTINGS: dict[str, dict] = {
    "visual": dict(online_env="collect.pick_place:cal-ql/PickPlaceCamera-v0", gamma=0.96, reward_scale=11.0,
        reward_bias=-1.0, utd_ratio=5, offline_steps=0, online_steps=100_000, online_eval_interval=2_000),
    "any other": dict(offline_steps=0),
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
