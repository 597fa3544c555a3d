"""Will Cal-QL help here? Looks at a dataset and its environment, and makes a few hundred updates of CQL, in a minute.

    python tools/diagnose.py pick-place              # a task, or any Minari dataset id
    python tools/diagnose.py mine/robot-v0 --out figures/robot.png

Prints one table, in which **look** marks what may keep the scripts from learning, and draws one picture: returns,
states, the share of the action box that is used, and CQL's mean Q against the mean return with the bound rate (the
paper's figures 3 and 8). The updates are those of cql_continuous.py with the task's rewards, discount and regulariser,
but sped up, to see in hundreds of updates which way thousands go: two layers of 256, batches of 64, 4 sampled actions,
learning rates of 1e-3 (critics) and 3e-4, targets at a rate of 0.02, and critics that begin at the mean return.
"""

import dataclasses
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch
import tyro
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cql_continuous as script  # noqa: E402
from collect.from_arrays import find_timeouts, rewarded_at_end  # noqa: E402
from cql_continuous import InputError  # noqa: E402

FAST = dict(actor_layers=(256, 256), critic_layers=(256, 256), batch_size=64, num_actions=4, critic_lr=1e-3,
            actor_lr=3e-4, tau=0.02, buffer_size=1)  # fmt: skip
GRID = 20  # cells of the states' plane, each way


@dataclasses.dataclass
class Args:
    dataset: tyro.conf.Positional[str]
    """a task's name or a Minari dataset id"""
    updates: int = 400
    """updates of CQL; 0 looks at data and environment alone"""
    out: Path = Path("figures/diagnosis.png")
    """the picture"""
    seed: int = 0
    """seed of networks and batches"""


@dataclasses.dataclass
class Finding:
    """A row of the table."""

    name: str
    value: str
    meaning: str
    look: bool = False


@dataclasses.dataclass
class Case:
    """A dataset and its task. Of each raw episode: rewards, terminations, and where its infos tell, success [T]."""

    task: script.Task
    args: script.Args
    env: gym.Env | None
    episodes: list[script.Episode]  # as the scripts train on them
    raw: list[SimpleNamespace]
    clipped: float


def load(name: str) -> Case:
    """Raises InputError."""
    task, args = script.find_task(name), script.task_defaults(name)
    datasets = [script.open_dataset(dataset_id) for dataset_id in task.datasets]
    space = datasets[-1].observation_space
    boxes = space.values() if isinstance(space, gym.spaces.Dict) else [space]
    if any(len(box.shape or ()) == 3 for box in boxes):
        raise InputError(f"{name} has images as observations: this tool reads vectors only.")
    env = None
    if task.domain != "any other" or datasets[-1].env_spec is not None:
        env = script.make_env(datasets[-1], task, args.episode_length)
    shape = script.to_state(space.sample(), space).shape if env is None else env.observation_space.shape
    stand_in = SimpleNamespace(observation_space=gym.spaces.Box(-np.inf, np.inf, shape))  # all that loading asks of it
    episodes = script.load_episodes(datasets, task, env or stand_in)
    raw, outside = [], []
    for dataset in datasets:
        for data in dataset.iterate_episodes():
            success = data.infos["success"][1:] if "success" in (data.infos or {}) else None
            raw.append(SimpleNamespace(rewards=data.rewards, terminations=data.terminations, success=success))
            outside.append((data.actions < dataset.action_space.low) | (data.actions > dataset.action_space.high))
    if all(each.success is None for each in raw) and len(np.unique(np.concatenate([r.rewards for r in raw]))) == 2:
        best = max(each.rewards.max() for each in raw)
        for each in raw:  # rewards of two values: the higher one is success
            each.success = each.rewards == best
    return Case(task, args, env, episodes, raw, float(np.concatenate(outside).mean()))


