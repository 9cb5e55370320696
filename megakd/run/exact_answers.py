"""What 8 bits change of a teacher: the divergence of its answers to some held-out rows."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from megakd.contract.batch import IGNORE
from megakd.engine.collectives import all_reduce_
from megakd.errors import TeacherError
from megakd.losses.objective import logits_of
from megakd.teachers.frozen import FrozenTeacher
from megakd.training.assembly import Assembly

logger = logging.getLogger(__name__)
POSITIONS = 256
"""Most rows of a classifier, or targets of a language model, on each rank."""


def has_probabilities(assembly: Assembly) -> bool:
    """Return whether the outputs of models for the task are one distribution for a row or token."""
    splits = assembly.prepared.splits
    return assembly.config.task.type != "regression" and not splits.multi_label


@torch.no_grad()
def log_probabilities(assembly: Assembly, teacher: FrozenTeacher) -> Tensor:
    """Return [N, C] of this rank's first held-out rows, on the CPU; a collective at ZeRO 3."""
    scorer = assembly.scorer()
    rows = assembly.prepared.encoded.validation
    first = rows.select(range(min(len(rows), scorer.batch_size * scorer.ranks.world_size)))
    (batch,) = scorer.batches(first)
    answer = teacher(batch)
    if answer.hidden is None or answer.head is None:
        return logits_of(answer)[:POSITIONS].log_softmax(-1).cpu()
    with answer.head.open():
        # Padding and prompts count for no loss.
        counted = batch.labels != IGNORE
        hidden = answer.hidden[counted] if answer.hidden.dim() > 2 else answer.hidden
        few = answer._replace(hidden=hidden[:POSITIONS])
        return logits_of(few).log_softmax(-1).cpu()


def say_divergence(key: str, exact: Tensor, packed: Tensor) -> None:
    """Log the mean KL divergence of 8-bit answers from those in bf16; a collective.

    key: of the teacher in the config.

    Raises:
        TeacherError: it is no number.
    """
    sums = torch.stack(
        [
            torch.sum(exact.exp() * (exact - packed), dtype=torch.float64),
            (exact.argmax(-1) == packed.argmax(-1)).sum().double(),
            torch.tensor(float(len(exact)), dtype=torch.float64),
        ]
    )
    divergence, same, count = all_reduce_(sums).tolist()
    if not divergence < float("inf"):
        raise TeacherError(
            f"{key}.dtype: fp8: the answers to {count:.0f} held-out rows or tokens are not finite "
            "numbers; use bf16"
        )
    logger.info(
        "%s in fp8: KL divergence from bf16 %.4f nats, same most likely answer %.1f %%, on %d "
        "held-out rows or tokens",
        *(key, divergence / max(1.0, count), 100 * same / max(1.0, count), count),
    )
