"""Batches of a stream: every row once per epoch, exact positions, the shares of the ranks."""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import write_jsonl

from megakd.config.task import TaskConfig
from megakd.data.batch import IGNORE, Batch
from megakd.data.collation import Collator, task_masking
from megakd.data.encoding import encode_rows
from megakd.data.loader import StepShape
from megakd.data.rows import StreamedRows
from megakd.data.streams import StreamedShare, StreamLoader, streamed_files
from megakd.data.tokenizers import train_tokenizer
from megakd.errors import ConfigError, DataError
from megakd.training.batches import row_batches
from megakd.training.checkpoint import check_plain

WORDS = [f"w{number}" for number in range(60)]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    """One token per word, for each task."""
    train = partial(train_tokenizer, lambda: [" ".join(WORDS)] * 2, vocab_size=600)
    mlm, causal_lm = train(kind="wordpiece", for_encoder=True), train(kind="bpe", for_encoder=False)
    return {"mlm": mlm, "causal_lm": causal_lm}


def texts_of(count: int) -> list[str]:
    """Different texts of 1 to 20 words."""
    return [
        " ".join(WORDS[(7 * n + k) % 60] for k in range(1 + (5 * n) % 20)) + f" {WORDS[n % 60]}"
        for n in range(count)
    ]


def write_files(folder: Path, texts: Sequence[str], files: int) -> list[Path]:
    return [
        write_jsonl(folder / f"{number}.jsonl", ({"text": text} for text in texts[number::files]))
        for number in range(files)
    ]


class Scene:
    """A stream of files, and loaders of its ranks."""

    def __init__(self, paths: list[Path], tokenizer: Any, kind: Any = "mlm") -> None:
        folder = paths[0].parent / "held"
        files = {"train_files": tuple(map(str, paths))}
        files["validation_files"] = str(write_jsonl(folder / "held.jsonl", [{"text": "held"}]))
        self.task = TaskConfig(type=kind, max_length=12, streaming=True, **files)
        corpus = streamed_files(self.task, cache_dir=folder)
        self.rows = StreamedRows(corpus.stream, tokenizer, self.task)

    def loader(self, shape: StepShape, *, size: int = 5, states: Any = None) -> StreamLoader:
        return StreamLoader(
            StreamedShare(self.rows, shape, 3, size),
            Collator(self.rows.tokenizer, self.task),
            steps_per_epoch=9,
            gather=states or (lambda value: [value] * shape.world),
            masking=task_masking(self.rows.tokenizer, self.task),
        )

    def tokens(self, shape: StepShape, size: int | None) -> list[list[int]]:
        """The tokens of the rows of the first epoch, which are read in blocks of `size` texts."""
        return [row["input_ids"] for row in StreamedShare(self.rows, shape, 0, size).read(0)]


@pytest.fixture
def scene(tmp_path, tokenizers) -> Scene:
    return Scene(write_files(tmp_path, texts_of(40), 3), tokenizers["mlm"])


def truth(batches: Sequence[Batch]) -> list[tuple[int, ...]]:
    """The tokens of every row before they were masked."""
    collected = []
    for batch in batches:
        ids = batch.inputs["input_ids"].where(batch.labels == IGNORE, batch.labels)
        collected += [tuple(row[real].tolist()) for row, real in zip(ids, batch.valid, strict=True)]
    return collected


def plain(batch: Batch) -> dict[str, Any]:
    return {n: v.tolist() for n, v in {**batch.inputs, "labels": batch.labels}.items()}


def seen(steps: Any) -> list[Any]:
    """Everything of every batch, as plain values."""
    return [[*map(plain, batches)] for batches in steps]


def expected(scene: Scene, tmp_path: Path, texts: Sequence[str]) -> Counter[tuple[int, ...]]:
    """The rows that the same texts have without streaming."""
    rows = Dataset.from_dict({"text": list(texts)})
    kind, tokenizer = scene.rows.texts.kind, scene.rows.tokenizer
    made, _ = encode_rows(rows, kind, tokenizer, scene.task, name="train", cache_dir=tmp_path)
    return Counter(map(tuple, made["input_ids"]))


