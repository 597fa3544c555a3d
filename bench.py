"""Measures and prints; passes and fails nothing. The last line of each command is one JSON object.

    python bench.py update --env-id antmaze-large-diverse --device cpu     # one gradient update at a task's size
    python bench.py update --env-id pick-place-pixels                      # the same from images
    python bench.py update --device cuda --processes 4                     # four at a time on one GPU, and their sum
    python bench.py load                                                   # a full-size AntMaze dataset, made for it
    python bench.py load --env-id pick-place-pixels                        # 50,000 steps with images, made for it
    python bench.py online --env-id pick-place                             # where the online phase's time goes
    python bench.py collect                                                # frames a second of collecting images
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings

import numpy as np
import torch

import cal_ql_continuous
import cal_ql_pixels

STATE_AND_ACTION = {
    "antmaze": (29, 8), "adroit": (45, 24), "kitchen": (59, 9), "pick-place": (11, 4), "pointmaze": (4, 2),
}
FRAME = (64, 64, 3)


def describe(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def count_work(args, obs_dim: int, action_dim: int) -> tuple[float, float]:
    """FLOP of the matrix products of one update of cal_ql_continuous.py, and the bytes that it cannot but move.

    A product of [m, k] and [k, n] is 2 m k n FLOP, forward; its gradient to the weights is as much again, and so is
    the one to the inputs, where these need one. The bytes: hidden activations and their gradients are written and read
    once, parameters, gradients and Adam's two moments are read and written once. float32.
    """
    rows, n = args.batch_size, args.num_actions
    widths = [*args.critic_layers, 1]
    inner = sum(2 * i * o for i, o in zip(widths, widths[1:], strict=False))  # FLOP an action after the first layer
    of_state, of_action = 2 * obs_dim * widths[0], 2 * action_dim * widths[0]

    def critics(actions: int, weights: bool, inputs: bool) -> float:
        first = (1 + weights) * (of_state + actions * of_action) + inputs * actions * of_action
        # In the critics' own loss the gradient runs through the inner layers, but not into states and actions.
        return args.num_critics * rows * (first + actions * (1 + weights + (weights or inputs)) * inner)

    policy = [obs_dim, *args.actor_layers, 2 * action_dim]
    products = [2 * i * o for i, o in zip(policy, policy[1:], strict=False)]
    actors = rows * (2 * sum(products) + 2 * sum(products) - products[0])  # s, s', and the gradients for s
    flop = critics(1 + 3 * n, True, False) + critics(n, False, False) + critics(1, False, True) + actors
    with_gradient, without = (1 + 3 * n) + 1, n
    hidden = args.num_critics * rows * sum(args.critic_layers) * (4 * with_gradient + 2 * without)
    critic = args.num_critics * sum(i * o for i, o in zip([obs_dim + action_dim, *widths], widths, strict=False))
    parameters = critic + sum(i * o for i, o in zip(policy, policy[1:], strict=False))
    return flop, 4 * (hidden + 8 * parameters)


class Roofline:
    """Seconds that an update would take at the device's rates of matrix products and copies, as measured beside it."""

    def __init__(self, args, obs_dim: int, action_dim: int, device: torch.device, seconds_of):
        self.flop, self.bytes = count_work(args, obs_dim, action_dim)
        width, rows = max(args.critic_layers), args.batch_size * (1 + 3 * args.num_actions)
        self.a = torch.randn(args.num_critics, rows, width, device=device)
        self.b, self.out = torch.randn(args.num_critics, width, width, device=device), torch.empty_like(self.a)
        self.source = torch.zeros(2**26, device=device)  # 256 MB: more than any cache
        self.target, self.seconds_of, self.samples = torch.zeros_like(self.source), seconds_of, []

    def measure(self) -> float:
        """Measures both rates once; returns the seconds."""
        seconds = self.seconds_of(lambda: torch.bmm(self.a, self.b, out=self.out))
        product = 2 * self.a.numel() * self.b.shape[2] / seconds
        bandwidth = 2 * self.source.nbytes / self.seconds_of(lambda: self.target.copy_(self.source))
        seconds = max(self.flop / product, self.bytes / bandwidth)
        self.samples.append((product, bandwidth, seconds))
        return seconds

    def describe(self) -> dict[str, float]:
        product, bandwidth, seconds = np.median(self.samples, axis=0)
        return {"flop": self.flop, "bytes": self.bytes, "flop_per_second": product, "bytes_per_second": bandwidth,
                "roofline_seconds": seconds}


