"""Time that large pages and kept memory save in a CPU step; `python benchmarks speed.allocator`.

Every setting runs in a process of its own, all of them by turns, on the same BERT of MiniLM's shape
(6 layers of width 384) and the same batch of 16 texts of 24 tokens, on one thread. CPU time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial

from lib.clocks import by_turns
from lib.launching import BENCHMARKS
from lib.options import parser_of
from lib.tables import markdown_table

SETTINGS = {
    "returned": "tensors go back to the system when freed",
    "default": "glibc's own thresholds",
    "kept": "freed memory stays, as megakd sets it while training",
    "kept, large pages": "and pages of 2 MB: what a megakd run does",
}
WARM_UP_STEPS = 3


def main(arguments: Sequence[str]) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--setting", choices=SETTINGS, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.setting is not None:
        print(seconds_per_step(given.setting, given.steps))
        return 0
    sides = [partial(_measured, name, given.steps) for name in SETTINGS]
    columns = zip(*by_turns(sides, given.rounds), strict=True)
    times = dict(zip(SETTINGS, columns, strict=True))
    least = statistics.median(times["kept, large pages"])
    rows = [
        {
            "setting": f"{name}: {SETTINGS[name]}",
            "CPU s per step": f"{statistics.median(values):.3f}",
            "spread": f"{min(values):.3f} to {max(values):.3f}",
            "ratio": f"{statistics.median(values) / least:.2f}",
        }
        for name, values in times.items()
    ]
    print(markdown_table(rows))
    return 0


def _measured(name: str, steps: int, _: int) -> float:
    # In a process of its own: torch looks at its pages once, at the start.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["THP_MEM_ALLOC_ENABLE"] = "1" if "large" in name else "0"
    command = [sys.executable, str(BENCHMARKS), __name__, "--setting", name, "--steps", str(steps)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def seconds_per_step(name: str, steps: int) -> float:
    """Return the CPU seconds of a training step under one setting, in this process."""
    import torch
    from transformers import BertConfig, BertModel

    from megakd.engine import memory

    torch.set_num_threads(1)
    if name == "returned":
        memory.set_thresholds(mapped=memory.RETURNED_BYTES, trimmed=memory.RETURNED_BYTES)
    elif name != "default":
        memory.keep_freed_memory()
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
    model = BertModel(BertConfig(vocab_size=30522, num_attention_heads=12, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    texts = torch.randint(1000, 20000, (16, 24))
    began = 0.0
    for step in range(WARM_UP_STEPS + steps):
        began = time.process_time() if step == WARM_UP_STEPS else began
        model(input_ids=texts).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.process_time() - began) / steps
