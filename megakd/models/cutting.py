"""What is written of a model, whole or cut to a view: config, weights and folder."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CONFIG_MAPPING

from megakd.config.task import TaskConfig
from megakd.contract.views import Axes, Cut, UnitOrder, View
from megakd.data.tokenizers import rows_for
from megakd.engine.sharding import gathered_state
from megakd.errors import ModelError, one_line
from megakd.models.architectures import (
    HEAD_COLUMNS,
    HEAD_COUNTS,
    HEAD_WIDTH,
    NARROW,
    NEURON_COUNTS,
    QUERIES_PER_KEY,
    SCORE_WIDTH,
    architecture_named,
    narrow_maps,
)
from megakd.models.axes import check_view, cut_part, output_modules, weight_axes
from megakd.models.fitting import label_order, plan_loading, set_labels, valueless_model
from megakd.models.generation import generation_file
from megakd.models.layers import check_depth, renumbered, without_layers
from megakd.models.lora import adapter_config, merged_state
from megakd.models.model_folder import Extra, ModelContent, write_model_folder
from megakd.models.own_models import OWN_MODELS
from megakd.models.proposed_units import are_of_maps
from megakd.models.second_vocabulary import FILE, second_vocabulary, without_second_vocabulary
from megakd.models.source import ModelSource
from megakd.models.structure import architecture_of
from megakd.models.units import with_units
from megakd.models.weights import WeightReader

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CUT = "cut_"
"""Prefix of model types that no stock config can describe; their classes start with `Cut`."""
# Keys that a config of another shape must not inherit.
SHAPE_KEYS = (
    *(HEAD_COUNTS, NEURON_COUNTS, HEAD_WIDTH, QUERIES_PER_KEY, SCORE_WIDTH),
    *("model_type", "auto_map", "architectures"),
)


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
    if not view.heads:
        return copy.deepcopy(config)
    architecture = architecture_of(config)
    whole = architecture.units(config)
    if view.head_width is not None and view.head_width == architecture.heads(config).width:
        view = view._replace(head_width=None)
    check_view(view, architecture.prunable(config))
    view = view._replace(width=whole.width if view.width is None else view.width)
    if not architecture.is_listed:
        return copy.deepcopy(config) if view == whole else _config_found(config, view)
    if architecture.shares_bias:
        return _with_columns(config, view, order)
    rescales = architecture.score_width(config) != _head_width(config, view)
    if view == whole and (learns or not rescales):
        return copy.deepcopy(config)
    stock = None if learns and rescales else _stock_config(config, view)
    return stock or _own_config(config, view, learns=learns)


def rescaled(
    state: Iterable[tuple[str, Tensor]], config: PretrainedConfig, view: View
) -> Iterator[tuple[str, Tensor]]:
    """Yield a cut model's weights so that scores are divided by the root of the new head width.

    A stock model divides attention scores by the root of the width of its heads. If heads lose
    columns, the factor sqrt(new width / old width) in the queries keeps the scores. The config is
    that of the model before the cut.
    """
    architecture = architecture_of(config)
    if not architecture.is_listed:  # loses whole heads
        yield from state
        return
    factor = (_head_width(config, view) / architecture.score_width(config)) ** 0.5
    queries = {paths.projections[0] for paths in filter(None, architecture.attentions(config))}
    for name, tensor in state:
        is_query = factor != 1 and name.rpartition(".")[0] in queries
        yield name, tensor * factor if is_query else tensor


def _head_width(config: PretrainedConfig, view: View) -> int:
    return view.head_width or architecture_of(config).heads(config).width


def cut_class_name(model: PreTrainedModel, config: PretrainedConfig) -> str:
    """Return the name of the class for a config from `cut_config`, with the head of `model`."""
    stock = type(model).__name__.removeprefix("Cut").removeprefix("Narrow")
    if narrow_maps(config) is not None:
        return f"Narrow{stock}"
    return f"Cut{stock}" if config.model_type.startswith(CUT) else stock


def is_stock(config: PretrainedConfig) -> bool:
    """Return whether transformers has the class of a cut model."""
    return not config.model_type.startswith(CUT) and narrow_maps(config) is None


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
        if adapter_config(model) is not None:
            state, files = merged_state(model)
            extra |= files
        if second_vocabulary(model) is not None:
            state, extra[FILE] = without_second_vocabulary(state)
        return ModelContent(whole, state, tokenizer, type(model).__name__, extra)
    config = cut_config(whole, cut.view, cut.order, learns=learns)
    state = cut_state(state, weight_axes(model), cut.view, cut.order)
    state = state if learns else rescaled(state, whole, cut.view)
    named = renumbered(state, whole, cut.view)
    return ModelContent(config, named, tokenizer, cut_class_name(model, config))


def reshape_folder(  # noqa: PLR0913  (each is another fact about the model)
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
    labels = label_order(whole, label_names, where=source.where)
    if labels is not None:
        set_labels(whole, label_names, multi_label=bool(task.multi_label))
    if view is not None and view.layers is not None:
        check_depth(source, view.layers, where=source.where)
    view = dataclasses.replace(source, config=whole).whole if view is None else view
    config = cut_config(whole, view, order)
    uncut, reader = valueless_model(source, task, whole), WeightReader(source.where)
    state = ((name, reader.read(stored)) for name, stored in match.in_disk_order())
    if labels is not None:
        outputs, rows = output_modules(uncut, source.architecture), list(labels)
        state = ((n, t[rows] if n.rpartition(".")[0] in outputs else t) for n, t in state)
    state = rescaled(cut_state(state, weight_axes(uncut), view, order), whole, view)
    settings = generation_file(source, tokenizer) if task.type == "causal_lm" else {}
    state, extra = renumbered(state, whole, view), {**settings, **(extra or {})}
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
        setattr(cut, architecture.neurons, max(view.neurons) or 1)  # not the value of the teacher
        cut.head_width = architecture.heads(config).width
        cut.hidden_size = view.width
    return cut


def _config_found(config: PretrainedConfig, view: View) -> PretrainedConfig:
    """Return the config of a cut model outside of the table: the family's, where it can state it.

    Else the config lists the maps that are narrower, for the class that is stored with the model.
    """
    architecture, cut = architecture_of(config), copy.deepcopy(config)
    heads, neurons, blocks = architecture.found_units(config)
    parts = ("heads", heads, view.heads), ("neurons", neurons, view.neurons)
    for name, cuttable, counts in parts:
        shares = {
            (count, units.total)
            for count, units in zip(counts, cuttable.layers, strict=True)
            if units is not None
        }
        if all(count == whole for count, whole in shares):
            continue
        why = "the layers keep different numbers"
        if len(shares) == 1 and 0 not in next(iter(shares)):
            ((count, _),) = shares
            why = "its config has no key that states the number alone"
            try:
                if cuttable.keys:
                    cut = with_units(cut, cuttable, next(filter(None, cuttable.layers)), count)
                    continue
            except (StrictDataclassError, ValueError) as error:
                why = one_line(error)
        is_narrow = cuttable.is_narrow and are_of_maps(cuttable.layers)
        if not is_narrow or (name == "heads" and 0 in {count for count, _ in shares}):
            raise ModelError(
                f"a {config.model_type} model cannot keep {counts} {name} in its layers: {why}; "
                "keep the same number, at least 1, in all layers, such as with "
                "method.allocation: uniform"
            )
        narrow = narrow_maps(cut) or {"blocks": blocks, "layers": [{} for _ in counts]}
        for maps, units, count in zip(narrow["layers"], cuttable.layers, counts, strict=True):
            maps.update({} if units is None else units.narrow_maps(count))
        setattr(cut, NARROW, narrow)
    return cut


def _stock_config(config: PretrainedConfig, view: View) -> PretrainedConfig | None:
    if any(len({*counts}) != 1 or 0 in counts for counts in (view.heads, view.neurons)):
        return None
    architecture = architecture_of(config)
    heads = architecture.heads(config)
    changes = _widths(config, view)
    changes["num_attention_heads"] = view.heads[0] * (heads.queries // heads.keys)
    changes[architecture.neurons] = view.neurons[0]
    if hasattr(config, "num_key_value_heads"):
        changes["num_key_value_heads"] = view.heads[0]
    if hasattr(config, "rope_parameters"):
        changes["head_dim"] = heads.width
    try:
        cut = _changed(config, config.model_type.removeprefix(CUT), changes)
    except (StrictDataclassError, ValueError):
        return None  # Llama's config, for example, requires heads that divide the width
    stock = architecture_named(cut.model_type)
    fits = cut.hidden_size % cut.num_attention_heads == 0 or "head_dim" in changes
    return cut if fits and stock.heads(cut).width == _head_width(config, view) else None


def _own_config(config: PretrainedConfig, view: View, *, learns: bool) -> PretrainedConfig:
    changes = _widths(config, view)
    changes[HEAD_COUNTS], changes[NEURON_COUNTS] = list(view.heads), list(view.neurons)
    architecture = architecture_of(config)
    heads, width = architecture.heads(config), _head_width(config, view)
    changes[HEAD_WIDTH], changes[QUERIES_PER_KEY] = width, heads.queries // heads.keys
    if learns and width != architecture.score_width(config):
        changes[SCORE_WIDTH] = architecture.score_width(config)
    name = f"{CUT}{config.model_type.removeprefix(CUT)}"
    if name not in OWN_MODELS:
        raise ModelError(
            f"a {config.model_type} model cannot keep {view.heads} heads and {view.neurons} "
            "neurons in its layers; keep the same number in all layers, or write its class in "
            "megakd/models/modeling/modeling_cut.py"
        )
    return _changed(config, name, changes)


def _widths(config: PretrainedConfig, view: View) -> dict[str, Any]:
    changes: dict[str, Any] = {"hidden_size": view.width}
    # ELECTRA's embeddings may have another width, which does not change.
    embeddings, before = getattr(config, "embedding_size", None), config.hidden_size
    if embeddings == before:
        changes["embedding_size"] = view.width
    elif embeddings is not None and embeddings == view.width:
        raise ModelError(
            f"the view keeps a width of {view.width}, which is the embedding_size of the "
            f"{config.model_type} model: at equal widths the class has no projection from the "
            "embeddings, and their weights would be lost; keep another width"
        )
    return changes


def _changed(
    config: PretrainedConfig, model_type: str, changes: Mapping[str, Any]
) -> PretrainedConfig:
    ours = OWN_MODELS.get(model_type)
    made = CONFIG_MAPPING[model_type] if ours is None else ours.config
    kept = {key: value for key, value in config.to_dict().items() if key not in SHAPE_KEYS}
    own_names = {made.attribute_map.get(key, key): value for key, value in changes.items()}
    return made.from_dict({**kept, **own_names})
