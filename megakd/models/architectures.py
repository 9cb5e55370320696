"""Where the parts of a model are: found by structure, with what structure cannot tell.

Only the table `FAMILIES` states how families differ, and only in facts that are not found.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)

from megakd.contract.batch import LogitWarp
from megakd.contract.tasks import TaskType
from megakd.contract.views import Heads, Kind, View
from megakd.errors import ModelError
from megakd.models.modeling import modeling_cut
from megakd.models.paths import AttentionPaths, FeedForwardPaths
from megakd.models.proposed_units import FoundUnits

T = TypeVar("T")
IDENTITY = LogitWarp()
# Config keys of a cut model, whose layers differ in shape.
HEAD_COUNTS, NEURON_COUNTS, HEAD_WIDTH = "head_counts", "neuron_counts", "head_width"
QUERIES_PER_KEY, SCORE_WIDTH = "queries_per_key", "score_width"
# Also of a model whose sorted heads have columns in a shared bias.
HEAD_COLUMNS = "head_columns"
NARROW = "narrow"
"""Key of a cut model of any other family, see `narrow_class`; its type has this word before it."""
CUT_CONFIG = re.compile(r"Cut\w+Config")
SCORE_CAP = "attn_logit_softcapping"
"""Key of a cap on attention scores, which fused attentions lack."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Locations of the parts of a model.

    An entry of the table lacks what `models.structure` finds, such as the backbone and the head.

    backbone, head: attribute paths on the model with a head.
    renewed: modules that belong to the task in addition to the head; a checkpoint may lack them.
    layers: key of the config.
    blocks: path on the backbone of the list of layers; of one module that runs for each layer, if
        it `repeats`; or of a list with a part of each layer. None: layers are not found.
    parts: paths of the lists with the other parts of each layer (XLM), likewise.
    repeats: all layers are one module (ALBERT).
    reads_states: each layer is a module that gives the hidden states of the tokens.
    embeddings: path on the backbone of the module that makes the first hidden states of tokens.
    attention: module paths of an attention, relative to its layer.
    feed_forward: module paths of a feed-forward, relative to its layer.
    more_attentions: attentions outside the layers, paths on the model with a head; counted last.
    more_feed_forwards: feed-forwards outside the layers, likewise.
    more_blocks: layers of a second stream of hidden states of the same width, likewise.
    neurons: key of the config.
    shares_bias: all layers share a position bias with one column per head.
    cuts_inside_heads: the columns of a head can be cut one by one; rotary positions pair columns,
        so that such families lose whole heads.
    has_sinks: attentions have a learned score besides the keys, which fused attentions lack.
    shows_attention: each layer calls an attention of transformers with queries, keys and values.
    experts: path on the model of a block that routes tokens to experts; None: a dense model.
    find_units: looks for heads and neurons; None: the table states them.
    output: path of the output matrix of a language model.
    bias: path of a weight outside the head that the model adds to the product with this matrix.
    warp: what becomes of this sum.
    reads_head_input: the input of this matrix is not what the backbone returns.
    """

    model_type: str
    tasks: tuple[TaskType, ...]
    backbone: str = ""
    head: str = ""
    renewed: tuple[str, ...] = ()
    layers: str = "num_hidden_layers"
    blocks: str | None = None
    parts: tuple[str, ...] = ()
    repeats: bool = False
    reads_states: bool = True
    embeddings: str = "embeddings"
    attention: AttentionPaths | None = None
    feed_forward: FeedForwardPaths | None = None
    more_attentions: tuple[AttentionPaths, ...] = ()
    more_feed_forwards: tuple[FeedForwardPaths, ...] = ()
    more_blocks: tuple[str, ...] = ()
    neurons: str = "intermediate_size"
    shares_bias: bool = False
    cuts_inside_heads: bool = False
    has_sinks: bool = False
    shows_attention: bool = True
    experts: str | None = None
    find_units: Callable[[PretrainedConfig, Architecture], FoundUnits] | None = None
    output: str | None = None
    bias: str | None = None
    warp: LogitWarp = IDENTITY
    reads_head_input: bool = False

    def number_of_layers(self, config: PretrainedConfig) -> int:
        if hasattr(config, self.layers):
            return getattr(config, self.layers)
        return getattr(config.get_text_config(decoder=True), self.layers)

    def hidden_width(self, config: PretrainedConfig) -> int:
        """Return the width D of the hidden states."""
        return config.hidden_size

    def heads(self, config: PretrainedConfig) -> Heads:
        """Return the numbers of query heads and key heads, and the width of a head."""
        # A recurrent model has no heads.
        queries = stated(config, "num_attention_heads") or 1
        keys = stated(config, "num_key_value_heads") or queries
        width = stated(config, HEAD_WIDTH) or stated(config, "head_dim")
        width = width or self.hidden_width(config) // queries
        return Heads(queries, keys, width)

    def lacking_in_fused_attention(self, config: PretrainedConfig) -> str | None:
        """Return the part of a model's attention that sdpa and varlen lack; None: no part."""
        if self.has_sinks:
            return "attention sinks"
        cap = stated(config, SCORE_CAP)
        return None if cap is None else f"a cap on attention scores ({SCORE_CAP}: {cap})"

    def score_width(self, config: PretrainedConfig) -> int:
        """Return the width whose root divides attention scores; a cut head may be narrower."""
        return getattr(config, SCORE_WIDTH, None) or self.heads(config).width

    def backbone_of(self, model: nn.Module) -> nn.Module:
        """Return the module that produces hidden states."""
        return model.get_submodule(self.backbone)

    def language_head_of(self, model: nn.Module) -> nn.Module:
        """Return the module with the output matrix of a causal or masked language model."""
        if self.output is None:
            raise TypeError(f"a {self.model_type} model for {self.tasks[0]} has no output matrix")
        return model.get_submodule(self.output)

    def check_layers(self) -> None:
        """Raise if the hidden states of the layers cannot be read."""
        if not self.reads_states:
            raise ModelError(
                f"a {self.model_type} model has no list of layers that each give the hidden states "
                "of its tokens: losses of layers (hidden_mse, relation_kl …) cannot read it; "
                "soft_target_kl and hard_cross_entropy can"
            )

    def block_of(self, model: nn.Module, layer: int) -> nn.Module:
        """Return a layer; layers are counted from 1."""
        return self.backbone_of(model).get_submodule(f"{self.blocks}.{layer - 1}")

    def check_attentions(self) -> None:
        """Raise if queries, keys and values of the layers cannot be read."""
        if not self.shows_attention:
            raise ModelError(
                f"attention_mse and relation_kl cannot read the attentions of a {self.model_type} "
                "model: not each layer calls one of transformers' attentions with queries, keys "
                "and values; use hidden_mse"
            )

    def found_units(self, config: PretrainedConfig) -> FoundUnits:
        """Return what can be cut of a model that the table does not have."""
        if self.find_units is None:
            raise TypeError(f"the table states the units of {self.model_type}")
        return self.find_units(config, self)

    @property
    def is_listed(self) -> bool:
        """True for a model whose heads and neurons the table states."""
        return self.find_units is None

    def attentions(self, config: PretrainedConfig) -> tuple[AttentionPaths | None, ...]:
        """Return the attentions of all layers; None: a layer has none whose heads can be cut."""
        if self.attention is None:
            return self.found_units(config).attentions
        layers = tuple(self.attention.under(block) for block in self._blocks(config))
        return layers + self.more_attentions

    def feed_forwards(self, config: PretrainedConfig) -> tuple[FeedForwardPaths | None, ...]:
        """Return the feed-forwards of all layers, likewise."""
        if self.feed_forward is None:
            return self.found_units(config).feed_forwards
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
        numbers = [""] if self.repeats else [f".{n}" for n in range(self.number_of_layers(config))]
        lists = [f"{self.backbone}.{path}" for path in (self.blocks, *self.parts)]
        return [f"{path}{number}" for number in numbers for path in lists]

    def rows_of_heads(self, config: PretrainedConfig) -> int:
        """Return the number of rows by which a key-value group makes keys."""
        if self.is_listed:
            return self.heads(config).width
        layers = self.found_units(config).heads.layers
        return max((units.width for units in layers if units is not None), default=1)

    def filled_kinds(self, config: PretrainedConfig) -> set[Kind]:
        """Return the units whose maps run with zeros for those that a view lacks.

        The modules between these maps do not take fewer units.
        """
        if self.is_listed:
            return set()
        heads, neurons, _ = self.found_units(config)
        kinds: tuple[Kind, Kind] = ("heads", "neurons")
        return {k for k, c in zip(kinds, (heads, neurons), strict=True) if not c.is_narrow}

    def why_uncut(self, config: PretrainedConfig) -> str | None:
        """Return the reason why no units can be cut; None: some can."""
        if self.is_listed:
            return None
        heads, neurons, _ = self.found_units(config)
        if heads.uncut is None or neurons.uncut is None:
            return None
        if heads.uncut == neurons.uncut:
            return heads.uncut
        return f"of its heads, {heads.uncut}, and of its neurons, {neurons.uncut}"

    def units(self, config: PretrainedConfig) -> View:
        """Return the numbers of units of a config's model; the config of a cut model lists them.

        A model that was found keeps its width, and its layers have 0 of the units that cannot go.
        """
        reason = self.why_uncut(config)
        if reason is not None:
            raise ModelError(
                f"a {config.model_type} model cannot be cut in width, heads or neurons: "
                f"{reason}; use student.layers to keep some of its layers, or another family"
            )
        if not self.is_listed:
            heads, neurons = (
                tuple(0 if units is None else units.total for units in cuttable.layers)
                for cuttable in self.found_units(config)[:2]
            )
            return View(heads, neurons)
        counts = [getattr(config, key, None) for key in (HEAD_COUNTS, NEURON_COUNTS)]
        attentions, feed_forwards = len(self.attentions(config)), len(self.feed_forwards(config))
        # The value may be None in GPT-2's config.
        whole = getattr(config, self.neurons) or 4 * self.hidden_width(config)
        return View(
            heads=tuple(counts[0] or (self.heads(config).keys,) * attentions),
            neurons=tuple(counts[1] or (whole,) * feed_forwards),
            width=self.hidden_width(config),
        )

    def prunable(self, config: PretrainedConfig) -> View:
        """Return the units; `head_width` is set if columns of heads can be cut one by one."""
        width = self.heads(config).width if self.cuts_inside_heads else None
        return self.units(config)._replace(head_width=width)

    def of_the_task(self, name: str) -> bool:
        """Return true if a parameter belongs to the task and not to the backbone."""
        return name.startswith(tuple(f"{module}." for module in (self.head, *self.renewed)))


