"""Tries to break the scripts and counts what comes of it; docs/robustness.md has the counts.

    python tests/breaking.py datasets       # spoiled datasets of every kind of task
    python tests/breaking.py checkpoints    # damaged and altered checkpoints
    python tests/breaking.py kills          # SIGKILL at random moments of all scripts, amid writing too
    python tests/breaking.py signals        # SIGINT and SIGTERM at random moments, amid imports too
    python tests/breaking.py misuse         # command lines, disks, folders, specifications that would run code
    python tests/breaking.py memory         # 100,000 online steps, and the figure

A try is `clear` where it ends in one sentence (exit code 2; 1 for weights that are not finite), and `equal` where the
run, resumed if need be, ends with the same eval.csv and the same checkpoint as an undisturbed one, but for the time.
All else is wrong: a `traceback`, `silent` (it ran on, or hung), `lost` (it changed or removed what it was given). The
exit code is 1 then. --share 0.05 takes every twentieth try; --seed draws other moments and places.
"""

import argparse
import collections
import contextlib
import copy
import functools
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONWARNINGS"] = "ignore"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
warnings.simplefilter("ignore")

import gymnasium as gym  # noqa: E402
import h5py  # noqa: E402
import numpy as np  # noqa: E402
import test_baselines  # noqa: E402
import test_files  # noqa: E402
import test_odt  # noqa: E402
import test_pixels  # noqa: E402
import test_plot  # noqa: E402
import test_runs  # noqa: E402
import torch  # noqa: E402
from test_data import box, make_adroit_episode, make_ant_episode, make_spec, put, text, write_dataset  # noqa: E402
from tqdm import tqdm  # noqa: E402

from collect import pick_place, point_maze  # noqa: E402

torch.set_num_threads(1)
STATE, RIVALS = test_runs.TINY, [*test_baselines.FLAGS, "--device", "cpu"]
SCRIPTS = {  # and tiny runs of both phases
    "cal_ql_continuous": STATE,
    "cql_continuous": STATE,
    "sac_offline_data": STATE,
    "cal_ql_pixels": test_pixels.DOTS,
    "baselines.cql_pixels": test_pixels.DOTS,
    "baselines.sac_pixels": ["--env-id", "test/dot-v0", *test_pixels.tiny(test_pixels.sac_pixels)],
    "baselines.iql_pixels": ["--env-id", "test/dot-v0", *test_pixels.tiny(test_pixels.iql_pixels)],
    "baselines.awac_pixels": ["--env-id", "test/dot-v0", *test_pixels.tiny(test_pixels.awac_pixels)],
    "baselines.iql_continuous": RIVALS,
    "baselines.awac_continuous": RIVALS,
    "baselines.td3_bc_continuous": RIVALS,
    "baselines.odt_continuous": [*test_odt.RUN, "--online-steps", "40"],
}


# --- Trying and counting ----------------------------------------------------------------------------------------------
class Counts(collections.Counter):
    def add(self, name: str, outcome: str, output: str = "") -> None:
        self[outcome] += 1
        if outcome not in ("clear", "equal"):
            print(f"{outcome}: {name}\n{output[-1500:]}", flush=True)

    def __str__(self) -> str:
        names = ("clear", "equal", "traceback", "silent", "lost")
        return f"tried {self.total()}, " + ", ".join(f"{name} {self[name]}" for name in names)


def attempt(work, limit: int = 300) -> tuple[int, str]:
    """Does work() in a fork of this process: its exit code, negative for a signal, and what it printed."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            code = 1
            os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
            signal.alarm(limit)
            try:
                code = work() or 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 1
                print("" if isinstance(stop.code, int) else stop.code, file=sys.stderr)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return code, output.read().decode(errors="replace")


def start(name: str, flags: list[str]) -> int:
    tqdm.set_lock(threading.RLock())  # its own is shared among forks, and one that is killed may hold it for ever
    return importlib.import_module(name).main(flags)


def judge(code: int, output: str) -> str:
    if "Traceback" in output or "Exception ignored" in output:
        return "traceback"
    told = sum(line.count("error: ") for line in output.splitlines()) == 1
    return "clear" if told and (code == 2 or (code == 1 and "is not finite" in output)) else "silent"


def fingerprint(folder: Path) -> dict:
    """All files below it with their content; not pipes, which are never read."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def equal(run: Path, reference: Path) -> bool:
    try:
        test_runs.check_equal(run, reference)
        return True
    except (AssertionError, OSError, KeyError):
        traceback.print_exc()
        return False


