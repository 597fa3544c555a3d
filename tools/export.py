"""Exports a run's policy for a robot or another program: ONNX, a runner that needs NumPy alone, and their contract.

    python tools/export.py runs/<run>                   # into runs/<run>/policy/
    python tools/export.py runs/<run> --episodes 40     # also plays the run's own policy, for a score to compare with

    policy.onnx    observations [B, O] of float32, or frames [B, H, W, C] of uint8, to actions [B, A]
    policy.py      the same from policy.npz with NumPy: `Policy()(observation)`
    policy.json    the contract: order of the observation's entries and their bounds in the data, action box and limits,
                   and how the network's output becomes an action; both policies do that themselves

It is the deterministic policy of the evaluations. Before anything is written, both are compared with the run's agent on
1,000 observations. The run's dataset has to be there, and its --online-env has to be named again.
"""

import importlib
import json
import logging
import shutil
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "baselines")]
try:
    import gymnasium as gym
    import numpy as np
    import onnx  # noqa: F401  what torch.onnx.export writes with
    import onnxruntime
    import onnxscript  # noqa: F401  what it is made of
    import torch
    import torch.nn as nn
    import tyro

    from tools import policy as runner
except ImportError as error:
    print(f"error: {error}; run `pip install -r requirements-dev.txt`.", file=sys.stderr)
    sys.exit(2)

TOLERANCE = 1e-5  # of an exported action, in units of half the box


class Policy(nn.Module):
    """From observations to the environment's actions; runs on float32 observations [B, O] or frames [B, H, W, C]."""

    def __init__(self, agent: nn.Module, box: gym.spaces.Box, limits: gym.spaces.Box):
        super().__init__()
        layers, net = (
            [*agent.encoder.net] if hasattr(agent, "encoder") else [],
            getattr(agent.actor, "net", agent.actor),
        )
        if hasattr(net, "layers"):  # IQL's
            net = [layer for linear in net.layers for layer in (linear, nn.ReLU())][:-1]
        layers += net
        if isinstance(layers[-1], nn.Linear):  # of the tanh-Gaussian only the mean, the first half
            weight, bias = (values[: box.shape[0]] for values in (layers[-1].weight, layers[-1].bias))
            layers[-1] = nn.Linear(weight.shape[1], box.shape[0])
            layers[-1].weight, layers[-1].bias = nn.Parameter(weight), nn.Parameter(bias)
            layers.append(nn.Tanh())
        self.layers = nn.Sequential(*layers)
        mean, std = (127.5, 255.0) if hasattr(agent, "encoder") else (0.0, 1.0)
        self.register_buffer("mean", getattr(agent, "state_mean", torch.tensor(mean)))
        self.register_buffer("std", getattr(agent, "state_std", torch.tensor(std)))
        bounds = {"box_low": box.low, "box_high": box.high, "clip_low": limits.low, "clip_high": limits.high}
        for name, values in bounds.items():
            self.register_buffer(name, torch.as_tensor(values, dtype=torch.float32))

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        x = (observation.float() - self.mean) / self.std
        x = self.layers(x.permute(0, 3, 1, 2) if x.ndim == 4 else x)
        x = self.box_low + (x + 1) / 2 * (self.box_high - self.box_low)
        return x.clamp(self.clip_low, self.clip_high)


def entry_names(space: gym.Space, keys: tuple[str, ...] = (), name: str = "") -> list[str]:
    """The entries of a flat observation in the scripts' order, as achieved_goal[0]; no `keys` means all."""
    if isinstance(space, gym.spaces.Dict):
        return [entry for k in keys or space for entry in entry_names(space[k], (), f"{name}.{k}".strip("."))]
    return [f"{name}[{', '.join(map(str, index))}]" for index in np.ndindex(space.shape)]


def make_contract(script, checkpoint: dict, args, task, dataset, env: gym.Env, offline: list, policy: Policy) -> dict:
    """What a user of policy.onnx or policy.py has to know."""
    shape, limits = offline[0].observations.shape[1:], env.env.action_space
    entries = {"order": "[height, width, channel] of uint8", "low_in_data": 0, "high_in_data": 255}
    if len(shape) == 1:
        states = [values for each in offline for values in (each.observations, each.next_observations)]
        low, high = np.min([each.min(0) for each in states], 0), np.max([each.max(0) for each in states], 0)
        names = entry_names(dataset.observation_space, script.STATE_KEYS.get(task.domain, ()))
        columns = zip(names, low.tolist(), high.tolist(), strict=True)
        entries = [{"entry": name, "low_in_data": a, "high_in_data": b} for name, a, b in columns]
    return {
        "task": args.env_id,
        "script": Path(script.__file__).name,
        "updates": checkpoint["progress"]["updates"],
        "environment": env.spec.id,
        "observation_shape": shape,
        "observation": entries,
        "action_box": {"low": dataset.action_space.low.tolist(), "high": dataset.action_space.high.tolist()},
        "action_limits": {"low": limits.low.tolist(), "high": limits.high.tolist()},
        "action": "low + (output + 1) / 2 * (high - low) of the box, for the output in (-1, 1) of the layers, then "
        "clipped to the limits; policy.onnx and policy.py do both",
        "layers": [type(layer).__name__ for layer in policy.layers],
    }


