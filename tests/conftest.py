"""Set up before any test module, and through it torch, is imported."""

import os
import signal
import sys
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # the networks are tiny: a second thread would only wait for the first
sys.path.insert(0, str(Path(__file__).parents[1]))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in its background without it

import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def float32_products():
    """Undoes what a run in another test has set: on processors with AMX its products are of bfloat16."""
    torch.set_float32_matmul_precision("highest")


def pytest_collection_modifyitems(items):
    """CI has no GPU, so that nobody knows all that torch warns of there: it fails no test."""
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.filterwarnings("default"))