SEQUENCE_TASKS: tuple[TaskType, ...] = ("classification", "regression")
AUTO_CLASSES: Mapping[TaskType, type] = {
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "mlm": AutoModelForMaskedLM,
    "causal_lm": AutoModelForCausalLM,
}

CLASS_ENDINGS: Mapping[str, TaskType] = {
    "ForSequenceClassification": "classification",
    "ForMaskedLM": "mlm",
    "WithLMHeadModel": "mlm",  # of XLM and FlauBERT
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
}

ROUTES_TOKENS = "a router chooses the experts of each token"


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


def _cuttable(config: Any) -> Architecture:
    """Return the entry of a family with cut models, whose config says where the units are."""
    parts, model_type = config.parts, config.model_type.removeprefix("cut_")
    keys = [f"{parts.core}.{name}" for name in parts.keys or (parts.queries,) * 2]
    is_encoder = model_type in ENCODERS
    return Architecture(
        model_type=model_type,
        tasks=(*SEQUENCE_TASKS, "mlm") if is_encoder else ("causal_lm",),
        attention=AttentionPaths(
            (f"{parts.core}.{parts.queries}", keys[0], keys[1]), parts.output, parts.core
        ),
        feed_forward=FeedForwardPaths(parts.inputs, parts.down),
        neurons=parts.neurons,
        cuts_inside_heads=is_encoder,
    )


