"""The Triton kernels compile for a GPU that is not there."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import megakd_kernels

pytest.importorskip("triton")

PROGRAM = Path(__file__).with_name("hopper_compiler.py")
HOPPER_SHARED_MEMORY = 232_448


def run(tmp_path, *command):
    package = Path(megakd_kernels.__file__).parents[1]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(package)}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """One object per variant that the public functions launch."""
    return [json.loads(line) for line in run(tmp_path_factory.mktemp("triton"), PROGRAM)]


def test_every_kernel_compiles_for_sm_90_and_fits_its_shared_memory(compiled):
    assert len(compiled) >= 12
    assert max(variant["shared"] for variant in compiled) <= HOPPER_SHARED_MEMORY


def test_no_kernel_spills_its_registers(compiled):
    assert {variant["name"] for variant in compiled if variant["stack"]} == set()


def test_the_tiles_of_a_gpu_multiply_on_tensor_cores(compiled):
    products = [variant for variant in compiled if variant["has_dot"]]

    assert {variant["name"] for variant in products} >= {"forward_kernel"}
    assert all(variant["on_tensor_cores"] for variant in products)


@pytest.mark.slow
def test_the_count_of_instructions_shows_every_sweep_with_its_loads_in_flight(tmp_path):
    _, _, *lines = run(tmp_path, "-m", "bench.sass")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    sweeps = Counter(name for name, *_ in cells)
    assert sweeps["forward KL"] == 2
    assert sweeps["JSD"] == sweeps["skew KL"] == sweeps["TVD"] == 3
    assert all("pipelined" in sweep for _, _, _, _, sweep, *_ in cells)
    # A multiprocessor starts 128 instructions per clock; more than 60 per id outlast the memory.
    assert all(float(instructions) < 60 for *_, instructions, _, _ in cells)
