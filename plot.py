"""Draws the figures and the table that compare runs, from the eval.csv in each run's folder.

    python plot.py                                               # all of runs/, into figures/
    python plot.py "runs/pick-place__*" --out figures/pick-place
    python plot.py --film runs/pick-place-pixels__<...>          # instead: film.png, a success of that run's policy

    curves.png       score against online environment steps, one panel a task
    iqm.png          interquartile mean of final score and regret over tasks and seeds, one row an algorithm
    calibration.png  mean Q against mean Monte-Carlo return, and the bound rate, before and after the switch
    table.md         offline -> online score, regret and seeds of every task and algorithm

A run that has not reached its last online step is unfinished: it is drawn on its own and is in no mean. Its last step
is in config.json; without that file, the furthest run of the task tells it, to within half an evaluation interval.
Of two runs with the same task, algorithm and seed the later one counts.
"""

import glob
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator
from rliable import library, metrics

COLUMNS = "phase,updates,env_steps,score,return,regret,mean_q,mean_mc_return,bound_rate,wall_time".split(",")
LABELS = {"cal_ql_continuous": "Cal-QL", "cal_ql_pixels": "Cal-QL", "cql_continuous": "CQL",
          "sac_offline_data": "SAC + offline data"}
# Okabe and Ito's colours, which colour-blind people can tell apart; their order is that of legends and tables.
COLOURS = {"Cal-QL": "#0072B2", "CQL": "#D55E00", "CQL+SAC": "#CC79A7", "Hybrid RL": "#E69F00", "RLPD": "#000000",
           "SAC + offline data": "#009E73", "SAC": "#56B4E9"}
OTHER_COLOURS = ("#7F7F7F", "#8C510A", "#332288", "#999933")  # for other scripts, in the order of their names
UNFINISHED = dict(linewidth=0.8, marker="x", markersize=4, markevery=[-1])
COUNT = EngFormatter(sep="")  # 2500 as 2.5k


class InputError(Exception):
    """Something the user can put right; its message is one sentence that says how."""


@dataclass
class Run:
    """One run. rows: its evaluations in order, the first offline. goal: its last environment step, None if unknown."""

    folder: Path
    task: str
    algorithm: str
    seed: int
    time: int
    rows: pd.DataFrame
    goal: float | None
    finished: bool = False

    @property
    def offline(self) -> pd.DataFrame:
        return self.rows[self.rows.phase == "offline"]

    @property
    def online(self) -> pd.DataFrame:
        return self.rows[self.rows.phase == "online"]


Groups = dict[str, dict[str, list[Run]]]  # runs by task and algorithm
Curve = tuple[bool, np.ndarray, np.ndarray]  # of one run: whether it is finished, x [P] increasing, y [P]

# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def name_algorithm(script: str, config: dict) -> str:
    """The algorithm that a script ran with these settings; {} where config.json is missing."""
    usual = 5 if script == "cal_ql_pixels" else 1
    label, ratio = LABELS.get(script, script), config.get("utd_ratio", usual)
    if script == "sac_offline_data":
        if config.get("num_critics") == 10:
            return "RLPD"
        label = {-1: label, 0: "SAC"}.get(config.get("mixing_ratio", -1), "Hybrid RL")
    elif config.get("online_cql_weight") == 0 and config.get("cql_weight"):
        label += "+SAC"
    return f"{label} at UTD {ratio}" if ratio != usual else label


def read_run(folder: Path) -> Run | None:
    """Reads a run's folder; None where nothing has been evaluated yet. Raises InputError for files of another make."""
    path = folder / "eval.csv"
    try:
        rows = pd.read_csv(path)
    except pd.errors.EmptyDataError:
        rows = pd.DataFrame(columns=COLUMNS)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a table ({type(error).__name__}).") from error
    if list(rows.columns) != COLUMNS:
        raise InputError(f"{path} is of another make: its columns must be {','.join(COLUMNS)}.")
    if rows.empty:
        note(f"{folder} has no evaluation yet and is skipped")
        return None
    try:
        rows[COLUMNS[1:]] = rows[COLUMNS[1:]].astype(float)
        if rows.phase[0] != "offline" or not rows.phase.isin(["offline", "online"]).all() or rows.score.isna().any():
            raise ValueError
        task, script, seed, time = folder.absolute().name.rsplit("__", 3)
        seed, time = int(seed), int(time)
    except ValueError as error:
        raise InputError(f"{folder} does not hold a run: its name must be <env-id>__<script>__<seed>__<time>, and "
                         f"eval.csv hold numbers, the phases offline and online, the first row offline.") from error
    try:
        config = dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError):
        config = {}
    return Run(folder, task, name_algorithm(script, config), seed, time, rows, config.get("online_steps"))


