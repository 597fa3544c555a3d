"""The scripts repeat each other on purpose: what they share is the same to the letter, and each runs alone."""

import ast
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.sync import BANNER, MAIN, OWN, definitions, uv_block

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [MAIN, *OWN]
STATEMENT = "q_pi = torch.maximum(q_pi, v_mu)"


def read(name: str) -> str:
    return (ROOT / name).read_text()


def sync(root: Path, *flags: str) -> tuple[int, str, str]:
    result = subprocess.run([sys.executable, root / "tools/sync.py", *flags], capture_output=True, text=True)
    return result.returncode, result.stdout, result.stderr


@pytest.fixture
def copy(tmp_path) -> Path:
    """A folder with copies of the scripts and of sync.py, in step even where the originals are not."""
    for name in [*SCRIPTS, "tools/sync.py", "requirements.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    assert sync(tmp_path)[0] == 0
    return tmp_path


def test_what_the_scripts_share_is_the_same_to_the_letter():
    assert sync(ROOT, "--check") == (0, "", "")


@pytest.mark.parametrize("name", OWN)
def test_the_table_lists_what_is_a_scripts_own_and_no_more(name):
    own, owners = OWN[name]
    ours, theirs = definitions(read(name)), definitions(read(MAIN))
    for owner in reversed(owners):
        theirs |= {part: text for part, text in definitions(read(owner)).items() if part in OWN[owner][0]}
    assert not {part for part in own if ours.get(part) == theirs.get(part)}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_the_common_sections(name):
    """A lost banner, or one no longer called common, would exempt a table of the main file from being copied."""
    own, owners = OWN.get(name, ((), ()))
    common = [section for section in BANNER.findall(read(name)) if section.endswith("(common)")]
    other_networks = any("Critic" in parts for parts in (own, *(OWN[owner][0] for owner in owners)))
    assert len(common) == (2 if "pixels" in name or "odt" in name else 7) - other_networks


ALTERED = [  # a script, what is replaced in it, and what is reported
    ("cql_continuous.py", "seed: int = 1", "seed: int = 2", "section 'Run and protocol (common)'"),
    ("sac_offline_data.py", "sys.exit(2)", "exit(2)", "section 'Training, checkpoints and command line (common)'"),
    ("cql_continuous.py", "tyro==", "tyro>=", "the block for uv"),
    ("baselines/td3_bc_continuous.py", "- args.gamma", "+ args.gamma", "'to_transitions' of cal_ql_continuous.py"),
    ("cal_ql_pixels.py", "def load_data", "@cache\ndef load_data", "'load_data' of cal_ql_continuous.py"),
    ("baselines/cql_pixels.py", "class ReplayBuffer", "class ReplayBuffer()", "'ReplayBuffer' of cal_ql_pixels.py"),
    ("baselines/iql_pixels.py", "def descend(", "def descend(self, ", "'descend' of baselines/iql_continuous.py"),
]


@pytest.mark.parametrize("name, old, new, part", ALTERED)
def test_check_names_an_altered_part_and_sync_restores_it(copy, name, old, new, part):
    original = (copy / name).read_text()
    altered = original.replace(old, new, 1)
    (copy / name).write_text(altered)
    assert sync(copy, "--check") == (1, f"{name}: {part} differs\n", "") and altered != original
    assert sync(copy) == (0, f"{name}: {part} copied\n", "")
    assert (copy / name).read_text() == original


def test_a_change_of_the_main_file_reaches_all_but_an_algorithm_stays(copy):
    main, sac = copy / MAIN, copy / "sac_offline_data.py"
    main.write_text(re.sub(r"(def (?:load_data|update)\(.*\n)", r"\1    # altered\n", main.read_text()))
    sac.write_text(sac.read_text().replace("td_loss.sum().backward()", "td_loss.mean().backward()"))
    assert sync(copy, "--check")[0] == 1 and sync(copy)[0] == 0 and sync(copy, "--check") == (0, "", "")
    assert "td_loss.mean().backward()" in sac.read_text()
    for name in OWN:
        parts = definitions((copy / name).read_text())
        assert "# altered" in parts["load_data"] and "# altered" not in parts["update"], name


def test_sync_refuses_what_it_does_not_know(copy):
    """A section that the main file does not have, a function that is nobody's, a script that is not listed."""
    path, original = copy / "cql_continuous.py", (copy / "cql_continuous.py").read_text()
    for text, word in [("# --- Other (common) ---\n", "Other (common)"), ("def other():\n    pass\n", "'other'")]:
        path.write_text(text + original)
        code, printed, error = sync(copy)
        assert (code, printed, error.count("\n")) == (2, "", 1) and word in error and path.name in error
    (copy / "baselines/other.py").write_text("")
    code, _, error = sync(copy)
    assert (code, error.count("\n")) == (2, 1) and "baselines/other.py" in error


def test_block_for_uv():
    lines = "# Comment\nb-b==2  # why\n\na[c,d]==1\n" + "".join(f"package-{k}==1.0.0\n" for k in range(5))
    assert uv_block(lines) == """# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["a[c,d]==1", "b-b==2", "package-0==1.0.0", "package-1==1.0.0", "package-2==1.0.0",
#   "package-3==1.0.0", "package-4==1.0.0"]
# ///
"""  # fmt: skip


@pytest.mark.parametrize("pair", [(MAIN, "cql_continuous.py"), ("cal_ql_pixels.py", "baselines/cql_pixels.py")])
def test_cal_ql_is_cql_and_one_statement(pair):
    bodies = (ast.parse(read(name)).body[1:] for name in pair)  # without the docstrings
    ours, theirs = ("\n".join(map(ast.unparse, body)).splitlines() for body in bodies)
    assert [line for line in difflib.ndiff(theirs, ours) if line[0] in "+-"] == [f"+         {STATEMENT}"]
    # Of the comments, only the one over the regulariser may differ.
    ours, theirs = (read(name).split('"""', 2)[2].splitlines() for name in pair)
    difference = [line for line in difflib.ndiff(theirs, ours) if line[0] in "+-"]
    assert [line[:7] for line in difference] == ["-     #", "+     #", "+      "] and STATEMENT in difference[2]


def code_between(old: str, new: str) -> list[str]:
    """The statements that are in one of two definitions alone; docstrings and comments do not count."""
    bodies = (ast.parse(text).body[0].body[1:] for text in (old, new))
    lines = ("\n".join(map(ast.unparse, body)).splitlines() for body in bodies)
    return [line for line in difflib.ndiff(*lines) if line[0] in "+-"]


@pytest.mark.parametrize("name", ["sac_offline_data.py", "baselines/iql_continuous.py", "baselines/awac_continuous.py"])
def test_images_add_to_a_rival_what_they_add_to_cal_ql(name):
    states, pixels, rival = (definitions(read(script)) for script in (MAIN, "cal_ql_pixels.py", name))
    images = definitions(read(f"baselines/{Path(name).stem.split('_')[0]}_pixels.py"))
    settings = code_between(rival["Args"], images["Args"])  # the paper's visual task has no choice of O3F's
    assert [line for line in settings if "optimistic" not in line] == code_between(states["Args"], pixels["Args"])
    if name == "sac_offline_data.py":
        added = code_between(*(parts["update"].replace("target_actions", "next_action") for parts in (states, pixels)))
        assert code_between(rival["update"], images["update"]) == [line for line in added if "v_mu" not in line] != []


@pytest.mark.parametrize("name", ["sac_offline_data.py", "baselines/sac_pixels.py"])
def test_sac_has_no_setting_of_cql(name):
    settings = re.findall(r"(?m)^    (\w+): ", definitions(read(name))["Args"])
    assert "backup_entropy" in settings
    assert not [name for name in settings if re.search("cql|gap|importance|num_actions", name)]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_short_enough_to_read(name):
    lines, tree = read(name).splitlines(), ast.parse(read(name))
    assert len(lines) <= (680 if "pixels" in name else 650)
    assert [number for number, line in enumerate(lines, 1) if len(line) > 120] == []
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        assert node.end_lineno - node.lineno + 1 <= 95, f"{node.name} has too many lines"
        nested = [inner for inner in ast.walk(node) if isinstance(inner, ast.FunctionDef) and inner is not node]
        assert len(nested) <= (node.name == "train"), f"{node.name} has functions inside"
        assert (name, node.name) != (MAIN, "update") or node.end_lineno <= 260


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_import_neither_each_other_nor_a_shared_module(name):
    imported = {module.split(".")[0] for module in re.findall(r"(?m)^ *(?:from|import) ([\w.]+)", read(name))}
    ours = {path.stem for path in ROOT.glob("*") if path.is_dir() or path.suffix == ".py"} | {""}  # "" is relative
    assert {"torch", "minari"} < imported and not imported & ours


def test_a_script_copied_alone_helps_and_fails_well(tmp_path):
    """Each in a folder that has nothing else, but in one process, which imports torch once."""
    code = """if True:
        import contextlib, io, json, runpy, sys
        for script in sys.argv[1:]:
            for flags in (["--help"], ["--env-id", "cal-ql/none/here-v0"]):
                sys.argv, out, err, code = [script, *flags], io.StringIO(), io.StringIO(), None
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    try:
                        runpy.run_path(script, run_name="__main__")
                    except SystemExit as stop:
                        code = stop.code
                print(json.dumps([code, out.getvalue(), err.getvalue()]))
    """
    for name in SCRIPTS:
        (tmp_path / Path(name).stem).mkdir()
    files = [shutil.copy(ROOT / name, tmp_path / Path(name).stem) for name in SCRIPTS]
    environment = {**os.environ, "MINARI_DATASETS_PATH": str(tmp_path / "minari"), "PYTHONPATH": ""}
    command = [sys.executable, "-B", "-c", code, *map(str, files)]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")
    results = [json.loads(line) for line in process.stdout.splitlines()]
    for name, (code, out, err), failed in zip(SCRIPTS, results[::2], results[1::2], strict=True):
        task = "pick-place-pixels" if "pixels" in name else "antmaze-large-diverse"
        assert (code, err) == (0, "") and task in out, name
        said = failed[2]
        assert failed[:2] == [2, "data: cal-ql/none/here-v0\n"], name
        assert said.startswith("error: ") and said.count("\n") == 1 and "cal-ql/none/here-v0" in said, name
    assert sorted(map(str, tmp_path.rglob("*.*"))) == sorted(map(str, files))  # no half-made run
