"""Point mazes, light relatives of AntMaze: the environments, and play data of them as Minari datasets.

    python -m collect.point_maze large            # cal-ql/point-maze/large-v0: 300 episodes of 100 steps, a minute
    python -m collect.point_maze large-third      # its first 100 episodes
    python -m collect.point_maze medium           # 150 episodes in the medium maze
    python -m collect.point_maze large --no-clip  # cal-ql/point-maze/large-unclipped-v0: actions as they were commanded

A point mass has to come to one goal from anywhere in gymnasium-robotics' maze. Each action is held for ten physics
steps, so that a cell takes two to five. The reward is 1 within 0.45 m of the goal, which ends the episode, else 0.

Play data show no way to that goal on purpose: an episode starts anywhere and goes to random cells, one after the other.
A waypoint controller with noise walks, on and on; reaching the task's goal ends nothing here. The scripts relabel these
data to the task as they relabel AntMaze's.
"""

import collections
import copy
import dataclasses
import shutil
import sys
import warnings
from pathlib import Path
from typing import Literal

import gymnasium as gym
import minari
import numpy as np
import tyro
from gymnasium_robotics.envs.maze.maps import GOAL, LARGE_MAZE, MEDIUM_MAZE
from gymnasium_robotics.envs.maze.point_maze import PointMazeEnv
from minari.data_collector import EpisodeBuffer
from tqdm import tqdm

MAZES = {"Medium": (MEDIUM_MAZE, (6, 6)), "Large": (LARGE_MAZE, (7, 9))}  # map, cell (row, column) of the goal
DATASETS = {"medium": ("Medium", 150), "large": ("Large", 300), "large-third": ("Large", 100)}  # maze, episodes
STEPS = 100  # of an episode of the data


class HeldPointMaze(PointMazeEnv):
    """PointMaze with one goal, at its cell's centre, a start in any other free cell, and each action held."""

    def __init__(self, hold: int = 10, **kwargs):
        super().__init__(**kwargs)
        self.hold = hold
        self.position_noise_range = 0.0  # it would move the goal too

    def generate_reset_pos(self) -> np.ndarray:
        return super().generate_reset_pos() + self.np_random.uniform(-0.25, 0.25, 2)

    def step(self, action):
        for _ in range(self.hold):
            result = super().step(action)
            if result[2]:
                break
        return result


for name, (maze_map, (row, column)) in MAZES.items():
    maze_map = copy.deepcopy(maze_map)
    maze_map[row][column] = GOAL  # the one goal; no start is marked, so that any other free cell may be one
    if f"cal-ql/PointMaze{name}-v0" not in gym.registry:  # `python -m` runs this file as well as `collect.point_maze`
        gym.register(
            f"cal-ql/PointMaze{name}-v0",
            entry_point="collect.point_maze:HeldPointMaze",
            kwargs={"maze_map": maze_map, "continuing_task": False, "reset_target": False},
            max_episode_steps=100,  # the controller without noise takes up to 46
        )


def next_cells(maze_map: list[list], goal: tuple[int, int]) -> dict[tuple[int, int], tuple[int, int]]:
    """For every free cell the neighbour that is one step closer to the goal (breadth-first from the goal)."""
    towards, frontier = {goal: goal}, collections.deque([goal])
    while frontier:
        row, column = here = frontier.popleft()
        for cell in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            if cell not in towards and maze_map[cell[0]][cell[1]] != 1:
                towards[cell] = here
                frontier.append(cell)
    return towards


def control(position: np.ndarray, velocity: np.ndarray, waypoint: np.ndarray) -> np.ndarray:
    """The action [2] towards a waypoint, not clipped."""
    return 5 * (waypoint - position) - velocity


@dataclasses.dataclass
class Args:
    """Collect play data of a point maze as a Minari dataset."""

    dataset: tyro.conf.Positional[Literal["medium", "large", "large-third"]]
    """which one"""
    episodes: int = 0
    """how many episodes; 0 is the dataset's own number"""
    noise: float = 0.5
    """standard deviation of the noise on the controller's actions"""
    clip: bool = True
    """save actions clipped to [-1, 1], as they act; else as the controller gave them, with the box that they fill"""
    seed: int = 1
    """seed of starts, goals and noise"""
    overwrite: bool = False
    """collect anew and replace the dataset where one of that id exists"""

    @property
    def dataset_id(self) -> str:
        return f"cal-ql/point-maze/{self.dataset}{'' if self.clip else '-unclipped'}-v0"

    @property
    def number(self) -> int:
        """How many episodes."""
        return self.episodes or DATASETS[self.dataset][1]

    @property
    def algorithm(self) -> str:
        """What the dataset says of how it was collected."""
        return f"waypoints, action noise {self.noise}"


