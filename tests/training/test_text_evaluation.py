"""Evaluation on generated texts: metrics, losses, curves by position, and compared answers."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from checkpoint_store import ALONE
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from source_scene import Texts, objective_of

from megakd.config.rollout import GenerationConfig, SamplingConfig
from megakd.config.task import TaskConfig
from megakd.contract.batch import IGNORE, Batch, LossInputs
from megakd.contract.completions import Completion, Sampling
from megakd.contract.metric import WHOLE
from megakd.contract.stage import Pass
from megakd.contract.terms import HardCrossEntropy
from megakd.data.collation import Collator
from megakd.errors import ConfigError
from megakd.rollouts import text_evaluation
from megakd.rollouts.prompts import Prompts
from megakd.rollouts.text_evaluation import (
    BUCKETS,
    TextCurves,
    TextEvaluation,
    answer_of,
    bucket_ends,
    bucket_names,
    distinct_pairs,
    matcher,
)
from megakd.training.stage_evaluation import HeldOutLosses

LETTERS = " abcdefgh"


class Letters:
    """A tokenizer of letters; 0 is a special token."""

    pad_token_id = 0

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(LETTERS[token] for token in ids if token or not skip_special_tokens)


class Echo:
    """A generator that repeats a prompt, and ends every second text."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[tuple[int, ...]], list[int], Sampling]] = []

    def generate(self, prompts: Any, seeds: Any, sampling: Sampling) -> list[Completion]:
        self.asked.append((list(prompts), list(seeds), sampling))
        return [Completion((*p, 0), finished=number % 2 == 0) for number, p in enumerate(prompts)]


@pytest.fixture
def rows() -> Dataset:
    """Three rows: a prompt of two letters, and a completion of two letters."""
    ids = [[1, 2, 1, 2], [3, 4, 3, 3], [5, 6, 5, 6]]
    labels = [[IGNORE, *row[2:], IGNORE] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels, "prompt_length": [2, 2, 2]})


def evaluation(data: Dataset, folder: Path, **keys: Any) -> tuple[Any, Echo]:
    collate = Collator(Letters(), TaskConfig(type="causal_lm", dataset="x", max_length=16))  # type: ignore[arg-type]
    scorer: Any = SimpleNamespace(ranks=ALONE, collate=collate, batch_size=2)
    generator, tokenizer = Echo(), cast("Any", Letters())
    prompts = Prompts(data, prompt_tokens=None, most=12, row_length=keys.pop("row_length", None))
    config = GenerationConfig(**{"max_new_tokens": 4, **keys})
    places: Any = {"generator": generator, "scorer": scorer, "folder": folder}
    return TextEvaluation(config, prompts, tokenizer, **places), generator


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_evaluation, "gather", lambda value: [value])
    monkeypatch.setattr(text_evaluation, "on_main", lambda action: action())
    monkeypatch.setattr(text_evaluation, "all_reduce_", lambda tensor: tensor)


def test_texts_are_scored_against_the_completions_and_written(rows, tmp_path):
    made, _ = evaluation(rows, tmp_path, match="exact")

    scores = made.scores(version=7, losses=None)

    assert scores["match"] == pytest.approx(2 / 3)  # the second row's completion is not its prompt
    assert scores["text_tokens"] == 3
    assert scores["text_truncated"] == pytest.approx(1 / 3)
    lines = (tmp_path / "step-00000007.jsonl").read_text().splitlines()
    first, second, _ = map(json.loads, lines)
    texts = dict.fromkeys(("prompt", "text", "wanted"), "ab")
    assert first == {**texts, "finished": True, "matches": True}
    assert (second["text"], second["wanted"], second["matches"]) == ("cd", "cc", False)


@pytest.mark.parametrize(
    ("ids", "labels", "keys", "wanted", "matches", "match"),
    [
        # An answer ends before the next turn, and a prompt alone is not compared.
        (
            [[1, 2, 1, 2, 7, 8], [3, 4, 3, 3, 0, 0], [5, 6]],
            [[-100, 1, 2, -100, 8, -100], [-100, 3, 3, -100, -100, -100], [-100, -100]],
            {},
            ["ab", "cc", ""],
            [True, False, None],
            0.5,
        ),
        # A row that may be cut before its answer is not compared.
        (
            [[1, 2, 1, 2], [3, 4, 3, 3, 5]],
            [[-100, 1, 2, -100], [-100, 3, 3, 5, -100]],
            {"row_length": 5},
            ["ab", "cce"],
            [True, None],
            1,
        ),
    ],
)
def test_only_whole_first_answers_are_compared(tmp_path, ids, labels, keys, wanted, matches, match):
    columns = {"input_ids": ids, "labels": labels, "prompt_length": [2] * len(ids)}
    made, _ = evaluation(Dataset.from_dict(columns), tmp_path, match="exact", **keys)

    scores = made.scores(version=1, losses=None)

    lines = [*map(json.loads, (tmp_path / "step-00000001.jsonl").read_text().splitlines())]
    assert [line["wanted"] for line in lines] == wanted
    assert [line["matches"] for line in lines] == matches
    assert scores["match"] == match


