"""Set up before any test module, and through it torch, is imported."""

import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # the networks are tiny: a second thread would only wait for the first
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def float32_products():
    """Undoes what a run in another test has set: on processors with AMX its products are of bfloat16."""
    torch.set_float32_matmul_precision("highest")
