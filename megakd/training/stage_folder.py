"""The folder of a stage's models: the stage's own model, and a folder for each other learner.

    stages/<stage>/           the model of the stage's role
    stages/<stage>/<role>/    a model that learned beside it, with checksums of its own
    stages/<stage>/training_state/    see `window_state`

The whole folder is written completely or not at all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from megakd.contract.units import Cut
from megakd.engine.sharding import gathered_state
from megakd.models.axes import weight_axes
from megakd.models.cutting import cut_class_name, cut_config, cut_state, rescaled
from megakd.models.depth import renumbered
from megakd.models.export import Extra, fill_model_folder, write_model_folder
from megakd.models.lora import adapter_config, merged_state
from megakd.models.second_vocabulary import (
    FILE,
    second_vocabulary,
    without_second_vocabulary,
)
from megakd.storage.finished_folder import CHECKSUMS, sealed_folder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from megakd.training.window_state import WindowState


class Learned(NamedTuple):
    """A model to write.

    state: names and tensors; every rank must iterate to the end.
    tokenizer: saved beside the weights.
    architecture: the class of the model, for config.json.
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
        """Return a model of an engine.

        Args:
            model: the model.
            tokenizer: the tokenizer of the model.
            cut: how the model is cut; None: not.
            learns: whether the model continues to learn, see `cut_config`.
        """
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


def files_of_others(names: Iterable[str]) -> list[str]:
    """Return the files of the models that learned beside a stage's own model.

    Args:
        names: the files of a stage's folder.
    """
    known = list(names)
    roles = {name.removesuffix(f"/{CHECKSUMS}") for name in known if name.endswith(f"/{CHECKSUMS}")}
    return [name for name in known if name.partition("/")[0] in roles]


def consume(models: Mapping[str, Learned], window: WindowState | None) -> None:
    """Iterate over the rest of all states, which contain collectives."""
    for model in models.values():
        deque(model.state, maxlen=0)
    if window is not None:
        deque(window.tensors, maxlen=0)


def write_stage_folder(
    folder: Path,
    models: Mapping[str, Learned],
    *,
    extra: Extra,
    window: WindowState | None = None,
) -> None:
    """Write the models of a stage completely or not at all; call on the rank that writes.

    Args:
        folder: replaced as a whole after everything is written and synced.
        models: the models by role; the first is written into `folder` itself. All states are
            consumed even if writing fails.
        extra: small files that belong to `folder`, see `write_model_folder`.
        window: the training state, if the next window of the run continues.

    Raises:
        MegakdError: the disk is full; the old folder is unchanged.
    """
    (first, *_), others = models.values(), list(models.items())[1:]
    try:
        with sealed_folder(folder) as temporary:
            files = {**first.extra, **extra}
            fill_model_folder(temporary, **first._replace(extra=files)._asdict())
            for role, model in others:
                write_model_folder(temporary / role, **model._asdict())
            if window is not None:
                window.write(temporary)
    finally:
        consume(models, window)