@contextlib.contextmanager
def workplace():
    """A temporary working folder with demonstrations, in which `runs` is empty."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["MINARI_DATASETS_PATH"] = str(Path(folder, "minari"))
        with contextlib.redirect_stdout(io.StringIO()):
            pick_place.collect(pick_place.Args(episodes=3))
            point_maze.collect(point_maze.Args(episodes=3))
            test_pixels.write_dots("test/dot-v0", count=3)
        yield Path(folder)
        os.chdir(ROOT)


def only_run() -> Path:
    (run,) = Path("runs").iterdir()
    return run


def finish(name: str) -> tuple[Path, float]:
    """An undisturbed run, in a folder of its own, and how long it took."""
    began = time.time()
    code, output = attempt(lambda: start(name, SCRIPTS[name]))
    assert code == 0, output
    reference = Path(f"reference-{name}")
    shutil.move(only_run(), reference)
    return reference, time.time() - began


# --- Datasets ---------------------------------------------------------------------------------------------------------
def make_kitchen_episode() -> dict:
    states, none = np.random.default_rng(0).normal(size=(5, 59)), {"microwave": np.zeros((5, 1))}
    observations = dict(achieved_goal=none, desired_goal=none, observation=states)
    return dict(observations=observations, actions=np.zeros((4, 9)) + 0.1, rewards=[0.0, 1.0, 1.0, 1.0])


def write_datasets() -> None:
    """Those of the tables' tasks that are not collected; three episodes each."""
    maze = gym.spec("AntMaze_UMaze-v4").kwargs["maze_map"]
    ants = [make_ant_episode((-4, 4), arrivals) for arrivals in ((0, 0, 1), (0, 1, 0), (0, 0, 0))]
    write_dataset("D4RL/antmaze/umaze-v1", ants, make_spec("AntMaze_UMaze-v4", 70, maze_map=maze))
    for which in ("human", "cloned"):
        doors = [make_adroit_episode([0, 0, 1, 0, 1]) for _ in range(3)]
        write_dataset(f"D4RL/door/{which}-v2", doors, make_spec("AdroitHandDoor-v1", 300))
    spec = make_spec("FrankaKitchen-v1", 450, tasks_to_complete=["microwave"])
    write_dataset("D4RL/kitchen/complete-v2", [make_kitchen_episode() for _ in range(3)], spec)


# Task, dataset that is spoiled, columns of its observations that are read, script.
KINDS = {
    "antmaze-umaze": ("D4RL/antmaze/umaze-v1", ["observations/achieved_goal", "observations/observation"], 0),
    "door-binary": ("D4RL/door/cloned-v2", ["observations"], 0),
    "kitchen-complete": ("D4RL/kitchen/complete-v2", ["observations/observation"], 0),
    "pick-place": ("cal-ql/pick-place/narrow-v0", ["observations"], 0),
    "cal-ql/pointmaze/narrow-v0": ("cal-ql/pointmaze/narrow-v0", ["observations/observation"], 0),
    "test/dot-v0": ("test/dot-v0", ["observations"], 3),
}
SHORT = """--offline-steps 2 --online-steps 1 --offline-eval-interval 2 --eval-episodes 1 --episode-length 3
--batch-size 4 --actor-layers 4 --critic-layers 4 --num-actions 2 --buffer-size 5 --device cpu""".split()
VALUES = {  # what may be wrong with any column of numbers
    "missing": None,
    "a number": lambda x: 1.0,
    "none": lambda x: x[:0],
    "one": lambda x: x[:1],
    "short": lambda x: x[:-1],
    "long": lambda x: np.concatenate([x, x[:3]]),
    "complex": lambda x: x + 1j,
    "text": text,
    "NaN": put(math.nan),
    "infinite": put(-math.inf, -1),
}
VECTORS = {
    "narrow": lambda x: x[..., :-1],
    "wide": lambda x: np.concatenate([x, x], axis=-1),
    "flat": lambda x: x.reshape(len(x), -1)[:, 0],
    "nested": lambda x: x[:, None],
}
BOOLEANS = {
    "half": put(0.5),
    "[T, 1]": lambda x: x[:, None],
}
MANY = {"a million": lambda x: x + 1e6}  # outside of every box


def rewrite_metadata(**changes):
    """Changes of the metadata; those named env_... are of the environment's specification."""

    def spoil(folder: Path) -> None:
        path = folder / "data" / "metadata.json"
        metadata = json.loads(path.read_text())
        spec = json.loads(metadata["env_spec"])
        for name, value in changes.items():
            if name == "env_kwargs":
                spec["kwargs"].update(value)
            elif name.startswith("env_") and name != "env_spec":
                spec[name[4:]] = value
            else:
                metadata[name] = value(metadata[name]) if callable(value) else value
        if "env_spec" not in changes:
            metadata["env_spec"] = json.dumps(spec)
        path.write_text(json.dumps(metadata))

    return spoil


def rewrite_column(column: str, change):
    """Of the second episode, so that a look at the first alone does not find it."""

    def spoil(folder: Path) -> None:
        with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
            values = file["episode_1"][column][()]
            del file["episode_1"][column]
            if change is not None:
                file["episode_1"][column] = change(values)

    return spoil


def drop_episode(folder: Path) -> None:
    with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
        del file["episode_1"]


