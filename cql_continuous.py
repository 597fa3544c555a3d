"""CQL: conservative Q-learning (Kumar et al. 2020, arXiv:2006.04779), pre-trained offline and fine-tuned online.

The baseline of Cal-QL, and the same file less one statement. CQL adds to the Bellman error a regulariser that pushes Q
down on the policy's actions and up on the data's, and nothing stops the push:

    min_Q  w * ( E_{s~D, a~pi}[ Q(s,a) ] - E_{s,a~D}[ Q(s,a) ] )  +  E_D[ (Q(s,a) - target)^2 ]

So Q can end below the return of even a poor policy; online, any action that is tried then looks better than the learned
ones. The bound rate, the share of the policy's actions whose Q is below the transition's Monte-Carlo return, is logged
here too, for comparison. With --online-cql-factor 0 this is CQL+SAC: no regulariser online.
Sections marked (common) are the same in every script of this family, each of which is complete in itself.

    python cql_continuous.py --env-id antmaze-large-diverse    # the paper's experiment; --resume runs/<run> goes on
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
    # --- Run and protocol (common)
    env_id: str = "antmaze-large-diverse"  # a task of the table TASKS, or the id of any Minari dataset
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
    buffer_size: int = 1_000_000  # online transitions kept; the oldest are overwritten
    mixing_ratio: float = 0.5  # share of offline transitions in an online batch; -1 samples all transitions alike
    batch_size: int = 256  # transitions in a batch
    gamma: float = 0.99  # discount
    utd_ratio: int = 1  # updates per environment step
    actor_interval: int = 1  # updates of the critics per update of the actor
    # --- Actor-critic
    tau: float = 0.005  # rate at which the target critics follow the critics
    actor_lr: float = 1e-4  # learning rate of the actor and the temperature
    critic_lr: float = 3e-4  # learning rate of the critics and the Lagrange multiplier
    actor_layers: tuple[int, ...] = (256, 256)  # hidden layers of the actor
    critic_layers: tuple[int, ...] = (256, 256)  # hidden layers of each critic
    num_critics: int = 2  # critics in the ensemble
    num_target_critics: int = 2  # critics drawn for each Bellman target, whose minimum it takes; at most all
    critic_layer_norm: bool = False  # layer norm before each ReLU of the critics
    actor_reduce: Literal["min", "mean"] = "min"  # how the actor's objective combines the critics
    # --- Conservatism
    num_actions: int = 10  # actions sampled per state: for the target and for each of the regulariser's three kinds
    cql_weight: float = 5.0  # weight w of the regulariser; the paper calls it alpha, which here is SAC's temperature
    online_cql_factor: float = 1.0  # the weight is multiplied by this online; 0 leaves the regulariser out
    cql_lagrange: bool = False  # multiply the weight by a learned factor that holds the gap at target_action_gap
    target_action_gap: float = 0.8  # gap between sampled and data actions' Q that cql_lagrange holds
    importance_sampling: bool = True  # subtract the sampled actions' log-densities in the log-sum-exp


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


# --- Agent and update -------------------------------------------------------------------------------------------------
class Agent(nn.Module):
    """All that learns: actor, critics, their slow copy for targets, temperature, Lagrange multiplier."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.actor = Actor(obs_dim, action_dim, args)
        self.critic = Critic(obs_dim, action_dim, args)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(0.0))
        self.log_cql_alpha = nn.Parameter(torch.tensor(1.0))

    def act(self, observations: torch.Tensor, explore: bool) -> torch.Tensor:
        """Actions [B, A]: drawn from the policy in online episodes, deterministic in evaluations."""
        return self.actor.sample(observations, 1)[0].squeeze(1) if explore else torch.tanh(self.actor(observations)[0])


def make_agent(offline: list[Batch], args: Args) -> tuple[Agent, torch.optim.Optimizer]:
    """The agent for these data, and its optimizer with a learning rate for each of the actor's and critics' sides."""
    agent = Agent(offline[0].observations.shape[1], offline[0].actions.shape[1], args).to(args.device)
    actor_side = {"params": [*agent.actor.parameters(), agent.log_alpha], "lr": args.actor_lr}
    critic_side = {"params": [*agent.critic.parameters(), agent.log_cql_alpha], "lr": args.critic_lr}
    return agent, torch.optim.Adam([actor_side, critic_side], fused=True, capturable=args.device == "cuda")