# --- Data -------------------------------------------------------------------------------------------------------------
def describe_episodes(case: Case) -> list[Finding]:
    """Lengths, successes, returns."""
    lengths = [len(episode.rewards) for episode in case.episodes]
    returns = [float(episode.rewards.sum()) for episode in case.episodes]
    same = min(returns) == max(returns) and min(lengths) == max(lengths)
    meaning = "The sum of an episode's rewards, before scale and bias."
    if same:
        meaning = "Every episode has the same length and return: nothing tells better from worse."
    found = [
        Finding("episodes", f"{len(lengths)} of {min(lengths)} to {max(lengths)} steps, {sum(lengths):,} in all",
                "As the scripts train on them, relabelled to the task."),
        Finding("return", f"{min(returns):.4g} to {max(returns):.4g}, median {np.median(returns):.4g}", meaning, same),
    ]  # fmt: skip
    if case.task.domain == "kitchen":
        counts = np.bincount([int(episode.rewards.max()) for episode in case.episodes], minlength=5)
        done = ", ".join(f"{k}: {count}" for k, count in enumerate(counts))
        meaning = "Episodes by how many of the four tasks they have done at once."
        return [*found, Finding("tasks done", done, meaning, not counts[1:].any())]
    if case.task.domain == "any other":
        succeeded = [each.success.any() for each in case.raw if each.success is not None]
    else:
        succeeded = [bool((episode.rewards > 0).any()) for episode in case.episodes]
    if not succeeded:
        return [*found, Finding("successes", "not told", "Neither infos nor rewards of two values tell success.")]
    share = np.mean(succeeded)
    meaning = "Cal-QL's floor is the return of the data: the more episodes succeed, the higher it is."
    if share == 0:
        meaning = "Not one: Cal-QL's floor is the value of failure, and there is nothing to imitate."
    value = f"{sum(succeeded)} of {len(succeeded)} ({share:.0%})"
    return [*found, Finding("successes", value, meaning, share < 0.05)]