def bench_update(options: argparse.Namespace) -> dict:
    """Times whole updates, sampling included, on random rows of the task's sizes, against the roofline.

    On CUDA they are replayed as a graph, as in training, and timed a hundred at once: the host need not wait for one.
    """
    if options.processes > 1:
        command = [sys.executable, __file__, "update", "--env-id", options.env_id, "--device", options.device,
                   "--repeats", str(options.repeats)]
        children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(options.processes)]
        results = [json.loads(child.communicate()[0].splitlines()[-1]) for child in children]
        rates = [result["updates_per_second"] for result in results]
        print(f"{options.processes} at a time: {sum(rates):.2f} updates a second; each {min(rates):.2f} to "
              f"{max(rates):.2f}")
        return {"updates_per_second": sum(rates), "processes": options.processes} | {
            name: results[0][name] for name in ("device", "settings")}
    flags = ["--env-id", options.env_id, "--device", options.device, "--buffer-size", "10000"]
    rng = np.random.default_rng(0)
    pixels = options.env_id in cal_ql_pixels.TASKS
    script = cal_ql_pixels if pixels else cal_ql_continuous
    args, rows = script.parse_args(flags), 10_000 if pixels else 100_000
    script.keep_memory()
    obs_dim, action_dim = (0, 4) if pixels else STATE_AND_ACTION[script.TASKS[options.env_id].domain]
    observations = rng.standard_normal((rows + 1, obs_dim), np.float32)
    if pixels:
        observations = cal_ql_pixels.Observation(rng.integers(0, 256, (rows + 1, *FRAME), np.uint8), observations)
    episode = script.Episode(observations, rng.uniform(-1, 1, (rows, action_dim)),
                             rng.integers(0, 2, rows).astype(np.float32), np.zeros(rows, bool))
    device = torch.device(options.device)
    if pixels:
        buffer = script.ReplayBuffer(iter([episode]), rows + 1, args, True, device)
        agent = script.Agent(FRAME, 0, action_dim, args).to(device)
    else:
        buffer = script.ReplayBuffer([episode], args, True, device)
        agent = script.Agent(obs_dim, action_dim, args).to(device)
    optimizer = agent.make_optimizer(args)

    def one_update() -> dict:
        batch = buffer.sample(args.batch_size)
        noise = script.draw_noise(batch.actions, args)
        return script.update(agent, optimizer, batch, noise, args.cql_weight, True, args)

    count = 1
    if options.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
        one_update, count = script.capture(one_update), 100

    def wait() -> None:
        if options.device == "cuda":
            torch.cuda.synchronize()

    def seconds_of(function) -> float:
        wait()
        started = time.perf_counter()
        function()
        wait()
        return time.perf_counter() - started

    roofline = None if pixels else Roofline(args, obs_dim, action_dim, device, seconds_of)
    seconds, shares = [], []
    for k in range(5 + options.repeats):  # in turn, because a machine's speed drifts; the first five warm up
        at_best = roofline.measure() if roofline else math.nan
        taken = seconds_of(lambda: [one_update() for _ in range(count)]) / count
        if k >= 5:
            seconds.append(taken), shares.append(at_best / taken)
    low, median, high = np.percentile(seconds, [0, 50, 100])
    print(f"one update: {1000 * median:.2f} ms (median of {options.repeats}; {1000 * low:.2f} to {1000 * high:.2f})")
    result = {"updates_per_second": 1 / median, "device": describe(options.device), "settings": vars(args)}
    if roofline:
        result |= roofline.describe() | {"share_of_roofline": float(np.median(shares))}
        print(f"roofline: {1000 * result['roofline_seconds']:.2f} ms ({result['flop'] / 1e9:.1f} GFLOP at "
              f"{result['flop_per_second'] / 1e9:.0f} GFLOP/s, {result['bytes'] / 1e9:.2f} GB at "
              f"{result['bytes_per_second'] / 1e9:.1f} GB/s); median share {100 * result['share_of_roofline']:.0f}%")
    return result


