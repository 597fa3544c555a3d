"""plot.py: the table's numbers against ones computed by hand, what the figures draw, and bad input."""

import json

import numpy as np
import pytest

pytest.importorskip("rliable")
pytest.importorskip("matplotlib").use("Agg")

from matplotlib.image import imread  # noqa: E402

import plot  # noqa: E402

FIGURES = ["calibration.png", "curves.png", "iqm.png"]


def write(folder, name, offline, online, steps=(500, 1010, 1500), scored=True, config=None):
    """Writes a run: offline scores 100 updates apart, then online ones at these environment steps."""
    lines = [",".join(plot.COLUMNS)]
    for k, score in enumerate(offline):
        lines += [f"offline,{100 * k},0,{score},{score},nan,{-5 * k},-12.5,0.25,{k}"]
    for k, (score, step) in enumerate(zip(online, steps, strict=False)):
        regret = 1 - np.mean(online[: k + 1]) if scored else np.nan
        updates = 100 * (len(offline) - 1) + step
        lines += [f"online,{updates},{step},{score},{score},{regret},{-4 + k},{-12 + k},0.5,{10 + k}"]
    run = folder / name
    run.mkdir(parents=True)
    (run / "eval.csv").write_text("\n".join([*lines, ""]))
    if config is not None:
        (run / "config.json").write_text(json.dumps(config))
    return run


@pytest.fixture
def runs(tmp_path):
    """Two tasks that three algorithms share, and a third task with returns instead of scores."""
    folder = tmp_path / "runs"
    for seed, final in [(1, 0.8), (2, 1.0), (3, 0.6)]:
        steps = [500 + seed, 1000 + 7 * seed, 1500 + 20 * seed]  # whole episodes: no two seeds agree
        write(folder, f"pick-place__cal_ql_continuous__{seed}__10", [0, 0.2, 0.4], [0.5, 0.6, final], steps)
        write(folder, f"D4RL-door-v2__cal_ql_continuous__{seed}__10", [0, 0.3], [0.5, 0.5, final], steps)
    for seed in (1, 2):  # seed 3 is missing
        write(folder, f"pick-place__cql_continuous__{seed}__10", [0, 0.1], [0.1, 0.2, 0.1 * seed])
        write(folder, f"D4RL-door-v2__cql_continuous__{seed}__10", [0, 0.1], [0.0, 0.2, 0.4])
        write(folder, f"pick-place__sac_offline_data__{seed}__10", [0], [0.0, 0.1, 0.3])  # no pre-training
        write(folder, f"D4RL-door-v2__sac_offline_data__{seed}__10", [0], [0.0, 0.1, 0.2])
    write(folder, "pick-place__sac_offline_data__3__10", [0], [1.0])  # ends early
    write(folder, "pick-place__cql_continuous__4__10", [0.7], [])  # one row
    write(folder, "maze__my_algo__1__10", [5.0, 10.0], [20.0, 30.0, 45.5], scored=False)  # one seed
    return folder


def draw(folder, *more):
    return plot.main([f"{folder}/*", "--out", str(folder.parent / "figures"), "--reps", "50", *more])


