"""Will Cal-QL help here? Looks at a dataset and its environment, and makes a few hundred updates of CQL, in a minute.

    python tools/diagnose.py pick-place                                            # a task, or any Minari dataset id
    python tools/diagnose.py pick-place --datasets cal-ql/pick-place/broad-v0      # flags of the scripts follow

Prints one table, in which **look** marks what may keep the scripts from learning, and draws one picture: returns,
states, the share of the action box that is used, and CQL's mean Q against the mean return with the bound rate (the
paper's figures 3 and 8). The updates are those of cql_continuous.py with the task's settings but for FAST, below, and
critics that begin at the mean return, to see in hundreds of updates which way thousands go. Every tenth episode is held
out of them.
"""

import math
import sys
from collections import namedtuple
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
try:
    import minari
    import numpy as np
    import torch
    import tyro
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    import cql_continuous as script
except ImportError as error:
    print(f"error: {error}; run `pip install -r requirements-dev.txt`.", file=sys.stderr)
    sys.exit(2)

FAST = dict(actor_layers=(256, 256), critic_layers=(256, 256), batch_size=64, num_actions=4, critic_lr=1e-3,
            actor_lr=3e-4, tau=0.02, buffer_size=1)  # fmt: skip
GRID = 20  # cells of the states' plane, each way


@dataclass
class Args:
    dataset: tyro.conf.Positional[str]  # a task's name or a Minari dataset id
    updates: int = 400  # updates of CQL; 0 looks at data and environment alone
    out: Path = Path("figures")  # folder that the picture, diagnosis-<dataset>.png, is written into
    seed: int = 0  # of networks and batches


# The data: Minari's episodes as they are and, of those in use, as the scripts relabel and as they store them.
Case = namedtuple("Case", "args task env no_env raw missing episodes offline")
Finding = namedtuple("Finding", "name value meaning look")  # a row of the table


def finding(name: str, value: str, meaning: str, look: bool = False, fault: str = "") -> Finding:
    """A row whose meaning is `fault` where one should look."""
    return Finding(name, value, fault if look and fault else meaning, bool(look))


def load(name: str, flags: list[str]) -> Case:
    """Raises InputError."""
    args, _ = script.parse_args(["--env-id", name, "--device", "cpu", *flags])
    task, dataset, offline = script.load_data(args)
    raw, episodes, missing, env, no_env = [], [], 0, None, ""
    for source in map(minari.load_dataset, args.datasets or task.datasets):
        raw += source
        episodes += [script.to_episode(data, dataset, task) for data in source]
        missing += source.total_steps - sum(len(data.rewards) for data in source)
    try:
        env = script.make_env(dataset, task, args)
    except script.InputError as error:
        no_env = str(error)
    return Case(args, task, env, no_env, raw, missing, [each for each in episodes if len(each.rewards)], offline)


# --- Data -------------------------------------------------------------------------------------------------------------
def successes_of(case: Case) -> list[np.ndarray]:
    """Success [T] of each raw episode by its infos or, where rewards have two values, by the higher; else none."""
    if all("success" in (data.infos or {}) for data in case.raw):
        return [np.asarray(data.infos["success"][1:], bool) for data in case.raw]  # entry 0 is the reset's
    values = np.unique(np.concatenate([data.rewards for data in case.raw]))
    return [data.rewards == values[1] for data in case.raw] if len(values) == 2 else []


