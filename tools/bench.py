"""Measures and prints; passes and fails nothing. The last line of each command is one JSON object.

    python tools/bench.py update --env-id antmaze-large-diverse    # one update: fresh and trained, denormals on and off
    python tools/bench.py update --env-id antmaze-umaze --critic-layers 256 256 --num-actions 4 --threads 1
    python tools/bench.py update --env-id pick-place-pixels        # from images, on random frames
    python tools/bench.py load                                     # a full-size AntMaze dataset, made for it
    python tools/bench.py load --env-id pick-place-pixels          # 50,000 steps with images, made for it
    python tools/bench.py online --env-id pick-place               # where the online phase's time goes
    python tools/bench.py collect                                  # frames a second of collecting images

Flags that a command does not know go to the script, which then measures with these settings.
"""

import argparse
import copy
import functools
import importlib
import json
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import cal_ql_continuous  # noqa: E402

STATE_AND_ACTION = {"antmaze": (29, 8), "adroit": (45, 24), "kitchen": (59, 9), "pick-place": (11, 4)}
FRAME = (64, 64, 3)


# --- One update -------------------------------------------------------------------------------------------------------
def describe(device: str) -> str:
    """The processor, with a note where a library does not use it as it could."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = found[1] if found else "CPU"
    if "AMD" in name and torch.backends.mkl.is_available():
        print("note: MKL takes its AVX2 kernels on AMD processors; docs/performance.md says what can be done")
    return f"{name}, {torch.get_num_threads()} threads"


def count_work(args, obs_dim: int, action_dim: int) -> tuple[float, float]:
    """FLOP of the matrix products of one update of cal_ql_continuous.py, and the bytes that it cannot but move.

    A product of [m, k] and [k, n] is 2 m k n FLOP, forward; its gradient to the weights is as much again, and so is
    the one to the inputs, where these need one. The bytes: hidden activations and their gradients are written and read
    once, parameters, gradients and Adam's two moments are read and written once. float32.
    """
    size, n = args.batch_size, args.num_actions
    widths = [obs_dim + action_dim, *args.critic_layers, 1]
    first, *others = [2 * i * o for i, o in zip(widths, widths[1:], strict=False)]
    inner = sum(others)

    def critics(actions: int, weights: bool, inputs: bool) -> float:
        # In the critics' own loss the gradient runs through the inner layers, but not into states and actions.
        each = (1 + weights + inputs) * first + (1 + weights + (weights or inputs)) * inner
        return args.num_critics * size * actions * each

    policy = [obs_dim, *args.actor_layers, 2 * action_dim]
    products = [2 * i * o for i, o in zip(policy, policy[1:], strict=False)]
    actors = size * (4 * sum(products) + 2 * sum(products) - products[0])  # four samples, gradients of one of them
    flop = critics(1 + 3 * n, True, False) + critics(n, False, False) + critics(1, False, True) + actors
    with_gradient, without = (1 + 3 * n) + 1, n
    hidden = args.num_critics * size * sum(args.critic_layers) * (4 * with_gradient + 2 * without)
    critic = args.num_critics * sum(i * o for i, o in zip(widths, widths[1:], strict=False))
    parameters = critic + sum(i * o for i, o in zip(policy, policy[1:], strict=False))
    return flop, 4 * (hidden + 8 * parameters)


def seconds_of(function, device: str, count: int = 1) -> float:
    """Seconds of one of `count` calls made in a row."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(count):
        function()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / count


