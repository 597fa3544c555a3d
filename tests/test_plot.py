"""tools/plot.py: the table's numbers against ones computed by hand, what the figures draw, and bad input."""

import json

import numpy as np
import pytest

pytest.importorskip("rliable")
pytest.importorskip("matplotlib").use("Agg")

from matplotlib.image import imread  # noqa: E402

from tools import plot, report  # noqa: E402

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
        ("pick-place", "Cal-QL"): ["40", "80", "0.37", "3", "0"],
        # Regrets 1 - 0.4 / 3 and 1 - 0.5 / 3; the run with one row is in no mean.
        ("pick-place", "CQL"): ["10", "15", "0.85", "2", "1"],
        ("pick-place", "SAC + offline data"): ["0", "30", "0.87", "2", "1"],
        ("D4RL-door-v2", "Cal-QL"): ["30", "80", "0.40", "3", "0"],
        ("D4RL-door-v2", "CQL"): ["10", "40", "0.80", "2", "0"],
        ("D4RL-door-v2", "SAC + offline data"): ["0", "20", "0.90", "2", "0"],
        ("maze", "my_algo"): ["10.0", "45.5", "-", "1", "0"],
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
    scores = {ax.get_title(): ax for ax in figure.axes}["pick-place"]
    ax = figure.axes[figure.axes.index(scores) + len(figure.axes) // 3]  # beneath it
    lines = {
        (line.get_color(), line.get_linestyle()): line.get_xydata() for line in ax.lines if line.get_marker() == "None"
    }
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
        ("cal_ql_continuous", dict(cql_weight=5.0, online_cql_factor=1.0)),
        ("cal_ql_continuous", dict(utd_ratio=20, num_critics=10)),
        ("cql_continuous", dict(cql_weight=5.0, online_cql_factor=1.0)),
        ("cql_continuous", dict(cql_weight=5.0, online_cql_factor=0.0)),
        ("sac_offline_data", dict(mixing_ratio=0.0)),
        ("sac_offline_data", dict(mixing_ratio=-1.0)),
        ("sac_offline_data", dict(mixing_ratio=0.5)),
        ("sac_offline_data", dict(mixing_ratio=0.5, num_critics=10, utd_ratio=20)),
    ]):  # fmt: skip
        write(folder, f"pick-place__{script}__1__{k}", [0.1], [0.5], config=config | {"online_steps": 500})
    write(folder, "pick-place__cal_ql_continuous__2__9", [0.1], [0.9], config={"online_steps": 501})
    assert draw(folder) == 0
    assert [(name, *row[3:]) for (_, name), row in cells(folder).items()] == [
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


def test_runs_that_have_just_begun(tmp_path):
    folder = tmp_path / "runs"
    write(folder, "pick-place__cal_ql_continuous__1__10", [0.1], [])
    (write(folder, "pick-place__cal_ql_continuous__2__10", [0.1], []) / "eval.csv").unlink()
    assert draw(folder) == 0
    assert cells(folder) == {("pick-place", "Cal-QL"): ["-", "-", "-", "0", "1"]}


def test_an_algorithm_without_q_has_its_score_drawn(tmp_path):
    """ODT has no critic and IQL no bound rate: those columns are NaN from the first line to the last."""
    run = write(tmp_path, "pick-place__odt_continuous__1__10", [0, 0.2], [0.4, 0.6])
    table = plot.pd.read_csv(run / "eval.csv").assign(mean_q=np.nan, bound_rate=np.nan)
    table.to_csv(run / "eval.csv", index=False, na_rep="nan")
    groups = plot.read_runs([str(tmp_path)])
    assert groups["pick-place"]["ODT"][0].rows.mean_q.isna().all()
    scores, values, rates = plot.draw_calibration(groups).axes[:3]
    drawn = [[line for line in ax.lines if len(line.get_xdata()) == 4] for ax in (scores, values, rates)]
    assert [len(lines) for lines in drawn] == [1, 1, 0]  # of the values the mean return alone


def test_later_run_counts(tmp_path, capsys):
    folder = tmp_path / "runs"
    write(folder, "pick-place__cal_ql_continuous__1__9", [0.1], [0.2])
    write(folder, "pick-place__cal_ql_continuous__1__10", [0.3], [0.4])  # not in the order of the names
    assert draw(folder) == 0
    assert "__9 is skipped" in capsys.readouterr().err
    assert cells(folder)["pick-place", "Cal-QL"][:2] == ["30", "40"]


HEADER = ",".join(plot.COLUMNS) + "\n"
FIRST = "offline,0,0,0.5,0.5,nan,1,1,1,1\n"
NAME = "a__b__1__2"


@pytest.mark.parametrize(("name", "text", "reason"), [
    (NAME, None, "no eval.csv in"),
    (NAME, "", "has no row"),
    (NAME, HEADER, "has no row"),
    (NAME, "step,loss\n1,2\n", "is of another make"),
    (NAME, HEADER.replace("regret,", "") + FIRST.replace("nan,", ""), "is of another make"),
    (NAME, HEADER + FIRST + "offline,0\n", "line 3: 2 cells"),
    (NAME, HEADER + FIRST + FIRST.strip() + ",9\n", "line 3: 11 cells"),
    (NAME, HEADER + "offline,0,0,high,1,1,1,1,1,1\n", "line 2: score is 'high'"),
    (NAME, HEADER + "offline,0,0,nan,1,nan,1,1,1,1\n", "line 2: score is 'nan'"),
    (NAME, HEADER + "offline,0,0,,1,nan,1,1,1,1\n", "line 2: score is ''"),
    (NAME, HEADER + FIRST + "offline,100,0,1,1,nan,nan,1,1,1\n", "line 3: mean_q is 'nan'"),
    (NAME, HEADER + "offline,0,0,1,1,nan,1,1,inf,1\n", "line 2: bound_rate is 'inf'"),
    (NAME, HEADER + "offline,0,0,1,1,-inf,1,1,1,1\n", "line 2: regret is '-inf'"),
    (NAME, HEADER + FIRST.replace("offline", "sideways"), "every phase"),
    (NAME, HEADER + FIRST.replace("offline,0,0", "online,1,1"), "must be in order"),
    (NAME, HEADER + FIRST + FIRST, "must be in order"),
    (NAME, HEADER + FIRST.replace(",0,0,", ",9,0,") + FIRST, "must be in order"),
    (NAME, HEADER + FIRST.replace(",0,0,", ",0,7,"), "must be in order"),
    (NAME, HEADER + FIRST + FIRST.replace("offline,0,0", "online,5,5") + FIRST.replace(",0,0,", ",9,0,"), "in order"),
    (NAME, HEADER + FIRST + "".join(FIRST.replace("offline,0,0", f"online,9,{k}") for k in (9, 8)), "must be in order"),
    ("copy of a run", HEADER + FIRST, "its name must be"),
    (NAME, b"\xff\xfe\x00", "cannot be read"),
    (NAME, HEADER + '"' + FIRST, "cannot be read"),
])  # fmt: skip
def test_bad_input(tmp_path, capsys, name, text, reason):
    run = tmp_path / "runs" / name
    run.mkdir(parents=True)
    if text is not None:
        (run / "eval.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert draw(tmp_path / "runs") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and reason in errors[0]
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("config", ["[1, 2]", "{", '{"online_steps": "many", "utd_ratio": 1}', "null"])
def test_damaged_config_counts_as_none(tmp_path, config):
    run = write(tmp_path / "runs", "pick-place__cql_continuous__1__10", [0.1], [0.5])
    (run / "config.json").write_text(config)
    assert draw(tmp_path / "runs") == 0
    assert cells(tmp_path / "runs") == {("pick-place", "CQL"): ["10", "50", "0.50", "1", "0"]}


def test_output_in_the_way(runs, capsys):
    (runs.parent / "figures").touch()
    assert draw(runs) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_results_folders_name_algorithms(tmp_path):
    results = tmp_path / "results"
    for name, score in [("cal_ql-seed1", 0.8), ("cal_ql-small-seed1", 0.6), ("cql_sac-seed2", 0.4)]:
        write(results / "antmaze-umaze", name, [0.1], [score])
    names = {"Cal-QL": "80", "Cal-QL (small)": "60", "CQL+SAC": "40"}
    for pattern in (f"{results}/*/", f"{results}/*/*", str(results)):
        groups = plot.read_runs([pattern])
        assert list(groups) == ["antmaze-umaze"] and list(groups["antmaze-umaze"]) == list(names)
    assert plot.main([f"{results}/antmaze-umaze/", "--out", str(tmp_path / "figures"), "--reps", "50"]) == 0
    assert {name: row[1] for (_, name), row in cells(results).items()} == names


PEERS = ["algorithm,task,seed,phase,step,score"]
for seed, shift in [(1, 0), (2, 10)]:
    PEERS += [f"CQL,pick-place-v2,{seed},offline,{step},{20 + shift}" for step in (50, 100, 1000)]
    PEERS += [f"CQL,pick-place-v2,{seed},online,{step},{40 + shift}" for step in (1000, 2000)]
    PEERS += [f"IQL,pick-place-v2,{seed},online,500,70", f"CQL,pen-v2,{seed},online,500,70"]


def test_peers_are_dashed_on_their_own_task(runs, tmp_path):
    (tmp_path / "other.csv").write_text("\n".join(PEERS) + "\n")
    groups, peers = plot.read_runs([f"{runs}/*"]), plot.read_peers(tmp_path / "other.csv")
    figure = plot.draw_curves(groups, 50, peers)
    dashed = {}
    for ax in figure.axes:
        lines = [line for line in ax.lines if line.get_linestyle() == "--" and len(line.get_xdata())]
        dashed[ax.get_title()] = [(line.get_color(), line.get_xydata().tolist()) for line in lines]
    assert dashed.pop("pick-place") == [(plot.COLOURS["CQL"], [[0, 25], [1000, 45], [2000, 45]])]
    assert not any(dashed.values())
    ax = {ax.get_title(): ax for ax in figure.axes}["pick-place"]
    assert "CQL, other (2 seeds, after 1k offline updates)" in [text.get_text() for text in ax.get_legend().get_texts()]
    assert ax.get_xlim()[1] == pytest.approx(1.03 * 1560)  # theirs go further
    figure = plot.draw_calibration(groups, peers)
    ax = {ax.get_title(): ax for ax in figure.axes}["pick-place"]
    lines = [line.get_xydata() for line in ax.lines if line.get_linestyle() == "--"]
    np.testing.assert_allclose(lines[0], [[-0.75, 25], [-0.5, 25], [np.nan, 25]])  # our 200 updates take half the axis
    np.testing.assert_allclose(lines[1], [[0, 25], [1000 / 1560, 45], [2000 / 1560, 45]])
    assert draw(runs, "--peers", str(tmp_path / "other.csv")) == 0


@pytest.mark.parametrize("text", ["", PEERS[0], "a,b\n1,2\n", PEERS[0] + "\nCQL,pen,1,online,1,many\n"])
def test_bad_peers(runs, tmp_path, capsys, text):
    (tmp_path / "peers.csv").write_text(text)
    assert draw(runs, "--peers", str(tmp_path / "peers.csv")) == 2
    assert "peers.csv" in capsys.readouterr().err


# --- report.py --------------------------------------------------------------------------------------------------------
PAGE = """# Page

<!-- table task pick-place -->
<!-- end -->
<!-- table seeds pick-place -->
old
<!-- end -->
<!-- table paper Cal-QL -->
<!-- end -->
"""


@pytest.fixture
def page(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text(PAGE)
    (tmp_path / "README.md").write_text("no table\n")
    return tmp_path / "docs" / "page.md"


def test_report_fills_tables_and_draws(tmp_path, page, capsys):
    root = ["--root", str(tmp_path), "--reps", "50"]
    config = {"online_steps": 1500}
    for seed, final in [(1, 0.8), (2, 1.0)]:
        write(tmp_path / "results" / "pick-place", f"cal_ql-seed{seed}", [0, 0.4], [0.5, 0.2, final], config=config)
    write(tmp_path / "results" / "pick-place", "cql-seed1", [0, 0.1], [0.0], config=config)
    write(tmp_path / "results" / "pen-binary", "cal_ql-seed1", [0.5], [0.9, 0.9, 1.0], config=config)
    assert report.main([*root, "--check"]) == 1
    assert page.read_text() == PAGE and "page.md" in capsys.readouterr().err
    assert report.main(root) == 0
    text = page.read_text()
    assert "| Cal-QL | 40 | 90 | 0.47 | 100 | 1,500 | 2 | 0 |" in text
    assert "| CQL | - | - | - | - | - | 0 | 1 |" in text
    assert "| Cal-QL | 1 | 40 | 20 | 80 | 0.500 | 1,500 | 0 |" in text and "old" not in text
    assert "| CQL | 1 | 10 | 0 | 0 | 1.000 | 500 | 0 |" in text
    assert "| pen-binary | 79 | 99 | 0.11 | 50 | 100 | 0.07 | 1,500 | 1 |" in text
    assert "| door-binary | 35 | 92 | 0.23 | not run yet | - | - | - | 0 |" in text
    assert report.main([*root, "--check"]) == 0
    assert (tmp_path / "docs" / "figures" / "pen-binary" / "curves.png").exists()
    page.write_text(text.replace("| 40 | 90 |", "| 40 | 91 |"))
    assert report.main([*root, "--check"]) == 1


def test_report_publishes_a_run(tmp_path, page, capsys):
    run = write(tmp_path / "runs", "pick-place__cql_continuous__3__10", [0.1], [0.2], config={"online_cql_factor": 0,
                "cql_weight": 5.0, "online_steps": 500})  # fmt: skip
    root = ["--root", str(tmp_path), "--reps", "50"]
    assert report.main([*root, "--add", str(run), "--variant", "small"]) == 0
    folder = tmp_path / "results" / "pick-place" / "cql_sac-small-seed3"
    assert (folder / "eval.csv").read_text() == (run / "eval.csv").read_text() and (folder / "config.json").exists()
    assert "| CQL+SAC (small) | 10 | 20 | 0.80 |" in page.read_text()
    (run / "config.json").unlink()
    assert report.main([*root, "--add", str(run)]) == 2
    assert report.main([*root, "--add", str(run), "--check"]) == 2
    page.write_text("<!-- table pie -->\n<!-- end -->\n")
    assert report.main([*root, "--check"]) == 2
    assert all(line.startswith(("error: ", "note: ")) for line in capsys.readouterr().err.splitlines())


@pytest.mark.parametrize("name, line", [("Cal-QL", "-"), ("Cal-QL (small)", "-."), ("Cal-QL (small.hosted)", ":")])
def test_variants_have_lines_of_their_own(name, line):
    assert plot.line_of(name) == line
