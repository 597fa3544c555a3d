"""AntMaze data of your own: `cal-ql/antmaze/umaze-v0`, `medium-play`, `medium-diverse`, `large-play`, `large-diverse`.

    python -m collect.ant_maze umaze                  # 1,430 episodes of 700 steps, as the hosted dataset has
    python -m collect.ant_maze medium-play --episodes 300 --workers 4
    python -m collect.ant_maze umaze --frame-skip 10  # the ant acts every 0.1 s, as in D4RL, instead of every 0.05 s
    python cal_ql_continuous.py --env-id antmaze-umaze --datasets cal-ql/antmaze/umaze-v0

In place of Minari's hosted datasets, D4RL/antmaze/..., where there is no network: the same environments, observations
and rewards, another walker. An ant policy (`ant_policy.npz`: D4RL's, Apache-2.0) walks on
breadth-first waypoints to the episode's goal and stays there. It was trained on an ant with a fifth of gymnasium's
torque, so its actions are scaled by 0.2, and the dataset declares that box: +-0.2 is what the policy's -1 and 1 mean.
As in D4RL, every action gets Gaussian noise of deviation 0.2 (in units of the box) and is clipped to the box.
"""

import copy
import dataclasses
import multiprocessing
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium as gym
import gymnasium_robotics
import minari
import numpy as np
import tyro
from gymnasium.envs.registration import EnvSpec
from minari.data_collector import EpisodeBuffer
from tqdm import tqdm

UMAZE = ["#####", "#   #", "### #", "#   #", "#####"]
MEDIUM = ["########", "#  ##  #", "#  #   #", "##   ###", "#  #   #", "# #  # #", "#   #  #", "########"]
# task: environment, map, cells of a fixed start and goal; without them every episode has its own, from the environment
TASKS = {
    "umaze": ("AntMaze_UMaze-v4", UMAZE, ((3, 1), (1, 1))),
    "medium-play": ("AntMaze_Medium-v4", None, ()),
    "medium-diverse": ("AntMaze_Medium_Diverse_GR-v4", None, ()),
    "large-play": ("AntMaze_Large-v4", None, ()),
    "large-diverse": ("AntMaze_Large_Diverse_GR-v4", None, ()),
}
TORQUE = 0.2  # gymnasium's ant is five times as strong as the one that the policy was trained on


