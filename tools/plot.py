"""Draws the figures and the table that compare runs, from the eval.csv and config.json in each run's folder.

    python tools/plot.py                                            # all of runs/, into figures/
    python tools/plot.py "runs/pick-place__*" --out figures/pick-place
    python tools/plot.py results/*/ --peers peers.csv               # published runs, beside another code base's
    python tools/plot.py --film runs/<run>                          # instead: film.png, an episode of that run's policy

    curves.png       score against online environment steps, one panel a task
    iqm.png          interquartile mean of final score and regret over tasks and seeds, one row an algorithm
    calibration.png  score, mean Q against mean Monte-Carlo return, and the bound rate, before and after the switch
    table.md         offline and online score, regret and seeds of every task and algorithm

A run's folder is <env-id>__<script>__<seed>__<time> or results/<task>/<algorithm>[-<variant>]-seed<k>. A run that has
not reached its last online step is unfinished: it is drawn on its own and is in no mean. Its last step is in
config.json; without that file, the furthest run of the task tells it, to within half an evaluation interval. Of two
runs with the same task, algorithm and seed the later one counts. Peers are a CSV with the columns
algorithm,task,seed,phase,step,score, the score in percent; rows of the tasks and algorithms drawn are drawn dashed.
"""

import csv
import glob
import importlib.util
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator
from rliable import library, metrics

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = "phase,updates,env_steps,score,return,regret,mean_q,mean_mc_return,bound_rate,wall_time".split(",")
PEER_COLUMNS = "algorithm,task,seed,phase,step,score".split(",")
# By script, for folders of runs/, and by the names of benchmark.sh, for folders of results/.
SCRIPTS = {
    "cal_ql_continuous": "Cal-QL",
    "cal_ql_pixels": "Cal-QL",
    "cql_continuous": "CQL",
    "cql_pixels": "CQL",
    "sac_offline_data": "SAC + offline data",
    "sac_pixels": "SAC + offline data",
    "iql_continuous": "IQL",
    "iql_pixels": "IQL",
    "awac_continuous": "AWAC",
    "awac_pixels": "AWAC",
    "td3_bc_continuous": "TD3+BC",
    "odt_continuous": "ODT",
}
ALGORITHMS = {
    "cal_ql": "Cal-QL",
    "cql": "CQL",
    "cql_sac": "CQL+SAC",
    "hybrid_rl": "Hybrid RL",
    "rlpd": "RLPD",
    "sac_offline_data": "SAC + offline data",
    "sac": "SAC",
    "cal_ql_utd20": "Cal-QL at UTD 20",
    "cal_ql_learned": "Cal-QL with learned V",
    "iql": "IQL",
    "o3f": "O3F",
    "awac": "AWAC",
    "td3_bc": "TD3+BC",
    "odt": "ODT",
}
# Okabe and Ito's colours, which colour-blind people can tell apart; their order is that of legends and tables.
COLOURS = {
    "Cal-QL": "#0072B2",
    "CQL": "#D55E00",
    "CQL+SAC": "#CC79A7",
    "Hybrid RL": "#E69F00",
    "RLPD": "#000000",
    "SAC + offline data": "#009E73",
    "SAC": "#56B4E9",
}
OTHER_COLOURS = ("#7F7F7F", "#8C510A", "#332288", "#999933", "#882255")  # for others, in the order of their names
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


