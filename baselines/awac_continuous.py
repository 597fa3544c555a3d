"""AWAC: advantage-weighted actor-critic (Nair et al. 2020, arXiv:2006.09359).

The critics learn the value of the policy itself, from one of its actions at each next state; the policy imitates the
data's actions, each weighted by the exponential of its advantage over an action of the policy's own:

    min_Q   E_D[ sum_i ( Q_i(s,a) - r - gamma (1 - d) min_j Qtarget_j(s',a') )^2 ],  a' ~ pi(s')
    max_pi  sum_B softmax_B( (min_i Q_i(s,a) - min_i Q_i(s,a~)) / temperature ) log pi(a|s),  a~ ~ pi(s)

Networks and settings are those of the runs for the Cal-QL paper; the protocol is this project's. One of them is not
met: there, one buffer held a million transitions, so online ones replaced the offline ones; here all offline ones
stay, and batches draw from both alike (--mixing-ratio -1).

    python baselines/awac_continuous.py --env-id pen-binary
    python baselines/awac_continuous.py --resume runs/<run>
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
    """The settings of a run. `task_defaults(env_id)` gives those of the Cal-QL paper's runs of AWAC for a task."""

    # --- Run and protocol (common)
    env_id: str = "antmaze-large-diverse"  # a task of the table TASKS, or any Minari dataset id
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
    buffer_size: int = 1_000_000  # online transitions kept; the oldest are overwritten
    mixing_ratio: float = 0.5  # share of offline transitions in an online batch; below 0 all are sampled alike
    batch_size: int = 256  # transitions in a batch
    gamma: float = 0.99  # discount
    utd_ratio: int = 1  # updates per environment step
    actor_interval: int = 1  # updates of the critics per update of the actor
    # --- AWAC
    temperature: float = 1.0  # advantages are divided by this in the exponent of the policy's weights
    weight_decay: float = 1e-4  # decoupled decay of the actor's weights
    tau: float = 0.005  # rate at which the target critics follow the critics
    actor_lr: float = 3e-4  # learning rate of the actor
    critic_lr: float = 3e-4  # learning rate of the critics
    actor_layers: tuple[int, ...] = (256, 256, 256, 256)  # hidden layers of the actor
    critic_layers: tuple[int, ...] = (256, 256, 256, 256)  # hidden layers of each critic
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


class Actor(nn.Module):
    """A Gaussian policy that is not squashed: its mean is a tanh, its deviation one learned vector for all states."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        layers = []
        for i, o in itertools.pairwise([obs_dim, *args.actor_layers, action_dim]):
            layers += [nn.Linear(i, o), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1], nn.Tanh())
        for layer in self.net[:-1:2]:
            nn.init.orthogonal_(layer.weight, 1.0 if layer is self.net[-2] else 2**0.5)
            nn.init.zeros_(layer.bias)
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def forward(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean [B, A] and deviation [A] for observations [B, O]."""
        return self.net(observations), self.log_std.clamp(-10.0, 2.0).exp()

    def sample(self, observations: torch.Tensor) -> torch.Tensor:
        """One action for each state [B, A], which may lie outside of the box."""
        mean, std = self(observations)
        return mean + std * torch.randn_like(mean)


# --- Agent and update -------------------------------------------------------------------------------------------------
class Agent(nn.Module):
    """All that learns: actor, critics, and their slow copy for targets."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.actor = Actor(obs_dim, action_dim, args)
        self.critic = Critic(obs_dim, action_dim, args)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)

    def prepare(self, buffer: "ReplayBuffer", args: Args) -> torch.optim.Optimizer:
        """Makes the optimizer, in which the actor's side alone has a weight decay."""
        actor_side = {"params": self.actor.parameters(), "lr": args.actor_lr, "weight_decay": args.weight_decay}
        critic_side = {"params": self.critic.parameters(), "lr": args.critic_lr, "weight_decay": 0.0}  # plain Adam
        return torch.optim.AdamW([actor_side, critic_side], fused=True, capturable=self.actor.log_std.is_cuda)

    def act(self, observations: torch.Tensor, explore: bool) -> torch.Tensor:
        """Actions [B, A]: drawn from the policy in online episodes, its mean in evaluations."""
        return self.actor.sample(observations).clamp(-1.0, 1.0) if explore else self.actor(observations)[0]


