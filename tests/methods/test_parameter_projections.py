"""Weights compared through shared projections: which ones."""

from __future__ import annotations

import pytest
from transformers import AutoConfig, AutoModelForMaskedLM

from megakd.errors import TeacherError
from megakd.methods.mixed_vocabulary import ParameterProjection
from megakd.methods.mixed_vocabulary.parameter_projections import ParameterProjections


def model(family: str, width: int, layers: int = 2):
    sizes = {"vocab_size": 30, "num_hidden_layers": layers, "num_attention_heads": 2}
    config = AutoConfig.for_model(family, hidden_size=width, intermediate_size=2 * width, **sizes)
    return AutoModelForMaskedLM.from_config(config)


def test_layers_of_the_same_weights_are_compared_and_no_others():
    group = ParameterProjections(ParameterProjection(direction="down", embeddings=False))

    # The weights of BERT's and RoBERTa's layers have the same names.
    group.bind({"student": model("roberta", 6), "teacher": model("bert", 8)})
    with pytest.raises(TeacherError, match="1 and 2 layers"):
        group.bind({"student": model("bert", 6, layers=1), "teacher": model("bert", 8)})
