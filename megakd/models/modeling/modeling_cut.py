"""Stock models with parts cut out, which compute alike with fewer rows or columns in their maps.

This file needs only torch and transformers. It is stored beside the weights of such a model, which
`AutoModel.from_pretrained(folder, trust_remote_code=True)` loads. The config of a `Narrow` model
has the stock keys of the model before the cut, and lists the units of each layer.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import transformers as hf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class _Narrow:
    """Mixin for a stock model whose layers have fewer heads or neurons than its config says.

    `narrow` of the config:
    blocks: path of the list of layers, on the model with a head.
    width: dimensions of weights that are as long as hidden states are wide, by name; a star stands
        for the number of a layer.
    heads, neurons: {"layers": for each layer its units, or null}. Units have their number, `total`;
        the rows of one of them in each weight, `parts`; and the maps that make and take them.
    stock: keys of the config of the stock model whose weights become narrower here, if its hidden
        states are wider.
    score_width: width whose root divides attention scores; null: that of a head.
    """

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        narrow = config.narrow
        # `AutoModel`, which makes the inner model of some heads, knows the stock config alone.
        with _set(config, {**narrow["stock"], "__class__": self.config_class.__base__}):
            super().__init__(config, *args, **kwargs)  # pyright: ignore[reportCallIssue]
            of_stock = copy.deepcopy(config)
        for module in self.modules():
            # Rotary positions, which `from_pretrained` and long texts compute from this config.
            is_leaf = not [*module.children()] and [*module.buffers()]
            if is_leaf and getattr(module, "config", None) is config:
                module.config = of_stock
        bare = f"{self.base_model_prefix}." if self.base_model is self else ""
        blocks = narrow["blocks"].removeprefix(bare)
        names = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        layers: Any = self.get_submodule(blocks)
        sizes: dict[str, dict[int, int]] = {}
        for starred, dimensions in narrow["width"].items() if narrow["stock"] else ():
            for number in range(len(layers) if "*" in starred else 1):
                name = starred.removeprefix(bare).replace("*", str(number))
                sizes[name] = dict.fromkeys(dimensions, int(config.hidden_size))
        _narrow_heads(self, sizes, blocks, of_stock.hidden_size)
        for number, layer in enumerate(layers):
            for units in (narrow[kind]["layers"][number] for kind in ("heads", "neurons")):
                for name, (dimension, rows) in units["parts"].items() if units else ():
                    size = units["total"] * sum(rows)
                    sizes.setdefault(f"{blocks}.{number}.{name}", {})[dimension] = size
            heads = narrow["heads"]["layers"][number]
            if heads is not None:
                core, total = layer.get_submodule(heads["core"]), heads["total"]
                tell_heads(core, total, heads["width"], score_width=narrow["score_width"])
                if total == 0:
                    core.forward = partial(_without_heads, core, heads)
        for name, of_weight in sizes.items():
            path, _, weight = name.rpartition(".")
            if weight == "weight" and name in names:
                _resize(self, path, of_weight)
        self.post_init()


@cache
def narrow_class(stock: type[Any]) -> type[Any]:
    """Return the narrow form of a class of transformers, of a model or of its config.

    The config has a type of its own, so that transformers asks for `trust_remote_code`.
    """
    name = f"Narrow{stock.__name__}"
    members: dict[str, Any] = {"__module__": __name__}
    if issubclass(stock, hf.PreTrainedConfig):
        members |= {"model_type": f"narrow_{stock.model_type}", "validate": _validate}
        return type(name, (stock,), members)
    members["config_class"] = narrow_class(stock.config_class)
    return type(name, (_Narrow, stock), members)


def _validate(config: Any) -> None:
    """Apply all stock rules except that all heads together are as wide as the hidden states."""
    for rule in config.__class_validators__:
        if rule.__name__ != "validate_architecture":
            rule(config)


def __getattr__(name: str) -> type[Any]:
    stock = getattr(hf, name.removeprefix("Narrow"), None)
    if not name.startswith("Narrow") or stock is None:
        raise AttributeError(name)
    return narrow_class(stock)


@contextmanager
def _set(config: Any, values: Mapping[str, Any]) -> Iterator[None]:
    """Set values inside the context, on the config itself: modules keep a reference to it."""
    earlier = {key: getattr(config, key) for key in values}
    try:
        for key, value in values.items():
            setattr(config, key, value)
        yield
    finally:
        for key, value in earlier.items():
            setattr(config, key, value)


def _narrow_heads(model: Any, sizes: dict[str, dict[int, int]], blocks: str, former: int) -> None:
    """Add the sizes of the head of another task, which the model that was cut did not have.

    Args:
        sizes: by name, the sizes of weights by dimension.
        blocks: name of the layers.
        former: width of the hidden states of the stock model.
    """
    for path, part in model.named_modules():
        weight, name = getattr(part, "weight", None), f"{path}.weight"
        is_inside = name.startswith(f"{blocks}.") or isinstance(part, nn.Embedding)
        if weight is None or name in sizes or is_inside:
            continue
        shape = getattr(weight, "ds_shape", weight.shape)
        wide = [dimension for dimension, size in enumerate(shape) if size == former]
        if len(shape) == 2 and shape[0] == model.config.num_labels:  # outputs are labels
            wide = [dimension for dimension in wide if dimension > 0]
        sizes[name] = dict.fromkeys(wide, int(model.config.hidden_size))


def _resize(model: nn.Module, path: str, changes: Mapping[int, int]) -> None:
    """Make the weight of a map, an embedding or a norm anew, with its bias.

    Args:
        changes: sizes of the weight, by dimension.
    """
    stock: Any = model.get_submodule(path)
    # ZeRO 3 has put the weights aside, which have no shape then.
    shape = getattr(stock.weight, "ds_shape", stock.weight.shape)
    sizes = [changes.get(dimension, size) for dimension, size in enumerate(shape)]
    if sizes == [*shape]:
        return
    if isinstance(stock, nn.Linear):
        kind = nn.Linear if all(sizes) else _EmptyLinear
        model.set_submodule(path, kind(sizes[1], sizes[0], bias=stock.bias is not None))
    elif isinstance(stock, Conv1D):
        model.set_submodule(path, (Conv1D if all(sizes) else _EmptyConv1D)(sizes[1], sizes[0]))
    else:  # of which classes differ by family
        new: Any = nn.Embedding(sizes[0], sizes[1]) if len(sizes) == 2 else nn.LayerNorm(sizes[0])
        for name, _ in list(stock.named_parameters(recurse=False)):
            setattr(stock, name, getattr(new, name))
        if hasattr(stock, "scalar_embed_scale"):  # Gemma's: the root of the width
            stock.scalar_embed_scale *= (sizes[1] / shape[1]) ** 0.5
            stock.embed_scale = stock.embed_scale * (sizes[1] / shape[1]) ** 0.5
        names = ("embedding_dim",) if len(sizes) == 2 else ("normalized_shape",)
        vars(stock).update({name: getattr(new, name) for name in names if hasattr(stock, name)})
        stock._is_hf_initialized = False  # noqa: SLF001  (what transformers reads)


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


def tell_heads(core: Any, heads: int, width: int, *, score_width: int | None = None) -> None:
    """Correct the sizes that an attention has taken from a config with other heads."""
    if hasattr(core, "split_size"):  # GPT-2's
        core.num_heads, core.head_dim, core.split_size = heads, width, heads * width
        core.scaling = width**-0.5 if core.scale_attn_weights else 1.0
        if core.scale_attn_by_inverse_layer_idx:
            core.scaling /= core.layer_idx + 1
    elif getattr(core, "attention_head_size", width) != width or score_width is not None:
        core.attention_head_size = width
        core.scaling = (score_width or width) ** -0.5
        setattr(core, "n_heads" if hasattr(core, "n_heads") else "num_attention_heads", heads)


def _without_heads(
    core: Any,
    heads: Mapping[str, Any],
    hidden_states: Tensor,
    *_: Any,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    batch, length, _width = hidden_states.shape
    cache = kwargs.get("past_key_values") if cache is None else cache  # before transformers 5.24
    if cache is not None:
        # The cache of the first layer is asked for the number of past tokens.
        marks = hidden_states.new_zeros(batch, 1, length, 1)
        cache.update(marks, marks, core.layer_idx)
    nothing = hidden_states[..., :0]
    # All modules are called, because hooks such as DeepSpeed's rely on it.
    inside = f"{heads['core']}."
    for path in heads["makers"]:
        nothing = nothing + core.get_submodule(path.removeprefix(inside))(hidden_states)[..., :0]
    for norm in (getattr(core, "q_norm", None), getattr(core, "k_norm", None)):
        if norm is not None:
            norm_of_none = norm(nothing.new_zeros(batch, length, 0, heads["width"]))
            nothing = nothing + norm_of_none.flatten(2)
    if heads["output"].startswith(inside):
        nothing = core.get_submodule(heads["output"].removeprefix(inside))(nothing)
        nothing = core.resid_dropout(nothing) if hasattr(core, "resid_dropout") else nothing
    # None would be missing from the list of attentions.
    is_eager = core.config._attn_implementation == "eager"  # noqa: SLF001  (what modules read)
    return nothing, nothing.new_zeros(batch, 0, length, length) if is_eager else None
