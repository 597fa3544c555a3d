"""Draws runs from the eval.csv and config.json in their folders.

    python tools/plot.py                                   # all of runs/, into figures/
    python tools/plot.py "runs/pick-place__*" --out curves # some of them, into another folder
    python tools/plot.py results/*/ --peers peers.csv      # published runs, beside another code base's
    python tools/plot.py --run runs/<run>                  # one run: run.png, and in four lines how well it did
    python tools/plot.py --film runs/<run>                 # film.png, an episode of that run's policy
    python tools/plot.py --values runs/<run> runs/<run>    # values.png, for mazes: max_a Q(s, a) beside the returns

    curves.png       score against online environment steps, one panel a task
    calibration.png  Cal-QL and CQL across the switch: score, mean Q against the data's mean return, bound rate
    iqm.png          interquartile mean of final score and regret over the finished seeds of each task and of all
    table.md         offline and online score, regret and seeds of every task and group

Runs are one group if their config.json say the same, but for the seed and what learning does not depend on. A group
that differs from its task's settings is named by what differs, as "Cal-QL, cql_weight 1"; where a task has none, as
your own data's, by what tells the groups apart. Published runs, results/<task>/<algorithm>[-<variant>]-seed<k>, are
named by their variant instead, and their lengths are read off the axes. A run that has not come to its last step is
unfinished: it is drawn on its own and is in no mean. Of runs of one group and seed a finished one counts before an
unfinished one, and then the later. Peers are a CSV with the columns algorithm,task,seed,phase,step,score, the score
in percent; they are drawn dashed beside our runs of the same names.
"""

import glob
import importlib
import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

try:
    import numpy as np
    import pandas as pd
    import tyro
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator
    from rliable import library, metrics
except ImportError as error:
    print(f"error: a package is missing ({error}): pip install -r requirements-dev.txt", file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # where the scripts and `collect` are
RESULTS = ROOT / "results"
ROWS = "phase updates env_steps score mean_q mean_mc_return bound_rate wall_time".split()  # an eval.csv may have more
PEER_COLUMNS = "algorithm task seed phase step score".split()
# The algorithm of each script at its own settings ...
SCRIPTS = {"cal_ql_continuous": "Cal-QL", "cal_ql_pixels": "Cal-QL", "cal_ql_learned_value": "Cal-QL with learned V",
    "cql_continuous": "CQL", "cql_pixels": "CQL", "sac_offline_data": "Hybrid RL", "sac_pixels": "Hybrid RL",
    "iql_continuous": "IQL", "iql_pixels": "IQL", "awac_continuous": "AWAC", "awac_pixels": "AWAC",
    "td3_bc_continuous": "TD3+BC", "odt_continuous": "ODT"}  # fmt: skip
# ... and the algorithms that are made of these by settings, which their names then stand for.
HIGH_UTD = dict(num_critics=10, critic_layer_norm=True, actor_reduce="mean", utd_ratio=20, actor_interval=20)
RLPD = dict(actor_layers=[256] * 3, critic_layers=[256] * 3, target_entropy_scale=-0.5, backup_entropy=False)
MADE_OF = {
    "CQL+SAC": ("CQL", dict(online_cql_factor=0)),
    "SAC + offline data": ("Hybrid RL", dict(mixing_ratio=-1)),
    "SAC": ("Hybrid RL", dict(mixing_ratio=0)),
    "RLPD": ("Hybrid RL", HIGH_UTD | RLPD | dict(mixing_ratio=0.5, random_steps=5000)),
    "Cal-QL at UTD 20": ("Cal-QL", HIGH_UTD),
    "O3F": ("IQL", dict(optimistic_actions=100)),
}
# By the names of benchmark.sh and of the folders in results/.
ALGORITHMS = {"cal_ql": "Cal-QL", "cql": "CQL", "cql_sac": "CQL+SAC", "hybrid_rl": "Hybrid RL", "rlpd": "RLPD",
    "sac_offline_data": "SAC + offline data", "sac": "SAC", "cal_ql_utd20": "Cal-QL at UTD 20",
    "cal_ql_learned": "Cal-QL with learned V", "iql": "IQL", "o3f": "O3F", "awac": "AWAC", "td3_bc": "TD3+BC",
    "odt": "ODT"}  # fmt: skip
# Settings that make no other group, and those that a published run shows on its axes.
ASIDE = {"env_id", "seed", "resume", "device", "track", "cuda_graphs", "threads", "eval_async"}
LENGTHS = {"offline_steps", "online_steps", "offline_eval_interval", "online_eval_interval", "eval_episodes"}
# Okabe and Ito's colours, which colour-blind people can tell apart; their order is that of legends and tables.
COLOURS = {"Cal-QL": "#0072B2", "CQL": "#D55E00", "CQL+SAC": "#CC79A7", "Hybrid RL": "#E69F00", "RLPD": "#000000",
    "SAC + offline data": "#009E73", "SAC": "#56B4E9", "AWAC": "#8C510A", "IQL": "#332288", "O3F": "#999933",
    "ODT": "#882255", "TD3+BC": "#7F7F7F"}  # fmt: skip
OTHER_COLOURS = ("#44AA99", "#AA4499", "#117733", "#DDAA33")  # for others, in the order of their names
UNFINISHED = dict(linewidth=0.8, marker="x", markersize=4, markevery=[-1])
COUNT = EngFormatter(sep="")  # 2500 as 2.5k


class InputError(Exception):
    """Something the user can put right; its message is one sentence that says how."""


@dataclass
class Run:
    """One run. algorithm: with a published variant in brackets. has_usual: whether its script and task have settings
    here. settings: those that differ from these or, without such, all. rows: its evaluations in order, the first
    offline. name: of its group."""

    folder: Path
    task: str
    algorithm: str
    seed: int
    time: int
    has_usual: bool
    settings: dict
    rows: pd.DataFrame
    finished: bool
    published: bool
    name: str = ""

    @property
    def offline(self) -> pd.DataFrame:
        return self.rows[self.rows.phase == "offline"]

    @property
    def online(self) -> pd.DataFrame:
        return self.rows[self.rows.phase == "online"]


Groups = dict[str, dict[str, list[Run]]]  # runs by task and name of their group
Curve = tuple[bool, np.ndarray, np.ndarray]  # of one run: whether it is finished, x [P] increasing, y [P]


# --- Reading ----------------------------------------------------------------------------------------------------------
def read_table(path: Path, columns: list[str], text: list[str], may_miss: list[str]) -> pd.DataFrame:
    """Reads a CSV that has these columns; all but `text` hold numbers, NaN in `may_miss` alone. Raises InputError."""
    try:
        table = pd.read_csv(path)
        if missing := [column for column in columns if column not in table]:
            raise ValueError(f"there is no column {missing[0]}")
        cells = table[columns].drop(columns=text)
        numbers = cells.apply(pd.to_numeric, errors="coerce").astype(float)
        wrong = numbers.isna() & (cells.notna() | ~numbers.columns.isin(may_miss))
        if table.empty or wrong.any(axis=None) or not isinstance(table.index, pd.RangeIndex):
            raise ValueError("it is empty or cut off, or a cell is no number")
        table[numbers.columns] = numbers.where(np.isfinite(numbers))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error!s:.200}.") from error
    return table


