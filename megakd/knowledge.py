"""What is read from a model: logits or (hidden, head), and hidden states.

The one place where a teacher and a student run their forward, so that both are read alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

from megakd.engine.sharding import gathered
from megakd.models.architectures import architecture_of
from megakd.stage import Batch, Knowledge


class Needs(NamedTuple):
    """What the chosen losses ask of a model's forward."""

    hidden_states: bool = False


class LanguageModelHead:
    """The output matrix of a causal LM, found by name so that ties stay ties."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def read(self) -> tuple[Tensor, Tensor | None]:
        """(weight [V, D], bias [V] or None); under ZeRO-3 only inside a module's forward."""
        return self._module.weight, getattr(self._module, "bias", None)  # type: ignore[return-value]

    @contextmanager
    def open(self) -> Iterator[None]:
        """Keeps it whole for as long as the context lasts; a collective under ZeRO-3."""
        with gathered(self._module.parameters(recurse=False)):
            yield


def language_model_head(model: nn.Module) -> LanguageModelHead:
    """The head of a causal LM by the architecture map."""
    return LanguageModelHead(architecture_of(model.config).head_of(model))  # type: ignore[arg-type]


def read_knowledge(model: nn.Module, batch: Batch, needs: Needs) -> Knowledge:
    """Runs the model once and keeps what the losses need.

    Args:
        model: a classifier or regressor (logits [B, C]), or a causal LM, of which only the
            backbone runs: the losses take (hidden, head) and never form [B, T, V].
        batch: inputs as the model's forward takes them.
        needs: hidden states or not.
    """
    if batch.labels.dim() == 2:  # [B, T]: a language model
        return _read_language_model(model, batch, needs)
    inputs = _accepted_inputs(model, batch)
    out = model(**inputs, output_hidden_states=needs.hidden_states)
    return Knowledge(logits=out.logits, hidden_states=tuple(out.hidden_states or ()))


def _accepted_inputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Without the second text's type where a family (RoBERTa, DistilBERT) knows no second type."""
    if getattr(model.config, "type_vocab_size", 0) > 1:
        return batch.inputs
    return {name: value for name, value in batch.inputs.items() if name != "token_type_ids"}


def _read_language_model(model: nn.Module, batch: Batch, needs: Needs) -> Knowledge:
    backbone = architecture_of(model.config).backbone_of(model)  # type: ignore[arg-type]
    out = backbone(**batch.inputs, use_cache=False, output_hidden_states=needs.hidden_states)
    return Knowledge(
        hidden=out.last_hidden_state,
        head=language_model_head(model),
        hidden_states=tuple(out.hidden_states or ()),
    )
