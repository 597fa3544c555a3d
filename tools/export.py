"""Exports a run's policy for a robot or another program: ONNX, a runner that needs NumPy alone, and their contract.

    python tools/export.py runs/<run>                   # into runs/<run>/policy/
    python tools/export.py runs/<run> --episodes 40     # also plays the run's own policy, for a score to compare with

    policy.onnx    observations [B, O] of float32, or frames [B, H, W, C] of uint8, to actions [B, A]
    policy.py      the same from policy.npz with NumPy: `Policy()(observation)`
    policy.json    the contract: order of the observation's entries and their bounds in the data, action box and limits,
                   and how the network's output becomes an action; both policies do that themselves

It is the deterministic policy of the evaluations. Before anything is written, both are compared with the run's agent on
1,000 observations. The run's dataset has to be there: the observation's bounds come from it.
"""

import json
import logging
import shutil
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools import policy as runner  # noqa: E402
from tools.plot import InputError, load_script  # noqa: E402

TOLERANCE = 1e-5  # of an exported action, in units of half the box


class Policy(nn.Module):
    """From observations to the environment's actions; runs on float32 observations [B, O] or frames [B, H, W, C]."""

    def __init__(self, agent: nn.Module, box: gym.spaces.Box, limits: gym.spaces.Box):
        super().__init__()
        actor, layers = agent.actor, []
        if hasattr(agent, "encoder"):
            layers += agent.encoder.net
        if hasattr(actor, "layers"):  # IQL's
            layers += [layer for linear in actor.layers for layer in (linear, nn.ReLU())][:-1]
        else:
            layers += getattr(actor, "net", actor)
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
    """The entries of a flat observation in the scripts' order, as achieved_goal[0]; `keys` choose of a dictionary."""
    if isinstance(space, gym.spaces.Dict):
        parts = [entry_names(space[key], (), f"{name}.{key}".strip(".")) for key in space if not keys or key in keys]
        return [entry for part in parts for entry in part]
    return [f"{name}[{', '.join(map(str, index))}]" for index in np.ndindex(space.shape)]


def load_run(run: Path):
    """The run's script, settings, datasets, environment and agent. Raises InputError."""
    script = load_script(run)
    try:
        checkpoint = script.read_checkpoint(str(run))
        args = script.Args(**checkpoint["args"])
        task = script.find_task(args.env_id)
        datasets = [script.open_dataset(dataset_id) for dataset_id in task.datasets]
        env = script.make_env(datasets[-1], task, args.episode_length)
        agent = script.Agent(*env.observation_space.shape, *env.action_space.shape, args)
        agent.load_state_dict(checkpoint["agent"])
    except script.InputError as error:
        raise InputError(str(error)) from error
    if not hasattr(agent, "actor"):
        raise InputError(f"{run} is a run of {checkpoint['script']}, whose policy acts on its whole past and a return "
                         "to go, not on one observation: it cannot be exported.")  # fmt: skip
    return script, checkpoint, args, task, datasets, env, agent


def make_contract(script, checkpoint: dict, args, task, datasets: list, env: gym.Env, policy: Policy) -> dict:
    """What a user of policy.onnx or policy.py has to know."""
    shape, box, limits = env.observation_space.shape, datasets[-1].action_space, env.env.action_space
    if len(shape) == 3:
        entries = {"order": "[height, width, channel] of uint8", "low_in_data": 0, "high_in_data": 255}
    else:
        states = [episode.observations for episode in script.load_episodes(datasets, task, env)]
        low, high = np.min([each.min(0) for each in states], 0), np.max([each.max(0) for each in states], 0)
        names = entry_names(datasets[-1].observation_space, script.STATE_KEYS.get(task.domain, ()))
        entries = [
            {"entry": name, "low_in_data": a, "high_in_data": b}
            for name, a, b in zip(names, low.tolist(), high.tolist(), strict=True)
        ]
    return {
        "task": args.env_id,
        "script": checkpoint["script"],
        "updates": checkpoint["progress"]["updates"],
        "environment": env.spec and env.spec.id,
        "observation_shape": shape,
        "observation": entries,
        "action_box": {"low": box.low.tolist(), "high": box.high.tolist()},
        "action_limits": {"low": limits.low.tolist(), "high": limits.high.tolist()},
        "action": "low + (output + 1) / 2 * (high - low) of the box, for the output in (-1, 1) of the layers, then "
        "clipped to the limits; policy.onnx and policy.py do both",
        "layers": [type(layer).__name__ for layer in policy.layers],
    }


