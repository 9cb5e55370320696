"""Weights compared through shared projections: values, gradients, and their measured weight."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from megakd.contract.batch import Batch, Knowledge, LossInputs
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
BATCH = Batch({}, torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))


def bert(width: int, *, layers: int = 2, neurons: int | None = None, size: int = 30) -> nn.Module:
    torch.manual_seed(width + layers)
    sizes = {"vocab_size": size, "num_hidden_layers": layers, "hidden_size": width}
    sizes |= {"intermediate_size": neurons or 2 * width, "max_position_embeddings": 8}
    return BertForMaskedLM(BertConfig(**sizes, num_attention_heads=2)).double()


def with_second(teacher: nn.Module) -> nn.Module:
    size = SecondSize(PIECES, 30)
    second = build_second_vocabulary(teacher, size, ds=None, dtype=torch.float64)  # type: ignore[arg-type]
    nn.init.normal_(second.table.weight)
    return teacher


def bound(student: nn.Module, teacher: nn.Module, **options) -> ParameterProjections:
    group = ParameterProjections(ParameterProjection(**options))
    group.bind({"student": student, "teacher": teacher})
    return group.double()


def loss_of(group: ParameterProjections) -> torch.Tensor:
    per_unit, nothing = {"once": torch.ones(())}, Knowledge()
    reading = LossInputs(
        student=nothing, teacher=None, batch=BATCH, weights={NAME: 1.0}, per_unit=per_unit
    )
    return group(reading).total


@pytest.mark.parametrize("direction", ["down", "up"])
def test_equal_models_and_identities_have_no_loss(direction):
    student, teacher = bert(8, size=PIECES), with_second(bert(8))
    layers = dict(teacher.bert.encoder.layer.state_dict())  # type: ignore[union-attr]
    student.bert.encoder.layer.load_state_dict(layers)  # type: ignore[union-attr]
    student.get_input_embeddings().weight.data = teacher.second_vocabulary.table.weight.data  # type: ignore[operator,union-attr]
    group = bound(student, teacher, direction=direction)
    for matrix in group.projections.values():
        nn.init.eye_(matrix)

    assert loss_of(group) == 0.0


def test_down_is_zero_for_the_projected_teacher():
    student, teacher = bert(6, size=PIECES), with_second(bert(8, neurons=20))
    group = bound(student, teacher, direction="down")
    matrices = group.projections
    with torch.no_grad():
        ours, theirs = (dict(m.bert.encoder.layer.named_parameters()) for m in (student, teacher))  # type: ignore[union-attr]
        for name, weight in theirs.items():
            target = ours[name]
            value = matrices[f"rows_{weight.shape[0]}_to_{target.shape[0]}"] @ weight
            if weight.dim() == 2:
                value = value @ matrices[f"columns_{weight.shape[1]}_to_{target.shape[1]}"]
            target.copy_(value)
        table = teacher.second_vocabulary.table.weight  # type: ignore[union-attr]
        student.get_input_embeddings().weight.copy_(table @ matrices["columns_8_to_6"])  # type: ignore[operator]

    # The products are fp64, the differences are taken in fp32.
    assert loss_of(group).item() < 1e-13


@pytest.mark.parametrize("direction", ["down", "up"])
def test_gradients_agree_with_the_closed_form(direction):
    student, teacher = bert(6, layers=1), bert(8, layers=1)
    group = bound(student, teacher, direction=direction, embeddings=False)
    for parameter in group.parameters():
        parameter.requires_grad_()
    loss_of(group).backward()
    ours, theirs = (
        m.bert.encoder.layer[0].intermediate.dense.weight  # type: ignore[union-attr,index]
        for m in (student, teacher)
    )  # [12, 6] and [16, 8]
    source, target = (theirs, ours) if direction == "down" else (ours, theirs)
    left = group.projections[f"rows_{source.shape[0]}_to_{target.shape[0]}"]
    right = group.projections[f"columns_{source.shape[1]}_to_{target.shape[1]}"]
    error = 2 * (left @ source @ right - target) / group.elements

    # Only this weight and its bias have these rows; the bias has no columns.
    torch.testing.assert_close(source.grad, left.T @ error @ right.T, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(target.grad, -error, rtol=1e-6, atol=1e-10)
    bias, other = (
        m.bert.encoder.layer[0].intermediate.dense.bias  # type: ignore[union-attr,index]
        for m in ((teacher, student) if direction == "down" else (student, teacher))
    )
    of_bias = torch.outer(2 * (left @ bias - other) / group.elements, bias)
    expected = error @ right.T @ source.T + of_bias
    torch.testing.assert_close(left.grad, expected, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("direction", ["down", "up"])
def test_the_number_of_matrices_does_not_grow_with_the_layers(direction):
    one, three = (
        bound(bert(6, layers=n, size=PIECES), with_second(bert(8, layers=n)), direction=direction)
        for n in (1, 3)
    )

    assert [*one.projections] == [*three.projections]
    assert len(one.projections) == 4  # rows and columns, of the hidden axis and of the neurons


def test_epsilon_divides_the_sum_of_squared_errors():
    student, teacher = bert(6), bert(8)
    groups = []
    for epsilon in (None, 10.0):
        torch.manual_seed(1)
        groups.append(bound(student, teacher, direction="down", embeddings=False, epsilon=epsilon))

    mean, weighted = (loss_of(group).item() for group in groups)
    count = sum(p.numel() for p in student.bert.encoder.layer.parameters())  # type: ignore[union-attr]
    assert groups[0].elements == count
    assert weighted == pytest.approx(mean * count / 10.0)


def test_norms_and_biases_can_be_left_out():
    student, teacher = bert(6), bert(8)

    group = bound(student, teacher, direction="down", embeddings=False, vectors=False)

    matrices = [p for p in student.bert.encoder.layer.parameters() if p.dim() > 1]  # type: ignore[union-attr]
    assert group.elements == sum(p.numel() for p in matrices)
    assert {id(p) for p in group.matrices} == {id(p) for p in matrices}
    loss_of(group).backward()
    assert all(
        (p.grad is not None) == (p.dim() > 1)
        for p in student.bert.encoder.layer.parameters()  # type: ignore[union-attr]
    )


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
