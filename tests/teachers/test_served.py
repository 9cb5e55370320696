"""Served teachers: every document is asked for by itself, and answers land at its positions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from megakd.contract.batch import IGNORE, Batch, TopK
from megakd.engine import collectives
from megakd.errors import ServerError
from megakd.models.knowledge import Needs, language_model_head, read_knowledge
from megakd.models.next_tokens import Readout
from megakd.servers.hidden_states import ExportedStates
from megakd.servers.protocol import BestTokens
from megakd.servers.teachers import StatesTeacher, TopKTeacher

RANKS: Any = SimpleNamespace(rank=0, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives.dist, "get_world_size", lambda: 1)


class Sums:
    """A server whose best token is the sum of the tokens so far."""

    url = "http://sums"

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def top_k(self, ids: tuple[int, ...], count: int, model: str) -> BestTokens:
        assert model == "m"
        self.asked.append(ids)
        sums = [sum(ids[: place + 1]) for place in range(len(ids) - 1)]
        ids = np.array([(total, *range(1, count)) for total in sums], dtype=np.int32)
        return BestTokens(ids, np.full(ids.shape, -0.5, dtype=np.float32))


def teacher(*servers: Any, vocabulary: int = 10**6) -> TopKTeacher:
    names = ["m"] * len(servers)
    return TopKTeacher(servers, names, top_k=2, vocabulary=vocabulary, ranks=RANKS)


def labelled_batch(
    lengths: list[list[int]], labelled: list[bool], rows: list[list[int]] | None = None
) -> Batch:
    """Rows of documents with these lengths, padded on the right; some documents have labels."""
    width, number = max([1, *map(sum, lengths)]), 0
    ids = torch.randint(0, 40, (len(lengths), width))
    valid, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORE)
    for row, counts in enumerate(lengths):
        start = 0
        if rows is not None:
            ids[row, : len(rows[row])] = torch.tensor(rows[row], dtype=torch.int64)
        for count in counts:
            valid[row, start : start + count] = 1
            positions[row, start : start + count] = torch.arange(count)
            if labelled[number % len(labelled)]:
                labels[row, start : start + count] = ids[row, start : start + count].roll(-1)
            start, number = start + count, number + 1
    return Batch({"input_ids": ids, "position_ids": positions}, labels, valid.bool())


def batch_of(rows: list[list[int]], lengths: list[list[int]]) -> Batch:
    return labelled_batch(lengths, [False], rows)


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=4))
def test_answers_are_those_of_each_document_alone(lengths):
    rows = [[7 * number + place for place in range(sum(c))] for number, c in enumerate(lengths)]
    first, second = Sums(), Sums()

    kept = teacher(first, second)(batch_of(rows, lengths)).kept

    assert isinstance(kept, TopK)
    wanted = torch.full(kept.ids.shape[:2], -1)
    for number, counts in enumerate(lengths):
        start = 0
        for count in counts:
            for place in range(start, start + count - 1):
                wanted[number, place] = sum(rows[number][start : place + 1])
            start += count
    assert torch.equal(kept.ids[..., 0].long(), wanted)
    assert torch.equal(kept.logprobs == 0, kept.ids < 0)
    asked = len(first.asked) + len(second.asked)
    assert asked == sum(count > 1 for counts in lengths for count in counts)
    assert abs(len(first.asked) - len(second.asked)) <= 1


def test_a_document_that_goes_on_in_the_next_row_predicts_its_first_token():
    batch, server = batch_of([[1, 2, 3], [9]], [[2, 1], [1]]), Sums()
    batch.labels[0, 2] = 6
    batch.labels[1, 0] = 4

    kept = teacher(server)(batch).kept

    assert sorted(server.asked) == [(1, 2), (3, 6), (9, 4)]
    assert isinstance(kept, TopK)
    assert kept.ids[..., 0].tolist() == [[1, -1, 3], [9, -1, -1]]


def test_the_micro_batches_of_a_step_get_their_own_answers():
    batches = [batch_of([[1, 2, 3]], [[3]]), batch_of([[5, 6]], [[2]]), batch_of([[]], [[]])]

    kept = [answer.kept for answer in teacher(Sums()).answers(batches)]

    tops = [None if one is None else one.ids[0, :, 0].tolist() for one in kept]
    assert tops == [[1, 3, -1], [5, -1], [-1]]


def test_a_token_that_the_teacher_does_not_have_is_refused():
    message = r"http://sums knows token 9, and teacher and student share 8"
    with pytest.raises(ServerError, match=message):
        teacher(Sums(), vocabulary=8)(batch_of([[4, 5, 1]], [[3]]))


def model_of(seed: int) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=64)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    return model


MODEL, LAYERS = model_of(0).double(), model_of(0).double()
LAYERS.model.norm = torch.nn.Identity()


class Layers:
    """A server that runs the layers of the model on one document at a time."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def states(self, ids: tuple[int, ...], model: str) -> ExportedStates:
        assert model == "m"
        self.asked.append(ids)
        with torch.no_grad():
            states = LAYERS.model(torch.tensor([ids])).last_hidden_state[0]
        return ExportedStates(states, 0)


def states_teacher(*servers: Any) -> StatesTeacher:
    head = language_model_head(MODEL)
    readout = Readout(MODEL.model.norm, MODEL.lm_head, head.warp)
    return StatesTeacher(servers, ["m"] * len(servers), readout=readout, ranks=RANKS)


@settings(max_examples=20)
@given(
    lengths=st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=3),
    labelled=st.lists(st.booleans(), min_size=1, max_size=3),
    has_targets=st.booleans(),
)
def test_exported_states_give_the_outputs_of_the_own_engine_where_labels_are(
    lengths, labelled, *, has_targets
):
    batch = labelled_batch(lengths, labelled)
    chosen = (batch.labels != IGNORE).flatten().nonzero()[:, 0]
    if has_targets and len(chosen):
        batch = batch._replace(targets=chosen)
    first, second = Layers(), Layers()

    answer = states_teacher(first, second)(batch)

    with torch.no_grad():
        engine = read_knowledge(MODEL, batch, Needs()).hidden
    assert answer.hidden.shape == engine.shape
    if batch.targets is None:
        outputs, wanted = answer.hidden.flatten(0, 1)[chosen], engine.flatten(0, 1)[chosen]
    else:
        outputs, wanted = answer.hidden, engine
    torch.testing.assert_close(outputs, wanted, rtol=0, atol=1e-10)
    assert torch.equal(answer.head.read()[0], MODEL.lm_head.weight)
    assert answer.hidden.isfinite().all()
    assert not answer.hidden.requires_grad
    asked = sum(map(len, first.asked)) + sum(map(len, second.asked))
    assert asked == len(chosen)
    assert abs(len(first.asked) - len(second.asked)) <= 1
