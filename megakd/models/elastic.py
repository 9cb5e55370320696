"""Models that can run as any of their sub-networks without a copy of the weights.

If the units are sorted by importance, a sub-network is a prefix of every weight. Its forward
multiplies only with the prefixes, so that a view of a tenth of the units costs about a tenth of the
attentions and feed-forwards. Its gradients have the size of the whole weights and are zero outside
the prefixes. If the units are not sorted, a sub-network is a list of rows and columns of every
weight, which each forward copies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from megakd.contract.views import Axes, Cut, Maker, View
from megakd.engine.sharding import full_shape
from megakd.errors import ModelError
from megakd.models.architectures import Architecture
from megakd.models.axes import check_view, unit_makers, weight_axes
from megakd.models.elastic_modules import (
    ElasticConv1D,
    ElasticEmbedding,
    ElasticHeads,
    Elasticity,
    ElasticLayer,
    ElasticLinear,
    ElasticModule,
    ElasticNorm,
    ElasticSource,
    ElasticSplit,
    Views,
    make_elastic,
)
from megakd.models.layers import passed_by
from megakd.models.structure import architecture_of
from megakd.models.unit_axes import WIDTH

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MIXINS: Mapping[type[nn.Module], type[ElasticModule]] = {
    nn.Linear: ElasticLinear,
    Conv1D: ElasticConv1D,
    nn.Embedding: ElasticEmbedding,
}


class Elastic:
    """A model made elastic in place, before or after `deepspeed.initialize`, at any ZeRO stage.

    The parameters, their names, the state dict, and the function of the model outside `viewing` do
    not change. Every module runs in every view, also in layers without heads, so that ZeRO 3 sees
    the same modules in the same order. Several views may run forward before one backward.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        if any(isinstance(module, ElasticModule) for module in model.modules()):
            raise ModelError(
                f"{type(model).__name__} is already elastic; use the existing Elastic of the model"
            )
        architecture = architecture_of(model.config)
        self.units = architecture.units(model.config)
        self._model = model
        self.prunable = architecture.prunable(model.config)
        self._views = Views()
        self._lay_over_weights(model, architecture)
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                make_elastic(module, ElasticLayer, Elasticity(self._views))
        for number in range(1, architecture.number_of_layers(model.config) + 1):
            block = architecture.block_of(model, number)
            block.register_forward_hook(partial(self._pass_by, number), with_kwargs=True)
        embeddings = architecture.backbone_of(model).get_submodule(architecture.embeddings)
        known = embeddings.elasticity if isinstance(embeddings, ElasticModule) else None
        make_elastic(embeddings, ElasticSource, known or Elasticity(self._views))

    @cached_property
    def makers(self) -> dict[str, Maker]:
        return unit_makers(self._model)

    def _pass_by(self, layer: int, *facts: Any) -> Any:
        # The hook of a layer: hidden states pass it by if the view lacks it.
        cut = self._views.current
        layers = None if cut is None or cut.view is None else cut.view.layers
        return None if layers is None or layer in layers else passed_by(*facts)

    def _lay_over_weights(self, model: PreTrainedModel, architecture: Architecture) -> None:
        table = weight_axes(model)
        filling = architecture.filled_kinds(model.config)
        needing_heads = self._prepare_attentions(model, architecture, table)
        for path, module in model.named_modules():
            # In a cut model, a weight without elements is a buffer.
            weights = dict(module.named_parameters(recurse=False))
            tensors = {**weights, **dict(module.named_buffers(recurse=False))}
            shapes = {name: full_shape(tensor) for name, tensor in tensors.items()}
            names = {name: f"{path}.{name}" if path else name for name in shapes}
            axes = {name: table[full] for name, full in names.items() if full in table}
            if not axes:
                continue
            mixin = next((m for stock, m in MIXINS.items() if isinstance(module, stock)), None)
            # A module whose parameters are all vectors is a norm; its class differs by family.
            is_norm = all(len(full_shape(weight)) == 1 for weight in weights.values())
            mixin = ElasticNorm if mixin is None and is_norm and "weight" in weights else mixin
            fills = any(axis and axis.kind in filling for part in axes.values() for axis in part)
            if mixin is None or (fills and mixin is ElasticNorm):
                continue  # works on all units, of which some are zero
            needs_heads = path in needing_heads
            elasticity = Elasticity(self._views, axes, shapes, needs_heads, filling)
            make_elastic(module, mixin, elasticity)

    def _prepare_attentions(
        self, model: PreTrainedModel, architecture: Architecture, table: Mapping[str, Axes]
    ) -> set[str]:
        """Return the paths of projections that must give one head of zeros if a view has none."""
        needing: set[str] = set()
        found = architecture.found_units(model.config)
        for _, owner, units in found.of("heads"):
            makers = [f"{owner}.{path}" for path in units.makers]
            core = model.get_submodule(f"{owner}.{units.core}".removesuffix("."))
            needs_heads = not getattr(core, "handles_no_heads", False)
            needing |= {*makers} if needs_heads else set()
            heads = tuple(a for a in table[f"{makers[0]}.weight"] if a is not None)
            axes = {"heads": tuple(axis for axis in heads if axis.kind == "heads")}
            elasticity = Elasticity(self._views, axes, needs_heads=needs_heads)
            if found.heads.is_narrow and hasattr(core, "split_size"):
                make_elastic(core, ElasticSplit, elasticity)
            elif found.heads.columns:
                make_elastic(core, ElasticHeads, elasticity)
        return needing

    @contextmanager
    def viewing(self, view: View | None) -> Iterator[None]:
        """Run the model as a view of itself inside the context; the innermost context counts.

        The view is the same on all ranks; None runs the model as `keep` has left it, by default
        whole.
        """
        cut = self._views.base
        if view is not None:
            check_view(view, self.prunable)
            cut = Cut(None, view._replace(width=None) if view.width == self.units.width else view)
        with self._views.at(cut):
            yield

    def keep(self, cut: Cut | None) -> None:
        """Run the model as a cut of itself, the same on all ranks, from now on; None: whole.

        The outputs are those of the model that is cut in this way (`cut_state`). Weights that are
        not kept get gradients of zero.
        """
        if cut is not None and cut.view is not None:
            check_view(cut.view, self.prunable)
        self._views.keep(cut)

    def follow(self, linear: nn.Module) -> None:
        """Let a linear map [O, D] outside the model take the kept columns of the hidden states.

        Its `weights_in_view` then have only the kept columns.
        """
        axes = {"weight": (None, WIDTH)}
        shapes = {name: full_shape(weight) for name, weight in linear.named_parameters()}
        make_elastic(linear, ElasticLinear, Elasticity(self._views, axes, shapes))

    @contextmanager
    def sharing_embeddings(self) -> Iterator[None]:
        """Compute the embeddings once per input inside the context, with one dropout for all views.

        The gradient of the embeddings is the sum over all views, which must go through one
        backward. A view shares embeddings only with views of the same residual width.
        """
        former, self._views.shared = self._views.shared, {}
        try:
            yield
        finally:
            self._views.shared = former
