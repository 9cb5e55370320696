"""Counts registers and instructions of every kernel without a GPU: `python -m bench.sass`.

Prints a row per kernel and architecture (`--arch 80,90,100`). An id is one column of the logits of
both models; the sweeps of a row are loops that load both. The time that a sweep needs at least
follows from the issue slots (128 per clock and multiprocessor). MEGAKD_ROW_STAGES changes the depth
of the pipeline, and MEGAKD_ROW_REGISTERS the most registers of a thread.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton.backends.nvidia

from bench.offline import SHARED_MEMORY, compile_instead_of_launching, pretend
from bench.variants import VARIANTS

_TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)(.*);")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
# Logits that a thread reads at once, in fp32.
_IDS_PER_LOAD = 4
_KNOWN = ", ".join(map(str, SHARED_MEMORY))


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


def _capabilities(text: str) -> list[int]:
    names = text.split(",")
    if unknown := [name for name in names if name not in _KNOWN.split(", ")]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {_KNOWN}")
    return [int(name) for name in names]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile every kernel and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.sass", description=__doc__)
    parser.add_argument(
        "--arch",
        type=_capabilities,
        default="80,90,100",
        help=f"of {_KNOWN}, separated by commas",
    )
    capabilities = parser.parse_args(arguments).arch
    compiled = dict[str, tuple[str, Any]]()
    compile_instead_of_launching(
        lambda name, kernel: compiled.update({kernel.hash: (name, kernel)})
    )
    print("| loss | kernel | sm | registers | stack | shared memory | per id, by sweep |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for capability in capabilities:
        pretend(capability)
        for about, launch in VARIANTS.items():
            compiled.clear()
            launch()
            for name, kernel in compiled.values():
                numbers = row_of(examine(kernel))
                print(f"| {about} | {name} | {capability} | {numbers} |", flush=True)
    return 0


def row_of(program: Program) -> str:
    """Return the numbers of a kernel as cells.

    (*) marks a sweep without loads in flight, (s) a sweep that accesses the stack.
    """
    sweeps = (
        f"{sweep.instructions:.1f}"
        + ("" if sweep.is_pipelined else " (*)")
        + (" (s)" if sweep.spills else "")
        for sweep in program.sweeps
    )
    numbers = (program.registers, program.stack, program.shared)
    return " | ".join([*map(str, numbers), ", ".join(sweeps)])


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


if __name__ == "__main__":
    sys.exit(main())
