"""Evaluation of a student on texts that it generates from held-out prompts, also by position.

Shapes: B texts, T positions, N positions that are predicted, K groups, D width, V vocabulary.
"""

from __future__ import annotations

import math
import operator
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import megakd_kernels
from megakd.config.rollout import GenerationConfig
from megakd.contract.batch import IGNORE, Batch, Head, Knowledge, LossInputs
from megakd.contract.completions import Completion, Generator, Rollout
from megakd.contract.stage import MeanLosses, Pass
from megakd.contract.tasks import BY_POSITION, MATCH, TEXT_METRIC, file_of_step
from megakd.data.step_layout import StepLayout, StepShape, collate_step
from megakd.engine.collectives import all_reduce_, gather, on_main
from megakd.engine.student import device_batch
from megakd.errors import ConfigError
from megakd.rollouts.prompts import Prompts, columns_of_rows, rollout_row
from megakd.scoring.scorer import Scorer
from megakd.storage.atomic import json_text, write_text

Match = Callable[[str, str], bool]
"""Function from a generated text and the text of the data to whether their answers are equal."""
Rows = tuple[Tensor, Head]
"""Hidden states [N, D] of the positions that a model predicts, and the head of the model."""
BUCKETS = 8
"""Most buckets of positions."""
LIMIT_S = 5
"""Seconds after which an expression is not the answer."""
TOKENS, ENTROPY, KL, TEACHER_ENTROPY = range(4)
"""Columns of `sums_by_group`."""
NAMES = {"kl": KL, "entropy": ENTROPY, "teacher_entropy": TEACHER_ENTROPY}
"""Logged statistics, means in nats per token, and their columns in the sums."""


class Text(NamedTuple):
    """One generated text of an evaluation; `matches` is None if texts are not compared."""

    rollout: Rollout
    prompt: str
    text: str
    wanted: str
    matches: bool | None

    def record(self) -> dict[str, object]:
        return {
            "prompt": self.prompt,
            "text": self.text,
            "wanted": self.wanted,
            "finished": self.rollout.completion.finished,
            "matches": self.matches,
        }


class TextEvaluation:
    """Continues held-out prompts, and scores the texts; every call is a collective.

    The first prompts that are continued are used; `folder` gets a file of texts per evaluation.
    """

    def __init__(
        self,
        config: GenerationConfig,
        prompts: Prompts,
        tokenizer: PreTrainedTokenizerBase,
        *,
        generator: Generator,
        scorer: Scorer,
        folder: Path,
    ) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._prompts, self._rows = prompts, prompts.continued[: config.rows].tolist()
        self._generator, self._scorer, self._folder = generator, scorer, folder
        self._match = matcher(config)
        self._curves = TextCurves(config.max_new_tokens)
        self.by_position: dict[str, float] = {}
        """Values of the last evaluation by position in the texts, for the log."""

    def scores(self, version: int, losses: MeanLosses | None) -> dict[str, float]:
        """Generate and score the texts, and write them; the same on every rank.

        Without `losses`, which returns the mean losses of micro-batches, nothing is measured by
        position. `version`: number of updates of the student.
        """
        texts = self.texts(version)
        lines = [json_text(text.record()) + "\n" for text in texts]
        on_main(lambda: write_text(file_of_step(self._folder, version), "".join(lines)))
        metrics = ({} if self._match is None else {MATCH: 0.0}) | text_metrics(texts)
        if losses is not None:
            measured = losses(self.batches(texts), self._curves.watching)
            curves = self._curves.take()
            self.by_position = by_position(curves)
            metrics |= {
                f"{TEXT_METRIC}{name}": v for name, v in {**curves.get("", {}), **measured}.items()
            }
        return metrics

    def texts(self, version: int) -> list[Text]:
        """Return the texts for the first rows, the same on every rank."""
        ranks = self._scorer.ranks
        mine = self._rows[ranks.rank :: ranks.world_size]
        prompts = [self._prompts.prompt(row) for row in mine]
        # The row is the seed: evaluations of one run differ only in the student.
        completions = self._generator.generate(prompts, mine, self._config.how)
        of_rank = [
            self._text(Rollout(row, prompt, completion, version, seed=row))
            for row, prompt, completion in zip(mine, prompts, completions, strict=True)
        ]
        parts, world = gather(of_rank), ranks.world_size
        return [parts[number % world][number // world] for number in range(len(self._rows))]

    def batches(self, texts: Sequence[Text]) -> Iterable[Batch]:
        """Yield this rank's micro-batches of the texts, equally many on each rank."""
        ranks = self._scorer.ranks
        columns = columns_of_rows([rollout_row(text.rollout) for text in texts])
        shape = StepShape.of_batch(
            len(texts), self._scorer.batch_size, rank=ranks.rank, world=ranks.world_size
        )
        for batch in collate_step(columns, StepLayout(shape), self._scorer.collate):
            yield device_batch(batch, ranks.device)

    def _text(self, rollout: Rollout) -> Text:
        def decoded(ids: Sequence[int], *, skip: bool) -> str:
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip))

        text = decoded(rollout.completion.ids, skip=True)
        row, start = self._prompts.row(rollout.row), len(rollout.prompt)
        # The row's own answer ends before the next turn of a user; a label is the next token.
        counted = (row.labels[start - 1 :] != IGNORE).tolist()
        end = start + counted.index(False) if False in counted else len(row.input_ids)
        answer = decoded(row.input_ids[start:end].tolist(), skip=True)
        # A row that is a prompt alone has nothing to compare with, and what was cut off a row as
        # long as the longest may be its answer.
        is_whole = len(row.input_ids) != self._prompts.row_length
        matches = self._match(text, answer) if self._match and answer and is_whole else None
        return Text(rollout, decoded(rollout.prompt, skip=False), text, answer, matches)


