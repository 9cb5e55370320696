"""A model that has learned, whole or cut, as what is written of it."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from megakd.contract.views import Cut
from megakd.engine.sharding import gathered_state
from megakd.models.axes import weight_axes
from megakd.models.cutting import cut_class_name, cut_config, cut_state, rescaled
from megakd.models.layers import renumbered
from megakd.models.lora import adapter_config, merged_state
from megakd.models.model_folder import Extra
from megakd.models.second_vocabulary import FILE, second_vocabulary, without_second_vocabulary

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


class Learned(NamedTuple):
    """A model to write.

    state: names and tensors; every rank must iterate to the end.
    extra: further files of the model by name, see `write_model_folder`.
    """

    config: PretrainedConfig
    state: Iterator[tuple[str, Tensor]]
    tokenizer: PreTrainedTokenizerBase | None
    architecture: str
    extra: Extra = MappingProxyType({})

    @staticmethod
    def of(
        model: Any,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        cut: Cut | None = None,
        learns: bool = False,
    ) -> Learned:
        """Return a model of an engine; for `learns` see `cut_config`."""
        whole, state = model.config, gathered_state(model)
        if cut is None or cut.view is None:
            extra: dict[str, Any] = {}
            if adapter_config(model) is not None:
                state, files = merged_state(model)
                extra |= files
            if second_vocabulary(model) is not None:
                state, extra[FILE] = without_second_vocabulary(state)
            return Learned(whole, state, tokenizer, type(model).__name__, extra)
        config = cut_config(whole, cut.view, cut.order, learns=learns)
        state = cut_state(state, weight_axes(model), cut.view, cut.order)
        state = state if learns else rescaled(state, whole, cut.view)
        named = renumbered(state, whole, cut.view)
        return Learned(config, named, tokenizer, cut_class_name(model, config))