def rewrite_file(name: str, change):
    def spoil(folder: Path) -> None:
        path = folder / "data" / name
        content = path.read_bytes()
        path.unlink()
        if change is not None:
            path.write_bytes(change(content))

    return spoil


def scale_box(factor: float):
    def change(space: str) -> str:
        low = json.loads(space)
        return json.dumps(low | {key: [factor * bound for bound in low[key]] for key in ("low", "high")})

    return change


CODE = {"name": "Evil", "entry_point": "os:system", "kwargs": {"command": "touch pwned"}}
METADATA = {
    "no environment": rewrite_metadata(env_spec="null"),
    "unknown environment": rewrite_metadata(env_id="Unknown-v0"),
    "another environment": rewrite_metadata(env_id="HandReach-v2", env_kwargs={}),
    "unknown argument": rewrite_metadata(env_kwargs={"gravity": 3}),
    "code as the entry point": rewrite_metadata(env_id="Evil-v0", env_entry_point="os:system"),
    "code as a wrapper": rewrite_metadata(env_additional_wrappers=[CODE]),
    "code in the id": rewrite_metadata(env_id="evil_module:AntMaze_UMaze-v4"),
    "code in an argument": rewrite_metadata(env_kwargs={"entry_point": "os:system", "command": "touch pwned"}),
    "a specification cut off": rewrite_metadata(env_spec='{"id": "AntM'),
    "an action more": rewrite_metadata(action_space=box(29, 1.0)),
    "unbounded actions": rewrite_metadata(action_space=box(8, math.inf)),
    "discrete actions": rewrite_metadata(action_space='{"type": "Discrete", "dtype": "int64", "n": 3, "start": 0}'),
    "a box too small": rewrite_metadata(action_space=scale_box(0.01)),
    "a box upside down": rewrite_metadata(action_space=scale_box(-1)),
    "other observations": rewrite_metadata(observation_space=box(7, 1.0)),
    "more episodes": rewrite_metadata(total_episodes=9),
    "fewer episodes": rewrite_metadata(total_episodes=2),
    "no episode": rewrite_metadata(total_episodes=0),
    "other steps": rewrite_metadata(total_steps=7),
    "another dataset": rewrite_metadata(dataset_id="D4RL/pen/human-v2"),
    "no spaces": rewrite_metadata(action_space=None, observation_space=None),
}
OF_TABLE = {"a box too wide": rewrite_metadata(action_space=scale_box(10))}
WALLS = {
    "no maze": rewrite_metadata(env_kwargs={"maze_map": None}),
    "a small maze": rewrite_metadata(env_kwargs={"maze_map": [[1, 1], [1, 1]]}),
    "a maze of text": rewrite_metadata(env_kwargs={"maze_map": "maze"}),
    "a wall at the goal": rewrite_metadata(env_kwargs={"maze_map": [[1] * 5] * 5}),
    "an open maze": rewrite_metadata(env_kwargs={"maze_map": [[0]]}),
}
FILES = {
    f"{name} {how}": rewrite_file(name, change)
    for name in ("metadata.json", "main_data.hdf5")
    for how, change in {
        "missing": None,
        "empty": lambda content: b"",
        "half": lambda content: content[: len(content) // 2],
        "text": lambda content: b"text",
        "reversed": lambda content: content[::-1],
    }.items()
}


def spoils_of(env_id: str) -> dict:
    dataset_id, observations, _ = KINDS[env_id]
    table = {"episode missing": drop_episode, **METADATA, **FILES}
    columns = {column: VALUES | VECTORS for column in observations} | {"actions": VALUES | VECTORS | MANY}
    columns |= {"rewards": VALUES | {"[T, 1]": BOOLEANS["[T, 1]"]}, "terminations": VALUES | BOOLEANS}
    if env_id == "door-binary":
        columns["infos/success"] = VALUES | BOOLEANS
    for column, changes in columns.items():
        table |= {f"{column}: {name}": rewrite_column(column, change) for name, change in changes.items()}
    if "/" not in env_id:  # any other dataset may have another box than its environment
        table |= OF_TABLE
    return table | (WALLS if env_id == "antmaze-umaze" else {})


def break_datasets(share: float, rng: random.Random) -> Counts:
    counts, scripts = Counts(), list(SCRIPTS)
    with workplace() as place:
        write_datasets()
        source = place / "minari"
        tries = [(env_id, name, spoil) for env_id in KINDS for name, spoil in spoils_of(env_id).items()]
        for env_id, other in itertools.permutations(list(KINDS)[:5], 2):  # a folder copied over another
            tries.append((env_id, f"the data of {other}", KINDS[other][0]))
        for env_id, name, spoil in rng.sample(tries, math.ceil(share * len(tries))):
            dataset_id, _, script = KINDS[env_id]
            os.environ["MINARI_DATASETS_PATH"] = str(place / "spoiled")
            shutil.copytree(source, place / "spoiled")
            (place / "evil_module.py").write_text("open('pwned', 'w')")
            folder = place / "spoiled" / dataset_id
            if isinstance(spoil, str):
                shutil.rmtree(folder), shutil.copytree(source / spoil, folder)
            else:
                spoil(folder)
            before = fingerprint(place / "spoiled")
            code, output = attempt(lambda: start(scripts[script], ["--env-id", env_id, *SHORT]))  # noqa: B023
            outcome = judge(code, output)
            if fingerprint(place / "spoiled") != before or (place / "pwned").exists():
                outcome = "lost"
            counts.add(f"{env_id}, {name}", outcome, output)
            shutil.rmtree(place / "spoiled"), shutil.rmtree("runs", ignore_errors=True)
    return counts


# --- Checkpoints ------------------------------------------------------------------------------------------------------
class Code:
    """Pickled, it makes a file when it is loaded."""

    def __reduce__(self):
        return open, ("pwned", "w")


def damage_bytes(rng: random.Random) -> dict:
    """Of a checkpoint's bytes, after which its checksum is wrong."""

    def flip(content: bytes, place: float, many: int = 1) -> bytes:
        content, first = bytearray(content), int(place * len(content))
        for k in range(first, min(first + many, len(content))):
            content[k] ^= 1 + rng.randrange(255)
        return bytes(content)

    damages = {f"cut at {place:.3f}": (place,) for place in [rng.random() for _ in range(40)] + [0, 0.999999]}
    table = {
        name: lambda content, place=place: content[: int(place * len(content))] for name, (place,) in damages.items()
    }
    for place in [rng.random() for _ in range(120)]:
        table[f"a byte flipped at {place:.4f}"] = lambda content, place=place: flip(content, place)
    for place in [rng.random() for _ in range(20)]:
        table[f"100 bytes flipped at {place:.4f}"] = lambda content, place=place: flip(content, place, 100)
    table |= {
        "twice": lambda content: content + content,
        "a byte more": lambda content: content + b"0",
        "text": lambda content: b"hello",
        "its digest alone": lambda content: content[-64:],
        "without its digest": lambda content: content[:-64],
        "zeros": lambda content: bytes(len(content)),
        "a pickle with code": lambda content: pickle.dumps(Code()),
    }
    return table


def walk(state, path: tuple = ()):
    """All places in a nested state with what is there."""
    yield path, state
    if isinstance(state, dict | list):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from walk(value, (*path, key))


def put_at(path: tuple, change):
    """Changes what is at a place; where the change gives None, nothing is left there."""

    def alter(state):
        parent = state
        for key in path[:-1]:
            parent = parent[key]
        value = change(parent[path[-1]])
        if value is None:
            del parent[path[-1]]
        else:
            parent[path[-1]] = value

    return alter


OUT_OF_RANGE = dict(gamma=2.0, batch_size=0, buffer_size=-5, actor_lr=math.nan, critic_layers=(8, 0), seed=-1, tau=0.0,
                    utd_ratio=0, env_id="../up-v0", num_actions=0, mixing_ratio=3.0, threads=10**9)  # fmt: skip


def alter_states(state: dict, others: dict) -> dict:
    """Alterations after which the checkpoint is signed again, as another program or another version might do it."""
    table = {}
    for path, value in walk(state):
        name, loaded = "/".join(map(str, path)), path[:1] != ("rng",) and "param_groups" not in path
        if path and loaded and not (path[0] == "progress" and len(path) > 2):  # the rows' cells are not read
            if path[:2] != ("optimizer", "state") or len(path) != 3:  # Adam may not have stepped a parameter yet
                table[f"{name} missing"] = put_at(path, lambda _: None)
        if not isinstance(value, torch.Tensor) or not loaded:
            continue
        if value.dim():
            table[f"{name} with a row more"] = put_at(path, lambda x: torch.cat([x, x[:1]]))
            table[f"{name} flat"] = put_at(path, lambda x: x.flatten()[:-1])
        if value.is_floating_point() and path[-1] != "step":
            table[f"NaN in {name}"] = put_at(path, lambda x: x * math.nan)
    for place in [("agent",), ("progress", "rows"), ("args", "env_id"), ("optimizer", "state"), ("new",)]:
        code = put_at(place, lambda _: Code()) if place != ("new",) else lambda state: state.update(new=Code())
        table[f"code in {'/'.join(place)}"] = code
    table |= {
        "random state of another size": put_at(("rng", 0), lambda x: x[:100]),
        "no random state": put_at(("rng",), lambda x: []),
        "no rows": put_at(("progress", "rows"), lambda _: []),
        "no moments": put_at(("optimizer", "state"), lambda _: {}),
        "a cursor out of range": put_at(("buffer", "cursor"), lambda _: 10**6),
        "a cursor of text": put_at(("buffer", "cursor"), lambda _: "text"),
        "another dataset": put_at(("buffer", "num_offline"), lambda x: x + 1),
        "a setting more": lambda state: state["args"].update(new_setting=3),
        "another script": put_at(("script",), lambda _: "other.py"),
        "no state": lambda state: state.clear(),
    }
    for name, value in OUT_OF_RANGE.items():
        table[f"{name} {value}"] = put_at(("args", name), lambda _, value=value: value)
    for name, other in others.items():  # whole, but another script's; of another size it would be sound
        if name != "another size":
            table[name] = lambda state, other=other: (state.clear(), state.update(other))
    td3 = others["baselines.td3_bc_continuous"] | {"script": "cal_ql_continuous.py"}
    table["another script's under this name"] = lambda state: state.update(td3)  # CQL's would be sound
    table["another size's agent"] = lambda state: state.update(agent=others["another size"]["agent"])
    return table


def break_checkpoints(share: float, rng: random.Random) -> Counts:
    counts = Counts()
    with workplace():
        states, references = {}, {}
        for name in ("cal_ql_continuous", "cql_continuous", "baselines.td3_bc_continuous"):
            references[name], _ = finish(name)
            states[name] = test_runs.read(references[name])
        flags = [*STATE, "--actor-layers", "9", "--critic-layers", "7"]
        assert attempt(lambda: start("cal_ql_continuous", flags))[0] == 0
        states["another size"] = test_runs.read(only_run())
        shutil.rmtree("runs")
        name = "cal_ql_continuous"
        extended = Path(shutil.copytree(references[name], "extended"))
        resume = ["--online-steps", "30", "--resume"]
        assert attempt(lambda: start(name, [*resume, str(extended)]))[0] == 0
        others = {key: state for key, state in states.items() if key != name}
        tries = [("bytes", *item) for item in damage_bytes(rng).items()]
        tries += [("signed", *item) for item in alter_states(states[name], others).items()]
        for kind, what, change in rng.sample(tries, math.ceil(share * len(tries))):
            run = Path(shutil.copytree(references[name], "runs/damaged"))
            path = run / "checkpoint.pt"
            content = path.read_bytes()
            if kind == "bytes":
                path.write_bytes(change(content))
            else:
                state = torch.load(io.BytesIO(content), weights_only=True)
                change(state)
                torch.save(state, path)
                test_runs.sign(path, path.read_bytes())
            before = fingerprint(run)
            code, output = attempt(lambda: start(name, [*resume, str(run)]), 60)  # noqa: B023
            outcome = judge(code, output)
            if outcome == "silent" and code == 0 and equal(run, extended):
                outcome = "equal"
            changed = {file for file in before if fingerprint(run).get(file) != before[file]}
            if Path("pwned").exists() or (outcome == "clear" and path in changed):
                outcome = "lost"
            counts.add(f"{kind}, {what}", outcome, output)
            shutil.rmtree("runs")
    return counts


# --- Kills ------------------------------------------------------------------------------------------------------------
def die_amid(rng: random.Random, calls: int) -> None:
    """In this process, one of the next writings of a file stops after some of its bytes, with a SIGKILL."""
    last, save, write, rename = rng.randrange(1, calls), torch.save, Path.write_text, os.replace
    writings, where, share = itertools.count(1), rng.choice(["save", "write", "before", "after"]), rng.random()

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def part(content: bytes) -> bytes:
        return content[: int(share * len(content))]

    def save_some(state, file) -> None:
        if where == "save" and next(writings) == last:
            whole = io.BytesIO()
            save(state, whole)
            file.write(part(whole.getvalue()))
            file.flush(), kill()
        save(state, file)

    def write_some(path: Path, content: str) -> int:
        if where == "write" and path.name == "eval.csv" and next(writings) == last:
            write(path, part(content.encode()).decode()), kill()
        return write(path, content)

    def rename_or_not(old, new) -> None:
        if where == "before" and next(writings) == last:
            kill()
        rename(old, new)
        if where == "after" and next(writings) == last:
            kill()

    torch.save, Path.write_text, os.replace = save_some, write_some, rename_or_not


def break_kills(share: float, rng: random.Random) -> Counts:
    """Each script in turn, until a hundred were killed: half of them at a random moment, half amid writing."""
    counts, number = Counts(), math.ceil(100 * share)
    with workplace():
        names = list(SCRIPTS)[: max(1, math.ceil(len(SCRIPTS) * min(1, 10 * share)))]
        references = {name: finish(name) for name in names}
        for name in itertools.cycle(names):
            if counts.total() == number:
                return counts
            reference, seconds = references[name]
            amid, seed = rng.random() < 0.5, rng.random()
            child = os.fork()
            if not child:
                log = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(log, 1), os.dup2(log, 2)
                if amid:
                    die_amid(random.Random(seed), 1 + len(test_runs.table(reference)))
                os._exit(start(name, SCRIPTS[name]))
            if not amid:
                time.sleep(rng.uniform(0, seconds))
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            runs = [*Path("runs").iterdir()] if Path("runs").exists() else []
            if os.WIFSIGNALED(status):
                where = "amid writing" if amid else "at a random moment"
                flags = SCRIPTS[name]  # anew where there is no checkpoint yet
                if runs and (runs[0] / "checkpoint.pt").exists():
                    flags = ["--resume", str(runs[0])]
                    where += f", after {test_runs.read(runs[0])['progress']['updates']} updates"
                else:
                    shutil.rmtree("runs", ignore_errors=True)
                code, output = attempt(lambda: start(name, flags))  # noqa: B023
                good = code == 0 and equal(only_run(), reference)
                counts.add(f"{name} {where}", "equal" if good else "lost", output)
            shutil.rmtree("runs", ignore_errors=True)


# --- Signals ----------------------------------------------------------------------------------------------------------
def break_signals(share: float, rng: random.Random) -> Counts:
    """Processes from their start on, with the processes of --eval-async every third time; the whole group is told."""
    counts, name, number = Counts(), "cal_ql_continuous", math.ceil(30 * share)
    with workplace():
        reference, _ = finish(name)
        command = [sys.executable, str(ROOT / f"{name}.py"), *STATE]
        began = time.time()
        subprocess.run(command, capture_output=True, check=True)
        whole = 1.2 * (time.time() - began)
        shutil.rmtree("runs")
        while counts.total() < number:
            k = counts.total()
            signals = [(signal.SIGINT, signal.SIGTERM)[k % 2]] * (1 + (k % 5 == 4))
            moment, pooled = 0.1 + whole * (k + rng.random()) / number, ["--eval-async"] * (k % 3 == 2)
            log = open("output", "w+")
            process = subprocess.Popen(command + pooled, stdout=log, stderr=log, start_new_session=True)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moment)
                whole *= 0.9  # it had ended: the machine is faster now
                shutil.rmtree("runs")
                continue
            for each in signals:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, each)
                time.sleep(0.3)
            code = process.wait(300)
            time.sleep(1)  # the others of its group may still have something to say
            log.seek(0)
            output, ends = log.read(), (0, 2, 128 + signals[0], -signals[0])
            outcome = "traceback" if judge(code, output) == "traceback" else "clear" if code in ends else "silent"
            if outcome == "clear" and [*Path("runs").glob("*/checkpoint.pt")]:
                again, resumed = attempt(lambda: start(name, ["--resume", str(only_run())]))
                outcome = "equal" if again == 0 and equal(only_run(), reference) else "lost"
                output += resumed
            what = f"{signals} after {moment:.1f} of {whole:.1f} s {' '.join(pooled)}, exit code {code}"
            counts.add(what, outcome, output)
            shutil.rmtree("runs", ignore_errors=True)
    return counts


