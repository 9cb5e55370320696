"""The Triton kernels compile for GPUs that are not there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

PROGRAM = Path(__file__).with_name("offline_compiler.py")
FOLDER = Path(__file__).parents[1]  # of `bench`, which is no installed package
SHARED_MEMORY = {80: 166_912, 90: 232_448, 100: 232_448}
ROWS = {"_row_kernel", "_topk_kernel", "_squared_error_kernel", "_cosine_kernel"}
KERNELS = {*ROWS, "forward_kernel", "backward_kernel"}


def run(tmp_path, *command):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(FOLDER)}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


# Every kernel once, and what has the most registers.
QUICK = (
    "forward KL", "all six and cross-entropy, T = 2", "top-k", "hidden-state MSE",
    "hidden-state cosine", "relation",
)  # fmt: skip


@pytest.fixture(
    scope="module",
    params=[(90, QUICK), *(pytest.param((sm, ()), marks=pytest.mark.slow) for sm in SHARED_MEMORY)],
    ids=lambda chosen: f"sm_{chosen[0]}" + ("-some" if chosen[1] else ""),
)
def compiled(request, tmp_path_factory):
    """The capability, and one object per variant that the public functions launch."""
    capability, names = request.param
    lines = run(tmp_path_factory.mktemp("triton"), PROGRAM, str(capability), *names)
    return capability, [json.loads(line) for line in lines]


def test_every_kernel_compiles_and_fits_the_shared_memory(compiled):
    capability, variants = compiled

    assert {variant["name"] for variant in variants} == KERNELS
    assert max(variant["shared"] for variant in variants) <= SHARED_MEMORY[capability]


def test_no_sweep_over_a_row_spills_its_registers(compiled):
    capability, variants = compiled
    if capability == 100 and triton.__version__.startswith("3.6."):
        pytest.skip("Triton 3.6 keeps a value of one variant on the stack of a sweep")
    rows = [variant for variant in variants if variant["name"] in ROWS]

    assert [variant for variant in rows if variant["spills"]] == []


def test_four_programs_of_a_single_divergence_fit_a_multiprocessor(compiled):
    _, variants = compiled

    registers = [each["registers"] for each in variants if each["name"] == "_row_kernel"]
    # 65,536 registers for four programs of 256 threads; a mixture takes more.
    assert sum(number > 64 for number in registers) == 1


def test_a_sweep_takes_less_time_than_its_memory(compiled):
    _, variants = compiled

    counts = [each["instructions"] for each in variants if 0 < each["registers"] <= 64]
    # A multiprocessor starts 128 instructions per clock; more than 70 per id outlast the memory.
    assert all(count < 70 for sweeps in counts for count in sweeps)


def test_the_tiles_of_a_gpu_multiply_on_tensor_cores(compiled):
    capability, variants = compiled
    products = [variant for variant in variants if variant["has_dot"]]

    assert {variant["name"] for variant in products} >= {"forward_kernel"}
    assert capability != 90 or all(variant["on_tensor_cores"] for variant in products)