def write(folder: Path, policy: Policy, contract: dict) -> None:
    """Writes the four files."""
    shape = contract["observation_shape"]
    example = torch.zeros(2, *shape, dtype=torch.uint8 if len(shape) == 3 else torch.float32)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it names libraries that are not installed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(policy.eval(), (example,), folder / "policy.onnx", input_names=["observation"],
                          output_names=["action"], dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True,
                          external_data=False, verbose=False)  # fmt: skip
    np.savez(folder / "policy.npz", **{name: values.numpy() for name, values in policy.state_dict().items()})
    (folder / "policy.json").write_text(json.dumps(contract, indent=2) + "\n")
    shutil.copy(runner.__file__, folder / "policy.py")


@torch.no_grad()
def check(folder: Path, agent: nn.Module, contract: dict) -> dict[str, float]:
    """Largest difference of each exported policy from the agent on 1,000 observations, in units of half the box."""
    rng, shape = np.random.default_rng(0), contract["observation_shape"]
    if len(shape) == 3:
        observations = rng.integers(0, 256, (1000, *shape), np.uint8)
    else:
        low, high = ([entry[key] for entry in contract["observation"]] for key in ("low_in_data", "high_in_data"))
        observations = rng.uniform(low, high, (1000, *shape)).astype(np.float32)
    box, limits = contract["action_box"], contract["action_limits"]
    low, high = np.float32(box["low"]), np.float32(box["high"])
    wanted = agent.act(torch.from_numpy(observations), explore=False).numpy()
    wanted = np.clip(low + (wanted + 1) / 2 * (high - low), limits["low"], limits["high"])
    session = onnxruntime.InferenceSession(folder / "policy.onnx")
    made = {"ONNX": session.run(None, {"observation": observations})[0], "NumPy": runner.Policy(folder)(observations)}
    return {name: float((2 * np.abs(values - wanted) / (high - low)).max()) for name, values in made.items()}


@dataclass
class Args:
    run: tyro.conf.Positional[Path]  # folder of the run
    out: Path | None = None  # folder to write; the default is `policy` in the run's
    script: str | None = None  # the script that made the run, such as iql_continuous; else the folder's name tells it
    episodes: int = 0  # episodes to play with the run's own policy, of seeds 0, 1, ...


def export(script, args: Args, flags: list[str]) -> None:
    """Raises the script's InputError."""
    settings, checkpoint = script.parse_args(["--resume", str(args.run), "--device", "cpu", *flags])
    task, dataset, offline = script.load_data(settings)
    env = script.make_env(dataset, task, settings)
    agent, _ = script.make_agent(offline, settings)
    limits = env.env.action_space
    try:
        if limits.dtype.kind != "f":
            raise ValueError("the environment takes whole numbers")
        agent.load_state_dict(checkpoint["agent"])
        policy = Policy(agent, dataset.action_space, limits)
    except Exception as error:  # another script's checkpoint, or ODT, whose policy acts on its whole past
        raise script.InputError(f"{args.run} cannot be exported by {script.__name__}: {error!r:.200}.") from error
    contract = make_contract(script, checkpoint, settings, task, dataset, env, offline, policy)
    out = args.out or args.run / "policy"
    with tempfile.TemporaryDirectory() as folder:  # nothing is left where the check fails
        write(Path(folder), policy, contract)
        differences = check(Path(folder), agent, contract)
        if not max(differences.values()) <= TOLERANCE:
            raise script.InputError(f"{args.run}: its exported policy differs from its agent by {differences}; "
                                    "this tool does not know such an actor.")  # fmt: skip
        shutil.copytree(folder, out, dirs_exist_ok=True)
    print(f"{out}: policy.onnx, policy.npz, policy.py, policy.json")
    print("largest difference from the agent's actions, in units of half the box:",
          ", ".join(f"{name} {value:.1e}" for name, value in differences.items()))  # fmt: skip
    if args.episodes:
        played = [script.play_episode(env, agent, seed, False, "cpu") for seed in range(args.episodes)]
        scores = [episode.rewards.sum() if np.isnan(score) else score for episode, score in played]
        print(f"score with torch: {np.mean(scores):.3f} over {args.episodes} episodes, seeds 0 to {args.episodes - 1}")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    args, flags = tyro.cli(Args, args=argv, description=__doc__, return_unknown_args=True)
    words = args.run.resolve().name.split("__")  # <env-id>__<script>__<seed>__<time>
    name = args.script or (words[1] if len(words) == 4 else "")
    if not any((folder / f"{name}.py").exists() for folder in (ROOT, ROOT / "baselines")):
        print(f"error: {args.run} does not tell which script made it: add --script, such as cal_ql_continuous.",
              file=sys.stderr)  # fmt: skip
        return 2
    script = importlib.import_module(name)
    try:
        export(script, args, flags)
    except (script.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