def update(agent: Agent, optimizer, args: Args, online: bool, with_actor: bool, batch: Batch) -> dict:
    """All gradients at the old parameters, one Adam step, the target critics; returns scalars to log, on the device."""
    actor, critic, device = agent.actor, agent.critic, batch.actions.device
    batch_size, action_dim = batch.actions.shape
    alpha = agent.log_alpha.exp().detach()
    cql_weight = args.cql_weight * (args.online_cql_factor if online else 1.0)

    # All draws are independent and carry no gradient. Bellman target [B]: minimum over critics, then maximum over
    # actions of pi(s') (appendix H.3), no entropy. Regulariser: n uniform actions, n of pi(s'), n of pi(s), all at s.
    n = args.num_actions if cql_weight else 0
    with torch.no_grad():
        target_actions, _ = actor.sample(batch.next_observations, args.num_actions)
        drawn = torch.rand(args.num_critics, device=device).argsort()[: args.num_target_critics]  # a random subset
        target_q = agent.target_critic(batch.next_observations, target_actions)[drawn].amin(0)  # [B, num_actions]
        target = batch.rewards + args.gamma * (1 - batch.terminations) * target_q.amax(1)
        uniform_actions = 2 * torch.rand(batch_size, n, action_dim, device=device) - 1
        pi_next_actions, pi_next_log_prob = actor.sample(batch.next_observations, n)
        pi_actions, pi_log_prob = actor.sample(batch.observations, n)
    actions = torch.cat([batch.actions.unsqueeze(1), uniform_actions, pi_next_actions, pi_actions], dim=1)
    q_data, q_uniform, q_pi = critic(batch.observations, actions).split([1, n, 2 * n], dim=2)  # [N, B, 1|n|2n]
    td_loss = (q_data.squeeze(2) - target).square().mean(1)  # [N]; equation 3.1 has 1/2 here, the authors' code has not
    critic_loss = td_loss.sum()
    metrics = {"losses/qf_loss": td_loss.mean(), "losses/alpha": alpha, "calibration/mean_q": q_data.mean()}

    # Conservative regulariser. The bound rate says how far Q falls below V^mu(s), where Cal-QL has its floor.
    if cql_weight:
        v_mu = batch.mc_returns.unsqueeze(1)  # [B, 1]
        metrics["calibration/bound_rate"] = (q_pi < v_mu).float().mean()  # share of Q below the floor
        if args.importance_sampling:  # the sum of exp(Q) / density, where 0.5^A is the uniform one's
            log_prob = torch.cat([pi_next_log_prob, pi_log_prob], dim=1)  # [B, 2n]
            z = [q_uniform - action_dim * math.log(0.5), q_pi - log_prob]
        else:
            z = [q_uniform, q_pi, q_data]
        cql_gap = (torch.cat(z, dim=2).logsumexp(2) - q_data.squeeze(2)).mean(1)  # [N]
        if args.cql_lagrange:
            cql_alpha = agent.log_cql_alpha.exp().clamp(max=1e6)
            excess = cql_gap - args.target_action_gap
            cql_loss = cql_weight * (cql_alpha.detach() * excess).sum()
            critic_loss = critic_loss - cql_weight * cql_alpha * excess.detach().mean()  # grows while excess > 0
            metrics["losses/cql_alpha"] = cql_alpha
        else:
            cql_loss = cql_weight * cql_gap.sum()
        critic_loss = critic_loss + cql_loss
        metrics |= {"losses/cql_loss": cql_loss / args.num_critics, "losses/cql_gap": cql_gap.mean()}
    optimizer.zero_grad()
    critic_loss.backward()

    # Actor and temperature, as in SAC with target entropy -dim(A).
    if with_actor:
        pi_action, log_prob = actor.sample(batch.observations, 1)
        q = critic(batch.observations, pi_action)  # [N, B, 1]
        q = q.amin(0) if args.actor_reduce == "min" else q.mean(0)
        actor_loss = (alpha * log_prob - q).mean()
        alpha_loss = -(agent.log_alpha * (log_prob.detach() - action_dim)).mean()
        (actor_loss + alpha_loss).backward(inputs=[*actor.parameters(), agent.log_alpha])  # not into the critics
        metrics |= {"losses/actor_loss": actor_loss, "losses/alpha_loss": alpha_loss}

    optimizer.step()  # Adam skips parameters without a gradient
    with torch.no_grad():
        for target_param, param in zip(agent.target_critic.parameters(), critic.parameters(), strict=True):
            target_param.lerp_(param, args.tau)
    return {name: value.detach() for name, value in metrics.items()}


