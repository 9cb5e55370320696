"""What is written of a model, whole, cut to a view, or with narrower hidden states."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import local_torch_dtype

from megakd.config.task import TaskConfig, TaskType
from megakd.data.tokenizers import rows_for
from megakd.engine.sharding import gathered_state
from megakd.errors import ModelError, one_line
from megakd.models.architectures import (
    HEAD_COLUMNS,
    NARROW,
    Architecture,
    Known,
    class_for,
    narrow_maps,
)
from megakd.models.elastic import Elastic, check_view, weight_axes
from megakd.models.end_tokens import generation_file
from megakd.models.experts import with_fewer_experts
from megakd.models.fitting import (
    ModelSource,
    plan_loading,
    valueless_model,
)
from megakd.models.layers import RemainingLayers, check_depth, without_layers
from megakd.models.lora import merged_state
from megakd.models.model_folder import Extra, ModelContent, fill_serving_folder, write_model_folder
from megakd.models.proposed_units import Cuttable, are_of_maps, cut_part
from megakd.models.second_vocabulary import FILE, SECOND, without_second_vocabulary
from megakd.models.small_copy import widths_of
from megakd.models.structure import architecture_of, for_task
from megakd.models.units import (
    KINDS,
    OF_COPIES,
    SmallCopy,
    as_double,
    head_keys,
    in_copy,
    is_same,
    mixed,
    outputs_of,
    with_units,
)
from megakd.models.views import Axes, Cut, Kind, UnitOrder, View
from megakd.models.weights import WeightReader
from megakd.process.seeding import cpu_seeded

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def cut_config(
    config: PretrainedConfig, view: View, order: UnitOrder | None = None, *, learns: bool = False
) -> PretrainedConfig:
    """Return the config of a model cut to a view: a stock config if it can describe the shape.

    Args:
        order: the order of the units before the cut. The config records it only if the heads have
            columns in a shared position bias.
        learns: whether the model continues to learn with its optimizer's state, so that its weights
            must not be rescaled; see `rescaled`.
    """
    config, view = without_layers(config, view)
    config, view = with_fewer_experts(config, view.experts), view._replace(experts=None)
    if not view.heads:
        return copy.deepcopy(config)
    architecture = architecture_of(config)
    whole = architecture.units(config)
    head_width = architecture.heads(config).width
    if view.head_width == head_width:
        view = view._replace(head_width=None)
    check_view(view, architecture.prunable(config))
    view = view._replace(width=whole.width if view.width is None else view.width)
    if architecture.shares_bias:
        return _with_columns(config, view, order)
    rescales = architecture.score_width(config) != (view.head_width or head_width)
    if view == whole and (learns or not rescales):
        return copy.deepcopy(config)
    return _with_units(config, view, learns=learns and rescales)


def rescaled(
    state: Iterable[tuple[str, Tensor]], config: PretrainedConfig, view: View
) -> Iterator[tuple[str, Tensor]]:
    """Yield a cut model's weights so that scores are divided by the root of the new head width.

    A stock model divides attention scores by the root of the width of its heads. If heads lose
    columns, the factor sqrt(new width / old width) in the queries keeps the scores. The config is
    that of the model before the cut.
    """
    architecture = architecture_of(config)
    width = view.head_width or architecture.heads(config).width
    factor = (width / architecture.score_width(config)) ** 0.5
    if factor == 1:
        yield from state
        return
    of_heads = architecture.found_units(config).parts_with("heads")
    queries = {f"{owner}.{units.makers[0]}" for _, owner, units in of_heads}
    for name, tensor in state:
        yield name, tensor * factor if name.rpartition(".")[0] in queries else tensor


def cut_class_name(model: PreTrainedModel, config: PretrainedConfig) -> str:
    """Return the name of the class for a config from `cut_config`, with the head of `model`."""
    stock = type(model).__name__.removeprefix("Narrow")
    return stock if is_stock(config) else f"Narrow{stock}"


def is_stock(config: PretrainedConfig) -> bool:
    """Return whether transformers has the class of a cut model."""
    return narrow_maps(config) is None


def cut_state(
    state: Iterable[tuple[str, Tensor]],
    axes: Mapping[str, Axes],
    view: View | None,
    order: UnitOrder | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield weights with their units reordered, and then cut to a view.

    An empty vector, which stands for a tensor on ranks that do not hold it, is passed on unchanged.
    """
    for name, tensor in state:
        of_tensor = axes.get(name)
        if of_tensor is None or tensor.shape == (0,):
            yield name, tensor
        else:
            yield name, cut_part(tensor, of_tensor, Cut(order, view))


