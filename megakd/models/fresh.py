"""Initial values of new parameters, the same at every ZeRO stage and for any number of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megakd.engine.sharding import full_shape, gathered, writes_here
from megakd.process.seeding import cpu_seeded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def initialize_parameters(
    model: PreTrainedModel, parameters: Iterable[nn.Parameter], *, seed: int
) -> None:
    """Set parameters to the initial values that the model's own class draws for them.

    Each module draws from its own generator, seeded by (seed, module name), in fp32 on the CPU. The
    values do not depend on other modules, the device, the dtype or the ranks. Only one module is
    whole at a time, on the ranks that write. This is a collective for a sharded model.
    """
    waiting = {id(parameter) for parameter in parameters}
    with _hidden(model) as parts:
        for name, own in parts.items():
            fresh = {key: own[key] for key in own if id(own[key]) in waiting}
            if not fresh:
                continue
            waiting.difference_update(id(parameter) for parameter in fresh.values())
            values = _draw(model, name, seed) if any(map(writes_here, fresh.values())) else {}
            for key, parameter in fresh.items():
                with gathered([parameter], modify=True), torch.no_grad():
                    if writes_here(parameter):
                        parameter.copy_(_complete(values[key], f"{name}.{key}"))


def _draw(model: PreTrainedModel, name: str, seed: int) -> dict[str, Tensor]:
    """Return the values that `_init_weights` gives a module's own parameters, in fp32 on the CPU.

    After the module itself, the modules around it may change the values, from the inside out, as in
    transformers: an attention may know the scale of its weights better than the Linear (GPT-2, T5).
    """
    module_seed = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
    path = name.split(".") if name else []
    owners = [model.get_submodule(".".join(path[:end])) for end in range(len(path), -1, -1)]
    with _stand_ins(owners[0]) as values, cpu_seeded(module_seed), torch.no_grad():
        for owner in owners:
            model._init_weights(owner)  # noqa: SLF001  (the class's rule; nothing public has it)
    return {key: parameter.data for key, parameter in values.items()}


@contextmanager
def _hidden(model: PreTrainedModel) -> Iterator[dict[str, dict[str, nn.Parameter]]]:
    """Replace all parameters by parameters without memory; yield the originals by module and name.

    The rule of a whole attention must not change the weights that the attention already has.
    """
    modules = dict(model.named_modules())
    found = {name: dict(part.named_parameters(recurse=False)) for name, part in modules.items()}
    parts = {name: own for name, own in found.items() if own}
    try:
        for name, own in parts.items():
            for key, parameter in own.items():
                empty = torch.empty(full_shape(parameter), dtype=torch.float32, device="meta")
                setattr(modules[name], key, nn.Parameter(empty))
        yield parts
    finally:
        for name, own in parts.items():
            for key, parameter in own.items():
                setattr(modules[name], key, parameter)


@contextmanager
def _stand_ins(module: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    own = dict(module.named_parameters(recurse=False))
    values = {
        key: nn.Parameter(torch.full(parameter.shape, float("nan"), dtype=torch.float32))
        for key, parameter in own.items()
    }
    try:
        for key, parameter in values.items():
            setattr(module, key, parameter)
        yield values
    finally:
        for key, parameter in own.items():
            setattr(module, key, parameter)


def _complete(values: Tensor, name: str) -> Tensor:
    if values.isnan().any():
        raise RuntimeError(f"the class of the model does not initialize {name}")
    return values
