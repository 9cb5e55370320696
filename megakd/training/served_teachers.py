"""Teachers' answers from a cache that the run fills, or from inference servers.

Of a causal language model's answers, a cache keeps the best tokens, or draws. Random sampling
knowledge distillation (Anshumann et al. 2025, https://arxiv.org/abs/2503.16870) keeps draws from
the teacher's softmax at temperature 1. The share of a token in the draws is an unbiased estimate of
its probability, so that the gradient of forward KL is unbiased too.
Shapes: B rows of a micro-batch, T positions, n draws.

They are checked before a run loads any model, and opened for its stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from megakd.config.sections import TeacherConfig, TeacherServerConfig
from megakd.config.task import FP8, STUDENT
from megakd.data.batch import IGNORE, Batch, Outputs, Teacher, TopK
from megakd.data.collation import row_keys, uniform
from megakd.data.encoding import tokenizer_content
from megakd.engine.collectives import activity, on_main, progress, raise_on_all
from megakd.engine.distributed import Ranks
from megakd.errors import ServerError, TeacherError
from megakd.models.fitting import ModelSource, ReadyTeacher
from megakd.process.record import Fingerprint, files_identity, flatten
from megakd.teachers.cached import CachedTeacher, missing_rows, write_shard
from megakd.teachers.frozen import FrozenTeacher
from megakd.teachers.servers import (
    FIRST_PATIENCE_S,
    BestTokens,
    Requirements,
    VllmServer,
    running_calls,
)
from megakd.training.assembly import Assembly
from megakd.training.evaluation import scorer_for
from megakd.training.generated_texts import replicas_of
from megakd.training.inputs import RunInputs

# The domain of the draws; 0 is the domain of the masks.
_DRAWS = 0x6472617773

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
    task, spec, scorer = assembly.config.task, ready.spec, scorer_for(assembly)
    has_texts, labels = task.type == "causal_lm", assembly.prepared.splits.label_names
    size = task.row_length * bytes_per_token(spec) if has_texts else 4 * max(1, len(labels))
    rows, facts = assembly.prepared.encoded.train, _facts(assembly, ready)
    missing = missing_rows(folder, facts, len(rows), ranks=assembly.ranks, row_bytes=size)
    if not missing:
        return
    counts = [len(numbers) for numbers in missing]
    with assembly.loaded(ready) as model, activity("asking the teacher about the training rows"):
        ask = partial(ask_tokens, model, spec=spec, length=task.row_length)
        for numbers in progress(missing, total=sum(counts), each=max(counts)):
            part, first = rows.select(numbers), numbers.start
            if has_texts:
                answers = whole_answers(scorer.answers(ask, part, first=first), first=first)
            else:
                answers = scorer.answers(
                    lambda b: {"logits": cast("Tensor", model.predict(b).outputs)}, part
                )
            on_main(partial(write_shard, folder, first, answers))


def _facts(assembly: Assembly, ready: ReadyTeacher) -> Fingerprint:
    task, prepared, spec = assembly.config.task, assembly.prepared, ready.spec
    facts: dict[str, Any] = {
        "task": task.type,
        "labels": list(prepared.splits.label_names),
        "max_length": task.row_length,
        "texts": assembly.prepared.texts_key,
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
    # An id in int32, with a logarithm in fp16 or a count in uint8.
    return spec.cache_top_k * 6 if spec.cache_draws is None else spec.cache_draws * 5


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
        broken, others = logprobs.isnan().any(-1), {"logprobs": logprobs.half()}
    else:
        if batch.rows is None:
            raise TypeError("draws depend on the numbers of the rows, and this batch has none")
        (size, width), rows = batch.valid.shape, batch.rows.clamp(min=0).numpy()
        keys = row_keys(0, 0, rows, size=size, domain=_DRAWS)[:, None]
        places = np.arange(1, width * spec.cache_draws + 1, dtype=np.uint64)
        numbers = torch.from_numpy(uniform(keys, places)).reshape(size, width, spec.cache_draws)
        ids, counts = model.draw(batch, numbers.to(batch.valid.device))
        broken, others = (ids < 0).all(-1), {"counts": counts}
    beyond = (0, 0, 0, length - ids.shape[1])
    padded = {name: functional.pad(values, beyond) for name, values in others.items()}
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


AT_ONCE = 64
"""Requests of a rank that run at the same time."""

CHECKED_ROWS = 8
"""Training rows that the servers answer before the run."""

REPEATED = 0.05
"""Largest mean difference of log-probabilities between answers of servers.