# --- Misuse -----------------------------------------------------------------------------------------------------------
def lines_of(*words: str) -> list[list[str]]:
    return [line.split() for line in words]


def table_of(test) -> list:
    """The cases of a parametrised test."""
    (table,) = (mark.args[1] for mark in test.pytestmark if mark.name == "parametrize")
    return table


NONSENSE = [flags.split() for flags in test_runs.NONSENSE + test_runs.NONSENSE_OF_CQL]
SIZES = lines_of(
    "--buffer-size 1000000000000", "--buffer-size 4611686018427387904", "--batch-size 1000000000000",
    "--batch-size 4611686018427387904", "--critic-layers 1000000 1000000", "--critic-layers 4611686018427387904",
    "--num-critics 1000000000000", "--num-critics 4611686018427387904", "--num-actions 1000000000000",
    "--num-actions 4611686018427387904", "--actor-layers 3000000 3000000", "--threads 100000",
    "--eval-episodes 1000000000", "--seed 99999999999999999999999",
)  # fmt: skip
NAMES = [["--env-id", name] for name in (
    "", "/", "..", "../up-v0", "a/../b-v0", "/etc/passwd-v0", "antmaze", "pick-place/", "pick place", "a b/c-v0",
    "cal-ql/none/here-v0", "cal-ql/pick-place/narrow-v9", "runs", "~/x-v0", "x\ny/z-v0", "$(touch pwned)/a-v0",
)]  # fmt: skip
RESUMES = [["--resume", folder] for folder in ("", ".", "runs", "nowhere", "/", "/dev/null", "/dev", "a\nb", "~")]
UNREADABLE = lines_of("--gama 0.9", "--seed one", "--device tpu", "--actor-layers x", "--gamma", "nonsense", "--resume")
FILMS = {what: spoil for what, spoil in METADATA.items() if what.startswith("code") or what == "no environment"} | {
    "another script": put_at(("script",), lambda _: "../tests/conftest.py"),
    "no agent": put_at(("agent",), lambda _: None),
    "another size": put_at(("agent", "log_alpha"), lambda x: torch.zeros(3)),
    "a setting more": lambda state: state["args"].update(new_setting=3),
    "another task": put_at(("args", "env_id"), lambda _: "nonsense"),
    "code": put_at(("args", "env_id"), lambda _: Code()),
    "no state": lambda state: state.clear(),
}


