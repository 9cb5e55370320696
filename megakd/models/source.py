"""A model that was found: its folder, config and stored tensors, before any weight is loaded."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig

from megakd.config.models import TeacherConfig
from megakd.contract.tasks import AUTO
from megakd.contract.views import Heads, View
from megakd.models.architectures import Architecture
from megakd.models.weights import StoredTensor

_DROPOUT = re.compile(r"dropout(_prob|_rate)?$|_pdrop$")
"""Config keys of dropout, as the families name them."""
GGUF = "gguf"


def quantization_keys(config: PretrainedConfig) -> Mapping[str, Any]:
    """Return the keys of a config on the quantization of the weights; empty: there is none."""
    settings: Any = getattr(config, "quantization_config", None) or {}
    return settings if isinstance(settings, Mapping) else vars(settings)


def method_of(config: PretrainedConfig) -> str | None:
    """Return the method by which the weights of a model are quantized; None: they are not."""
    method = quantization_keys(config).get("quant_method")
    return None if method is None else str(getattr(method, "value", method))


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that was found and whose files are complete; no weights are in memory.

    folder: None for a model that starts from random weights; a GGUF file is its own folder.
    where: The key of the run config, such as `teacher.model`.
    stored: The tensors of its weight files.
    wants_vocabulary: The model starts from random weights and takes the tokenizer's size.
    layers: The layers of the folder that the model has, from 1, in this order; None: all.
    attn_implementation: The config's choice of an attention; None: by task and device.
    fp8: Whether its linear layers have 8 bits where it is frozen.
    """

    name: str
    folder: Path | None
    config: PretrainedConfig = field(repr=False)
    architecture: Architecture
    where: str
    stored: Mapping[str, StoredTensor] = field(default_factory=dict, repr=False)
    wants_vocabulary: bool = False
    trust_remote_code: bool = False
    layers: tuple[int, ...] | None = None
    attn_implementation: str | None = None
    fp8: bool = False

    @property
    def depth(self) -> int:
        return self.architecture.number_of_layers(self.config)

    @property
    def heads(self) -> Heads:
        return self.architecture.heads(self.config)

    @property
    def width(self) -> int:
        return self.architecture.hidden_width(self.config)

    @property
    def units(self) -> View:
        """The units that can be cut; `head_width` is set if columns of heads can be cut."""
        return self.architecture.prunable(self.config)

    @property
    def uncut(self) -> str | None:
        """Why only whole layers of the model can be left out; None: units can be cut too."""
        return self.architecture.why_uncut(self.config)

    @property
    def shows_attention(self) -> bool:
        return self.architecture.shows_attention

    @property
    def whole(self) -> View:
        """The view of the whole model; without heads and neurons if these are not cut."""
        return self.architecture.units(self.config) if self.uncut is None else View((), ())

    @property
    def quantization(self) -> str | None:
        """The method by which its weights are quantized; None: they are not."""
        is_gguf = self.folder is not None and self.folder.is_file()
        return GGUF if is_gguf else method_of(self.config)

    @property
    def files(self) -> list[Path]:
        """The files that have its weights."""
        if self.folder is not None and self.quantization == GGUF:
            return [self.folder]
        return sorted({stored.file for stored in self.stored.values()})

    @property
    def fresh(self) -> ModelSource:
        """The model of the same shape that starts from random weights."""
        return replace(self, folder=None, stored={})

    def with_dropout(self, dropout: float | None) -> ModelSource:
        """Return the model with this dropout wherever its config has one; None: unchanged."""
        if dropout is None:
            return self
        config = copy.deepcopy(self.config)
        for key, value in config.to_dict().items():
            if _DROPOUT.search(key) and isinstance(value, int | float):
                setattr(config, key, dropout)
        return replace(self, config=config)

    @property
    def stored_dtype(self) -> torch.dtype | None:
        """The dtype of the largest stored tensor; None for a model from scratch."""
        largest = max(self.stored.values(), key=lambda s: torch.Size(s.shape).numel(), default=None)
        return largest.dtype if largest else None


class ReadyTeacher(NamedTuple):
    """A model that can teach, fine-tuned or given, and its section of the config."""

    source: ModelSource
    spec: TeacherConfig

    def is_loaded(self, *, measures_losses: bool) -> bool:
        """Return whether a stage needs the model itself, not a server or answers on disk.

        The answers that a run caches are for training rows; held-out losses ask the model.
        """
        is_cached = self.spec.cache is not None and not (
            self.spec.cache == AUTO and measures_losses
        )
        return self.spec.server is None and not is_cached


def parts_of(cut: ModelSource, whole: ModelSource, layers: tuple[int, ...] | None) -> str:
    """Return what a cut model keeps, as `layers 1, 3 of 6 · 12 heads · 256 of 1536 neurons`.

    layers: the numbers of its layers in the whole model; None: they are not known.
    """
    numbers = ", ".join(map(str, layers)) if layers and len(layers) == cut.depth else ""
    depth = f"layer{'s' * (cut.depth > 1)} {numbers}" if numbers else f"{cut.depth}"
    parts = [f"{depth} of {whole.depth}{'' if numbers else ' layers'}"]
    if cut.width != whole.width:
        parts.append(f"{cut.width} of {whole.width} columns")
    heads = "key-value heads" if whole.heads.keys < whole.heads.queries else "heads"
    mine, every = cut.whole, whole.whole
    for name, left, before in (
        (heads, mine.heads, every.heads),
        ("neurons", mine.neurons, every.neurons),
    ):
        if not left or not any(before):
            continue
        least, most, total = min(left), max(left), max(before)
        some = f"{least}" if least == most else f"{least} to {most}"
        parts.append(f"{total} {name}" if least == total else f"{some} of {total} {name}")
    return " · ".join(parts)
