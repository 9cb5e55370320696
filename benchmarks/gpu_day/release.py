"""Part of `gpu_day.py`: memory of a ZeRO-3 teacher and student before and after `destroy`.

Both are built three times, take a step and are destroyed. What `destroy` leaves behind would add
up with every stage of a run.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import psutil
import torch

from gpu_day import cases as gpu_day_cases
from gpu_day.process import part_parser, say
from lib.launching import write_config
from lib.stages import measured_stage
from megakd.config.file import load_config
from megakd.config.run import RunConfig
from megakd.engine.distributed import Ranks
from megakd.engine.memory import forget_models
from megakd.run.main import started

LOADS = 3
# Libraries keep buffers of their own, such as the workspace of cuBLAS (67 MB), from the first load.
KEPT_MB, GROWTH_MB = 128.0, 1.0


def main(arguments: Sequence[str]) -> int:
    """Print the memory around every load; return 1 if a model or its memory is left."""
    given = part_parser(__doc__).parse_args(arguments)
    tree = gpu_day_cases.causal_lm_tree(given.folder, rehearse=given.rehearse)
    tree |= {"eval": {}, "save": {"save_steps": gpu_day_cases.NEVER}}
    config = load_config(write_config(given.folder / "run.yaml", tree))
    rows: list[dict[str, Any]] = []
    with started(config) as ranks:
        measured = "allocated on the GPU" if ranks.device.type == "cuda" else "resident on the host"
        for number in range(LOADS):
            rows.append({"load": number + 1, **loaded_once(config, ranks)})
            say({"memory": f"{measured}, in MB", "loads": rows})
    return int(not is_released(rows, ranks.device))


def loaded_once(config: RunConfig, ranks: Ranks) -> dict[str, Any]:
    row: dict[str, Any] = {"before": memory_mb(ranks.device)}
    with measured_stage(config, ranks) as (stage, teacher):
        alive = [weakref.ref(stage.bundle), weakref.ref(teacher.model)]
        next(stage.steps_one_by_one())
        row["with the models"] = memory_mb(ranks.device)
    del stage, teacher
    row["after destroy"] = memory_mb(ranks.device)
    forget_models()
    row["after collecting"] = memory_mb(ranks.device)
    row["models left"] = sum(one() is not None for one in alive)
    return row


def memory_mb(device: torch.device) -> float:
    """Return the memory of tensors on a GPU, or of this process on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device) / 1e6
    return psutil.Process().memory_info().rss / 1e6


def is_released(rows: Sequence[dict[str, Any]], device: torch.device) -> bool:
    """Return whether no model is left, and no memory on a GPU; a CPU's heap shrinks as it likes."""
    kept = [row["after collecting"] for row in rows]
    is_small = kept[0] - rows[0]["before"] <= KEPT_MB and kept[-1] - kept[0] <= GROWTH_MB
    return not rows[-1]["models left"] and (is_small or device.type == "cpu")