def content_of(
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    cut: Cut | None = None,
    learns: bool = False,
) -> ModelContent:
    """Return what is written of a model of an engine; for `learns` see `cut_config`."""
    whole, state = model.config, gathered_state(model)
    if cut is None or cut.view is None:
        extra: dict[str, Any] = {}
        if hasattr(model, "peft_config"):
            state, files = merged_state(model)
            extra |= files
        if hasattr(model, SECOND):
            state, extra[FILE] = without_second_vocabulary(state)
        return ModelContent(whole, state, tokenizer, type(model).__name__, extra)
    config = cut_config(whole, cut.view, cut.order, learns=learns)
    state = cut_state(state, weight_axes(model), cut.view, cut.order)
    state = state if learns else rescaled(state, whole, cut.view)
    named = RemainingLayers(whole, cut.view.layers).select(state)
    return ModelContent(config, named, tokenizer, cut_class_name(model, config))


def reshape_folder(
    source: ModelSource,
    folder: Path,
    *,
    task: TaskConfig,
    label_names: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    view: View | None = None,
    order: UnitOrder | None = None,
    extra: Extra | None = None,
) -> None:
    """Write a stored model with its units sorted, cut to a view, or both; call on one rank.

    Tensors are copied from file to file, one at a time, in their own dtypes. The model has the head
    that the task needs, with labels in the data's order, as in a model that continues to learn.
    """
    if source.folder is None:
        raise ModelError(f"{source.where}: {source.name} has no stored weights that could be cut")
    whole, match = plan_loading(
        source, task, label_names, tokenizer_size=rows_for(tokenizer), need_head=True
    )
    if view is not None and view.layers is not None:
        check_depth(source, view.layers, where=source.where)
    view = dataclasses.replace(source, config=whole).whole if view is None else view
    config = cut_config(whole, view, order)
    uncut, reader = valueless_model(source, task, whole), WeightReader(source.where)
    state = ((name, reader.read(stored)) for name, stored in match.in_disk_order())
    state = rescaled(cut_state(state, weight_axes(uncut), view, order), whole, view)
    settings = generation_file(source, tokenizer) if task.type == "causal_lm" else {}
    state, extra = (
        RemainingLayers(whole, view.layers).select(state),
        {**settings, **(extra or {})},
    )
    content = ModelContent(config, state, tokenizer, cut_class_name(uncut, config), extra)
    write_model_folder(folder, content)


def _with_columns(config: PretrainedConfig, view: View, order: UnitOrder | None) -> Any:
    architecture = architecture_of(config)
    cut: Any = copy.deepcopy(config)
    whole = architecture.units(config)
    columns = getattr(config, HEAD_COLUMNS, None) or [list(range(count)) for count in whole.heads]
    if order is not None:
        columns = [
            [part[head] for head in heads] for part, heads in zip(columns, order.heads, strict=True)
        ]
    if order is not None or view != whole:
        cut.head_columns = [part[:kept] for part, kept in zip(columns, view.heads, strict=True)]
    if view != whole:
        cut.head_counts, cut.neuron_counts = list(view.heads), list(view.neurons)
        cut.d_ff = max(view.neurons) or 1  # not the value of the teacher
        cut.head_width = architecture.heads(config).width
        cut.hidden_size = view.width
    return cut


def _with_units(config: PretrainedConfig, view: View, *, learns: bool) -> PretrainedConfig:
    """Return the config of a cut model: the family's, where it can state the numbers of units.

    Else the config lists the units of each layer, for the class that is stored with the model.

    Args:
        learns: attention scores are still divided by the root of the former width of heads.
    """
    architecture, narrow = architecture_of(config), narrow_maps(config)
    found, heads = architecture.found_units(config), architecture.heads(config)
    cut: Any = copy.deepcopy(config)
    vars(cut).pop(NARROW, None)
    view = view._replace(width=view.width or config.hidden_size)
    is_plain = narrow is None and view.head_width is None and view.width == config.hidden_size
    widths, width = widths_of(config, view.width), view.head_width or heads.width
    all_heads = (max(view.heads) or heads.keys) * heads.queries // heads.keys * width
    is_stated = is_plain or found.stating_width is not None or view.width == all_heads
    stating = {} if is_plain else {**widths, **dict.fromkeys(found.stating_width or (), width)}
    listed, unstated = dict[str, Cuttable](), set[Kind]()
    fewer = found.heads.fewer(view.heads, width), found.neurons.fewer(view.neurons)
    for kind, before, after in zip(KINDS, found[:2], fewer, strict=True):
        of_heads = kind == "heads"
        listed[kind] = after._replace(stated=before.stated or max(before.counts, default=0))
        if (is_plain and before == after) or not (of_heads or any(before.layers)):
            continue
        keys = before.keys
        if of_heads and not is_plain:  # a config that states the width may now state heads
            keys = (keys or head_keys(cut)) if is_stated and not learns else ()
        try:
            cut = _stated(cut, listed[kind]._replace(keys=keys), stating if of_heads else {})
            listed[kind] = after._replace(stated=max(after.counts))
        except (StrictDataclassError, ValueError) as error:
            _check_narrow(config, kind, before, after.counts, one_line(error))
            unstated.add(kind)
    if not unstated:
        return cut
    changes = widths if not is_plain and "heads" in unstated else {}  # of narrower weights
    keys = {
        **found._replace(**listed).as_keys(),
        "score_width": architecture.score_width(config) if learns else None,
        "stock": changes
        and ((narrow or {}).get("stock") or {k: getattr(config, k) for k in changes}),
    }
    for key, value in {**changes, NARROW: keys}.items():
        setattr(cut, key, value)
    return cut


