"""Losses of rows with any number of labels, against torch's own and formulas in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from loss_scene import CLASSES, Scene, term_of
from torch.nn.functional import binary_cross_entropy_with_logits

from megakd.data.batch import Batch
from megakd.data.soft_labels import SOFT
from megakd.teachers.frozen import joined
from megakd.teachers.soft_labels import SoftLabels

NAN = float("nan")
# The labels of the third row are unknown, the last row is a dummy row.
LABELS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [NAN] * CLASSES, [NAN] * CLASSES])
CE = term_of("hard_cross_entropy")
KL, KL_AT_2 = term_of("soft_target_kl"), term_of("soft_target_kl", temperature=2.0)
REVERSE = term_of("soft_target_reverse_kl", temperature=1.5)
TVD = term_of("soft_target_tvd")


def scene_of(term: Any) -> Scene:
    scene = Scene("classification", term)
    scene.labels = LABELS.clone()
    return scene


def divergence(term: Any, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """[B, C] between the yes and no of each class."""
    heat = term.temperature
    q, p = (torch.sigmoid(logits / heat) for logits in (student, teacher))
    pairs = [(p, q), (1 - p, 1 - q)]
    if term is TVD:
        return sum((a - b).abs() for a, b in pairs) / 2 * heat**2
    if term is REVERSE:
        pairs = [(b, a) for a, b in pairs]
    return sum(a * (a / b).log() for a, b in pairs) * heat**2


@pytest.mark.parametrize("term", [CE, KL, KL_AT_2, REVERSE, TVD], ids=lambda term: term.loss)
@pytest.mark.parametrize("kernels", ["auto", "chunked"])
def test_labels_of_labelled_rows_and_soft_targets_of_all_rows_are_means_over_the_classes(
    term, kernels
):
    scene = scene_of(term)
    logits = scene.leaves["logits"].double().requires_grad_()
    if term is CE:
        expected = binary_cross_entropy_with_logits(logits[:2], LABELS[:2].double())
    else:
        expected = divergence(term, logits[:3], scene.teacher["logits"][:3].double()).mean()
    expected.backward()

    result = scene.result(kernels=kernels)

    assert float(result.total) == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(result.gradients["logits"].double(), logits.grad, atol=1e-6)


@pytest.mark.parametrize("term", [CE, KL_AT_2], ids=lambda term: term.loss)
def test_the_losses_of_micro_batches_add_up_to_that_of_the_step(term):
    scene = scene_of(term)
    whole, counts = scene.result(), scene.counts()

    parts = [scene.result(slice(n, n + 1), counts) for n in range(4)]

    assert sum(float(part.total) for part in parts) == pytest.approx(whole.total.item(), rel=1e-6)
    assert int(counts["targets"]) == 2
    assert int(counts["examples"]) == 3


def test_outputs_that_do_not_count_change_nothing():
    scene = scene_of(CE)
    expected = scene.result()
    scene.leaves["logits"][2:] = NAN

    result = scene.result()

    assert float(result.total) == float(expected.total)
    assert torch.equal(result.gradients["logits"], expected.gradients["logits"])


def test_labels_of_micro_batches_of_other_lengths_are_joined_by_rows():
    parts = [Batch({}, LABELS[:2], torch.ones(2, width, dtype=torch.bool)) for width in (3, 5)]

    assert torch.equal(joined(parts).labels, torch.cat([LABELS[:2]] * 2))


@pytest.mark.parametrize("heat", [1.0, 2.0])
def test_soft_labels_are_softened_as_the_root_of_the_probabilities(heat):
    soft = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]])
    rows = torch.tensor([1, 0, -1])
    batch = Batch({}, torch.zeros(3).long(), torch.ones(3, 1, dtype=torch.bool), rows=rows)
    teacher = SoftLabels(Dataset.from_dict({SOFT: soft.tolist()}), torch.device("cpu"))

    of_one = (teacher(batch).logits / heat).softmax(-1)[[1, 0]]
    of_many = (teacher(batch._replace(labels=torch.zeros(3, 3))).logits / heat).sigmoid()[[1, 0]]

    assert teacher(batch).logits[2].isfinite().all()
    yes, no = soft ** (1 / heat), (1 - soft) ** (1 / heat)
    assert torch.allclose(of_one, yes / yes.sum(-1, keepdim=True))
    assert torch.allclose(of_many, yes / (yes + no))
