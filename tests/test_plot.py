"""tools/plot.py and tools/report.py: groups, numbers by hand, what the pictures hold, and bad input."""

import json
import re
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("rliable")
pytest.importorskip("matplotlib").use("Agg")

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.image import imread  # noqa: E402
from matplotlib.text import Text  # noqa: E402

from tools import plot, report  # noqa: E402

HEADER = "phase,updates,env_steps,score,return,mean_q,mean_mc_return,bound_rate,wall_time"
FIRST = "offline,0,0,0.5,0.5,1,1,1,1"


def write(folder, name, offline, online, ends=(0.3, 0.7, 1.0), q=-4.0, **changes):
    """Writes a run at its task's own settings but for `changes`; `ends` are shares of the online steps."""
    task, script, seed, _ = name.split("__")
    settings = plot.own_settings(script, task) or dict(offline_steps=100, online_steps=1000)
    config = settings | {"env_id": task, "seed": int(seed)} | changes
    lines = [HEADER]
    for k, score in enumerate(offline):
        updates = config["offline_steps"] * k // max(1, len(offline) - 1)
        lines += [f"offline,{updates},0,{score},{score},{-5 * k},-12.5,0.25,{k}"]
    for k, (score, end) in enumerate(zip(online, ends, strict=False)):
        step = int(config["online_steps"] * end) + int(seed)
        lines += [f"online,{updates + step},{step},{score},{score},{q + k},{-12 + k},0.5,{10 + k}"]
    run = folder / name
    run.mkdir(parents=True)
    (run / "eval.csv").write_text("\n".join([*lines, ""]))
    (run / "config.json").write_text(json.dumps(config))
    return run


@pytest.fixture
def runs(tmp_path):
    """Two tasks with scores, and a third one, of a script and with returns of its own."""
    folder = tmp_path / "runs"
    for seed, final in [(1, 0.8), (2, 1.0), (3, 0.6)]:
        ends = [0.3, 0.7, 1 + 0.01 * seed]  # whole episodes: no two seeds agree
        write(folder, f"pick-place__cal_ql_continuous__{seed}__10", [0, 0.2, 0.4], [0.5, 0.6, final], ends)
    for seed in (1, 2):
        write(folder, f"pick-place__cql_continuous__{seed}__10", [0, 0.1], [0.1, 0.2, 0.1 * seed])
        write(folder, f"pick-place__sac_offline_data__{seed}__10", [0], [0.0, 0.1, 0.3], mixing_ratio=-1)
        write(folder, f"door-binary__cal_ql_continuous__{seed}__10", [0, 0.3], [0.5, 0.5, 0.7])
    write(folder, "pick-place__sac_offline_data__3__10", [0], [1.0], mixing_ratio=-1)  # not at its end
    write(folder, "maze__my_algo__1__10", [5.0, 10.0], [20.0, 30.0, 45.5])
    return folder


def draw(folder, *more):
    return plot.main([f"{folder}/*", "--out", str(folder.parent / "figures"), "--reps", "50", *more])


def words(figure):
    """All that a figure says, after checking that no two of its texts overlap."""
    drawn, draw_text = {}, Text.draw
    with mock.patch.object(Text, "draw", lambda text, renderer: drawn.update({text: draw_text(text, renderer)})):
        FigureCanvasAgg(figure).draw()
    boxes = [(text.get_text(), text.get_window_extent()) for text in drawn if text.get_visible() and text.get_text()]
    for (one, box), (other, another) in combinations(boxes, 2):
        assert not box.overlaps(another), f"{one!r} lies on {other!r}"
    return "\n".join(text for text, _ in boxes)


def test_table_and_regret(runs, tmp_path, capsys):
    path = next(runs.glob("pick-place__cql_continuous__1*")) / "eval.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([f"{lines[0]},regret", *(f"{line},9" for line in lines[1:])]))  # of an older version
    assert draw(runs) == 0
    rows = [line.strip("| ").split(" | ") for line in (tmp_path / "figures" / "table.md").read_text().splitlines()]
    assert {tuple(row[:2]): row[2:] for row in rows[2:]} == {
        # Regret of seed 1: 1 - (0.5 + 0.6 + 0.8) / 3 = 0.3667; of seed 2: 0.3; of seed 3: 0.4333.
        ("pick-place", "Cal-QL"): ["40", "80", "0.37", "3", "0"],
        ("pick-place", "CQL"): ["10", "15", "0.85", "2", "0"],  # 1 - 0.4 / 3 and 1 - 0.5 / 3
        ("pick-place", "SAC + offline data"): ["0", "30", "0.87", "2", "1"],  # the unfinished run is in no mean
        ("door-binary", "Cal-QL"): ["30", "70", "0.43", "2", "0"],
        ("maze", "my_algo"): ["10.0", "45.5", "-", "1", "0"],
    }
    files = [f"{runs.parent}/figures/{name}" for name in ("curves.png", "calibration.png", "iqm.png", "table.md")]
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {', '.join(files)}"
    assert all(0.005 < (imread(file)[..., :3].min(-1) < 0.9).mean() < 0.5 for file in files[:3])  # something is drawn


def test_groups_are_what_the_settings_say(tmp_path, capsys):
    task = "pick-place__cal_ql_continuous"
    write(tmp_path, f"{task}__1__1", [0, 0.4], [0.5, 0.6, 0.8])
    write(tmp_path, f"{task}__1__2", [0, 0.4], [0.1, 0.1, 0.1], cql_weight=1.0)  # the same seed, and later
    write(tmp_path, f"{task}__2__3", [0, 0.2], [0.5, 0.6, 0.4], device="cuda", resume="runs/x", cuda_graphs=False)
    write(tmp_path, f"{task}__3__4", [0, 0.2], [1.0], ends=[1.0], online_steps=40, critic_layers=[8, 8])
    write(tmp_path, f"{task}__1__5", [0, 0.0], [0.0], ends=[0.5])  # later, of the first one's settings, unfinished
    groups = plot.read_runs([str(tmp_path)])["pick-place"]
    seeds = {name: [(run.seed, run.time) for run in runs] for name, runs in groups.items()}
    assert seeds == {"Cal-QL": [(1, 1), (2, 3)], "Cal-QL, cql_weight 1": [(1, 2)],
                     "Cal-QL, online_steps 40, critic_layers 8 8": [(3, 4)]}  # fmt: skip
    assert "1__5: a run of its settings" in capsys.readouterr().err
    (ax,) = plot.draw_curves({"pick-place": groups}, 50).axes
    lines = [line.get_xdata()[-1] for line in ax.lines if len(line.get_xdata())]
    assert lines == [7001, 7001, 43]  # each group has its own length; of its seeds, the shortest


def test_groups_of_own_data_are_named_by_what_tells_them_apart(tmp_path):
    for seed, weight in [(1, 1.0), (2, 1.0), (3, 5.0)]:
        name = f"mine-maze-v0__cal_ql_continuous__{seed}__10"
        run = write(tmp_path, name, [0, 0.5], [1.0], (1.0,), gamma=0.9, batch_size=64, cql_weight=weight)
        (run / "config.json").write_text((run / "config.json").read_text().replace("mine-maze-v0", "mine/maze-v0"))
    (name, groups), = plot.read_runs([f"{tmp_path}/*"]).items()  # fmt: skip
    assert (name, set(groups)) == ("mine-maze-v0", {"Cal-QL, cql_weight 1", "Cal-QL, cql_weight 5"})


def test_published_runs_are_named_by_their_folder(tmp_path):
    for k, (name, changes) in enumerate({
        "cal_ql-seed1": dict(offline_steps=5, threads=1, eval_async=True), "cql-seed1": dict(cql_weight=1.0),
        "cal_ql-small-seed1": dict(batch_size=8), "cal_ql-small-seed2": dict(batch_size=8, seed=2),
        "cql_sac-seed1": dict(online_cql_factor=0.0), "wsrl-1": dict(mixing_ratio=0.0)}.items()):  # fmt: skip
        script = "cql_continuous" if "cql" in name else "cal_ql_continuous"
        run = write(tmp_path, f"pick-place__{script}__1__{k}", [0, 0.1], [0.5, 0.5, 0.5], **changes)
        run.rename(tmp_path / name)
    expected = ["Cal-QL", "Cal-QL (small)", "CQL, cql_weight 1", "CQL+SAC", "wsrl"]
    assert [*plot.read_runs([str(tmp_path)])["pick-place"]] == expected
    write(tmp_path, "pick-place__cal_ql_continuous__1__9", [0, 0.1], [0.5])  # an own one is no seed of the shorter
    expected.insert(2, "Cal-QL, offline_steps 5")
    assert [*plot.read_runs([str(tmp_path)])["pick-place"]] == expected


