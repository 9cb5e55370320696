"""Registers and instructions of a compiled kernel, without a GPU.

An id is one column of the logits of both models; the sweeps of a row are loops that load both. The
time that a sweep needs at least follows from the issue slots (128 per clock and multiprocessor).
MEGAKD_ROW_STAGES changes the depth of the pipeline, and MEGAKD_ROW_REGISTERS the most registers of
a thread.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton.backends.nvidia

_TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)(.*);")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
# Logits that a thread reads at once, in fp32.
_IDS_PER_LOAD = 4


class Sweep(NamedTuple):
    """Instructions of a loop over whole blocks, per id; accesses to the stack in all.

    Loads of a head's bias count as logits, so that the number is then a third too low.
    """

    instructions: float
    is_pipelined: bool
    spills: int


class Program(NamedTuple):
    """Registers, stack and shared memory of a compiled kernel, and its sweeps in order."""

    registers: int
    stack: int
    shared: int
    sweeps: list[Sweep]


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
    sweeps = list[Sweep]()
    for end, (operation, rest) in enumerate(rows):
        target = _TARGET.search(rest) if operation == "BRA" else None
        start = labels.get(target[1], end + 1) if target else end + 1
        if start <= end and (sweep := _sweep([name for name, _ in rows[start : end + 1]])):
            sweeps.append(sweep)
    return sweeps


def _sweep(operations: list[str]) -> Sweep | None:
    """Return the counts of a loop; None unless it has two loads of each model's logits."""
    counts = Counter(name.split(".")[0] for name in operations)
    is_pipelined = counts["LDGSTS"] > 0
    loads = counts["LDGSTS"] if is_pipelined else counts["LDG"]
    if loads < 4:
        return None
    instructions = len(operations) / (loads // 2 * _IDS_PER_LOAD)
    return Sweep(instructions, is_pipelined, counts["LDL"] + counts["STL"])


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout
