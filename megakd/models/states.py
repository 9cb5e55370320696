"""Hidden states of chosen layers, recorded by hooks during a forward.

With `output_hidden_states` transformers keeps the states of all layers until the forward ends, and
a loss keeps them until its backward: 43 GB for a teacher of 80 layers, 8192 wide, and 32,000
tokens. A loss on mapped layers needs a few of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from megakd.models.architectures import architecture_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StateNotes:
    """Recorder of the hidden states of one forward.

    The states are those of transformers: 0 is the input of the first layer, and the last layer's
    states are after the norm that follows the layers. The hooks are removed before gradient
    checkpointing repeats the forward, and run after the hooks of DeepSpeed, like those of
    `AttentionNotes`.

    Args:
        model: a model with a head.
        layers: numbers of the layers, 0 being the embedding output.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int]) -> None:
        self._architecture = architecture_of(model.config)
        self._count = self._architecture.number_of_layers(model.config)
        self._model, self._layers = model, layers
        self._states: dict[int, Tensor] = {}

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Record the states of the layers that run inside the context."""
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