def cells(folder):
    """The table's rows as lists of cells, by task and algorithm."""
    lines = (folder.parent / "figures" / "table.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    return {(row[0], row[1]): row[2:] for row in rows}


def test_table(runs, capsys):
    assert draw(runs) == 0
    assert cells(runs) == {
        # Regret of seed 1: 1 - (0.5 + 0.6 + 0.8) / 3 = 0.3667; of seed 2: 0.3; of seed 3: 0.4333.
        ("pick-place", "Cal-QL"): ["40 -> 80", "0.37", "3", "0"],
        # Regrets 1 - 0.4 / 3 and 1 - 0.5 / 3; the run with one row is in no mean.
        ("pick-place", "CQL"): ["10 -> 15", "0.85", "2", "1"],
        ("pick-place", "SAC + offline data"): ["0 -> 30", "0.87", "2", "1"],
        ("D4RL-door-v2", "Cal-QL"): ["30 -> 80", "0.40", "3", "0"],
        ("D4RL-door-v2", "CQL"): ["10 -> 40", "0.80", "2", "0"],
        ("D4RL-door-v2", "SAC + offline data"): ["0 -> 20", "0.90", "2", "0"],
        ("maze", "my_algo"): ["10.0 -> 45.5 (return)", "-", "1", "0"],
    }
    printed = capsys.readouterr()
    assert (runs.parent / "figures" / "table.md").read_text() in printed.out
    assert "iqm.png: D4RL-door-v2 (seeds [1, 2]), pick-place (seeds [1, 2])" in printed.out
    assert "my_algo is not in iqm.png" in printed.err


def test_figures_show_something(runs):
    assert draw(runs) == 0
    for name in FIGURES:
        image = imread(runs.parent / "figures" / name)[..., :3]
        assert min(image.shape[:2]) > 150 and 0.005 < (image.min(-1) < 0.9).mean() < 0.5
        for algorithm in ["Cal-QL", "CQL", "SAC + offline data"]:
            rgb = [int(plot.COLOURS[algorithm][k : k + 2], 16) / 255 for k in (1, 3, 5)]
            assert (abs(image - rgb).max(-1) < 0.02).sum() > 50, f"{name} lacks {algorithm}"


def test_curves_hold_the_means(runs):
    figure = plot.draw_curves(plot.read_runs([f"{runs}/*"]), 50)
    ax = {ax.get_title(): ax for ax in figure.axes}["pick-place"]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["Cal-QL (3 seeds)", "CQL (2 seeds)", "SAC + offline data (2 seeds, 1 unfinished)"]
    lines = {(line.get_color(), line.get_marker()): line.get_xydata() for line in ax.lines if len(line.get_xdata())}
    np.testing.assert_allclose(lines["#D55E00", "None"], [[0, 10], [500, 10], [1010, 20], [1500, 15]])
    np.testing.assert_allclose(lines["#009E73", "x"], [[0, 0], [500, 100]])  # the run that ends early, as it is
    mean = lines["#0072B2", "None"]
    assert mean[-1, 0] == 1520  # the shortest of the three seeds
    # There seed 1 ends at 80; seeds 2 and 3 are on their way from 60 at 1014 and 1021 to 100 at 1540 and 60 at 1560.
    assert mean[-1, 1] == pytest.approx((80 + 60 + 40 * (1520 - 1014) / (1540 - 1014) + 60) / 3)


def test_iqm_is_over_what_all_share(runs):
    figure = plot.draw_iqm(plot.read_runs([f"{runs}/*"]), 50)
    marks = [[line.get_xdata()[0] for line in ax.lines if line.get_marker() == "|"] for ax in figure.axes]
    # Cal-QL, seeds 1 and 2 of both tasks: scores 80, 100, 80, 100; the middle two of four.
    np.testing.assert_allclose(marks[0], [90, (20 + 40) / 2, (20 + 30) / 2])
    # Its regrets are 1.2/3, 1/3 (door), 1.1/3 and 0.9/3 (pick-place).
    np.testing.assert_allclose(marks[1], [(1 + 1.1) / 6, (0.8 + 1 - 0.5 / 3) / 2, (1 - 0.4 / 3 + 0.9) / 2])


def test_calibration_joins_the_phases(runs):
    figure = plot.draw_calibration(plot.read_runs([f"{runs}/*"]))
    ax = {ax.get_title(): ax for ax in figure.axes}["pick-place"]
    lines = {(line.get_color(), line.get_linestyle()): line.get_xydata() for line in ax.lines
             if line.get_marker() == "None"}
    # CQL: 100 updates, which end at the switch although Cal-QL made 200; then 500, 1010 and 1500 of at most 1560 steps.
    points = [[-0.5, 0], [0, -5], [500 / 1560, -4], [1010 / 1560, -3], [1500 / 1560, -2]]
    np.testing.assert_allclose(lines["#D55E00", "-"], points)
    np.testing.assert_allclose(lines["#009E73", "-"][0], [0, 0])  # without pre-training a run starts at the switch
    np.testing.assert_allclose(lines["#0072B2", "--"][:3], [[-1, -12.5], [-0.5, -12.5], [0, -12.5]])
    assert ax.get_xlim() == (-1.03, 1.03)
    figure = plot.draw_calibration(plot.read_runs([f"{runs}/*sac_offline_data*"]))
    assert all(ax.get_xlim() == (-0.03, 1.03) for ax in figure.axes)  # no offline half where nothing is pre-trained


def test_config_names_algorithms_and_tells_the_end(tmp_path):
    folder = tmp_path / "runs"
    for k, (script, config) in enumerate([
        ("cal_ql_continuous", dict(cql_weight=5.0, online_cql_weight=5.0)),
        ("cal_ql_continuous", dict(utd_ratio=20, num_critics=10)),
        ("cql_continuous", dict(cql_weight=5.0, online_cql_weight=5.0)),
        ("cql_continuous", dict(cql_weight=5.0, online_cql_weight=0.0)),
        ("sac_offline_data", dict(mixing_ratio=0.0)),
        ("sac_offline_data", dict(mixing_ratio=-1.0)),
        ("sac_offline_data", dict(mixing_ratio=0.5)),
        ("sac_offline_data", dict(mixing_ratio=0.5, num_critics=10, utd_ratio=20)),
    ]):  # fmt: skip
        write(folder, f"pick-place__{script}__1__{k}", [0.1], [0.5], config=config | {"online_steps": 500})
    write(folder, "pick-place__cal_ql_continuous__2__9", [0.1], [0.9], config={"online_steps": 501})
    assert draw(folder) == 0
    assert [(name, *row[2:]) for (_, name), row in cells(folder).items()] == [
        ("Cal-QL", "1", "1"), ("CQL", "1", "0"), ("CQL+SAC", "1", "0"), ("Hybrid RL", "1", "0"), ("RLPD", "1", "0"),
        ("SAC + offline data", "1", "0"), ("SAC", "1", "0"), ("Cal-QL at UTD 20", "1", "0"),
    ]  # fmt: skip


def test_one_seed_has_no_iqm(tmp_path, capsys):
    folder = tmp_path / "runs"
    write(folder, "pick-place__cal_ql_continuous__1__10", [0.1, 0.2], [0.4, 0.5, 0.6])
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "iqm.png").touch()  # of an earlier call
    assert draw(folder) == 0
    assert "no iqm.png: it needs two finished seeds" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [*FIGURES[:2], "table.md"]