# --- Reading ----------------------------------------------------------------------------------------------------------
def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def read_table(path: Path, columns: list[str], text: tuple[str, ...]) -> pd.DataFrame:
    """Reads a CSV with these columns, of which all but `text` hold numbers. Raises InputError where it is damaged."""
    try:
        lines = list(csv.reader(path.read_text(encoding="utf-8").splitlines(), strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a table ({error}).") from error
    if len(lines) < 2:
        raise InputError(f"{path} has no row: it is empty or was cut off.")
    if lines[0] != columns:
        raise InputError(f"{path} is of another make: its columns must be {','.join(columns)}.")
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(columns):
            raise InputError(f"{path}, line {number}: {len(line)} cells instead of {len(columns)}.")
    table = pd.DataFrame(lines[1:], columns=columns)
    for column in (name for name in columns if name not in text):
        values = pd.to_numeric(table[column], errors="coerce").to_numpy(float)
        # Regret is NaN offline and where no success is told; an algorithm may have no Q or no bound rate at all.
        may_miss = column == "regret" or (column in ("mean_q", "bound_rate") and (table[column] == "nan").all())
        missing = may_miss & (table[column] == "nan")
        wrong = np.flatnonzero(~np.isfinite(values) & ~missing)
        if len(wrong):
            cell = table[column][wrong[0]]
            raise InputError(f"{path}, line {wrong[0] + 2}: {column} is {cell!r}, which is no finite number.")
        table[column] = values
    if not table.phase.isin(["offline", "online"]).all():
        raise InputError(f"{path}: every phase must be offline or online.")
    return table


def read_rows(path: Path) -> pd.DataFrame:
    """Reads and checks an eval.csv. Raises InputError."""
    rows = read_table(path, COLUMNS, ("phase",))
    online = (rows.phase == "online").to_numpy()
    steps = np.where(online, rows.env_steps, rows.updates)
    ordered = all(np.all(np.diff(steps[phase]) > 0) and np.all(steps[phase] >= 0) for phase in (online, ~online))
    if online[0] or not ordered or np.any(np.diff(online.astype(int)) < 0) or rows.env_steps[~online].any():
        raise InputError(f"{path}: the rows must be in order, offline ones before online ones, without repetitions.")
    return rows


def name_algorithm(script: str, config: dict) -> str:
    """The algorithm that a script ran with these settings; {} where config.json is missing."""
    usual = 5 if script.endswith("_pixels") else 1
    label, ratio = SCRIPTS.get(script, script), config.get("utd_ratio", usual)
    if script in ("sac_offline_data", "sac_pixels"):
        if config.get("num_critics") == 10:
            return "RLPD"
        label = {-1: label, 0: "SAC"}.get(config.get("mixing_ratio", -1), "Hybrid RL")
    elif config.get("reference_value") == "learned" and label == "Cal-QL":
        label += " with learned V"
    elif config.get("optimistic_actions", 1) > 1:
        label = "O3F"
    elif config.get("online_cql_factor") == 0 and config.get("cql_weight"):
        label += "+SAC"
    return f"{label} at UTD {ratio}" if ratio != usual else label


def read_run(folder: Path) -> Run:
    """Reads a run's folder. Raises InputError for files of another make."""
    try:
        config = dict(json.loads((folder / "config.json").read_text()))
    except (OSError, ValueError, TypeError):
        config = {}
    path = folder.absolute()
    published = re.fullmatch(r"(\w+?)(?:-([\w.-]+))?-seed(\d+)", path.name)
    own = re.fullmatch(r"(.+)__(.+)__(\d+)__(\d+)", path.name)
    if own:
        task, algorithm, seed, time = own[1], name_algorithm(own[2], config), int(own[3]), int(own[4])
    elif published:
        name, variant, seed = published.groups()
        algorithm = ALGORITHMS.get(name, name) + (f" ({variant})" if variant else "")
        task, seed, time = path.parent.name, int(seed), 0
    else:
        raise InputError(
            f"{folder} does not hold a run: its name must be <env-id>__<script>__<seed>__<time> "
            "or results/<task>/<algorithm>-seed<k>."
        )
    goal = config.get("online_steps")
    rows = read_rows(folder / "eval.csv")
    return Run(folder, task, algorithm, seed, time, rows, goal if isinstance(goal, int | float) else None)


def find_runs(patterns: Sequence[str]) -> list[Path]:
    """The folders with an eval.csv that folders or globs name, or that lie up to two levels inside of them."""
    places = {Path(path) for pattern in patterns for path in [pattern, *glob.glob(pattern)]}
    return sorted(
        {path.parent for place in places for deep in ("", "*/", "*/*/") for path in place.glob(deep + "eval.csv")}
    )


def read_runs(patterns: Sequence[str]) -> Groups:
    """Reads the runs that folders or globs name, and marks those that are finished. Raises InputError."""
    folders = find_runs(patterns)
    if not folders:
        raise InputError(f"no eval.csv in {' '.join(patterns)}: name folders of runs, such as runs/*.")
    runs: dict[tuple, Run] = {}
    for run in sorted(map(read_run, folders), key=lambda run: run.time):
        key = run.task, rank(run.algorithm), run.seed
        if key in runs:
            note(f"{runs[key].folder} is skipped: {run.folder} is later, with the same task, algorithm and seed")
        runs[key] = run
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


def base_of(algorithm: str) -> str:
    """The algorithm without its variant: "Cal-QL (small)" is drawn in the colour of Cal-QL, with another line."""
    return algorithm.partition(" (")[0]


def rank(algorithm: str) -> tuple[int, str]:
    """Sorts algorithms as COLOURS does, others after them by name."""
    return (list(COLOURS) + [base_of(algorithm)]).index(base_of(algorithm)), algorithm


def choose_colours(groups: Groups) -> dict[str, str]:
    """The colour of each algorithm that occurs, in the order of legends and rows."""
    names = sorted({name for algorithms in groups.values() for name in algorithms}, key=rank)
    others = iter(OTHER_COLOURS * len(names))
    return {name: COLOURS.get(base_of(name)) or next(others) for name in names}


def line_of(algorithm: str) -> str:
    """Dash-dotted for a variant, as "(small)", and dotted for a variant of one, as "(small.hosted)"."""
    variant = algorithm.removeprefix(base_of(algorithm))
    return ":" if "." in variant else "-." if variant else "-"


@dataclass
class Peers:
    """Another code base's curves. name: the CSV's, for the legend."""

    name: str
    rows: pd.DataFrame

    def curves(self, task: str, algorithm: str, phase: str) -> list[Curve]:
        """One curve a seed, over the steps of the phase; online they start at 0 with the last offline score."""
        rows = self.rows[
            (self.rows.algorithm == algorithm) & (self.rows.task.str.replace(r"-v\d+$", "", regex=True) == task)
        ]
        curves = []
        for _, seed in rows.groupby("seed"):
            own = seed[seed.phase == phase].sort_values("step")
            steps, scores = own.step.to_numpy(), own.score.to_numpy()
            before = seed[seed.phase == "offline"].sort_values("step").score
            if phase == "online" and len(before) and len(own) and steps[0] > 0:
                steps, scores = np.append(0, steps), np.append(before.iloc[-1], scores)
            if len(own):
                curves.append((True, steps, scores))
        return curves


def read_peers(path: Path) -> Peers:
    """Raises InputError."""
    return Peers(path.stem, read_table(path, PEER_COLUMNS, ("algorithm", "task", "phase")))


def has_score(algorithms: dict[str, list[Run]]) -> bool:
    """Whether a task's score is a share in [0, 1]; where an environment tells no success it is the return."""
    scores = pd.concat([run.rows.score for runs in algorithms.values() for run in runs])
    return bool(scores.between(0, 1).all())


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


# --- Figures and table ----------------------------------------------------------------------------------------------


def make_panels(count: int, heights: tuple[float, ...], title: str) -> tuple[Figure, list[list[Axes]]]:
    """A figure with `count` columns of axes, one above the other, at most four columns side by side."""
    down = math.ceil(count / 4)
    across = math.ceil(count / down)
    fig = Figure(figsize=(max(3.8 * across, 6.5), sum(heights) * down + 0.8), layout="constrained", dpi=150)
    fig.suptitle(title, fontsize=10)
    grid = fig.subplots(down * len(heights), across, squeeze=False, height_ratios=heights * down)
    columns = [
        list(grid[row * len(heights) : (row + 1) * len(heights), k]) for row in range(down) for k in range(across)
    ]
    for number, column in enumerate(columns):
        for ax in column:
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(axis="y", color="0.9", linewidth=0.8)
            ax.set_visible(number < count)
    return fig, columns[:count]


def draw_peers(
    ax: Axes, peers: Peers | None, task: str, names: Sequence[str], phase: str, length: float = 1, shift: float = 0
) -> list[str]:
    """Draws the means of the peers' curves dashed, for the algorithms of these names, at steps / length + shift.

    Returns:
        labels of what was drawn.
    """
    labels = []
    for name in dict.fromkeys(map(base_of, names)) if peers else ():
        curves = peers.curves(task, name, phase)
        if curves:
            steps, values = interpolate(curves)
            x = steps / length + shift
            if phase == "offline":
                x[x > 0] = np.nan  # theirs may be longer than ours
            ax.plot(x, values.mean(0), color=COLOURS.get(name, "0.4"), linewidth=1.2, linestyle="--", marker=".")
            before = max(curve[1][-1] for curve in peers.curves(task, name, "offline") or curves)
            after = f", after {COUNT(before)} offline updates" * (phase == "online")
            labels.append(f"{name}, {peers.name} ({len(curves)} seed{'s' * (len(curves) > 1)}{after})")
    return labels


def draw_curves(groups: Groups, reps: int, peers: Peers | None = None) -> Figure:
    """Score against online environment steps, from the offline score at step 0 on; runs still offline are not drawn."""
    fig, panels = make_panels(
        len(groups),
        (3.4,),
        "Online fine-tuning: mean over seeds with 95% bootstrap confidence "
        "interval.\nA thin line that ends in a cross is one unfinished run.",
    )
    colours = choose_colours(groups)
    for (task, algorithms), (ax,) in zip(groups.items(), panels, strict=True):
        unit = 100 if has_score(algorithms) else 1
        for name, runs in algorithms.items():
            tables = [(run.finished, run.rows[len(run.offline) - 1 :]) for run in runs if len(run.online)]
            curves = [(done, rows.env_steps.to_numpy(), unit * rows.score.to_numpy()) for done, rows in tables]
            colour, band = colours[name], lambda v: bootstrap(v[:, None], metrics.aggregate_mean, reps)[1:]
            draw_seeds(ax, curves, band, color=colour, linestyle=line_of(name))
            done = sum(run.finished for run in runs)
            counts = [f"{done} seed{'s' * (done > 1)}"] * (done > 0)
            counts += [f"{len(curves) - done} unfinished"] * (len(curves) > done)
            if curves:
                ax.plot([], [], color=colour, linestyle=line_of(name), label=f"{name} ({', '.join(counts)})")
        if unit == 100 and ax.lines:
            ax.set_xlim(right=1.03 * max(run.rows.env_steps.max() for runs in algorithms.values() for run in runs))
            for label in draw_peers(ax, peers, task, list(algorithms), "online"):
                ax.plot([], [], color=COLOURS.get(label.split(",")[0], "0.4"), linestyle="--", label=label)
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
    done = {
        task: {name: {run.seed: run for run in runs if run.finished} for name, runs in algorithms.items()}
        for task, algorithms in groups.items()
        if has_score(algorithms)
    }
    colours = choose_colours(groups)
    for name in [n for n in colours if all(len(algorithms.get(n, ())) < 2 for algorithms in done.values())]:
        note(f"{name} is not in iqm.png: it has no two finished seeds of any task with a score")
        del colours[name]
    seeds = {
        task: sorted(set.intersection(*[set(algorithms.get(name, ())) for name in colours]))
        for task, algorithms in done.items()
        if colours
    }
    seeds = {task: shared for task, shared in seeds.items() if len(shared) > 1}
    if not seeds:
        note("no iqm.png: it needs two finished seeds of a task, the same for all of its algorithms")
        return None
    count = min(map(len, seeds.values()))  # rliable takes as many seeds of each task; which, may differ
    print(f"iqm.png: {', '.join(f'{task} (seeds {shared[:count]})' for task, shared in seeds.items())}")
    fig, columns = make_panels(
        2,
        (0.7 + 0.42 * len(colours),),
        f"Interquartile mean over {len(seeds)} task"
        f"{'s' * (len(seeds) > 1)} x {count} seeds, with 95% bootstrap confidence interval",
    )
    for row, (name, colour) in enumerate(colours.items()):
        last = [[done[task][name][shared[k]].rows.iloc[-1] for task, shared in seeds.items()] for k in range(count)]
        values = np.array([[(100 * rows.score, rows.regret) for rows in tasks] for tasks in last])  # [seeds, tasks, 2]
        middle, low, high = bootstrap(
            values, lambda v: np.array([metrics.aggregate_iqm(v[..., 0]), metrics.aggregate_iqm(v[..., 1])]), reps
        )
        for k, (ax,) in enumerate(columns):
            ax.plot([low[k], high[k]], [row, row], color=colour, linewidth=9, alpha=0.4, solid_capstyle="butt")
            ax.plot(middle[k], row, "|", color=colour, markersize=12, markeredgewidth=2.5)
            ax.annotate(
                f"{middle[k]:.{2 * k}f}", (middle[k], row), (0, 8), textcoords="offset points", ha="center", fontsize=8
            )
    for (ax,), label, limits in zip(
        columns,
        ["Final score (%), higher is better", "Regret, lower is better"],
        [(-3, 103), (-0.03, 1.03)],
        strict=True,
    ):
        ax.set(xlabel=label, xlim=limits, ylim=(len(colours) - 0.4, -0.7), yticks=range(len(colours)))
        ax.set_yticklabels(colours)
        ax.grid(axis="x", color="0.9", linewidth=0.8)
    columns[1][0].set_yticklabels([])
    return fig


def draw_calibration(groups: Groups, peers: Peers | None = None) -> Figure:
    """Score, mean Q and mean Monte-Carlo return, and bound rate, offline left and online right of the switch.

    The two phases get half of the axis each, for their lengths may differ by a factor of fifty.
    """
    title = "Across the switch: score, Q against returns, bound rate.\n"
    fig, panels = make_panels(
        len(groups), (2.2, 2.6, 1.6), title + "Mean over seeds; band from lowest to highest seed."
    )
    colours = choose_colours(groups)
    for (task, algorithms), axes in zip(groups.items(), panels, strict=True):
        scores, values, rates = axes
        everyone = [run for runs in algorithms.values() for run in runs]
        updates = int(max(run.offline.updates.max() for run in everyone))
        steps = int(max(run.rows.env_steps.max() for run in everyone))
        unit = 100 if has_score(algorithms) else 1
        for k, (name, runs) in enumerate(algorithms.items()):
            switches = [run.offline.updates.max() if len(run.online) else updates for run in runs]
            xs = [
                np.concatenate([(run.offline.updates - switch) / max(updates, 1), run.online.env_steps / max(steps, 1)])
                for run, switch in zip(runs, switches, strict=True)
            ]  # [-1, 0] offline, (0, 1] online
            # CQL and CQL+SAC are one and the same offline: later lines are thinner, and so hide none beneath them.
            solid = dict(linewidth=max(3.2 * 0.65**k, 1.2), linestyle=line_of(name))
            dashed = dict(linewidth=1, linestyle="--")
            for ax, column, factor, style in [
                (scores, "score", unit, solid),
                (values, "mean_q", 1, solid),
                (values, "mean_mc_return", 1, dashed),
                (rates, "bound_rate", 100, solid),
            ]:
                ys = [factor * run.rows[column].to_numpy() for run in runs]
                curves = list(zip([run.finished for run in runs], xs, ys, strict=True))
                if np.isfinite(np.concatenate(ys)).any():
                    draw_seeds(ax, curves, lambda v: (v.min(0), v.max(0)), color=colours[name], **style)
        if unit == 100:
            draw_peers(scores, peers, task, list(algorithms), "offline", max(updates, 1), -1)
            draw_peers(scores, peers, task, list(algorithms), "online", max(steps, 1))
        returns = np.concatenate([np.abs(run.rows.mean_mc_return) for run in everyone])
        if max(np.abs(run.rows.mean_q).max() for run in everyone) > 20 * returns.max():  # some Q diverges
            values.set_yscale("symlog", linthresh=2 * returns.max())
        mark_phases(axes, updates, steps)
        scores.set_title(task, pad=16)
        scores.set_ylabel("Score (%)" if unit == 100 else "Return")
        if unit == 100:
            scores.set_ylim(-3, 103)
        values.set(ylabel="Mean Q (solid),\nmean return (dashed)")
        rates.set(ylabel="Bound rate (%):\nQ below the return", ylim=(-3, 103))
    lines = [Line2D([], [], color=colour, linewidth=2, linestyle=line_of(k), label=k) for k, colour in colours.items()]
    lines += [
        Line2D([], [], color="0.4", linestyle=style, label=f"mean {text}")
        for style, text in [("-", "Q"), ("--", "Monte-Carlo return")]
    ]
    lines += [Line2D([], [], color="0.4", label="unfinished run", **UNFINISHED)]
    fig.legend(handles=lines, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return fig


def mark_phases(axes: Sequence[Axes], updates: int, steps: int) -> None:
    """Ticks, line and words for the two phases, which reach from -1 to 0 and from 0 to 1."""
    nice = MaxNLocator(3).tick_values
    ticks = [(v / max(updates, 1) - 1, v) for v in nice(0, updates) if 0 <= v < 0.75 * updates]
    ticks += [(v / max(steps, 1), v) for v in nice(0, steps) if 0 <= v <= steps]
    lowest = axes[-1]
    for ax in axes:
        ax.set_xlim(-1.03 if updates else -0.03, 1.03)
        ax.set_xticks([x for x, _ in ticks], [COUNT(v) for _, v in ticks] if ax is lowest else [])
        ax.axvline(0, color="0.4", linewidth=1)
    below = [(-0.5, f"offline updates\n({COUNT(updates)} in all)")] * (updates > 0)
    for x, text in [*below, (0.5, "online\nenvironment steps")]:
        place = dict(
            xycoords=lowest.get_xaxis_transform(), textcoords="offset points", ha="center", va="top", fontsize=9
        )
        lowest.annotate(text, (x, 0), (0, -20), **place)
    top = axes[0].get_xaxis_transform()
    axes[0].annotate("switch", (0, 1), (0, 3), top, "offset points", ha="center", fontsize=8)


def summarise(runs: list[Run], unit: float) -> dict[str, float] | None:
    """Means over the finished runs: score at the switch and at the end (times unit), regret; None without any."""
    done = [run for run in runs if run.finished]
    if not done:
        return None
    return {
        "offline": float(unit * np.mean([run.offline.score.iloc[-1] for run in done])),
        "online": float(unit * np.mean([run.online.score.iloc[-1] for run in done])),
        "regret": float(np.mean([run.online.regret.iloc[-1] for run in done])),
        "updates": float(np.mean([run.offline.updates.iloc[-1] for run in done])),
        "env_steps": float(np.mean([run.rows.env_steps.iloc[-1] for run in done])),
        "seeds": len(done),
    }


def make_table(groups: Groups) -> str:
    """Markdown: mean over finished seeds of the score at the switch and at the end in percent, and of the regret."""
    lines = [
        "| task | algorithm | offline | online | regret | seeds | unfinished |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, algorithms in groups.items():
        unit, digits = (100, 0) if has_score(algorithms) else (1, 1)
        for name, runs in algorithms.items():
            means, cells = summarise(runs, unit), ["-", "-", "-", "0"]
            if means:
                cells = [f"{means[key]:.{digits}f}" for key in ("offline", "online")]
                cells += [f"{means['regret']:.2f}" if unit == 100 else "-", str(means["seeds"])]
            lines.append(f"| {' | '.join([task, name, *cells, str(sum(not run.finished for run in runs))])} |")
    return "\n".join(lines) + "\n"


# --- Film strips ------------------------------------------------------------------------------------------------------
def load_script(run: Path):
    """The module of the script that made a run, which its checkpoint names. Raises InputError."""
    import torch

    path = run / "checkpoint.pt"
    try:
        name = torch.load(path, map_location="cpu", weights_only=True)["script"]
        known = {script.name: script for script in [*ROOT.glob("*.py"), *ROOT.glob("baselines/*.py")]}
        spec = importlib.util.spec_from_file_location(known[name].stem, known[name])
    except Exception as error:  # whatever torch raises for a damaged file
        raise InputError(f"{path} is no checkpoint of a script that is here ({error!r:.200}).") from error
    sys.path.append(str(ROOT))  # where `collect` is
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # before its dataclasses are made
    spec.loader.exec_module(module)
    return module


def make_drawn_env(script, dataset, task, args):
    """The script's own environment, which can be rendered."""
    make, drawn = script.gym.make, {"render_mode": "rgb_array"}
    if "render_mode" in inspect.signature(script.make_env).parameters:
        return script.make_env(dataset, task, args.episode_length, **drawn)
    with mock.patch.object(script.gym, "make", lambda env_id, **kwargs: make(env_id, **kwargs | drawn)):
        return script.make_env(dataset, task, args.episode_length)


def aim_camera(env, domain: str) -> None:
    """Shows a maze whole, from above, and the pick-and-place table from close by; other tasks keep their own view."""
    scene = env.unwrapped
    if domain == "antmaze":
        height = 1.15 * scene.maze.maze_size_scaling * max(scene.maze.map_length, scene.maze.map_width)
        camera = {"lookat": np.zeros(3), "distance": height, "azimuth": 90.0, "elevation": -90.0}
        renderer = scene.ant_env.mujoco_renderer
    elif domain == "pick-place":
        camera = importlib.import_module("collect.pick_place").CAMERA
        renderer = scene.mujoco_renderer
    else:
        return
    renderer.camera_id, renderer.default_cam_config = -1, camera  # before its first frame; -1 is a free camera


def play_film(env, agent, seed: int) -> tuple[list[tuple[int, np.ndarray]], list, float]:
    """One deterministic episode: (step, frame [H, W, 3]) of some sixty steps and of the last, all states, the score."""
    import torch

    def picture() -> np.ndarray:  # a policy from pixels is shown what it sees
        return states[-1] if states[-1].ndim == 3 else env.render()

    states, frames, score, over = [env.reset(seed=seed)[0]], [], -math.inf, False
    every = max(1, (env.spec.max_episode_steps or 1000) // 60)
    while not over:
        if (len(states) - 1) % every == 0:
            frames.append((len(states) - 1, picture()))
        with torch.no_grad():
            action = agent.act(torch.from_numpy(states[-1]).unsqueeze(0), explore=False)
        state, _, terminated, truncated, info = env.step(action.squeeze(0).numpy())
        states.append(state)
        over, score = terminated or truncated, max(score, info["score"])
    return [*frames, (len(states) - 1, picture())], states, score


def draw_path(ax: Axes, env, states: list, size: int) -> None:
    """Draws the way of the ant, which is small in a large maze, on a frame [size, size] from above."""
    scene = env.unwrapped.ant_env
    half = scene.mujoco_renderer.default_cam_config["distance"] * math.tan(
        math.radians(scene.model.vis.global_.fovy) / 2
    )
    x, y = np.array([state[:2] for state in states]).T
    places = size / 2 * (1 + x / half), size / 2 * (1 - y / half)
    ax.plot(*places, color="#0072B2", linewidth=1)
    ax.plot(places[0][-1], places[1][-1], "o", color="#0072B2", markersize=3)


def draw_film(run: Path, frames: int, attempts: int) -> Figure:
    """Evenly spaced frames, first and last included, of one episode of a run's policy, deterministic as in evaluations.

    The first success of `attempts` episodes is drawn, whose seeds are 0 and on; without any, the last episode.
    """
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("MUJOCO_GL", "egl")  # draws without a screen; read when MuJoCo is imported
    script = load_script(run)
    try:
        checkpoint = script.read_checkpoint(str(run))
        args = script.Args(**checkpoint["args"])
        task = script.find_task(args.env_id)
        env = make_drawn_env(script, script.open_dataset(task.datasets[-1]), task, args)
        agent = script.Agent(*env.observation_space.shape, *env.action_space.shape, args)
        agent.load_state_dict(checkpoint["agent"])
        aim_camera(env, task.domain)
    except script.InputError as error:
        raise InputError(str(error)) from error
    except Exception as error:  # whatever another program has put into the checkpoint
        raise InputError(f"{run} cannot be drawn: its checkpoint does not fit its script ({error!r:.200}).") from error
    for seed in range(attempts):
        try:
            film, states, score = play_film(env, agent, seed)
        except Exception as error:  # OpenGL fails in many ways
            raise InputError(
                f"{args.env_id} cannot be drawn ({error!r}): on Debian and Ubuntu `apt-get install libegl1 "
                "libegl-mesa0 libgl1-mesa-dri`, and leave MUJOCO_GL unset or egl."
            ) from error
        if score >= 1:
            break
    note(f"episode with seed {seed}, {film[-1][0]} steps, score {score:.2f}")
    fig = Figure(figsize=(1.25 * frames, 1.5), dpi=120, layout="constrained")
    chosen = np.linspace(0, len(film) - 1, frames).round().astype(int)
    for ax, (step, frame) in zip(fig.subplots(1, frames), [film[k] for k in chosen], strict=True):
        ax.imshow(frame, interpolation="nearest")
        if task.domain == "antmaze":
            draw_path(ax, env, states[: step + 1], frame.shape[0])
        ax.set_title(f"step {step}", fontsize=9)
        ax.axis("off")
    env.close()
    return fig


# --- Command line -----------------------------------------------------------------------------------------------------
@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]] = ("runs/*",)
    """folders of runs, folders of such folders, or globs of either"""
    out: Path = Path("figures")
    """folder for the figures and the table"""
    peers: Path | None = None
    """CSV with another code base's curves"""
    film: Path | None = None
    """folder of one run: draw a film strip of its policy and nothing else"""
    frames: int = 9
    """frames of a film strip"""
    attempts: int = 10
    """episodes that are played for a film strip until one succeeds"""
    reps: int = 2000
    """bootstrap resamples"""


def draw_all(groups: Groups, out: Path, reps: int, peers: Peers | None, table: bool = True) -> None:
    """Writes the figures, and the table if wished, into the folder `out`, which is made."""
    out.mkdir(parents=True, exist_ok=True)
    figures = {
        "curves": draw_curves(groups, reps, peers),
        "iqm": draw_iqm(groups, reps),
        "calibration": draw_calibration(groups, peers),
    }
    for name, fig in figures.items():
        (out / f"{name}.png").unlink(missing_ok=True)  # a skipped figure leaves no older one behind
        if fig:
            fig.savefig(out / f"{name}.png")
    if table:
        (out / "table.md").write_text(make_table(groups))


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    try:
        if min(args.frames, args.attempts, args.reps) < 1:
            raise InputError("--frames, --attempts and --reps must be at least 1.")
        if args.film:
            film = draw_film(args.film, args.frames, args.attempts)
            args.out.mkdir(parents=True, exist_ok=True)
            film.savefig(args.out / "film.png")
            return 0
        peers = read_peers(args.peers) if args.peers else None
        groups = read_runs(args.runs)
        draw_all(groups, args.out, args.reps, peers)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(make_table(groups), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