def with_limit(kind: str, work):
    """work() where files may not grow beyond a size, if that is the kind."""

    def limited():
        if kind == "files":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        return work()

    return limited


def break_misuse(share: float, rng: random.Random) -> Counts:
    counts, names = Counts(), list(SCRIPTS)[:3]
    with workplace() as place:
        tries = [(name, flags) for name in names for flags in NONSENSE + SIZES + NAMES + RESUMES]
        tries = [each for each in tries if each[0] != names[2] or each[1][0] not in "--num-actions --cql-weight "
                 "--online-cql-factor --target-action-gap"]  # which it does not have  # fmt: skip
        for name, flags in rng.sample(tries, math.ceil(share * len(tries))):
            code, output = attempt(lambda: start(name, [*STATE, *flags]), 100)  # noqa: B023
            counts.add(f"{name} {flags}", judge(code, output) if not Path("pwned").exists() else "lost", output)
            shutil.rmtree("runs", ignore_errors=True)
        for flags in rng.sample(UNREADABLE, math.ceil(share * len(UNREADABLE))):  # told by the parser, in a box
            code, output = attempt(lambda: start(names[0], [*STATE, *flags]), 100)  # noqa: B023
            counts.add(f"{flags}", "clear" if code == 2 and "Traceback" not in output else "silent", output)
        break_folders(counts, share, rng)
        break_tools(counts, share, rng)
        shutil.rmtree(place / "runs", ignore_errors=True)
    return counts