def make_full_size_antmaze(folder: str) -> None:
    """Writes 1,000 episodes of 1,000 random steps in the schema of D4RL/antmaze/large-diverse-v1."""
    import gymnasium as gym
    import gymnasium_robotics
    import minari
    from minari.data_collector import EpisodeBuffer

    gym.register_envs(gymnasium_robotics)
    rng = np.random.default_rng(0)

    def episodes():
        for k in range(1000):
            widths = {"achieved_goal": 2, "desired_goal": 2, "observation": 27}
            yield EpisodeBuffer(
                id=k, observations={name: rng.uniform(-20, 20, (1001, width)) for name, width in widths.items()},
                actions=rng.uniform(-1, 1, (1000, 8)).astype(np.float32), rewards=np.zeros(1000),
                terminations=np.zeros(1000, bool), truncations=np.arange(1000) == 999,
                infos={"success": np.zeros(1001, bool)})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari asks for an e-mail address and for a separate evaluation environment
        minari.create_dataset_from_buffers(
            "D4RL/antmaze/large-diverse-v1", episodes(), env="AntMaze_Large_Diverse_GR-v4")


def make_frames(folder: str) -> None:
    """Writes 1,250 episodes of 40 random steps in the schema of cal-ql/pick-place/pixels-v0."""
    import minari
    from minari.data_collector import EpisodeBuffer

    from collect import pick_place

    rng = np.random.default_rng(0)
    episodes = (
        EpisodeBuffer(
            id=k, observations=rng.integers(0, 256, (41, *FRAME), np.uint8),
            actions=rng.uniform(-1, 1, (40, 4)).astype(np.float32), rewards=np.zeros(40),
            terminations=np.zeros(40, bool), truncations=np.arange(40) == 39)
        for k in range(1250))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari asks for an e-mail address and for a separate evaluation environment
        minari.create_dataset_from_buffers(
            "cal-ql/pick-place/pixels-v0", episodes, env=pick_place.CAMERA_SPEC, jpeg_encoding=False)


def bench_load(options: argparse.Namespace) -> dict:
    """Times reading and storing a full-size dataset in a process of its own; the making is not counted."""
    pixels = options.env_id in cal_ql_pixels.TASKS
    if options.child:
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # noqa: E731  in GB
        script = cal_ql_pixels if pixels else cal_ql_continuous
        task, args = script.TASKS[options.env_id], script.parse_args(["--env-id", options.env_id])
        dataset = script.open_dataset(task.datasets[0])
        env = script.make_env(dataset, *([] if pixels else [task]), args.episode_length)
        before, started = peak(), time.perf_counter()
        episodes = script.load_episodes([dataset], task, *([] if pixels else [env]))
        num_frames = [dataset.total_steps + len(dataset)] if pixels else []
        script.ReplayBuffer(episodes, *num_frames, args, True, torch.device("cpu"))
        return {"seconds": time.perf_counter() - started, "gigabytes_added": peak() - before}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MINARI_DATASETS_PATH"] = folder
        print("writing the dataset ...", flush=True)
        (make_frames if pixels else make_full_size_antmaze)(folder)
        command = [sys.executable, __file__, "load", "--child", "--env-id", options.env_id]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return json.loads(lines[-1])