def read_rows(path: Path) -> pd.DataFrame:
    """Reads and checks an eval.csv, and computes the regret. Raises InputError."""
    rows = read_table(path, ROWS, ["phase"], ["score", "mean_q", "bound_rate"])
    online = (rows.phase == "online").to_numpy()
    steps = np.where(online, rows.env_steps, rows.updates)
    ordered = all(np.all(np.diff(steps[phase]) > 0) for phase in (online, ~online)) and steps.min() >= 0
    known = rows.phase.isin(["offline", "online"]).all() and not rows.env_steps[~online].any()
    if online[0] or not ordered or not known or np.any(np.diff(online.astype(int)) < 0):
        raise InputError(f"{path} cannot be read: rows must be in order, offline before online, without repetitions.")
    rows["regret"] = 1 - rows.score[online].expanding().mean()
    return rows


def name_algorithm(script: str, config: dict) -> str:
    """The algorithm that a script runs with these settings."""
    config, base = json.loads(json.dumps(config)), SCRIPTS.get(script, script)
    made = {name: marks for name, (of, marks) in MADE_OF.items() if of == base}
    fitting = [name for name, marks in made.items() if all(config.get(k) == v for k, v in marks.items())]
    return max(fitting, key=lambda name: len(made[name]), default=base)


def import_script(name: str):
    """The module of a script of this repository, None if it has none of this name."""
    places = {name: ROOT / f"{name}.py", f"baselines.{name}": ROOT / "baselines" / f"{name}.py"}
    return next((importlib.import_module(module) for module, path in places.items() if path.is_file()), None)


def own_settings(script: str, env_id: str) -> dict | None:
    """The settings that a script has for a task; None for one of the user's own, be it the script or the task."""
    module = import_script(script)
    if module is None or env_id not in module.TASKS:
        return None
    settings = {**module.SETTINGS.get(module.TASKS[env_id].domain, {}), **module.SETTINGS.get(env_id, {})}
    return json.loads(json.dumps(vars(module.Args(env_id=env_id, **settings))))