def plane_of(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Centre [O] and two directions [O, 2] that states are drawn in: a maze's plane, or the principal components."""
    states = np.concatenate([episode.observations for episode in case.episodes]).astype(np.float64)
    centre, scale = states.mean(0), states.std(0) + 1e-6
    if case.task.domain == "antmaze":
        return np.zeros(states.shape[1]), np.eye(states.shape[1])[:, :2]
    chosen = states[np.random.default_rng(0).integers(len(states), size=5000)]
    _, _, directions = np.linalg.svd((chosen - centre) / scale, full_matrices=False)
    return centre, np.pad(directions[:2], ((0, max(0, 2 - len(directions))), (0, 0))).T / scale[:, None]


def describe_coverage(case: Case, places: np.ndarray) -> Finding:
    """Cells visited, and how much the actions of neighbouring states of different episodes differ."""
    low, high = places.min(0), places.max(0)
    cells = ((places - low) / (high - low + 1e-9) * GRID).astype(int).clip(0, GRID - 1)
    covered = len(np.unique(cells, axis=0)) / GRID**2
    rng, states = np.random.default_rng(0), np.concatenate([each.observations[:-1] for each in case.episodes])
    actions = np.concatenate([episode.actions for episode in case.episodes])
    number = np.repeat(np.arange(len(case.episodes)), [len(each.rewards) for each in case.episodes])
    a, b = rng.integers(len(states), size=500), rng.integers(len(states), size=5000)
    scale = torch.as_tensor(states.std(0) + 1e-6)
    distances = torch.cdist(torch.as_tensor(states[a]) / scale, torch.as_tensor(states[b]) / scale)
    distances[torch.as_tensor(number[a][:, None] == number[b])] = math.inf  # neighbours in time say nothing
    nearest = b[distances.argmin(1).numpy()]
    spread = np.abs(actions[a] - actions[nearest]).mean() / (np.abs(actions[a] - actions[b[:500]]).mean() + 1e-9)
    value = f"{covered:.0%} of {GRID} x {GRID} cells; actions differ {spread:.0%} as much as at random"
    if covered < 0.25 or spread < 0.5:
        return Finding("coverage", value, "Narrow: on such data CQL's Q tends to fall too low (figure 8).")
    return Finding("coverage", value, "Broad: CQL's Q may stay calibrated by itself (figure 8).")


def describe_actions(case: Case) -> list[Finding]:
    """The share of the action box that is used, and what is outside."""
    low, high = np.quantile(np.concatenate([episode.actions for episode in case.episodes]), [0.01, 0.99], axis=0)
    share = float(np.mean(high - low) / 2)
    meaning = "From the 1% to the 99% quantile, mean over dimensions: the policy's -1 and 1 are where the data are."
    if share < 0.5:
        meaning = "Too little: CQL's Lagrange version switches itself off; declare a smaller box (docs/tasks.md)."
    found = [Finding("action box used", f"{share:.0%}", meaning, share < 0.5)]
    meaning = "Entries outside of the box, which are clipped to it."
    if case.clipped > 0.05:
        meaning = (
            "Many entries lie outside of the box and are clipped: the policy imitates other actions than the data's."
        )
    return [*found, Finding("actions clipped", f"{case.clipped:.2%}", meaning, case.clipped > 0.05)]


def describe_ends(case: Case) -> list[Finding]:
    """Time-outs that are marked as terminations, and episodes that go on after success."""
    raw = case.raw
    lengths, terminated = np.array([len(r.rewards) for r in raw]), np.array([bool(r.terminations[-1]) for r in raw])
    rewarded = [rewarded_at_end(r.rewards) or bool(r.success is not None and r.success[-1]) for r in raw]
    count = find_timeouts(lengths, terminated, np.array(rewarded))
    meaning = "No group of episodes terminates without a cause when time is up."
    if count:
        meaning = f"They terminate after {lengths.max()} steps, the longest length, without a cause: value is cut off."
    found = [Finding("time-outs as terminations", f"{count} of {len(raw)}", meaning, count > 0)]
    if case.task.domain == "kitchen":  # its rewards count, and its episodes are meant to go on
        return found

    def goes_on(success: np.ndarray, terminations: np.ndarray) -> bool:
        return bool((success & ~terminations)[:-1].any())

    on = sum(goes_on(r.success.astype(bool), r.terminations) for r in raw if r.success is not None)
    value, kept = f"{on} of {len(raw)}", on
    if case.task.domain != "any other":
        kept = sum(goes_on(each.rewards > 0, each.terminations.astype(bool)) for each in case.episodes)
        value += f"; {kept} as trained on"
    meaning = "An episode ends where it succeeds, so sooner is better."
    if kept:
        meaning = "Success does not end these: their return counts the steps at the goal, not the way there."
    return [*found, Finding("go on after success", value, meaning, kept > 0)]


# --- Environment ------------------------------------------------------------------------------------------------------
def start_states(env: gym.Env, agent: script.Agent, seeds: int = 5, steps: int = 20) -> np.ndarray:
    """States [seeds, 2, O] of the deterministic policy's episodes: at the start, and after some steps."""
    states = []
    for seed in range(seeds):
        (first, _), over, count = env.reset(seed=seed), False, 0
        state = first
        while not over and count < steps:
            with torch.no_grad():
                action = agent.act(torch.from_numpy(state).unsqueeze(0), explore=False)[0].numpy()
            state, _, terminated, truncated, _ = env.step(action)
            over, count = terminated or truncated, count + 1
        states.append((first, state))
    return np.array(states)


def describe_starts(states: np.ndarray | None) -> Finding:
    name = "starts of the environment"
    if states is None:
        return Finding(name, "no environment", "The dataset names none: nothing can be played.")
    first, later = (np.ptp(states[:, k], axis=0).max() for k in (0, 1))
    value = f"differ by {first:.2g} over {len(states)} seeds, by {later:.2g} after 20 steps"
    if first == later == 0:
        meaning = (
            "Identical: all evaluation episodes of a deterministic policy are one episode, and the score is a coin."
        )
        return Finding(name, value, meaning, True)
    return Finding(name, value, "Evaluation episodes differ, so their mean says something.")


# --- CQL --------------------------------------------------------------------------------------------------------------
def make_agent(case: Case, seed: int):
    """An agent whose critics begin at the data's mean return, and the replay."""
    args = dataclasses.replace(case.args, **FAST)
    buffer = script.ReplayBuffer(case.episodes, args, case.task.domain != "any other", torch.device("cpu"))
    torch.manual_seed(seed)
    shapes = case.episodes[0].observations.shape[1:], case.episodes[0].actions.shape[1:]
    agent = script.Agent(*shapes[0], *shapes[1], args)
    mean = buffer.columns.mc_returns[: buffer.num_offline].mean().item()
    for critic in (agent.critic, agent.target_critic):
        torch.nn.init.constant_(critic.biases[-1], mean)
    return agent, buffer, args


def run_cql(agent: script.Agent, buffer: script.ReplayBuffer, args: script.Args, updates: int) -> list[dict]:
    """What `probe` measures on the way, eleven times."""
    optimizer, rows = agent.prepare(buffer, args), []
    for k in range(updates + 1):
        if k % max(1, updates // 10) == 0 or k == updates:
            rows.append({"updates": k, **script.probe(agent, buffer.sample(1024), args)})
        if k < updates:
            script.update(agent, optimizer, args, False, True, buffer.sample(args.batch_size))
    return rows


def describe_cql(rows: list[dict], returns: torch.Tensor) -> list[Finding]:
    """Bound rate, mean Q against mean return, and the answer."""
    first, last, spread = rows[0], rows[-1], returns.std().item() + 1e-9
    rate, gap = last["bound_rate"], (last["mean_q"] - last["mean_mc_return"]) / spread
    if not math.isfinite(last["mean_q"]):
        return [Finding("mean Q", "not finite", "CQL diverges at once: look at the scale of rewards and states.", True)]
    rates = f"{first['bound_rate']:.2f} to {rate:.2f}"
    if rate > 0.6:
        meaning = "Most of the policy's actions get a Q below the data's return: Cal-QL's maximum acts on them."
    elif rate > 0.35:
        meaning = "A good part of the policy's actions gets a Q below the data's return: Cal-QL's maximum acts on them."
    else:
        meaning = "Few of the policy's actions get a Q below the data's return: the maximum seldom acts."
    found = [Finding("bound rate", rates, meaning)]
    values = f"{first['mean_q']:.4g} to {last['mean_q']:.4g}, mean return {last['mean_mc_return']:.4g}"
    if gap < -0.2:
        meaning = "Q falls below the return: online, untried actions will look better, and CQL unlearns (figure 3)."
    elif gap > 0.2:
        meaning = "Q rises above the return: too much pessimism is not what is wrong here."
    else:
        meaning = "Q stays at the return's scale: little has to be corrected online."
    found.append(Finding("mean Q", values, meaning))
    if rate > 0.6 and gap < -0.2:
        answer = "yes", "CQL alone leaves the return's scale on these data, and the maximum holds it there."
    elif rate > 0.35:
        answer = "some", "The maximum acts in part; expect Cal-QL to be as good as CQL or better."
    else:
        answer = "little", "The maximum seldom acts, so Cal-QL will be much like CQL; what limits either is elsewhere."
    return [*found, Finding("will Cal-QL help?", *answer)]


# --- Picture and table ------------------------------------------------------------------------------------------------
def draw(case: Case, name: str, places: np.ndarray, starts: np.ndarray | None, rows: list[dict]) -> Figure:
    fig = Figure(figsize=(13, 3.2), dpi=110, layout="constrained")
    axes = fig.subplots(1, 4)
    fig.suptitle(name, fontsize=11)
    axes[0].hist([float(episode.rewards.sum()) for episode in case.episodes], bins=25, color="#0072B2")
    axes[0].set(title="returns of episodes", xlabel="sum of rewards", ylabel="episodes")

    axes[1].hist2d(*places.T, bins=60, cmin=1, cmap="Blues", norm=LogNorm(vmin=0.2))  # one state is seen, too
    title = "positions" if case.task.domain == "antmaze" else "states, two principal components"
    axes[1].set(title=title, xticks=[], yticks=[])
    if starts is not None:
        axes[1].plot(*starts.T, "x", color="#D55E00", label="starts of the environment")
        axes[1].legend(fontsize=7, loc="best")

    actions = np.concatenate([episode.actions for episode in case.episodes])
    low, high = np.quantile(actions, [0.01, 0.99], axis=0)
    axes[2].barh(range(len(low)), high - low, left=low, color="#009E73")
    axes[2].set(title="98% of the actions in their box", xlim=(-1, 1), xlabel="of the box", ylabel="dimension")
    axes[2].invert_yaxis()

    if not rows:
        axes[3].axis("off")
        return fig
    updates = [row["updates"] for row in rows]
    axes[3].plot(updates, [row["mean_q"] for row in rows], color="#0072B2", label="mean Q")
    axes[3].plot(updates, [row["mean_mc_return"] for row in rows], "--", color="#555555", label="mean return")
    axes[3].set(title="CQL, sped up", xlabel="updates")
    right = axes[3].twinx()
    right.plot(updates, [row["bound_rate"] for row in rows], color="#D55E00", label="bound rate (right)")
    right.set_ylim(0, 1)
    lines = [*axes[3].lines, *right.lines]
    axes[3].legend(lines, [line.get_label() for line in lines], fontsize=7, loc="best")
    return fig


def diagnose(args: Args) -> list[Finding]:
    """All findings; writes the picture. Raises InputError."""
    case = load(args.dataset)
    centre, directions = plane_of(case)
    places = np.concatenate([episode.observations for episode in case.episodes]) @ directions - centre @ directions
    agent, buffer, settings = make_agent(case, args.seed)
    states = None if case.env is None else start_states(case.env, agent)
    rows = run_cql(agent, buffer, settings, args.updates) if args.updates else []
    found = [*describe_episodes(case), describe_coverage(case, places), *describe_actions(case), *describe_ends(case)]
    found.append(describe_starts(states))
    if rows:
        found += describe_cql(rows, buffer.columns.mc_returns[: buffer.num_offline])
    starts = None if states is None else (states[:, 0] - centre) @ directions
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(case, args.dataset, places, starts, rows).savefig(args.out)
    return found


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    try:
        if args.updates < 0 or args.seed < 0:
            raise InputError("--updates and --seed must be at least 0.")
        if args.out.suffix not in (".png", ".pdf", ".svg"):
            raise InputError(f"--out {args.out} must end in .png, .pdf or .svg.")
        found = diagnose(args)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("| | value | what it means |\n|---|---|---|")
    for each in found:
        print(f"| {each.name} | {each.value} | {'**look** ' if each.look else ''}{each.meaning} |")
    print(f"\n{args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