ENCODERS = ("bert", "roberta", "distilbert", "electra")
FAMILIES: Mapping[str, Architecture] = {
    entry.model_type: entry
    for entry in (
        *(_cuttable(one) for name, one in vars(modeling_cut).items() if CUT_CONFIG.fullmatch(name)),
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
        if not entry.shares_bias
    },
}


def narrow_maps(config: PretrainedConfig) -> dict[str, Any] | None:
    """Return the maps that are narrower than the other keys of a config say; None: none is."""
    return getattr(config, NARROW, None)


def class_for(config: PretrainedConfig, task: TaskType) -> type | None:
    """Return transformers' class for a task, or megakd's; None: there is none."""
    classes = AUTO_CLASSES[task]._model_mapping  # noqa: SLF001  (nothing public has it)
    stock = classes.get(type(config), None)
    return (
        stock if stock is None or narrow_maps(config) is None else modeling_cut.narrow_class(stock)
    )


def class_name(config: PretrainedConfig, task: TaskType) -> str | None:
    """Return the name of the class for a task; None: there is none."""
    model_class = class_for(config, task)
    return None if model_class is None else model_class.__name__


class Known(Generic[T]):
    """Answers about configs, each found once for configs that differ in the keys `without` alone.

    Args:
        find: finds the answer for a config and facts.
    """

    def __init__(self, find: Callable[..., T], *, without: Collection[str]) -> None:
        self._find, self._without = find, without
        self._by_content: dict[str, T] = {}
        self._by_config: dict[Any, tuple[weakref.ref[PretrainedConfig], T]] = {}

    def of(self, config: PretrainedConfig, *facts: Any) -> T:
        """Return the answer; only a config that was not seen yet is written out and compared."""
        key = (id(config), *facts)
        known = self._by_config.get(key)
        if known is None or known[0]() is not config:
            content = self._content(config, *facts)
            if content not in self._by_content:
                self._by_content[content] = self._find(config, *facts)
            known = self._by_config[key] = weakref.ref(config), self._by_content[content]
        return known[1]

    def note(self, answer: T, config: PretrainedConfig, *facts: Any) -> None:
        """Take an answer as that for a config and facts."""
        self._by_content[self._content(config, *facts)] = answer

    def _content(self, config: PretrainedConfig, *facts: Any) -> str:
        values = {key: v for key, v in config.to_dict().items() if key not in self._without}
        return json.dumps([*facts, values], sort_keys=True, default=str)