@torch.no_grad()
def check(folder: Path, agent: nn.Module, contract: dict) -> dict[str, float]:
    """Largest difference of each exported policy from the agent on 1,000 observations, in units of half the box."""
    import onnxruntime

    rng, shape = np.random.default_rng(0), contract["observation_shape"]
    if len(shape) == 3:
        observations = rng.integers(0, 256, (1000, *shape), np.uint8)
    else:
        low, high = ([entry[key] for entry in contract["observation"]] for key in ("low_in_data", "high_in_data"))
        observations = rng.uniform(low, high, (1000, *shape)).astype(np.float32)
    box, limits = contract["action_box"], contract["action_limits"]
    low, high = np.float32(box["low"]), np.float32(box["high"])
    session = onnxruntime.InferenceSession(folder / "policy.onnx")
    numpy_policy = runner.Policy(folder)
    differences = {"ONNX": 0.0, "NumPy": 0.0}
    for batch in np.split(observations, 10):
        action = agent.act(torch.from_numpy(batch), explore=False).numpy()
        action = np.clip(low + (action + 1) / 2 * (high - low), limits["low"], limits["high"])
        made = {"ONNX": session.run(None, {"observation": batch})[0], "NumPy": numpy_policy(batch)}
        for name, values in made.items():
            differences[name] = max(differences[name], float((2 * np.abs(values - action) / (high - low)).max()))
    return differences


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
def play(env: gym.Env, agent: nn.Module, episodes: int) -> float:
    """Mean score of the run's own policy over the seeds 0 to episodes - 1."""
    scores = []
    for seed in range(episodes):
        (state, _), over, scores = env.reset(seed=seed), False, [*scores, 0.0]
        while not over:
            action = agent.act(torch.from_numpy(state).unsqueeze(0), explore=False)[0]
            state, _, terminated, truncated, info = env.step(action.numpy())
            over, scores[-1] = terminated or truncated, max(scores[-1], info["score"])
    return float(np.mean(scores))


# --- Command line -----------------------------------------------------------------------------------------------------
@dataclass
class Args:
    run: tyro.conf.Positional[Path]
    """folder of the run"""
    out: Path | None = None
    """folder to write; the default is `policy` in the run's"""
    episodes: int = 0
    """episodes to play with the run's own policy, of seeds 0, 1, ..."""


def export(args: Args) -> None:
    script, checkpoint, settings, task, datasets, env, agent = load_run(args.run)
    if args.episodes and env.spec is None:
        raise InputError(f"{settings.env_id} names no environment to play in: leave --episodes out.")
    policy = Policy(agent, datasets[-1].action_space, env.env.action_space)
    contract = make_contract(script, checkpoint, settings, task, datasets, env, policy)
    out = args.out or args.run / "policy"
    with tempfile.TemporaryDirectory() as folder:  # nothing is left where the check fails
        write(Path(folder), policy, contract)
        differences = check(Path(folder), agent, contract)
        if not max(differences.values()) <= TOLERANCE:
            raise InputError(f"{args.run}: its exported policy differs from its agent by {differences}; "
                             "this tool does not know such an actor.")  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        for path in Path(folder).iterdir():
            shutil.copy(path, out)
    print(f"{out}: policy.onnx, policy.npz, policy.py, policy.json")
    print("largest difference from the agent's actions, in units of half the box:",
          ", ".join(f"{name} {value:.1e}" for name, value in differences.items()))  # fmt: skip
    if args.episodes:
        print(f"score with torch: {play(env, agent, args.episodes):.3f} over {args.episodes} episodes, "
              f"seeds 0 to {args.episodes - 1}")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    try:
        export(args)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
