"""Tries to break the scripts and counts what comes of it; docs/robustness.md has the counts.

    python tests/breaking.py datasets       # spoiled datasets of every kind of task
    python tests/breaking.py checkpoints    # damaged and altered checkpoints
    python tests/breaking.py kills          # SIGKILL at random moments of all scripts, amid writing too
    python tests/breaking.py signals        # Ctrl-C and SIGTERM at random moments
    python tests/breaking.py misuse         # command lines, full disks, folders that disappear

A try is `clear` where it ends in one sentence and exit code 2 (signals: 1), or in Python's own error that names the
file or the episode (a failing disk: in any error). It is `equal` where the run, resumed if need be, ends with the same
eval.csv and checkpoint as an undisturbed one, but for the time. All else is wrong, and the exit code 1: a `traceback`;
`silent` (it ran on, or hung); `lost` (it changed or removed what it was given, or ran code that data named).
--share 0.05 takes every twentieth try; --seed draws other moments and places.
"""

import argparse
import collections
import contextlib
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

os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
warnings.simplefilter("ignore")

import gymnasium as gym  # noqa: E402
import gymnasium_robotics  # noqa: E402, F401
import h5py  # noqa: E402
import minari  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from minari.data_collector import EpisodeBuffer  # noqa: E402
from tqdm import tqdm  # noqa: E402

torch.set_num_threads(1)
gym.register("test/Dot-v0", entry_point="dot_env:DotEnv", max_episode_steps=8)
SCRIPTS = ["cal_ql_continuous", "cql_continuous", "sac_offline_data", "cal_ql_pixels"]
SCRIPTS += [f"baselines.{path.stem}" for path in sorted(ROOT.glob("baselines/*.py"))]
TINY = dict(offline_steps=6, online_steps=40, offline_eval_interval=3, online_eval_interval=16, eval_episodes=1,
            episode_length=8, batch_size=4, actor_layers=4, critic_layers=4, num_actions=2, buffer_size=30,
            latent_dim=4, embedding_dim=4, num_layers=1, num_heads=1, context_length=3, device="cpu")  # fmt: skip


# --- Trying and counting ----------------------------------------------------------------------------------------------
class Counts(collections.Counter):
    def add(self, name: str, outcome: str, output: str = "") -> None:
        self[outcome] += 1
        if outcome not in ("clear", "equal"):
            print(f"{outcome}: {name}\n{output[-1500:]}", flush=True)

    def __str__(self) -> str:
        names = ("clear", "equal", "traceback", "silent", "lost")
        return f"tried {self.total()}, " + ", ".join(f"{name} {self[name]}" for name in names)