def test_every_evaluation_asks_for_the_same_prompts_with_the_same_seeds(rows, tmp_path):
    keys = {"sampling": SamplingConfig(temperature=0.5), "rows": 2}
    made, generator = evaluation(rows, tmp_path, **keys)

    made.texts(0)
    made.texts(9)

    first, second = generator.asked
    assert first == second
    assert first[0] == [(1, 2), (3, 4)]
    assert first[2] == Sampling(4, temperature=0.5)


def test_losses_see_every_generated_token_once_and_no_token_of_the_data(rows, tmp_path):
    made, _ = evaluation(rows, tmp_path)
    seen: list[int] = []

    def losses(batches: Any, watch: Any) -> dict[str, float]:
        for batch in batches:
            assert batch.extras.is_rollout[batch.valid].all()
            seen.extend(batch.labels[batch.labels != IGNORE].tolist())
        return {"soft_target_kl": 0.5}

    scores = made.scores(version=0, losses=losses)

    assert scores["text_soft_target_kl"] == 0.5
    assert sorted(seen) == sorted([1, 2, 0, 3, 4, 0, 5, 6, 0])


@pytest.mark.parametrize(
    ("texts", "share"),
    [([], 1.0), ([(1,)], 1.0), ([(1, 2, 3)], 1.0), ([(1, 1, 1)], 0.5), ([(1, 2), (1, 2)], 0.5)],
)
def test_repeated_pairs_lower_the_share_of_distinct_pairs(texts, share):
    assert distinct_pairs([Completion(ids, finished=True) for ids in texts]) == share


TERMS = tuple(HardCrossEntropy(loss="hard_cross_entropy", on=on) for on in (None, "rollouts"))


def losses(batches: list[Any], value: float) -> Any:
    """Losses of a model that has the same value at every target."""
    objective = objective_of(TERMS)
    bundle = SimpleNamespace(objective=objective, counters=objective.counters)

    def measure(batch: Any, knowledge: object, plan: object, scored: tuple) -> Any:
        counted = {unit: count(batch) for unit, count in objective.counters.items()}
        parts = {n: value * counted[u] for n, u in objective.units.items()}
        return SimpleNamespace(parts=parts, predictions=dict.fromkeys(scored))

    student = SimpleNamespace(measure=measure)
    trainer = SimpleNamespace(student=student, ask_teachers=lambda plan, batch: {})
    result = HeldOutLosses(trainer, bundle, (Pass(),))  # type: ignore[arg-type]
    for batch in batches:
        result.add(batch)
    return result.means()[WHOLE]


def test_a_term_on_rollouts_has_no_value_on_texts_of_the_data():
    batch = Texts().batch()

    both = losses([batch, batch.extended(is_rollout=None)], 0.5)
    data = losses([batch.extended(is_rollout=None)], 0.5)

    assert both == pytest.approx({"hard_cross_entropy": 0.5, "hard_cross_entropy_on_rollouts": 0.5})
    assert data == pytest.approx({"hard_cross_entropy": 0.5})


FIRST, SECOND = [IGNORE, 5, 5, 5, IGNORE], [5, 5, 5, 5, 5]


