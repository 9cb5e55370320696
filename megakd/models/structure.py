"""Where the parts of a model of transformers are: found in one forward without values.

Any model with an auto class is read this way. transformers declares the output matrix, the base
model and the class of its layers. What a loss relies on is then seen in the model's own forward on
the meta device: that the output matrix is called once, whether its input is what the base model
returns, and what becomes of its output, for which the matrix is replaced by known numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as conditions
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megakd.config.task import LANGUAGE_TASKS, TaskType
from megakd.data.batch import LogitWarp
from megakd.engine.sharding import full_shape
from megakd.errors import ModelError, one_line
from megakd.models.architectures import (
    AUTO_CLASSES,
    CLASS_ENDINGS,
    STATED,
    Architecture,
    Known,
    class_name,
    narrow_maps,
)
from megakd.models.small_copy import VALUELESS, Valueless, experts_in, no_cache, without_values
from megakd.models.units import units_of
from megakd.models.views import ParameterCounts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTH = 8
"""Tokens of the row of the forward."""
PROBE = torch.cat([-torch.logspace(4, -3, 64), torch.logspace(-3, 4, 64)])
"""Numbers in place of logits, of both signs, from small to large ones."""
LAYER_COUNTS = ("num_hidden_layers", "decoder_layers")
"""Keys of a config with the number of layers; the second one of the decoder of a translator."""


@contextmanager
def input_of(head: nn.Module, answer: Any = None) -> Iterator[list[Tensor]]:
    """Yield the inputs of an output matrix in a forward of its model, which does not multiply them.

    The hooks of the module stay around it, so that ZeRO 3 gathers and releases the matrix as ever.

    Args:
        answer: the output in place of the product, by the input; default: one column of the input.
    """
    seen: list[Tensor] = []

    def replaced(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.append(hidden)
        return hidden[..., :1] if answer is None else answer(hidden)

    before = {key: value for key, value in vars(head).items() if key == "forward"}
    head.forward = replaced
    try:
        yield seen
    finally:
        del head.forward
        vars(head).update(before)


Vectors = tuple[Tensor, Tensor, Tensor, float | None]
"""Queries [B, heads, T, width], keys and values of an attention, and the factor of its scores."""


@contextmanager
def attentions_seen(note: Callable[[nn.Module, Vectors], None]) -> Iterator[None]:
    """Let `note` have the module and the vectors of each attention in a forward in the body.

    transformers asks one table for the function of every attention, eager too, whatever the
    vectors went through before, such as norms and rotary positions.
    """
    table: Any = ALL_ATTENTION_FUNCTIONS
    look_up = table.get_interface

    def watched(name: str, default: Callable[..., Any]) -> Callable[..., Any]:
        attention = look_up(name, default)

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *more: Any, **options: Any
        ) -> Any:
            note(module, (query, key, value, options.get("scaling")))
            return attention(module, query, key, value, *more, **options)

        return attend

    table.get_interface = watched
    try:
        yield
    finally:
        vars(table).pop("get_interface", None)


def only_rows(backbone: nn.Module, rows: Tensor | None) -> AbstractContextManager[object]:
    """Let the modules that follow a backbone compute some positions alone, as [1, N, D].

    Args:
        rows: positions [N] of the flattened [B * T]; None: all positions, as [B, T, D].
    """

    def chosen(module: nn.Module, inputs: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1)[rows][None]
        return output

    return nullcontext() if rows is None else backbone.register_forward_hook(chosen)


def find_architecture(config: PretrainedConfig, task: TaskType) -> Architecture:
    """Return where the parts of a model for a task are.

    Raises:
        ModelError: a part is not found, or the logits are no function of the output matrix that
            the losses know.
    """
    kind, (model, seen) = config.model_type, _seen_in(config, task)
    lists, key = _layers_in(model)
    layers = next(iter(lists), None)
    try:
        embeddings = _path_in(model, model.get_input_embeddings())
    except NotImplementedError:  # CANINE hashes characters
        embeddings = None
    # The outermost module around the layers that runs: some heads call the decoder in a base model.
    backbone = _path_in(model, model.base_model)
    owners = [(layers or "")[:end] for end, sign in enumerate(layers or "") if sign == "."]
    inner = next((path for path in (backbone, *owners) if path and path in seen.states), None)
    if inner is None or (embeddings is None and (task in LANGUAGE_TASKS or not lists)):
        raise ModelError(
            f"a {kind} model for {task} has no module whose forward gives last_hidden_state "
            f"(base_model: {backbone or 'the model itself'}, layers: {layers}), or no "
            "get_input_embeddings; use a model of another family"
        )
    top = inner.partition(".")[0]
    outside = [
        name
        for name, part in model.named_children()
        if name != top and next(part.parameters(), None) is not None
    ]
    poolers = [f"{top}.{n}" for n, _ in model.get_submodule(top).named_children() if n == "pooler"]
    repeated = None if lists else _repeated_in(model, seen, inner)
    blocks, *parts = (path.removeprefix(f"{inner}.") for path in lists or [repeated or ""])
    # The module around the embeddings of tokens adds those of positions too. Of a decoder inside a
    # base model, the outermost one has the layers as well.
    paths = accumulate((embeddings or "").removeprefix(f"{inner}.").split("."), "{}.{}".format)
    around = next(path for path in paths if not f"{blocks}.".startswith(f"{path}."))
    architecture = Architecture(
        model_type=kind,
        tasks=(task,),
        find_units=units_of,
        layers=key or LAYER_COUNTS[0],
        backbone=inner,
        embeddings=around,
        head=outside[-1] if outside else top,
        renewed=(*outside[:-1], *poolers),
        blocks=blocks or None,
        parts=tuple(parts),
        repeats=repeated is not None,
        # Some models add positions for their layers alone, as to a multiple of a window.
        reads_states=len(lists) == 1
        and seen.shapes.get(f"{layers}.0", ())[:2] == seen.shapes[inner][:2],
        has_sinks=any(name.endswith(".sinks") for name, _ in model.named_parameters()),
        shows_attention=_shows_attention(model, seen, lists),
        experts=experts_in(model),
    )
    if task not in LANGUAGE_TASKS:
        return replace(architecture, **STATED.get(kind, {}))
    return _with_head(architecture, model, seen)


def _seen_in(config: PretrainedConfig, task: TaskType) -> tuple[PreTrainedModel, Seen]:
    kind = config.model_type
    try:
        model = without_values(config, task)
    except Exception as error:  # the code of any model may fail in its own way
        raise ModelError(
            f"a {kind} model for {task} cannot be built from this config: {one_line(error)}"
        ) from error
    try:
        return model, _run(model, task)
    except Exception as error:
        raise ModelError(
            f"the forward of a {kind} model for {task} failed without values, so that its output "
            f"matrix and layers are not known: {one_line(error)}"
        ) from error


@dataclass
class Seen:
    """What a forward without values shows.

    bias: path and values of the only weight that may be added to the products.
    states: by the path of a module, the hidden states that it returned as `last_hidden_state`.
    shapes: by the path of a module, the shape of its output, or of the first one.
    calls: by the path of a module, how often it ran.
    attentions: shapes of the vectors of attentions, by the path of the module that calls them.
    inputs, products: of the output matrix of a language model, and `PROBE` in place of its outputs.
    logits: what the model makes of the products; of a classifier, its logits.
    """

    bias: tuple[str, Tensor] | None
    states: dict[str, Tensor] = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    attentions: dict[str, list[torch.Size]] = field(default_factory=dict)
    inputs: list[Tensor] = field(default_factory=list)
    products: list[Tensor] = field(default_factory=list)
    logits: Tensor = PROBE

    def note(self, path: str, output: Any) -> None:
        """Note a call of a module."""
        self.calls[path] += 1
        first = output[0] if type(output) in (tuple, list) and output else output
        last = getattr(output, "last_hidden_state", first)
        if isinstance(last, Tensor):
            self.shapes[path] = last.shape
            if last is not output:
                self.states[path] = last


def _run(model: PreTrainedModel, task: TaskType) -> Seen:
    head = model.get_output_embeddings() if task in LANGUAGE_TASKS else None
    seen = Seen(None if head is None else _added_later(model, head))
    paths = {part: path for path, part in model.named_modules() if path}

    def product(hidden: Tensor) -> Tensor:
        shape = (*hidden.shape[:-1], cast("Any", head).weight.shape[0])
        repeated = PROBE.repeat(-(-math.prod(shape) // len(PROBE)))
        seen.products.append(repeated[: math.prod(shape)].reshape(shape))
        return seen.products[-1]

    def note_vectors(part: nn.Module, vectors: Vectors) -> None:
        seen.attentions[paths[part]] = [one.shape for one in vectors[:3]]

    with ExitStack() as hooks:
        for part, path in paths.items():
            hook = part.register_forward_hook(lambda *called, path=path: seen.note(path, called[2]))
            hooks.enter_context(hook)
        hooks.enter_context(attentions_seen(note_vectors))
        seen.inputs = [] if head is None else hooks.enter_context(input_of(head, product))
        # A condition chooses every element.
        every = cast("Any", conditions).patch(meta_nonzero_assume_all_nonzero=True)
        with Valueless(is_forward=True), every, torch.no_grad(), VALUELESS:
            ids = torch.ones((1, LENGTH), dtype=torch.long)
            seen.logits = model(input_ids=ids, **no_cache(model)).logits
    return seen


def _added_later(model: PreTrainedModel, head: nn.Module) -> tuple[str, Tensor] | None:
    """Give values to a weight outside the head that is as long as its outputs (ESM, BART)."""
    size, own = cast("Tensor", head.weight).shape[0], {id(weight) for weight in head.parameters()}
    named = (*model.named_parameters(), *model.named_buffers())
    paths = [
        path
        for path, tensor in named
        if tensor.shape in ((size,), (1, size)) and id(tensor) not in own
    ]
    if len(paths) != 1:
        return None
    owner, _, name = paths[0].rpartition(".")
    part = model.get_submodule(owner)
    values = (torch.arange(size) >= size // 2).float().reshape(getattr(part, name).shape)
    if name in part._parameters:  # noqa: SLF001  (to assign a tensor of another device)
        part._parameters[name] = nn.Parameter(values)  # noqa: SLF001
    else:
        part._buffers[name] = values  # noqa: SLF001
    return paths[0], values


def _path_in(model: nn.Module, part: nn.Module | None) -> str | None:
    return next((name for name, module in model.named_modules() if module is part), None)


def _layers_in(model: PreTrainedModel) -> tuple[list[str], str | None]:
    """Return the path of the list with as many layers as the config says, and the key of the count.

    Of several lists, the layers have the class whose outputs transformers records as hidden states.
    Several lists beside each other have the parts of the layers. There is no list of layers where
    two stacks of layers run.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        return [], None
    for key in LAYER_COUNTS:
        count = getattr(model.config, key, None)
        lists = {
            name: part
            for name, part in model.named_modules()
            if isinstance(part, nn.ModuleList) and len(part) == count
        }
        for part in model.modules():
            declared: Any = (getattr(part, "_can_record_outputs", None) or {}).get("hidden_states")
            declared = declared[0] if isinstance(declared, list | tuple) else declared
            of_class = getattr(declared, "target_class", declared)
            for name, layers in lists.items():
                if of_class is not None and all(isinstance(layer, of_class) for layer in layers):
                    return [name], key
        first = next(iter(lists), None)
        if first is not None:
            owner = first.rpartition(".")[0]
            return [name for name in lists if name.rpartition(".")[0] == owner], key
    return [], None