def run_script(name: str, flags: list[str]) -> int:
    """What the script's last lines do: trains, and tells an error in one sentence."""
    tqdm.set_lock(threading.RLock())  # its own is shared among forks, and one that is killed may hold it for ever
    script = importlib.import_module(name)
    try:
        script.train(*script.parse_args(flags))
    except (script.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def attempt(work, limit: int = 300) -> tuple[int, str]:
    """Does work() in a fork of this process: its exit code, negative for a signal, and what it printed."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if not child:
            code = 1
            os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
            signal.alarm(limit)
            try:
                code = work()
            except SystemExit as stop:  # of the parser
                code = stop.code
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return code, output.read().decode(errors="replace")


def judge(code: int, output: str, *names: str) -> str:
    """`names` are those of files and episodes, of which Python's own error has to name one."""
    if "Traceback" in output:
        return "clear" if any(name in output.splitlines()[-1] for name in names) else "traceback"
    return "clear" if code == 2 and sum(line.startswith("error: ") for line in output.splitlines()) == 1 else "silent"


def flags_of(name: str, **changes) -> list[str]:
    """A tiny run of both phases, by those of the settings that the script has."""
    settings = {"env_id": "test/dot-v0" if "pixels" in name else "test/pendulum-v0"} | TINY | changes
    known = importlib.import_module(name).Args.__dataclass_fields__
    return [f"--{key.replace('_', '-')}={value}" for key, value in settings.items() if key in known]


def fingerprint(folder: Path) -> dict:
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def whole(run: Path) -> str:
    """The rows of eval.csv and the checkpoint, both without times and the run's own name."""
    rows = [line.rpartition(",")[0] for line in (run / "eval.csv").read_text().splitlines()]
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    for part in (state["progress"], state["args"], *state["progress"]["rows"]):
        part.pop("wall_time", None), part.pop("resume", None)
    return json.dumps([rows, state], default=torch.Tensor.tolist)


def resumed(name: str, reference: Path) -> tuple[str, str]:
    """Goes on from what a stopped run has left, or anew without a checkpoint: the outcome, and what it printed."""
    found = [*Path("runs").glob("*/checkpoint.pt")]
    if not found:
        shutil.rmtree("runs", ignore_errors=True)
    flags = ["--resume", str(found[0].parent)] if found else flags_of(name)
    code, output = attempt(lambda: run_script(name, flags))
    same = code == 0 and all(whole(run) == whole(reference) for run in Path("runs").iterdir())
    return "equal" if same else "lost", output


@contextlib.contextmanager
def workplace():
    """A temporary working folder with three episodes of random steps for every kind of task."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        os.environ["MINARI_DATASETS_PATH"] = str(Path(folder, "minari"))
        for dataset_id, env_id in ENVS.items():
            env, rng, buffers = gym.make(env_id), np.random.default_rng(0), []
            for k in range(3):
                states, steps = [env.reset(seed=k)[0]], np.arange(6)
                actions = rng.uniform(env.action_space.low, env.action_space.high, (6, *env.action_space.shape))
                states += [env.step(action)[0] for action in actions]
                if isinstance(states[0], dict):  # the kitchen's goals are dictionaries again, and are not read
                    states = {key: np.array([state[key] for state in states]) for key in STATES[env_id]}
                if env_id.startswith("AntMaze"):
                    states["achieved_goal"][-1] = -4, 4  # the cell of the goal
                buffers.append(EpisodeBuffer(
                    id=k, observations=states, actions=actions.astype(np.float32), rewards=1.0 * (steps > 3),
                    terminations=steps == 5, truncations=steps > 5, infos={"success": np.arange(7) > 4}))  # fmt: skip
            space = env.observation_space
            if env_id in STATES:
                space = gym.spaces.Dict({key: space[key] for key in STATES[env_id]})
            minari.create_dataset_from_buffers(dataset_id, buffers, env=env.spec, action_space=env.action_space,
                                               observation_space=space, jpeg_encoding=False)  # fmt: skip
        yield Path(folder)


def finish(name: str) -> tuple[Path, float]:
    """An undisturbed run, in a folder of its own, and how long it took."""
    began = time.time()
    code, output = attempt(lambda: run_script(name, flags_of(name)))
    assert code == 0, output
    (run,) = Path("runs").iterdir()
    return Path(shutil.move(run, f"reference-{name}")), time.time() - began


# --- Datasets ---------------------------------------------------------------------------------------------------------
ENVS = {"D4RL/antmaze/umaze-v1": "AntMaze_UMaze-v4", "D4RL/door/human-v2": "AdroitHandDoor-v1",
        "D4RL/door/cloned-v2": "AdroitHandDoor-v1", "D4RL/kitchen/complete-v2": "FrankaKitchen-v1",
        "test/pendulum-v0": "Pendulum-v1", "test/dot-v0": "test/Dot-v0"}  # fmt: skip
STATES = {"AntMaze_UMaze-v4": ["achieved_goal", "observation"], "FrankaKitchen-v1": ["observation"]}
KINDS = {"antmaze-umaze": "D4RL/antmaze/umaze-v1", "door-binary": "D4RL/door/human-v2",
         "kitchen-complete": "D4RL/kitchen/complete-v2", "test/pendulum-v0": "test/pendulum-v0",
         "test/dot-v0": "test/dot-v0"}  # fmt: skip


def put(value: float, place: int):
    return lambda x: np.where(np.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1)) == place % len(x), value, x)


COLUMN = {"missing": None, "a number": lambda x: 1.0, "none": lambda x: x[:0], "one": lambda x: x[:1],
          "short": lambda x: x[:-1], "long": lambda x: np.concatenate([x, x[:3]]), "[T, 1]": lambda x: x[:, None],
          "text": lambda x: np.full(len(x), b"text"), "NaN": put(math.nan, 1),
          "infinite": put(-math.inf, -1)}  # fmt: skip
VECTORS = {"narrow": lambda x: x[..., :-1], "flat": lambda x: x.reshape(len(x), -1)[:, 0],
           "wide": lambda x: np.concatenate([x, x], axis=-1)}  # fmt: skip
FILE = {"missing": None, "empty": lambda x: b"", "half": lambda x: x[: len(x) // 2], "text": lambda x: b"text"}
CODE = {"entry_point": "os:system", "kwargs": {"command": "touch pwned"}}
METADATA = {  # changes of the metadata and of the environment's specification in them
    "unknown environment": lambda data, spec: spec.update(id="Unknown-v0"),
    "another environment": lambda data, spec: spec.update(id="HandReach-v3", kwargs={}),
    "unknown argument": lambda data, spec: spec["kwargs"].update(gravitation=3),
    "code as the entry point": lambda data, spec: spec.update(id="Evil-v0", **CODE),
    "code as a wrapper": lambda data, spec: spec.update(additional_wrappers=[CODE | {"name": "Evil"}]),
    "code in the id": lambda data, spec: spec.update(id="evil_module:Pendulum-v1"),
    "code in an argument": lambda data, spec: spec["kwargs"].update(CODE),
    "no environment": lambda data, spec: spec.clear(),
    "discrete actions": lambda data, spec: data.update(action_space='{"type": "Discrete", "n": 3, "start": 0}'),
    "a box upside down": lambda data, spec: data.update(action_space=data["action_space"].replace("low", "high")),
    "more episodes": lambda data, spec: data.update(total_episodes=9),
    "no spaces": lambda data, spec: data.update(action_space=None, observation_space=None),
}


def spoil(folder: Path, where: str, change) -> None:
    """Changes a file, the metadata, or a column of the second episode: a look at the first alone does not find it."""
    path = folder / "data" / where
    if path.exists():
        content = path.read_bytes()
        path.unlink() if change is None else path.write_bytes(change(content))
    elif where == "metadata":
        path = folder / "data" / "metadata.json"
        metadata = json.loads(path.read_text())
        spec = json.loads(metadata["env_spec"])
        change(metadata, spec)
        path.write_text(json.dumps(metadata | {"env_spec": json.dumps(spec or None)}))
    else:
        with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
            values = file["episode_1"][where][()]
            del file["episode_1"][where]
            if change is not None:
                file["episode_1"][where] = change(values)


def break_datasets(share: float, rng: random.Random) -> Counts:
    counts, tries = Counts(), []
    for env_id, dataset_id in KINDS.items():
        keys = STATES.get(ENVS[dataset_id], [""])
        places = {f"observations/{key}".rstrip("/"): COLUMN | VECTORS for key in keys}
        places |= {"actions": COLUMN | VECTORS | {"a million": lambda x: x + 1e6}, "metadata": METADATA}
        # Adroit's rewards and ends are not read but made of its infos.
        places |= dict.fromkeys(["infos/success"] if env_id == "door-binary" else ["rewards", "terminations"], COLUMN)
        places |= {"metadata.json": FILE, "main_data.hdf5": FILE}
        tries += [(env_id, where, how, change) for where, table in places.items() for how, change in table.items()]
    with workplace() as place:
        source, spoiled = place / "minari", place / "spoiled"
        (place / "evil_module.py").write_text("open('pwned', 'w')")
        for env_id, where, how, change in rng.sample(tries, math.ceil(share * len(tries))):
            os.environ["MINARI_DATASETS_PATH"] = str(spoiled)
            shutil.copytree(source, spoiled)
            spoil(spoiled / KINDS[env_id], where, change)
            before, script = fingerprint(spoiled), "cal_ql_pixels" if env_id == "test/dot-v0" else "cal_ql_continuous"
            flags = flags_of(script, env_id=env_id, offline_steps=2, online_steps=1)
            code, output = attempt(lambda: run_script(script, flags))  # noqa: B023
            lost = fingerprint(spoiled) != before or (place / "pwned").exists()
            outcome = "lost" if lost else judge(code, output, KINDS[env_id], "episode 1")
            counts.add(f"{env_id}, {where}: {how}", outcome, output)
            shutil.rmtree(spoiled), shutil.rmtree("runs", ignore_errors=True)
    return counts


# --- Checkpoints ------------------------------------------------------------------------------------------------------
class Code:
    """Pickled, it makes a file when it is loaded."""

    def __reduce__(self):
        return open, ("pwned", "w")


def flip(content: bytes, rng: random.Random, many: int) -> bytes:
    first, content = rng.randrange(len(content)), bytearray(content)
    for k in range(first, min(first + many, len(content))):
        content[k] ^= 1 + rng.randrange(255)
    return bytes(content)


def damages(state: dict, rng: random.Random) -> list[tuple]:
    """Changes of the bytes of a checkpoint, and of its content, which another program or version might have saved."""
    table = [("bytes", "text", lambda x: b"hello"), ("bytes", "code", lambda x: pickle.dumps(Code()))]
    for place in [0, 0.999999] + [rng.random() for _ in range(40)]:
        table.append(("bytes", f"cut at {place:.3f}", lambda x, place=place: x[: int(place * len(x))]))
        table += [("bytes", f"{many} bytes flipped", lambda x, many=many: flip(x, rng, many)) for many in (1, 100)]
    changes = {"with a row more": lambda x: torch.cat([x, x[:1]]), "flat": lambda x: x.flatten()[:-1],
               "of NaN": lambda x: x * math.nan}  # fmt: skip
    tensors = [("agent", name) for name, value in state["agent"].items() if value.dim()]
    tensors += [("buffer", "online", k) for k in range(len(state["buffer"]["online"]))]
    for *path, last in tensors:
        for how in changes if path[0] == "agent" else ("with a row more", "flat"):

            def change(state, path=path, last=last, how=how) -> None:
                parent = functools.reduce(lambda parent, key: parent[key], path, state)
                parent[last] = changes[how](parent[last])

            table.append(("state", f"{path} {last} {how}", change))
    table += [("state", f"{name} missing", lambda state, name=name: state.pop(name)) for name in state]
    for setting in (dict(gamma=2.0), dict(seed=-1), dict(env_id="../up-v0"), dict(online_env="evil_module:Evil-v0")):
        table.append(("state", str(setting), lambda state, setting=setting: state["args"].update(setting)))
    return table + [("state", "empty", lambda state: state.clear()),
                    ("state", "with code", lambda state: state.update(new=Code())),
                    ("state", "of another dataset", lambda state: state["buffer"]["sizes"].reverse())]  # fmt: skip


def break_checkpoints(share: float, rng: random.Random) -> Counts:
    counts, name, resume = Counts(), "cal_ql_continuous", ["--online-steps", "60", "--resume"]
    with workplace():
        Path("evil_module.py").write_text("open('pwned', 'w')")
        reference, _ = finish(name)
        content = (reference / "checkpoint.pt").read_bytes()
        extended = Path(shutil.copytree(reference, "extended"))
        assert attempt(lambda: run_script(name, [*resume, str(extended)]))[0] == 0
        tries = damages(torch.load(io.BytesIO(content)), rng)
        for kind, what, change in rng.sample(tries, math.ceil(share * len(tries))):
            run = Path(shutil.copytree(reference, "runs/damaged"))
            path, state = run / "checkpoint.pt", torch.load(io.BytesIO(content))
            if kind == "bytes":
                path.write_bytes(change(content))
            else:
                change(state)
                torch.save(state, path)
            before = path.read_bytes()
            code, output = attempt(lambda: run_script(name, [*resume, str(run)]), 60)  # noqa: B023
            outcome = judge(code, output, "checkpoint.pt")
            if code == 0:  # it made no difference
                outcome = "equal" if whole(run) == whole(extended) else "silent"
            if Path("pwned").exists() or (outcome == "clear" and path.read_bytes() != before):
                outcome = "lost"
            counts.add(f"{kind}: {what}", outcome, output)
            shutil.rmtree("runs")
    return counts


# --- Kills and signals ------------------------------------------------------------------------------------------------
def die_amid(rng: random.Random, calls: int) -> None:
    """In this process, one of the next writings of a file is cut short, or just made or not, by a SIGKILL."""
    owner, name = rng.choice([(torch, "save"), (Path, "write_text"), (Path, "replace")])
    write, last, writings, share = getattr(owner, name), rng.randrange(1, calls), itertools.count(1), rng.random()

    def cut(first, second) -> None:
        path = second if owner is torch else first
        due = (name != "write_text" or path.name == "eval.csv") and next(writings) == last
        if not due or share > 0.3:
            write(first, second)
        if due and path.exists():
            os.truncate(path, int(share * path.stat().st_size))
        if due:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, cut)


def break_kills(share: float, rng: random.Random) -> Counts:
    """Each script in turn, until a hundred were killed: half of them at a random moment, half amid writing."""
    counts, number = Counts(), math.ceil(100 * share)
    with workplace():
        references = {name: finish(name) for name in SCRIPTS[:number]}
        for name in itertools.cycle(references):
            if counts.total() == number:
                return counts
            (reference, seconds), amid, seed = references[name], rng.random() < 0.5, rng.random()
            child = os.fork()
            if not child:
                log = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(log, 1), os.dup2(log, 2)
                if amid:
                    die_amid(random.Random(seed), calls=6)
                os._exit(run_script(name, flags_of(name)))
            if not amid:
                time.sleep(rng.uniform(0, seconds))
                os.kill(child, signal.SIGKILL)
            if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
                counts.add(f"{name}, {'amid writing' if amid else 'at a random moment'}", *resumed(name, reference))
            shutil.rmtree("runs", ignore_errors=True)


def break_signals(share: float, rng: random.Random) -> Counts:
    """Processes, from where they have read the data on: one sentence that names --resume, and exit code 1."""
    counts, name, number = Counts(), "cal_ql_continuous", math.ceil(30 * share)
    with workplace():
        reference, seconds = finish(name)
        for attempt_number in range(10 * number):
            if counts.total() >= number:
                break
            kind = (signal.SIGINT, signal.SIGTERM)[attempt_number % 2]
            with open("output", "w") as log:
                command = [sys.executable, ROOT / f"{name}.py", *flags_of(name)]
                process = subprocess.Popen(command, stdout=log, stderr=log)
            while process.poll() is None and "run: " not in Path("output").read_text():
                time.sleep(0.02)
            time.sleep(rng.uniform(0, seconds / 2))
            process.send_signal(kind)
            code, output = process.wait(60), Path("output").read_text()
            if "done: " not in output:  # else it had ended
                clear = code == 1 and sum("--resume" in line for line in output.splitlines()) == 1
                outcome = "clear" if clear else "traceback" if "Traceback" in output else "silent"
                if outcome == "clear":
                    outcome, output = resumed(name, reference)
                counts.add(f"{kind.name}, exit code {code}", outcome, output)
            shutil.rmtree("runs", ignore_errors=True)
    return counts


# --- Misuse -----------------------------------------------------------------------------------------------------------
NONSENSE = """--gamma 1|--gamma 2|--seed -1|--offline-eval-interval 0|--online-eval-interval -3|--gama 0.9|--seed one|
--device tpu|--actor-layers x|--gamma|nonsense|--resume|--resume runs|--resume nowhere|--resume /|--resume /dev/null|
--env-id pick-place/|--env-id ../up-v0|--env-id a/../b-v0|--env-id /etc/passwd-v0|--env-id antmaze|--env-id ~/x-v0|
--env-id cal-ql/none/here-v0|--env-id $(touch${IFS}pwned)/a-v0|--datasets nonsense|--datasets cal-ql/none/here-v0|
--datasets test/dot-v0|--online-env nonsense|--online-env os:system|--online-env evil-v0|--online-env CartPole-v1|
--batch-size x|--online-steps 1e3"""


def break_misuse(share: float, rng: random.Random) -> Counts:
    counts = Counts()
    tries = [(name, line.split()) for name in SCRIPTS[:3] for line in NONSENSE.replace("\n", "").split("|")]
    with workplace():
        for name, flags in rng.sample(tries, math.ceil(share * len(tries))):
            code, output = attempt(lambda: run_script(name, [*flags_of(name), *flags]), 100)  # noqa: B023
            boxed = code == 2 and "╭" in output  # the parser's error
            outcome = "lost" if Path("pwned").exists() else "clear" if boxed else judge(code, output)
            counts.add(f"{name} {flags}", outcome, output)
            shutil.rmtree("runs", ignore_errors=True)
        for name in SCRIPTS[: max(1, round(share * len(SCRIPTS)))]:
            script, reference = importlib.import_module(name), finish(name)[0]

            def on_full_disk(name=name, reference=reference) -> int:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # what is written beyond the limit fails instead
                resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
                return run_script(name, ["--online-steps", "60", "--resume", str(reference)])

            def without_folder(name=name, script=script, evaluate=script.evaluate) -> int:
                script.evaluate = lambda *args: (shutil.rmtree("runs"), evaluate(*args))[1]
                return run_script(name, flags_of(name))

            before = (reference / "checkpoint.pt").read_bytes()
            for what, work in (("full disk", on_full_disk), ("its folder removed", without_folder)):
                code, output = attempt(work)
                kept = (reference / "checkpoint.pt").read_bytes() == before
                counts.add(f"{name}, {what}", "lost" if not kept else "clear" if code in (1, 2) else "silent", output)
                shutil.rmtree("runs", ignore_errors=True)
    return counts


# --- Command line -----------------------------------------------------------------------------------------------------
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = {"datasets": break_datasets, "checkpoints": break_checkpoints, "kills": break_kills,
             "signals": break_signals, "misuse": break_misuse}  # fmt: skip
    parser.add_argument("what", nargs="+", choices=kinds)
    parser.add_argument("--share", type=float, default=1.0, help="share of the tries, from 0 to 1")
    parser.add_argument("--seed", type=int, default=1)
    args, wrong = parser.parse_args(), 0
    for what in args.what:
        began, counts = time.time(), kinds[what](args.share, random.Random(args.seed))
        print(f"{what}: {counts} ({time.time() - began:.0f} s)", flush=True)
        wrong += counts["traceback"] + counts["silent"] + counts["lost"]
    return int(wrong > 0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in its background without it
    sys.exit(main())
