"""A short version of tests/breaking.py, whose counts in docs/robustness.md are of the long one."""

import re
import subprocess
import sys
from pathlib import Path

KINDS = ["datasets", "checkpoints", "kills", "signals", "misuse"]


def test_nothing_breaks():
    command = [sys.executable, Path(__file__).with_name("breaking.py"), *KINDS, "--share", "0.015"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    counts = re.findall(r"(\w+): tried (\d+), clear (\d+), equal (\d+), traceback 0, silent 0, lost 0", result.stdout)
    assert [kind for kind, *_ in counts] == KINDS
    assert all(int(tried) == int(clear) + int(equal) > 0 for _, tried, clear, equal in counts)
