"""The scripts repeat each other on purpose: what they share is the same to the letter, and each runs alone."""

import ast
import difflib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ["cal_ql_continuous.py", "cql_continuous.py", "sac_offline_data.py"]
STATEMENT = "q_next, q_pi = torch.maximum(q_next, v_mu), torch.maximum(q_pi, v_mu)"
BANNER = re.compile(r"^ *# --- (.+? \(common\))(?: -+)?$", re.MULTILINE)
PIXEL_RIVALS = ["baselines/iql_pixels.py", "baselines/awac_pixels.py"]
MOST_LINES = dict(zip(SCRIPTS, (835, 833, 799), strict=True)) | {"baselines/sac_pixels.py": 804}
MOST_LINES |= dict(zip(PIXEL_RIVALS, (807, 784), strict=True))
# Common sections of the main file that a script leaves out, or has a version of its own of: none here.
LEFT_OUT: dict[str, set[str]] = {}
# Classes and functions of the main file that each script has its own version of; all others are the same to the letter.
RIVAL = {"Args", "Actor", "Critic", "Agent", "update", "probe"}
PIXELS = {"Args", "Agent", "update", "probe", "load_episodes", "ReplayBuffer", "TaskEnv", "make_env"}
OWN = {
    "cql_continuous.py": {"update"},
    "sac_offline_data.py": {"Args", "Agent", "update", "probe"},
    "cal_ql_pixels.py": PIXELS,
    "baselines/cql_pixels.py": PIXELS,
    "baselines/sac_pixels.py": PIXELS,
    "baselines/iql_continuous.py": RIVAL,
    "baselines/awac_continuous.py": RIVAL,
    "baselines/td3_bc_continuous.py": RIVAL,
    **dict.fromkeys(PIXEL_RIVALS, RIVAL | PIXELS),
    "baselines/odt_continuous.py": {
        *("Args", "Agent", "update", "ReplayBuffer", "play_episode", "evaluate", "train", "parse_args")
    },
}


def read(name: str) -> str:
    return (ROOT / name).read_text()


