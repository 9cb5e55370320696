"""A causal LM step of megakd against an eager bare loop: CPU time in pairs, and memory.

`python benchmarks speed.causal_step [--pairs 20] [--divergences forward_kl,jsd]`, one rank with
one thread.

Llamas with random weights, V = 32000: a student of 4 x 256 learns from a teacher of 8 x 512, at
ZeRO 0 in fp32, from 4 x 256 tokens per step, by one soft target and without labels.

* megakd: all that a stage does per step, as in `speed.overhead`.
* bare: full logits of both models, log_softmax, the divergence, backward, clipping, AdamW.

Both sides of a pair start from the same weights, and take the same batches by turns in one process.
Their losses must agree before the first step and after the warm-up. The extra memory of a step is
the peak of resident memory above what was resident before the step, of each side in a process of
its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lib.clocks import by_turns, timed
from lib.data import llama, write_jsonl
from lib.launching import BENCHMARKS, bench_path, quickstart, write_config
from lib.options import parsed, parser_of, words_of
from lib.tables import print_rows, ratio_of

Loss = Callable[[Tensor, Tensor], Tensor]
SPECIAL = ("<unk>", "<pad>", "</s>")
LEARNING_RATE, MAX_GRAD_NORM, CLOSE = 1e-4, 1.0, 1e-4
TOKENIZER, RUN = "tokenizer", "run.yaml"
TARGET, MEMORY_TARGET = 0.85, 0.5
WARM_UP, MEMORY_STEPS = 4, 3
"""Steps that do not count, and steps whose memory is measured."""
WHAT = ("pairs", "megakd", "bare")
"""What a process measures: pairs of steps, or the memory of one side."""
TERMS = {"forward_kl": {"loss": "soft_target_kl"}, "jsd": {"loss": "soft_target_jsd", "beta": 0.5}}


class Sizes(NamedTuple):
    """Sizes of a case; a model is (layers, width), and has heads of `head` columns."""

    student: tuple[int, int]
    teacher: tuple[int, int]
    vocabulary: int
    rows: int
    length: int
    head: int

    def shape(self, size: tuple[int, int]) -> dict[str, Any]:
        """Return the config of a Llama with an output matrix of its own."""
        layers, width = size
        keys = {"max_position_embeddings": self.length, "tie_word_embeddings": False}
        return llama(layers, width, width // self.head, 3 * width, **keys)


FULL = Sizes((4, 256), (8, 512), vocabulary=32000, rows=4, length=256, head=64)
QUICK = Sizes((2, 32), (2, 64), vocabulary=300, rows=2, length=16, head=16)


def write_case(folder: Path, sizes: Sizes, divergence: str) -> None:
    words = [f"w{number}" for number in range(sizes.vocabulary - len(SPECIAL))]
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[attr-defined]
    roles = dict(zip(("unk_token", "pad_token", "eos_token"), SPECIAL, strict=True))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    fast.save_pretrained(folder / TOKENIZER)
    rng = random.Random(0)
    for split, batches in (("train", 64), ("validation", 1)):
        # The end token makes a document as long as a row.
        drawn = (rng.choices(words, k=sizes.length - 1) for _ in range(batches * sizes.rows))
        write_jsonl(folder / f"data/{split}.jsonl", ({"text": " ".join(text)} for text in drawn))
    write_config(folder / RUN, run_tree(folder, sizes, divergence))


def run_tree(folder: Path, sizes: Sizes, divergence: str) -> dict[str, Any]:
    teacher, student = ({"config": sizes.shape(size)} for size in (sizes.teacher, sizes.student))
    return {
        "output_dir": str(folder / "run"),
        "task": {
            "type": "causal_lm",
            "dataset": str(folder / "data"),
            "text_columns": ["text"],
            "max_length": sizes.length,
            "tokenizer": str(folder / TOKENIZER),
        },
        "teacher": {"model": teacher, "deepspeed": "teacher_zero0"},
        "student": {"model": student, "deepspeed": "zero0"},
        "method": {"name": "single"},
        "objective": [TERMS[divergence]],
        "train": {
            "per_device_train_batch_size": sizes.rows,
            "max_steps": 10**6,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": MAX_GRAD_NORM,
        },
        "save": {"save_steps": 10**6},
        "log": {"logging_steps": 10},
    }


class Bare:
    """The bare loop: forward of both models, loss, backward, clipping, AdamW.

    models: a student and a teacher. As both sides of a pair, `step` takes the step of a batch,
    every batch once and in order; `loss` returns its loss in nats per target, without learning.
    """

    def __init__(
        self, models: Iterable[LlamaForCausalLM], ids: Sequence[Tensor], loss: Loss
    ) -> None:
        self._student, self._teacher = models
        self._ids, self._loss = ids, loss
        matrices = [p for p in self._student.parameters() if p.dim() > 1]
        others = [p for p in self._student.parameters() if p.dim() <= 1]
        self._parameters = [*matrices, *others]
        # The groups of megakd: matrices and others, both without decay by default.
        groups = [{"params": group, "weight_decay": 0.0} for group in (matrices, others)]
        self._optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
        self._student.train()
        self._teacher.eval().requires_grad_(requires_grad=False)

    def step(self, index: int) -> None:
        self._forward(self._ids[index]).backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, MAX_GRAD_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()

    @torch.no_grad()
    def loss(self, index: int) -> float:
        return float(self._forward(self._ids[index]))

    def _forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            soft = self._teacher(input_ids=ids, use_cache=False).logits
        logits = self._student(input_ids=ids, use_cache=False).logits
        targets = ids[:, 1:].numel()
        return self._loss(logits[:, :-1].float(), soft[:, :-1].float()) / targets


def bare_copy(models: Sequence[LlamaForCausalLM], ids: Sequence[Tensor], loss: Loss) -> Bare:
    """Return a bare loop that starts from the same weights, in models that no engine knows."""
    copies = [LlamaForCausalLM(model.config) for model in models]
    for copy, model in zip(copies, models, strict=True):
        copy.load_state_dict(model.state_dict())
    return Bare(copies, ids, loss)


def forward_kl(logits: Tensor, soft: Tensor) -> Tensor:
    return _kl(F.log_softmax(soft, dim=-1), F.log_softmax(logits, dim=-1))


def jsd(logits: Tensor, soft: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence with weights of one half."""
    log_q, log_p = F.log_softmax(logits, dim=-1), F.log_softmax(soft, dim=-1)
    # TRL stacks both and takes logsumexp, which takes longer.
    log_m = torch.logaddexp(log_p, log_q) + math.log(0.5)
    return (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return F.kl_div(log_b, log_a, reduction="sum", log_target=True)


LOSSES = {"forward_kl": forward_kl, "jsd": jsd}
"""Of logits [B, T, V] of the student and of the teacher: sums in nats."""


@contextmanager
def opened_bare(sizes: Sizes, divergence: str, count: int) -> Iterator[Bare]:
    """Build a bare loop with random weights and so many random batches."""
    shapes = (sizes.shape(size) for size in (sizes.student, sizes.teacher))
    configs = (LlamaConfig(**shape, vocab_size=sizes.vocabulary) for shape in shapes)
    batch = (sizes.rows, sizes.length)
    ids = [torch.randint(sizes.vocabulary, batch) for _ in range(count)]
    yield Bare(map(LlamaForCausalLM, configs), ids, LOSSES[divergence])


@contextmanager
def opened_megakd(case: Path, count: int) -> Iterator[Any]:
    """Build the engines of a run, with so many batches, and free them at the end."""
    # The memory of the bare loop is that of a process without megakd's engines.
    from lib.stages import measured_stage
    from megakd.config.file import load_config
    from megakd.losses.objective import WEIGHTED_LOSS
    from megakd.run.main import started
    from megakd.training.student import device_batch

    class Megakd:
        """A stage with its loader, its teacher, its meters and its log."""

        def step(self, index: int) -> None:
            """Take the stage's next step; the loader's thread has long finished at its end."""
            del index  # the stage counts its own steps
            next(steps)

        def loss(self, index: int) -> float:
            batch, plan = batches[index], stage.stage.strategy.passes(0)
            knowledge = stage.trainer.ask_teachers(plan, batch)
            losses = stage.student.measure(batch, knowledge, plan, [])
            return float(losses.parts[WEIGHTED_LOSS] / (batch.labels != -100).sum())

        def bare(self, loss: Loss) -> Bare:
            ids = [batch.inputs["input_ids"] for batch in batches]
            return bare_copy((stage.student.student, teacher.model), ids, loss)

    config = load_config(case / RUN)
    with started(config) as ranks, measured_stage(config, ranks) as (stage, teacher):
        source: Any = stage.batch_source
        batches = [device_batch(source.step(n)[0], ranks.device) for n in range(count)]
        steps: Any = stage.steps_one_by_one()
        yield Megakd()
        # Ends the loader's thread.
        steps.close()


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    if given.case is not None:
        measure(given)
        return 0
    rows = []
    for divergence in given.divergences:
        with tempfile.TemporaryDirectory(prefix="megakd-causal-") as name:
            write_case(Path(name), given.sizes, divergence)
            pairs, *memory = (in_child(what, divergence, Path(name), given) for what in WHAT)
        rows.append(row_of(f"{divergence}, megakd", pairs, memory))
        if given.sizes == FULL:
            print(verdict(pairs, memory), flush=True)
    print_rows(given.command, *rows)
    return 0


def in_child(what: str, divergence: str, case: Path, given: argparse.Namespace) -> Any:
    place = ["--case", str(case), "--what", what, "--divergences", divergence]
    command = [sys.executable, str(BENCHMARKS), __name__, *given.arguments, *place]
    changes = {"OMP_NUM_THREADS": "1", "PYTHONPATH": bench_path()}
    environment = os.environ | quickstart().ENVIRONMENT | changes
    subprocess.run(command, env=environment, check=True)
    return json.loads((case / f"{what}.json").read_text(encoding="utf-8"))


def measure(given: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    count, divergence = WARM_UP + max(given.pairs, MEMORY_STEPS), given.divergences[0]
    if given.what == "bare":
        opened: Any = opened_bare(given.sizes, divergence, count)
    else:
        opened = opened_megakd(given.case, count)
    with opened as side:
        is_pairs = given.what == "pairs"
        measured: Any = paired(side, divergence, given.pairs) if is_pairs else extra_memory(side)
    (given.case / f"{given.what}.json").write_text(json.dumps(measured), encoding="utf-8")


def extra_memory(side: Any) -> int:
    """Return the bytes that a step takes beyond what is resident before it, the median of a few."""
    from bench.memory import peak_in_process

    for index in range(WARM_UP):
        side.step(index)
    steps = range(WARM_UP, WARM_UP + MEMORY_STEPS)
    peaks = [peak_in_process(functools.partial(side.step, index)).bytes_ for index in steps]
    return statistics.median_low(peaks)


def paired(side: Any, divergence: str, pairs: int) -> list[list[float]]:
    """Return the CPU seconds of the steps of a side and of a bare loop; their losses must agree."""
    bare = side.bare(LOSSES[divergence])
    check_agree(side, bare, 0)
    for index in range(WARM_UP):
        side.step(index)
        bare.step(index)
    check_agree(side, bare, WARM_UP)

    def seconds(one: Any, number: int) -> float:
        return timed(functools.partial(one.step, WARM_UP + number)).cpu

    return by_turns([functools.partial(seconds, one) for one in (side, bare)], pairs)


def check_agree(side: Any, beside: Any, steps: int) -> None:
    ours, theirs = side.loss(steps), beside.loss(steps)
    if abs(ours - theirs) > CLOSE * abs(theirs):
        raise ValueError(f"after {steps} steps the loss is {ours}, and the other side's {theirs}")
    print(f"after {steps} steps the losses agree: {ours:.6f} and {theirs:.6f}", flush=True)


def row_of(
    what: str, pairs: Sequence[Sequence[float]], memory: Sequence[int]
) -> tuple[str, str, str]:
    ratio, share = ratio_of(pairs), memory[0] / max(1, memory[1])
    ours, theirs = (1000 * statistics.median(each) for each in zip(*pairs, strict=True))
    megabytes = f"{memory[0] / 1e6:.0f} against {memory[1] / 1e6:.0f} MB"
    numbers = f"CPU time {ratio.median:.4f} ({ours:.1f} against {theirs:.1f} ms), "
    numbers += f"extra memory {share:.2f} ({megabytes})"
    what = f"{what}, a step against a bare loop, {len(pairs)} pairs"
    return what, numbers, f"95 %: {ratio.between(4)}"


def verdict(pairs: Sequence[Sequence[float]], memory: Sequence[int]) -> str:
    met = ratio_of(pairs).median <= TARGET and memory[0] <= MEMORY_TARGET * memory[1]
    return f"targets {TARGET} and {MEMORY_TARGET}: {'met' if met else 'missed'}"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--pairs", type=int, default=20, help="at least 2")
    parser.add_argument("--divergences", type=words_of(TERMS), default=list(TERMS))
    parser.add_argument("--quick", action="store_true", help="tiny models, to try the program")
    parser.add_argument("--what", help=argparse.SUPPRESS)
    parser.add_argument("--case", type=Path, help=argparse.SUPPRESS)
    given = parsed(parser, __name__, arguments)
    given.sizes = QUICK if given.quick else FULL
    return given
