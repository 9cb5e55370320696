"""Model families known to megakd. Only this table states how the families differ."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, replace
from typing import TYPE_CHECKING

from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from megakd.contract.shapes import Heads
from megakd.contract.units import View
from megakd.errors import ModelError
from megakd.models.paths import (
    ATTENTION_OF_BERT,
    ATTENTION_OF_LLAMA,
    FEED_FORWARD_OF_BERT,
    MASKED_HEADS,
    AttentionPaths,
    FeedForwardPaths,
    MaskedHead,
    attention_of_t5,
    feed_forward_of_t5,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn
    from transformers import PretrainedConfig

    from megakd.contract.tasks import TaskType

SEQUENCE_TASKS: tuple[TaskType, ...] = ("classification", "regression")
AUTO_CLASSES: Mapping[TaskType, type] = {
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "mlm": AutoModelForMaskedLM,
    "causal_lm": AutoModelForCausalLM,
}


# Config keys of a cut model, whose layers differ in shape.
HEAD_COUNTS, NEURON_COUNTS, HEAD_WIDTH = "head_counts", "neuron_counts", "head_width"
QUERIES_PER_KEY = "queries_per_key"
SCORE_WIDTH = "score_width"
"""Config key of a cut model: the width whose root divides attention scores."""
HEAD_COLUMNS = "head_columns"
"""Config key of a cut model, and of a model whose sorted heads have columns in a shared bias."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Locations of the parts of a model, for one model family.

    backbone, head: attribute paths on the model with a head.
    renewed: modules that belong to the task in addition to the head; a checkpoint may lack them.
    masked: replaces `head` and `renewed` in masked language models; None if there are none.
    layers, width, attention_heads: keys of the config.
    blocks: path on the backbone of the list of layers.
    embeddings: path on the backbone of the module that makes the first hidden states of tokens.
    attention: module paths of an attention, relative to its layer.
    feed_forward: module paths of a feed-forward, relative to its layer.
    more_attentions: attentions outside the layers, paths on the model with a head; counted last.
    more_feed_forwards: feed-forwards outside the layers, likewise.
    more_blocks: layers of a second stream of hidden states of the same width, likewise.
    neurons: key of the config.
    rotary: path on the backbone of the module that makes the rotary cosines and sines.
    positions: config key of the number of positions; None: any number.
    counts_padding: position ids start after the padding id, which leaves fewer positions.
    shares_bias: all layers share a position bias with one column per head.
    cuts_inside_heads: the columns of a head can be cut one by one; rotary positions pair columns,
        so that such families lose whole heads.
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
    embeddings: str = "embeddings"
    attention: AttentionPaths = ATTENTION_OF_BERT
    feed_forward: FeedForwardPaths = FEED_FORWARD_OF_BERT
    more_attentions: tuple[AttentionPaths, ...] = ()
    more_feed_forwards: tuple[FeedForwardPaths, ...] = ()
    more_blocks: tuple[str, ...] = ()
    neurons: str = "intermediate_size"
    rotary: str | None = None
    positions: str | None = "max_position_embeddings"
    counts_padding: bool = False
    shares_bias: bool = False
    cuts_inside_heads: bool = False

    def number_of_layers(self, config: PretrainedConfig) -> int:
        """Return the number of layers in a config."""
        return getattr(config, self.layers)

    def hidden_width(self, config: PretrainedConfig) -> int:
        """Return the width D of the hidden states."""
        return getattr(config, self.width)

    def embedding_width(self, config: PretrainedConfig) -> int:
        """Return the columns of the table of embeddings, which ELECTRA maps to the width."""
        return getattr(config, "embedding_size", None) or self.hidden_width(config)

    def heads(self, config: PretrainedConfig) -> Heads:
        """Return the numbers of query heads and key heads, and the width of a head."""
        queries = getattr(config, self.attention_heads)
        keys = getattr(config, "num_key_value_heads", None) or queries
        width = getattr(config, HEAD_WIDTH, None) or getattr(config, "head_dim", None)
        width = width or self.hidden_width(config) // queries
        return Heads(queries, keys, width)

    def score_width(self, config: PretrainedConfig) -> int:
        """Return the width whose root divides attention scores; a cut head may be narrower."""
        return getattr(config, SCORE_WIDTH, None) or self.heads(config).width

    def longest_input(self, config: PretrainedConfig) -> int | None:
        """Return the largest number of tokens with positions; None if any number is allowed."""
        if self.positions is None:
            return None
        count = getattr(config, self.positions)
        return count - config.pad_token_id - 1 if self.counts_padding else count

    def backbone_of(self, model: nn.Module) -> nn.Module:
        """Return the module that produces hidden states."""
        return model.get_submodule(self.backbone)

    def head_of(self, model: nn.Module) -> nn.Module:
        """Return the module that turns hidden states into outputs."""
        return model.get_submodule(self.head)

    def for_task(self, task: TaskType) -> Architecture:
        """Return this entry with the head that the models for a task have."""
        if task != "mlm" or self.masked is None:
            return self
        return replace(self, head=self.masked.decoder, renewed=self.masked.modules)

    def language_head_of(self, model: nn.Module) -> nn.Module:
        """Return the module with the output matrix of a causal or masked language model."""
        return model.get_submodule(self.masked.decoder if self.masked else self.head)

    def before_language_head(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """Return the input of the output matrix, computed from the last hidden states [..., D]."""
        for step in self.masked.transform if self.masked else ():
            apply = model.get_submodule(step) if isinstance(step, str) else step
            hidden = apply(hidden)
        return hidden

    def block_of(self, model: nn.Module, layer: int) -> nn.Module:
        """Return a layer; layers are counted from 1."""
        return self.backbone_of(model).get_submodule(f"{self.blocks}.{layer - 1}")

    def vectors_of(self, model: nn.Module, layer: int) -> tuple[nn.Module, ...]:
        """Return the modules that produce queries, keys and values of a layer, counted from 1."""
        block = self.block_of(model, layer)
        return tuple(block.get_submodule(path) for path in self.attention.vectors)

    def attentions(self, config: PretrainedConfig) -> tuple[AttentionPaths, ...]:
        """Return all attentions of a model with a head, as paths on the model."""
        layers = tuple(self.attention.under(block) for block in self._blocks(config))
        return layers + self.more_attentions

    def feed_forwards(self, config: PretrainedConfig) -> tuple[FeedForwardPaths, ...]:
        """Return all feed-forwards of a model with a head, as paths on the model."""
        layers = tuple(self.feed_forward.under(block) for block in self._blocks(config))
        is_gated = bool(getattr(config, "is_gated_act", False))
        return tuple(paths.of_kind(is_gated=is_gated) for paths in layers + self.more_feed_forwards)

    def streams(self, config: PretrainedConfig) -> tuple[tuple[str, ...], ...]:
        """Return the sequences of layers that hidden states pass through, as paths on the model."""
        layers = tuple(self._blocks(config))
        return (layers, self.more_blocks) if self.more_blocks else (layers,)

    def _blocks(self, config: PretrainedConfig) -> list[str]:
        path = f"{self.backbone}.{self.blocks}"
        return [f"{path}.{number}" for number in range(self.number_of_layers(config))]

    def units(self, config: PretrainedConfig) -> View:
        """Return the numbers of units of a config's model; the config of a cut model lists them."""
        heads, neurons = (getattr(config, key, None) for key in (HEAD_COUNTS, NEURON_COUNTS))
        attentions, feed_forwards = len(self.attentions(config)), len(self.feed_forwards(config))
        return View(
            heads=tuple(heads or (self.heads(config).keys,) * attentions),
            neurons=tuple(neurons or (self.neurons_per_layer(config),) * feed_forwards),
            width=self.hidden_width(config),
        )

    def prunable(self, config: PretrainedConfig) -> View:
        """Return the units; `head_width` is set if columns of heads can be cut one by one."""
        width = self.heads(config).width if self.cuts_inside_heads else None
        return self.units(config)._replace(head_width=width)

    def neurons_per_layer(self, config: PretrainedConfig) -> int:
        """Return the number of neurons of a feed-forward that was not cut."""
        # The value may be None in GPT-2's config.
        return getattr(config, self.neurons) or 4 * self.hidden_width(config)

    def rotary_of(self, model: nn.Module) -> nn.Module | None:
        """Return the module that makes rotary cosines and sines; None if the family has none."""
        return None if self.rotary is None else self.backbone_of(model).get_submodule(self.rotary)

    def of_the_task(self, name: str) -> bool:
        """Return true if a parameter belongs to the task and not to the backbone."""
        return any(name.startswith(f"{module}.") for module in (self.head, *self.renewed))


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


def _decoder(model_type: str) -> Architecture:
    return Architecture(
        model_type=model_type,
        tasks=("causal_lm",),
        backbone="model",
        head="lm_head",
        blocks="layers",
        embeddings="embed_tokens",
        attention=ATTENTION_OF_LLAMA,
        feed_forward=FeedForwardPaths(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
        rotary="rotary_emb",
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
        _decoder("llama"),
        _decoder("mistral"),
        _decoder("qwen2"),
        replace(
            _decoder("qwen3"),
            attention=ATTENTION_OF_LLAMA._replace(norms=("self_attn.q_norm", "self_attn.k_norm")),
        ),
        replace(
            _decoder("gpt2"),
            backbone="transformer",
            blocks="h",
            embeddings="wte",
            attention=AttentionPaths(
                ("attn.c_attn", "attn.c_attn", "attn.c_attn"), "attn.c_proj", "attn"
            ),
            feed_forward=FeedForwardPaths(("mlp.c_fc",), "mlp.c_proj"),
            neurons="n_inner",
            rotary=None,
        ),
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
        if not entry.shares_bias
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
