"""A teacher's answers to all training rows: computed once, then read from disk in any run.

Of a causal language model's answers, a cache keeps the best tokens, or draws. Random sampling
knowledge distillation (Anshumann et al. 2025, https://arxiv.org/abs/2503.16870) keeps draws from
the teacher's softmax at temperature 1. The share of a token in the draws is an unbiased estimate of
its probability, so that the gradient of forward KL is unbiased too.
Shapes: B rows of a micro-batch, T positions, n draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional

from megakd.config.models import TeacherConfig
from megakd.contract.batch import Batch
from megakd.contract.tasks import FP8
from megakd.data.encoding import tokenizer_content
from megakd.data.masking import row_keys, uniform
from megakd.errors import TeacherError
from megakd.models.source import ModelSource, ReadyTeacher
from megakd.process.fingerprint import Fingerprint, files_identity, flatten
from megakd.teachers.cached import Answers, CachedTeacher, build_cache
from megakd.teachers.frozen import FrozenTeacher
from megakd.training.assembly import Assembly

# The domain of the draws; 0 is the domain of the masks.
_DRAWS = 0x6472617773
_BYTES_OF_ID, _BYTES_OF_LOGARITHM, _BYTES_OF_COUNT = 4, 2, 1
BROKEN = "broken"


def open_cache(assembly: Assembly, ready: ReadyTeacher, folder: Path) -> CachedTeacher:
    """Return a teacher whose answers are read from disk.

    Raises:
        TeacherError: the answers are damaged, incomplete, or for other inputs.
    """
    return CachedTeacher(folder, _facts(assembly, ready), assembly.ranks)


def fill_cache(assembly: Assembly, ready: ReadyTeacher, folder: Path) -> None:
    """Query a teacher with every training row and cache its answers; a collective.

    Raises:
        MegakdError: the teacher cannot be used, or the folder holds other answers.
    """
    task, spec, scorer = assembly.config.task, ready.spec, assembly.scorer()
    has_texts, labels = task.type == "causal_lm", assembly.prepared.splits.label_names

    def answers(model: FrozenTeacher, rows: Dataset, first: int) -> Answers:
        if not has_texts:
            return {"logits": scorer.outputs(model.predict, rows).float()}
        ask = partial(ask_tokens, model, spec=spec, length=task.row_length)
        return whole_answers(scorer.answers(ask, rows, first=first), first=first)

    @contextmanager
    def asking() -> Iterator[Callable[[Dataset, int], Answers]]:
        dtype = assembly.teacher_dtype(ready)
        with assembly.loaded(ready.source, spec.deepspeed, dtype) as model:
            yield partial(answers, model)

    build_cache(
        folder,
        _facts(assembly, ready),
        assembly.prepared.encoded.train,
        ranks=assembly.ranks,
        row_bytes=task.row_length * bytes_per_token(spec) if has_texts else 4 * max(1, len(labels)),
        asking=asking,
    )


def _facts(assembly: Assembly, ready: ReadyTeacher) -> Fingerprint:
    task, prepared, spec = assembly.config.task, assembly.prepared, ready.spec
    facts: dict[str, Any] = {
        "task": task.type,
        "labels": list(prepared.splits.label_names),
        "max_length": task.row_length,
        "texts": assembly.texts_key,
        "tokenizer": tokenizer_content(prepared.tokenizer),
        "teacher": model_identity(ready.source, seed=assembly.config.seed),
        "dtype": FP8 if ready.source.fp8 else assembly.teacher_dtype(ready),
    }
    if task.type == "causal_lm" and spec.cache_draws is None:
        facts["top_k"] = spec.cache_top_k
    elif task.type == "causal_lm":
        facts["draws"] = spec.cache_draws
    return flatten(facts)


def model_identity(source: ModelSource, *, seed: int) -> Mapping[str, Any]:
    """Return a model's identity, independent of its folder; random weights depend on `seed`."""
    config = flatten(source.config.to_diff_dict())
    identity: dict[str, Any] = {
        # transformers writes its own version into every config that it loads.
        "config": {k: v for k, v in config.items() if not k.endswith("transformers_version")},
        "weights": files_identity(source.files),
    }
    if source.layers is not None:
        identity["layers"] = source.layers
    if source.folder is None:
        identity["seed"] = seed
    return identity


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
        broken, kept = logprobs.isnan().any(-1), {"logprobs": logprobs.half()}
    else:
        if batch.rows is None:
            raise TypeError("draws depend on the numbers of the rows, and this batch has none")
        (size, width), rows = batch.valid.shape, batch.rows.clamp(min=0).numpy()
        keys = row_keys(0, 0, rows, size=size, domain=_DRAWS)[:, None]
        places = np.arange(1, width * spec.cache_draws + 1, dtype=np.uint64)
        numbers = torch.from_numpy(uniform(keys, places)).view(size, width, spec.cache_draws)
        ids, counts = model.draw(batch, numbers.to(batch.valid.device))
        broken, kept = (ids < 0).all(-1), {"counts": counts}
    beyond = (0, 0, 0, length - ids.shape[1])
    padded = {name: functional.pad(values, beyond) for name, values in kept.items()}
    broken = (broken & batch.valid).any(-1)
    return {"ids": functional.pad(ids, beyond, value=-1), **padded, BROKEN: broken}


def whole_answers(answers: Mapping[str, Tensor], *, first: int) -> dict[str, Tensor]:
    """Return answers of `ask_tokens` to the rows from `first` on, without `broken`.

    Raises:
        TeacherError: a row has an answer that is not finite.
    """
    whole = dict(answers)
    rows = whole.pop(BROKEN).nonzero().flatten()
    if len(rows):
        raise TeacherError(
            f"the logits of the teacher are not finite for training row {first + int(rows[0])} "
            f"({len(rows)} rows of this shard); set the teacher's dtype to bf16 or fp32"
        )
    return whole
