"""Matching of stored tensors with parameters, based on names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megakd.errors import ModelError
from megakd.models.source import ModelSource
from megakd.models.weights import StoredExperts, StoredTensor, WeightReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OF_ONE_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")
_JOINT = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Tensor of all experts, and the tensors of one expert that it consists of, in order."""
LEGACY_ENDINGS = {".gamma": ".weight", ".beta": ".bias"}


@dataclass(frozen=True, kw_only=True)
class Match:
    """The tensors that a checkpoint provides for a model.

    stored: the model's tensors that the checkpoint has; tied ones under their first name.
    missing: parameters that the checkpoint lacks.
    unused: keys of the checkpoint that no parameter uses.
    """

    stored: Mapping[str, StoredTensor]
    missing: tuple[str, ...]
    unused: tuple[str, ...]


def match_names(
    model: PreTrainedModel, stored: Mapping[str, StoredTensor], *, leave_out: Iterable[str] = ()
) -> Match:
    """Match stored tensors with a model's, for any head that the checkpoint was saved with.

    The prefix of the backbone is added if a bare backbone was stored, and the names of old
    TensorFlow checkpoints (gamma, beta) are read.
    """
    tensors = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    skipped = tuple(f"{module}." for module in leave_out)
    taken: dict[str, StoredTensor] = {}
    used: set[str] = set()
    stored = with_joint_experts(stored, tensors)
    for key, value in stored.items():
        name = _model_name(key, tensors, model.base_model_prefix)
        if name is None or name.startswith(skipped):
            continue
        used.add(key)
        taken[first[id(tensors[name])]] = value
    missing = tuple(
        name for name, _ in model.named_parameters() if first[id(tensors[name])] not in taken
    )
    unused = tuple(key for key in stored if key not in used)
    return Match(stored=taken, missing=missing, unused=unused)


def with_joint_experts(
    stored: Mapping[str, StoredTensor], names: Collection[str]
) -> Mapping[str, StoredTensor]:
    """Return the stored tensors with one entry in place of those of single experts.

    Only tensors that the model has are joined, and only if the checkpoint has all parts of the
    experts from 0 on, with equal shapes.
    """
    experts: dict[str, dict[int, dict[str, StoredTensor]]] = {}
    for key, tensor in stored.items():
        match = _OF_ONE_EXPERT.fullmatch(key)
        if match is not None:
            path, number, part = match.groups()
            experts.setdefault(path, {}).setdefault(int(number), {})[part] = tensor
    joint = dict(stored)
    for path, by_number in experts.items():
        for name, parts in _JOINT.items():
            in_order = [by_number.get(number, {}) for number in range(len(by_number))]
            rows = [[expert.get(part) for part in parts] for expert in in_order]
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


def _model_name(key: str, names: Collection[str], prefix: str) -> str | None:
    ending = next((old for old in LEGACY_ENDINGS if key.endswith(old)), "")
    modern = key.removesuffix(ending) + LEGACY_ENDINGS.get(ending, "")
    for name in (key, modern, f"{prefix}.{modern}"):
        if name in names:
            return name
    return None


def check_head(match: Match, source: ModelSource, *, task: str) -> None:
    """Raise if the checkpoint lacks a part that belongs to the task."""
    lacking = [name for name in match.missing if source.architecture.of_the_task(name)]
    if lacking:
        raise ModelError(
            f"{source.where}: {source.folder} has no head for {task} ({_some(lacking)} missing);"
            " set teacher.finetune or give a folder that was fine-tuned for the task"
        )


def check_backbone(match: Match, source: ModelSource) -> None:
    """Raise if the checkpoint lacks a part that training cannot replace."""
    lacking = [name for name in match.missing if not source.architecture.of_the_task(name)]
    if lacking:
        raise ModelError(
            f"{source.where}: {source.folder} lacks {len(lacking)} weights of a "
            f"{source.config.model_type} model ({_some(lacking)}); check that config.json and the "
            "weights belong to the same model"
        )


def check_tensors(match: Match, model: PreTrainedModel, *, where: str) -> None:
    """Raise if a stored tensor has another shape than its parameter, or holds whole numbers."""
    tensors = model.state_dict(keep_vars=True)
    for name, stored in match.stored.items():
        expected = tuple(tensors[name].shape)
        if stored.shape != expected:
            raise ModelError(
                f"{where}: {stored.file} holds {stored.key} of shape {list(stored.shape)}, and "
                f"config.json requires {list(expected)}; check that config.json and the weights "
                "belong to the same model"
            )

        if tensors[name].is_floating_point() and not stored.dtype.is_floating_point:
            raise ModelError(
                f"{where}: {stored.file} holds {stored.key} as "
                f"{str(stored.dtype).removeprefix('torch.')}, which is not a floating-point type, "
                "and quantized models are not supported; give the model in fp32, bf16 or fp16"
            )


def check_ties(model: PreTrainedModel, stored: Mapping[str, StoredTensor], *, where: str) -> None:
    """Raise if the config ties two tensors for which the checkpoint holds different values."""
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if target in stored and source in stored:
            reader = WeightReader(where)
            if not torch.equal(reader.read(stored[target]), reader.read(stored[source])):
                raise ModelError(
                    f"{where}: config.json ties {target} to {source}, and the weights hold"
                    " different values for them; set tie_word_embeddings to false in config.json"
                )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