def describe_episodes(case: Case) -> list[Finding]:
    """Lengths, returns, successes."""
    lengths = [len(episode.rewards) for episode in case.episodes]
    returns = [float(episode.rewards.sum()) for episode in case.episodes]
    found = [
        finding("episodes", f"{len(lengths)} of {min(lengths)} to {max(lengths)} steps, {sum(lengths):,} in all",
                "As the scripts train on them, relabelled to the task."),
        finding("steps missing", str(case.missing), "The columns hold all the steps that the metadata count.",
                case.missing != 0, "The columns hold other steps than the metadata count: get the data anew."),
        finding("return", f"{min(returns):.4g} to {max(returns):.4g}, median {np.median(returns):.4g}",
                "The sum of an episode's rewards, before scale and bias.",
                min(returns) == max(returns) and min(lengths) == max(lengths),
                "Every episode has the same length and return: nothing tells better from worse."),
    ]  # fmt: skip
    if case.task.domain == "kitchen":
        counts = np.bincount([int(episode.rewards.max()) for episode in case.episodes], minlength=5)
        return [*found, finding("tasks done", ", ".join(f"{k}: {count}" for k, count in enumerate(counts)),
                                "Episodes by how many of the four tasks they have done at once.",
                                not counts[1:].any())]  # fmt: skip
    succeeded = [bool((episode.rewards > 0).any()) for episode in case.episodes]
    if case.task.domain == "any other":
        succeeded = [bool(success.any()) for success in successes_of(case)]
    share = np.mean(succeeded or [np.nan])  # NaN where neither infos nor rewards of two values tell success
    return [*found, finding("successes", f"{sum(succeeded)} of {len(succeeded)} ({share:.0%})",
                            "The more episodes succeed, the higher is Cal-QL's floor." if succeeded else "Not told.",
                            share < 0.05, "Hardly any: the floor is the value of failure.")]  # fmt: skip


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
    return finding("coverage", value,
                   "Narrow: on such data CQL's Q tends to fall too low (figure 8)." if covered < 0.25 or spread < 0.5
                   else "Broad: CQL's Q may stay calibrated by itself (figure 8).")  # fmt: skip


def describe_actions(case: Case) -> list[Finding]:
    """The share of the action box that is used, what is at its edge and outside, and the environment's own box."""
    actions = np.concatenate([episode.actions for episode in case.episodes])
    low, high = np.quantile(actions, [0.01, 0.99], axis=0).clip(-1, 1)
    shares, edge, outside = (high - low) / 2, np.mean(np.abs(actions) > 0.99), np.mean(np.abs(actions) > 1)
    narrow = shares.mean() < 0.5
    meaning = "From the 1% to the 99% quantile: the policy's -1 and 1 are where the data are."
    if narrow:  # and the weight is fixed
        meaning = "A fixed weight bears the empty rest of the box; --cql-lagrange would switch itself off."
    found = [
        finding("action box used", f"{shares.mean():.0%} (each: {' '.join(f'{share:.0%}' for share in shares)})",
                meaning, narrow and case.args.cql_lagrange,
                "The Lagrange version's target gap of 0.8 presupposes actions that fill the box; here its multiplier "
                "goes to 0 and nothing conservative is left: use --no-cql-lagrange, or declare a narrower box."),
        finding("actions at the edge", f"{edge:.1%}", "Beyond 0.99 of the box; few, so log-densities stay small.",
                edge > 0.2, "Beyond 0.99 of the box: a policy that comes close to them has large log-densities, and "
                "with importance weights its actions count less in the log-sum-exp (measured in docs/tasks.md)."),
        finding("actions clipped", f"{outside:.2%}", "Entries outside of the box, which are clipped to it.",
                outside > 0.05, "Many entries are outside of the box and clipped: the policy imitates other actions."),
    ]  # fmt: skip
    if case.env is not None:
        own, box = case.env.env.action_space, case.env.box
        wider = int(np.sum((box.low < own.low - 1e-6) | (box.high > own.high + 1e-6)))
        found.append(finding("box wider than the environment's", f"{wider} of {len(box.low)} dimensions",
                             "The environment takes all that the data's box allows.", wider > 0,
                             "The environment clips a part of what the policy may do."))  # fmt: skip
    return found


def describe_ends(case: Case) -> list[Finding]:
    """Time-outs that are marked as terminations, and episodes that go on after success."""
    successes, longest = successes_of(case), max(len(data.rewards) for data in case.raw)
    late = 0  # episodes that end at the longest length without a success or a reward above all others there
    for k, data in enumerate(case.raw):
        cause = (successes and successes[k][-1]) or (longest > 1 and data.rewards[-1] > data.rewards[:-1].max())
        late += len(data.rewards) == longest and data.terminations[-1] and not cause
    found = finding("time-outs as terminations", f"{late} of {len(case.raw)}", "No episodes terminate as time is up.",
                    late > 1, f"They end after {longest} steps, the longest length, without a cause.")  # fmt: skip
    if case.task.domain == "kitchen":  # its rewards count, and its episodes are meant to go on
        return [found]

    def goes_on(success: np.ndarray, terminations: np.ndarray) -> bool:
        return bool((success & ~np.asarray(terminations, bool))[:-1].any())

    on = kept = sum(goes_on(success, data.terminations) for success, data in zip(successes, case.raw, strict=False))
    if case.task.domain != "any other":
        kept = sum(goes_on(each.rewards > 0, each.terminations) for each in case.episodes)
    return [found, finding("go on after success", f"{on} of {len(case.raw)}; {kept} as trained on",
                           "Episodes end where they succeed, so sooner is better.", kept > 0,
                           "Their return counts the steps at the goal, not the way there.")]  # fmt: skip