def test_runs_that_have_just_begun(tmp_path, capsys):
    folder = tmp_path / "runs"
    write(folder, "pick-place__cal_ql_continuous__1__10", [0.1], [])
    write(folder, "pick-place__cal_ql_continuous__2__10", [], [])
    (write(folder, "pick-place__cal_ql_continuous__3__10", [], []) / "eval.csv").write_text("")
    assert draw(folder) == 0
    assert capsys.readouterr().err.count("has no evaluation yet and is skipped") == 2
    assert cells(folder) == {("pick-place", "Cal-QL"): ["-", "-", "0", "1"]}


def test_later_run_counts(tmp_path, capsys):
    folder = tmp_path / "runs"
    write(folder, "pick-place__cal_ql_continuous__1__9", [0.1], [0.2])
    write(folder, "pick-place__cal_ql_continuous__1__10", [0.3], [0.4])  # not in the order of the names
    assert draw(folder) == 0
    assert "__9 is skipped" in capsys.readouterr().err
    assert cells(folder)["pick-place", "Cal-QL"][0] == "30 -> 40"


HEADER = ",".join(plot.COLUMNS)


@pytest.mark.parametrize(("name", "text", "reason"), [
    ("a__b__1__2", None, "no eval.csv in"),
    ("a__b__1__2", "", "no run in"),
    ("a__b__1__2", "step,loss\n1,2\n", "is of another make"),
    ("a__b__1__2", HEADER + "\nonline,1,1,1,1,1,1,1,1,1\n", "the first row offline"),
    ("a__b__1__2", HEADER + "\noffline,0,0,high,1,1,1,1,1,1\n", "hold numbers"),
    ("a__b__1__2", HEADER + "\noffline,0,0\n", "hold numbers"),
    ("copy of a run", HEADER + "\noffline,0,0,1,1,nan,1,1,1,1\n", "its name must be"),
    ("a__b__1__2", b"\xff\xfe\x00", "cannot be read"),
])  # fmt: skip
def test_bad_input(tmp_path, capsys, name, text, reason):
    run = tmp_path / "runs" / name
    run.mkdir(parents=True)
    if text is not None:
        (run / "eval.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert draw(tmp_path / "runs") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert len(errors) == 1 and errors[0].startswith("error: ") and reason in errors[0]
    assert not (tmp_path / "figures").exists()


def test_output_in_the_way(runs, capsys):
    (runs.parent / "figures").touch()
    assert draw(runs) == 2
    assert capsys.readouterr().err.startswith("error: ")