class Roofline:
    """Seconds that an update would take at the device's rates of matrix products and copies, as measured beside it."""

    def __init__(self, args, obs_dim: int, action_dim: int, device: str):
        self.flop, self.bytes = count_work(args, obs_dim, action_dim)
        width, actions = max(args.critic_layers), args.batch_size * (1 + 3 * args.num_actions)
        self.a = torch.randn(args.num_critics, actions, width, device=device)
        self.b, self.out = torch.randn(args.num_critics, width, width, device=device), torch.empty_like(self.a)
        self.source = torch.zeros(2**26, device=device)  # 256 MB: more than any cache
        self.target, self.device = torch.zeros_like(self.source), device

    def measure(self) -> tuple[float, float, float]:
        """Measures both rates once; returns FLOP and bytes a second, and the seconds."""
        product = 2 * self.a.numel() * self.b.shape[2]
        product /= seconds_of(lambda: torch.bmm(self.a, self.b, out=self.out), self.device)
        bandwidth = 2 * self.source.nbytes / seconds_of(lambda: self.target.copy_(self.source), self.device)
        return product, bandwidth, max(self.flop / product, self.bytes / bandwidth)


class PlainCritic(cal_ql_continuous.Critic):
    """The same parameters, one critic after the other instead of all in one batched product."""

    def forward(self, observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        states = observations.unsqueeze(1).expand(-1, actions.shape[1], -1)
        rows, values = torch.cat([states, actions], dim=2).flatten(0, 1), []
        unbound = [(w.unbind(0), b.unbind(0)) for w, b in zip(self.weights, self.biases, strict=True)]
        for k in range(len(unbound[0][0])):
            x = rows
            for layer, (weights, biases) in enumerate(unbound):
                if layer:
                    x = F.relu(F.layer_norm(x, x.shape[-1:]) if self.layer_norm else x)
                x = torch.addmm(biases[k], x, weights[k])
            values.append(x.view(actions.shape[:2]))
        return torch.stack(values)


def make_episodes(script: ModuleType, env_id: str) -> tuple[list, str]:
    """The task's own data where it is on this machine; else random walks, of which one in three ends in a reward.

    Their actions follow from the states and are narrow, so that the policy grows sharp and sampled actions improbable:
    that is where denormal numbers come from.
    """
    task = script.find_task(env_id)
    paths = [script.minari.storage.get_dataset_path(dataset_id) / "data" for dataset_id in task.datasets]
    if all(path.exists() for path in paths):
        datasets = [script.open_dataset(dataset_id) for dataset_id in task.datasets]
        env = script.make_env(datasets[-1], task, 0)
        return script.load_episodes(datasets, task, env), "the task's data"
    rng, (obs_dim, action_dim), episodes = np.random.default_rng(0), STATE_AND_ACTION[task.domain], []
    weights, steps = rng.standard_normal((obs_dim, action_dim)), 700
    for k in range(100):
        states = np.cumsum(0.1 * rng.standard_normal((steps + 1, obs_dim)), axis=0) * np.geomspace(1, 0.1, obs_dim)
        rewards = (np.arange(steps) == steps - 1) * float(k % 3 == 0)
        actions = 0.2 * np.tanh(states[:-1] @ weights) + 0.04 * rng.standard_normal((steps, action_dim))
        floats = [values.astype(np.float32) for values in (states, actions, rewards)]
        episodes.append(script.Episode(*floats, rewards > 0))
    return episodes, "made-up data with sparse rewards"


class Bench:
    """An agent with its data, whose updates can be timed: fresh or trained, plain or as the script has it."""

    def __init__(self, flags: list[str], device: str, flush: bool, threads: int):
        torch.set_flush_denormal(flush)  # before torch starts its threads, which inherit it
        args = cal_ql_continuous.parse_args(["--device", device, "--buffer-size", "1", *flags])
        torch.set_num_threads(threads or args.threads or torch.get_num_threads())
        torch.set_float32_matmul_precision("high")
        script, self.args, self.device = cal_ql_continuous, args, device
        episodes, self.source = make_episodes(script, args.env_id)
        sparse = script.find_task(args.env_id).domain != "any other"
        self.sizes = episodes[0].observations.shape[1], episodes[0].actions.shape[1]
        torch.manual_seed(0)
        self.buffer = script.ReplayBuffer(episodes, args, sparse, torch.device(device))
        self.states = {}  # by name: agent and optimizer
        self.add("fresh")

    def add(self, name: str, state: dict | None = None) -> None:
        agent = cal_ql_continuous.Agent(*self.sizes, self.args).to(self.device)
        optimizer = agent.prepare(self.buffer, self.args)
        if state is not None:
            agent.load_state_dict(state["agent"])
            optimizer.load_state_dict(state["optimizer"])
        self.states[name] = agent, optimizer

    def update_of(self, name: str, plain: bool = False):
        """A function that makes one update, sampling included; on CUDA a captured graph of it."""
        agent, optimizer = self.states[name]
        if plain:
            agent, optimizer = copy.deepcopy((agent, optimizer))  # together: the optimizer keeps its parameters
            agent.critic.__class__ = agent.target_critic.__class__ = PlainCritic
        step = functools.partial(cal_ql_continuous.update, agent, optimizer, self.args, False, True)
        if self.device == "cuda":
            step = cal_ql_continuous.CudaGraphModule(step, warmup=3)
        return lambda: step(self.buffer.sample(self.args.batch_size))

    def train(self, count: int) -> dict:
        """Makes `count` updates of a fresh agent; returns its state, and the share of denormals in the last dL/dQ."""
        self.add("trained")
        agent, optimizer = self.states["trained"]
        step, gradients = self.update_of("trained"), []
        for _ in range(count - 1):
            step()

        def keep_gradient(critic, inputs, q_values):
            if q_values.requires_grad and q_values.shape[2] > 1:  # the critics' own loss, with its log-sum-exp
                q_values.register_hook(gradients.append)

        handle = agent.critic.register_forward_hook(keep_gradient)
        self.update_of("trained")()
        handle.remove()
        # Compared as bits, for comparisons of floats may flush too.
        bits = torch.cat([gradient.flatten() for gradient in gradients]).abs().cpu().view(torch.int32)
        denormal = ((bits > 0) & (bits < 0x00800000)).float().mean().item()
        return {"agent": agent.state_dict(), "optimizer": optimizer.state_dict(), "denormal": denormal}


def serve(pipe, flags: list[str], device: str, flush: bool, threads: int) -> None:
    """A process of its own for each setting of the flag, since threads inherit it; answers until it is told to end."""
    bench, functions = Bench(flags, device, flush, threads), {}
    for request, *values in iter(pipe.recv, None):
        if request == "train":
            path, count = values
            state = bench.train(count)
            torch.save(state, path)
            pipe.send(state["denormal"])
        elif request == "load":
            bench.add("trained", torch.load(values[0], map_location=device, weights_only=True))
            pipe.send(None)
        elif request == "roofline":
            functions.setdefault("roofline", Roofline(bench.args, *bench.sizes, device))
            pipe.send(functions["roofline"].measure())
        else:
            name, plain, count = values
            functions.setdefault((name, plain), bench.update_of(name, plain))
            pipe.send(seconds_of(functions[name, plain], device, count))


def ask(pipe, *request):
    pipe.send(request)
    return pipe.recv()


def bench_update(options: argparse.Namespace, flags: list[str]) -> dict:
    """Times whole updates of a fresh and of a trained agent, with and without denormal numbers, beside the roofline.

    All are timed in turn, because a machine's speed drifts, and the ratios are medians over the turns.
    """
    if options.env_id.endswith("pixels"):
        return bench_pixels(options, flags)
    flags = ["--env-id", options.env_id, *flags]
    context, pipes = multiprocessing.get_context("spawn"), {}
    for flush in (True, False):
        pipes[flush], end = context.Pipe()
        arguments = (end, flags, options.device, flush, options.threads)
        context.Process(target=serve, args=arguments, daemon=True).start()
        end.close()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/state.pt"
        print(f"training for {options.train_updates} updates, denormals kept ...", flush=True)
        denormal = ask(pipes[False], "train", path, options.train_updates)
        ask(pipes[True], "load", path)
        ask(pipes[False], "load", path)
    cases = [
        (state, plain, flush) for state in ("fresh", "trained") for plain in (False, True) for flush in (True, False)
    ]
    cases = [case for case in cases if not (case[1] and not case[2])]
    taken, rooflines = {case: [] for case in cases}, []
    count = 100 if options.device == "cuda" else 1
    for turn in range(3 + options.repeats):  # the first three warm up
        roofline = ask(pipes[True], "roofline")
        seconds = {(s, p, flush): ask(pipes[flush], "time", s, p, count) for s, p, flush in cases}
        if turn >= 3:
            rooflines.append(roofline)
            for case in cases:
                taken[case].append(seconds[case])
    for pipe in pipes.values():
        pipe.send(None)
    return report_update(options, taken, np.array(rooflines), denormal)


def report_update(options: argparse.Namespace, taken: dict, rooflines: np.ndarray, denormal: float) -> dict:
    """Prints one line a case: milliseconds, and medians of the ratios to the script's own and to the roofline."""
    product, bandwidth, at_best = np.median(rooflines, axis=0)
    print(f"after training, {denormal:.1%} of the log-sum-exp's gradients are denormal")
    print(f"roofline: {1000 * at_best:.2f} ms ({product / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s)")
    print(f"{'state':8} {'critics':8} {'denormals':10} {'ms':>9} {'of ours':>8} {'of roofline':>12}")
    result = {"roofline_ms": 1000 * at_best, "flop_per_second": product, "denormal_gradients": denormal, "cases": {}}
    for (state, plain, flush), seconds in taken.items():
        ours = np.median(np.array(seconds) / np.array(taken[state, False, True]))
        share = np.median(np.array(seconds) / rooflines[:, 2])
        names = state, "plain" if plain else "batched", "flushed" if flush else "kept"
        milliseconds = 1000 * float(np.median(seconds))
        print("{:8} {:8} {:10} {:9.2f} {:8.2f} {:12.2f}".format(*names, milliseconds, ours, share))
        result["cases"][" ".join(names)] = {"ms": milliseconds, "of_ours": ours, "of_roofline": share}
    return result | {"device": describe(options.device)}


def bench_pixels(options: argparse.Namespace, flags: list[str]) -> dict:
    """Times whole updates of cal_ql_pixels.py, sampling included, on random frames."""
    import cal_ql_pixels as script

    torch.set_flush_denormal(True)
    args = script.parse_args(["--env-id", options.env_id, "--device", options.device, "--buffer-size", "100", *flags])
    torch.set_num_threads(options.threads or args.threads or torch.get_num_threads())
    rng, steps, device = np.random.default_rng(0), 10_000, torch.device(options.device)
    frames = rng.integers(0, 256, (steps + 1, *FRAME), np.uint8)
    actions, rewards = rng.uniform(-1, 1, (steps, 4)).astype(np.float32), rng.integers(0, 2, steps).astype(np.float32)
    episode = script.Episode(frames, actions, rewards, np.zeros(steps, bool))
    buffer = script.ReplayBuffer(iter([steps + 1, episode]), args, True, device)
    agent = script.Agent(*FRAME, 4, args).to(device)
    step = functools.partial(script.update, agent, agent.prepare(buffer, args), args, False, True)
    if options.device == "cuda":
        step = script.CudaGraphModule(step, warmup=3)
    seconds = [
        seconds_of(lambda: step(buffer.sample(args.batch_size)), options.device) for _ in range(5 + options.repeats)
    ][5:]
    low, median, high = 1000 * np.percentile(seconds, [0, 50, 100])
    print(f"one update: {median:.2f} ms (median of {options.repeats}; {low:.2f} to {high:.2f})")
    return {"ms": median, "device": describe(options.device)}


# --- Loading and collecting -------------------------------------------------------------------------------------------
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
                id=k,
                observations={name: rng.uniform(-20, 20, (1001, width)) for name, width in widths.items()},
                actions=rng.uniform(-1, 1, (1000, 8)).astype(np.float32),
                rewards=np.zeros(1000),
                terminations=np.zeros(1000, bool),
                truncations=np.arange(1000) == 999,
                infos={"success": np.zeros(1001, bool)},
            )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari asks for an e-mail address and for a separate evaluation environment
        minari.create_dataset_from_buffers(
            "D4RL/antmaze/large-diverse-v1", episodes(), env="AntMaze_Large_Diverse_GR-v4"
        )


