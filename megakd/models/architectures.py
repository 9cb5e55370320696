"""Where the parts of a model are: found by structure, with what structure cannot tell."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import math
import re
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)

from megakd.config.task import LANGUAGE_TASKS, TaskType
from megakd.config.terms import Heads
from megakd.data.batch import LogitWarp
from megakd.errors import ModelError, one_line
from megakd.models.modeling import modeling_cut, modeling_t5
from megakd.models.proposed_units import FoundUnits
from megakd.models.views import View

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

T = TypeVar("T")

IDENTITY = LogitWarp()

# Config keys of a cut T5, whose layers differ in shape, and whose sorted heads have columns in a
# bias that all layers share.
HEAD_COUNTS, NEURON_COUNTS, HEAD_WIDTH = "head_counts", "neuron_counts", "head_width"

HEAD_COLUMNS = "head_columns"

NARROW = "narrow"
"""Key of a cut model of any other family, see `narrow_class`; its type has this word before it."""

SCORE_CAP = "attn_logit_softcapping"
"""Key of a cap on attention scores, which fused attentions lack."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Locations of the parts of a model.

    backbone, head: attribute paths on the model with a head.
    renewed: modules that belong to the task in addition to the head; a checkpoint may lack them.
    layers: key of the config.
    blocks: path on the backbone of the list of layers; of one module that runs for each layer, if
        it `repeats`; or of a list with a part of each layer. None: layers are not found.
    parts: paths of the lists with the other parts of each layer (XLM), likewise.
    repeats: all layers are one module (ALBERT).
    reads_states: each layer is a module that gives the hidden states of the tokens.
    embeddings: path on the backbone of the module that makes the first hidden states of tokens.
    more_blocks: layers of a second stream of hidden states of the same width, paths on the model
        with a head.
    shares_bias: all layers share a position bias with one column per head, as in T5, whose config
        states all shapes.
    has_sinks: attentions have a learned score besides the keys, which fused attentions lack.
    shows_attention: each layer calls an attention of transformers with queries, keys and values.
    experts: path on the model of a block that routes tokens to experts; None: a dense model.
    find_units: looks for heads and neurons.
    bias: path of a weight outside the head that a language model adds to the product with its
        output matrix.
    warp: what becomes of this sum.
    reads_head_input: the input of this matrix is not what the backbone returns.
    """

    model_type: str
    find_units: Callable[[PretrainedConfig, Architecture], FoundUnits]
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
    more_blocks: tuple[str, ...] = ()
    shares_bias: bool = False
    has_sinks: bool = False
    shows_attention: bool = True
    experts: str | None = None
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
        narrow = narrow_maps(config)
        if narrow is not None:
            layers = [units for units in narrow["heads"]["layers"] if units is not None]
            if layers:
                most = max(units["total"] for units in layers)
                return Heads(most * (queries // keys), most, layers[0]["width"])
        width = stated(config, HEAD_WIDTH) or stated(config, "head_dim")
        whole = ((narrow or {}).get("stock") or {}).get("hidden_size", self.hidden_width(config))
        return Heads(queries, keys, width or whole // queries)

    def lacking_in_fused_attention(self, config: PretrainedConfig) -> str | None:
        """Return the part of a model's attention that sdpa and varlen lack; None: no part."""
        if self.has_sinks:
            return "attention sinks"
        cap = stated(config, SCORE_CAP)
        return None if cap is None else f"a cap on attention scores ({SCORE_CAP}: {cap})"

    def score_width(self, config: PretrainedConfig) -> int:
        """Return the width whose root divides attention scores; a cut head may be narrower."""
        return (narrow_maps(config) or {}).get("score_width") or self.heads(config).width

    def backbone_of(self, model: nn.Module) -> nn.Module:
        """Return the module that produces hidden states."""
        return model.get_submodule(self.backbone)

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
        """Return the heads and neurons that can be cut."""
        return self.find_units(config, self)

    def layer_paths(self, config: PretrainedConfig) -> list[str]:
        """Return the paths on the model of the layers that hidden states pass through."""
        numbers = [""] if self.repeats else [f".{n}" for n in range(self.number_of_layers(config))]
        lists = [f"{self.backbone}.{path}" for path in (self.blocks, *self.parts)]
        return [*(f"{path}{number}" for number in numbers for path in lists), *self.more_blocks]

    def rows_of_heads(self, config: PretrainedConfig) -> int:
        """Return the number of rows by which a key-value group makes keys."""
        layers = self.found_units(config).heads.layers
        return max((units.width for units in layers if units is not None), default=1)

    def why_uncut(self, config: PretrainedConfig) -> str | None:
        """Return the reason why no units can be cut; None: some can."""
        found = self.found_units(config)
        heads, neurons = found.heads, found.neurons
        if heads.why_fixed is None or neurons.why_fixed is None:
            return None
        if heads.why_fixed == neurons.why_fixed:
            return heads.why_fixed
        return f"of its heads, {heads.why_fixed}, and of its neurons, {neurons.why_fixed}"

    def units(self, config: PretrainedConfig) -> View:
        """Return the numbers of units of a config's model; layers have 0 of those that stay.

        The width is None where hidden states keep all their columns.
        """
        reason = self.why_uncut(config)
        if reason is not None:
            raise ModelError(
                f"a {config.model_type} model cannot be cut in width, heads or neurons: "
                f"{reason}; use student.layers to keep some of its layers, or another family"
            )
        found = self.found_units(config)
        width = self.hidden_width(config) if found.rigid is None else None
        return View(found.heads.counts, found.neurons.counts, width)

    def prunable(self, config: PretrainedConfig) -> View:
        """Return the units; `head_width` is set if columns of heads can be cut one by one."""
        found = self.found_units(config)
        is_cut = found.rigid is None and found.heads.can_lose_columns
        return self.units(config)._replace(head_width=self.heads(config).width if is_cut else None)

    def of_the_task(self, name: str) -> bool:
        """Return true if a parameter belongs to the task and not to the backbone."""
        return name.startswith(tuple(f"{module}." for module in (self.head, *self.renewed)))


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