def test_an_epoch_has_every_window_once_as_without_streaming(scene, tmp_path):
    rows = expected(scene, tmp_path / "cache", texts_of(40))
    count = sum(rows.values())
    steps = scene.loader(StepShape(1, 1)).iterate(0, 2 * count)

    actual = [truth(batches)[0] for batches in steps]

    assert Counter(actual[:count]) == rows
    assert Counter(actual[count:]) == rows
    assert actual[:count] != actual[count:]  # blocks are shuffled anew


@given(files=st.integers(1, 4), world=st.integers(1, 3), size=st.sampled_from([1, 4, None]))
@settings(max_examples=8)
def test_the_ranks_share_every_row_of_an_epoch(tmp_path_factory, tokenizers, files, world, size):
    folder = tmp_path_factory.mktemp("stream")
    scene = Scene(write_files(folder, texts_of(30), files), tokenizers["mlm"])
    rows = expected(scene, folder / "cache", texts_of(30))
    actual: Counter[tuple[int, ...]] = Counter()
    for rank in range(world):
        actual.update(map(tuple, scene.tokens(StepShape(1, 1, rank, world), size)))

    assert actual == rows


@given(stop=st.integers(0, 25), rank=st.integers(0, 1), size=st.sampled_from([1, 3, 100]))
@settings(max_examples=8)
def test_a_resumed_run_gets_the_batches_that_it_would_have_got(
    tmp_path_factory, tokenizers, stop, rank, size
):
    folder = tmp_path_factory.mktemp("stream")
    scene = Scene(write_files(folder, texts_of(20), 3), tokenizers["mlm"])
    shape = StepShape(2, 1, rank, 2)
    plain = list(scene.loader(shape, size=size).iterate(0, 30))
    for (batch,) in plain:  # full, also between epochs
        assert batch.valid.any(dim=1).tolist() == [True, True]
        assert batch.rows is None
    through = seen(plain)
    interrupted = scene.loader(shape, size=size)
    list(interrupted.iterate(0, stop))

    state = interrupted.state_dict()
    check_plain(state)
    resumed = scene.loader(shape, size=size)
    resumed.load_state_dict(json.loads(json.dumps(state)))

    assert seen(resumed.iterate(stop, 30)) == through[stop:]


def test_the_state_holds_the_place_of_every_rank_and_each_rank_takes_its_own(scene):
    shapes = [StepShape(2, 1, rank, 2) for rank in range(2)]
    through = [seen(scene.loader(shape).iterate(0, 12)) for shape in shapes]
    places = []
    for shape in shapes:
        loader = scene.loader(shape)
        list(loader.iterate(0, 7))
        places += loader.state_dict()["places"][:1]
    state = {"places": places}

    for rank, shape in enumerate(shapes):
        resumed = scene.loader(shape, states=lambda _: places)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert seen(resumed.iterate(7, 12)) == through[rank][7:]


def test_a_consumer_that_stops_early_leaves_no_thread_and_the_position_of_its_step(scene):
    before, loader = threading.active_count(), scene.loader(StepShape(2, 1))
    steps = loader.iterate(0, 100)
    first = [next(steps), next(steps)]
    steps.close()

    assert threading.active_count() == before
    # The state is that of the last step that was used, not of those prepared.
    other = scene.loader(StepShape(2, 1))
    list(other.iterate(0, len(first)))
    assert loader.state_dict() == other.state_dict()


def masked(scene: Scene, shapes: Sequence[StepShape], steps: int) -> dict[Any, set[Any]]:
    """Labels by tokens of all rows of some steps."""
    actual: dict[Any, set[Any]] = {}
    iterated = (batches for s in shapes for batches in scene.loader(s).iterate(0, steps))
    for batch in chain.from_iterable(iterated):
        for row, labels, real in zip(truth([batch]), batch.labels, batch.valid, strict=True):
            actual.setdefault(row, set()).add(tuple(labels[real].tolist()))
    return actual


