"""Whether models of a class compute what is left of a model whose hidden states lose columns."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import local_torch_dtype

from megakd.contract.tasks import TaskType
from megakd.contract.views import Cut, UnitOrder, View
from megakd.models.architectures import NARROW, Architecture, Known, class_for, narrow_maps
from megakd.models.axes import weight_axes
from megakd.models.cutting import cut_class_name, cut_config, cut_state, rescaled
from megakd.models.elastic import Elastic
from megakd.models.model_folder import ModelContent, fill_serving_folder
from megakd.models.structure import for_task
from megakd.models.units import (
    OF_COPIES,
    SmallCopy,
    as_double,
    in_copy,
    is_same,
    mixed,
    outputs_of,
)
from megakd.process.seeding import cpu_seeded


def why_rigid(config: Any, architecture: Architecture) -> str | None:
    """Return the reason why the hidden states of a model cannot lose columns; None: they can."""
    rigid = architecture.why_uncut(config) or architecture.found_units(config).rigid
    if rigid is not None or architecture.shares_bias or narrow_maps(config) is not None:
        return rigid
    return _RIGID.of(config, architecture)


def _find(config: Any, architecture: Architecture) -> str | None:
    is_exact, failed = in_copy(config, architecture, _is_exact)
    more = f" ({failed})" if failed else ""
    return None if is_exact else f"a narrower model does not compute what is left of it{more}"


_RIGID = Known(_find, without=())


def _is_exact(small: Any, task: TaskType, blocks: str, count: int) -> bool:
    """Return whether written models compute what a small copy computes when it runs as a view.

    The views keep half of the units, with and without another width than that of all heads.
    """
    found, copied = OF_COPIES.of(small, task, blocks, count), SmallCopy(small, task, blocks, count)
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