def descend(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One step of what this loss depends on: zero_grad drops every gradient, and the optimizer skips what has none."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def update(agent: Agent, optimizer, args: Args, online: bool, with_actor: bool, batch: Batch) -> dict:
    """One update, the same in both phases: the critics, their targets, then the actor with the new critics.

    `with_actor` says whether the actor steps too. Returns scalars to log, which stay on the device.
    """
    actor, critic, states = agent.actor, agent.critic, batch.observations

    # The critics regress on the value of the policy's next action; no entropy.
    with torch.no_grad():
        next_actions = actor.sample(batch.next_observations).unsqueeze(1)
        next_q = agent.target_critic(batch.next_observations, next_actions).amin(0).squeeze(1)  # [B]
        target = batch.rewards + args.gamma * (1 - batch.terminations) * next_q
    q_data = critic(states, batch.actions.unsqueeze(1)).squeeze(2)  # [N, B]
    td_loss = (q_data - target).square().mean(1)  # [N]; there is no 1/2
    descend(optimizer, td_loss.sum())
    metrics = {"losses/qf_loss": td_loss.mean(), "calibration/mean_q": q_data.mean()}
    with torch.no_grad():
        for slow, fast in zip(agent.target_critic.parameters(), critic.parameters(), strict=True):
            slow.lerp_(fast, args.tau)

    # The actor regresses on the data's actions, weighted by their advantage over an action of its own.
    if with_actor:
        with torch.no_grad():
            pair = torch.stack([batch.actions, actor.sample(states)], dim=1)
            q, value = critic(states, pair).amin(0).unbind(1)  # [B] each
            weight = ((q - value) / args.temperature).softmax(0)
        mean, std = actor(states)
        log_prob = torch.distributions.Normal(mean, std, validate_args=False).log_prob(batch.actions).sum(1)
        actor_loss = -(weight * log_prob).sum()  # the weights sum to one
        descend(optimizer, actor_loss)
        metrics |= {"losses/actor_loss": actor_loss, "losses/largest_weight": weight.amax()}
    return {name: value.detach() for name, value in metrics.items()}


@torch.no_grad()
def probe(agent: Agent, batch: Batch, args: Args) -> dict[str, float]:
    """Mean Q and mean return of the data; the bound rate is not measured here, and is NaN."""
    q_data = agent.critic(batch.observations, batch.actions.unsqueeze(1))
    return {"mean_q": q_data.mean().item(), "mean_mc_return": batch.mc_returns.mean().item(), "bound_rate": math.nan}


# --- Settings of the tasks --------------------------------------------------------------------------------------------
# From the paper's appendix and its runs' scripts, which disagree on kitchen's temperature (1 or 0.3). The protocol
# (steps, intervals, episodes) is that of all scripts. AntMaze's rewards stay {0, 1}. Pick-place, which is not in the
# paper, takes Adroit's temperature and rewards, and the batch and layer norm of all scripts there.
SETTINGS: dict[str, dict] = {
    "every task": dict(batch_size=1024, mixing_ratio=-1.0),
    "antmaze": dict(offline_steps=1_000_000, online_steps=1_000_000, online_eval_interval=20_000),
    "adroit": dict(
        temperature=0.3, reward_bias=-1.0, offline_steps=20_000, online_steps=1_000_000, offline_eval_interval=2_000,
        episode_length=200),
    "pen-binary": dict(online_steps=300_000, episode_length=100),
    "kitchen": dict(online_steps=1_250_000, online_eval_interval=10_000, episode_length=280),
    "pick-place": dict(
        temperature=0.3, reward_bias=-1.0, threads=1, gamma=0.96, batch_size=128, critic_layer_norm=True,
        offline_steps=2_400, online_steps=7_000, offline_eval_interval=600, online_eval_interval=500,
        eval_episodes=40),
}  # fmt: skip
# The limits of these settings, where they are not those of a positive number.
LIMITS = dict(weight_decay=(0, 1e9))


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


# --- Replay (common) --------------------------------------------------------------------------------------------------
class ReplayBuffer:
    """The offline transitions, then a ring of `args.buffer_size` online ones, in tensors on the training device.

    Episodes enter whole and with their returns: no transition is sampled before its return is known. `sparse` rewards
    (or counts) are those of all the paper's tasks: the returns of episodes that time cuts off then get a tail.
    """

    def __init__(self, episodes: list[Episode], args: Args, sparse: bool, device: torch.device):
        self.args, self.sparse, self.device = args, sparse, device
        ends = np.cumsum([len(episode.rewards) for episode in episodes]).tolist()
        self.num_offline, self.num_online, self.cursor = ends[-1], 0, 0
        state, action = episodes[0].observations.shape[1:], episodes[0].actions.shape[1:]
        size, shapes = self.num_offline + args.buffer_size, (state, action, (), state, (), ())
        self.columns = Batch(*(torch.empty(size, *shape, device=device) for shape in shapes))
        for episode, end in zip(episodes, ends, strict=True):
            self.write(episode, torch.arange(end - len(episode.rewards), end))

    def write(self, episode: Episode, index: torch.Tensor) -> None:
        """Writes the last len(index) transitions of an episode, with their returns, at `index`."""
        states, actions, rewards, terminations = episode
        rewards = rewards * self.args.reward_scale + self.args.reward_bias
        # A time limit is not an end: the last reward is assumed to repeat for ever, as the authors do for failures.
        tail = float(rewards[-1]) / (1 - self.args.gamma) if self.sparse else 0.0
        returns = monte_carlo_returns(rewards, terminations, self.args.gamma, tail)
        transitions = Batch(states[:-1], actions, rewards, states[1:], terminations, returns)
        for column, values in zip(self.columns, transitions, strict=True):
            column[index.to(self.device)] = torch.as_tensor(values[-len(index) :]).to(column)

    def add(self, episode: Episode) -> None:
        """Appends an online episode; the oldest online transitions make room for it."""
        size, count = self.args.buffer_size, min(len(episode.rewards), self.args.buffer_size)
        self.write(episode, self.num_offline + (self.cursor + torch.arange(count)) % size)
        self.cursor, self.num_online = (self.cursor + count) % size, min(self.num_online + count, size)

    def sample(self, batch_size: int) -> Batch:
        """int(share * B) offline transitions and the rest online (appendix H.2), with replacement."""
        share = self.args.mixing_ratio
        if share < 0 or self.num_online == 0:
            share = self.num_offline / (self.num_offline + self.num_online)
        count = int(share * batch_size)
        offline = torch.randint(self.num_offline, (count,), device=self.device)
        online = torch.randint(max(self.num_online, 1), (batch_size - count,), device=self.device)
        index = torch.cat([offline, self.num_offline + online])
        return Batch(*(column[index] for column in self.columns))

    def state_dict(self) -> dict:
        """The online transitions; the offline ones are read from the dataset again."""
        online = [column[self.num_offline :][: self.num_online].clone() for column in self.columns]
        return {"online": online, "cursor": self.cursor, "num_offline": self.num_offline}

    def load_state_dict(self, state: dict) -> None:
        if state["num_offline"] != self.num_offline or state["cursor"] not in range(self.args.buffer_size):
            raise ValueError("the dataset has changed since this run began")
        self.cursor, self.num_online = state["cursor"], len(state["online"][0])
        for column, values in zip(self.columns, state["online"], strict=True):
            column[self.num_offline :][: self.num_online] = values.reshape(self.num_online, *column.shape[1:])


# --- Environments and evaluation (common) -----------------------------------------------------------------------------
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