def test_the_masks_of_an_epoch_depend_neither_on_ranks_nor_on_micro_batches(scene):
    alone = masked(scene, [StepShape(4, 1)], 5)
    shared = masked(scene, [StepShape(1, 2, rank, 2) for rank in range(2)], 5)

    both = alone.keys() & shared.keys()
    assert len(both) > 5
    assert all(alone[row] == shared[row] for row in both)


def test_causal_texts_are_packed_and_every_token_occurs_once_per_epoch(tmp_path, tokenizers):
    texts = texts_of(30)
    scene = Scene(write_files(tmp_path, texts, 2), tokenizers["causal_lm"], "causal_lm")
    eos = scene.rows.tokenizer.eos_token_id
    tokens = Counter(n for ids in scene.rows.tokenizer(texts)["input_ids"] for n in (*ids, eos))

    rows = scene.tokens(StepShape(1, 1), 7)

    assert Counter(token for ids in rows for token in ids) == tokens
    # Only the last row of a block of 7 of the 30 texts is short.
    assert 1 <= sum(len(ids) < 12 for ids in rows) <= 5


def test_lone_texts_are_streamed_in_micro_batches_of_like_lengths(tmp_path, tokenizers):
    scene = Scene(write_files(tmp_path, texts_of(30), 2), tokenizers["causal_lm"], "causal_lm")
    scene.rows = scene.rows._replace(packed=False)
    eos = scene.rows.tokenizer.eos_token_id

    steps = list(scene.loader(StepShape(2, 4)).iterate(0, 3))

    for batches in steps:
        lengths = [length for batch in batches for length in batch.valid.sum(1).tolist()]
        assert lengths == sorted(lengths)
        assert len(set(lengths)) > 1
        assert all(eos not in ids[:-1] for ids in rows_of(batches))
    *_, again = scene.loader(StepShape(4, 2)).iterate(0, 3)
    assert sorted(rows_of(again)) == sorted(rows_of(steps[2]))


def rows_of(batches: Sequence[Batch]) -> list[list[int]]:
    """The tokens of every row of causal_lm."""
    return [
        ids[valid].tolist()
        for batch in batches
        for ids, valid in zip(batch.inputs["input_ids"], batch.valid, strict=True)
    ]


def test_every_epoch_masks_the_rows_anew_and_is_told_in_the_log(tokenizers, tmp_path, caplog):
    small = Scene(write_files(tmp_path / "small", texts_of(4), 1), tokenizers["mlm"])
    rows = sum(expected(small, tmp_path / "cache", texts_of(4)).values())
    labels: dict[Any, set[Any]] = {}

    with caplog.at_level(logging.INFO, logger="megakd.data.streams"):
        for step, batches in enumerate(small.loader(StepShape(1, 1)).iterate(0, 6 * rows)):
            assert len(caplog.messages) == step // rows
            chosen = tuple(batches[0].labels[batches[0].valid].tolist())
            labels.setdefault(truth(batches)[0], set()).add(chosen)

    assert max(map(len, labels.values())) > 2
    assert caplog.messages[1].endswith("0.jsonl: rank 0 has read its texts 2 time(s)")


def test_a_rank_without_texts_is_told_how_many_ranks_there_are(tmp_path, tokenizers):
    scene = Scene(write_files(tmp_path, ["w1 w2"], 1), tokenizers["mlm"])

    with pytest.raises(DataError, match=r"has no text for rank 1 of 2: .*use more texts or fewer"):
        next(scene.loader(StepShape(1, 1, 1, 2)).iterate(0, 1))


@pytest.mark.parametrize(
    ("max_steps", "tokens", "message"),
    [(None, None, "mine: max_steps is missing"), (3, 64, "mine: tokens_per_rank is set")],
)
def test_a_stage_of_a_method_that_cannot_read_a_stream_is_refused(max_steps, tokens, message):
    parts = MagicMock()
    parts.stage.name, parts.stage.train.max_steps = "mine", max_steps
    parts.layout.tokens_per_rank = tokens

    with pytest.raises(ConfigError, match=message):
        row_batches(parts, MagicMock())