def matcher(config: GenerationConfig) -> Match | None:
    """Return the comparison of a config; None if texts are not compared."""
    if config.match is None:
        return None
    is_part = config.answer is not None
    equal = operator.eq if config.match == "exact" else _same_mathematics(is_part=is_part)

    def match(text: str, wanted: str) -> bool:
        given, there = answer_of(text, config.answer), answer_of(wanted, config.answer)
        return given is not None and there is not None and equal(given, there)

    return match


def answer_of(text: str, pattern: str | None) -> str | None:
    """Return the answer in a text: the group of the last match; None without a match."""
    if pattern is None:
        return text.strip()
    matches = re.findall(pattern, text)
    return matches[-1].strip() if matches else None


def _same_mathematics(*, is_part: bool) -> Match:
    """Return the comparison of math-verify; `is_part`: of expressions alone, not of texts."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ConfigError(
            "eval.generation.match: math needs the package math-verify, which is not installed; "
            "install megakd[eval], or set the key to exact"
        ) from error

    def is_equal(given: str, wanted: str) -> bool:
        if is_part and given == wanted:
            return True
        # The limit of math-verify, without which 9^{9^9} takes for ever, is a signal, which only a
        # main thread may set.
        seconds: Any = LIMIT_S if threading.current_thread() is threading.main_thread() else None
        texts = (f"${text}$" if is_part else text for text in (wanted, given))
        gold, answer = (parse(text, parsing_timeout=seconds) for text in texts)
        return bool(verify(gold, answer, timeout_seconds=seconds))

    return is_equal


def text_metrics(texts: Sequence[Text]) -> dict[str, float]:
    """Return the metrics of at least one generated text."""
    completions = [text.rollout.completion for text in texts]
    metrics = {
        "text_tokens": sum(len(completion.ids) for completion in completions) / len(texts),
        "text_truncated": sum(not completion.finished for completion in completions) / len(texts),
        "text_distinct_2": distinct_pairs(completions),
    }
    compared = [text.matches for text in texts if text.matches is not None]
    if compared:
        metrics[MATCH] = sum(compared) / len(compared)
    return metrics


def distinct_pairs(completions: Sequence[Completion]) -> float:
    """Return distinct-2 (Li et al. 2016, "A diversity-promoting objective function").

    It is the share of distinct pairs among all pairs of neighbouring tokens; 1 without pairs.
    """
    pairs = [pair for c in completions for pair in zip(c.ids, c.ids[1:], strict=False)]
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def bucket_ends(longest: int) -> tuple[int, ...]:
    """Return the end of every bucket of the positions of the longest text, not included.

    A bucket is twice as long as the one before: most changes are at the beginning of a text.
    """
    return tuple(sorted({-(-longest // 2**power) for power in range(BUCKETS)}))


def bucket_names(ends: Sequence[int]) -> list[str]:
    """Return `<first>-<last>` position of every bucket."""
    return [f"{first}-{end - 1}" for first, end in zip((0, *ends[:-1]), ends, strict=True)]


class TextCurves:
    """Sums over the positions of generated texts, collected while losses are measured."""

    def __init__(self, longest: int) -> None:
        self._ends = bucket_ends(longest)
        self._sums: Tensor | None = None

    def watching(self, plan: Sequence[Pass]) -> tuple[Pass, ...]:
        """Return the passes of a step such that the first pass adds to the sums.

        The first pass must use the whole first learner. Its losses do not change.
        """
        first, *others = plan

        def weigh(reading: LossInputs) -> Mapping[str, float]:
            is_token = reading.batch.labels != IGNORE
            ends = torch.tensor(self._ends, device=is_token.device)
            # [B, T] of the generated token that is predicted; a row is one text.
            positions = is_token.long().cumsum(1) - 1
            buckets = torch.bucketize(positions, ends, right=True).clamp(max=len(ends) - 1)
            sums = sums_by_group(reading, torch.where(is_token, buckets, -1), len(ends))
            self._sums = sums if self._sums is None else self._sums + sums
            if first.weigh is not None:
                return first.weigh(reading)
            return dict.fromkeys(first.weights or {}, 1.0)

        return replace(first, weigh=weigh), *others

    def take(self) -> dict[str, dict[str, float]]:
        """Return the means by bucket and name since the last call, the same on every rank.

        The bucket "" has the means over all positions. Buckets without a token, and statistics of
        a teacher that gives no distribution over the whole vocabulary, are left out. A collective.
        """
        empty = torch.zeros(len(self._ends), 4, dtype=torch.float64)
        mine, self._sums = empty if self._sums is None else self._sums.cpu(), None
        sums = all_reduce_(mine)
        named = {"": sums.sum(0), **dict(zip(bucket_names(self._ends), sums, strict=True))}
        return {bucket: _means(total) for bucket, total in named.items() if total[TOKENS] > 0}


def by_position(curves: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the values by bucket as keys of the log."""
    return {
        f"{BY_POSITION}/{bucket}/{name}": value
        for bucket, values in curves.items()
        for name, value in values.items()
        if bucket
    }


