"""Experts of a mixture that a checkpoint stores one by one, as transformers writes Qwen3-MoE.

The model has one tensor for all experts: the matrices of gates and neurons of an expert lie side by
side, and the experts follow each other. transformers joins and separates the tensors in the same
way (its `conversion_mapping`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from megakd.models.weights import StoredExperts

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from megakd.models.weights import StoredTensor

_OF_ONE_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")
_JOINT = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Tensor of all experts, and the tensors of one expert that it consists of, in order."""


def with_joint_experts(
    stored: Mapping[str, StoredTensor], names: Collection[str]
) -> Mapping[str, StoredTensor]:
    """Return the stored tensors with one entry in place of those of single experts.

    Args:
        names: the names of the model's tensors; only tensors that the model has are joined, and
            only if the checkpoint has all parts of the experts from 0 on, with equal shapes.
    """
    experts: dict[str, dict[int, dict[str, StoredTensor]]] = {}
    for key, tensor in stored.items():
        found = _OF_ONE_EXPERT.fullmatch(key)
        if found is not None:
            path, number, part = found.groups()
            experts.setdefault(path, {}).setdefault(int(number), {})[part] = tensor
    joint = dict(stored)
    for path, by_number in experts.items():
        for name, parts in _JOINT.items():
            found = [by_number.get(number, {}) for number in range(len(by_number))]
            rows = [[expert.get(part) for part in parts] for expert in found]
            made = _joined(rows) if f"{path}.{name}" in names else None
            if made is None:
                continue
            joint[f"{path}.{name}"] = made
            for number in by_number:
                for part in parts:
                    del joint[f"{path}.{number}.{part}.weight"]
    return joint


def _joined(rows: list[list[StoredTensor | None]]) -> StoredExperts | None:
    known = [[part for part in row if part is not None] for row in rows]
    first = known[0]
    shapes = [[(part.shape, part.dtype) for part in row] for row in known]
    if len(first) != len(rows[0]) or any(one != shapes[0] for one in shapes):
        return None
    height, width = sum(part.shape[0] for part in first), first[0].shape[-1]
    return StoredExperts(
        file=first[0].file,
        key=first[0].key,
        shape=(len(rows), height, width),
        dtype=first[0].dtype,
        offset=first[0].offset,
        parts=tuple(tuple(row) for row in known),
    )