def read_run(folder: Path) -> Run:
    """Reads a run: the folder's name tells the algorithm, its config.json all else. Raises InputError."""
    try:
        config = json.loads((folder / "config.json").read_text())
        env_id, seed = str(config["env_id"]), int(config["seed"])
        updates, steps = float(config["offline_steps"]), float(config["online_steps"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder / 'config.json'} cannot be read: {error!r:.200}.") from error
    rows, name, time, published = read_rows(folder / "eval.csv"), folder.absolute().name, 0, False
    finished = bool(rows.updates[rows.phase == "offline"].max() >= updates and rows.env_steps.max() >= steps)
    if own := re.fullmatch(r"(.+)__(.+)__(\d+)__(\d+)", name):
        script, algorithm, time = own[2], name_algorithm(own[2], config), int(own[4])
    else:  # published, or a folder that its user has named
        stem = re.sub(rf"-(seed)?{seed}$", "", name)
        key, _, variant = stem.partition("-")
        published, label = key in ALGORITHMS, ALGORITHMS.get(key, stem)
        algorithm = label + f" ({variant})" * (published and bool(variant))
        base, pixels = MADE_OF.get(label, (label,))[0], env_id.endswith("-pixels")
        script = next((s for s, a in SCRIPTS.items() if a == base and s.endswith("_pixels") == pixels), "")
    usual = own_settings(script, env_id)
    has_usual = usual is not None
    usual = usual or dict.fromkeys(config)  # without any, all settings are its own
    told = ASIDE.union(MADE_OF.get(base_of(algorithm), ("", ()))[1])  # by the algorithm's name
    settings = {k: config[k] for k in usual if k in config and k not in told and config[k] != usual[k]}
    return Run(folder, env_id.replace("/", "-"), algorithm, seed, time, has_usual, settings, rows, finished, published)


def find_runs(patterns: Sequence[str]) -> list[Path]:
    """The folders with an eval.csv that folders or globs name, or that lie up to two levels inside of them."""
    places = {Path(path) for pattern in patterns for path in [pattern, *glob.glob(pattern)]}
    files = {path for place in places for deep in ("", "*/", "*/*/") for path in place.glob(deep + "eval.csv")}
    return sorted(path.parent for path in files)


def in_words(name: str, value) -> str:
    """A setting, as cql_weight 1."""
    if isinstance(value, bool):
        return name if value else f"no {name}"
    values = value if isinstance(value, list) else [value]
    return f"{name} {' '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in values)}"


def name_group(run: Run, alike: list[Run]) -> str:
    """The algorithm and the settings that differ; `alike` are all runs of this task and algorithm."""
    shared = [k for k, v in run.settings.items() if all(other.settings.get(k) == v for other in alike)]
    if run.has_usual and run.algorithm in [*SCRIPTS.values(), *MADE_OF]:
        shared = [k for k in shared if run.published and k in LENGTHS]
    return ", ".join([run.algorithm, *(in_words(k, v) for k, v in run.settings.items() if k not in shared)])


def read_runs(patterns: Sequence[str]) -> Groups:
    """Reads and groups the runs that folders or globs name; one that cannot be read is left out with a sentence."""
    runs, errors = [], []
    for folder in find_runs(patterns):
        try:
            runs.append(read_run(folder))
        except InputError as error:
            errors.append(str(error))
    if not runs:
        raise InputError(errors[0] if errors else f"no eval.csv in {' '.join(patterns)}: name folders, such as runs/*.")
    for error in errors:
        print(f"left out: {error}", file=sys.stderr)
    for run in runs:
        run.name = name_group(run, [r for r in runs if (r.task, r.algorithm) == (run.task, run.algorithm)])
    table = pd.DataFrame([vars(run) | {"rank": rank(run.name), "run": run} for run in runs])
    table = table.sort_values(["task", "rank", "seed", "finished", "time"])
    again = table.duplicated(["task", "name", "seed"], keep="last")
    for run in table.run[again]:
        print(f"left out: {run.folder}: a run of its settings and seed is finished or later", file=sys.stderr)
    groups: Groups = {}
    for (task, name), part in table[~again].groupby(["task", "name"], sort=False):
        groups.setdefault(task, {})[name] = list(part.run)
    return groups


def base_of(name: str) -> str:
    """The algorithm of a group, without its variant and settings."""
    return re.split(r" \(|, ", name)[0]


def rank(name: str) -> tuple[int, str]:
    """Sorts groups as COLOURS does, others after them by name."""
    return ([*COLOURS, base_of(name)]).index(base_of(name)), name


def choose_styles(names: Sequence[str]) -> dict[str, dict]:
    """Colour and line of each group of a panel; up to three groups of one algorithm share its colour."""
    others, colours, styles = iter(OTHER_COLOURS * (len(names) + 1)), dict(COLOURS), {}
    for name in sorted(names, key=rank):
        k = sum(base_of(earlier) == base_of(name) for earlier in styles)
        if k % 3 == 0 and (k > 0 or base_of(name) not in colours):
            colours[base_of(name)] = next(others)
        styles[name] = dict(color=colours[base_of(name)], linestyle=("-", "-.", ":")[k % 3])
    return styles


def read_peers(path: Path) -> pd.DataFrame:
    """Another code base's curves, and in the column `source` whose they are. Raises InputError."""
    peers = read_table(path, PEER_COLUMNS, ["algorithm", "task", "phase"], [])
    peers["task"] = peers.task.astype(str).str.replace(r"-v\d+$", "", regex=True)
    return peers.assign(source=path.stem).sort_values("step")


def has_score(group: dict[str, list[Run]]) -> bool:
    """Whether a task's score is a share in [0, 1]; where an environment tells no success it is the return."""
    scores = pd.concat([run.rows.score for runs in group.values() for run in runs])
    return bool(scores.dropna().between(0, 1).all())


def summarise(runs: list[Run], unit: float) -> dict[str, float] | None:
    """Means over the finished runs: score at the switch and at the end (times unit), regret; None without any."""
    if not (done := [run for run in runs if run.finished]):
        return None
    last = [run.online.iloc[-1] if len(run.online) else dict(score=np.nan, regret=np.nan) for run in done]
    return {
        "offline": float(unit * np.mean([run.offline.score.iloc[-1] for run in done])),
        "online": float(unit * np.mean([row["score"] for row in last])),
        "regret": float(np.mean([row["regret"] for row in last])),
        "updates": float(np.mean([run.offline.updates.iloc[-1] for run in done])),
        "env_steps": float(np.mean([run.rows.env_steps.iloc[-1] for run in done])),
        "seeds": len(done),
    }


def make_table(groups: Groups) -> str:
    """Markdown: mean over finished seeds of the score at the switch and at the end in percent, and of the regret."""
    head = ["task", "algorithm", "offline", "online", "regret", "seeds", "unfinished"]
    lines = [head, ["---"] * len(head)]
    for task, group in groups.items():
        unit, digits = (100, 0) if has_score(group) else (1, 1)
        for name, runs in group.items():
            means = pd.Series(summarise(runs, unit) or {"seeds": 0}).reindex(["offline", "online", "regret", "seeds"])
            cells = [f"{means.offline:.{digits}f}", f"{means.online:.{digits}f}"]
            cells += [f"{means.regret:.2f}" if unit == 100 else "-", f"{means.seeds:.0f}"]
            lines.append([task, name, *cells, str(sum(not run.finished for run in runs))])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("| nan ", "| - ")


# --- Curves -----------------------------------------------------------------------------------------------------------
def interpolate(curves: list[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Brings a group's seeds, which are evaluated after whole episodes, onto one grid [P]; values are [seeds, P].

    It is that of the seed with most evaluations, cut to what all cover: no mean is over fewer than the legend says.
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
    """Draws the finished runs' mean, with the band that `band` makes of values [seeds, P], and unfinished runs thin."""
    if finished := [curve for curve in curves if curve[0]]:
        grid, values = interpolate(finished)
        ax.plot(grid, values.mean(0), **style)
        if len(finished) > 1:
            ax.fill_between(grid, *band(values), color=style["color"], alpha=0.18, linewidth=0)
    for done, x, y in curves:
        if not done:
            ax.plot(x, y, **style | UNFINISHED)


def make_panels(groups: Groups, heights: tuple[float, ...], band: str) -> tuple[Figure, list[list[Axes]]]:
    """A figure with a column of axes for each task, at most four side by side, and a title that explains what it has:
    the band if a group has two finished seeds, the cross if a run is unfinished."""
    count, everyone = len(groups), [runs for group in groups.values() for runs in group.values()]
    down = math.ceil(count / 4)
    across = math.ceil(count / down)
    fig = Figure(figsize=(max(3.8 * across, 5.5), (sum(heights) + 0.5) * down + 0.6), layout="constrained", dpi=150)
    several = any(sum(run.finished for run in runs) > 1 for runs in everyone)
    unfinished = any(not run.finished for runs in everyone for run in runs)
    parts = [f"mean over seeds; band: {band}"] * several + ["thin line with a cross: an unfinished run"] * unfinished
    if parts:
        fig.suptitle("\n".join(parts), fontsize=9, color="0.3")
    grid = fig.subplots(down * len(heights), across, squeeze=False, height_ratios=heights * down)
    columns = [list(ax) for row in np.split(grid, down) for ax in row.T]
    for number, ax in enumerate(ax for column in columns for ax in column):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="0.9", linewidth=0.8)
        ax.set_visible(number < count * len(heights))
    return fig, columns[:count]


def label_of(name: str, runs: list[Run]) -> str:
    """A group's entry in a legend, with its numbers of seeds."""
    done = sum(run.finished for run in runs)
    counts = [f"{done} seed{'s' * (done > 1)}"] * (done > 0) + [f"{len(runs) - done} unfinished"] * (done < len(runs))
    return textwrap.fill(f"{name} ({', '.join(counts)})", 44)


def draw_peers(ax: Axes, peers: pd.DataFrame, styles: dict[str, dict]) -> None:
    """Draws the mean of a task's peers dashed, for the algorithms that have a style, from the switch on."""
    for name in dict.fromkeys(map(base_of, styles)):
        curves, before = [], 0
        for _, seed in peers[peers.algorithm == name].groupby("seed"):
            offline, online = (seed[seed.phase == phase] for phase in ("offline", "online"))
            if len(online):
                start = offline.score.to_numpy()[-1:] if online.step.iloc[0] > 0 else []
                steps, scores = np.append([0] * len(start), online.step), np.append(start, online.score)
                curves, before = [*curves, (True, steps, scores)], max([before, *offline.step])
        if curves:
            steps, values = interpolate(curves)
            colour = next(style["color"] for n, style in styles.items() if base_of(n) == name)
            label = f"{name}, {peers.source.iloc[0]} ({len(curves)} seeds, after {COUNT(before)} offline updates)"
            ax.plot(steps, values.mean(0), color=colour, linewidth=1.2, linestyle="--", marker=".", label=label)


def draw_curves(groups: Groups, reps: int, peers: pd.DataFrame | None = None) -> Figure:
    """Score against online environment steps, from the offline score at step 0 on; runs still offline are not drawn."""
    begun = {t: {n: [r for r in runs if len(r.online)] for n, runs in group.items()} for t, group in groups.items()}
    fig, panels = make_panels(begun, (3.4,), "95% bootstrap interval")
    for (task, group), (ax,) in zip(begun.items(), panels, strict=True):
        unit, styles = 100 if has_score(groups[task]) else 1, choose_styles(group)
        for name, runs in group.items():
            tables = [(run.finished, run.rows[len(run.offline) - 1 :]) for run in runs]
            curves = [(done, rows.env_steps.to_numpy(), unit * rows.score.to_numpy()) for done, rows in tables]
            draw_seeds(ax, curves, lambda v: bootstrap(v[:, None], metrics.aggregate_mean, reps)[1:], **styles[name])
            if runs:
                ax.plot([], [], label=label_of(name, runs), **styles[name])
        ax.set(title=task, xlabel="Online environment steps", ylabel="Score (%)" if unit == 100 else "Return")
        ax.xaxis.set_major_formatter(COUNT)
        if not ax.lines:
            ax.set(xticks=[], yticks=[])
            ax.text(0.5, 0.5, "no online evaluation", transform=ax.transAxes, ha="center", color="0.4")
            continue
        ax.set_xlim(0, 1.03 * max(run.rows.env_steps.max() for runs in group.values() for run in runs))
        if unit == 100:
            ax.set_ylim(-3, 103)
            if peers is not None:
                draw_peers(ax, peers[peers.task == task], styles)
        columns = 1 if len(ax.get_legend_handles_labels()[0]) < 7 else 2
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=columns, fontsize=8, frameon=False)
    return fig


def draw_iqm(groups: Groups, reps: int) -> Figure | None:
    """Interquartile means of final score and regret, for each task and for all; None without two finished seeds."""
    scored, pictures = {task: group for task, group in groups.items() if has_score(group)}, []
    names = sorted({name for group in scored.values() for name in group}, key=rank)
    for title, tasks in [*((t, [t]) for t in scored), *[("all tasks", [*scored])] * (len(scored) > 1)]:
        values = {}
        for name in names:
            last = [[r.online.iloc[-1] for r in scored[t].get(name, []) if r.finished and len(r.online)] for t in tasks]
            seeds = range(min(map(len, last)))  # rliable takes as many of each task
            if len(seeds) > 1:
                values[name] = np.array([[(100 * rows[k].score, rows[k].regret) for rows in last] for k in seeds])
        if values:
            pictures.append((title, values))
    if not pictures:
        return None
    heights = [0.55 + 0.38 * len(values) for _, values in pictures]
    fig = Figure(figsize=(8.2, sum(heights) + 0.9), layout="constrained", dpi=150)
    fig.suptitle("interquartile mean over seeds; bar: 95% bootstrap interval", fontsize=9, color="0.3")
    grid = fig.subplots(len(pictures), 2, squeeze=False, height_ratios=heights)
    for (title, values), axes in zip(pictures, grid, strict=True):
        for row, (name, scores) in enumerate(values.items()):
            both = bootstrap(scores, lambda v: np.array([metrics.aggregate_iqm(v[..., k]) for k in (0, 1)]), reps)
            colour = choose_styles(values)[name]["color"]
            for k, (ax, (middle, low, high)) in enumerate(zip(axes, both.T, strict=True)):
                ax.plot([low, high], [row, row], color=colour, linewidth=9, alpha=0.4, solid_capstyle="butt")
                ax.plot(middle, row, "|", color=colour, markersize=12, markeredgewidth=2.5)
                beside = dict(xycoords=ax.get_yaxis_transform(), va="center", fontsize=8)  # the axis, where no bar is
                ax.annotate(f"{middle:.{2 * k}f}", (1.02, row), **beside)
        labels = [textwrap.fill(f"{name} ({len(scores)} seeds)", 44) for name, scores in values.items()]
        for ax, limits, shown in zip(axes, [(-3, 103), (-0.03, 1.03)], [labels, []], strict=True):
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(axis="x", color="0.9", linewidth=0.8)
            ax.set(xlim=limits, ylim=(len(values) - 0.4, -0.6), yticks=range(len(shown)), yticklabels=shown)
            ax.tick_params(axis="y", labelsize=8, length=0)
        axes[0].set_title(title, fontsize=10)
    grid[-1, 0].set_xlabel("Final score (%), higher is better")
    grid[-1, 1].set_xlabel("Regret, lower is better")
    return fig


# --- Across the switch ------------------------------------------------------------------------------------------------
def limit_values(ax: Axes, group: dict[str, list[Run]]) -> None:
    """Limits an axis of Q to the groups whose Q is of the returns' size, and names the others."""
    rows = {name: pd.concat([run.rows for run in runs]) for name, runs in group.items()}
    size = 10 * max(table.mean_mc_return.abs().max() for table in rows.values())
    near = {name: table for name, table in rows.items() if not table.mean_q.abs().max() > size}
    if near and len(near) < len(rows):
        shown = np.concatenate([t[c] for t in near.values() for c in ("mean_q", "mean_mc_return")])
        low, high = np.nanmin(shown), np.nanmax(shown)
        ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        far = {name: table.mean_q[table.mean_q.abs().idxmax()] for name, table in rows.items() if name not in near}
        short = EngFormatter(places=1, sep="")
        words = "\n".join(f"{name} leaves this panel: Q comes to {short(q)}" for name, q in far.items())
        ax.set_title(words, loc="left", fontsize=7, color="0.3")


def draw_calibration(groups: Groups, heights: tuple[float, ...] = (2.2, 2.6, 1.3)) -> Figure:
    """Score, mean Q and mean return of the data, and bound rate, offline left and online right of the switch.

    The two phases get half of the axis each, for their lengths may differ by a factor of fifty.
    """
    fig, panels = make_panels(groups, heights, "lowest to highest seed")
    for (task, group), axes in zip(groups.items(), panels, strict=True):
        everyone, styles = pd.concat([run.rows for runs in group.values() for run in runs]), choose_styles(group)
        updates, steps = int(everyone.updates[everyone.phase == "offline"].max()), int(everyone.env_steps.max())
        unit = 100 if has_score(group) else 1
        columns = [("score", unit, axes[0]), ("mean_q", 1, axes[1]), ("mean_mc_return", 1, axes[1])]
        columns += [("bound_rate", 100, ax) for ax in axes[2:]]
        for k, (name, runs) in enumerate(group.items()):
            xs = []  # in [-1, 0] offline, in (0, 1] online; a run that is still offline has not come to the switch
            for run in runs:
                switch = run.offline.updates.max() if run.finished or len(run.online) else updates
                before, after = (run.offline.updates - switch) / max(updates, 1), run.online.env_steps / max(steps, 1)
                xs.append(np.concatenate([before, after]))
            # CQL and CQL+SAC are one and the same offline: later lines are thinner, and so hide none beneath them.
            style = styles[name] | dict(linewidth=max(2.6 * 0.7**k, 1.2))
            for column, factor, ax in columns:
                curves = [(r.finished, x, factor * r.rows[column].to_numpy()) for x, r in zip(xs, runs, strict=True)]
                dashed = dict(linewidth=1, linestyle="--") if column == "mean_mc_return" else {}
                if any(np.isfinite(y).any() for _, _, y in curves):
                    draw_seeds(ax, curves, lambda v: (v.min(0), v.max(0)), **style | dashed)
            axes[-1].plot([], [], label=label_of(name, runs), **style)
        limit_values(axes[1], group)
        mark_phases(axes, updates, steps)
        axes[0].set_title(task, pad=16)
        axes[0].set(ylabel="Score (%)", ylim=(-3, 103)) if unit == 100 else axes[0].set_ylabel("Return")
        axes[1].set_ylabel("Mean Q; dashed:\nthe data's mean return")
        for ax in axes[2:]:
            ax.set(ylim=(-3, 103), ylabel="Bound rate (%)")
        place = dict(loc="upper center", bbox_to_anchor=(0.5, -0.52 / heights[-1]))
        axes[-1].legend(fontsize=8, frameon=False, **place)
    return fig


def mark_phases(axes: Sequence[Axes], updates: int, steps: int) -> None:
    """Ticks, line and words for the two phases, which reach from -1 to 0 and from 0 to 1."""
    nice = MaxNLocator(3).tick_values
    ticks = [(v / max(updates, 1) - 1, v) for v in nice(0, updates) if 0 <= v < 0.85 * updates]
    ticks += [(v / max(steps, 1), v) for v in nice(0, steps) if 0 < v <= steps]
    for ax in axes:
        ax.set_xlim(-1.03 if updates else -0.03, 1.03 if steps else 0.03)
        ax.set_xticks([x for x, _ in ticks], [COUNT(v) for _, v in ticks] if ax is axes[-1] else [])
        ax.axvline(0, color="0.4", linewidth=1 if steps else 0)
    words = [(-0.5, 0, -18, f"{COUNT(updates)} updates offline")] * (updates > 0)
    words += [(0.5, 0, -18, "steps online"), (0, 1, 12, "switch")] * (steps > 0)
    for x, y, offset, text in words:
        ax = axes[0] if y else axes[-1]
        place = dict(xycoords=ax.get_xaxis_transform(), textcoords="offset points", ha="center", va="top", fontsize=8)
        ax.annotate(text, (x, y), (0, offset), **place)


def draw_all(groups: Groups, out: Path, reps: int, peers: pd.DataFrame | None, table: bool = True) -> list[Path]:
    """Writes the figures, and the table if wished, into the folder `out`, which is made; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    two = {t: {n: runs for n, runs in group.items() if base_of(n) in ("Cal-QL", "CQL")} for t, group in groups.items()}
    pair = {task: group for task, group in two.items() if group} or groups
    figures = {"curves": draw_curves(groups, reps, peers), "calibration": draw_calibration(pair)}
    figures["iqm"], written = draw_iqm(groups, reps), []
    for name, fig in figures.items():
        path = out / f"{name}.png"
        path.unlink(missing_ok=True)  # a picture that there is nothing for leaves no older one behind
        if fig:
            fig.savefig(path)
            written.append(path)
    if table:
        written.append(out / "table.md")
        written[-1].write_text(make_table(groups))
    return written


# --- One run ----------------------------------------------------------------------------------------------------------
def summarise_run(run: Run, picture: Path) -> str:
    """Four lines: success beside that of published seeds, where the policy and the curve are, what comes next."""
    percent, folder = has_score({"": [run]}), Path(os.path.relpath(run.folder))
    short = folder.parent / f"*{folder.name.rsplit('__', 1)[-1]}"  # the shell finds it, and the line has 80 columns
    python = ".venv/bin/python" if Path(sys.prefix) == ROOT / ".venv" else "python"  # that which is in no PATH

    def span(runs: list[Run], phase: str) -> str:
        scores = [getattr(each, phase).score.iloc[-1] * (100 if percent else 1) for each in runs]
        ends = [f"{score:.0f}" if percent else f"{score:.1f}" for score in (min(scores), max(scores))]
        return " to ".join(dict.fromkeys(ends)) + "%" * percent

    try:
        published = read_runs([str(RESULTS / run.task)]).get(run.task, {})
    except InputError:  # none of this task
        published = {}
    alike = [r for runs in published.values() for r in runs if r.settings == run.settings and r.finished]
    seeds = [r for r in alike if base_of(r.algorithm) == base_of(run.algorithm)]
    phases = ["offline"] + ["online"] * (len(run.online) > 0)
    text = "Success was not evaluated"
    if run.rows.score.notna().all():
        text = f"{'Success' if percent else 'Return'}: {span([run], 'offline')} before"
        text += f", {span([run], 'online')} after fine-tuning" if len(run.online) else " fine-tuning"
        if seeds:
            text += f" ({len(seeds)} seeds: {', '.join(span(seeds, phase) for phase in phases)})"
    return (
        f"{text}.\nPolicy: {short}/checkpoint.pt; curve: {picture}\n"
        f"Film: {python} tools/plot.py --film {short}\n"
        "Next: ./benchmark.sh antmaze-umaze, or your own data, docs/own_data.md"
    )


def load_script(run: Path):
    """The module of the script that made a run: the folder's name tells it or, if it has another, the settings do."""
    own = re.fullmatch(r".+__(.+)__\d+__\d+", run.absolute().name)
    if own and (script := import_script(own[1])):
        return script
    try:
        settings = json.loads((run / "config.json").read_text()).keys()
        return next(s for s in map(import_script, SCRIPTS) if s and settings == s.Args.__dataclass_fields__.keys())
    except (OSError, ValueError, AttributeError, StopIteration) as error:
        raise InputError(f"{run} is no run of a script that is here ({error!r:.200}).") from error


def missing_package(error: BaseException | None) -> str | None:
    """A sentence that names the package whose absence is behind an error, None if it is something else."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError):
            return f"the package {error.name} is missing, which this needs: pip install {error.name}"
        if type(error).__name__ == "DependencyNotInstalled":  # Gymnasium's, which says the command
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def load_run(run: Path, online_env: str | None, **drawn) -> SimpleNamespace:
    """A run's script, settings, task, offline data, agent, and environment made with the arguments `drawn` too."""
    script = load_script(run)
    flags = ["--resume", str(run), "--device", "cpu", *(["--online-env", online_env] if online_env else [])]
    make = script.gym.make
    try:
        args, checkpoint = script.parse_args(flags)
        task, dataset, offline = script.load_data(args)
        with mock.patch.object(script.gym, "make", lambda env_id, **kwargs: make(env_id, **kwargs | drawn)):
            env = script.make_env(dataset, task, args)
        agent, _ = script.make_agent(offline, args)
        agent.load_state_dict(checkpoint["agent"])
    except script.InputError as error:
        raise InputError(missing_package(error) or str(error)) from error
    except Exception as error:  # whatever another program has put into the checkpoint
        raise InputError(f"{run} cannot be drawn: its checkpoint does not fit its script ({error!r:.200}).") from error
    progress = checkpoint["progress"]
    return SimpleNamespace(script=script, args=args, task=task, offline=offline, env=env, agent=agent, **progress)


def aim_camera(env, domain: str) -> float | None:
    """Shows a maze whole, from above, and the pick-and-place table from close by; other tasks keep their own view.
    Returns half the width that a picture of a maze shows."""
    scene = env.unwrapped
    maze = getattr(scene, "maze", None)
    body = scene if maze is None else getattr(scene, "ant_env", None) or scene.point_env
    if maze is not None:
        distance = 1.15 * maze.maze_size_scaling * max(maze.map_length, maze.map_width)
        camera = {"lookat": np.zeros(3), "distance": distance, "azimuth": 90.0, "elevation": -90.0}
    elif domain == "pick-place":
        camera = importlib.import_module("collect.pick_place").CAMERA
    else:
        return None
    renderer = body.mujoco_renderer
    renderer.camera_id, renderer.default_cam_config = -1, camera  # before its first frame; -1 is a free camera
    return None if maze is None else distance * math.tan(math.radians(body.model.vis.global_.fovy) / 2)


def play_film(loaded: SimpleNamespace, seed: int) -> tuple[list[tuple[int, np.ndarray]], np.ndarray, float]:
    """One deterministic episode: (step, frame [H, W, 3]) of some sixty steps and of the last, all states, the score."""
    env, step, frames, count = loaded.env, loaded.env.step, [], 0
    every, sees = max(1, (env.spec.max_episode_steps or 1000) // 60), hasattr(loaded.agent, "encoder")

    def draw_and_step(action: np.ndarray):
        nonlocal count
        if count % every == 0:
            frames.append((count, None if sees else env.render()))
        count += 1
        result = step(action)
        if result[2] or result[3]:
            frames.append((count, None if sees else env.render()))
        return result

    with mock.patch.object(env, "step", draw_and_step):
        episode, score = loaded.script.play_episode(env, loaded.agent, seed, False, "cpu")
    states = episode.observations  # a policy from pixels is shown what it sees
    return [(k, states[k]) for k, _ in frames] if sees else frames, states, float(score)


def draw_film(run: Path, frames: int, attempts: int, online_env: str | None) -> Figure:
    """Evenly spaced frames, first and last included, of one episode of a run's policy, deterministic as in evaluations.

    The first success of `attempts` episodes is drawn, whose seeds are 0 and on; without any, the last episode.
    """
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ.setdefault("MUJOCO_GL", "egl")  # draws without a screen; read when MuJoCo is imported
    loaded = load_run(run, online_env, render_mode="rgb_array")
    try:
        half = aim_camera(loaded.env, loaded.task.domain)
        for seed in range(attempts):
            film, states, score = play_film(loaded, seed)
            if score >= 1:
                break
    except Exception as error:  # OpenGL fails in many ways
        raise InputError(
            missing_package(error)
            or f"{loaded.args.env_id} cannot be drawn ({error!r:.200}): on Debian and Ubuntu "
            "`apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri`, and leave MUJOCO_GL unset or egl."
        ) from error
    print(f"episode with seed {seed}, {film[-1][0]} steps, score {score:.2f}", file=sys.stderr)
    fig = Figure(figsize=(1.25 * frames, 1.5), dpi=120, layout="constrained")
    chosen = np.linspace(0, len(film) - 1, frames).round().astype(int)
    for ax, (step, frame) in zip(np.atleast_1d(fig.subplots(1, frames)), [film[k] for k in chosen], strict=True):
        ax.imshow(frame, interpolation="nearest")
        if half:  # the way through a large maze, in which the body is small
            x, y = (frame.shape[0] / 2 * (1 + sign * states[: step + 1, k] / half) for k, sign in ((0, 1), (1, -1)))
            ax.plot(x, y, color="#0072B2", linewidth=1)
            ax.plot(x[-1], y[-1], "o", color="#0072B2", markersize=3)
        ax.set_title(f"step {step}", fontsize=9)
        ax.axis("off")
    return fig


# --- Values in a maze -------------------------------------------------------------------------------------------------
def estimate_values(loaded: SimpleNamespace, points: np.ndarray) -> np.ndarray:
    """max_a Q(s, a) [P] at positions [P, 2]: over 32 actions of the policy and 32 uniform ones, minimum over critics.

    The rest of the state is that of the data: the mean over the eight states nearest to the position.
    """
    import torch

    data = np.concatenate([episode.observations for episode in loaded.offline])
    rng = np.random.default_rng(0)
    data = data[rng.permutation(len(data))[:20_000]]
    # Observations may hold the position twice: as the achieved goal, and in the body's own state.
    places = [[k for k in range(data.shape[1]) if np.array_equal(data[:, k], data[:, axis])] for axis in (0, 1)]
    normalize, values = getattr(loaded.agent, "normalize", lambda states: states), []
    torch.manual_seed(0)
    for point in points:
        states = data[np.square(data[:, :2] - point).sum(1).argsort()[:8]]
        states[:, places[0]], states[:, places[1]] = point
        states = torch.from_numpy(states)
        with torch.no_grad():
            actions = loaded.agent.act(states.repeat_interleave(32, 0), explore=True).unflatten(0, (-1, 32))
            actions = torch.cat([actions, 2 * torch.rand_like(actions) - 1], dim=1)
            q = loaded.agent.critic(normalize(states), actions).amin(0).amax(1)  # [N, 8, 64] -> [8]
        values.append(q.mean().item())
    return np.array(values)


def draw_values(runs: Sequence[Path], online_env: str | None) -> Figure:
    """A maze with the data's mean return, each run's max_a Q(s, a) on the same scale, and eight paths of its policy."""
    everyone = [load_run(run, online_env) for run in runs]
    first, scale = everyone[0], ("env_id", "datasets", "gamma", "reward_scale", "reward_bias")
    maze = getattr(first.env.unwrapped, "maze", None) if first.env else None
    if maze is None or not all(hasattr(loaded.agent, "critic") for loaded in everyone):
        raise InputError("--values needs runs in a maze, of an algorithm that has a Q.")
    if other := [k for k in scale if any(getattr(each.args, k) != getattr(first.args, k) for each in everyone)]:
        raise InputError(f"these runs' values have no scale in common: they differ in {' and '.join(other)}.")

    # Squares of a quarter of a cell; x0, y0 is the upper left corner.
    size, x0, y0 = maze.maze_size_scaling / 4, -maze.x_map_center, maze.y_map_center
    free = np.kron([[cell != 1 for cell in row] for row in maze.maze_map], np.ones((4, 4))) > 0
    (height, width), (rows, columns) = free.shape, np.nonzero(free)
    points = np.stack([x0 + (columns + 0.5) * size, y0 - (rows + 0.5) * size], 1)
    states = np.concatenate([episode.observations[:, :2] for episode in first.offline])
    squares = np.stack([y0 - states[:, 1], states[:, 0] - x0]) // size
    squares = np.ravel_multi_index(squares.astype(int), free.shape, mode="clip")
    returns = pd.Series(np.concatenate([episode.mc_returns for episode in first.offline])).groupby(squares).mean()
    panels = [
        ("return of the data (white: none)", returns.reindex(range(free.size)).to_numpy().reshape(free.shape), [])
    ]
    for loaded in everyone:
        values = np.full(free.shape, np.nan)
        values[free] = estimate_values(loaded, points)
        played = [loaded.script.play_episode(loaded.env, loaded.agent, seed, False, "cpu") for seed in range(8)]
        name = name_algorithm(loaded.script.__name__.split(".")[-1], vars(loaded.args))
        when = f"after {COUNT(loaded.updates)} updates" + f" and {COUNT(loaded.env_steps)} steps" * (
            loaded.env_steps > 0
        )
        title = f"{name} {when}; {sum(score >= 1 for _, score in played)} of 8 arrive"
        panels.append((title, values, [episode.observations for episode, _ in played]))

    reach = np.array([(np.nanmin(values), np.nanmax(values)) for _, values, _ in panels])
    (low, high), span = reach[0], reach[0, 1] - reach[0, 0]  # Q far from the returns does not flatten the scale
    limits = dict(vmin=max(reach.min(), low - span), vmax=min(reach.max(), high + span))
    below, above = reach.min() < limits["vmin"], reach.max() > limits["vmax"]
    fig = Figure(figsize=(4 * len(panels) + 1, 4 * height / width + 0.7), dpi=150, layout="constrained")
    fig.suptitle(f"{first.args.env_id} (star: goal; lines: deterministic episodes)", fontsize=10)
    axes, extent = fig.subplots(1, len(panels)), (x0, x0 + size * width, y0 - size * height, y0)
    for ax, (title, values, paths) in zip(axes, panels, strict=True):
        ax.imshow(np.where(free, np.nan, 0), extent=extent, cmap="gray", vmin=-1, vmax=1)  # walls
        image = ax.imshow(np.where(free, values, np.nan), extent=extent, **limits)
        for path in paths:
            ax.plot(path[:, 0], path[:, 1], color="white", linewidth=1)
            ax.plot(*path[0, :2], "o", color="white", markersize=4, markeredgecolor="black", markeredgewidth=0.6)
        ax.plot(*first.env.unwrapped.goal, "*", color="#D55E00", markersize=13, markeredgecolor="white")
        ax.set_title(title, fontsize=9)
        ax.axis("off")
    extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[int(below), int(above)]
    fig.colorbar(image, ax=list(axes), extend=extend, shrink=0.85, label="return, max$_a$ Q(s, a)")
    return fig


# --- Command line -----------------------------------------------------------------------------------------------------
@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]] = ("runs/*",)  # folders of runs or of such folders, or globs of either
    out: Path = Path("figures")  # folder for what is drawn
    peers: Path | None = None  # CSV with another code base's curves
    run: Path | None = None  # draw this one run, and say how well it did
    film: Path | None = None  # draw a film strip of this run's policy
    values: tuple[Path, ...] = ()  # draw the values of these runs in a maze beside the data's returns
    online_env: str | None = None  # for --film and --values: the --online-env of a run that was given one
    frames: int = 9  # frames of a film strip
    attempts: int = 10  # episodes that are played for a film strip until one succeeds
    reps: int = 2000  # bootstrap resamples


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for bad input."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    try:
        if min(args.frames, args.attempts, args.reps) < 1 or sum(map(bool, (args.run, args.film, args.values))) > 1:
            raise InputError("--frames, --attempts and --reps are at least 1; --run, --film and --values go alone.")
        if not (args.run or args.film or args.values):
            peers = read_peers(args.peers) if args.peers else None
            groups = read_runs(args.runs)
            written = draw_all(groups, args.out, args.reps, peers)
            print(f"{make_table(groups)}wrote {', '.join(map(str, written))}")
            return 0
        if args.run:
            run = read_run(args.run)
            run.name = name_group(run, [])
            name, fig = "run", draw_calibration({run.task: {run.name: [run]}}, (2.2, 2.6))
        elif args.film:
            name, fig = "film", draw_film(args.film, args.frames, args.attempts, args.online_env)
        else:
            name, fig = "values", draw_values(args.values, args.online_env)
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"{name}.png"
        fig.savefig(path)
        print(summarise_run(run, path) if args.run else f"wrote {path}")
    except (InputError, OSError, ImportError) as error:  # the last of a script or a renderer
        print(f"error: {isinstance(error, ImportError) and missing_package(error) or error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