def _stated(config: Any, units: Cuttable, more: Mapping[str, int]) -> PretrainedConfig:
    """Return the config whose keys, and more, state the units of all layers.

    Raises:
        ValueError: the reason why no keys state them.
    """
    known = [one for one in units.layers if one is not None]
    if known and (len({one.total for one in known}) != 1 or not known[0].total):
        raise ValueError("the layers keep different numbers")
    if not units.keys:
        raise ValueError("its config has no key that states the number alone")
    if not known:
        return type(config).from_dict({**config.to_dict(), **more})
    return with_units(config, units, known[0], known[0].total, more)


def _check_narrow(
    config: Any, kind: str, before: Cuttable, counts: Sequence[int], why: str
) -> None:
    """Raise if the class that is stored with a cut model does not compute its layers."""
    empty = any(u is not None and not n for u, n in zip(before.layers, counts, strict=True))
    layers_run_narrow = before.layers_run_narrow and are_of_maps(before.layers)
    if not any(before.layers) or (layers_run_narrow and (before.can_lose_all or not empty)):
        return
    raise ModelError(
        f"a {config.model_type} model cannot keep {tuple(counts)} {kind} in its layers: {why}; "
        "keep the same number, at least 1, in all layers, such as with "
        "method.allocation: uniform"
    )


def why_rigid(config: Any, architecture: Architecture) -> str | None:
    """Return the reason why the hidden states of a model cannot lose columns; None: they can."""
    rigid = architecture.why_uncut(config) or architecture.found_units(config).rigid
    if rigid is not None or architecture.shares_bias or narrow_maps(config) is not None:
        return rigid
    return _RIGID.answer(config, architecture)


def _find(config: Any, architecture: Architecture) -> str | None:
    is_exact, failed = in_copy(config, architecture, _is_exact)
    more = f" ({failed})" if failed else ""
    return None if is_exact else f"a narrower model does not compute what is left of it{more}"


_RIGID = Known(_find, without=())


def _is_exact(small: Any, task: TaskType, blocks: str, count: int) -> bool:
    """Return whether written models compute what a small copy computes when it runs as a view.

    The views keep half of the units, with and without another width than that of all heads.
    """
    found, copied = (
        OF_COPIES.answer(small, task, blocks, count),
        SmallCopy(small, task, blocks, count),
    )
    model, config = copied.model, copy.deepcopy(small)
    setattr(config, NARROW, found.as_keys())  # what reads and writes views asks the config
    model.config, architecture = config, for_task(config, task)
    elastic, axes = Elastic(model), weight_axes(model)
    for view, learns in _narrow_views(architecture, config):
        heads, neurons = (tuple(map(mixed, counts)) for counts in elastic.units[:2])
        order = UnitOrder(heads, neurons, mixed(config.hidden_size))
        elastic.keep(Cut(order, view))
        expected, written = outputs_of(model), cut_config(config, view, order, learns=learns)
        state = cut_state(model.state_dict().items(), axes, view, order)
        state = iter(state if learns else rescaled(state, config, view))
        content = ModelContent(written, state, architecture=cut_class_name(model, written))
        if not is_same(outputs_of(_opened(content, task)), expected):
            return False
    return True


def _opened(content: ModelContent, task: TaskType) -> PreTrainedModel:
    """Return a written model as transformers opens it, which computes some buffers anew."""
    with TemporaryDirectory() as folder, cpu_seeded(0), local_torch_dtype(torch.float64):
        fill_serving_folder(Path(folder), content)
        model_class: Any = class_for(content.config, task)
        options = {"dtype": torch.float64, "attn_implementation": "eager"}
        return as_double(model_class.from_pretrained(folder, **options))


def _narrow_views(architecture: Architecture, config: Any) -> Iterator[tuple[View, bool]]:
    """Yield views of a small copy with fewer units of all kinds, and whether each learns on."""
    whole, heads = architecture.prunable(config), architecture.heads(config)
    loses_columns, width = whole.head_width is not None, config.hidden_size
    head_width = heads.width * 3 // 4 if loses_columns else heads.width
    counts = whole.heads if loses_columns else tuple(-(-count // 2) for count in whole.heads)
    neurons = tuple(-(-count // 2) for count in whole.neurons)
    all_heads = (max(counts) or heads.keys) * heads.queries // heads.keys * head_width
    columns = head_width if loses_columns else None
    # Heads do not divide this width evenly, and that of all heads they do.
    view = View(counts, neurons, width * 2 // 3, columns)
    yield view, False
    if all_heads < width:
        yield view._replace(width=all_heads), False
    if loses_columns:
        yield view, True
