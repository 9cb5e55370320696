"""Outputs read from a model: logits or (hidden, head), hidden states, attention vectors.

Teachers and students run their forward only here, so that both are read in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

import megakd_kernels
from megakd.config.task import Kernels
from megakd.config.terms import Heads
from megakd.data.batch import IGNORE, AttentionVectors, Batch, Outputs, Predictions
from megakd.engine.sharding import gathered, is_sharded
from megakd.models.architectures import counts_padding, has_token_types
from megakd.models.elastic import weights_in_view
from megakd.models.packing import inputs_of_documents
from megakd.models.routing import ASKED, balance_of
from megakd.models.second_vocabulary import SecondHead, second_vocabulary
from megakd.models.small_copy import no_cache
from megakd.models.structure import Vectors, architecture_of, attentions_seen, input_of, only_rows

if TYPE_CHECKING:
    pass


class Needs(NamedTuple):
    """Outputs that the chosen losses need from a model's forward.

    hidden_layers: layers, from 0 for the embedding output, whose hidden states are needed.
    attention_layers: layers, from 1, whose queries, keys and values are needed.
    """

    hidden_layers: tuple[int, ...] = ()
    attention_layers: tuple[int, ...] = ()

    def with_hidden(self, *layers: int) -> Needs:
        return self._replace(hidden_layers=tuple(sorted({*self.hidden_layers, *layers})))

    def with_attention(self, *layers: int) -> Needs:
        return self._replace(attention_layers=tuple(sorted({*self.attention_layers, *layers})))


class LanguageModelHead:
    """The output matrix of a causal or masked language model.

    warp: the factor and the cap between the product with the matrix and the logits.
    """

    def __init__(self, model: Any) -> None:
        architecture = architecture_of(model.config)
        self._module: nn.Module = model.get_output_embeddings()
        owner, _, self._bias = (architecture.bias or "").rpartition(".")
        self._owner = model.get_submodule(owner) if self._bias else None
        self.warp = architecture.warp

    def read(self) -> tuple[Tensor, Tensor | None]:
        """Return (weight [V, D], bias [V] or None); under ZeRO-3 only inside a module's forward.

        The matrix is as narrow as the hidden states of the current view.
        """
        weight, bias = weights_in_view(self._module)
        if self._owner is not None:
            added = getattr(self._owner, self._bias).flatten()
            bias = added if bias is None else bias + added
        return weight, bias

    @contextmanager
    def open(self) -> Iterator[None]:
        """Keep the matrix gathered inside the context; a collective under ZeRO-3.

        A term reads the matrix in a forward of its own, for which DeepSpeed fetches it. Others open
        it for the read alone: if DeepSpeed had to fetch it for the forward of the whole model, the
        next forward would not be the one that it has recorded.
        """
        owners = filter(None, (self._module, self._owner))
        with gathered([weight for part in owners for weight in part.parameters(recurse=False)]):
            yield


def read_outputs(model: nn.Module, batch: Batch, needs: Needs) -> Outputs:
    """Run the model once and return the outputs that the losses need.

    A classifier or regressor gives logits [B, C]. A language model runs up to its output matrix:
    the losses take (hidden, head) and never form [B, T, V].
    """
    if needs == Needs():
        return _read(model, batch)
    with (
        _states_taken(model, needs.hidden_layers) as states,
        attentions_taken(model, needs.attention_layers) as attentions,
    ):
        read = _read(model, batch)
    layers = range(architecture_of(model.config).number_of_layers(model.config) + 1)  # type: ignore[arg-type]
    return read._replace(
        hidden_states=tuple(map(states.get, layers)) if needs.hidden_layers else (),
        attention=tuple(map(attentions.get, layers)) if needs.attention_layers else (),
    )


def _read(model: Any, batch: Batch) -> Outputs:
    inputs, pieces = dict(batch.inputs), batch.second
    if "position_ids" in inputs:
        inputs = inputs_of_documents(model, batch)
    if not batch.labels_tokens:
        if not has_token_types(model.config):
            inputs.pop("token_type_ids", None)
        return Outputs(logits=model(**inputs, **no_cache(model)).logits)
    architecture = architecture_of(model.config)
    if "position_ids" in inputs and counts_padding(model.config):
        inputs["position_ids"] = inputs["position_ids"] + model.config.pad_token_id + 1
    second = None if pieces is None else second_vocabulary(model)
    if second is not None:
        inputs["inputs_embeds"] = second(inputs.pop("input_ids"), model.get_input_embeddings())
    rows, backbone, routing = batch.targets, architecture.backbone_of(model), balance_of(model)
    asked = {} if routing is None else ASKED
    if rows is not None and second is not None and pieces is not None:
        rows = torch.cat([rows, pieces.positions])
    if architecture.reads_head_input:
        # The transform of a masked language model computes these rows alone too.
        with input_of(model.get_output_embeddings()) as seen, only_rows(backbone, rows):
            output = model(**inputs, **no_cache(model), **asked)
        hidden = seen[0] if rows is None else seen[0][0]
    else:
        output = backbone(**inputs, **no_cache(backbone), **asked)
        states = output.last_hidden_state
        hidden = states if rows is None else states.flatten(0, 1)[rows]
    if routing is not None:
        logits = output.router_logits or ()  # all layers of the model may be dense
        routing = routing._replace(logits=tuple(one.flatten(0, -2) for one in logits))
    read = Outputs(hidden=hidden, head=LanguageModelHead(model), routing=routing)
    if second is None or pieces is None:
        return read
    hidden, chosen = hidden.tensor_split((-len(pieces.positions),))
    return read._replace(hidden=hidden, second=Outputs(hidden=chosen, head=SecondHead(second)))


def predict(model: nn.Module, batch: Batch, kernels: Kernels = "auto") -> Predictions:
    """Return logits or scores of a micro-batch; for a language model, the sums for its metrics."""
    return predictions_of(read_outputs(model, batch, Needs()), batch, kernels)


def predictions_of(read: Outputs, batch: Batch, kernels: Kernels = "auto") -> Predictions:
    """Return the predictions in a model's outputs for a micro-batch; see `predict`."""
    if read.logits is not None:
        return Predictions(outputs=read.logits.float(), sums=None)
    if read.head is None or read.hidden is None:
        raise TypeError("a language model was read without its head")
    with read.head.open():
        weight, bias = read.head.read()
        stats = megakd_kernels.linear_stats(
            read.hidden,
            weight,
            labels=batch.target_labels,
            ignore_index=IGNORE,
            student_bias=bias,
            softcap_s=read.head.warp.softcap,
            logit_scale_s=read.head.warp.scale,
            impl=kernels,
        )
    sums = torch.stack([stats.ce_sum.double(), stats.agreement.double(), stats.n_valid.double()])
    return Predictions(outputs=None, sums=sums)