16-bit weights and other batches move log-probabilities of likely tokens by about 0.01; another
model, template or precision of 8 bits moves them by far more.
"""


class ServedTeacher(Teacher):
    """A teacher whose servers answer with their most likely tokens at every position (`TopK`).

    Each document is a request of its own. The documents of a rank go to all replicas in turn. All
    tokens are below `vocabulary`, which teacher and student share. Every call is a collective.
    """

    def __init__(
        self,
        servers: Sequence[VllmServer],
        models: Sequence[str],
        *,
        top_k: int,
        vocabulary: int,
        ranks: Ranks,
    ) -> None:
        self._servers, self._models, self._ranks = servers, models, ranks
        self._top_k, self._vocabulary = top_k, vocabulary

    def __call__(self, batch: Batch) -> Outputs:
        return next(self.answers([batch]))

    def answers(self, batches: Sequence[Batch]) -> Iterator[Outputs]:
        """Yield the outputs for every micro-batch of a step, which are asked for together."""
        documents = [(batch, *place) for batch in batches for place in _documents(batch)]
        calls = [
            partial(self._ask, (self._ranks.rank + number) % len(self._servers), ids)
            for number, (_, _, _, ids) in enumerate(documents)
        ]
        answers = raise_on_all(running_calls(calls, at_once=AT_ONCE))
        for batch in batches:
            size = (*batch.valid.shape, self._top_k)
            ids, logprobs = torch.full(size, -1, dtype=torch.int32), torch.zeros(size)  # [B, T, k]
            for (of, row, first, _), best in zip(documents, answers, strict=True):
                if of is batch:
                    here = slice(first, first + len(best.ids))
                    ids[row, here], logprobs[row, here] = map(torch.from_numpy, best)
            device = self._ranks.device
            yield Outputs(kept=TopK(ids.to(device), logprobs.to(device)))

    def _ask(self, replica: int, ids: tuple[int, ...]) -> BestTokens:
        server = self._servers[replica]
        best = server.top_k(ids, self._top_k, self._models[replica])
        largest = best.ids.max()
        if largest >= self._vocabulary:
            raise ServerError(
                f"{server.url} knows token {largest}, and teacher and student share "
                f"{self._vocabulary} tokens; the servers serve another model, or top_k is too large"
            )
        return best

    def destroy(self) -> None: ...


def _documents(batch: Batch) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Yield row, first place and tokens of each document that has a prediction.

    A document that is cut by the end of its row predicts the first token of the next row, which is
    the label of its last position. This token is added, because servers answer up to the token
    before the last.
    """
    ids, labels = batch.inputs["input_ids"].tolist(), batch.labels.tolist()
    positions = batch.inputs["position_ids"].tolist()
    for row, valid in enumerate(batch.valid.tolist()):
        places = [place for place, is_valid in enumerate(valid) if is_valid]
        # Positions restart at 0 with every document.
        starts = [p for p in places if positions[row][p] == 0 or p == places[0]]
        for first, stop in pairwise([*starts, *(place + 1 for place in places[-1:])]):
            after = [token for token in labels[row][stop - 1 : stop] if token != IGNORE]
            text = (*ids[row][first:stop], *after)
            if len(text) > 1:
                yield row, first, text


def check_teacher_servers(inputs: RunInputs) -> None:
    """Check the servers of all teachers before any model loads; a collective."""

    def check(server: TeacherServerConfig, requirements: Requirements) -> None:
        rows = inputs.encoded.train[:CHECKED_ROWS]["input_ids"]
        texts = [tuple(map(int, ids)) for ids in rows if len(ids) > 1]
        servers = replicas_of(server, patience_s=FIRST_PATIENCE_S)
        check_scores(servers, texts, requirements, server.top_k)

    for name, spec in inputs.config.teacher_specs.items():
        if spec.server is not None:
            on_main(partial(check, spec.server, _requirements(inputs, name)))


def served_teacher(inputs: RunInputs, name: str, ranks: Ranks) -> ServedTeacher:
    """Return a teacher that its servers answer for; a collective."""
    server, requirements = inputs.config.teacher_specs[name].server, _requirements(inputs, name)
    if server is None:
        raise TypeError(f"{name} is not served")
    servers = replicas_of(server)
    return ServedTeacher(
        servers,
        on_main(lambda: [one.model(requirements).name for one in servers]),
        top_k=server.top_k,
        vocabulary=requirements.vocabulary,
        ranks=ranks,
    )


def check_scores(
    servers: Sequence[VllmServer],
    texts: Sequence[tuple[int, ...]],
    requirements: Requirements,
    top_k: int,
) -> None:
    """Check each replica's model, and compare the replicas' answers to some texts."""
    first: list[BestTokens] = []
    for server in servers:
        name = server.model(requirements).name
        answers = [server.top_k(text, top_k, name) for text in texts]
        first = first or answers
        gap = sum(map(difference, first, answers)) / max(len(texts), 1)
        if gap > REPEATED:
            raise ServerError(
                f"teacher.server: {servers[0].url} and {server.url} differ by {gap:.3f} in the "
                f"mean log-probability of the best tokens of {len(texts)} texts, and at most "
                f"{REPEATED} is expected; check that all replicas serve the same weights"
            )


def difference(one: BestTokens, other: BestTokens) -> float:
    """Return the mean absolute difference of log-probabilities over the best tokens of `one`.

    A token that `other` lacks has at most the smallest log-probability of `other`.
    """
    is_same = one.ids[:, :, None] == other.ids[:, None, :]  # [T, k, k]
    shared = np.where(is_same, other.logprobs[:, None, :], -np.inf).max(2)  # [T, k]
    least = other.logprobs.min(1, keepdims=True)
    return float(np.abs(one.logprobs - np.maximum(shared, least)).mean())


def _requirements(inputs: RunInputs, name: str) -> Requirements:
    config = inputs.config
    return Requirements(
        name=config.teacher_specs[name].served_model or "",
        # The first token of the next row, and the token that vLLM generates after a text.
        longest=config.task.row_length + 2,
        vocabulary=min(inputs.sources[role].config.vocab_size for role in (name, STUDENT)),
    )
