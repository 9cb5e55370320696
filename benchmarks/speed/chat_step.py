"""A step of a pretrained decoder on conversations, megakd against a bare loop: CPU time in pairs.

`python benchmarks speed.chat_step --model FOLDER --data FILE [--zero zero0,zero2]
[--teacher-zero …]`

The student has some layers of the teacher and learns its soft targets on the answers, as in the
repair of shrink: megakd's side is all that a stage does per step, as in `speed.overhead`; the bare
loop has transformers' models, full logits, a KL at the targets, clipping and AdamW. Both start from
the same weights, take the same batches by turns in one process on one rank in fp32, and must agree
on the loss before the first step and after the warm-up. Every pair of presets is a process of its
own.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from lib.launching import BENCHMARKS, write_config
from lib.options import parsed, parser_of, words_of
from lib.tables import print_rows, ratio_of
from megakd.config.file import load_config
from megakd.contract.batch import IGNORE, Batch
from megakd.run.main import started
from speed.causal_bare import LEARNING_RATE, Bare, Models, forward_kl, paired, plain_copy
from speed.causal_megakd import running

TARGET = 1.05
ZEROS = ("zero0", "zero1", "zero2", "zero3")


class ChatBare(Bare):
    """A bare loop on padded conversations, whose loss counts the tokens of the answers."""

    def _forward(self, batch: Batch) -> torch.Tensor:  # type: ignore[override]
        with torch.no_grad():
            soft = self._models.teacher(**batch.inputs, use_cache=False).logits
        logits = self._models.student(**batch.inputs, use_cache=False).logits
        counted = batch.labels != IGNORE
        return self._loss(logits[counted].float(), soft[counted].float()) / counted.sum()


def case_of(given: argparse.Namespace, zero: str, teacher_zero: str, folder: Path) -> Path:
    tree: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "task": {
            "type": "causal_lm",
            "train_files": str(given.data),
            "max_length": given.length,
            "max_eval_examples": 8,
        },
        "teacher": {"model": str(given.model), "deepspeed": f"teacher_{teacher_zero}"},
        "student": {
            "model": "from_teacher",
            "layers": {"keep": given.layers, "by": "spacing"},
            "deepspeed": zero,
        },
        "method": {"name": "single"},
        "objective": [{"loss": "soft_target_kl", "temperature": 1.0}],
        "train": {
            "per_device_train_batch_size": given.rows,
            "max_steps": 10**6,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
        },
        "save": {"save_steps": 10**6},
    }
    return write_config(folder / "run.yaml", tree)


def measure(given: argparse.Namespace) -> None:
    torch.set_num_threads(given.threads)
    (zero,), (teacher_zero,) = given.zero, given.teacher_zero
    with tempfile.TemporaryDirectory(prefix="megakd-chat-step-") as name:
        config = load_config(case_of(given, zero, teacher_zero, Path(name)))
        with started(config) as ranks, running(config, ranks, given.warm_up + given.pairs) as side:
            teacher = LlamaForCausalLM.from_pretrained(given.model, dtype=torch.float32)
            models = Models(plain_copy(side.student), teacher)
            pairs = paired(side, ChatBare(models, side.batches, forward_kl), given, agree=True)
    ratio = ratio_of(pairs)
    ours, bare = (statistics.median(each) for each in zip(*pairs, strict=True))
    numbers = f"CPU time {ratio.median:.3f} ({ours:.2f} against {bare:.2f} s)"
    print(f"target {TARGET}: {'met' if ratio.median <= TARGET else 'missed'}")
    what = f"student {zero}, teacher {teacher_zero}, {len(pairs)} pairs"
    print_rows(given.command, (what, numbers, f"95 %: {ratio.between()}"))


def main(arguments: Sequence[str]) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="a Llama, with its tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="conversations, as jsonl")
    parser.add_argument("--zero", type=words_of(ZEROS), default=["zero0"])
    parser.add_argument("--teacher-zero", type=words_of(("zero0", "zero3")), default=["zero0"])
    parser.add_argument("--layers", type=int, default=20, help="layers of the student")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=576, help="task.max_length")
    parser.add_argument("--pairs", type=int, default=10, help="at least 2")
    parser.add_argument("--warm-up", type=int, default=2, help="steps that do not count")
    parser.add_argument("--threads", type=int, default=1)
    given = parsed(parser, __name__, arguments)
    pairs = [*itertools.product(given.zero, given.teacher_zero)]
    if len(pairs) == 1:
        measure(given)
        return 0
    for zero, teacher_zero in pairs:
        one = ["--zero", zero, "--teacher-zero", teacher_zero]
        subprocess.run([sys.executable, str(BENCHMARKS), __name__, *arguments, *one], check=True)
    return 0
