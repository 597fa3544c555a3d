"""Draws every picture and table of README.md and docs/ from the runs in results/.

    python tools/report.py                        # pictures into docs/figures/<task>/, tables between their markers
    python tools/report.py --check                # writes nothing; exit code 1 where a table is not what results/ say
    python tools/report.py --add runs/<run>       # first copies a run's eval.csv and config.json into results/
    python tools/report.py --add runs/<run> --variant small    # as a variant, for other settings than the task's

A table stands between `<!-- table NAME -->` and `<!-- end -->`. NAME is one of

    paper ALGORITHM   the paper's numbers beside ours for its tasks that were run; a sentence names the others
    whole ALGORITHM   the same with a row for each of the paper's tasks, those that were run first
    task TASK         means over the seeds of a task
    seeds TASK        its runs one by one
"""

import csv
import re
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
try:
    import pandas as pd
    import tyro
    from matplotlib.figure import Figure

    from tools import plot
except ImportError as error:
    print(f"error: {error}; run `pip install -r requirements-dev.txt`.", file=sys.stderr)
    sys.exit(2)

MARKED = re.compile(r"(<!-- table (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cells_of(runs: list[plot.Run], unit: int, digits: int) -> dict[str, str]:
    """Means over the finished runs as plot.py computes them, as text; "-" where there is none."""
    means = plot.summarise(runs, unit) or {"seeds": 0}
    cells = dict.fromkeys(("offline", "online", "regret", "updates", "env_steps", "seeds"), "-")
    cells["seeds"] = str(means["seeds"])
    if means["seeds"]:
        cells |= {name: f"{means[name]:.{digits}f}" for name in ("offline", "online")}
        cells |= {"regret": f"{means['regret']:.2f}"} if unit == 100 else {}
        cells |= {name: f"{means[name]:,.0f}" for name in ("updates", "env_steps")}
    return cells


def unit_of(algorithms: dict[str, list[plot.Run]]) -> tuple[int, int, str]:
    """Factor, digits and heading of a task's scores: percent, or the return where no success is told."""
    return (100, 0, "%") if plot.has_score(algorithms) else (1, 1, "return")


def paper_table(groups: plot.Groups, algorithm: str, whole: bool = False) -> str:
    """The paper's tables 1 and 2 for one algorithm, ours beside them."""
    with (ROOT / "tools" / "paper.csv").open(newline="") as file:
        paper = [row for row in csv.DictReader(file) if row["algorithm"] == algorithm]
    rows = {True: [], False: []}  # run, and not run yet
    for row in paper:
        runs = groups.get(row["task"], {}).get(algorithm, [])
        ours = cells_of(runs, 100, 0)
        if ours["offline"] == "-":
            ours["offline"] = "unfinished" if runs else "not run yet"
        ours = [ours[name] for name in ("offline", "online", "regret", "env_steps", "seeds")]
        rows[bool(runs)].append([row["task"], row["offline"] or "-", row["online"], row["regret"], *ours])
    header = ["task", "paper: offline %", "online %", "regret", "ours: offline %", "online %", "regret"]
    header += ["steps online", "seeds"]
    if whole:
        return markdown(header, rows[True] + rows[False])
    table = markdown(header, rows[True]) + "\n" if rows[True] else ""
    return table + f"Not run yet: {', '.join(row[0] for row in rows[False])}.\n" if rows[False] else table


def task_table(groups: plot.Groups, task: str) -> str:
    """Means over a task's finished runs, an algorithm a row; unfinished runs are counted."""
    if task not in groups:
        return "Not run yet.\n"
    unit, digits, heading = unit_of(groups[task])
    rows = [
        [name, *cells_of(runs, unit, digits).values(), str(sum(not run.finished for run in runs))]
        for name, runs in groups[task].items()
    ]
    header = ["algorithm", f"offline {heading}", f"online {heading}", "regret", "updates offline", "steps online"]
    return markdown([*header, "seeds", "unfinished"], rows)


def seeds_table(groups: plot.Groups, task: str) -> str:
    """A task's runs one by one, unfinished ones as far as they are."""
    if task not in groups:
        return "Not run yet.\n"
    (unit, digits, heading), rows = unit_of(groups[task]), []
    for name, run in ((name, run) for name, runs in groups[task].items() for run in runs):
        scores, cells = unit * run.online.score, ["-", "-", "-"]
        if len(scores):
            cells = [f"{score:.{digits}f}" for score in (scores.min(), scores.iloc[-1])]
            cells.append(f"{run.online.regret.iloc[-1]:.3f}" if unit == 100 else "-")
        switch, last = f"{unit * run.offline.score.iloc[-1]:.{digits}f}", run.rows.iloc[-1]
        rows.append([name, str(run.seed), switch, *cells, f"{last.env_steps:,.0f}", f"{last.wall_time / 60:.0f}"])
    header = ["algorithm", "seed", f"offline {heading}", f"lowest online {heading}", f"online {heading}", "regret"]
    return markdown([*header, "steps online", "minutes"], rows)


TABLES = {"paper": paper_table, "whole": partial(paper_table, whole=True), "task": task_table, "seeds": seeds_table}


def fill(text: str, groups: plot.Groups) -> str:
    """The text with every marked table made anew. Raises InputError for a table of an unknown name."""

    def table(match: re.Match) -> str:
        kind, _, rest = match[2].partition(" ")
        if kind not in TABLES or not rest:
            raise plot.InputError(f"no table {match[2]!r}: its first word must be one of {', '.join(TABLES)}.")
        return match[1] + TABLES[kind](groups, rest) + match[4]

    return MARKED.sub(table, text)


def add_run(run: Path, variant: str, results: Path) -> Path:
    """Copies a run's eval.csv and config.json to where its task, algorithm and seed belong; returns that folder."""
    found = plot.read_run(run)
    keys = {label: key for key, label in plot.ALGORITHMS.items()}
    name = f"{keys.get(found.algorithm, found.algorithm.replace(' ', '_'))}{variant and '-'}{variant}-seed{found.seed}"
    if not (run / "config.json").is_file():
        raise plot.InputError(f"{run} has no config.json, which a published run needs.")
    folder = results / found.task / name
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("eval.csv", "config.json"):
        shutil.copyfile(run / file, folder / file)
    return folder


def draw_authors(path: Path) -> Figure:
    """The authors' code beside ours on the same data: each seed a thin line, the mean over seeds a thick one."""
    table = pd.read_csv(path)
    panels = {"mean_q": "mean Q", "bound_rate": "bound rate", "alpha": "temperature", "success": "success"}
    styles = {"ours": dict(color="#0072B2"), "authors (JAX)": dict(color="#D55E00", linestyle="--")}
    fig = Figure(figsize=(13, 5.6), dpi=100, layout="constrained")
    axes = fig.subplots(2, len(panels), sharex=True, sharey="col")
    for row, algorithm in zip(axes, ("Cal-QL", "CQL"), strict=True):
        for ax, (column, title) in zip(row, panels.items(), strict=True):
            for code, style in styles.items():
                runs = table[(table.code == code) & (table.algorithm == algorithm)]
                curves = runs.pivot(index="updates", columns="seed", values=column)
                ax.plot(curves, linewidth=0.7, alpha=0.6, **style)
                ax.plot(curves.mean(axis=1), linewidth=2, label=f"{code}, {curves.shape[1]} seeds", **style)
            ax.set_title(f"{algorithm}: {title}", fontsize=10)
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(alpha=0.3)
    for ax in axes[1]:
        ax.set_xlabel("updates")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return fig


@dataclass
class Args:
    check: bool = False  # write nothing, and tell by the exit code whether the tables are what results/ say
    add: tuple[Path, ...] = ()  # folders of runs to publish first
    variant: str = ""  # with --add, a word for settings that are not the task's own
    root: Path = ROOT  # folder with README.md, docs/ and results/, where CORL.csv holds curves that are drawn dashed
    reps: int = 2000  # bootstrap resamples


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 where --check finds a difference, or 2 for bad input."""
    args = tyro.cli(Args, args=argv, description=__doc__)
    results, changed = args.root / "results", []
    try:
        if args.add and args.check or not re.fullmatch(r"[\w.]*", args.variant):
            raise plot.InputError("--add and --check exclude each other, and --variant is one word.")
        for run in args.add:
            print(f"added {add_run(run, args.variant, results)}")
        groups = plot.read_runs([str(results)]) if plot.find_runs([str(results)]) else {}
        for path in [args.root / "README.md", *sorted((args.root / "docs").glob("*.md"))]:
            text = path.read_text()
            if fill(text, groups) != text:
                changed.append(path)
                if not args.check:
                    path.write_text(fill(text, groups))
        if args.check:
            for path in changed:
                print(f"{path}: a table is not what results/ say; run python tools/report.py", file=sys.stderr)
            return int(bool(changed))
        path = results / "CORL.csv"
        peers = plot.read_peers(path) if path.is_file() else None
        for task, algorithms in groups.items():
            plot.draw_all({task: algorithms}, args.root / "docs" / "figures" / task, args.reps, peers, table=False)
        if (path := results / "point-maze-authors.csv").is_file():
            draw_authors(path).savefig(args.root / "docs" / "figures" / "point-maze-large" / "authors.png")
    except (plot.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