def sync(root: Path, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, root / "tools/sync.py", *flags], capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path) -> Path:
    """A folder with copies of the scripts and of sync.py, in step even where the originals are not."""
    for name in [*SCRIPTS, "tools/sync.py"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    assert sync(tmp_path).returncode == 0
    return tmp_path


def definitions(name: str) -> dict[str, str]:
    """The text of every top-level class and function, decorators included."""
    lines, texts = read(name).splitlines(), {}
    for node in ast.parse(read(name)).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            texts[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return texts


@pytest.mark.parametrize("name", OWN)
def test_what_is_not_a_scripts_own_is_the_main_files_to_the_letter(name):
    ours, main = definitions(name), definitions("cal_ql_continuous.py")
    assert {part for part in ours.keys() & main.keys() if ours[part] != main[part]} == OWN[name]


def test_every_script_is_listed():
    found = {path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.py"), *ROOT.glob("baselines/*.py")]}
    assert found == {"cal_ql_continuous.py", *OWN}


def test_common_sections_are_the_same_to_the_letter():
    result = sync(ROOT, "--check")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_the_common_sections(name):
    """A lost banner, or one no longer called common, would exempt a section from the check above."""
    names = [section for section in BANNER.findall(read(SCRIPTS[0])) if section not in LEFT_OUT.get(name, ())]
    assert len(names) >= 4
    assert BANNER.findall(read(name)) == names


@pytest.mark.parametrize("place", ["first section", "last section", "end of file"])
@pytest.mark.parametrize("name", SCRIPTS[1:])
def test_check_names_an_altered_section_and_sync_restores_it(copy, name, place):
    original = (copy / name).read_text()
    banners = list(BANNER.finditer(original))
    banner = banners[0] if place == "first section" else banners[-1]
    position = len(original) if place == "end of file" else banner.end() + 1
    altered = original[:position] + "    # altered\n" + original[position:]
    (copy / name).write_text(altered)
    result = sync(copy, "--check")
    assert result.returncode == 1 and result.stdout == f"{name}: section '{banner[1]}' differs\n"
    assert (copy / name).read_text() == altered
    assert sync(copy).returncode == 0
    assert (copy / name).read_text() == original


def test_a_change_of_the_main_file_reaches_the_others_but_an_algorithm_stays(copy):
    main, sac = copy / "cal_ql_continuous.py", copy / "sac_offline_data.py"
    before = sac.read_text()
    main.write_text(main.read_text().replace("SIGNALS: list[int] = []", "SIGNALS: list[int] = list()"))
    sac.write_text(before.replace("td_loss.sum().backward()", "td_loss.mean().backward()"))
    assert sync(copy, "--check").returncode == 1
    assert sync(copy).returncode == 0 and sync(copy, "--check").returncode == 0
    expected = before.replace("SIGNALS: list[int] = []", "SIGNALS: list[int] = list()")
    assert sac.read_text() == expected.replace("td_loss.sum().backward()", "td_loss.mean().backward()") != before


def test_sync_refuses_a_section_that_the_main_file_does_not_have(copy):
    (copy / "baselines").mkdir()
    (copy / "baselines/other.py").write_text("# --- Rewards (common) ---------\nscale = 1\n")
    for flags in ([], ["--check"]):
        result = sync(copy, *flags)
        assert result.returncode == 2 and result.stderr.count("\n") == 1
        assert "baselines/other.py" in result.stderr and "'Rewards (common)'" in result.stderr


PAIRS = [("cal_ql_continuous.py", "cql_continuous.py"), ("cal_ql_pixels.py", "baselines/cql_pixels.py")]


@pytest.mark.parametrize("pair", PAIRS)
def test_cal_ql_is_cql_and_one_statement(pair):
    cal_ql, cql = (ast.parse(read(name)) for name in pair)
    cal_ql.body, cql.body = cal_ql.body[1:], cql.body[1:]  # the docstrings
    ours, theirs = (ast.unparse(tree).splitlines() for tree in (cal_ql, cql))
    difference = [line for line in difflib.ndiff(theirs, ours) if line[0] in "+-"]
    assert difference == [f"+         {ast.unparse(ast.parse(STATEMENT))}"]
    # Of the comments, only the one over the regulariser may differ.
    ours, theirs = (read(name).split('"""', 2)[2].splitlines() for name in pair)
    difference = [line for line in difflib.ndiff(theirs, ours) if line[0] in "+-"]
    assert [line[:7] for line in difference] == ["-     #", "+     #", "+      "] and STATEMENT in difference[2]


def code_between(old: str, new: str) -> list[str]:
    """The statements that are in one of two definitions alone; docstrings and comments do not count."""
    lines = []
    for text in (old, new):
        (node,) = ast.parse(text).body
        node.body = node.body[1:]
        lines.append(ast.unparse(node).splitlines())
    return [line for line in difflib.ndiff(*lines) if line[0] in "+-"]


def test_sac_from_pixels_is_sac_as_cal_ql_from_pixels_is_cal_ql():
    """All but the algorithm is cal_ql_pixels.py's, and images add to the algorithm what they add to Cal-QL's."""
    states, pixels = definitions("cal_ql_continuous.py"), definitions("cal_ql_pixels.py")
    sac, ours = definitions("sac_offline_data.py"), definitions("baselines/sac_pixels.py")
    assert ours.keys() == pixels.keys()
    assert {part for part in ours if ours[part] != pixels[part]} == OWN["sac_offline_data.py"]
    # Cal-QL from pixels has no learned reference value, and the target's many actions are one in SAC.
    expected = [line for line in code_between(states["Args"], pixels["Args"]) if "reference_value" not in line]
    assert code_between(sac["Args"], ours["Args"]) == expected
    lines = code_between(states["update"], pixels["update"])
    expected = [
        line.replace("target_actions", "next_action")
        for line in lines
        if "v_mu" not in line and "mc_return" not in line
    ]
    assert code_between(sac["update"], ours["update"]) == expected and len(expected) > 5


@pytest.mark.parametrize("name", PIXEL_RIVALS)
def test_a_rival_from_pixels_is_the_rival_on_the_pixels_of_cal_ql(name):
    """Its networks and settings are the rival's, and all around the algorithm is cal_ql_pixels.py's."""
    pixels, rival = definitions("cal_ql_pixels.py"), definitions(name.replace("pixels", "continuous"))
    ours, own = definitions(name), {"Args", "Agent", "update", "probe"}
    networks = (rival.keys() - definitions("cal_ql_continuous.py").keys()) | {"Actor", "Critic"}
    assert ours.keys() == pixels.keys() | networks and {"descend", "Actor", "Critic"} <= networks
    for part in ours.keys() - own:
        assert ours[part] == (rival if part in networks else pixels)[part], part
    # Images add to the settings what they add to Cal-QL's; O3F's choice of actions is not in the paper's visual task.
    added = code_between(definitions("cal_ql_continuous.py")["Args"], pixels["Args"])
    settings = code_between(rival["Args"], ours["Args"])
    assert {line for line in settings if "optimistic" not in line} == {
        line for line in added if "reference_value" not in line
    }


@pytest.mark.parametrize("name", ["sac_offline_data.py", "baselines/sac_pixels.py"])
def test_sac_has_no_setting_of_cql(name):
    (args,) = (node for node in ast.parse(read(name)).body if getattr(node, "name", "") == "Args")
    settings = [node.target.id for node in args.body if isinstance(node, ast.AnnAssign)]
    assert "backup_entropy" in settings
    left = [name for name in settings if re.search("cql|gap|importance|num_actions", name)]
    assert not left


@pytest.mark.parametrize("name", MOST_LINES)
def test_a_script_is_short_enough_to_read(name):
    lines = read(name).splitlines()
    assert len(lines) <= MOST_LINES[name]
    assert [number for number, line in enumerate(lines, 1) if len(line) > 120] == []
    functions = [node for node in ast.walk(ast.parse(read(name))) if isinstance(node, ast.FunctionDef)]
    assert {"train", "update"} <= {node.name for node in functions}
    for node in functions:
        assert node.end_lineno - node.lineno + 1 <= 90, f"{node.name} has too many lines"
        nested = [inner for inner in ast.walk(node) if isinstance(inner, ast.FunctionDef) and inner is not node]
        assert len(nested) <= 3, f"{node.name} has too many functions inside"


@pytest.mark.parametrize("name", MOST_LINES)
def test_scripts_import_neither_each_other_nor_a_shared_module(name):
    imported = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(ast.parse(read(name)))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert not {module for module in imported if (ROOT / f"{module.split('.')[0]}.py").exists()}


@pytest.mark.parametrize("name", MOST_LINES)
def test_a_script_copied_alone_helps_and_fails_well(name, tmp_path):
    (tmp_path / "minari").mkdir()
    script = Path(shutil.copy(ROOT / name, tmp_path)).name
    environment = {**os.environ, "MINARI_DATASETS_PATH": str(tmp_path / "minari")}
    environment.pop("PYTHONPATH", None)

    def run(*flags: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-B", script, *flags]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    result = run("--help")
    task = "pick-place-pixels" if "pixels" in name else "antmaze-large-diverse"
    assert result.returncode == 0 and task in result.stdout and not result.stderr
    result = run("--env-id", "cal-ql/none/here-v0")
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "cal-ql/none/here-v0" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([script, "minari"])  # no half-made run
