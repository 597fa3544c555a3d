"""TD3+BC: a minimalist approach to offline reinforcement learning (Fujimoto & Gu 2021, arXiv:2106.06860).

TD3 whose actor is also held to the data's actions. Dividing Q by its mean size makes one alpha do for all rewards:

    min_Q   E_D[ sum_i ( Q_i(s,a) - r - gamma (1 - d) min_j Qtarget_j(s',a') )^2 ],  a' = pi_target(s') + clipped noise
    min_pi  E_D[ mean_A (pi(s) - a)^2 ] - alpha E_D[ Q_1(s,pi(s)) ] / E_D[ |Q_1(s,pi(s))| ]

The actor and all targets move in every second update (--actor-interval 2). States are brought to mean 0 and deviation
1 by the offline data's statistics, online too. Its authors stop at offline training: what comes online (the same
losses on mixed batches, noise on the actions) is ours, and so are all settings but the defaults, for nothing is
published for these tasks. --bc-weight-online-end is a reading of Beeson & Montana 2022, not checked against their code.

    python baselines/td3_bc_continuous.py --env-id pen-binary
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
    # --- TD3+BC
    alpha: float = 2.5  # weight of Q in the actor's loss, next to the squared error to the data's actions
    bc_weight_online_end: float | None = None  # let 1 / alpha decay to this online, after an idea of arXiv:2211.11802
    normalize_states: bool = True  # to the offline data's mean 0 and deviation 1
    target_noise: float = 0.2  # deviation of the noise on the target policy's actions
    target_noise_clip: float = 0.5  # limit of that noise
    exploration_noise: float = 0.1  # deviation of the noise on the actions of online episodes
    tau: float = 0.005  # rate at which the target networks follow the learned ones
    actor_lr: float = 3e-4  # learning rate of the actor
    critic_lr: float = 3e-4  # learning rate of the critics
    actor_layers: tuple[int, ...] = (256, 256)  # hidden layers of the actor
    critic_layers: tuple[int, ...] = (256, 256)  # hidden layers of each critic
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
            self.biases.append(torch.empty(args.num_critics, 1, o))
            for parameter in (self.weights[-1], self.biases[-1]):
                nn.init.uniform_(parameter, -(i**-0.5), i**-0.5)  # as nn.Linear does, which the actor keeps

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Q-values [N, B, K] of K actions for each state: observations [B, O], actions [B, K, A]."""
        x = torch.cat([observations.unsqueeze(1).expand(-1, actions.shape[1], -1), actions], dim=2).flatten(0, 1)
        x = x @ self.weights[0] + self.biases[0]  # [B*K, O+A] @ [N, O+A, H] + [N, 1, H] -> [N, B*K, H]
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            if self.layer_norm:
                x = F.layer_norm(x, x.shape[-1:])
            x = torch.baddbmm(bias, F.relu(x), weight)
        return x.squeeze(2).unflatten(1, actions.shape[:2])


class Actor(nn.Sequential):
    """A deterministic policy: actions [B, A] for observations [B, O]."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        layers = []
        for i, o in pairwise([obs_dim, *args.actor_layers, action_dim]):
            layers += [nn.Linear(i, o), nn.ReLU()]
        super().__init__(*layers[:-1], nn.Tanh())


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
    """All that learns: actor, critics, and their slow copies; with the data's statistics and the count of a decay."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.args = args
        self.actor = Actor(obs_dim, action_dim, args)
        self.critic = Critic(obs_dim, action_dim, args)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("state_mean", torch.zeros(obs_dim))
        self.register_buffer("state_std", torch.ones(obs_dim))
        self.register_buffer("online_updates", torch.tensor(0))

    def normalize(self, observations: torch.Tensor) -> torch.Tensor:
        return (observations - self.state_mean) / self.state_std

    def act(self, observations: torch.Tensor, explore: bool) -> torch.Tensor:
        """Actions [B, A]: the policy's, with noise in online episodes."""
        actions = self.actor(self.normalize(observations))
        if explore:
            actions = (actions + self.args.exploration_noise * torch.randn_like(actions)).clamp(-1.0, 1.0)
        return actions


def make_agent(offline: list[Batch], args: Args) -> tuple[Agent, torch.optim.Optimizer]:
    """The agent with the statistics of these data, which hold for ever after, and its optimizer."""
    agent = Agent(offline[0].observations.shape[1], offline[0].actions.shape[1], args).to(args.device)
    if args.bc_weight_online_end is not None and min(args.alpha, args.bc_weight_online_end) <= 0:
        raise InputError("--bc-weight-online-end and --alpha must be above 0: the decay is exponential.")
    if args.normalize_states:
        states = torch.from_numpy(np.concatenate([episode.observations for episode in offline])).to(args.device)
        agent.state_mean.copy_(states.mean(0))
        agent.state_std.copy_(states.std(0, correction=0) + 1e-3)
    actor_side = {"params": [*agent.actor.parameters()], "lr": args.actor_lr}
    critic_side = {"params": [*agent.critic.parameters()], "lr": args.critic_lr}
    return agent, torch.optim.Adam([actor_side, critic_side], fused=True, capturable=args.device == "cuda")


def descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor, parameters) -> None:
    """One step of these parameters: the optimizer leaves alone what has no gradient."""
    optimizer.zero_grad()
    loss.backward(inputs=list(parameters))
    optimizer.step()


def update(agent: Agent, optimizer, args: Args, online: bool, with_actor: bool, batch: Batch) -> dict:
    """The critics; then the actor with the new critics, and all targets; returns scalars to log, on the device."""
    states, next_states = agent.normalize(batch.observations), agent.normalize(batch.next_observations)

    # The critics regress on the target policy's next action, with clipped noise.
    with torch.no_grad():
        noise = args.target_noise * torch.randn_like(batch.actions)
        noise = noise.clamp(-args.target_noise_clip, args.target_noise_clip)
        next_actions = (agent.target_actor(next_states) + noise).clamp(-1.0, 1.0)
        target_q = agent.target_critic(next_states, next_actions.unsqueeze(1)).amin(0).squeeze(1)  # [B]
        target = batch.rewards + args.gamma * (1 - batch.terminations) * target_q
    q_data = agent.critic(states, batch.actions.unsqueeze(1)).squeeze(2)  # [N, B]
    td_loss = (q_data - target).square().mean(1)  # [N]; there is no 1/2
    descend(optimizer, td_loss.sum(), agent.critic.parameters())
    metrics = {"losses/qf_loss": td_loss.mean(), "calibration/mean_q": q_data.mean()}

    alpha = torch.full_like(target[0], args.alpha)
    if online and args.bc_weight_online_end is not None:
        agent.online_updates += 1
        done = (agent.online_updates / (args.online_steps * args.utd_ratio)).clamp(max=1.0)
        alpha = alpha * (1 / (args.alpha * args.bc_weight_online_end)) ** done

    # The actor raises the first critic's Q, and stays near the data's actions.
    if with_actor:
        actions = agent.actor(states)
        q = agent.critic(states, actions.unsqueeze(1))[0]  # [B, 1]
        bc_loss = (actions - batch.actions).square().mean()
        actor_loss = bc_loss - alpha * q.mean() / q.abs().mean().detach()
        descend(optimizer, actor_loss, agent.actor.parameters())
        metrics |= {"losses/actor_loss": actor_loss, "losses/bc_loss": bc_loss, "losses/q_weight": alpha}
        target_params = [*agent.target_actor.parameters(), *agent.target_critic.parameters()]
        params = [*agent.actor.parameters(), *agent.critic.parameters()]
        with torch.no_grad():
            for target_param, param in zip(target_params, params, strict=True):
                target_param.lerp_(param, args.tau)
    return {name: value.detach() for name, value in metrics.items()}


@torch.no_grad()
def probe(agent: Agent, batch: Batch, args: Args) -> dict[str, float]:
    """Mean Q and mean return of the data; the bound rate is not measured here, and is NaN."""
    q_data = agent.critic(agent.normalize(batch.observations), batch.actions.unsqueeze(1))
    return {"mean_q": q_data.mean().item(), "mean_mc_return": batch.mc_returns.mean().item(), "bound_rate": math.nan}


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
# The protocol (steps, intervals, episodes) is that of all scripts, and all the rest is ours: every step costs one where
# success ends the episode, kitchen counts tasks. In AntMaze the authors leave states as they are, and say that a
# larger alpha does better (their issue 2, without a number). Pick-place has the batch and layer norm of all scripts.
SETTINGS: dict[str, dict] = {
    "antmaze": dict(actor_interval=2, normalize_states=False, reward_bias=-1.0, offline_steps=1_000_000,
        online_steps=1_000_000, online_eval_interval=20_000),
    "adroit": dict(actor_interval=2, reward_bias=-1.0, offline_steps=20_000, online_steps=1_000_000,
        offline_eval_interval=2_000, episode_length=200),
    "pen-binary": dict(online_steps=300_000, episode_length=100),
    "kitchen": dict(actor_interval=2, online_steps=1_250_000, online_eval_interval=10_000, episode_length=280),
    "pick-place": dict(online_env="collect.pick_place:cal-ql/PickPlace-v0", gamma=0.96, batch_size=128,
        actor_interval=2, critic_layer_norm=True, reward_bias=-1.0, offline_steps=2_400, online_steps=7_000,
        offline_eval_interval=600, online_eval_interval=500, eval_episodes=40),
    "point-maze": dict(gamma=0.98, tau=0.02, batch_size=128, critic_layer_norm=True, actor_interval=2, alpha=10.0,
        normalize_states=False, reward_bias=-1.0, offline_steps=6_000, online_steps=6_000, offline_eval_interval=500,
        online_eval_interval=500),
    "point-maze-medium": dict(online_env="collect.point_maze:cal-ql/PointMazeMedium-v0"),
    "point-maze-large": dict(online_env="collect.point_maze:cal-ql/PointMazeLarge-v0"),
    "any other": dict(actor_interval=2),
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