# --- Environment and CQL ----------------------------------------------------------------------------------------------
def start_states(case: Case, agent) -> np.ndarray | None:
    """States [5, 2, O] of the deterministic policy's episodes: at the start, and after twenty steps at most."""
    if case.env is None:
        return None
    played = [script.play_episode(case.env, agent, seed, explore=False, device="cpu")[0] for seed in range(5)]
    return np.array([episode.observations[[0, min(20, len(episode.rewards))]] for episode in played])


def describe_starts(case: Case, states: np.ndarray | None) -> Finding:
    """Whether evaluation episodes differ."""
    if states is None:
        return finding("starts of the environment", "no environment", f"Nothing can be played: {case.no_env}", True)
    first, later = (np.ptp(states[:, k], axis=0).max() for k in (0, 1))
    value = f"differ by {first:.2g} over {len(states)} seeds, by {later:.2g} after 20 steps"
    return finding("starts of the environment", value, "Evaluation episodes differ.", first == later == 0,
                   "Identical: all evaluation episodes are one episode, and the score is a coin.")  # fmt: skip


def run_cql(case: Case, updates: int, seed: int) -> tuple[torch.nn.Module, list[dict]]:
    """An agent whose critics begin at the data's mean return, and what `probe` measures on its way, eleven times."""
    args, held_out = replace(case.args, **FAST), case.offline[9::10]
    sources = {"trained on": [each for k, each in enumerate(case.offline) if k % 10 != 9]}
    sources |= {"held out": held_out} if held_out else {}
    buffers = {name: script.ReplayBuffer(episodes, args) for name, episodes in sources.items()}
    buffer = buffers["trained on"]
    torch.manual_seed(seed)
    agent, optimizer = script.make_agent(case.offline, args)
    for critic in (agent.critic, agent.target_critic):
        torch.nn.init.constant_(critic.biases[-1], buffer.columns.mc_returns[: buffer.num_offline].mean().item())
    rows = []
    for k in range(updates + 1):
        if k % max(1, updates // 10) == 0 or k == updates:
            rows.append({"updates": k, **script.probe(agent, buffer.sample(1024), args)})
        if k < updates:
            script.update(agent, optimizer, args, False, True, buffer.sample(args.batch_size))
    with torch.no_grad():
        rows[-1]["log_density"] = agent.actor.sample(buffer.sample(1024).observations, 4)[1].mean().item()
        for name, batch in {name: each.sample(1024) for name, each in buffers.items()}.items():
            rows[-1][name] = (agent.act(batch.observations, explore=False) - batch.actions).abs().mean().item()
    return agent, rows


def describe_cql(rows: list[dict], case: Case) -> list[Finding]:
    """Bound rate, mean Q against mean return, log-densities, action error, and the answer."""
    first, last, dims = rows[0], rows[-1], case.offline[0].actions.shape[1]
    deviation = np.concatenate([episode.mc_returns for episode in case.offline]).std() + 1e-9
    rate, gap = last["bound_rate"], (last["mean_q"] - last["mean_mc_return"]) / deviation
    if not math.isfinite(last["mean_q"]):
        return [finding("mean Q", "not finite", "CQL diverges at once: look at the scale of rewards and states.", True)]
    share = "Most" if rate > 0.6 else "A good part" if rate > 0.35 else "Few"
    meaning = "Q stays at the return's scale: little has to be corrected online."
    if abs(gap) > 0.2:
        meaning = "Q rises above the return: too much pessimism is not what is wrong here."
    if gap < -0.2:
        meaning = "Q falls below the return: online, untried actions will look better, and CQL unlearns (figure 3)."
    answer = "little", "The maximum seldom acts, so Cal-QL will be much like CQL; what limits either is elsewhere."
    if rate > 0.35:
        answer = "some", "The maximum acts in part; expect Cal-QL to be as good as CQL or better."
    if rate > 0.6 and gap < -0.2:
        answer = "yes", "CQL alone leaves the return's scale on these data, and the maximum holds it there."
    errors = [f"{last[name]:.2f} on episodes {name}" for name in ("trained on", "held out") if name in last]
    return [
        finding("bound rate", f"{first['bound_rate']:.2f} to {rate:.2f}",
                f"{share} of the policy's actions get a Q below the data's return, where Cal-QL's maximum acts."),
        finding("mean Q", f"{first['mean_q']:.4g} to {last['mean_q']:.4g}, mean return {last['mean_mc_return']:.4g}",
                meaning),
        finding("log-densities", f"policy's actions {last['log_density']:.1f}, uniform ones {-dims * math.log(2):.1f}",
                "With importance sampling, a sampled action counts the less the higher this is."),
        finding("action error", ", ".join(errors), "Of the policy, per entry; it has only begun to learn."),
        finding("will Cal-QL help?", *answer),
    ]  # fmt: skip


# --- Picture and table ------------------------------------------------------------------------------------------------
def draw(case: Case, places: np.ndarray, starts: np.ndarray | None, rows: list[dict]) -> Figure:
    fig = Figure(figsize=(13, 3.2), dpi=110, layout="constrained")
    axes = fig.subplots(1, 4)
    fig.suptitle(case.args.env_id, fontsize=11)
    axes[0].hist([float(episode.rewards.sum()) for episode in case.episodes], bins=25, color="#0072B2")
    axes[0].set(title="returns of episodes", xlabel="sum of rewards", ylabel="episodes")

    axes[1].hist2d(*places.T, bins=60, cmin=1, cmap="Blues", norm=LogNorm(vmin=0.2))  # one state is seen, too
    axes[1].set(title="positions" if case.task.domain == "antmaze" else "states, two principal components")
    if starts is not None:
        axes[1].plot(*starts.T, "x", color="#D55E00", label="starts of the environment")
        axes[1].legend(fontsize=7, loc="best")

    actions = np.concatenate([episode.actions for episode in case.episodes])
    low, high = np.quantile(actions, [0.01, 0.99], axis=0)
    axes[2].barh(range(len(low)), high - low, left=low, color="#009E73")
    axes[2].set(title="98% of the actions in their box", xlim=(-1, 1), xlabel="of the box", ylabel="dimension")
    axes[2].invert_yaxis()

    updates, right = [row["updates"] for row in rows], axes[3].twinx()
    axes[3].plot(updates, [row["mean_q"] for row in rows], color="#0072B2", label="mean Q")
    axes[3].plot(updates, [row["mean_mc_return"] for row in rows], "--", color="#555555", label="mean return")
    right.plot(updates, [row["bound_rate"] for row in rows], color="#D55E00", label="bound rate (right)")
    axes[3].set(title="CQL, sped up", xlabel="updates")
    right.set_ylim(0, 1)
    axes[3].legend(handles=[*axes[3].lines, *right.lines], fontsize=7, loc="best")
    return fig


def diagnose(args: Args, flags: list[str]) -> tuple[list[Finding], Path]:
    """All findings, and the picture's path. Raises InputError."""
    case = load(args.dataset, flags)
    centre, directions = plane_of(case)
    places = np.concatenate([episode.observations for episode in case.episodes]) @ directions - centre @ directions
    agent, rows = run_cql(case, args.updates, args.seed)
    states = start_states(case, agent)
    found = [*describe_episodes(case), describe_coverage(case, places), *describe_actions(case), *describe_ends(case)]
    found += [describe_starts(case, states), *(describe_cql(rows, case) if args.updates else [])]
    starts = None if states is None else (states[:, 0] - centre) @ directions
    path = args.out / f"diagnosis-{args.dataset.replace('/', '-')}.png"
    args.out.mkdir(parents=True, exist_ok=True)
    draw(case, places, starts, rows).savefig(path)
    return found, path


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    args, flags = tyro.cli(Args, args=argv, description=__doc__, return_unknown_args=True)
    try:
        if args.updates < 0 or args.seed < 0:
            raise script.InputError("--updates and --seed must be at least 0.")
        found, path = diagnose(args, flags)
    except (script.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("| | value | what it means |\n|---|---|---|")
    for each in found:
        print(f"| {each.name} | {each.value} | {'**look** ' if each.look else ''}{each.meaning} |")
    print(f"\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