def read_runs(patterns: Sequence[str]) -> Groups:
    """Reads the runs that folders or globs name, and marks those that are finished. Raises InputError."""
    found = {Path(path) for pattern in patterns for path in [pattern, *glob.glob(pattern)]}
    folders = sorted(folder for folder in found if (folder / "eval.csv").exists())
    if not folders:
        raise InputError(f"no eval.csv in {' '.join(patterns)}: name run folders, such as runs/*.")
    runs: dict[tuple, Run] = {}
    for run in sorted(filter(None, map(read_run, folders)), key=lambda run: run.time):
        key = run.task, rank(run.algorithm), run.seed
        if key in runs:
            note(f"{runs[key].folder} is skipped: {run.folder} is later, with the same task, algorithm and seed")
        runs[key] = run
    if not runs:
        raise InputError(f"no run in {' '.join(patterns)} has been evaluated yet.")
    groups: Groups = {}
    for key in sorted(runs):
        groups.setdefault(key[0], {}).setdefault(runs[key].algorithm, []).append(runs[key])
    for task, algorithms in groups.items():
        everyone = [run for group in algorithms.values() for run in group]
        furthest = max(run.rows.env_steps.max() for run in everyone)
        for run in everyone:
            steps = run.online.env_steps.to_numpy()
            interval = np.median(np.diff(steps, prepend=0)) if len(steps) else np.inf
            goal = furthest - interval / 2 if run.goal is None else run.goal
            run.finished = bool(len(steps) and steps[-1] >= goal)
        ends = [run.rows.env_steps.max() for run in everyone if run.finished]
        if ends and max(ends) > 1.5 * min(ends):
            note(f"{task} has finished runs of {min(ends):.0f} and of {max(ends):.0f} steps, which do not compare")
    return groups


def rank(algorithm: str) -> tuple[int, str]:
    """Sorts algorithms as COLOURS does, others after them by name."""
    return (list(COLOURS) + [algorithm]).index(algorithm), algorithm


def choose_colours(groups: Groups) -> dict[str, str]:
    """The colour of each algorithm that occurs, in the order of legends and rows."""
    names = sorted({name for algorithms in groups.values() for name in algorithms}, key=rank)
    others = iter(OTHER_COLOURS * len(names))
    return {name: COLOURS.get(name) or next(others) for name in names}


def has_score(algorithms: dict[str, list[Run]]) -> bool:
    """Whether a task's score is a share in [0, 1]; where an environment tells no success it is the return."""
    online = pd.concat([run.online.regret for runs in algorithms.values() for run in runs])
    return online.empty or online.notna().any()


