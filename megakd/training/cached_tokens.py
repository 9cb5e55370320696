"""The part of a causal language model's answers that a cache keeps: its best tokens, or draws.

Random sampling knowledge distillation (Anshumann et al. 2025, https://arxiv.org/abs/2503.16870)
keeps draws from the teacher's softmax at temperature 1. The share of a token in the draws is an
unbiased estimate of its probability, so that the gradient of forward KL is unbiased too.
Shapes: B rows of a micro-batch, T positions, n draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from megakd.contract.batch import Batch
from megakd.data.splitmix import row_keys, uniform
from megakd.errors import TeacherError
from megakd.teachers.frozen import FrozenTeacher

if TYPE_CHECKING:
    from megakd.config.models import TeacherConfig

# The domain of the draws; 0 is the domain of the masks.
_DRAWS = 0x6472617773
_BYTES_OF_ID, _BYTES_OF_LOGARITHM, _BYTES_OF_COUNT = 4, 2, 1
BROKEN = "broken"


def kept_facts(spec: TeacherConfig) -> dict[str, int]:
    """Return what the kept part of an answer depends on, besides the answer itself."""
    if spec.cache_draws is None:
        return {"top_k": spec.cache_top_k}
    return {"draws": spec.cache_draws, "draws_seed": spec.cache_seed}


def bytes_per_token(spec: TeacherConfig) -> int:
    """Return the bytes of a position in the cache."""
    if spec.cache_draws is None:
        return spec.cache_top_k * (_BYTES_OF_ID + _BYTES_OF_LOGARITHM)
    return spec.cache_draws * (_BYTES_OF_ID + _BYTES_OF_COUNT)


def ask_tokens(
    model: FrozenTeacher, batch: Batch, spec: TeacherConfig, *, length: int
) -> dict[str, Tensor]:
    """Return what a cache keeps of a teacher's answers to a micro-batch with row numbers.

    Returns:
        `ids` [B, length, k] int32, negative after the batch's positions, with `logprobs` fp16 or
        `counts` uint8, and `broken` [B] bool: whether an answer is not finite, see `whole_answers`.
    """
    if spec.cache_draws is None:
        ids, logprobs = model.top_k(batch, spec.cache_top_k)
        broken, said = logprobs.isnan().any(-1), {"logprobs": logprobs.half()}
    else:
        ids, counts = model.draw(batch, _numbers(batch, spec.cache_draws, spec.cache_seed))
        broken, said = (ids < 0).all(-1), {"counts": counts}
    beyond = (0, 0, 0, length - ids.shape[1])
    padded = {name: functional.pad(values, beyond) for name, values in said.items()}
    broken = (broken & batch.valid).any(-1)
    return {"ids": functional.pad(ids, beyond, value=-1), **padded, BROKEN: broken}


def whole_answers(answers: Mapping[str, Tensor], *, first: int) -> dict[str, Tensor]:
    """Return answers of `ask_tokens` to the rows from `first` on, without `broken`.

    Raises:
        TeacherError: a row has an answer that is not finite.
    """
    found = dict(answers)
    rows = found.pop(BROKEN).nonzero().flatten()
    if len(rows):
        raise TeacherError(
            f"the logits of the teacher are not finite for training row {first + int(rows[0])} "
            f"({len(rows)} rows of this shard); set the teacher's dtype to bf16 or fp32"
        )
    return found


def _numbers(batch: Batch, draws: int, seed: int) -> Tensor:
    if batch.rows is None:
        raise TypeError("draws depend on the numbers of the rows, and this batch has none")
    size, length = batch.valid.shape
    rows = batch.rows.clamp(min=0).numpy()
    keys = row_keys(seed, 0, rows, size=size, domain=_DRAWS)[:, None]
    numbers = uniform(keys, np.arange(1, length * draws + 1, dtype=np.uint64))
    return torch.from_numpy(numbers).view(size, length, draws).to(batch.valid.device)
