"""Compiles every Triton kernel as the public functions launch it, for a GPU that is not there.

`offline_compiler.py CAPABILITY [VARIANT ...]`, all variants without a name. The interpreter is
blind to types and constants that the compiler refuses. Prints one JSON object per kernel. Run by
`test_triton_compiles`.
"""

import json
import sys

from bench.offline import compile_instead_of_launching, pretend
from bench.sass import examine
from bench.variants import VARIANTS

COMPILED = {}


def remember(name, kernel):
    COMPILED[kernel.hash] = name, kernel


if __name__ == "__main__":
    compile_instead_of_launching(remember)
    pretend(int(sys.argv[1]))
    for name in sys.argv[2:] or VARIANTS:
        VARIANTS[name]()
    for name, kernel in COMPILED.values():
        program = examine(kernel)
        facts = {
            "name": name, "shared": program.shared, "registers": program.registers,
            "stack": program.stack, "spills": sum(sweep.spills for sweep in program.sweeps),
            "instructions": [sweep.instructions for sweep in program.sweeps],
            "has_dot": "tt.dot" in kernel.asm["ttir"],
            "on_tensor_cores": "wgmma" in kernel.asm["ptx"],
        }  # fmt: skip
        sys.stdout.write(json.dumps(facts) + "\n")
