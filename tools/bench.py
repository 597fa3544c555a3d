"""Measures speed and prints it; nothing passes or fails. Flags that are not listed below go to the script.

    python tools/bench.py update --env-id antmaze-large-diverse    # one update, of a fresh agent and of a trained one
    python tools/bench.py load --env-id antmaze-large-diverse      # time and memory that the data take
    python tools/bench.py run --env-id pick-place                  # where the time of a short run goes

The task's data must be there. Compare the ratios within one call: a machine's speed drifts from one call to the next.
"""

import argparse
import contextlib
import importlib
import resource
import sys
import tempfile
import time
from functools import partial, wraps
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
try:
    import torch
    from tensordict.nn import CudaGraphModule
except ImportError as error:
    print(f"error: {error}; run `pip install -r requirements-dev.txt`.", file=sys.stderr)
    sys.exit(2)

SHORT = ["--offline-steps", "500", "--online-steps", "1000"]  # of `run`, unless the flags say otherwise


def megabytes() -> float:
    """The most memory that this process has held so far; getrusage counts bytes on macOS, kilobytes elsewhere."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def synchronize(args) -> None:
    if args.device == "cuda":
        torch.cuda.synchronize()


def bench_update(script, args, options: argparse.Namespace) -> None:
    """Times updates, sampling included: of a fresh agent, and of one trained on the task's data, in turn.

    A fresh network misleads: as Q falls on uniform actions, the log-sum-exp gives them gradients that are denormal,
    and many processors are slow on these. So the trained agent is timed with denormals kept, too (one CPU thread).
    """
    torch.set_flush_denormal(True)  # as `train` does
    torch.set_float32_matmul_precision("medium")
    _, _, offline = script.load_data(args)
    buffer = script.ReplayBuffer(offline, args)

    def make_step(agent, optimizer, graph: bool):
        step = partial(script.update, agent, optimizer, args, False, True)
        step = CudaGraphModule(step, warmup=3) if graph else step
        return lambda: step(buffer.sample(args.batch_size))

    cases, graphs = {}, [True, False] if args.device == "cuda" and args.cuda_graphs else [False]
    for name, updates in (("fresh", 0), ("trained", options.train_updates)):
        for graph in graphs:
            torch.manual_seed(args.seed)
            agent, optimizer = script.make_agent(offline, args)
            step = make_step(agent, optimizer, graph)
            for _ in range(updates):
                step()
            state = {key: value.clone() for key, value in agent.state_dict().items()}
            cases[name + (", no CUDA graph" if len(graphs) > 1 and not graph else "")] = agent, state, step, True
    if args.device == "cpu" and torch.get_num_threads() == 1:  # other threads keep the setting that they began with
        cases["trained, denormals kept"] = *cases["trained"][:3], False

    seconds, count = {name: [] for name in cases}, 100 if args.device == "cuda" else 1
    for turn in range(2 + options.turns):  # two warm up
        for name, (agent, state, step, flush) in cases.items():
            agent.load_state_dict(state)  # so that it stays fresh, or as trained
            torch.set_flush_denormal(flush)
            synchronize(args)
            began = time.perf_counter()
            for _ in range(count):
                step()
            synchronize(args)
            seconds[name] += [(time.perf_counter() - began) / count] * (turn >= 2)
    first = torch.tensor(seconds["fresh"])
    print(f"one update, {options.turns} turns, trained with {options.train_updates} updates\n"
          f"{'':26}{'median ms':>10}{'lowest':>10}{'of fresh':>10}")  # fmt: skip
    for name, values in seconds.items():
        taken = torch.tensor(values)
        print(f"{name:26}{1000 * taken.median():10.3f}{1000 * taken.min():10.3f}{(taken / first).median():10.2f}")


def bench_load(script, args, options: argparse.Namespace) -> None:
    """Time and memory of reading the task's data, and of the replay."""
    moments = [(time.perf_counter(), megabytes())]
    _, _, offline = script.load_data(args)
    moments.append((time.perf_counter(), megabytes()))
    buffer = script.ReplayBuffer(offline, args)
    moments.append((time.perf_counter(), megabytes()))
    print(f"{buffer.num_offline:,} offline transitions, room for {buffer.size:,} online ones")
    for name, before, after in zip(("load_data", "ReplayBuffer"), moments[:-1], moments[1:], strict=True):
        seconds, memory = after[0] - before[0], after[1] - before[1]
        print(f"{name:14}{seconds:8.2f} s{memory:10,.0f} MB more than before at its highest")


class Stopwatch:
    """Seconds by kind; a call within another that is timed counts as the outer one's."""

    def __init__(self, args):
        self.spent, self.active, self.args = {}, False, args

    def timed(self, function, kind: str):
        @wraps(function)
        def wrapper(*arguments, **keywords):
            if self.active:
                return function(*arguments, **keywords)
            self.active, began = True, time.perf_counter()
            try:
                result = function(*arguments, **keywords)
                synchronize(self.args)  # what it has asked of the device is its own
                return result
            finally:
                self.spent[kind] = self.spent.get(kind, 0.0) + time.perf_counter() - began
                self.active = False

        return wrapper


def bench_run(script, args, options: argparse.Namespace) -> None:
    """Splits the time of one run, made in a temporary folder: what an evaluation does counts as evaluation alone."""
    watch = Stopwatch(args)
    parts = [
        ("loading", script, "load_data"), ("loading", script.ReplayBuffer, "__init__"), ("loading", script, "make_env"),
        ("updates", script.ReplayBuffer, "sample"), ("updates", script, "update"),
        ("updates", CudaGraphModule, "__call__"), ("acting", script.Agent, "act"),
        ("environment", script.TaskEnv, "reset"), ("environment", script.TaskEnv, "step"),
        ("evaluation", script, "evaluate"), ("saving", torch, "save"),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(folder))  # for its folder `runs`
        for kind, owner, name in parts:
            stack.enter_context(mock.patch.object(owner, name, watch.timed(getattr(owner, name), kind)))
        began = time.perf_counter()
        script.train(args)
        wall = time.perf_counter() - began
    watch.spent["rest"] = wall - sum(watch.spent.values())
    for kind, seconds in watch.spent.items():
        print(f"{kind:12}{seconds:9.2f} s{seconds / wall:8.1%}")


def main() -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    benches = {"update": bench_update, "load": bench_load, "run": bench_run}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", choices=benches)
    parser.add_argument(
        "--script", default="cal_ql_continuous", help="such as cql_continuous, baselines.iql_continuous"
    )
    parser.add_argument("--train-updates", type=int, default=500, help="updates that make the trained agent")
    parser.add_argument("--turns", type=int, default=20, help="times that each case is timed")
    options, flags = parser.parse_known_args()
    if options.turns < 1:
        parser.error("--turns must be at least 1.")
    try:
        script = importlib.import_module(options.script)
    except ImportError as error:
        parser.error(f"--script {options.script}: {error}.")
    try:
        args, _ = script.parse_args((SHORT if options.what == "run" else []) + flags)
        name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        print(f"{options.what}: {options.script}, {args.env_id}, {name}, torch {torch.__version__}")
        benches[options.what](script, args, options)
    except script.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