def make_frames(folder: str) -> None:
    """Writes 1,250 episodes of 40 random steps in the schema of cal-ql/pick-place/pixels-v0."""
    import minari
    from minari.data_collector import EpisodeBuffer

    from collect import pick_place

    rng = np.random.default_rng(0)
    episodes = (
        EpisodeBuffer(
            id=k,
            observations=rng.integers(0, 256, (41, *FRAME), np.uint8),
            actions=rng.uniform(-1, 1, (40, 4)).astype(np.float32),
            rewards=np.zeros(40),
            terminations=np.zeros(40, bool),
            truncations=np.arange(40) == 39,
        )
        for k in range(1250)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari asks for an e-mail address and for a separate evaluation environment
        minari.create_dataset_from_buffers(
            "cal-ql/pick-place/pixels-v0", episodes, env=pick_place.CAMERA_SPEC, jpeg_encoding=False
        )


def bench_load(options: argparse.Namespace, flags: list[str]) -> dict:
    """Times reading and storing a full-size dataset in a process of its own; the making is not counted."""
    pixels = options.env_id.endswith("pixels")
    if options.child:
        return load_once(options.env_id, pixels, flags)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MINARI_DATASETS_PATH"] = folder
        print("writing the dataset ...", flush=True)
        (make_frames if pixels else make_full_size_antmaze)(folder)
        command = [sys.executable, __file__, "load", "--child", "--env-id", options.env_id, *flags]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    result = json.loads(lines[-1])
    print(f"{result['seconds']:.1f} s, {result['gigabytes_added']:.2f} GB more memory than before")
    return result


def load_once(env_id: str, pixels: bool, flags: list[str]) -> dict:
    script = importlib.import_module("cal_ql_pixels" if pixels else "cal_ql_continuous")
    task, args = script.find_task(env_id), script.parse_args(["--env-id", env_id, "--buffer-size", "1", *flags])
    dataset = script.open_dataset(task.datasets[0])
    env = script.make_env(dataset, task, args.episode_length)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    script.ReplayBuffer(script.load_episodes([dataset], task, env), args, True, torch.device("cpu"))
    seconds = time.perf_counter() - started
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
    return {"seconds": seconds, "gigabytes_added": added}


def bench_collect(options: argparse.Namespace, flags: list[str]) -> dict:
    """Frames a second of noisy demonstrations before the camera: physics, drawing and the demonstrator together."""
    import gymnasium as gym

    from collect import pick_place

    env, frames, started = gym.make(pick_place.CAMERA_SPEC), 0, time.perf_counter()
    for seed in range(options.repeats):
        frames += len(pick_place.demonstrate(env, pick_place.Args().noise, seed)["observations"])
    rate = frames / (time.perf_counter() - started)
    print(f"{rate:.0f} frames a second ({options.repeats} episodes)")
    return {"frames_per_second": rate, "device": describe("cpu")}


# --- The online phase -------------------------------------------------------------------------------------------------
class Stopwatch:
    """Seconds by kind; a call inside of another counts as the outer one's, and nothing counts before `began`."""

    def __init__(self, *kinds: str):
        self.spent, self.active, self.began = dict.fromkeys(kinds, 0.0), False, None

    def timed(self, kind: str, function):
        @functools.wraps(function)
        def wrapper(*arguments, **keywords):
            if self.active or self.began is None:
                return function(*arguments, **keywords)
            self.active, started = True, time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                self.spent[kind] += time.perf_counter() - started
                self.active = False

        return wrapper


def bench_online(options: argparse.Namespace, flags: list[str]) -> dict:
    """Splits the wall time of a short online phase; time inside an evaluation counts as evaluation alone."""
    script, watch = cal_ql_continuous, Stopwatch("environment", "policy", "update", "evaluation", "checkpoint")
    play_episode, steps = script.play_episode, []

    def play(*arguments):
        watch.began = watch.began or time.perf_counter()  # the online phase begins with its first episode
        episode = play_episode(*arguments)
        steps.append(len(episode.rewards))
        return episode

    script.play_episode = play
    script.TaskEnv.step = watch.timed("environment", script.TaskEnv.step)
    script.TaskEnv.reset = watch.timed("environment", script.TaskEnv.reset)
    script.Agent.act = watch.timed("policy", script.Agent.act)
    script.update = watch.timed("update", script.update)
    script.ReplayBuffer.sample = watch.timed("update", script.ReplayBuffer.sample)
    script.evaluate, script.save = watch.timed("evaluation", script.evaluate), watch.timed("checkpoint", script.save)
    settings = ["--env-id", options.env_id, "--device", options.device, "--offline-steps", "10"]
    with tempfile.TemporaryDirectory() as folder:
        here = os.getcwd()
        os.chdir(folder)  # for its folder `runs`
        code = script.main([*settings, "--online-steps", str(options.steps), *flags])
        os.chdir(here)
    if code:
        sys.exit(code)
    wall, spent = time.perf_counter() - watch.began, watch.spent
    spent["rest"] = wall - sum(spent.values())
    for kind, seconds in spent.items():
        print(f"{kind:12} {seconds:7.2f} s  {100 * seconds / wall:5.1f}%")
    rate = sum(steps) / spent["environment"]
    print(f"environment: {rate:.0f} steps a second")
    shares = {kind: seconds / wall for kind, seconds in spent.items()}
    return {"shares": shares, "wall_seconds": wall, "environment_steps_per_second": rate}


# --- Command line -----------------------------------------------------------------------------------------------------
COMMANDS = {"update": bench_update, "load": bench_load, "online": bench_online, "collect": bench_collect}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        command = subparsers.add_parser(name)
        command.add_argument("--env-id", default="pick-place" if name == "online" else "antmaze-large-diverse")
        command.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
        command.add_argument("--threads", type=int, default=0, help="CPU threads; 0: the task's, or torch's choice")
        command.add_argument("--repeats", type=int, default=20, help="updates or episodes to time")
        command.add_argument("--train-updates", type=int, default=2000, help="updates that make the trained state")
        command.add_argument("--steps", type=int, default=1000, help="environment steps of the online phase")
        command.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options, flags = parser.parse_known_args(argv)
    pixels = options.env_id.endswith("pixels")
    script = importlib.import_module("cal_ql_pixels" if pixels else "cal_ql_continuous")
    try:
        if options.env_id not in script.TASKS or (pixels and options.command == "online"):
            raise script.InputError(f"--env-id {options.env_id!r} is not one of the tasks {', '.join(script.TASKS)}.")
        if min(options.repeats, options.train_updates, options.steps) < 1 or options.threads < 0:
            raise script.InputError("--repeats, --train-updates and --steps must be at least 1, --threads at least 0.")
        if options.device == "cuda" and not torch.cuda.is_available():
            raise script.InputError("torch finds no CUDA device.")
        script.parse_args(["--env-id", options.env_id, *flags])
        result = COMMANDS[options.command](options, flags)
    except script.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    about = {"command": options.command, "env_id": options.env_id, "date": time.strftime("%Y-%m-%d")}
    print(json.dumps(result | about, default=float))
    return 0


if __name__ == "__main__":
    sys.exit(main())
