"""The model families megakd knows: one entry each, and nothing else says how they differ."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from megakd.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn
    from transformers import PretrainedConfig

    from megakd.config import TaskType

SEQUENCE_TASKS: tuple[TaskType, ...] = ("classification", "regression")
AUTO_CLASSES: Mapping[TaskType, type] = {
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "causal_lm": AutoModelForCausalLM,
}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Where the parts of one family's models are.

    backbone, head: attribute paths on the model with a head.
    renewed: modules that belong to the task beside the head; a checkpoint may lack them.
    layers, width: keys of the config.
    counts_padding: positions start behind the padding id, which costs that many of them.
    """

    model_type: str
    tasks: tuple[TaskType, ...]
    backbone: str
    head: str
    renewed: tuple[str, ...] = ()
    layers: str = "num_hidden_layers"
    width: str = "hidden_size"
    counts_padding: bool = False

    def number_of_layers(self, config: PretrainedConfig) -> int:
        """How many layers the config asks for."""
        return getattr(config, self.layers)

    def hidden_width(self, config: PretrainedConfig) -> int:
        """The width D of the hidden states."""
        return getattr(config, self.width)

    def longest_input(self, config: PretrainedConfig) -> int:
        """How many tokens have a position."""
        if self.counts_padding:
            return config.max_position_embeddings - config.pad_token_id - 1
        return config.max_position_embeddings

    def backbone_of(self, model: nn.Module) -> nn.Module:
        """The part that gives hidden states."""
        return model.get_submodule(self.backbone)

    def head_of(self, model: nn.Module) -> nn.Module:
        """The part that turns hidden states into outputs."""
        return model.get_submodule(self.head)

    def of_the_task(self, name: str) -> bool:
        """Whether a parameter belongs to the task and not to the backbone."""
        return any(name.startswith(f"{module}.") for module in (self.head, *self.renewed))


def _encoder(model_type: str, *, renewed: tuple[str, ...] = ()) -> Architecture:
    return Architecture(
        model_type=model_type,
        tasks=SEQUENCE_TASKS,
        backbone=model_type,
        head="classifier",
        renewed=renewed,
    )


def _decoder(model_type: str) -> Architecture:
    return Architecture(
        model_type=model_type, tasks=("causal_lm",), backbone="model", head="lm_head"
    )


ARCHITECTURES: Mapping[str, Architecture] = {
    entry.model_type: entry
    for entry in (
        _encoder("bert", renewed=("bert.pooler",)),
        replace(_encoder("roberta"), counts_padding=True),
        replace(
            _encoder("distilbert", renewed=("pre_classifier",)), layers="n_layers", width="dim"
        ),
        _encoder("electra"),
        _decoder("llama"),
        _decoder("mistral"),
        _decoder("qwen2"),
    )
}


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The entry of a model's family.

    Raises:
        ModelError: The family is not known.
    """
    return architecture_named(config.model_type)


def architecture_named(model_type: str, task: TaskType | None = None) -> Architecture:
    """The entry of `model_type`, if it can do the task.

    Raises:
        ModelError: The family is not known, or has no model for the task.
    """
    known = ", ".join(a.model_type for a in ARCHITECTURES.values() if task in (None, *a.tasks))
    architecture = ARCHITECTURES.get(model_type)
    if architecture is None:
        raise ModelError(f"model_type {model_type!r} is not known; use one of {known}")
    if task is not None and task not in architecture.tasks:
        raise ModelError(
            f"model_type {model_type!r} is for {' and '.join(architecture.tasks)} and cannot do"
            f" task.type {task}; use one of {known}"
        )
    return architecture
