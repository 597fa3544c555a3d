"""The files themselves: requirements, imports, line lengths, help, and how much code there is to read."""

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest

from cal_ql_continuous import DOMAINS, TASKS, main

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(ROOT.glob("*.py"))
SCRIPT = ROOT / "cal_ql_continuous.py"


def code_lines(source: str) -> set[int]:
    """Numbers of the lines that hold code: no comments, no blank lines, no docstrings."""
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in layout:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):  # a string that stands alone is documentation
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return lines


def test_code_lines_counts_code_alone():
    source = ['"""Doc', 'string."""', "", 'x = """a', 'b"""  # text', "# text", "def f():", '  """Doc."""', "  pass"]
    assert code_lines("\n".join(source)) == {4, 5, 7, 9}


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path == SCRIPT or "# /// script" in path.read_text()],
                         ids=lambda path: path.name)  # fmt: skip
def test_script_lists_the_requirements(path):
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)*?)# ///$", path.read_text())
    metadata = tomllib.loads(re.sub(r"(?m)^# ?", "", block[1]))
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert sorted(metadata["dependencies"]) == sorted(line for line in lines if line)
    assert metadata["requires-python"] == ">=3.11,<3.14"


def test_import_has_no_side_effects(tmp_path):
    names = ", ".join(path.stem for path in SCRIPTS)
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {names}"
    # An unknown flag would end a script that reads its arguments on import.
    process = subprocess.run([sys.executable, "-B", "-c", code, "--no-such-flag"], cwd=tmp_path, capture_output=True)
    assert process.returncode == 0 and not process.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_lines_are_short(path):
    assert [n for n, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 120] == []


def test_help_shows_each_domain_and_its_values(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())  # lines are wrapped to the terminal
    for name, settings in DOMAINS.items():
        shown = re.search(rf"(?<![\w-]){name}: (.*?) (?=[\w-]+: )", printed)[1]
        for setting, value in settings.items():
            values = "|".join({re.escape(str(value)), f"{value:_}" if type(value) is int else "(?!)"})
            assert re.search(rf"\b{setting} (?:{values})(?!\w)", shown), f"{name}: {setting} {value}"
    assert all(name in printed for name in TASKS)


def test_code_is_short_enough_to_read():
    source = SCRIPT.read_text()
    lines, headings = code_lines(source), source.splitlines()
    first, last = headings.index("# Networks"), headings.index("# Episodes and evaluation")
    assert len(lines) <= 690  # of which some 80 for workers, overlapping, CUDA graphs and the allocator
    assert len([n for n in lines if first < n <= last]) <= 200  # networks and update
