"""What a model is recognized by."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from transformers import BertConfig, T5Config

from megakd.storage.fingerprint import flatten
from megakd.training.assembly import model_identity


def identity(config: Any) -> dict[str, Any]:
    source: Any = SimpleNamespace(config=config, stored={}, layers=None, folder=None)
    return flatten(model_identity(source, seed=1))


def test_another_version_of_transformers_is_the_same_model(monkeypatch):
    before = identity(BertConfig(num_hidden_layers=3))
    monkeypatch.setattr("transformers.configuration_utils.__version__", "99.0.0")

    assert identity(BertConfig(num_hidden_layers=3)) == before


def test_a_model_is_recognized_by_its_config_and_its_seed():
    assert identity(BertConfig(num_hidden_layers=3)) != identity(BertConfig(num_hidden_layers=4))
    assert identity(T5Config(d_ff=8))["config.d_ff"] == 8
    assert identity(BertConfig())["seed"] == 1