def interpolate(curves: list[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Brings seeds onto one grid, for episodes are whole and evaluations therefore at different steps.

    The grid is the steps of the seed with most evaluations, cut to the range that all seeds cover, so that no mean is
    over fewer seeds than the legend says; a seed's value between two of its evaluations is on the line that joins them.

    Returns:
        grid [P], and values [seeds, P].
    """
    start, end = max(x[0] for _, x, _ in curves), min(x[-1] for _, x, _ in curves)
    grid = max((x for _, x, _ in curves), key=len)
    grid = np.unique([start, *grid[(grid > start) & (grid < end)], end])
    return grid, np.array([np.interp(grid, x, y) for _, x, y in curves])


def bootstrap(values: np.ndarray, metric: Callable[[np.ndarray], np.ndarray], reps: int) -> np.ndarray:
    """A metric of values [seeds, tasks, P] and the ends of its 95% stratified bootstrap interval: together [3, P]."""
    np.random.seed(0)  # rliable resamples with the global generator, whatever random_state it is given
    points, intervals = library.get_interval_estimates({"": values}, metric, reps=reps)
    return np.stack([points[""], *intervals[""]])


def draw_seeds(ax: Axes, curves: list[Curve], band: Callable, **style) -> None:
    """Draws the mean of the finished runs with a band, and every unfinished run as a thin line that ends in a cross.

    Args:
        band: maps values [seeds, P] of two seeds or more to the lower and upper ends, [P] each.
    """
    finished = [curve for curve in curves if curve[0]]
    if finished:
        grid, values = interpolate(finished)
        ax.plot(grid, values.mean(0), **style)
        if len(finished) > 1:
            ax.fill_between(grid, *band(values), color=style["color"], alpha=0.18, linewidth=0)
    for done, x, y in curves:
        if not done:
            ax.plot(x, y, **style | UNFINISHED)


# ----------------------------------------------------------------------------------------------------------------------
# Figures and table
# ----------------------------------------------------------------------------------------------------------------------


def make_panels(count: int, heights: tuple[float, ...], title: str) -> tuple[Figure, list[list[Axes]]]:
    """A figure with `count` columns of axes, one above the other, at most four columns side by side."""
    down = math.ceil(count / 4)
    across = math.ceil(count / down)
    fig = Figure(figsize=(max(3.8 * across, 6.5), sum(heights) * down + 0.8), layout="constrained", dpi=150)
    fig.suptitle(title, fontsize=10)
    grid = fig.subplots(down * len(heights), across, squeeze=False, height_ratios=heights * down)
    columns = [list(grid[row * len(heights) : (row + 1) * len(heights), k]) for row in range(down)
               for k in range(across)]
    for number, column in enumerate(columns):
        for ax in column:
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(axis="y", color="0.9", linewidth=0.8)
            ax.set_visible(number < count)
    return fig, columns[:count]


def draw_curves(groups: Groups, reps: int) -> Figure:
    """Score against online environment steps, from the offline score at step 0 on; runs still offline are not drawn."""
    fig, panels = make_panels(len(groups), (3.4,), "Online fine-tuning: mean over seeds with 95% bootstrap confidence "
                              "interval.\nA thin line that ends in a cross is one unfinished run.")
    colours = choose_colours(groups)
    for (task, algorithms), (ax,) in zip(groups.items(), panels, strict=True):
        unit = 100 if has_score(algorithms) else 1
        for name, runs in algorithms.items():
            tables = [(run.finished, run.rows[len(run.offline) - 1 :]) for run in runs if len(run.online)]
            curves = [(done, rows.env_steps.to_numpy(), unit * rows.score.to_numpy()) for done, rows in tables]
            colour, band = colours[name], lambda v: bootstrap(v[:, None], metrics.aggregate_mean, reps)[1:]
            draw_seeds(ax, curves, band, color=colour)
            done = sum(run.finished for run in runs)
            counts = [f"{done} seed{'s' * (done > 1)}"] * (done > 0)
            counts += [f"{len(curves) - done} unfinished"] * (len(curves) > done)
            if curves:
                ax.plot([], [], color=colour, label=f"{name} ({', '.join(counts)})")
        ax.set(title=task, xlabel="Online environment steps", ylabel="Score (%)" if unit == 100 else "Return")
        ax.set_xlim(left=0)
        ax.xaxis.set_major_formatter(COUNT)
        if unit == 100:
            ax.set_ylim(-3, 103)
        if ax.lines:
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.23), fontsize=8, frameon=False)
        else:
            ax.set_xticks([])
            ax.text(0.5, 0.5, "no online evaluation yet", transform=ax.transAxes, ha="center", color="0.4")
    return fig


def draw_iqm(groups: Groups, reps: int) -> Figure | None:
    """Interquartile means over the tasks and seeds that all algorithms have finished; None where those are too few."""
    done = {task: {name: {run.seed: run for run in runs if run.finished} for name, runs in algorithms.items()}
            for task, algorithms in groups.items() if has_score(algorithms)}
    colours = choose_colours(groups)
    for name in [n for n in colours if all(len(algorithms.get(n, ())) < 2 for algorithms in done.values())]:
        note(f"{name} is not in iqm.png: it has no two finished seeds of any task with a score")
        del colours[name]
    seeds = {task: sorted(set.intersection(*[set(algorithms.get(name, ())) for name in colours]))
             for task, algorithms in done.items() if colours}
    seeds = {task: shared for task, shared in seeds.items() if len(shared) > 1}
    if not seeds:
        note("no iqm.png: it needs two finished seeds of a task, the same for all of its algorithms")
        return None
    count = min(map(len, seeds.values()))  # rliable takes as many seeds of each task; which, may differ
    print(f"iqm.png: {', '.join(f'{task} (seeds {shared[:count]})' for task, shared in seeds.items())}")
    fig, columns = make_panels(2, (0.7 + 0.42 * len(colours),), f"Interquartile mean over {len(seeds)} task"
                               f"{'s' * (len(seeds) > 1)} x {count} seeds, with 95% bootstrap confidence interval")
    for row, (name, colour) in enumerate(colours.items()):
        last = [[done[task][name][shared[k]].rows.iloc[-1] for task, shared in seeds.items()] for k in range(count)]
        values = np.array([[(100 * rows.score, rows.regret) for rows in tasks] for tasks in last])  # [seeds, tasks, 2]
        middle, low, high = bootstrap(
            values, lambda v: np.array([metrics.aggregate_iqm(v[..., 0]), metrics.aggregate_iqm(v[..., 1])]), reps)
        for k, (ax,) in enumerate(columns):
            ax.plot([low[k], high[k]], [row, row], color=colour, linewidth=9, alpha=0.4, solid_capstyle="butt")
            ax.plot(middle[k], row, "|", color=colour, markersize=12, markeredgewidth=2.5)
            ax.annotate(f"{middle[k]:.{2 * k}f}", (middle[k], row), (0, 8), textcoords="offset points", ha="center",
                        fontsize=8)
    for (ax,), label, limits in zip(columns, ["Final score (%), higher is better", "Regret, lower is better"],
                                    [(-3, 103), (-0.03, 1.03)], strict=True):
        ax.set(xlabel=label, xlim=limits, ylim=(len(colours) - 0.4, -0.7), yticks=range(len(colours)))
        ax.set_yticklabels(colours)
        ax.grid(axis="x", color="0.9", linewidth=0.8)
    columns[1][0].set_yticklabels([])
    return fig


def draw_calibration(groups: Groups) -> Figure:
    """Mean Q and mean Monte-Carlo return, and beneath them the bound rate, offline left and online right of the switch.

    The two phases get half of the axis each, for their lengths may differ by a factor of fifty.
    """
    fig, panels = make_panels(len(groups), (3.0, 1.9), "Calibration: Q-values against the returns of the sampled "
                              "rows.\nMean over seeds; band from lowest to highest seed.")
    colours = choose_colours(groups)
    for (task, algorithms), (values, rates) in zip(groups.items(), panels, strict=True):
        everyone = [run for runs in algorithms.values() for run in runs]
        updates = int(max(run.offline.updates.max() for run in everyone))
        steps = int(max(run.rows.env_steps.max() for run in everyone))
        for k, (name, runs) in enumerate(algorithms.items()):
            switches = [run.offline.updates.max() if len(run.online) else updates for run in runs]
            xs = [np.concatenate([(run.offline.updates - switch) / max(updates, 1),  # [-1, 0]
                                  run.online.env_steps / max(steps, 1)])  # (0, 1]
                  for run, switch in zip(runs, switches, strict=True)]
            # CQL and CQL+SAC are one and the same offline: later lines are thinner, and so hide none beneath them.
            solid, dashed = dict(linewidth=max(3.2 * 0.65**k, 1.2)), dict(linewidth=1, linestyle="--")
            for ax, column, unit, style in [(values, "mean_q", 1, solid), (values, "mean_mc_return", 1, dashed),
                                            (rates, "bound_rate", 100, solid)]:
                ys = [unit * run.rows[column].to_numpy() for run in runs]
                curves = list(zip([run.finished for run in runs], xs, ys, strict=True))
                draw_seeds(ax, curves, lambda v: (v.min(0), v.max(0)), color=colours[name], **style)
        nice = MaxNLocator(3).tick_values
        ticks = [(v / max(updates, 1) - 1, v) for v in nice(0, updates) if 0 <= v < 0.75 * updates]
        ticks += [(v / max(steps, 1), v) for v in nice(0, steps) if 0 <= v <= steps]
        for ax in (values, rates):
            ax.set_xlim(-1.03 if updates else -0.03, 1.03)
            ax.set_xticks([x for x, _ in ticks], [COUNT(v) for _, v in ticks] if ax is rates else [])
            ax.axvline(0, color="0.4", linewidth=1)
        below = [(-0.5, f"offline updates\n({COUNT(updates)} in all)")] * (updates > 0)
        for x, text in [*below, (0.5, "online\nenvironment steps")]:
            rates.annotate(text, (x, 0), (0, -20), rates.get_xaxis_transform(), "offset points", ha="center", va="top",
                           fontsize=9)
        values.annotate("switch", (0, 1), (0, 3), values.get_xaxis_transform(), "offset points", ha="center",
                        fontsize=8)
        values.set_title(task, pad=16)
        values.set(ylabel="Mean Q (solid),\nmean return (dashed)")
        rates.set(ylabel="Bound rate (%):\nQ below the return", ylim=(-3, 103))
    lines = [Line2D([], [], color=colour, linewidth=2, label=name) for name, colour in colours.items()]
    lines += [Line2D([], [], color="0.4", linestyle=style, label=f"mean {text}")
              for style, text in [("-", "Q"), ("--", "Monte-Carlo return")]]
    lines += [Line2D([], [], color="0.4", label="unfinished run", **UNFINISHED)]
    fig.legend(handles=lines, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return fig


def make_table(groups: Groups) -> str:
    """Markdown: mean over finished seeds of the score at the switch and at the end in percent, and of the regret."""
    lines = ["| task | algorithm | score in %, offline -> online | regret | seeds | unfinished |",
             "|---|---|---|---|---|---|"]
    for task, algorithms in groups.items():
        unit, digits, suffix = (100, 0, "") if has_score(algorithms) else (1, 1, " (return)")
        for name, runs in algorithms.items():
            done, score, regret = [run for run in runs if run.finished], "-", "-"
            if done:
                before = unit * np.mean([run.offline.score.iloc[-1] for run in done])
                after = unit * np.mean([run.online.score.iloc[-1] for run in done])
                score = f"{before:.{digits}f} -> {after:.{digits}f}{suffix}"
                regret = f"{np.mean([run.online.regret.iloc[-1] for run in done]):.2f}".replace("nan", "-")
            lines.append(f"| {task} | {name} | {score} | {regret} | {len(done)} | {len(runs) - len(done)} |")
    return "\n".join(lines) + "\n"


def draw_film(run: str, frames: int = 9, attempts: int = 50) -> Figure:
    """Evenly spaced frames, first and last included, of the first successful episode of a run of cal_ql_pixels.py.

    The policy is the checkpoint's, deterministic as in evaluations; the episodes' seeds are 0 and on.
    """
    import cal_ql_pixels as script

    try:
        checkpoint = script.read_checkpoint(run)
        args = script.Args(**checkpoint["args"])
        dataset = script.open_dataset(script.find_task(args.env_id).datasets[-1])
        env = script.make_env(dataset, args.episode_length)
    except script.InputError as error:
        raise InputError(str(error)) from error
    pixels, vector = env.reset()[0]
    agent = script.Agent(pixels.shape, len(vector), env.action_space.shape[0], args)
    agent.load_state_dict(checkpoint["agent"])
    for seed in range(attempts):
        episode, score = script.roll_out(env, agent, seed, False, lambda: None)
        if score:
            break
    else:
        raise InputError(f"{run}'s policy has no success in {attempts} episodes: train it longer")
    env.close()
    note(f"episode with seed {seed}, {len(episode.rewards)} steps")
    fig = Figure(figsize=(1.25 * frames, 1.5), dpi=120, layout="constrained")
    for ax, step in zip(fig.subplots(1, frames), np.linspace(0, len(episode.rewards), frames).round(), strict=True):
        ax.imshow(episode.observations.pixels[int(step)], interpolation="nearest")
        ax.set_title(f"step {step:.0f}", fontsize=9)
        ax.axis("off")
    return fig


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]] = ("runs/*",)
    """folders of runs, or globs of them"""
    out: Path = Path("figures")
    """folder for the figures and the table"""
    film: Path | None = None
    """folder of one run of cal_ql_pixels.py: draw a film strip of its policy and nothing else"""
    reps: int = 2000
    """bootstrap resamples"""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    try:
        if args.film:
            film = draw_film(str(args.film))
            args.out.mkdir(parents=True, exist_ok=True)
            film.savefig(args.out / "film.png")
            return 0
        groups = read_runs(args.runs)
        args.out.mkdir(parents=True, exist_ok=True)
        figures = {"curves": draw_curves(groups, args.reps), "iqm": draw_iqm(groups, args.reps),
                   "calibration": draw_calibration(groups)}
        for name, fig in figures.items():
            (args.out / f"{name}.png").unlink(missing_ok=True)  # a skipped figure leaves no older one behind
            if fig:
                fig.savefig(args.out / f"{name}.png")
        (args.out / "table.md").write_text(make_table(groups))
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(make_table(groups), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