@pytest.mark.parametrize(("script", "config", "name"), [
    ("cal_ql_continuous", dict(cql_weight=5.0), "Cal-QL"), ("cql_pixels", dict(online_cql_factor=0.0), "CQL+SAC"),
    ("sac_offline_data", dict(mixing_ratio=0.0), "SAC"), ("sac_offline_data", dict(mixing_ratio=0.5), "Hybrid RL"),
    ("sac_offline_data", plot.MADE_OF["RLPD"][1], "RLPD"), ("mine", {}, "mine"),
])  # fmt: skip
def test_settings_name_algorithms(script, config, name):
    assert plot.name_algorithm(script, config) == name


def test_curves_hold_the_means_and_say_what_is_in_them(runs, tmp_path):
    (tmp_path / "other.csv").write_text("algorithm,task,seed,phase,step,score\n" + "".join(
        f"CQL,pick-place-v2,{seed},offline,1000,{20 * seed}\nCQL,pick-place-v2,{seed},online,2000,{40 * seed}\n"
        f"CQL,pen-v2,{seed},online,500,70\n" for seed in (1, 2)))  # fmt: skip
    figure = plot.draw_curves(plot.read_runs([f"{runs}/*"]), 50, plot.read_peers(tmp_path / "other.csv"))
    assert re.search("95% bootstrap.*a cross: an unfinished run", words(figure), re.DOTALL)
    ax = {ax.get_title(): ax for ax in figure.axes}["pick-place"]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["Cal-QL (3 seeds)", "CQL (2 seeds)", "SAC + offline data (2 seeds, 1 unfinished)",
                      "CQL, other (2 seeds, after 1k offline updates)"]  # fmt: skip
    lines = {(line.get_color(), line.get_marker()): line.get_xydata() for line in ax.lines if len(line.get_xdata())}
    np.testing.assert_allclose(lines[plot.COLOURS["CQL"], "None"], [[0, 10], [2101, 10], [4901, 20], [7001, 15]], 0.01)
    np.testing.assert_allclose(lines[plot.COLOURS["CQL"], "."], [[0, 30], [2000, 60]])  # the peers
    assert lines[plot.COLOURS["SAC + offline data"], "x"][-1].tolist() == [2103, 100]  # the unfinished run as it is
    assert lines[plot.COLOURS["Cal-QL"], "None"][-1, 0] == 7071  # the shortest of the three seeds


def test_one_finished_seed_is_called_nothing_else(tmp_path):
    write(tmp_path, "pick-place__cal_ql_continuous__1__10", [0.1, 0.2], [0.4, 0.5, 0.6])
    (tmp_path / "iqm.png").touch()  # of an earlier call
    groups = plot.read_runs([str(tmp_path)])
    for figure in (plot.draw_curves(groups, 50), plot.draw_calibration(groups)):
        assert "Cal-QL (1 seed)" in words(figure) and not re.search("bootstrap|unfinished|band", words(figure))
    assert len(plot.draw_all(groups, tmp_path, 50, None)) == 3 and not (tmp_path / "iqm.png").exists()


def test_iqm(runs):
    figure = plot.draw_iqm(plot.read_runs([f"{runs}/*"]), 50)
    assert "SAC + offline data (2 seeds)" in words(figure) and "my_algo" not in words(figure)
    marks = [[line.get_xdata()[0] for line in ax.lines if line.get_marker() == "|"] for ax in figure.axes]
    # Of three seeds 60, 80, 100 the interquartile mean is the middle one; of door's two and these, of four, the middle.
    np.testing.assert_allclose(marks[2], [80, 15, 30])
    np.testing.assert_allclose(marks[3], [1.1 / 3, 1 - 0.45 / 3, 1 - 0.4 / 3])
    np.testing.assert_allclose(marks[4], [(70 + 80) / 2])  # all tasks that have scores: 70, 70, 80, 100