# Cutting follows the config of the file that is stored with these models. A cut attention may have
# no head, and thus no vectors.
_T5 = {"shares_bias": True, "shows_attention": True}

STATED: Mapping[str, Mapping[str, Any]] = {
    "t5_encoder": _T5,
    "enct5": {
        **_T5,
        # The decoder's only token is the learned prompt; its layer is one of a published T5.
        "head": "classifier",
        "renewed": ("decoder.embed_tokens",),
        "more_blocks": ("decoder.block.0",),
    },
}
"""By model type, what structure cannot tell of T5's encoders."""


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

    def answer(self, config: PretrainedConfig, *facts: Any) -> T:
        """Return the answer; only a config that was not seen yet is written out and compared."""
        key = (id(config), *facts)
        known = self._by_config.get(key)
        if known is None or known[0]() is not config:
            content = self._content(config, *facts)
            if content not in self._by_content:
                self._by_content[content] = self._find(config, *facts)
            known = self._by_config[key] = weakref.ref(config), self._by_content[content]
        return known[1]

    def _content(self, config: PretrainedConfig, *facts: Any) -> str:
        values = {key: v for key, v in config.to_dict().items() if key not in self._without}
        return json.dumps([*facts, values], sort_keys=True, default=str)


COUNTING = (
    *("roberta", "camembert", "longformer", "mpnet", "data2vec-text", "xmod", "ibert", "luke"),
    *("markuplm", "lilt"),
)
"""Names in the types of models that look up positions from the padding id on."""


def counts_padding(config: PretrainedConfig) -> bool:
    """Return whether position ids start after the padding id, which leaves fewer positions."""
    return any(name in config.model_type for name in COUNTING)