def _means(sums: Tensor) -> dict[str, float]:
    means = {name: float(sums[place] / sums[TOKENS]) for name, place in NAMES.items()}
    return {name: value for name, value in means.items() if not math.isnan(value)}


@torch.no_grad()
def sums_by_group(reading: LossInputs, groups: Tensor, count: int) -> Tensor:
    """Return sums over the targets of each group, without logits of the shape [N, V].

    Under ZeRO 3, call this inside the student's forward with both heads open.

    Args:
        groups: [B, T] int64 number of the group of each position, from 0 to `count` - 1; -1 for
            positions that do not count.

    Returns:
        [K, 4] fp64: number of targets, and sums in nats of the entropy of the student, of
        KL(teacher || student), and of the entropy of the teacher. The divergence and the entropy
        of the teacher are over the tokens that both models have, and NaN if the answers of the
        teacher are not hidden states of the same positions, as in a cache.
    """
    flat = groups.flatten()
    if reading.batch.targets is not None:
        flat = flat[reading.batch.targets]
    student = _rows(reading.student)
    if student is None:
        raise TypeError("a language model was read without its hidden states")
    teacher = None if reading.teacher is None else _rows(reading.teacher)
    if teacher is not None and len(teacher[0]) != len(student[0]):
        teacher = None
    sums = []
    for number in range(count):
        rows = (flat == number).nonzero().squeeze(1)
        _, entropy = _compared(student, student, rows, reading.kernels)
        kl = taught = torch.full_like(entropy, torch.nan)
        if teacher is not None:
            kl, taught = _compared(student, teacher, rows, reading.kernels)
        sums.append(torch.stack([torch.full_like(entropy, len(rows)), entropy, kl, taught]))
    return torch.stack(sums)


def _rows(answer: Knowledge) -> Rows | None:
    if answer.hidden is None or answer.head is None:
        return None
    return answer.hidden.detach().flatten(0, -2), answer.head


def _compared(student: Rows, teacher: Rows, rows: Tensor, kernels: str) -> tuple[Tensor, Tensor]:
    (hidden_s, head_s), (hidden_t, head_t) = student, teacher
    (weight_s, bias_s), (weight_t, bias_t) = head_s.read(), head_t.read()
    stats = megakd_kernels.linear_stats(
        hidden_s[rows], weight_s, hidden_t[rows], weight_t,
        student_bias=bias_s, teacher_bias=bias_t,
        softcap_s=head_s.warp.softcap, softcap_t=head_t.warp.softcap,
        logit_scale_s=head_s.warp.scale, logit_scale_t=head_t.warp.scale,
        impl=kernels,
    )  # fmt: skip
    return stats.kl_sum.double(), stats.teacher_entropy_sum.double()
