"""Stock models with parts cut out, whose layers keep different numbers of heads and neurons.

This file needs only torch and transformers. It is stored beside the weights of such a model, which
`AutoModel.from_pretrained(folder, trust_remote_code=True)` loads. The config of a `Cut` model
states the number of units of each layer; all other keys have their stock meaning. The width of the
hidden states may differ from the number of heads times the width of a head. The config of a
`Narrow` model has the stock keys of the model before the cut, and lists its narrower maps.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import transformers as hf
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.distilbert.modeling_distilbert import TransformerBlock
from transformers.models.electra.modeling_electra import ElectraLayer
from transformers.models.gemma2.modeling_gemma2 import Gemma2DecoderLayer
from transformers.models.gemma3.modeling_gemma3 import Gemma3DecoderLayer
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.granite.modeling_granite import GraniteDecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.phi.modeling_phi import PhiDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer
from transformers.models.roberta.modeling_roberta import RobertaLayer
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from collections.abc import Iterator


class Parts(NamedTuple):
    """Locations of the parts of a family's layers.

    layer: the stock class of a layer.
    blocks: path on the backbone of the list of layers.
    core: path on the layer of the module that splits vectors into heads.
    queries, keys: modules on the core; `keys` is empty if `queries` makes all three.
    output: path on the layer of the module that takes the heads.
    inputs: paths on the layer of the modules that make the neurons.
    down: path on the layer of the module that takes the neurons.
    neurons: config key of the number of neurons.
    """

    layer: type[nn.Module]
    blocks: str
    core: str
    queries: str
    keys: tuple[str, ...]
    output: str
    inputs: tuple[str, ...]
    down: str
    neurons: str = "intermediate_size"


@dataclass(kw_only=True, repr=False)
class _Shape:
    """Config keys of a cut model, in place of the stock counts.

    head_counts: key-value groups of each attention.
    neuron_counts: neurons of each feed-forward.
    head_width: width of one head.
    queries_per_key: number of query heads that share keys and values.
    score_width: width whose root divides attention scores; None: `head_width`.

    The stock keys hold one number for all layers. As attributes they hold the numbers of the
    largest layer. In config.json they would be wrong, so they are omitted.
    """

    parts: ClassVar[Parts]
    head_counts: list[int] | None = None
    neuron_counts: list[int] | None = None
    head_width: int | None = None
    queries_per_key: int | None = None
    score_width: int | None = None

    def __post_init__(self: Any, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        heads, neurons = self.num_attention_heads, getattr(self, self.parts.neurons)
        shared = getattr(self, "num_key_value_heads", None) or heads
        self.queries_per_key = self.queries_per_key or heads // shared
        width = getattr(self, "head_dim", None) or self.hidden_size // heads
        self.head_width = self.head_width or width
        if hasattr(self, "rope_parameters"):
            self.head_dim = self.head_width  # the rotary embedding is as wide as a head
        if self.head_counts is None:
            self.head_counts = [heads // self.queries_per_key] * self.num_hidden_layers
        if self.neuron_counts is None:
            self.neuron_counts = [neurons or 4 * self.hidden_size] * self.num_hidden_layers
        self.validate()
        keys = max(self.head_counts, default=0) or 1
        self.num_attention_heads = keys * self.queries_per_key
        if hasattr(self, "num_key_value_heads"):
            self.num_key_value_heads = keys
        setattr(self, self.parts.neurons, max(self.neuron_counts, default=0))

    def to_dict(self: Any) -> dict[str, Any]:
        """Return the keys of config.json, without the stock counts, which differ by layer."""
        values = super().to_dict()  # pyright: ignore[reportAttributeAccessIssue]
        for key in ("num_attention_heads", "num_key_value_heads", self.parts.neurons):
            values.pop(self.attribute_map.get(key, key), None)
        if self.score_width is None:
            values.pop("score_width", None)
        return values

    def validate(self: Any) -> None:
        """Apply all stock rules except that all heads together are as wide as the hidden states."""
        for rule in self.__class_validators__:
            if rule.__name__ != "validate_architecture":
                rule(self)
        for key in ("head_counts", "neuron_counts"):
            counts = getattr(self, key)
            if len(counts) != self.num_hidden_layers or any(count < 0 for count in counts):
                raise ValueError(f"{key} must be {self.num_hidden_layers} numbers, got {counts}")


class _Cut:
    """Mixin for a stock model that builds the layers one by one, each in its own size."""

    def __init__(self: Any, config: Any) -> None:
        with _set(config, num_hidden_layers=0):
            super().__init__(config)  # pyright: ignore[reportCallIssue]
        layers = self.base_model.get_submodule(config.parts.blocks)
        for number in range(config.num_hidden_layers):
            layers.append(_layer(config, number))
        self.post_init()


class _Narrow:
    """Mixin for a stock model whose layers compute alike with fewer rows or columns in their maps.

    `narrow` of the config: {"blocks": path of the list of layers, "layers": for each layer {path of
    a map: [inputs, outputs]}}; null: as many as in the stock model.
    """

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # pyright: ignore[reportCallIssue]
        blocks = config.narrow["blocks"]  # on the model with a head
        if self.base_model is self:
            blocks = blocks.removeprefix(f"{self.base_model_prefix}.")
        layers = self.get_submodule(blocks)
        for layer, maps in zip(layers, config.narrow["layers"], strict=True):
            for path, (inputs, outputs) in maps.items():
                _resize(layer, path, inputs=inputs, outputs=outputs)
        self.post_init()


@cache
def narrow_class(stock: type[Any]) -> type[Any]:
    """Return the narrow form of a class of transformers, of a model or of its config.

    The config has a type of its own, so that transformers asks for `trust_remote_code`.
    """
    name = f"Narrow{stock.__name__}"
    members: dict[str, Any] = {"__module__": __name__}
    if issubclass(stock, hf.PreTrainedConfig):
        return type(name, (stock,), {**members, "model_type": f"narrow_{stock.model_type}"})
    members["config_class"] = narrow_class(stock.config_class)
    return type(name, (_Narrow, stock), members)


def __getattr__(name: str) -> type[Any]:
    stock = getattr(hf, name.removeprefix("Narrow"), None)
    if not name.startswith("Narrow") or stock is None:
        raise AttributeError(name)
    return narrow_class(stock)


@contextmanager
def _set(config: Any, **values: int) -> Iterator[None]:
    """Set values inside the context, on the config itself: modules keep a reference to it."""
    earlier = {key: getattr(config, key) for key in values if hasattr(config, key)}
    for key in earlier:
        setattr(config, key, values[key])
    try:
        yield
    finally:
        for key, value in earlier.items():
            setattr(config, key, value)


def _layer(config: Any, number: int) -> nn.Module:
    parts: Parts = config.parts
    heads = {"num_attention_heads": config.queries_per_key, "num_key_value_heads": 1}
    with _set(config, **heads, **{parts.neurons: 1}):
        layer = parts.layer(config, *(() if parts.layer is TransformerBlock else (number,)))
    keys = config.head_counts[number] * config.head_width
    queries, neurons = keys * config.queries_per_key, config.neuron_counts[number]
    _resize(layer, f"{parts.core}.{parts.queries}", outputs=queries if parts.keys else 3 * queries)
    for name in parts.keys:
        _resize(layer, f"{parts.core}.{name}", outputs=keys)
    _resize(layer, parts.output, inputs=queries)
    for path in parts.inputs:
        _resize(layer, path, outputs=neurons)
    _resize(layer, parts.down, inputs=neurons)
    _tell_heads(layer.get_submodule(parts.core), config, number)
    return layer


def _resize(
    layer: nn.Module, path: str, *, inputs: int | None = None, outputs: int | None = None
) -> None:
    stock: Any = layer.get_submodule(path)
    is_turned = isinstance(stock, Conv1D)
    sizes = (stock.nx, stock.nf) if is_turned else (stock.in_features, stock.out_features)
    size_in = sizes[0] if inputs is None else inputs
    size_out = sizes[1] if outputs is None else outputs
    if is_turned:
        made = (Conv1D if size_in and size_out else _EmptyConv1D)(size_out, size_in)
    else:
        kind = nn.Linear if size_in and size_out else _EmptyLinear
        made = kind(size_in, size_out, bias=stock.bias is not None)
    layer.set_submodule(path, made)


class _EmptyLinear(nn.Linear):
    """A map without inputs, which returns zeros without its bias, or a map without outputs.

    A sub-layer without heads or neurons contributes nothing. Its bias stays, with a gradient of
    zero. Tensors without elements are buffers, because ZeRO 3 cannot gather an empty parameter.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__(inputs, outputs, bias=bias)
        _without_empty_parameters(self)

    def reset_parameters(self) -> None:
        """Set the bias to zero; there is no value to draw."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name for it)
        """Map [..., I] to [..., O]; I or O is 0."""
        return _of_nothing(input, self.out_features, self.bias)


class _EmptyConv1D(Conv1D):
    """`_EmptyLinear` for GPT-2's maps."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__(outputs, inputs)
        _without_empty_parameters(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., I] to [..., O]; I or O is 0."""
        return _of_nothing(x, self.nf, self.bias)


def _without_empty_parameters(module: nn.Module) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        if not parameter.numel():
            delattr(module, name)
            module.register_buffer(name, parameter.detach())


def _of_nothing(hidden: Tensor, outputs: int, bias: Tensor | None) -> Tensor:
    # Made from the input, so that a gradient of zero reaches all earlier modules and the bias.
    zeros = nn.functional.pad(hidden[..., :0], (0, outputs))
    return zeros if bias is None else zeros + 0.0 * bias


def _tell_heads(core: Any, config: Any, number: int) -> None:
    """Correct the sizes that an attention has taken from the config of a smaller layer."""
    heads, width = config.head_counts[number], config.head_width
    if hasattr(core, "split_size"):  # GPT-2's
        core.num_heads, core.head_dim, core.split_size = heads, width, heads * width
        core.scaling = width**-0.5 if core.scale_attn_weights else 1.0
        if core.scale_attn_by_inverse_layer_idx:
            core.scaling /= number + 1
    elif hasattr(core, "attention_head_size"):
        core.attention_head_size = width
        core.scaling = (config.score_width or width) ** -0.5
        setattr(core, "n_heads" if hasattr(core, "n_heads") else "num_attention_heads", heads)
    if heads == 0:
        core.forward = partial(_without_heads, core)


def _without_heads(
    core: Any, hidden_states: Tensor, *_: Any, cache: Any = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    parts, width = core.config.parts, core.config.head_width
    batch, length, _width = hidden_states.shape
    cache = kwargs.get("past_key_values") if cache is None else cache  # before transformers 5.24
    if cache is not None:
        # The cache of the first layer is asked for the number of past tokens.
        marks = hidden_states.new_zeros(batch, 1, length, 1)
        cache.update(marks, marks, core.layer_idx)
    nothing = hidden_states[..., :0]
    # All modules are called, because hooks such as DeepSpeed's rely on it.
    for name in (parts.queries, *parts.keys):
        nothing = nothing + getattr(core, name)(hidden_states)[..., :0]
    for norm in (getattr(core, "q_norm", None), getattr(core, "k_norm", None)):
        if norm is not None:
            nothing = nothing + norm(nothing.new_zeros(batch, length, 0, width)).flatten(2)
    path = parts.output.removeprefix(f"{parts.core}.")
    if path != parts.output:
        nothing = getattr(core, path)(nothing)
        nothing = core.resid_dropout(nothing) if hasattr(core, "resid_dropout") else nothing
    # None would be missing from the list of attentions.
    is_eager = core.config._attn_implementation == "eager"  # noqa: SLF001  (what modules read)
    return nothing, nothing.new_zeros(batch, 0, length, length) if is_eager else None


BERT = Parts(
    layer=BertLayer,
    blocks="encoder.layer",
    core="attention.self",
    queries="query",
    keys=("key", "value"),
    output="attention.output.dense",
    inputs=("intermediate.dense",),
    down="output.dense",
)
LLAMA = Parts(
    layer=LlamaDecoderLayer,
    blocks="layers",
    core="self_attn",
    queries="q_proj",
    keys=("k_proj", "v_proj"),
    output="self_attn.o_proj",
    inputs=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
)
PHI = LLAMA._replace(
    layer=PhiDecoderLayer, output="self_attn.dense", inputs=("mlp.fc1",), down="mlp.fc2"
)
DISTILBERT = Parts(
    layer=TransformerBlock,
    blocks="transformer.layer",
    core="attention",
    queries="q_lin",
    keys=("k_lin", "v_lin"),
    output="attention.out_lin",
    inputs=("ffn.lin1",),
    down="ffn.lin2",
    neurons="hidden_dim",
)
GPT2 = Parts(
    layer=GPT2Block,
    blocks="h",
    core="attn",
    queries="c_attn",
    keys=(),
    output="attn.c_proj",
    inputs=("mlp.c_fc",),
    down="mlp.c_proj",
    neurons="n_inner",
)


_ENCODER = ("Model", "ForSequenceClassification", "ForMaskedLM")
_DECODER = ("Model", "ForCausalLM")
# By family: its parts, and the classes of transformers of which there is a cut form.
for _family, _parts, _names in (
    ("Bert", BERT, _ENCODER),
    ("Roberta", BERT._replace(layer=RobertaLayer), _ENCODER),
    ("DistilBert", DISTILBERT, _ENCODER),
    ("Electra", BERT._replace(layer=ElectraLayer), _ENCODER),
    ("Llama", LLAMA, _DECODER),
    ("Mistral", LLAMA._replace(layer=MistralDecoderLayer), _DECODER),
    ("Qwen2", LLAMA._replace(layer=Qwen2DecoderLayer), _DECODER),
    ("Qwen3", LLAMA._replace(layer=Qwen3DecoderLayer), _DECODER),
    ("Gemma2", LLAMA._replace(layer=Gemma2DecoderLayer), _DECODER),
    ("Gemma3Text", LLAMA._replace(layer=Gemma3DecoderLayer), _DECODER),
    ("Phi", PHI, _DECODER),
    ("Granite", LLAMA._replace(layer=GraniteDecoderLayer), _DECODER),
    ("GPT2", GPT2, ("Model", "LMHeadModel")),
):
    _stock = getattr(hf, f"{_family}Config")
    _members = {"model_type": f"cut_{_stock.model_type}", "parts": _parts}
    _config = type(f"Cut{_family}Config", (_Shape, _stock), _members)
    globals()[f"Cut{_family}Config"] = _config
    for _name in _names:
        # Gemma3TextConfig and Gemma3TextModel, but Gemma3ForCausalLM.
        _class = (_family if _name == "Model" else _family.removesuffix("Text")) + _name
        _bases = (_Cut, getattr(hf, _class))
        globals()[f"Cut{_class}"] = type(f"Cut{_class}", _bases, {"config_class": _config})
