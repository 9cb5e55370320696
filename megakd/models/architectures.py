"""Model families known to megakd: where their parts are and how they compute their logits.

Only the table `FAMILIES` states how the families differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Literal, NamedTuple

from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)
from transformers.activations import ACT2FN

from megakd.contract.batch import LogitWarp
from megakd.contract.tasks import TaskType
from megakd.contract.views import Heads, View
from megakd.errors import ModelError

# Config keys of a cut model, whose layers differ in shape.
HEAD_COUNTS, NEURON_COUNTS, HEAD_WIDTH = "head_counts", "neuron_counts", "head_width"
QUERIES_PER_KEY, SCORE_WIDTH = "queries_per_key", "score_width"
# Also of a model whose sorted heads have columns in a shared bias.
HEAD_COLUMNS = "head_columns"
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
        layers = [self.feed_forward.under(block) for block in self._blocks(config)]
        is_gated = bool(getattr(config, "is_gated_act", False))
        return tuple(
            FeedForwardPaths(
                paths.gated if is_gated and paths.gated else paths.inputs, paths.output
            )
            for paths in (*layers, *self.more_feed_forwards)
        )

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
        # The value may be None in GPT-2's config.
        whole = getattr(config, self.neurons) or 4 * self.hidden_width(config)
        return View(
            heads=tuple(heads or (self.heads(config).keys,) * attentions),
            neurons=tuple(neurons or (whole,) * feed_forwards),
            width=self.hidden_width(config),
        )

    def prunable(self, config: PretrainedConfig) -> View:
        """Return the units; `head_width` is set if columns of heads can be cut one by one."""
        width = self.heads(config).width if self.cuts_inside_heads else None
        return self.units(config)._replace(head_width=width)

    def rotary_of(self, model: nn.Module) -> nn.Module | None:
        """Return the module that makes rotary cosines and sines; None if the family has none."""
        return None if self.rotary is None else self.backbone_of(model).get_submodule(self.rotary)

    def of_the_task(self, name: str) -> bool:
        """Return true if a parameter belongs to the task and not to the backbone."""
        return any(name.startswith(f"{module}.") for module in (self.head, *self.renewed))


SEQUENCE_TASKS: tuple[TaskType, ...] = ("classification", "regression")
AUTO_CLASSES: Mapping[TaskType, type] = {
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "mlm": AutoModelForMaskedLM,
    "causal_lm": AutoModelForCausalLM,
}

ATTENTION_OF_LLAMA = AttentionPaths(
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj", "self_attn"
)
HEAD_NORMS = ATTENTION_OF_LLAMA._replace(norms=("self_attn.q_norm", "self_attn.k_norm"))
ROUTES_TOKENS = "a router chooses the experts of each token"

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
    # The head of the generator; a discriminator has none.
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
        cuts_inside_heads=True,
    )


def _attention_of_t5(module: str) -> AttentionPaths:
    return AttentionPaths((f"{module}.q", f"{module}.k", f"{module}.v"), f"{module}.o", module)


def _feed_forward_of_t5(module: str) -> FeedForwardPaths:
    return FeedForwardPaths(
        (f"{module}.wi",), f"{module}.wo", gated=(f"{module}.wi_0", f"{module}.wi_1")
    )


def _t5(model_type: str) -> Architecture:
    return Architecture(
        model_type=model_type,
        tasks=SEQUENCE_TASKS,
        backbone="encoder",
        head="classifier",
        blocks="block",
        embeddings="embed_tokens",
        attention=_attention_of_t5("layer.0.SelfAttention"),
        feed_forward=_feed_forward_of_t5("layer.1.DenseReluDense"),
        neurons="d_ff",
        shares_bias=True,
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


DECODERS = (
    _decoder("llama"),
    _decoder("mistral"),
    _decoder("qwen2"),
    replace(_decoder("qwen3"), attention=HEAD_NORMS),
    replace(
        _decoder("gemma2"),
        logit_softcap="final_logit_softcapping",
        score_softcap="attn_logit_softcapping",
    ),
    replace(
        _decoder("gemma3_text"),
        attention=HEAD_NORMS,
        norms_by_head=True,
        logit_softcap="final_logit_softcapping",
    ),
    replace(
        _decoder("phi"),
        attention=ATTENTION_OF_LLAMA._replace(output="self_attn.dense"),
        feed_forward=FeedForwardPaths(("mlp.fc1",), "mlp.fc2"),
    ),
    replace(
        _decoder("phi3"),
        attention=ATTENTION_OF_LLAMA._replace(projections=("self_attn.qkv_proj",) * 3),
        feed_forward=FeedForwardPaths(("mlp.gate_up_proj",), "mlp.down_proj"),
        uncut="one matrix makes queries, keys and values, and another one gates and neurons",
    ),
    replace(_decoder("granite"), logit_divisor="logits_scaling"),
    replace(
        _decoder("gpt_oss"),
        has_sinks=True,
        masks_documents=False,
        rotary_form="half_width",
        experts="mlp",
        uncut=ROUTES_TOKENS,
    ),
    replace(
        _decoder("qwen3_moe"),
        attention=HEAD_NORMS,
        neurons="moe_intermediate_size",
        experts="mlp",
        uncut=ROUTES_TOKENS,
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
)

FAMILIES: Mapping[str, Architecture] = {
    entry.model_type: entry
    for entry in (
        _encoder("bert", renewed=("bert.pooler",)),
        _encoder("roberta"),
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
                _attention_of_t5("decoder.block.0.layer.0.SelfAttention"),
                _attention_of_t5("decoder.block.0.layer.1.EncDecAttention"),
            ),
            more_feed_forwards=(_feed_forward_of_t5("decoder.block.0.layer.2.DenseReluDense"),),
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
    """Return the entry of a model's family."""
    return architecture_named(config.model_type)


def architecture_named(model_type: str, task: TaskType | None = None) -> Architecture:
    """Return the entry of `model_type`, with the head of `task` if a task is given."""
    known = ", ".join(a.model_type for a in FAMILIES.values() if task in (None, *a.tasks))
    architecture = ARCHITECTURES.get(model_type)
    if architecture is None:
        needed = [field.name for field in fields(Architecture) if field.default is MISSING]
        others = [field.name for field in fields(Architecture) if field.default is not MISSING]
        hint = (
            f"; or add the family to FAMILIES in {__name__.replace('.', '/')}.py: an Architecture "
            f"with {', '.join(needed)}, and, where the family differs from BERT, "
            f"{', '.join(others)}"
        )
        raise ModelError(f"model_type {model_type!r} is not supported; use one of {known}{hint}")
    if task is not None and task not in architecture.tasks:
        raise ModelError(
            f"model_type {model_type!r} supports {', '.join(architecture.tasks)} and not task.type "
            f"{task}; use one of {known}"
        )
    return architecture if task is None else architecture.for_task(task)


def counts_padding(config: PretrainedConfig) -> bool:
    """Return whether position ids start after the padding id, which leaves fewer positions."""
    counting = ("roberta", "camembert", "longformer", "mpnet")
    return any(name in config.model_type for name in counting)


def has_token_types(config: PretrainedConfig) -> bool:
    """Return whether a model tells the texts of a pair apart; else it gets no token_type_ids."""
    return getattr(config, "type_vocab_size", 0) > 1


def context_length(config: PretrainedConfig) -> int | None:
    """Return the largest number of tokens of a text; None if the config states no limit."""
    text = config.get_text_config(decoder=True)
    count = getattr(text, "max_position_embeddings", None)
    if count is None or not counts_padding(text):
        return count
    return count - (text.pad_token_id or 0) - 1