def collect_episode(env: gym.Env, number: int, args: Args) -> EpisodeBuffer:
    """Plays to one random cell after the other for STEPS steps."""
    seed = 100_000 * args.seed + number
    rng, maze = np.random.default_rng(seed), env.unwrapped.maze
    cells = [*next_cells(maze.maze_map, tuple(np.argwhere(np.array(maze.maze_map, object) != 1)[0]))]
    observation, info = env.reset(seed=seed)
    observations, actions, rewards, success, target = [observation], [], [], [info["success"]], None
    for _ in range(STEPS):
        position, velocity = np.split(observation["observation"], 2)
        if target is None or np.linalg.norm(position - maze.cell_rowcol_to_xy(target)) < 0.3:
            target = cells[rng.integers(len(cells))]
            towards = next_cells(maze.maze_map, target)
        waypoint = maze.cell_rowcol_to_xy(towards[tuple(maze.cell_xy_to_rowcol(position))])
        action = control(position, velocity, waypoint) + args.noise * rng.standard_normal(2)
        actions.append((action.clip(-1, 1) if args.clip else action).astype(np.float32))
        observation, reward, _, _, info = env.step(actions[-1].clip(-1, 1))
        observations.append(observation), rewards.append(reward), success.append(info["success"])
    return EpisodeBuffer(
        id=number,
        seed=seed,
        observations={key: np.array([each[key] for each in observations]) for key in observation},
        actions=np.array(actions),
        rewards=np.array(rewards),
        terminations=np.zeros(STEPS, bool),
        truncations=np.arange(STEPS) == STEPS - 1,
        infos={"success": np.array(success)},
    )


def collect(args: Args) -> minari.MinariDataset:
    """Plays and writes the dataset; prints how many episodes pass the task's goal."""
    spec = copy.deepcopy(gym.spec(f"cal-ql/PointMaze{DATASETS[args.dataset][0]}-v0"))
    spec.max_episode_steps = STEPS
    spec.kwargs["continuing_task"] = True
    env = gym.make(spec)
    numbers = tqdm(range(args.number), f"collect {args.dataset}", unit="episode", disable=None)
    buffers = [collect_episode(env, number, args) for number in numbers]
    env.close()
    bound = 1.0 if args.clip else float(max(np.abs(buffer.actions).max() for buffer in buffers))
    shutil.rmtree(minari.storage.get_dataset_path(args.dataset_id), ignore_errors=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`\w+` is set to None")  # Minari asks for more than there is
        dataset = minari.create_dataset_from_buffers(
            args.dataset_id,
            buffers,
            env=spec,
            action_space=gym.spaces.Box(-bound, bound, (2,), np.float32),
            algorithm_name=args.algorithm,
            author="Cal-QL",
            description="Play data: from a random start to one random cell after the other.",
        )
    passing = sum(bool(buffer.infos["success"].any()) for buffer in buffers)
    edge = np.mean([np.abs(buffer.actions) >= 1 for buffer in buffers])
    print(f"{dataset.id}: {len(buffers)} episodes, {dataset.total_steps} steps; {passing} pass the goal; "
          f"{edge:.0%} of the actions' entries are at the box's edge or beyond")  # fmt: skip
    return dataset


def main() -> int:
    args = tyro.cli(Args)
    if args.episodes < 0 or args.seed < 0 or not 0 <= args.noise < np.inf:
        print("error: --episodes, --seed and --noise must be at least 0.", file=sys.stderr)
        return 2
    if (minari.storage.get_dataset_path(args.dataset_id) / "data").exists() and not args.overwrite:
        storage = minari.load_dataset(args.dataset_id).storage
        (first,) = storage.get_episode_metadata([0])
        made = storage.total_episodes, storage.metadata["algorithm_name"], first["seed"]
        if made != (args.number, args.algorithm, 100_000 * args.seed):
            print(f"error: {args.dataset_id} exists already, made with other settings ({made[0]} episodes, {made[1]}, "
                  f"seed {made[2] // 100_000}); --overwrite collects it anew.", file=sys.stderr)  # fmt: skip
            return 2
        print(f"{args.dataset_id} exists already; --overwrite collects it anew.")
        return 0
    # The environment's entry point is `collect.point_maze`, wherever and however this file is started.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    collect(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
