"""Model families known to megakd. Only this table states how the families differ."""

from __future__ import annotations

from dataclasses import MISSING, fields, replace
from typing import TYPE_CHECKING

from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from megakd.errors import ModelError
from megakd.models.architecture import (
    HEAD_COLUMNS,
    HEAD_COUNTS,
    HEAD_WIDTH,
    NEURON_COUNTS,
    QUERIES_PER_KEY,
    SCORE_WIDTH,
    Architecture,
)
from megakd.models.decoders import DECODERS
from megakd.models.given_paths import (
    MASKED_HEADS,
    AttentionPaths,
    FeedForwardPaths,
    attention_of_t5,
    feed_forward_of_t5,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PretrainedConfig

    from megakd.contract.tasks import TaskType

__all__ = [
    "ARCHITECTURES",
    "AUTO_CLASSES",
    "FAMILIES",
    "HEAD_COLUMNS",
    "HEAD_COUNTS",
    "HEAD_WIDTH",
    "MASKED_HEADS",
    "NEURON_COUNTS",
    "QUERIES_PER_KEY",
    "SCORE_WIDTH",
    "Architecture",
    "architecture_named",
    "architecture_of",
]
SEQUENCE_TASKS: tuple[TaskType, ...] = ("classification", "regression")
AUTO_CLASSES: Mapping[TaskType, type] = {
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "mlm": AutoModelForMaskedLM,
    "causal_lm": AutoModelForCausalLM,
}


def _encoder(model_type: str, *, renewed: tuple[str, ...] = ()) -> Architecture:
    return Architecture(
        model_type=model_type,
        tasks=(*SEQUENCE_TASKS, "mlm"),
        backbone=model_type,
        head="classifier",
        renewed=renewed,
        masked=MASKED_HEADS[model_type],
        cuts_inside_heads=True,
    )


def _t5(model_type: str) -> Architecture:
    return Architecture(
        model_type=model_type,
        tasks=SEQUENCE_TASKS,
        backbone="encoder",
        head="classifier",
        blocks="block",
        embeddings="embed_tokens",
        attention=attention_of_t5("layer.0.SelfAttention"),
        feed_forward=feed_forward_of_t5("layer.1.DenseReluDense"),
        neurons="d_ff",
        positions=None,
        shares_bias=True,
    )


FAMILIES: Mapping[str, Architecture] = {
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
            attention=AttentionPaths(
                ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
                "attention.out_lin",
                "attention",
            ),
            feed_forward=FeedForwardPaths(("ffn.lin1",), "ffn.lin2"),
            neurons="hidden_dim",
        ),
        _encoder("electra"),
        *DECODERS,
        _t5("t5_encoder"),
        replace(
            _t5("enct5"),
            # The decoder's only token is the learned prompt.
            renewed=("decoder.embed_tokens",),
            more_attentions=(
                attention_of_t5("decoder.block.0.layer.0.SelfAttention"),
                attention_of_t5("decoder.block.0.layer.1.EncDecAttention"),
            ),
            more_feed_forwards=(feed_forward_of_t5("decoder.block.0.layer.2.DenseReluDense"),),
            more_blocks=("decoder.block.0",),
        ),
    )
}
# Cut models use the entry of their family. T5 needs no cut type: its config states all shapes.
ARCHITECTURES: Mapping[str, Architecture] = {
    **FAMILIES,
    **{
        f"cut_{name}": replace(entry, model_type=f"cut_{name}")
        for name, entry in FAMILIES.items()
        if not entry.shares_bias and entry.uncut is None
    },
}


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Return the entry of a model's family.

    Raises:
        ModelError: The family is not known.
    """
    return architecture_named(config.model_type)


def architecture_named(model_type: str, task: TaskType | None = None) -> Architecture:
    """Return the entry of `model_type`, with the head of `task` if a task is given.

    Raises:
        ModelError: The family is not known, or has no model for the task.
    """
    known = ", ".join(a.model_type for a in FAMILIES.values() if task in (None, *a.tasks))
    architecture = ARCHITECTURES.get(model_type)
    if architecture is None:
        raise ModelError(
            f"model_type {model_type!r} is not supported; use one of {known}{_how_to_add()}"
        )
    if task is not None and task not in architecture.tasks:
        raise ModelError(
            f"model_type {model_type!r} supports {', '.join(architecture.tasks)} and not task.type "
            f"{task}; use one of {known}"
        )
    return architecture if task is None else architecture.for_task(task)


def _how_to_add() -> str:
    needed = [field.name for field in fields(Architecture) if field.default is MISSING]
    others = [field.name for field in fields(Architecture) if field.default is not MISSING]
    return (
        f"; or add the family to FAMILIES in {__name__.replace('.', '/')}.py: an Architecture with "
        f"{', '.join(needed)}, and, where the family differs from BERT, {', '.join(others)}"
    )
