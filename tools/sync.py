"""Copies what cal_ql_continuous.py shares with the other scripts, which never import each other.

    python tools/sync.py            # rewrites the scripts that differ
    python tools/sync.py --check    # changes nothing, names what differs, and exits with 1 if anything does

A section runs from its banner, a comment line `# --- Name` at any indentation, to the next banner or the end of the
file. Those with "(common)" at the end of their name are the same to the letter in every script that has them. All
others, and with them every algorithm, are a script's own and are left alone. The block `# /// script` at the end of
each script, which `uv run` reads (PEP 723), is written from requirements.txt.
"""

import argparse
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAIN = ROOT / "cal_ql_continuous.py"
OTHERS = ["cql_continuous.py", "sac_offline_data.py", "cal_ql_pixels.py"]
BANNER = re.compile(r"^ *# --- (.+?)(?: -+)?$", re.MULTILINE)
UV_BLOCK = re.compile(r"# /// script\n(?:#.*\n)*?# ///\n\Z")


def split_sections(text: str) -> list[tuple[str, str]]:
    """Name and text, banner included, of each section in order; what stands before the first has the name ""."""
    banners = list(BANNER.finditer(text))
    starts = [0, *(banner.start() for banner in banners)]
    names = ["", *(banner[1] for banner in banners)]
    return [(name, text[i:j]) for name, i, j in zip(names, starts, [*starts[1:], len(text)], strict=True)]


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
    main_text = UV_BLOCK.sub("", MAIN.read_text())
    source = {name: text.rstrip("\n") for name, text in split_sections(main_text) if name.endswith("(common)")}
    scripts = [ROOT / name for name in OTHERS if (ROOT / name).exists()] + sorted(ROOT.glob("baselines/*.py"))
    found = False
    for script in [MAIN, *scripts]:
        original = script.read_text()
        sections = split_sections(UV_BLOCK.sub("", original))
        for k, (name, text) in enumerate(sections):
            if not name.endswith("(common)"):
                continue
            if name not in source:
                print(f"error: {script.relative_to(ROOT)} has a section {name!r}, which {MAIN.name} does not have.",
                      file=sys.stderr)  # fmt: skip
                return 2
            body = text.rstrip("\n")
            if body != source[name]:
                print(f"{script.relative_to(ROOT)}: section {name!r} {'differs' if check else 'copied'}")
                sections[k] = name, source[name] + text[len(body) :]  # blank lines at its end stay as they are
                found = True
        text = "".join(text for _, text in sections)
        if not original.endswith(block):
            print(f"{script.relative_to(ROOT)}: the block for uv {'differs' if check else 'written'}")
            found = True
        if not check:
            script.write_text(text + block)
    return int(check and found)


if __name__ == "__main__":
    sys.exit(main())
