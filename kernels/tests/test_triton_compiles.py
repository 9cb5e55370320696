"""The Triton kernels compile for a GPU that is not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import megakd_kernels

pytest.importorskip("triton")

PROGRAM = Path(__file__).with_name("hopper_compiler.py")
HOPPER_SHARED_MEMORY = 232_448


def test_every_kernel_compiles_for_sm_90_and_fits_its_shared_memory(tmp_path):
    package = Path(megakd_kernels.__file__).parents[1]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(package)}
    environment.pop("TRITON_INTERPRET", None)

    result = subprocess.run(
        [sys.executable, PROGRAM], env=environment, capture_output=True, text=True, check=False
    )

    assert result.returncode == 0, result.stderr
    shared_memory, variants = map(int, result.stdout.split())
    assert shared_memory <= HOPPER_SHARED_MEMORY
    assert variants >= 12