def break_folders(counts: Counts, share: float, rng: random.Random) -> None:
    """A full disk, one that cannot be written, a run's folder that disappears, two processes that continue one run."""
    names = list(SCRIPTS)[: max(1, round(share * len(SCRIPTS)))]
    for name in names:
        reference, seconds = finish(name)
        middle = Path(shutil.copytree(reference, "middle"))
        flags = ["--online-steps", "70", "--resume"]
        mounts = ["files"] + (["size=1m", "ro"] if os.getuid() == 0 else [])
        for kind in mounts:
            folder = Path("full")
            folder.mkdir()
            if (
                kind != "files"
                and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]).returncode
            ):
                folder.rmdir()
                continue
            run = Path(shutil.copytree(middle, folder / "run"))
            before = (run / "checkpoint.pt").read_bytes()
            if kind == "size=1m":
                with contextlib.suppress(OSError):
                    (folder / "rest").write_bytes(bytes(2**20))
            if kind == "ro":
                subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
            code, output = attempt(with_limit(kind, lambda: start(name, [*flags, str(run)])))  # noqa: B023
            outcome = judge(code, output)
            if not (run / "checkpoint.pt").exists() or (run / "checkpoint.pt").read_bytes() != before:
                outcome = "lost"
            counts.add(f"{name}, {kind}", outcome, output)
            if kind != "files":
                subprocess.run(["umount", folder], check=True)
            shutil.rmtree(folder)

        def disappear(name=name, reference=reference):
            """The folder of the run is removed at the second evaluation."""
            script = importlib.import_module(name)
            away = functools.partial(shutil.rmtree, "runs")
            script.evaluate = test_runs.at_call(2, script.evaluate, away)
            return start(name, SCRIPTS[name])

        code, output = attempt(disappear)
        counts.add(f"{name}, its folder removed", judge(code, output), output)
        shutil.rmtree("runs", ignore_errors=True)

        run = Path(shutil.copytree(reference, "runs/twice"))
        children = []
        for _ in range(2):
            children.append(os.fork())
            if not children[-1]:
                log = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1), os.dup2(log, 2)
                os._exit(start(name, [*flags, str(run)]))
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert attempt(lambda: start(name, [*flags, str(middle)]))[0] == 0  # noqa: B023
        good = codes == [0, 0] and equal(run, middle)
        counts.add(f"{name}, continued twice at a time", "equal" if good else "lost", Path("output").read_text())
        shutil.rmtree("runs"), shutil.rmtree(middle), Path("output").unlink()


