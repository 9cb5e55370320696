"""A second vocabulary of a model: inputs, targets, gradients and files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load
from tiny_cuts import MASKED, VOCABULARY, build
from torch.nn import functional

from megakd.data.batch import IGNORE, Batch, LossInputs, Targets
from megakd.engine.sharding import gathered_state
from megakd.losses.targets import LanguageModelTargets
from megakd.models.outputs import Needs, read_outputs
from megakd.models.second_vocabulary import (
    SecondSize,
    add_second_vocabulary,
    second_vocabulary,
    without_second_vocabulary,
)

OWN, PIECES = VOCABULARY, 20


def plain_model(family: str):
    return build(family, "mlm", pad_token_id=0)


def model_of(family: str):
    model = plain_model(family)
    size = SecondSize(PIECES, OWN)
    add_second_vocabulary(model, size, ds=None, dtype=torch.float32, seed=1)
    return model


def batch_of(ids: list[int], first: dict[int, int], second: dict[int, int]) -> Batch:
    """One row with labels by position, in the numbers of each vocabulary."""
    tokens = torch.tensor([ids])
    labels = torch.full_like(tokens, IGNORE)
    for place, label in first.items():
        labels[0, place] = label
    return Batch(
        {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)},
        labels,
        torch.ones_like(tokens, dtype=torch.bool),
        torch.tensor([*first] or [0]),
        second=Targets(
            torch.tensor([*second] or [0]), torch.tensor([*second.values()] or [IGNORE])
        ),
    )


def loss_of(model, batch: Batch) -> torch.Tensor:
    read = read_outputs(model, batch, Needs())
    reading = LossInputs(
        student=read,
        teacher=None,
        batch=batch,
        weights={"hard_cross_entropy": 1.0},
        per_unit={"targets": torch.ones(())},
        kernels="reference",
    )
    return LanguageModelTargets((), hard=True)(reading).total


@pytest.mark.parametrize("family", MASKED)
def test_every_target_has_the_softmax_of_its_own_vocabulary(family):
    model = model_of(family)
    batch = batch_of([1, 5, OWN + 3, 7, OWN + 9], {1: 6, 3: 7}, {2: 4, 4: 9})

    total = loss_of(model, batch)

    second = second_vocabulary(model)
    assert second is not None
    tables = model.get_input_embeddings().weight, second.table.weight
    vectors = functional.embedding(batch.inputs["input_ids"], torch.cat(tables))
    hidden = []
    model.get_output_embeddings().register_forward_pre_hook(
        lambda _, given: hidden.append(given[0])
    )
    out = model(inputs_embeds=vectors, attention_mask=batch.inputs["attention_mask"])
    others = functional.linear(hidden[-1], second.table.weight, second.bias)[0]
    expected = functional.cross_entropy(
        out.logits[0, [1, 3]], torch.tensor([6, 7]), reduction="sum"
    ) + functional.cross_entropy(others[[2, 4]], torch.tensor([4, 9]), reduction="sum")
    torch.testing.assert_close(total, expected)
    # The gradients too: where a table is tied to an output matrix, no other target reaches it.
    learned = [*model.parameters()]
    ours, theirs = (
        torch.autograd.grad(loss, learned, allow_unused=True, materialize_grads=True)
        for loss in (total, expected)
    )
    torch.testing.assert_close(ours, theirs)


def test_the_files_of_a_model_keep_both_vocabularies_apart():
    model = model_of("bert")

    state, content = without_second_vocabulary(gathered_state(model))

    assert [name for name, _ in state] == [n for n, _ in gathered_state(plain_model("bert"))]
    stored, again = load(content()), second_vocabulary(model_of("bert")).state_dict()  # type: ignore[union-attr]
    assert stored["table.weight"].shape == (PIECES, 24)
    assert stored.keys() == again.keys() == {"table.weight", "bias"}
    assert all(torch.equal(stored[name], again[name]) for name in again)  # of the seed alone
