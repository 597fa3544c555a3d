"""The lightest task: a point mass through the medium maze, and noisy demonstrations of it as a Minari dataset.

    python -m collect.point_maze                  # 40 demonstrations, a few seconds

The environment is gymnasium-robotics' own `PointMaze_Medium-v3` with one start and one goal cell; the reward is 1
at the goal, which ends the episode, and 0 elsewhere. A smoke run rather than a demonstration: it is solved offline.
"""

import collections
import copy
import dataclasses
import shutil
import sys
import warnings

import gymnasium as gym
import gymnasium_robotics
import minari
import numpy as np
import tyro
from gymnasium_robotics.envs.maze.maps import GOAL, MEDIUM_MAZE, RESET
from minari.data_collector import EpisodeBuffer
from tqdm import tqdm

START_CELL, GOAL_CELL = (1, 1), (6, 6)  # (row, column)


def make_spec() -> gym.envs.registration.EnvSpec:
    """The environment's specification, with the start and the goal written into its map."""
    gym.register_envs(gymnasium_robotics)
    spec, maze = copy.deepcopy(gym.spec("PointMaze_Medium-v3")), copy.deepcopy(MEDIUM_MAZE)
    maze[START_CELL[0]][START_CELL[1]], maze[GOAL_CELL[0]][GOAL_CELL[1]] = RESET, GOAL
    spec.kwargs = {**spec.kwargs, "maze_map": maze, "continuing_task": False, "reset_target": False}
    spec.max_episode_steps = 300
    return spec


def next_cells(maze_map: list[list]) -> dict[tuple[int, int], tuple[int, int]]:
    """For every free cell the neighbour that is one step closer to the goal cell (breadth-first from the goal)."""
    towards, frontier = {GOAL_CELL: GOAL_CELL}, collections.deque([GOAL_CELL])
    while frontier:
        row, column = here = frontier.popleft()
        for cell in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            if cell not in towards and maze_map[cell[0]][cell[1]] != 1:
                towards[cell] = here
                frontier.append(cell)
    return towards


@dataclasses.dataclass
class Args:
    """Collect noisy waypoint demonstrations in PointMaze as a Minari dataset."""

    dataset_id: str = "cal-ql/pointmaze/narrow-v0"
    """the Minari id to write"""
    episodes: int = 40
    """how many demonstrations"""
    noise: float = 0.5
    """standard deviation of the noise on the controller's actions"""
    seed: int = 1
    """seed of the resets and of the noise"""
    overwrite: bool = False
    """collect anew and replace the dataset where one of that id exists"""


def collect(args: Args) -> minari.MinariDataset:
    """Rolls out the waypoint controller and writes the dataset.

    Returns:
        the dataset, of `args.episodes` episodes of at most 300 steps, with `infos["success"]` [T+1] as Minari has it.
    """
    spec = make_spec()
    env, episodes = gym.make(spec), []
    maze = env.unwrapped.maze
    towards = next_cells(maze.maze_map)
    for k in tqdm(range(args.episodes), desc="demonstrations", unit="episode"):
        seed = 100_000 * args.seed + k
        obs, info = env.reset(seed=seed)
        rng = np.random.default_rng(seed)
        steps, actions, rewards, terminations, success = [obs], [], [], [], [info["success"]]
        truncated = False
        while not (truncated or (terminations and terminations[-1])):
            position, velocity = obs["observation"][:2], obs["observation"][2:]
            waypoint = maze.cell_rowcol_to_xy(towards[tuple(maze.cell_xy_to_rowcol(position))])
            action = 5 * (waypoint - position) - velocity + args.noise * rng.standard_normal(2)
            actions.append(np.clip(action, -1, 1).astype(np.float32))
            obs, reward, terminated, truncated, info = env.step(actions[-1])
            steps.append(obs), rewards.append(reward), terminations.append(terminated), success.append(info["success"])
        truncations = [False] * (len(actions) - 1) + [truncated and not terminations[-1]]
        observations = {key: np.array([step[key] for step in steps]) for key in steps[0]}
        episodes.append(
            EpisodeBuffer(
                id=k,
                seed=seed,
                observations=observations,
                actions=np.array(actions),
                rewards=rewards,
                terminations=terminations,
                truncations=truncations,
                infos={"success": np.array(success)},
            )
        )
    env.close()
    shutil.rmtree(minari.storage.get_dataset_path(args.dataset_id), ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari asks for an e-mail address and for a separate evaluation environment
        return minari.create_dataset_from_buffers(
            args.dataset_id,
            episodes,
            env=spec,
            algorithm_name=f"waypoints, action noise {args.noise}",
            author="Cal-QL",
            description="Noisy waypoint demonstrations from one start to one goal.",
        )


def main() -> int:
    args = tyro.cli(Args)
    if args.episodes < 1 or args.noise < 0:
        print("error: --episodes must be at least 1 and --noise at least 0.", file=sys.stderr)
        return 2
    if (minari.storage.get_dataset_path(args.dataset_id) / "data").exists() and not args.overwrite:
        print(f"{args.dataset_id} exists already; --overwrite collects it anew.")
        return 0
    dataset = collect(args)
    succeeded = sum(bool(episode.infos["success"].any()) for episode in dataset)
    print(f"{dataset.id}: {len(dataset)} episodes, {dataset.total_steps} steps, {succeeded} successful")
    return 0


if __name__ == "__main__":
    sys.exit(main())
