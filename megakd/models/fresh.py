"""First values of new parameters, the same at every ZeRO stage and for any number of ranks."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from megakd.engine.sharding import full_shape, gathered, writes_here

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor
    from transformers import PreTrainedModel


def initialize_parameters(
    model: PreTrainedModel, parameters: Iterable[nn.Parameter], *, seed: int
) -> None:
    """Gives parameters the first values that the model's own class draws for them.

    Each module draws from a generator of its own, seeded by (seed, the module's name), in fp32
    on the CPU, so neither the other modules nor the device, the dtype or the ranks matter. Only
    one module is whole at a time, on the ranks that write. A collective for a sharded model.

    Args:
        model: The model, sharded or not.
        parameters: Those to set; all others keep their values.
        seed: The run's seed.
    """
    waiting = {id(parameter) for parameter in parameters}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        fresh = {key: own[key] for key in own if id(own[key]) in waiting}
        if not fresh:
            continue
        waiting.difference_update(id(parameter) for parameter in fresh.values())
        values = _draw(model, module, _seed_of(seed, name)) if _any_written(fresh) else {}
        for key, parameter in fresh.items():
            with gathered([parameter], modify=True), torch.no_grad():
                if writes_here(parameter):
                    parameter.copy_(_complete(values[key], f"{name}.{key}"))


def _any_written(parameters: dict[str, nn.Parameter]) -> bool:
    return any(writes_here(parameter) for parameter in parameters.values())


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def _draw(model: PreTrainedModel, module: nn.Module, seed: int) -> dict[str, Tensor]:
    """What `_init_weights` gives the module's own parameters, in fp32 on the CPU."""
    with _stand_ins(module) as values, _cpu_seeded(seed), torch.no_grad():
        model._init_weights(module)  # noqa: SLF001  (the class's own rule; nothing public has it)
    return {key: parameter.data for key, parameter in values.items()}


@contextmanager
def _stand_ins(module: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Whole fp32 parameters of NaN in place of the module's own while the context lasts."""
    own = dict(module.named_parameters(recurse=False))
    values = {
        key: nn.Parameter(torch.full(full_shape(parameter), float("nan"), dtype=torch.float32))
        for key, parameter in own.items()
    }
    try:
        for key, parameter in values.items():
            setattr(module, key, parameter)
        yield values
    finally:
        for key, parameter in own.items():
            setattr(module, key, parameter)


@contextmanager
def _cpu_seeded(seed: int) -> Iterator[None]:
    """The CPU's generator starts at `seed` and is left as it was found."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _complete(values: Tensor, name: str) -> Tensor:
    if values.isnan().any():
        raise RuntimeError(f"the model's class gives {name} no first value")
    return values