def pools_by_padding(config: PretrainedConfig, task: TaskType) -> bool:
    """Return whether a classifier reads its last token that is not `pad_token_id`: a decoder."""
    model_class: Any = class_for(config, task) if task not in LANGUAGE_TASKS else None
    return model_class is not None and "pad_token_id" in inspect.getsource(model_class.forward)


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


# What transformers raises for a config with a wrong value.
CONFIG_ERRORS = (StrictDataclassError, OSError, ValueError, TypeError, AttributeError, KeyError)

OWN_MODELS: Mapping[str, type[PreTrainedModel]] = {
    "t5_encoder": modeling_t5.T5EncoderForSequenceClassification,
    "enct5": modeling_t5.EncT5ForSequenceClassification,
}
"""By model type; their file must be beside the weights to load a model without megakd."""

T5_FILE, CUT_FILE = Path(modeling_t5.__file__), Path(modeling_cut.__file__)
"""The files that must be beside the weights of these models, and of a cut model."""


def current_files(names: Iterable[str]) -> dict[str, str]:
    """Return this version's content of the modelling files among the files of a folder."""
    return {f.name: f.read_text("utf-8") for f in (T5_FILE, CUT_FILE) if f.name in {*names}}


@functools.cache
def register_own_models() -> None:
    """Register the models with transformers' auto classes; only the first call has an effect."""
    for model_type, cls in OWN_MODELS.items():
        AutoConfig.register(model_type, cls.config_class)
        AutoModelForSequenceClassification.register(cls.config_class, cls)


def config_in(folder: Path, **options: Any) -> PretrainedConfig:
    """Return the config of a model's folder; that of a narrow model is its stock config.

    Args:
        options: of `AutoConfig.from_pretrained`.
    """
    keys = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if NARROW not in keys:
        return AutoConfig.from_pretrained(folder, **options)
    stock = keys["model_type"].removeprefix(f"{NARROW}_")
    if "stock" not in keys[NARROW]:
        raise ModelError(
            f"{folder} holds a cut model of an earlier version of megakd, whose config does not "
            "list its units; open it with that version, or cut the model again"
        )
    stock_class = CONFIG_MAPPING[stock]
    config = modeling_cut.narrow_class(stock_class).from_dict({**keys, "model_type": stock})
    config.__class__ = stock_class  # whose rules may refuse the width
    return config


def class_of(config: PretrainedConfig, where: str) -> type[PreTrainedModel]:
    """Return megakd's or transformers' class of the architecture that a config names.

    `where` names the config's file in messages.
    """
    name = (config.architectures or ["none"])[0]
    for home in (modeling_t5, transformers, modeling_cut):
        model_class = getattr(home, name, None)
        if isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel):
            return model_class
    raise ModelError(
        f"{where} names the architecture {name!r}, which neither megakd nor transformers "
        f"{transformers.__version__} has"
    )


_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_blocks")

_COUNTS_OF_DECODERS = ("decoder_layers", "encoder_layers")
"""Config keys of the number of layers; those of a decoder of an encoder-decoder come in pairs."""

_AND_MORE = (HEAD_COUNTS, NEURON_COUNTS, HEAD_COLUMNS)
"""Config keys that list a value per layer, followed by values for parts outside the layers."""

_OVER_ROOT = ("scale_depth",)
"""Config keys of a factor that the root of the number of layers divides (MiniCPM)."""

_FIRST = ("first_k_dense_replace", "num_dense_layers")
"""Config keys of the number of first layers that differ from the others."""

_LAST = ("num_kv_shared_layers",)
"""Config keys of the number of last layers that differ from the others."""

_REPEATED = ("block_types",)
"""Config keys of a list that starts again after its end, until all layers have a value."""

_NUMBERS = re.compile(r"layer|block|idx|index|indices")
"""In names of config keys that may list layers by their numbers, from 0."""

