"""Initial values of new weights: those that the class of the model draws, module by module."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megakd.engine.sharding import full_shape, set_values
from megakd.process.seeding import cpu_seeded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Parameters = Mapping[str, Mapping[str, nn.Parameter]]
"""Parameters by the path of their module, and by their own name."""


def initialize_parameters(
    model: PreTrainedModel, parameters: Iterable[nn.Parameter], *, seed: int
) -> None:
    """Set parameters to the initial values that the model's own class draws for them.

    Each module draws from its own generator, seeded by (seed, module name), in fp32 on the CPU. The
    values do not depend on other modules, the device, the dtype or the ranks. Only one module is
    whole at a time, unless a constructor alone knows values, as those of an activation that learns
    (Apertus): then the model is built once more. This is a collective for a sharded model.
    """
    whole: PreTrainedModel | None = None
    waiting = {id(parameter) for parameter in parameters}
    # The rule of a whole attention must not change the weights that the attention already has.
    with _replaced(dict(model.named_modules()), "meta") as (parts, _):
        for name, held in parts.items():
            fresh = {key: held[key] for key in held if id(held[key]) in waiting}
            if not fresh:
                continue
            waiting.difference_update(id(parameter) for parameter in fresh.values())
            values = _draw(model, name, seed)
            for key, parameter in fresh.items():
                if values[key].isnan().any():
                    with cpu_seeded(seed), torch.device("cpu"):
                        whole = whole or type(model)(copy.deepcopy(model.config))
                    values[key] = whole.get_parameter(f"{name}.{key}").detach()
                drawn = values[key].flatten()
                set_values(parameter, lambda start, stop, drawn=drawn: drawn[start:stop])


def _draw(model: PreTrainedModel, name: str, seed: int) -> dict[str, Tensor]:
    """Return the values that `_init_weights` gives a module's own parameters, in fp32 on the CPU.

    After the module itself, the modules around it may change the values, from the inside out, as in
    transformers: an attention may know the scale of its weights better than the Linear (GPT-2, T5).
    """
    module_seed = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
    path = name.split(".") if name else []
    owners = [model.get_submodule(".".join(path[:end])) for end in range(len(path), -1, -1)]
    with (
        _replaced({name: owners[0]}, "cpu") as (_, values),
        cpu_seeded(module_seed),
        torch.no_grad(),
    ):
        for owner in owners:
            model._init_weights(owner)  # noqa: SLF001  (the class's rule; nothing public has it)
    return {key: parameter.data for key, parameter in values[name].items()}


@contextmanager
def _replaced(
    modules: Mapping[str, nn.Module], device: str
) -> Iterator[tuple[Parameters, Parameters]]:
    """Put NaN in place of modules' parameters in the body; yield the originals and the new ones."""
    named = {name: dict(part.named_parameters(recurse=False)) for name, part in modules.items()}
    like = partial(torch.full, fill_value=float("nan"), dtype=torch.float32, device=device)
    new = {
        name: {key: nn.Parameter(like(full_shape(p))) for key, p in held.items()}
        for name, held in named.items()
    }
    try:
        _put(modules, new)
        yield named, new
    finally:
        _put(modules, named)


def _put(modules: Mapping[str, nn.Module], parameters: Parameters) -> None:
    for name, held in parameters.items():
        for key, parameter in held.items():
            setattr(modules[name], key, parameter)