def _repeated_in(model: PreTrainedModel, seen: Seen, backbone: str) -> str | None:
    """Return the outermost module that makes hidden states once for each layer of the config."""
    count = getattr(model.config, LAYER_COUNTS[0], None)
    if not isinstance(count, int) or count < 2:
        return None
    return next(
        (
            path
            for path, part in model.named_modules()
            if seen.calls[path] == count
            and seen.shapes.get(path) == seen.shapes[backbone]
            and path.startswith(f"{backbone}.")
            and any(isinstance(child, nn.Linear) for child in part.modules())
        ),
        None,
    )


def _shows_attention(model: PreTrainedModel, seen: Seen, lists: Sequence[str]) -> bool:
    """Return whether each layer calls an attention whose vectors have heads of one width."""

    def shows(layer: str) -> bool:
        called = (s for path, s in seen.attentions.items() if path.startswith(f"{layer}."))
        return any(
            queries[1] % keys[1] == 0 and queries[2:] == keys[2:] == values[2:]
            for queries, keys, values in called
            if len(queries) == 4 and keys[:2] == values[:2]
        )

    if len(lists) != 1:
        return False
    layers = range(len(cast("Any", model.get_submodule(lists[0]))))
    narrow = narrow_maps(model.config)
    heads = [None] * len(layers) if narrow is None else narrow["heads"]["layers"]
    # A layer that has lost its heads has no attention.
    return all(
        shows(f"{lists[0]}.{number}") or (units is not None and not units["total"])
        for number, units in zip(layers, heads, strict=True)
    )


def _with_head(architecture: Architecture, model: PreTrainedModel, seen: Seen) -> Architecture:
    kind, path = architecture.model_type, _path_in(model, model.get_output_embeddings())
    if path is None or len(seen.inputs) != 1:
        raise ModelError(
            f"a {kind} model does not use one output matrix (get_output_embeddings) once in a "
            f"forward, but {len(seen.inputs)} times"
        )
    numbers = [v for v in model.config.to_dict().values() if isinstance(v, int | float) and v]
    added = [(None, torch.zeros(())), *([] if seen.bias is None else [seen.bias])]
    warps = [
        (bias, warp_of(seen.products[0] + values, seen.logits, numbers))
        for bias, values in added
        if not seen.logits.is_meta
    ]
    bias, warp = next((one for one in warps if one[1] is not None), (None, None))
    if warp is None:
        raise ModelError(
            f"the logits of a {kind} model are not the product of its output matrix, {path}, with "
            "a bias, a factor and a cap, which the losses compute; use a model of another family"
        )
    reads_input = not _is_same(seen.inputs[0], seen.states[architecture.backbone])
    return replace(architecture, bias=bias, warp=warp, reads_head_input=reads_input)


def _is_same(one: Tensor, other: Tensor) -> bool:
    # Whether both have the same memory.
    memory, of_other = (part.untyped_storage()._cdata for part in (one, other))  # noqa: SLF001
    return one.shape == other.shape and memory == of_other


