"""The table of docs/planning.md: large teachers on 1 to 32 nodes of 8 GPUs of 141 GB.

`python benchmarks memory.planning_table`, some minutes on a CPU; nothing is loaded. Every cell is
what `megakd plan` says of the run config that `--write FOLDER` leaves there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib.data import llama
from lib.launching import write_config
from lib.options import parser_of
from megakd.commands.plan import DEVICE_BASE
from megakd.config.file import load_config
from megakd.planning.cluster import GIGA, Cluster, Rates
from megakd.planning.phase_traces import Traces
from megakd.planning.plan import Plan, plan_run

NODES, GPUS = (1, 2, 4, 8, 16, 32), 8


def decoder(layers: int, width: int, neurons: int, heads: tuple[int, int], ids: int) -> Any:
    keys = {"num_key_value_heads": heads[1], "vocab_size": ids, "max_position_embeddings": 4096}
    return {"config": llama(layers, width, heads[0], neurons, **keys)}


def encoder(layers: int) -> Any:
    """The width of T5 v1.1 XL with EncT5's decoder layer and head."""
    sizes = {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": layers, "num_heads": 32}
    others = {"feed_forward_proj": "gated-gelu", "vocab_size": 32128}
    return {"config": {"model_type": "enct5", **sizes, **others}}


ONE_B, EIGHT_B = (22, 2048, 5632, (32, 4)), (32, 4096, 14336, (32, 8))
RUNS = {
    "XL": ("EncT5-XL (1.3B) to a tenth, MiniDisc", encoder(24), None),
    "3B": ("the same with 58 layers (3B)", encoder(58), None),
    "7B": ("7B to 1.1B", decoder(32, 4096, 11008, (32, 32), 32000), decoder(*ONE_B, 32000)),
    "13B": ("13B to 1.1B", decoder(40, 5120, 13824, (40, 40), 32000), decoder(*ONE_B, 32000)),
    "70B": ("70B to 8B", decoder(80, 8192, 28672, (64, 8), 128256), decoder(*EIGHT_B, 128256)),
    "111B": ("111B to 8B", decoder(64, 12288, 36864, (96, 8), 256000), decoder(*EIGHT_B, 256000)),
}
"""Title, teacher and student; without a student, MiniDisc cuts an encoder."""


def run_config(name: str) -> dict[str, Any]:
    _, teacher, student = RUNS[name]
    is_encoder = student is None
    task = {"type": "causal_lm", "dataset": "texts", "max_length": 2048}
    if is_encoder:
        task = {"type": "classification", "dataset": "glue/mrpc", "max_length": 128}
    rows = 8 if is_encoder else 4
    preset = "zero2" if is_encoder else "zero3"
    return {
        "output_dir": "runs/plan",
        "task": task,
        "teacher": {"model": teacher, "dtype": "bf16"},
        "student": {"model": student or "from_teacher", "deepspeed": preset},
        "method": {"name": "minidisc" if is_encoder else "single"},
        "train": {
            "per_device_train_batch_size": rows,
            "gradient_checkpointing": not is_encoder,
            "bf16": True,
        },
        "eval": {"per_device_eval_batch_size": rows},
    }


def row(name: str, folder: Path) -> str:
    config = load_config(write_config(folder / f"{name}.yaml", run_config(name)))
    known, task = Traces(), config.task
    clusters = [
        Cluster(
            ranks=GPUS * nodes,
            nodes=nodes,
            device="cuda",
            device_memory=141 * GIGA,
            host_memory=2000 * GIGA,
            device_base=DEVICE_BASE,
            rates=Rates(tflops=400, gbps=45),
        )
        for nodes in NODES
    ]
    plans = [plan_run(config, cluster, advise=False, traces=known) for cluster in clusters]
    title = f"{RUNS[name][0]}, {config.train.per_device_train_batch_size} x {task.max_length}"
    return f"| {title} | {' | '.join(cell(plan) for plan in plans)} |"


def cell(plan: Plan) -> str:
    """Gigabytes per GPU and seconds per step; what does not fit stands in brackets."""
    text = f"{plan.peak_bytes_per_rank / GIGA:.1f}, {plan.seconds_per_step:.1f} s"
    return text if plan.fits else f"({text})"


def main(arguments: Sequence[str]) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="keep the run configs there")
    given = parser.parse_args(arguments)
    titles = " | ".join(f"{nodes} x {GPUS}" for nodes in NODES)
    print(f"| run | {titles} |\n|{'---|' * (len(NODES) + 1)}")
    with tempfile.TemporaryDirectory() as temporary:
        for name in RUNS:
            print(row(name, given.write or Path(temporary)), flush=True)
    return 0