@pytest.fixture
def positions_as_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums of a group are those of the positions in the row; a teacher is not there."""

    def sums(reading: LossInputs, groups: torch.Tensor, count: int) -> torch.Tensor:
        columns = torch.arange(groups.shape[1]).expand_as(groups).double()
        result = torch.full((count, 4), torch.nan, dtype=torch.float64)
        for number in range(count):
            mine = groups == number
            result[number, :2] = torch.stack([mine.sum().double(), (columns * mine).sum()])
        return result

    monkeypatch.setattr(text_evaluation, "sums_by_group", sums)


def watched(curves: TextCurves, *rows: list[int], plan: tuple[Pass, ...] = (Pass(),)) -> Any:
    labels = torch.tensor(rows)
    batch = Batch({}, labels, labels != IGNORE)
    reading: Any = LossInputs(student=None, teacher=None, batch=batch, weights={}, per_unit={})  # type: ignore[arg-type]
    return curves.watching(plan)[0].weigh(reading)  # type: ignore[misc]


@given(st.integers(1, 100_000))
def test_every_position_is_in_one_bucket_and_buckets_grow(longest: int) -> None:
    ends = bucket_ends(longest)

    sizes = [end - start for start, end in zip((0, *ends[:-1]), ends, strict=True)]
    assert ends[-1] == longest
    assert len(ends) <= BUCKETS
    assert min(sizes) >= 1
    assert all(later >= size - 1 for size, later in pairwise(sizes[1:]))
    assert bucket_names(bucket_ends(10)) == ["0-0", "1-1", "2-2", "3-4", "5-9"]


def test_means_are_over_all_tokens_of_all_micro_batches(positions_as_entropy) -> None:
    curves = TextCurves(5)
    watched(curves, FIRST, [IGNORE] * 5)
    watched(curves, SECOND)

    assert curves.take()[""] == {"entropy": (1 + 2 + 3 + 0 + 1 + 2 + 3 + 4) / 8}
    assert curves.take() == {}  # the next evaluation starts from zero


def test_a_pass_keeps_its_own_weights(positions_as_entropy) -> None:
    """A function that weighs replaces the weights of its pass, so that zeros must come back."""
    curves = TextCurves(5)

    assert watched(curves, FIRST) == {}
    assert watched(curves, FIRST, plan=(Pass(weights={"kl": 0.0}),)) == {"kl": 1.0}
    weighed = Pass(weigh=lambda _: {"kl": 0.25})
    assert watched(curves, FIRST, plan=(weighed, Pass(teacher="other"))) == {"kl": 0.25}
    assert curves.watching((weighed, Pass(teacher="other")))[1] == Pass(teacher="other")


GSM8K, BOXED = r"#### (.+)", r"\\boxed\{(.+)\}"


def _matcher(match: str, answer: str | None = None):
    return matcher(GenerationConfig(max_new_tokens=4, match=match, answer=answer))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "pattern", "answer"),
    [
        (" 12 \n", None, "12"),
        ("2 + 2 = 4\n#### 4", GSM8K, "4"),
        ("#### 3\nno, #### 4 \n", GSM8K, "4"),
        ("the answer is 4", GSM8K, None),
    ],
)
def test_the_last_match_of_a_text_is_its_answer(text, pattern, answer):
    assert answer_of(text, pattern) == answer


@pytest.mark.parametrize(
    ("text", "same"), [("so\n#### 72", True), ("so\n#### 73", False), ("72", False)]
)
def test_texts_are_compared_by_their_answers_and_match_nothing_without_one(text, same):
    match = _matcher("exact", GSM8K)

    assert match(text, "Natalia sold 48.\n#### 72") == same
    assert not match("72", "72")
    assert matcher(GenerationConfig(max_new_tokens=4)) is None


@pytest.mark.parametrize(
    ("answer", "one", "other", "same"),
    [
        (None, r"The answer is $\frac{1}{2}$", "$0.5$", True),
        (None, "1,000", "$1000$", True),
        (None, "$0.4$", "$0.5$", False),
        # The part of a text that a pattern chooses is an expression.
        (BOXED, r"so \boxed{2\pi}", r"\boxed{2}", False),
        (BOXED, r"so \boxed{3\sqrt{5}}", r"\boxed{3\sqrt{7}}", False),
        (BOXED, r"so \boxed{2x}", r"\boxed{2y}", False),
        (BOXED, r"so \boxed{\sqrt{2}}", r"\boxed{\sqrt{2}}", True),
        (BOXED, r"so \boxed{\frac{1}{2}}", r"\boxed{0.5}", True),
        (BOXED, r"so \boxed{(1,2)}", r"\boxed{(1,2)}", True),
        (BOXED, r"so \boxed{x^2+1}", r"\boxed{x^2+1}", True),
    ],
)
def test_mathematics_is_compared_by_value(answer, one, other, same):
    pytest.importorskip("math_verify")

    assert _matcher("math", answer)(one, other) == same


def test_a_number_that_takes_for_ever_is_not_the_answer(monkeypatch):
    pytest.importorskip("math_verify")
    monkeypatch.setattr(text_evaluation, "LIMIT_S", 1)

    assert not _matcher("math")("so $9^{9^{9}}$", "$7$")


def test_mathematics_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)

    with pytest.raises(ConfigError, match=r"install megakd\[eval\], or set the key to exact"):
        _matcher("math")