@dataclasses.dataclass
class Args:
    """Collect AntMaze episodes as a Minari dataset."""

    task: tyro.conf.Positional[Literal["umaze", "medium-play", "medium-diverse", "large-play", "large-diverse"]]
    """which dataset"""
    episodes: int = 0
    """how many episodes; 0 makes a million steps, as the hosted datasets have"""
    noise: float = 0.2
    """standard deviation of the noise on every action, in units of the box"""
    frame_skip: int = 5
    """physics steps of 0.01 s in a step: 5 as in the hosted datasets; 10 as in D4RL, half as many steps to a goal"""
    workers: int = 2
    """processes that collect"""
    seed: int = 1
    """seed of starts, goals and noise"""
    overwrite: bool = False
    """collect anew and replace the dataset where one of that id exists"""

    @property
    def dataset_id(self) -> str:
        return f"cal-ql/antmaze/{self.task}-v0"

    @property
    def number(self) -> int:
        """How many episodes."""
        return self.episodes or -(-1_000_000 // make_spec(self.task, self.frame_skip).max_episode_steps)

    @property
    def algorithm(self) -> str:
        """What the dataset says of how it was collected."""
        return f"D4RL's ant policy on waypoints, action noise {self.noise}"


def make_spec(task: str, frame_skip: int = 5) -> EnvSpec:
    """The environment's specification, with one start and one goal in the map where the task has them."""
    gym.register_envs(gymnasium_robotics)
    env_id, rows, cells = TASKS[task]
    kwargs = dict(continuing_task=True, reset_target=False)
    if frame_skip != 5:  # only v5 has a choice; without contact forces it observes what v4 does
        env_id = env_id.replace("-v4", "-v5")
        kwargs |= dict(frame_skip=frame_skip, include_cfrc_ext_in_observation=False)
    spec = copy.deepcopy(gym.spec(env_id))
    spec.kwargs.update(kwargs)
    if rows:
        maze = [[int(cell == "#") for cell in row] for row in rows]
        for (row, column), letter in zip(cells, "rg", strict=True):
            maze[row][column] = letter
        spec.kwargs["maze_map"] = maze
    return spec


class Walker:
    """D4RL's ant policy on waypoints: one cell ahead on the shortest path to the goal, in the last cell the goal."""

    def __init__(self, maze, noise: float, rng: np.random.Generator):
        self.maze, self.noise, self.rng = maze, noise, rng
        self.weights = dict(np.load(Path(__file__).parent / "ant_policy.npz"))
        self.free = [(i, j) for i, row in enumerate(maze.maze_map) for j, cell in enumerate(row) if cell != 1]

    def cell(self, position: np.ndarray) -> tuple[int, int]:
        """The free cell nearest to a position [2]."""
        centres = np.array([self.maze.cell_rowcol_to_xy(np.array(cell)) for cell in self.free])
        return self.free[int(np.square(centres - position).sum(1).argmin())]

    def next_cell(self, here: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
        """The neighbour of `here` on a shortest path to `target`, by breadth-first search from the target."""
        seen, frontier = {target}, [target]
        while frontier:
            reached = []
            for row, column in frontier:
                for cell in ((row, column - 1), (row, column + 1), (row + 1, column), (row - 1, column)):
                    if cell == here:
                        return row, column
                    if cell in self.free and cell not in seen:
                        seen.add(cell)
                        reached.append(cell)
            frontier = reached
        return target

    def __call__(self, observation: dict) -> np.ndarray:
        """The action [8] within the box, for an observation of the environment."""
        position, goal, w = observation["achieved_goal"], observation["desired_goal"], self.weights
        here, target = self.cell(position), self.cell(goal)
        waypoint = goal
        if here != target and (cell := self.next_cell(here, target)) != target:
            waypoint = self.maze.cell_rowcol_to_xy(np.array(cell)) + self.rng.uniform(-0.5, 0.5, 2)
        heading = 10 * (waypoint - position) / (np.linalg.norm(waypoint - position) + 1e-9)
        hidden = np.maximum(w["w0"] @ np.concatenate([observation["observation"], heading]) + w["b0"], 0)
        hidden = np.maximum(w["w1"] @ hidden + w["b1"], 0)
        std = np.exp(np.clip(w["w_log_std"] @ hidden + w["b_log_std"], -20, 2))
        action = np.tanh(w["w_mean"] @ hidden + w["b_mean"] + std * self.rng.standard_normal(8))
        action += self.noise * self.rng.standard_normal(8)
        return (TORQUE * action.clip(-1, 1)).astype(np.float32)


def collect_episode(job: tuple[EnvSpec, float, int, int]) -> EpisodeBuffer:
    """Plays one episode, for a task's specification, noise, number and seed, in the hosted datasets' schema and
    float32's precision."""
    spec, noise, number, seed = job
    seed = 100_000 * seed + number
    if not hasattr(collect_episode, "env"):  # one environment for each process
        collect_episode.env = gym.make(spec)
    env = collect_episode.env
    walker = Walker(env.unwrapped.maze, noise, np.random.default_rng(seed))
    observation, info = env.reset(seed=seed)
    observations, actions, rewards, success, over = [observation], [], [], [info["success"]], False
    while not over:
        actions.append(walker(observations[-1]))
        observation, reward, terminated, truncated, info = env.step(actions[-1])
        observations.append(observation)
        rewards.append(reward)
        success.append(info["success"])
        over = terminated or truncated
    stacked = {key: np.array([step[key] for step in observations], np.float32) for key in observation}
    steps = len(actions)
    return EpisodeBuffer(
        id=number,
        seed=seed,
        observations={key: values.astype(np.float64) for key, values in stacked.items()},
        actions=np.array(actions),
        rewards=np.array(rewards, np.float64),
        terminations=np.zeros(steps, bool),
        truncations=np.arange(steps) == steps - 1,
        infos={"success": np.array(success, bool)},
    )


def collect(args: Args) -> minari.MinariDataset:
    """Collects in parallel and writes the dataset; prints how many episodes reach their own goal."""
    spec = make_spec(args.task, args.frame_skip)
    jobs = [(spec, args.noise, k, args.seed) for k in range(args.number)]
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        made = pool.imap(collect_episode, jobs, chunksize=4)
        buffers = list(tqdm(made, f"collect {args.task}", args.number, unit="episode", mininterval=1, disable=None))
    reached = sum(bool(buffer.infos["success"].any()) for buffer in buffers)
    shutil.rmtree(minari.storage.get_dataset_path(args.dataset_id), ignore_errors=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`\w+` is set to None")  # Minari asks for more than there is
        dataset = minari.create_dataset_from_buffers(
            args.dataset_id,
            (buffer for buffer in buffers),
            env=spec,
            action_space=gym.spaces.Box(-TORQUE, TORQUE, (8,), np.float32),
            algorithm_name=args.algorithm,
            author="Cal-QL",
            description=f"Collected in the schema of the hosted D4RL/antmaze/{args.task}-v1; not the hosted data.",
        )
    print(f"{dataset.id}: {len(buffers)} episodes, {dataset.total_steps} steps, {reached} reach their own goal")
    return dataset


def main() -> int:
    args = tyro.cli(Args)
    if args.episodes < 0 or args.workers < 1 or args.frame_skip < 1 or args.seed < 0 or not 0 <= args.noise < np.inf:
        print("error: --episodes, --seed, --noise must be at least 0, --workers, --frame-skip 1.", file=sys.stderr)
        return 2
    if (minari.storage.get_dataset_path(args.dataset_id) / "data").exists() and not args.overwrite:
        dataset = minari.load_dataset(args.dataset_id)
        (first,) = dataset.storage.get_episode_metadata([0])
        seed = first.get("seed", 100_000 * args.seed) // 100_000  # older ones do not tell
        algorithm, frame_skip = dataset.storage.metadata["algorithm_name"], dataset.env_spec.kwargs.get("frame_skip", 5)
        made = len(dataset), algorithm, frame_skip
        if (*made, seed) != (args.number, args.algorithm, args.frame_skip, args.seed):
            print(f"error: {args.dataset_id} exists already, made with other settings ({made[0]} episodes, {made[1]}, "
                  f"frame skip {made[2]}, seed {seed}); --overwrite collects it anew.", file=sys.stderr)  # fmt: skip
            return 2
        print(f"{args.dataset_id} exists already; --overwrite collects it anew.")
        return 0
    collect(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
