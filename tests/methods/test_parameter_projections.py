"""Weights compared through shared projections: which ones, and by how many matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

from megakd.errors import TeacherError
from megakd.methods.mixed_vocabulary import ParameterProjection
from megakd.methods.mixed_vocabulary.parameter_projections import ParameterProjections
from megakd.models.knowledge import SecondSize, build_second_vocabulary

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


def test_layers_of_the_same_weights_are_compared_and_no_others():
    sizes = {"num_hidden_layers": 2, "hidden_size": 6, "num_attention_heads": 2}
    roberta = RobertaForMaskedLM(RobertaConfig(vocab_size=30, **sizes))

    # The weights of BERT's and RoBERTa's layers have the same names.
    bound(roberta, bert(8), direction="down", embeddings=False)
    with pytest.raises(TeacherError, match="1 and 2 layers"):
        bound(bert(6, layers=1), bert(8), direction="down", embeddings=False)