def architecture_named(model_type: str) -> Architecture:
    """Return the entry of a family of the table."""
    return ARCHITECTURES[model_type]


COUNTING = (
    *("roberta", "camembert", "longformer", "mpnet", "data2vec-text", "xmod", "ibert", "luke"),
    *("markuplm", "lilt"),
)
"""Names in the types of models that look up positions from the padding id on."""


def counts_padding(config: PretrainedConfig) -> bool:
    """Return whether position ids start after the padding id, which leaves fewer positions."""
    return any(name in config.model_type for name in COUNTING)


def has_token_types(config: PretrainedConfig) -> bool:
    """Return whether a model tells the texts of a pair apart; else it gets no token_type_ids."""
    return getattr(config, "type_vocab_size", 0) > 1


def stated(config: PretrainedConfig, key: str) -> Any:
    """Return the value of a key that holds for all layers; None: there is none."""
    try:
        return getattr(config, key, None)
    except RuntimeError:  # transformers': the values of the layers differ (Gemma 4)
        return None


def context_length(config: PretrainedConfig) -> int | None:
    """Return the largest number of tokens of a text; None if the config states no limit."""
    text = config.get_text_config(decoder=True)
    count = getattr(text, "max_position_embeddings", None)
    if count is None or not counts_padding(text):
        return count
    return count - (text.pad_token_id or 0) - 1