@contextmanager
def _states_taken(model: Any, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Yield the hidden states [B, T, D] of these layers, which a forward in the body records.

    The states are those of transformers: 0 is the input of the first layer, and the last layer's
    states are after the norm that follows the layers.
    """
    architecture, states = architecture_of(model.config), dict[int, Tensor]()
    if layers:
        architecture.check_layers()

    def note_input(_: nn.Module, inputs: Sequence[Any], named: dict[str, Any]) -> None:
        states[0] = inputs[0] if inputs else named["hidden_states"]

    with ExitStack() as hooks:
        for layer in layers:
            if layer == 0:
                first = architecture.block_of(model, 1)
                hook = first.register_forward_pre_hook(note_input, with_kwargs=True)
            else:
                is_last = layer == architecture.number_of_layers(model.config)
                last = architecture.backbone_of(model)
                module = last if is_last else architecture.block_of(model, layer)
                hook = module.register_forward_hook(partial(_take, states, layer))
            hooks.enter_context(hook)
        yield states


def _take(to: dict[int, Tensor], layer: int, _: nn.Module, inputs: object, output: Any) -> None:
    to[layer] = output if isinstance(output, Tensor) else output[0]


@contextmanager
def attentions_taken(model: Any, layers: Sequence[int]) -> Iterator[dict[int, AttentionVectors]]:
    """Yield a mapping that has the attention vectors of these layers after a forward in the body.

    Nothing is computed in the body, because gradient checkpointing repeats the forward, without the
    hooks, and a repeated forward must save the same tensors as the first one.
    """
    architecture = architecture_of(model.config)
    if layers:
        architecture.check_attentions()
    blocks = {layer: architecture.block_of(model, layer) for layer in layers}
    layer_of = {module: layer for layer, block in blocks.items() for module in block.modules()}
    seen, outputs = dict[int, Vectors](), dict[int, Tensor]()
    attentions: dict[int, AttentionVectors] = {}

    def note(module: nn.Module, vectors: Vectors) -> None:
        if module in layer_of:
            seen.setdefault(layer_of[module], vectors)

    with ExitStack() as hooks:
        for layer, block in blocks.items():
            hooks.enter_context(block.register_forward_hook(partial(_take, outputs, layer)))
        if blocks:
            hooks.enter_context(attentions_seen(note))
        yield attentions
    for layer, block in blocks.items():
        heads = architecture.heads(model.config)
        attentions[layer] = _as_read(block, outputs[layer], seen.get(layer), heads)


def _as_read(
    block: nn.Module, output: Tensor, vectors: Vectors | None, heads: Heads
) -> AttentionVectors:
    if vectors is None:  # a layer without heads: zeros relate all tokens equally
        zeros = output.new_zeros(*output.shape[:2], heads.width)
        queries = zeros.repeat(1, 1, heads.queries // heads.keys)
        return AttentionVectors(queries, zeros, zeros, heads.width)
    *each, scale = vectors
    width: int = each[0].shape[-1]
    parts: tuple[Tensor, ...] = tuple(part.transpose(1, 2).flatten(2) for part in each)
    if is_sharded(block) and block.training and getattr(block, "gradient_checkpointing", False):
        parts = BackThroughLayer.apply(output, *parts)
    queries, keys, values = parts
    scale = width**-0.5 if scale is None else float(scale)
    return AttentionVectors(queries, keys, values, width, scale)


class BackThroughLayer(torch.autograd.Function):
    """Identity of vectors that also gives a gradient of zero to the layer's output.

    This is for a layer that gradient checkpointing repeats in the backward and ZeRO 3 shards, if a
    loss may reach only the vectors. The repetition starts when the backward first needs a tensor of
    the layer, and then releases all gathered weights except those of the last module. The backward
    must therefore need the layer's end first. Otherwise a projection loses its weight while in use.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, *vectors: Tensor) -> tuple[Tensor, ...]:
        """Return the vectors; `output` is the output of the layer."""
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.dtype, ctx.device = output.shape, output.dtype, output.device
        return tuple(vector.view_as(vector) for vector in vectors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return zeros for the output, and the gradients of the vectors unchanged."""
        return torch.zeros(ctx.shape, dtype=ctx.dtype, device=ctx.device), *gradients
