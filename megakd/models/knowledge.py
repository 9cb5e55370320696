"""Outputs read from a model: logits or (hidden, head), hidden states, attention vectors.

Teachers and students run their forward only here, so that both are read in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

import megakd_kernels
from megakd.contract.batch import IGNORE, Batch, Knowledge, LogitWarp, Predictions
from megakd.contract.tasks import Kernels
from megakd.engine.sharding import gathered
from megakd.models.architecture import has_token_types
from megakd.models.architectures import architecture_of
from megakd.models.attention import AttentionNotes
from megakd.models.elastic_modules import weights_in_view
from megakd.models.packed_attention import document_arguments
from megakd.models.second_vocabulary import SecondHead, second_vocabulary

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


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
    """The output matrix of a language model, found by name so that tied weights stay tied.

    warp: the factor and the cap between the product with the matrix and the logits.
    """

    def __init__(self, module: nn.Module, warp: LogitWarp) -> None:
        self._module = module
        self.warp = warp

    def read(self) -> tuple[Tensor, Tensor | None]:
        """Return (weight [V, D], bias [V] or None); under ZeRO-3 only inside a module's forward.

        The matrix is as narrow as the hidden states of the current view.
        """
        return weights_in_view(self._module)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Keep the matrix gathered inside the context; a collective under ZeRO-3.

        A term reads the matrix in a forward of its own, for which DeepSpeed fetches it. Others open
        it for the read alone: if DeepSpeed had to fetch it for the forward of the whole model, the
        next forward would not be the one that it has recorded.
        """
        with gathered(self._module.parameters(recurse=False)):
            yield


def language_model_head(model: nn.Module) -> LanguageModelHead:
    """Return the head of a causal or masked LM, found with the architecture table."""
    config: PretrainedConfig = model.config  # type: ignore[assignment]
    architecture = architecture_of(config)
    return LanguageModelHead(architecture.language_head_of(model), architecture.logit_warp(config))


def _is_language(batch: Batch) -> bool:
    return batch.labels.dim() == 2  # [B, T]


def read_knowledge(model: nn.Module, batch: Batch, needs: Needs) -> Knowledge:
    """Run the model once and return the outputs that the losses need.

    A classifier or regressor gives logits [B, C]. A language model runs up to its output matrix:
    the losses take (hidden, head) and never form [B, T, V].
    """
    if needs == Needs():
        return _read(model, batch)
    states = StateNotes(model, needs.hidden_layers)  # type: ignore[arg-type]
    vectors = AttentionNotes(model, needs.attention_layers)  # type: ignore[arg-type]
    with states.taking(), vectors.taking():
        read = _read(model, batch)
    return read._replace(
        hidden_states=states.states() if needs.hidden_layers else (),
        attention=vectors.vectors() if needs.attention_layers else (),
    )


def _read(model: nn.Module, batch: Batch) -> Knowledge:
    if _is_language(batch):
        return _read_language_model(model, batch)
    has_types = has_token_types(model.config)  # type: ignore[arg-type]
    inputs = {n: value for n, value in batch.inputs.items() if has_types or n != "token_type_ids"}
    return Knowledge(logits=model(**inputs).logits)


def _read_language_model(model: nn.Module, batch: Batch) -> Knowledge:
    architecture = architecture_of(model.config)  # type: ignore[arg-type]
    # Encoders have no cache, and some of them do not accept the option.
    options = {} if architecture.masked else {"use_cache": False}
    options |= document_arguments(model, batch)
    inputs, pieces = dict(batch.inputs), batch.extras.second
    second = None if pieces is None else second_vocabulary(model)
    if second is not None:
        table = model.get_input_embeddings()  # type: ignore[operator]
        inputs["inputs_embeds"] = second(inputs.pop("input_ids"), table)
    states = architecture.backbone_of(model)(**inputs, **options).last_hidden_state
    # The head of an MLM is applied to a few positions only: [N, D].
    hidden = states if batch.targets is None else states.flatten(0, 1)[batch.targets]
    hidden = architecture.before_language_head(model, hidden)
    read = Knowledge(hidden=hidden, head=language_model_head(model))
    if second is None or pieces is None:
        return read
    chosen = architecture.before_language_head(model, states.flatten(0, 1)[pieces.positions])
    chosen = second.before_head(chosen)
    return read._replace(second=Knowledge(hidden=chosen, head=SecondHead(second)))


def predict(model: nn.Module, batch: Batch, kernels: Kernels = "auto") -> Predictions:
    """Return logits or scores of a micro-batch; for a language model, the sums for its metrics."""
    return predictions_of(read_knowledge(model, batch, Needs()), batch, kernels)


def predictions_of(read: Knowledge, batch: Batch, kernels: Kernels = "auto") -> Predictions:
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


class StateNotes:
    """Recorder of the hidden states of one forward.

    The states are those of transformers: 0 is the input of the first layer, and the last layer's
    states are after the norm that follows the layers. The hooks are removed before gradient
    checkpointing repeats the forward, and run after the hooks of DeepSpeed, like those of
    `AttentionNotes`.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int]) -> None:
        self._architecture = architecture_of(model.config)
        self._count = self._architecture.number_of_layers(model.config)
        self._model, self._layers = model, layers
        self._states: dict[int, Tensor] = {}

    @contextmanager
    def taking(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for layer in self._layers:
                hooks.callback(self._hook(layer).remove)
            yield

    def _hook(self, layer: int) -> Any:
        if layer == 0:
            first = self._architecture.block_of(self._model, 1)
            return first.register_forward_pre_hook(self._note_input, with_kwargs=True)
        is_last = layer == self._count
        of = self._architecture
        module = of.backbone_of(self._model) if is_last else of.block_of(self._model, layer)

        def note(module: nn.Module, inputs: object, output: Any) -> None:
            del module, inputs
            self._states[layer] = output if isinstance(output, Tensor) else output[0]

        return module.register_forward_hook(note)

    def _note_input(self, module: nn.Module, inputs: Sequence[Any], named: dict[str, Any]) -> None:
        del module
        self._states[0] = inputs[0] if inputs else named["hidden_states"]

    def states(self) -> tuple[Tensor | None, ...]:
        """Return the states by layer, [B, T, D]; None for a layer that was not requested."""
        return tuple(self._states.get(layer) for layer in range(self._count + 1))
