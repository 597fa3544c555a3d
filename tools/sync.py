"""Copies what the scripts share, as none imports another: a change is made once, in the script that owns the part.

    python tools/sync.py            # rewrites the scripts that differ
    python tools/sync.py --check    # changes nothing, names what differs, and exits with 1 if anything does

A section runs from its banner, a comment line `# --- Name` at any indentation, to the next banner or the end of the
file; those with "(common)" at the end of their name are the main file's to the letter. Everywhere else each top-level
class and function, decorators included, is the script's own if the table OWN lists it; if not, it is copied from a
script that the table names as its owner, or else from the main file. The block `# /// script` at the end of each
script, which `uv run` reads (PEP 723), is written from requirements.txt.
"""

import argparse
import ast
import re
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAIN = "cal_ql_continuous.py"
ALGORITHM = {"Args", "Agent", "make_agent", "update", "probe"}
RIVAL = ALGORITHM | {"Critic", "Actor", "descend"}
PIXELS = ALGORITHM | {"Encoder", "random_shift", "check_frames", "to_episode", "ReplayBuffer", "TaskEnv", "make_env"}
SEQUENCES = {"Transformer", "log_density", "to_transitions", "ReplayBuffer", "play_episode", "train", "parse_args"}
OWN = {  # a script's own classes and functions, and the scripts that own others of its
    "cql_continuous.py": ({"update"}, []),
    "sac_offline_data.py": (ALGORITHM, []),
    "cal_ql_pixels.py": (PIXELS, []),
    "baselines/cal_ql_learned_value.py": (ALGORITHM - {"Args"}, []),
    "baselines/iql_continuous.py": (RIVAL | {"MLP"}, []),
    "baselines/awac_continuous.py": (RIVAL, []),
    "baselines/td3_bc_continuous.py": (RIVAL, []),
    "baselines/odt_continuous.py": (ALGORITHM | SEQUENCES, []),
    "baselines/cql_pixels.py": ({"update"}, ["cal_ql_pixels.py"]),
    "baselines/sac_pixels.py": (ALGORITHM, ["cal_ql_pixels.py"]),
    "baselines/iql_pixels.py": (ALGORITHM, ["baselines/iql_continuous.py", "cal_ql_pixels.py"]),
    "baselines/awac_pixels.py": (ALGORITHM, ["baselines/awac_continuous.py", "cal_ql_pixels.py"]),
}
BANNER = re.compile(r"^ *# --- (.+?)(?: -+)?$", re.MULTILINE)
UV_BLOCK = re.compile(r"# /// script\n(?:#.*\n)*?# ///\n\Z")


def split_sections(text: str) -> list[tuple[str, str]]:
    """Name and text, banner included, of each section in order; what stands before the first has the name ""."""
    banners = list(BANNER.finditer(text))
    starts = [0, *(banner.start() for banner in banners), len(text)]
    names = ["", *(banner[1] for banner in banners)]
    return [(name, text[i:j]) for name, (i, j) in zip(names, pairwise(starts), strict=True)]


def definitions(text: str) -> dict[str, str]:
    """The text of each top-level class and function, decorators included."""
    lines, texts = text.splitlines(keepends=True), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            texts[node.name] = "".join(lines[first - 1 : node.end_lineno])
    return texts


def uv_block(requirements: str) -> str:
    """The block of inline metadata for these lines of requirements, without their comments."""
    lines = (line.split("#")[0].strip() for line in requirements.splitlines())
    pins = ", ".join(f'"{line}"' for line in sorted(filter(None, lines)))
    first, *rest = textwrap.wrap(f"dependencies = [{pins}]", 116, break_on_hyphens=False)
    body = ['requires-python = ">=3.11,<3.14"', first, *(f"  {line}" for line in rest)]
    return "".join(f"# {line}\n" for line in ["/// script", *body, "///"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 if anything differs")
    check = parser.parse_args().check
    block = uv_block((ROOT / "requirements.txt").read_text())
    paths = [*ROOT.glob("*.py"), *ROOT.glob("baselines/*.py")]
    scripts = {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}
    if unlisted := scripts.keys() ^ {MAIN, *OWN}:
        parser.exit(2, f"error: the table OWN and the folder differ in {', '.join(sorted(unlisted))}.\n")
    bodies = {name: UV_BLOCK.sub("", text) for name, text in scripts.items()}
    common = {name: text.rstrip("\n") for name, text in split_sections(bodies[MAIN]) if name.endswith("(common)")}
    parts = {name: definitions(text) for name, text in bodies.items()}
    differences = []
    for name in [MAIN, *OWN]:
        (own, owners), text = OWN.get(name, (parts[MAIN], [])), ""
        for section, old in split_sections(bodies[name]):
            new = old
            if section.endswith("(common)"):
                if section not in common:
                    parser.exit(2, f"error: {name} has a section {section!r}, which {MAIN} does not have.\n")
                new = common[section] + old[len(old.rstrip("\n")) :]  # blank lines at its end stay as they are
            differences += [f"{name}: section {section!r}"] if new != old else []
            text += new
        for part, old in definitions(text).items():
            owner = name if part in own else next((script for script in owners if part in OWN[script][0]), MAIN)
            if part not in parts[owner]:
                parser.exit(2, f"error: {name} has {part!r}, which neither OWN lists for it nor {owner} has.\n")
            differences += [f"{name}: {part!r} of {owner}"] if parts[owner][part] != old else []
            text = text.replace(old, parts[owner][part])
        differences += [f"{name}: the block for uv"] if not scripts[name].endswith(block) else []
        if not check and text + block != scripts[name]:
            (ROOT / name).write_text(text + block)
    print("".join(f"{difference} {'differs' if check else 'copied'}\n" for difference in differences), end="")
    return int(check and bool(differences))


if __name__ == "__main__":
    sys.exit(main())