def test_calibration_joins_the_phases_of_cal_ql_and_cql(runs):
    with mock.patch.object(plot, "draw_calibration", wraps=plot.draw_calibration) as drawn:
        draw(runs)
    figure = plot.draw_calibration({"pick-place": drawn.call_args.args[0]["pick-place"]})
    assert "CQL (2 seeds)" in words(figure) and "SAC" not in words(figure)
    _, ax, rate = figure.axes
    lines = {(line.get_color(), line.get_linestyle()): line.get_xydata() for line in ax.lines}
    x = [-1, 0, 2101.5 / 7213, 4901.5 / 7213, 7001 / 7213]
    np.testing.assert_allclose(lines[plot.COLOURS["CQL"], "-"], [*zip(x, [0, -5, -4, -3, -2], strict=True)], 2e-3, 1e-3)
    np.testing.assert_allclose(lines[plot.COLOURS["Cal-QL"], "--"][:3], [[-1, -12.5], [-0.5, -12.5], [0, -12.5]])
    assert rate.get_ylabel() == "Bound rate (%)" and ax.get_xlim() == (-1.03, 1.03)


def test_a_diverged_group_does_not_flatten_the_panel(tmp_path):
    write(tmp_path, "pick-place__sac_offline_data__1__1", [0], [0.1, 0.1, 0.1], q=2e6)
    alone = plot.draw_calibration(plot.read_runs([str(tmp_path)])).axes[1]
    assert alone.get_ylim()[1] > 2e6 and not alone.get_title("left")
    write(tmp_path, "pick-place__iql_continuous__1__1", [0, 0.1], [0.1, 0.1, 0.1])
    ax = plot.draw_calibration(plot.read_runs([str(tmp_path)])).axes[1]
    assert ax.get_ylim() == pytest.approx((-13.125, 0.625))
    assert ax.get_title("left") == "Hybrid RL leaves this panel: Q comes to 2.0M"


