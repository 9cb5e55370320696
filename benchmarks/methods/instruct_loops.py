"""Distil a decoder for a number of seconds with a plain loop in PyTorch, or with TRL's GKDTrainer.

`python benchmarks methods.instruct_loops --loop bare|trl --start FOLDER --teacher FOLDER
--rows FILE --seconds 600 --to FOLDER`, one process, on the CPU, or with `DS_ACCELERATOR=cuda` on a
GPU. A side of `methods.instruct`.

Both take forward KL on the tokens of the answers, AdamW, and a rate that rises in the first 3 % of
the time and falls as a cosine. The bare loop computes logits at the positions that count alone;
TRL, written for 1.16, computes as its users have it. Both compute in bf16; weights are in fp32, and
those of the teacher in bf16.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from lib.instruct import MAX_LENGTH, Conversation, encoded, logits_of, padded, rows_of
from lib.launching import UnusableError, device
from lib.options import parsed, parser_of

WARM_UP = 0.03
DONE = "loop.json"


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    torch.manual_seed(given.seed)
    tokenizer = AutoTokenizer.from_pretrained(given.teacher)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device())
        for folder, dtype in ((given.start, torch.float32), (given.teacher, torch.bfloat16))
    )
    student.train()
    teacher.requires_grad_(requires_grad=False)
    steps = LOOPS[given.loop](given, student, teacher, tokenizer)
    student.save_pretrained(given.to)
    tokenizer.save_pretrained(given.to)
    # Written last: without it the loop is repeated.
    (given.to / DONE).write_text(json.dumps({"steps": steps, "seconds": given.seconds}))
    return 0


def share_of(clock: Callable[[], float]) -> Callable[[int], float]:
    """Return the share of the rate by the clock, which goes from 0 to 1."""

    def share(_: int) -> float:
        now = min(1.0, clock())
        return min(now / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * now))

    return share


def bare(given: argparse.Namespace, student: Any, teacher: Any, tokenizer: Any) -> int:
    rows = batches(encoded(rows_of(given.rows), tokenizer), given)
    optimizer = optimizer_of(student, given)
    clock, steps = Clock(given.seconds), 0
    clock.start()
    schedule = LambdaLR(optimizer, share_of(clock.now))
    while clock.now() < 1:
        batch = padded(next(rows), tokenizer.pad_token_id)
        tokens, mask, counts = (tensor.to(device()) for tensor in batch)
        loss = divergence(student, teacher, tokens, mask, counts)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        steps += 1
    return steps


def batches(
    rows: Sequence[Conversation], given: argparse.Namespace
) -> Iterator[list[Conversation]]:
    generator = torch.Generator().manual_seed(given.seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for first in range(0, len(order) - given.batch + 1, given.batch):
            yield [rows[number] for number in order[first : first + given.batch]]


def divergence(student: Any, teacher: Any, tokens: Tensor, mask: Tensor, counts: Tensor) -> Tensor:
    with torch.autocast(device(), torch.bfloat16):
        with torch.no_grad():
            theirs = logits_of(teacher, tokens, mask, counts)
        ours = logits_of(student, tokens, mask, counts)
    ours, theirs = (F.log_softmax(logits.float(), dim=-1) for logits in (ours, theirs))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def optimizer_of(student: Any, given: argparse.Namespace) -> AdamW:
    return AdamW(student.parameters(), lr=given.rate, weight_decay=0.0, fused=True)


class Clock(TrainerCallback):
    """Counts the share of its seconds that has gone, and stops a trainer at the end."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._begin = seconds, 0.0

    def start(self) -> None:
        self._begin = time.monotonic()

    def now(self) -> float:
        return (time.monotonic() - self._begin) / self._seconds if self._begin else 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_training_stop = self.now() >= 1
        return control


def trl(given: argparse.Namespace, student: Any, teacher: Any, tokenizer: Any) -> int:
    from datasets import Dataset

    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        gkd = importlib.import_module("trl.experimental.gkd")
    except ModuleNotFoundError:
        raise UnusableError("trl is not installed: pip install trl") from None
    clock, optimizer = Clock(given.seconds), optimizer_of(student, given)
    with tempfile.TemporaryDirectory(prefix="megakd-trl-") as folder:
        options = gkd.GKDConfig(
            output_dir=folder,
            lmbda=0.0,  # the rows' own answers
            beta=0.0,  # forward KL
            temperature=1.0,
            max_length=MAX_LENGTH,
            per_device_train_batch_size=given.batch,
            max_steps=1_000_000,  # the clock ends it
            max_grad_norm=1.0,
            bf16=True,
            use_cpu=device() == "cpu",
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_steps=50,
            seed=given.seed,
        )
        trainer = gkd.GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=options,
            train_dataset=Dataset.from_list(rows_of(given.rows)),
            processing_class=tokenizer,
            callbacks=[clock],
            optimizers=(optimizer, LambdaLR(optimizer, share_of(clock.now))),
        )
        trainer.train()
    return int(trainer.state.global_step)


LOOPS = {"bare": bare, "trl": trl}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--loop", choices=LOOPS, required=True)
    for name in ("start", "teacher", "rows", "to"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=1)
    return parsed(parser, __name__, arguments)