def break_tools(counts: Counts, share: float, rng: random.Random) -> None:
    """benchmark.sh, plot.py and report.py; the sentences are checked by tests/test_files.py and tests/test_plot.py."""
    benchmark = table_of(test_files.test_benchmark_refuses_nonsense_in_one_sentence)
    for flags in rng.sample(benchmark, math.ceil(share * len(benchmark))):
        process = subprocess.run(["bash", ROOT / "benchmark.sh", *flags], capture_output=True, text=True, timeout=60)
        good = process.returncode == 2 and len(process.stderr.splitlines()) == 1 and not process.stdout
        counts.add(f"benchmark.sh {flags}", "clear" if good else "silent", process.stderr)
    plot = importlib.import_module("tools.plot")
    table = table_of(test_plot.test_bad_input)
    for name, content, _ in rng.sample(table, math.ceil(share * len(table))):
        run = Path("plotted", name)
        run.mkdir(parents=True)
        if content is not None:
            (run / "eval.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
        code, output = attempt(lambda: plot.main(["plotted", "--out", "figures"]))
        counts.add(f"plot.py {name} {content}", judge(code, output), output)
        shutil.rmtree("plotted")
    run, source = finish("cal_ql_continuous")[0], Path("minari").absolute()
    state, path = test_runs.read(run), run / "checkpoint.pt"
    for what, change in rng.sample([*FILMS.items()], math.ceil(share * len(FILMS))):
        spoiled = Path(shutil.copytree(source, "spoiled")).absolute()
        os.environ["MINARI_DATASETS_PATH"] = str(spoiled)
        altered = copy.deepcopy(state)
        if what in METADATA:
            change(spoiled / "cal-ql/pick-place/narrow-v0")
        else:
            change(altered)
        torch.save(altered, path)
        test_runs.sign(path, path.read_bytes())
        code, output = attempt(lambda: plot.main(["--film", str(run), "--out", "figures"]))
        counts.add(f"plot.py --film, {what}", "lost" if Path("pwned").exists() else judge(code, output), output)
        shutil.rmtree(spoiled)
    os.environ["MINARI_DATASETS_PATH"] = str(source)


# --- Memory -----------------------------------------------------------------------------------------------------------
def break_memory(share: float, rng: random.Random) -> Counts:
    """100,000 online steps of a tiny network: resident memory from outside, size and time of every checkpoint."""
    steps, rows = int(100_000 * share), []
    flags = f"""--env-id cal-ql/pointmaze/narrow-v0 --episode-length 50 --offline-steps 100 --online-steps {steps}
    --offline-eval-interval 100 --online-eval-interval {steps // 50} --eval-episodes 1 --buffer-size {steps // 2}
    --actor-layers 8 --critic-layers 8 --batch-size 8 --num-actions 2 --device cpu --threads 1""".split()
    script = importlib.import_module("cal_ql_continuous")
    with workplace() as place:
        child = os.fork()
        if not child:
            with open("output", "w") as output, open("saves", "w", buffering=1) as saves:
                os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
                save = script.save

                def timed(run, args, progress, **parts):
                    began = time.perf_counter()
                    save(run, args, progress, **parts)
                    size = (run / "checkpoint.pt").stat().st_size
                    print(progress.env_steps, time.perf_counter() - began, size, file=saves)

                script.save = timed
                os._exit(script.main(flags))
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.2)
            lines = Path("saves").read_text().splitlines() if Path("saves").exists() else []
            if len(lines) > len(rows):
                (memory,) = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{child}/status").read_text()) or ["0"]
                env_steps, seconds, size = map(float, lines[-1].split())
                rows += [(env_steps, int(memory) / 1e3, seconds, size / 1e6)] * (len(lines) - len(rows))
        assert rows[-1][0] >= steps, (place / "output").read_text()[-2000:]
    draw_memory(np.array([row for row in rows if row[1]]))
    half = [row[1] for row in rows if row[0] > steps / 2 and row[1]]
    print(f"MB from {steps // 2} steps on: {min(half):.1f} to {max(half):.1f}; last checkpoint {rows[-1][3]:.2f} MB, "
          f"{max(row[2] for row in rows):.2f} s at most")  # fmt: skip
    return Counts(equal=int(max(half) - min(half) < 5), lost=int(max(half) - min(half) >= 5))


def draw_memory(rows: np.ndarray) -> None:
    """The figure of docs/robustness.md."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6), dpi=120, layout="constrained")
    labels = "resident memory, MB", "size of a checkpoint, MB", "time to write it, ms"
    for ax, label, values in zip(figure.subplots(1, 3), labels, rows.T[[1, 3, 2]], strict=True):
        values = 1000 * values if label.endswith("ms") else values
        ax.plot(rows[:, 0] / 1000, values, linewidth=1)
        ax.set(xlabel="thousand online steps", title=label, ylim=(0, 1.1 * values.max()))
    path = ROOT / "docs" / "figures" / "robustness" / "memory.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


# --- Command line -----------------------------------------------------------------------------------------------------
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["datasets", "checkpoints", "kills", "signals", "misuse", "memory"]
    parser.add_argument("what", nargs="+", choices=names)
    parser.add_argument("--share", type=float, default=1.0, help="share of the tries, from 0 to 1")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    wrong = 0
    for what in args.what:
        began, counts = time.time(), globals()[f"break_{what}"](args.share, random.Random(args.seed))
        print(f"{what}: {counts} ({time.time() - began:.0f} s)", flush=True)
        wrong += counts["traceback"] + counts["silent"] + counts["lost"]
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