def test_one_run_in_four_lines(tmp_path, capsys, monkeypatch):
    """None is wider than a terminal of old, and the shell finds the folder that is meant."""
    monkeypatch.setattr(plot, "RESULTS", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    name = "pick-place__cal_ql_continuous__7__1795853152701315175"
    run = write(tmp_path / "runs", name, [0, 0.4], [0.5, 0.6, 0.8])
    assert plot.main(["--run", str(run)]) == 0
    assert capsys.readouterr().out.startswith("Success: 40% before, 80% after fine-tuning.\n")
    for seed, gamma in [(1, 0.96), (2, 0.96), (3, 0.5)]:
        name, scores = f"pick-place__cal_ql_continuous__{seed}__1", ([0, 0.1 * seed], [0.5, 0.5, 1 - 0.1 * seed])
        write(tmp_path / "results" / "pick-place", name, *scores, gamma=gamma)
    assert plot.main(["--run", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and max(map(len, lines)) <= 80
    assert lines[0] == "Success: 40% before, 80% after fine-tuning (2 seeds: 10 to 20%, 80 to 90%)."
    assert lines[1] == "Policy: runs/*1795853152701315175/checkpoint.pt; curve: figures/run.png"
    assert Path("figures/run.png").is_file() and lines[2].endswith("tools/plot.py --film runs/*1795853152701315175")
    assert [path.resolve() for path in Path().glob("runs/*1795853152701315175")] == [run]


def test_values_of_a_maze(monkeypatch):
    """Q is minus the distance to the goal here, so its picture is known; the position stands in the state twice."""
    walls, goal = [[1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 1, 1]], np.float32([2, 0])
    maze = SimpleNamespace(maze_map=walls, maze_size_scaling=4.0, x_map_center=8.0, y_map_center=6.0)
    states = np.float32([[-3.9, 1.9, 7.0, -3.9, 1.9], [3.9, -1.9, 7.0, 3.9, -1.9]])

    def q(observations, actions):
        assert (observations[:, 2] == 7).all() and (observations[:, :2] == observations[:, 3:]).all()
        distance = (observations[:, :2] - observations.new_tensor(goal)).norm(dim=1, keepdim=True)
        return (-distance - actions.abs().sum(2)).unsqueeze(0)

    args = SimpleNamespace(env_id="maze", datasets=(), gamma=0.9, reward_scale=1.0, reward_bias=0.0)
    loaded = SimpleNamespace(updates=5, env_steps=0, args=args)
    loaded.agent = SimpleNamespace(critic=q, act=lambda observations, explore: 0 * observations[:, :2])
    loaded.offline = [SimpleNamespace(observations=states, mc_returns=np.float32([-9, -1]))]
    loaded.env = SimpleNamespace(unwrapped=SimpleNamespace(maze=maze, goal=goal))
    loaded.script = SimpleNamespace(__name__="mine", play_episode=lambda *_: (loaded.offline[0], 1.0))
    other = SimpleNamespace(**vars(loaded) | {"args": SimpleNamespace(**vars(args) | {"gamma": 0.5})})
    monkeypatch.setattr(plot, "load_run", lambda run, _: {"a": loaded, "b": other}[run])
    figure = plot.draw_values(["a"], None)
    assert "mine after 5 updates; 8 of 8 arrive" in words(figure)
    data, values = (np.ma.filled(ax.images[1].get_array(), np.nan) for ax in figure.axes[:2])
    assert data.shape == (12, 16) and data[4, 4] == -9 and data[7, 11] == -1 and np.isfinite(data).sum() == 2
    x, y = np.meshgrid(np.arange(-7.5, 8), np.arange(5.5, -6, -1))
    expected = np.where((abs(x) < 4) & (abs(y) < 2), -np.hypot(x - 2, y), np.nan)
    np.testing.assert_allclose(values, expected, atol=1e-5)
    with pytest.raises(plot.InputError, match="differ in gamma"):
        plot.draw_values(["a", "b"], None)


NAME = "pick-place__cql_continuous__1__2"


@pytest.mark.parametrize(("name", "text", "reason"), [
    (NAME, None, "no eval.csv in"),
    (NAME, b"\xff\xfe\x00", "cannot be read"),
    (NAME, HEADER, "empty or cut off"),
    (NAME, "step,loss\n1,2\n", "no column phase"),
    (NAME, f"{HEADER}\n{FIRST}\noffline,0\n", "cut off"),
    (NAME, f"{HEADER}\n{FIRST.replace('0.5', 'high')}\n", "a cell is no number"),
    (NAME, f"{HEADER}\n{FIRST.replace('offline', 'sideways')}\n", "in order"),
    (NAME, f"{HEADER}\n{FIRST}\n{FIRST}\n", "in order"),
    ("copy of a run", f"{HEADER}\n{FIRST.replace(',0,0,', ',0,7,')}\n", "in order"),
])  # fmt: skip
def test_bad_input(tmp_path, capsys, name, text, reason):
    run = tmp_path / "runs" / name
    run.mkdir(parents=True)
    (run / "config.json").write_text('{"env_id": "pick-place", "seed": 1, "offline_steps": 0, "online_steps": 0}')
    if text is not None:
        (run / "eval.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert draw(tmp_path / "runs") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and reason in errors[0]
    assert not (tmp_path / "figures").exists()
    write(tmp_path / "runs", "pick-place__iql_continuous__1__1", [0, 0.1], [0.5, 0.5, 0.5])
    assert draw(tmp_path / "runs") == 0  # a run that cannot be read ends nothing for the others
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == (text is not None) and all(line.startswith("left out: ") for line in errors)


def test_other_bad_input(runs, tmp_path, capsys):
    for config in ("[1, 2]", "{", '{"env_id": "a", "seed": "many"}', "null"):
        run = next(runs.iterdir())
        (run / "config.json").write_text(config)
        assert plot.main([str(run)]) == 2 and "config.json cannot be read" in capsys.readouterr().err
    (tmp_path / "peers.csv").write_text("algorithm,task,seed,phase,step,score\nCQL,pen,1,online,1,many\n")
    assert draw(runs, "--peers", str(tmp_path / "peers.csv")) == 2 and "peers.csv" in capsys.readouterr().err
    (tmp_path / "figures").touch()
    assert draw(runs) == 2 and "error: " in capsys.readouterr().err


def test_a_missing_package_is_one_sentence():
    code = "import runpy, sys; sys.modules['rliable'] = None; runpy.run_path('tools/plot.py', run_name='__main__')"
    process = subprocess.run([sys.executable, "-c", code], cwd=plot.ROOT, capture_output=True, text=True)
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1, process.stderr
    assert process.stderr.startswith("error: ") and "pip install -r requirements-dev.txt" in process.stderr
    error = plot.InputError("cannot make the environment")
    assert plot.missing_package(error) is None
    error.__cause__ = ModuleNotFoundError("No module named 'imageio'", name="imageio")
    assert "pip install imageio" in plot.missing_package(error)


# --- report.py --------------------------------------------------------------------------------------------------------
def test_the_authors_code_stands_beside_ours(tmp_path):
    lines = ["code,algorithm,seed,updates,mean_q,bound_rate,alpha,success"]
    for k, (code, algorithm, seed) in enumerate(product(("ours", "authors (JAX)"), ("Cal-QL", "CQL"), (1, 2))):
        lines += [f"{code},{algorithm},{seed},{updates},{k},0.5,1,{updates / 100}" for updates in (0, 100)]
    (tmp_path / "authors.csv").write_text("\n".join(lines))
    fig = report.draw_authors(tmp_path / "authors.csv")
    assert [ax.get_title() for ax in fig.axes[:2]] == ["Cal-QL: mean Q", "Cal-QL: bound rate"] and len(fig.axes) == 8
    # Two seeds and their mean, of ours and then of the authors', which are dashed.
    assert [line.get_ydata().tolist() for line in fig.axes[4].lines] == [[q, q] for q in (2, 3, 2.5, 6, 7, 6.5)]
    assert [line.get_linestyle() for line in fig.axes[4].lines] == 3 * ["-"] + 3 * ["--"]
    assert fig.axes[3].lines[2].get_ydata().tolist() == [0, 1]
    assert [text.get_text() for text in fig.legends[0].texts] == ["ours, 2 seeds", "authors (JAX), 2 seeds"]


def test_report_publishes_runs_fills_tables_and_draws(tmp_path, capsys):
    root, page = ["--root", str(tmp_path), "--reps", "50"], tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    tables = ["task pick-place", "seeds pick-place", "whole Cal-QL"]
    page.write_text("\n".join(f"<!-- table {name} -->\nold\n<!-- end -->" for name in tables))
    (tmp_path / "README.md").touch()
    for name, online in [("cal_ql_continuous__1", [0.5, 0.2, 0.8]), ("cal_ql_continuous__2", [0.5, 0.2, 1.0])]:
        write(tmp_path / "runs", f"pick-place__{name}__1", [0, 0.4], online)
    write(tmp_path / "runs", "pick-place__cql_continuous__1__1", [0, 0.1], [0.0])
    assert report.main([*root, "--add", *map(str, (tmp_path / "runs").iterdir())]) == 0
    small = write(tmp_path / "runs", "pick-place__cql_continuous__3__1", [0, 0.1], [0.2], [1], online_cql_factor=0)
    assert report.main([*root, "--add", str(small), "--variant", "small"]) == 0
    folder = tmp_path / "results" / "pick-place" / "cql_sac-small-seed3"
    assert all((folder / file).read_text() == (small / file).read_text() for file in ("eval.csv", "config.json"))
    text = page.read_text()
    assert "| Cal-QL | 40 | 90 | 0.47 | 2,400 | 7,002 | 2 | 0 |" in text and "old" not in text
    assert "| CQL | - | - | - | - | - | 0 | 1 |" in text and "| CQL+SAC (small) | 10 | 20 | 0.80 |" in text
    assert "| Cal-QL | 1 | 40 | 20 | 80 | 0.500 | 7,001 | 0 |" in text and "| CQL | 1 | 10 | 0 | 0 | 1.000 |" in text
    assert "| door-binary | 35 | 92 | 0.23 | not run yet | - | - | - | 0 |" in text
    assert (tmp_path / "docs" / "figures" / "pick-place" / "curves.png").exists()
    assert report.main([*root, "--check"]) == 0 and not capsys.readouterr().err
    page.write_text(text.replace("| 40 | 90 |", "| 40 | 91 |"))
    assert report.main([*root, "--check"]) == 1 and "page.md" in capsys.readouterr().err
    page.write_text("<!-- table pie -->\n<!-- end -->\n")
    assert report.main([*root, "--check"]) == 2 and report.main([*root, "--add", str(small), "--check"]) == 2
    (small / "config.json").unlink()
    assert report.main([*root, "--add", str(small)]) == 2
    assert all(line.startswith("error: ") for line in capsys.readouterr().err.splitlines())
