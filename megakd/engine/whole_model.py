"""Whole weights of a model in an engine, for work that calls the model very often.

Generation calls a model once per token. The hooks of ZeRO 3 would gather every weight for every
token, and all ranks would have to generate equally many tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from megakd.engine.sharding import full_shape, gathered, is_sharded

GROUP_ELEMENTS = 1 << 26
"""Elements that are gathered at a time, beside the copy."""


@contextmanager
def whole_model(module: nn.Module) -> Iterator[nn.Module]:
    """Give a model of an engine with whole weights in evaluation mode; a collective at ZeRO 3.

    The body has no collectives: ranks may call the model different numbers of times. The caller may
    not change anything in the model, which at ZeRO 3 is a copy without the hooks of the engine. The
    copy has the dtype and the device of the gathered weights, and is freed at the end of the body.
    """
    if not is_sharded(module):
        with evaluating(module):
            yield module
        return
    whole = _unsharded_copy(module)
    try:
        yield whole
    finally:
        for parameter in whole.parameters():
            # Also if the caller keeps a reference to the copy.
            parameter.data = parameter.data.new_empty(0)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch all modules to evaluation mode in the body, and restore the mode of each module."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _unsharded_copy(module: nn.Module) -> nn.Module:
    parts = list(module.modules())
    copies = {id(part): type(part).__new__(type(part)) for part in parts}
    memo: dict[int, Any] = {**copies, **_whole_parameters(module.parameters())}
    for part in parts:
        vars(copies[id(part)]).update(_plain_members(part, memo))
    return copies[id(module)].eval()


def _plain_members(part: nn.Module, memo: dict[int, Any]) -> dict[str, Any]:
    members = vars(nn.Module())
    for name, empty in members.items():
        if isinstance(empty, dict):
            # Objects that remove a hook refer to these; the hooks themselves refer to the engine.
            memo[id(vars(part)[name])] = empty
    # Neither torch's attributes nor those that DeepSpeed adds at ZeRO 3.
    foreign = {*members, "_external_params", "_original_parameters"}
    plain = {n: v for n, v in vars(part).items() if n not in foreign and not n.startswith("ds_")}
    members |= copy.deepcopy(plain, memo)
    members["_buffers"] = copy.deepcopy(dict(part._buffers), memo)  # noqa: SLF001
    members["_non_persistent_buffers_set"] = set(part._non_persistent_buffers_set)  # noqa: SLF001
    for name in ("_parameters", "_modules"):
        items = vars(part)[name].items()
        members[name] = {key: None if item is None else memo[id(item)] for key, item in items}
    return members


def _whole_parameters(parameters: Iterable[nn.Parameter]) -> dict[int, nn.Parameter]:
    copies: dict[int, nn.Parameter] = {}
    for group in _groups(parameters):
        with gathered(group):
            for parameter in group:
                whole = parameter.detach().clone()
                copies[id(parameter)] = nn.Parameter(whole, requires_grad=False)
    return copies


def _groups(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    group: list[Tensor] = []
    size = 0
    for parameter in parameters:
        elements = full_shape(parameter).numel()
        if group and size + elements > GROUP_ELEMENTS:
            yield group
            group, size = [], 0
        group.append(parameter)
        size += elements
    if group:
        yield group