def bench_collect(options: argparse.Namespace) -> dict:
    """Frames a second of noisy demonstrations before the camera: physics, drawing and the demonstrator together."""
    import gymnasium as gym

    from collect import pick_place

    env, frames, started = gym.make(pick_place.CAMERA_SPEC), 0, time.perf_counter()
    for seed in range(options.repeats):
        frames += len(pick_place.demonstrate(env, pick_place.Args().noise, seed)["observations"])
    return {"frames_per_second": frames / (time.perf_counter() - started), "device": describe("cpu")}


def bench_online(options: argparse.Namespace) -> dict:
    """Splits the wall time of a short online phase; time inside an evaluation counts as evaluation alone."""
    script = cal_ql_continuous
    spent = dict.fromkeys(("environment", "policy", "update", "evaluation"), 0.0)
    began: list[float] = []
    steps: list[int] = []
    active: list[str] = []

    def timed(kind: str, function):
        def wrapper(*arguments, **keywords):
            if active or not began:
                return function(*arguments, **keywords)
            active.append(kind)
            started = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                spent[kind] += time.perf_counter() - started
                active.pop()

        return wrapper

    roll_out, make_env = script.roll_out, script.make_env
    evaluation = timed("evaluation", roll_out)

    def roll_out_by_kind(env, task, actor, seed, stochastic, check):
        if stochastic and not began:
            began.append(time.perf_counter())  # the online phase begins with its first episode
        episode, score = (roll_out if stochastic else evaluation)(env, task, actor, seed, stochastic, check)
        steps.append(stochastic * len(episode.rewards))
        return episode, score

    def make_timed_env(*arguments):
        env = make_env(*arguments)
        env.step, env.reset = timed("environment", env.step), timed("environment", env.reset)
        return env

    script.roll_out, script.make_env = roll_out_by_kind, make_timed_env
    script.Actor.act = timed("policy", script.Actor.act)
    script.update, script.probe = timed("update", script.update), timed("evaluation", script.probe)
    script.ReplayBuffer.sample = timed("update", script.ReplayBuffer.sample)
    script.draw_noise = timed("update", script.draw_noise)
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--env-id", options.env_id, "--device", options.device, "--runs-dir", folder, "--offline-steps", "10",
                 "--online-steps", str(options.steps)]
        if script.main(flags):
            sys.exit(1)
    wall = time.perf_counter() - began[0]
    spent["rest"] = wall - sum(spent.values())
    for kind, seconds in spent.items():
        print(f"{kind:12} {seconds:7.2f} s  {100 * seconds / wall:5.1f}%")
    return {"shares": {kind: seconds / wall for kind, seconds in spent.items()}, "wall_seconds": wall,
            "environment_steps_per_second": sum(steps) / spent["environment"], "device": describe(options.device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name in ("update", "load", "online", "collect"):
        command = subparsers.add_parser(name)
        command.add_argument("--env-id", default="pick-place" if name == "online" else "antmaze-large-diverse")
        command.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
        command.add_argument("--repeats", type=int, default=20, help="updates or episodes to time")
        command.add_argument("--processes", type=int, default=1, help="updates: how many processes at a time")
        command.add_argument("--steps", type=int, default=1000, help="environment steps of the online phase")
        command.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    known = [*cal_ql_continuous.TASKS] + [*cal_ql_pixels.TASKS] * (options.command != "online")
    if options.env_id not in known:
        parser.error(f"unknown --env-id {options.env_id}; choose from {', '.join(known)}")
    commands = {"update": bench_update, "load": bench_load, "online": bench_online, "collect": bench_collect}
    result = commands[options.command](options)
    about = {"command": options.command, "env_id": options.env_id, "date": time.strftime("%Y-%m-%d")}
    print(json.dumps(result | about))


if __name__ == "__main__":
    main()
