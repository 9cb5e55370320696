"""Counts the instructions of the row kernels for sm_90, without a GPU: `python -m bench.sass`.

Prints one row per variant and sweep. An id is one column of the logits of both models. The time
that a sweep needs at least follows from the issue slots (128 per clock and multiprocessor) and
from the special functions (16); MEGAKD_ROW_STAGES changes the depth of the pipeline.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton.backends.nvidia

from bench.offline import compile_instead_of_launching
from megakd_kernels.row_plan import RowInputs, RowPlan
from megakd_kernels.triton.row_kd import TritonRows

_TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
_IDS = 4096
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)(.*);")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
# Logits that a thread reads at once, in fp32.
_IDS_PER_LOAD = 4
_VARIANTS = {
    "forward KL": (("forward_kl",), False, 1.0),
    "reverse KL": (("reverse_kl",), False, 1.0),
    "forward KL and cross-entropy, T = 2": (("forward_kl",), True, 2.0),
    "JSD": (("jsd",), False, 1.0),
    "skew KL": (("skew_kl",), False, 1.0),
    "skew reverse KL": (("skew_rkl",), False, 1.0),
    "TVD": (("tvd",), False, 1.0),
}


class Sweep(NamedTuple):
    """Instructions of a loop over whole blocks, per id."""

    instructions: float
    special: float
    fp64: float
    kind: str


class Program(NamedTuple):
    """Registers, stack and shared memory of a compiled kernel, and its sweeps in order."""

    registers: int
    stack: int
    shared: int
    sweeps: list[Sweep]


def main() -> int:
    """Compile all variants and print the table."""
    compiled: list[Any] = []
    compile_instead_of_launching(lambda _, kernel: compiled.append(kernel))
    print("| loss | registers | spills | shared memory | sweep | per id: all | special | fp64 |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (divergences, with_ce, temperature) in _VARIANTS.items():
        _launch(divergences, with_ce=with_ce, temperature=temperature)
        program = examine(compiled.pop())
        for number, sweep in enumerate(program.sweeps, start=1):
            print(
                f"| {name} | {program.registers} | {program.stack} | {program.shared} | {number} "
                f"({sweep.kind}) | {sweep.instructions:.1f} | {sweep.special:.1f} | "
                f"{sweep.fp64:.1f} |"
            )
    return 0


def _launch(divergences: tuple[str, ...], *, with_ce: bool, temperature: float) -> None:
    """Launch as `linear_kd_loss` does for bf16: fp32 logits, a bf16 gradient elsewhere."""
    logits, valid, factor = torch.zeros(4, _IDS), torch.ones(4, dtype=torch.bool), torch.ones(4)
    plan = RowPlan(
        mixture=tuple((name, 1.0) for name in divergences), beta=0.5, skew=0.1,
        temperature=temperature, value_scale=1.0, shared=_IDS, with_ce=with_ce, with_gradient=True,
    )  # fmt: skip
    labels = torch.zeros(4, dtype=torch.int64) if with_ce else None
    inputs = RowInputs(valid, labels, factor, factor)
    TritonRows(plan=plan).run_(logits, logits, inputs, logits.bfloat16())


def examine(kernel: Any) -> Program:
    """Return registers and sweeps of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    registers, stack = (int(re.findall(rf"{word}:(\d+)", usage)[-1]) for word in ("REG", "STACK"))
    return Program(registers, stack, kernel.metadata.shared, sweeps_of(code))


def sweeps_of(code: str) -> list[Sweep]:
    """Return the loops of a disassembly that read the logits of both models."""
    rows, labels = list[tuple[str, str]](), dict[str, int]()
    for line in code.splitlines():
        label, instruction = _LABEL.match(line), _INSTRUCTION.match(line)
        if label:
            labels[label[1]] = len(rows)
        elif instruction:
            rows.append((instruction[1], instruction[2]))
    found = list[Sweep]()
    for end, (operation, rest) in enumerate(rows):
        target = _TARGET.search(rest) if operation == "BRA" else None
        start = labels.get(target[1], end + 1) if target else end + 1
        if start <= end and (sweep := _sweep([name for name, _ in rows[start : end + 1]])):
            found.append(sweep)
    return found


def _sweep(operations: list[str]) -> Sweep | None:
    """Return the counts of a loop; None unless it has two loads of each model's logits."""
    counts = Counter(name.split(".")[0] for name in operations)
    is_pipelined = counts["LDGSTS"] > 0
    loads = counts["LDGSTS"] if is_pipelined else counts["LDG"]
    if loads < 4:
        return None
    ids = loads // 2 * _IDS_PER_LOAD
    special = counts["MUFU"] + counts["F2F"]
    fp64 = counts["DADD"] + counts["DMUL"] + counts["DFMA"]
    kind = "pipelined" if is_pipelined else "loads when used"
    return Sweep(len(operations) / ids, special / ids, fp64 / ids, kind)


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