def warp_of(product: Tensor, logits: Tensor, numbers: Sequence[float] = ()) -> LogitWarp | None:
    """Return the factor and the cap with which logits follow from a product; None: neither does.

    Args:
        numbers: of the config, whose exact values the factor and the cap get.
    """
    if logits.shape != product.shape:
        return None
    product, logits = product.flatten().double(), logits.flatten().double()
    small = (product.abs() < 2e-3) & (product != 0)
    exact = (1.0, *numbers, *(1.0 / number for number in numbers))
    scale = _nearest((logits[small] / product[small]).mean().item(), exact)
    cap = _nearest(logits.abs().max().item(), exact)
    for warp in (LogitWarp(scale), LogitWarp(scale, cap)):
        if torch.allclose(warp(product), logits, rtol=1e-4, atol=1e-6):
            return warp
    return None


def _nearest(measured: float, exact: Sequence[float]) -> float:
    near = (float(value) for value in exact if math.isclose(measured, value, rel_tol=1e-5))
    return next(near, measured)


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Return where the parts of a model are.

    The class that `config.architectures` names is the class of the model.

    Raises:
        ModelError: the structure of the model cannot be read.
    """
    usual = (task for task in ("mlm", "causal_lm") if class_name(config, task))
    return _FOUND.answer(config, task_of(config) or next(usual, "classification"))


# Keys of a config without which the parts of its model are where they are.
UNRELATED = ("id2label", "label2id", "vocab_size", "dtype", "_name_or_path", "architectures")
_FOUND = Known(find_architecture, without=UNRELATED)


def task_of(config: PretrainedConfig) -> TaskType | None:
    """Return the task of the class that a config names; None if it names none of them."""
    name = next(iter(config.architectures or ()), "")
    for ending, task in CLASS_ENDINGS.items():
        if name.endswith(ending):
            return task
    for task in AUTO_CLASSES:
        if name and class_name(config, task) == name:
            return task
    return None


def for_task(config: PretrainedConfig, task: TaskType) -> Architecture:
    """Let a config name the class for a task, and return where the parts of its models are."""
    auto, name = AUTO_CLASSES[task].__name__, class_name(config, task)
    name = name or (getattr(config, "auto_map", None) or {}).get(auto, "").rpartition(".")[2]
    if not name:
        raise ModelError(f"transformers has no {auto} of a {config.model_type} model")
    config.architectures = [name]
    return architecture_of(config)


def weights_inside(model: Any) -> set[str]:
    """Return the names of the weights of the backbone but those of embeddings and poolers."""
    architecture = architecture_of(model.config)
    layers = tuple(f"{path}." for path in architecture.layer_paths(model.config))
    others = (f"{architecture.backbone}.{architecture.embeddings}", *architecture.renewed)
    outside = tuple(f"{path}." for path in others)
    return {
        full
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if (full := f"{path}.{name}").startswith(f"{architecture.backbone}.")
        and (
            full.startswith(layers)
            or not (isinstance(module, nn.Embedding) or full.startswith(outside))
        )
    }


def parameter_counts(model: Any) -> ParameterCounts:
    """Count the weights of a model, sharded or not; tied weights count once."""
    inside, sizes = weights_inside(model), dict[str, int]()
    for name, weight in model.named_parameters():
        sizes[name] = full_shape(weight).numel()
    return ParameterCounts(sum(sizes.values()), sum(sizes[n] for n in inside & sizes.keys()))
