"""The model families megakd knows: one entry each, and nothing else says how they differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)
from transformers.activations import ACT2FN

from megakd.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn
    from transformers import PretrainedConfig

    from megakd.config import TaskType

SEQUENCE_TASKS: tuple[TaskType, ...] = ("classification", "regression")
AUTO_CLASSES: Mapping[TaskType, type] = {
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "mlm": AutoModelForMaskedLM,
    "causal_lm": AutoModelForCausalLM,
}


class Heads(NamedTuple):
    """Attention heads of a model's layers; keys and values may have fewer than queries."""

    queries: int
    keys: int
    width: int


@dataclass(frozen=True, kw_only=True)
class MaskedHead:
    """What a masked language model of a family has on its backbone.

    modules: attribute paths of all that belongs to the head.
    transform: what hidden states go through before the decoder, in this order: paths of
        modules, and functions for what is no module.
    decoder: path of the output matrix [V, D], which is the embedding unless the config unties
        them, with its bias [V].
    """

    modules: tuple[str, ...]
    transform: tuple[str | Callable[[Tensor], Tensor], ...]
    decoder: str


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Where the parts of one family's models are.

    backbone, head: attribute paths on the model with a head.
    renewed: modules that belong to the task beside the head; a checkpoint may lack them.
    masked: what its masked language models have instead of these; None for a decoder.
    layers, width, attention_heads: keys of the config.
    blocks: path of the list of layers on the backbone.
    projections: of queries, keys and values, paths on a layer.
    rotary: what gives the cosines and sines that turn queries and keys, a path on the backbone.
    counts_padding: positions start behind the padding id, which costs that many of them.
    """

    model_type: str
    tasks: tuple[TaskType, ...]
    backbone: str
    head: str
    renewed: tuple[str, ...] = ()
    masked: MaskedHead | None = None
    layers: str = "num_hidden_layers"
    width: str = "hidden_size"
    attention_heads: str = "num_attention_heads"
    blocks: str = "encoder.layer"
    projections: tuple[str, str, str] = (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
    )
    rotary: str | None = None
    counts_padding: bool = False

    def number_of_layers(self, config: PretrainedConfig) -> int:
        """How many layers the config asks for."""
        return getattr(config, self.layers)

    def hidden_width(self, config: PretrainedConfig) -> int:
        """The width D of the hidden states."""
        return getattr(config, self.width)

    def heads(self, config: PretrainedConfig) -> Heads:
        """How queries, keys and values are cut into heads."""
        queries = getattr(config, self.attention_heads)
        keys = getattr(config, "num_key_value_heads", None) or queries
        width = getattr(config, "head_dim", None) or self.hidden_width(config) // queries
        return Heads(queries, keys, width)

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

    def for_task(self, task: TaskType) -> Architecture:
        """The same with the head that stands on the backbone for this task."""
        if task != "mlm" or self.masked is None:
            return self
        return replace(self, head=self.masked.decoder, renewed=self.masked.modules)

    def language_head_of(self, model: nn.Module) -> nn.Module:
        """The output matrix of a causal or masked language model."""
        return model.get_submodule(self.masked.decoder if self.masked else self.head)

    def before_language_head(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """What the output matrix takes, from the last hidden states [..., D]."""
        for step in self.masked.transform if self.masked else ():
            apply = model.get_submodule(step) if isinstance(step, str) else step
            hidden = apply(hidden)
        return hidden

    def block_of(self, model: nn.Module, layer: int) -> nn.Module:
        """A layer, counted from 1."""
        return self.backbone_of(model).get_submodule(f"{self.blocks}.{layer - 1}")

    def projections_of(self, model: nn.Module, layer: int) -> tuple[nn.Module, ...]:
        """What makes the queries, keys and values of a layer, counted from 1."""
        block = self.block_of(model, layer)
        return tuple(block.get_submodule(path) for path in self.projections)

    def rotary_of(self, model: nn.Module) -> nn.Module | None:
        """What gives the cosines and sines of the positions; None where nothing is turned."""
        return None if self.rotary is None else self.backbone_of(model).get_submodule(self.rotary)

    def of_the_task(self, name: str) -> bool:
        """Whether a parameter belongs to the task and not to the backbone."""
        return any(name.startswith(f"{module}.") for module in (self.head, *self.renewed))


MASKED_HEADS: Mapping[str, MaskedHead] = {
    "bert": MaskedHead(
        modules=("cls",),
        transform=("cls.predictions.transform",),
        decoder="cls.predictions.decoder",
    ),
    "roberta": MaskedHead(
        modules=("lm_head",),
        transform=("lm_head.dense", ACT2FN["gelu"], "lm_head.layer_norm"),
        decoder="lm_head.decoder",
    ),
    "distilbert": MaskedHead(
        modules=("vocab_transform", "vocab_layer_norm"),
        transform=("vocab_transform", "activation", "vocab_layer_norm"),
        decoder="vocab_projector",
    ),
    # The generator's; a discriminator has none.
    "electra": MaskedHead(
        modules=("generator_predictions",),
        transform=("generator_predictions",),
        decoder="generator_lm_head",
    ),
}


def _encoder(model_type: str, *, renewed: tuple[str, ...] = ()) -> Architecture:
    return Architecture(
        model_type=model_type,
        tasks=(*SEQUENCE_TASKS, "mlm"),
        backbone=model_type,
        head="classifier",
        renewed=renewed,
        masked=MASKED_HEADS[model_type],
    )


def _decoder(model_type: str) -> Architecture:
    return Architecture(
        model_type=model_type,
        tasks=("causal_lm",),
        backbone="model",
        head="lm_head",
        blocks="layers",
        projections=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        rotary="rotary_emb",
    )


ARCHITECTURES: Mapping[str, Architecture] = {
    entry.model_type: entry
    for entry in (
        _encoder("bert", renewed=("bert.pooler",)),
        replace(_encoder("roberta"), counts_padding=True),
        replace(
            _encoder("distilbert", renewed=("pre_classifier",)),
            layers="n_layers",
            width="dim",
            attention_heads="n_heads",
            blocks="transformer.layer",
            projections=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
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
    """The entry of `model_type`, if it can do the task, with the task's head.

    Raises:
        ModelError: The family is not known, or has no model for the task.
    """
    known = ", ".join(a.model_type for a in ARCHITECTURES.values() if task in (None, *a.tasks))
    architecture = ARCHITECTURES.get(model_type)
    if architecture is None:
        raise ModelError(f"model_type {model_type!r} is not known; use one of {known}")
    if task is not None and task not in architecture.tasks:
        raise ModelError(
            f"model_type {model_type!r} is for {', '.join(architecture.tasks)} and cannot do"
            f" task.type {task}; use one of {known}"
        )
    return architecture if task is None else architecture.for_task(task)
