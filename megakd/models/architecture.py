"""Description of one model family: where its parts are and how it computes its logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from torch import Tensor, nn
from transformers import PretrainedConfig

from megakd.contract.batch import LogitWarp
from megakd.contract.tasks import TaskType
from megakd.contract.views import Heads, View
from megakd.errors import ModelError

# Config keys of a cut model, whose layers differ in shape.
HEAD_COUNTS, NEURON_COUNTS, HEAD_WIDTH = "head_counts", "neuron_counts", "head_width"
QUERIES_PER_KEY = "queries_per_key"
SCORE_WIDTH = "score_width"
"""Config key of a cut model: the width whose root divides attention scores."""
HEAD_COLUMNS = "head_columns"
"""Config key of a cut model, and of a model whose sorted heads have columns in a shared bias."""
RotaryForm = Literal["halves", "half_width"]


class AttentionPaths(NamedTuple):
    """The modules of one attention.

    projections: paths of queries, keys and values; equal paths if one module makes all three.
    output: the module that takes the concatenated heads.
    core: the module that splits vectors into heads and mixes them; it fails without heads.
    norms: norms of queries and of keys after the projections, per head; None: no norms.
    """

    projections: tuple[str, str, str]
    output: str
    core: str
    norms: tuple[str, str] | None = None

    @property
    def is_fused(self) -> bool:
        """True if one module makes queries, keys and values, concatenated."""
        return len(set(self.projections)) == 1

    @property
    def makers(self) -> tuple[str, ...]:
        return (*self.projections, self.output)

    @property
    def vectors(self) -> tuple[str, str, str]:
        """Paths of the modules that produce the queries, keys and values for the core."""
        queries, keys = self.norms or self.projections[:2]
        return queries, keys, self.projections[2]

    def under(self, module: str) -> AttentionPaths:
        """Return the same paths, relative to the owner of `module`."""
        queries, keys, values = (f"{module}.{path}" for path in self.projections)
        norms = self.norms and (f"{module}.{self.norms[0]}", f"{module}.{self.norms[1]}")
        return AttentionPaths(
            (queries, keys, values), f"{module}.{self.output}", f"{module}.{self.core}", norms
        )


class FeedForwardPaths(NamedTuple):
    """The modules of one feed-forward.

    inputs: the modules that make the neurons.
    output: the module that takes the neurons.
    gated: replaces `inputs` if the config sets `is_gated_act`, in families that have both kinds.
    """

    inputs: tuple[str, ...]
    output: str
    gated: tuple[str, ...] = ()

    @property
    def makers(self) -> tuple[str, ...]:
        return (*self.inputs, self.output)

    def of_kind(self, *, is_gated: bool) -> FeedForwardPaths:
        return FeedForwardPaths(self.gated if is_gated and self.gated else self.inputs, self.output)

    def under(self, module: str) -> FeedForwardPaths:
        inputs, gated = (
            tuple(f"{module}.{path}" for path in paths) for paths in (self.inputs, self.gated)
        )
        return FeedForwardPaths(inputs, f"{module}.{self.output}", gated)


@dataclass(frozen=True, kw_only=True)
class MaskedHead:
    """The head of a family's masked language models.

    modules: attribute paths of all modules that belong to the head.
    transform: the steps between the hidden states and the decoder, in order: paths of modules, and
        functions for steps that are no module.
    decoder: path of the output matrix [V, D] with its bias [V]; the matrix is the embedding unless
        the config unties them.
    """

    modules: tuple[str, ...]
    transform: tuple[str | Callable[[Tensor], Tensor], ...]
    decoder: str


ATTENTION_OF_BERT = AttentionPaths(
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output.dense",
    "attention.self",
)
FEED_FORWARD_OF_BERT = FeedForwardPaths(("intermediate.dense",), "output.dense")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Locations of the parts of a model, for one model family.

    backbone, head: attribute paths on the model with a head.
    renewed: modules that belong to the task in addition to the head; a checkpoint may lack them.
    masked: replaces `head` and `renewed` in masked language models; None if there are none.
    layers, width, attention_heads: keys of the config.
    blocks: path on the backbone of the list of layers.
    embeddings: path on the backbone of the module that makes the first hidden states of tokens.
    final_norm: path on the backbone of the norm after the last layer; None: the family has none.
    attention: module paths of an attention, relative to its layer.
    feed_forward: module paths of a feed-forward, relative to its layer.
    more_attentions: attentions outside the layers, paths on the model with a head; counted last.
    more_feed_forwards: feed-forwards outside the layers, likewise.
    more_blocks: layers of a second stream of hidden states of the same width, likewise.
    neurons: key of the config.
    rotary: path on the backbone of the module that makes the rotary cosines and sines.
    shares_bias: all layers share a position bias with one column per head.
    cuts_inside_heads: the columns of a head can be cut one by one; rotary positions pair columns,
        so that such families lose whole heads.
    logit_divisor: config key of a number that logits are divided by.
    logit_softcap: config key of c in c tanh(z / c), computed of logits z; the value may be None.
    score_softcap: config key of a cap on attention scores, which fused attentions lack.
    has_sinks: attentions have a learned score besides the keys, which fused attentions lack.
    masks_documents: the masks of the backbone separate packed documents.
    rotary_form: the rotary module gives a cosine for each column of the `halves` of a head, or
        (`half_width`) for each pair of columns.
    norms_by_head: norms of queries and keys run on [B, heads, T, width], not on
        [B, T, heads, width].
    experts: path on a layer of the block that routes tokens to experts; None: a dense model.
    uncut: reason why heads, neurons and width of the family cannot be cut; None: they can.
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
    final_norm: str | None = None
    attention: AttentionPaths = ATTENTION_OF_BERT
    feed_forward: FeedForwardPaths = FEED_FORWARD_OF_BERT
    more_attentions: tuple[AttentionPaths, ...] = ()
    more_feed_forwards: tuple[FeedForwardPaths, ...] = ()
    more_blocks: tuple[str, ...] = ()
    neurons: str = "intermediate_size"
    rotary: str | None = None
    shares_bias: bool = False
    cuts_inside_heads: bool = False
    logit_divisor: str | None = None
    logit_softcap: str | None = None
    score_softcap: str | None = None
    has_sinks: bool = False
    masks_documents: bool = True
    rotary_form: RotaryForm = "halves"
    norms_by_head: bool = False
    experts: str | None = None
    uncut: str | None = None

    def number_of_layers(self, config: PretrainedConfig) -> int:
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

    def logit_warp(self, config: PretrainedConfig) -> LogitWarp:
        divisor = 1.0 if self.logit_divisor is None else float(getattr(config, self.logit_divisor))
        softcap = None if self.logit_softcap is None else getattr(config, self.logit_softcap)
        return LogitWarp(1.0 / divisor, None if softcap is None else float(softcap))

    def lacking_in_fused_attention(self, config: PretrainedConfig) -> str | None:
        """Return the part of a model's attention that sdpa and varlen lack; None: no part."""
        if self.has_sinks:
            return "attention sinks"
        cap = None if self.score_softcap is None else getattr(config, self.score_softcap)
        return None if cap is None else f"a cap on attention scores ({self.score_softcap}: {cap})"

    def score_width(self, config: PretrainedConfig) -> int:
        """Return the width whose root divides attention scores; a cut head may be narrower."""
        return getattr(config, SCORE_WIDTH, None) or self.heads(config).width

    def backbone_of(self, model: nn.Module) -> nn.Module:
        """Return the module that produces hidden states."""
        return model.get_submodule(self.backbone)

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
        if getattr(model.config, "qk_layernorm", False) and self.attention.norms is None:
            raise ModelError(
                "attention_mse and relation_kl do not support a model with qk_layernorm: true; use "
                "hidden_mse"
            )
        block = self.block_of(model, layer)
        return tuple(block.get_submodule(path) for path in self.attention.vectors)

    def attentions(self, config: PretrainedConfig) -> tuple[AttentionPaths, ...]:
        layers = tuple(self.attention.under(block) for block in self._blocks(config))
        return layers + self.more_attentions

    def feed_forwards(self, config: PretrainedConfig) -> tuple[FeedForwardPaths, ...]:
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
        if self.uncut is not None:
            raise ModelError(
                f"a {config.model_type} model cannot be cut in width, heads or neurons: "
                f"{self.uncut}; use student.layers to keep some of its layers, or another family"
            )
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


_COUNT_FROM_PADDING = ("roberta", "camembert", "longformer", "mpnet")
"""Parts of the model types that `counts_padding`."""


def counts_padding(config: PretrainedConfig) -> bool:
    """Return whether position ids start after the padding id, which leaves fewer positions."""
    return any(name in config.model_type for name in _COUNT_FROM_PADDING)


def has_token_types(config: PretrainedConfig) -> bool:
    """Return whether a model tells the texts of a pair apart; else it gets no token_type_ids."""
    return getattr(config, "type_vocab_size", 0) > 1


def context_length(config: PretrainedConfig) -> int | None:
    """Return the largest number of tokens of a text; None if the config states no limit."""
    text = config.get_text_config(decoder=True)
    count = getattr(text, "max_position_embeddings", None)
    return None if count is None else _tokens_at(count, text)


def _tokens_at(positions: int, config: PretrainedConfig) -> int:
    return positions - (config.pad_token_id or 0) - 1 if counts_padding(config) else positions
