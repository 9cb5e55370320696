"""A teacher of exported hidden states gives the outputs of its own engine, document by document."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from megakd.contract.batch import IGNORE, Batch
from megakd.engine import collectives
from megakd.models.knowledge import Needs, language_model_head, read_knowledge
from megakd.models.readout import Readout
from megakd.servers.hidden_states import ExportedStates
from megakd.servers.teachers import StatesTeacher

RANKS: Any = SimpleNamespace(rank=0, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def _one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives.dist, "get_world_size", lambda: 1)


def model_of(seed: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
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


def teacher(*servers: Any) -> StatesTeacher:
    head = language_model_head(MODEL)
    readout = Readout(MODEL.model.norm, MODEL.lm_head, head.warp)
    return StatesTeacher(servers, ["m"] * len(servers), readout=readout, ranks=RANKS)


def batch_of(lengths: list[list[int]], labelled: list[bool]) -> Batch:
    """Rows of documents with these lengths, padded on the right; some documents have labels."""
    width, number = max(1, *map(sum, lengths)), 0
    ids = torch.randint(0, 40, (len(lengths), width))
    valid, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORE)
    for row, counts in enumerate(lengths):
        start = 0
        for count in counts:
            valid[row, start : start + count] = 1
            positions[row, start : start + count] = torch.arange(count)
            if labelled[number % len(labelled)]:
                labels[row, start : start + count] = ids[row, start : start + count].roll(-1)
            start, number = start + count, number + 1
    return Batch({"input_ids": ids, "position_ids": positions}, labels, valid.bool())


@given(
    lengths=st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=3),
    labelled=st.lists(st.booleans(), min_size=1, max_size=3),
    has_targets=st.booleans(),
)
def test_the_outputs_are_those_of_the_own_engine_where_labels_are(
    lengths, labelled, *, has_targets
):
    batch = batch_of(lengths, labelled)
    chosen = (batch.labels != IGNORE).flatten().nonzero()[:, 0]
    if has_targets and len(chosen):
        batch = batch._replace(targets=chosen)
    first, second = Layers(), Layers()

    said = teacher(first, second)(batch)

    assert said.hidden is not None
    assert said.head is not None
    with torch.no_grad():
        own = read_knowledge(MODEL, batch, Needs()).hidden
    assert own is not None
    assert said.hidden.shape == own.shape
    if batch.targets is None:
        found, wanted = said.hidden.flatten(0, 1)[chosen], own.flatten(0, 1)[chosen]
    else:
        found, wanted = said.hidden, own
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    assert torch.equal(said.head.read()[0], MODEL.lm_head.weight)
    assert said.hidden.isfinite().all()
    assert not said.hidden.requires_grad
    asked = sum(map(len, first.asked)) + sum(map(len, second.asked))
    assert asked == len(chosen)
    assert abs(len(first.asked) - len(second.asked)) <= 1


def test_the_micro_batches_of_a_step_get_their_own_answers():
    batches = [batch_of([[3]], [True]), batch_of([[2, 2]], [True]), batch_of([[]], [True])]

    said = list(teacher(Layers()).answers(batches))

    for batch, found in zip(batches, said, strict=True):
        with torch.no_grad():
            own = read_knowledge(MODEL, batch, Needs()).hidden
        assert own is not None
        assert found.hidden is not None
        torch.testing.assert_close(found.hidden[batch.valid], own[batch.valid], rtol=0, atol=1e-10)