_NOT_OF_LAYERS = re.compile(r"^mtp_|token|architectures|languages|_multipliers$|_limit$|_section$")
"""In names of config keys that list something else, perhaps as many values as there are layers."""


def config_with_layers(
    config: PretrainedConfig, architecture: Architecture, numbers: Sequence[int]
) -> PretrainedConfig:
    """Return a copy of a config with some of its layers, counted from 1, in the given order.

    Every list with a value per layer is cut along, and layers that a list or a dictionary names by
    number have their new numbers.

    Raises:
        ModelError: the class of the config refuses the values.
    """
    count = architecture.number_of_layers(config)
    if [*numbers] == [*range(1, count + 1)]:
        return copy.deepcopy(config)
    values = config.to_dict()
    places = {number - 1: place for place, number in enumerate(numbers)}
    _cut_values(values, config, count, places)
    if "attention_types" in values:  # of GPT-Neo, which makes the list of layers from these
        kinds = getattr(config, "attention_layers", ())
        values["attention_types"] = [[[kinds[number]], 1] for number in places]
    for key in _AND_MORE:
        listed = getattr(config, key, None)
        if listed:
            values[key] = [*(listed[n - 1] for n in numbers), *listed[count:]]
    try:
        return type(config).from_dict(values)
    except Exception as error:  # each class checks its values in its own way
        raise ModelError(
            f"the config of a {config.model_type} model cannot have the layers {[*numbers]} alone: "
            f"{one_line(error)}"
        ) from error


def _cut_values(
    values: dict[Any, Any], config: PretrainedConfig | None, count: int, places: Mapping[int, int]
) -> None:
    # `places`: by the number of a layer that stays, from 0, its new number, in the new order.
    for key, value in values.items():
        name = str(key)
        if name in (*_COUNTS, *_COUNTS_OF_DECODERS) and value == count:
            values[key] = len(places)
        elif name in _OVER_ROOT and value is not None:
            values[key] = value * math.sqrt(len(places) / count)
        elif name in _FIRST and isinstance(value, int):
            values[key] = sum(number < value for number in places)
        elif name in _LAST and isinstance(value, int):
            values[key] = sum(number >= count - value for number in places)
        elif name in _REPEATED and value:
            values[key] = [value[number % len(value)] for number in places]
        elif isinstance(value, list | tuple) and not _NOT_OF_LAYERS.search(name):
            values[key] = _cut_list(name, value, count, places)
        elif isinstance(value, dict) and _is_by_number(name, value, count):
            by_number = {int(number): one for number, one in value.items()}
            stay = [number for number in places if number in by_number]
            values[key] = {places[number]: by_number[number] for number in stay}
        elif isinstance(value, dict):
            part = getattr(config, name, None)
            if not _is_another_model(part, config):
                _cut_values(value, part, count, places)


def _cut_list(name: str, value: Sequence[Any], count: int, places: Mapping[int, int]) -> list[Any]:
    numbers = [one for one in value if type(one) is int and 0 <= one < count]
    is_rising = numbers == sorted({*numbers}) and len(numbers) == len(value) > 0
    if is_rising and _NUMBERS.search(name):
        return sorted(places[number] for number in numbers if number in places)
    if len(value) == count:
        return [value[number] for number in places]
    return [*value]


def _is_by_number(name: str, value: Mapping[Any, Any], count: int) -> bool:
    return bool(value and _NUMBERS.search(name)) and all(
        str(number).isdecimal() and int(number) < count for number in value
    )


def _is_another_model(part: Any, config: PretrainedConfig | None) -> bool:
    # Whether a part of a config is the config of another model, such as one of images.
    if not isinstance(part, PretrainedConfig) or config is None:
        return False
    has_layers = any(getattr(part, key, None) is not None for key in _COUNTS)
    return has_layers and part is not config.get_text_config()
