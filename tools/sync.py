"""Copies the common sections of cal_ql_continuous.py into the other scripts, which never import each other.

    python tools/sync.py            # rewrites the scripts whose common sections differ
    python tools/sync.py --check    # changes nothing, names what differs, and exits with 1 if anything does

A section runs from its banner, a comment line `# --- Name` at any indentation, to the next banner or the end of the
file. Those with "(common)" at the end of their name are the same to the letter in every script that has them. All
others, and with them every algorithm, are a script's own and are left alone.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAIN = ROOT / "cal_ql_continuous.py"
OTHERS = ["cql_continuous.py", "sac_offline_data.py", "cal_ql_pixels.py"]
BANNER = re.compile(r"^ *# --- (.+?)(?: -+)?$", re.MULTILINE)


def split_sections(text: str) -> list[tuple[str, str]]:
    """Name and text, banner included, of each section in order; what stands before the first has the name ""."""
    banners = list(BANNER.finditer(text))
    starts = [0, *(banner.start() for banner in banners)]
    names = ["", *(banner[1] for banner in banners)]
    return [(name, text[i:j]) for name, i, j in zip(names, starts, [*starts[1:], len(text)], strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 if a section differs")
    check = parser.parse_args().check
    source = {name: text.rstrip("\n") for name, text in split_sections(MAIN.read_text()) if name.endswith("(common)")}
    scripts = [ROOT / name for name in OTHERS if (ROOT / name).exists()] + sorted(ROOT.glob("baselines/*.py"))
    found = False
    for script in scripts:
        sections = split_sections(script.read_text())
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
        if not check:
            script.write_text("".join(text for _, text in sections))
    return int(check and found)


if __name__ == "__main__":
    sys.exit(main())