@torch.no_grad()
def probe(agent: Agent, batch: Batch, args: Args) -> dict[str, float]:
    """Mean Q and Monte-Carlo return of a batch, the share of pi(s)'s actions with Q below V^mu(s) (figures 3, 8)."""
    q_data = agent.critic(batch.observations, batch.actions.unsqueeze(1))
    q_pi = agent.critic(batch.observations, agent.actor.sample(batch.observations, args.num_actions)[0])  # [N, B, n]
    bound_rate = (q_pi < batch.mc_returns.unsqueeze(1)).float().mean().item()
    return {"mean_q": q_data.mean().item(), "mean_mc_return": batch.mc_returns.mean().item(), "bound_rate": bound_rate}


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
# From appendices G, H and the authors' code; ours: pick-place, point-maze, online intervals, Kitchen's limit.
SETTINGS: dict[str, dict] = {
    "antmaze": dict(critic_layers=(256, 256, 256, 256), cql_lagrange=True, reward_scale=10.0, reward_bias=-5.0,
        offline_steps=1_000_000, online_steps=1_000_000, online_eval_interval=20_000),
    "adroit": dict(actor_layers=(512, 512), critic_layers=(512, 512, 512), cql_weight=1.0, episode_length=200,
        reward_scale=10.0, reward_bias=-5.0, offline_steps=20_000, online_steps=1_000_000, offline_eval_interval=2_000),
    "pen-binary": dict(online_steps=300_000, episode_length=100),
    "kitchen": dict(actor_layers=(512, 512, 512), critic_layers=(512, 512, 512), importance_sampling=False,
        mixing_ratio=0.25, online_steps=1_250_000, online_eval_interval=10_000, episode_length=280),
    "pick-place": dict(online_env="collect.pick_place:cal-ql/PickPlace-v0", gamma=0.96, batch_size=128, num_actions=4,
        critic_layer_norm=True, reward_scale=11.0, reward_bias=-1.0, offline_steps=2_400, online_steps=7_000,
        offline_eval_interval=600, online_eval_interval=500, eval_episodes=40),
    "point-maze": dict(actor_layers=(128, 128), critic_layers=(128, 128), gamma=0.98, tau=0.02, actor_lr=3e-4,
        batch_size=128, num_actions=4, critic_layer_norm=True, reward_scale=10.0, reward_bias=-5.0, offline_steps=6_000,
        online_steps=6_000, offline_eval_interval=500, online_eval_interval=500),
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


# --- Replay (common) --------------------------------------------------------------------------------------------------
class ReplayBuffer:
    """The offline transitions, then a ring of online ones, in tensors on the training device."""

    def __init__(self, offline: list[Batch], args: Args):
        self.size, self.mixing_ratio, self.device = args.buffer_size, args.mixing_ratio, args.device
        self.num_offline = sum(len(episode.rewards) for episode in offline)
        self.num_online = self.cursor = 0  # `cursor` is where in the ring the next transition goes
        columns = (torch.from_numpy(np.concatenate(arrays)).to(self.device) for arrays in zip(*offline, strict=True))
        self.columns = Batch(*(torch.cat([c, torch.empty(self.size, *c.shape[1:]).to(c.device)]) for c in columns))

    def add(self, episode: Batch) -> None:
        """Appends an online episode; the oldest online transitions make room for it."""
        count = min(len(episode.rewards), self.size)
        index = self.num_offline + (self.cursor + torch.arange(count, device=self.device)) % self.size
        for column, values in zip(self.columns, episode, strict=True):
            column[index] = torch.as_tensor(values[-count:]).to(column)
        self.cursor = (self.cursor + count) % self.size
        self.num_online = min(self.num_online + count, self.size)

    def sample(self, batch_size: int) -> Batch:
        """int(share * B) offline transitions and the rest online (appendix H.2), with replacement."""
        if self.mixing_ratio < 0 or self.num_online == 0:
            index = torch.randint(self.num_offline + self.num_online, (batch_size,), device=self.device)
        else:
            count = int(self.mixing_ratio * batch_size)
            offline = torch.randint(self.num_offline, (count,), device=self.device)
            online = torch.randint(self.num_online, (batch_size - count,), device=self.device)
            index = torch.cat([offline, self.num_offline + online])
        return Batch(*(column[index] for column in self.columns))

    def state_dict(self) -> dict:
        """The online transitions; the offline ones are read from the dataset again."""
        online = [column[self.num_offline :][: self.num_online].clone() for column in self.columns]
        return {"online": online, "cursor": self.cursor, "sizes": [self.num_offline, self.size]}

    def load_state_dict(self, state: dict) -> None:
        if state["sizes"] != [self.num_offline, self.size]:
            raise ValueError("the dataset or --buffer-size has changed since this run began")
        self.cursor, self.num_online = state["cursor"], len(state["online"][0])
        for column, values in zip(self.columns, state["online"], strict=True):
            column[self.num_offline :][: self.num_online] = values


# --- Environment and evaluation (common) ------------------------------------------------------------------------------
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
