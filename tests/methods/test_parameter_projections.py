"""Weights compared through shared projections: which ones, and their measured weight."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from megakd.errors import TeacherError
from megakd.methods.mixed_vocabulary import ParameterProjection, parameter_projections
from megakd.methods.mixed_vocabulary.parameter_projections import (
    CROSS_ENTROPY,
    FAINT,
    NAME,
    Balanced,
    ParameterProjections,
)
from megakd.models.second_vocabulary import SecondSize, build_second_vocabulary

PIECES = 20


def bert(width: int, *, layers: int = 2, size: int = 30) -> nn.Module:
    torch.manual_seed(width + layers)
    sizes = {"vocab_size": size, "num_hidden_layers": layers, "hidden_size": width}
    sizes |= {"intermediate_size": 2 * width, "max_position_embeddings": 8}
    return BertForMaskedLM(BertConfig(**sizes, num_attention_heads=2))


def with_second(teacher: nn.Module) -> nn.Module:
    build_second_vocabulary(teacher, SecondSize(PIECES, 30), ds=None, dtype=torch.float32)  # type: ignore[arg-type]
    return teacher


def bound(student: nn.Module, teacher: nn.Module, **options) -> ParameterProjections:
    group = ParameterProjections(ParameterProjection(**options))
    group.bind({"student": student, "teacher": teacher})
    return group


@pytest.mark.parametrize("direction", ["down", "up"])
def test_the_number_of_matrices_does_not_grow_with_the_layers(direction):
    one, three = (
        bound(bert(6, layers=n, size=PIECES), with_second(bert(8, layers=n)), direction=direction)
        for n in (1, 3)
    )

    assert [*one.projections] == [*three.projections]
    assert len(one.projections) == 4  # rows and columns, of the hidden axis and of the neurons


def test_norms_and_biases_can_be_left_out():
    student, teacher = bert(6), bert(8)

    group = bound(student, teacher, direction="down", embeddings=False, vectors=False)

    matrices = [p for p in student.bert.encoder.layer.parameters() if p.dim() > 1]  # type: ignore[union-attr]
    assert group.elements == sum(p.numel() for p in matrices)
    assert {id(p) for p in group.matrices} == {id(p) for p in matrices}


def test_layers_of_the_same_weights_are_compared_and_no_others():
    sizes = {"num_hidden_layers": 2, "hidden_size": 6, "num_attention_heads": 2}
    roberta = RobertaForMaskedLM(RobertaConfig(vocab_size=30, **sizes))

    # The weights of BERT's and RoBERTa's layers have the same names.
    bound(roberta, bert(8), direction="down", embeddings=False)
    with pytest.raises(TeacherError, match="1 and 2 layers"):
        bound(bert(6, layers=1), bert(8), direction="down", embeddings=False)


def engine(*gradients: Iterable[float]) -> Any:
    """A student whose matrix `wide` is compared and whose other weight is not."""
    model = nn.ModuleDict({"wide": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    weights = {name: p for name, p in model.named_parameters() if "weight" in name}
    shards = [
        SimpleNamespace(name=name, gradient=torch.tensor(values))
        for name, values in zip(weights, gradients, strict=True)
    ]
    bundle = SimpleNamespace(modules=lambda: [Group([weights["wide.weight"]])])
    return SimpleNamespace(student=model, bundle=bundle, local_shards=lambda: shards)


class Group:
    def __init__(self, matrices: list[nn.Parameter]) -> None:
        self.matrices = matrices


@pytest.fixture
def balanced(monkeypatch, process_group) -> Balanced:
    monkeypatch.setattr(parameter_projections, "ParameterProjections", Group)
    strategy = Balanced(0.3, "teacher")
    strategy.begin(engine([0.0], [0.0]), 0)
    return strategy


def test_the_first_updates_measure_one_term_each_and_the_rest_learn_from_both(balanced):
    seen = []
    for step, gradient in enumerate(([30.0, 40.0], [0.1], [7.0])):
        ours, beside = balanced.passes(step)
        assert (beside.learner, beside.weights) == ("teacher", {NAME: 0.0})
        seen.append(ours.weights)
        balanced.before_update(step, engine(gradient, [1e6]))

    assert seen[:2] == [{CROSS_ENTROPY: 1.0, NAME: FAINT}, {CROSS_ENTROPY: FAINT, NAME: 1.0}]
    assert seen[2] == {NAME: pytest.approx(0.3 * 50.0 / 0.1)}
    assert balanced.scalars()["projections/weight"] == seen[2][NAME]


def test_a_gradient_that_overflows_is_measured_again(balanced):
    balanced.before_update(0, engine([float("inf")], [1.0]))
    assert balanced.passes(1)[0].weights == {CROSS_ENTROPY: 1.0, NAME: FAINT}

    balanced.before_update(1, engine([2.0], [1.0]))
    assert balanced.passes(2)[0].weights == {CROSS_ENTROPY: FAINT, NAME: 1.0}
