"""The sections `teacher`, `teachers` and `student` of a run config."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from megakd.config.paths import Folder
from megakd.config.train import FinetuneOverrides
from megakd.contract.tasks import Dtype
from megakd.contract.terms import STRICT, Count

Attention = Literal["varlen", "sdpa", "eager", "flash_attention_2", "flash_attention_3"]
"""`varlen` computes packed rows document by document; the others are those of transformers."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ScratchModel:
    """A model that starts from random weights.

    config: keys of the model's Hugging Face config.
    """

    config: dict[str, Any]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TeacherConfig:
    """The frozen model that the student learns from, with its own DeepSpeed engine."""

    model: str | ScratchModel
    deepspeed: str | dict[str, Any] = "teacher_zero3"
    """Preset name, path or inline mapping; ZeRO 0 (replicated) or 3 (sharded)."""
    dtype: Dtype | None = None
    """None: on a CPU fp32; on a GPU the dtype of the checkpoint, and bf16 for fp32."""
    architecture: Literal["enct5", "t5_encoder"] | None = None
    """Architecture to load a T5 or mT5 checkpoint as; None: enct5."""
    finetune: FinetuneOverrides | None = None
    label_order: Literal["data"] | None = None
    """`data`: generic labels (LABEL_0, …) have the order of the data's labels; None: the order is
    checked."""
    cache: Folder | None = None
    """Folder with the teacher's answers to the training rows, written by launch/cache_teacher.py.
    The student learns from the folder instead of the model."""
    cache_top_k: Count = 64
    """Number of tokens to keep per position; only for language models."""
    micro_batches_per_call: Count | None = None
    """Micro-batches of a step that the teacher answers in one forward. None: at ZeRO 3 as many as
    fit into memory, else 1."""
    trust_remote_code: bool = False
    allow_pickle: bool = False
    attn_implementation: Attention | None = None
    """None: on a GPU `varlen` for causal_lm in 16 bits, else the choice of transformers."""


def _plain_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", text):
        raise ValueError(
            "the name of a teacher must consist of letters, digits, - and _, and start with a "
            f"letter or digit, such as bert-base (got {text!r})"
        )
    return text


@dataclass(config=STRICT, frozen=True, kw_only=True)
class PooledTeacher(TeacherConfig):
    """One of several teachers."""

    name: Annotated[str, AfterValidator(_plain_name)]
    """Name of the teacher in logs, in the report and in the folders of the run."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class StudentConfig:
    """The model that learns."""

    model: str | ScratchModel
    """A folder, a Hub id, a config, or `from_teacher`. With `from_teacher`, the method cuts the
    student out of the teacher, or the student gets some of the teacher's `layers`."""
    layers: Count | Annotated[tuple[Count, ...], Field(min_length=1)] | None = None
    """Numbers of the layers to keep, counted from 1, or how many layers to keep, evenly spaced."""
    teacher: str | None = None
    """Name of the teacher for `from_teacher`, if there are several teachers."""
    deepspeed: str | dict[str, Any] = "zero2"
    architecture: Literal["enct5", "t5_encoder"] | None = None
    """Architecture to load a T5 or mT5 checkpoint as; None: enct5."""
    trust_remote_code: bool = False
    allow_pickle: bool = False
    attn_implementation: Attention | None = None
    """None: on a GPU `varlen` for causal_lm in 16 bits, else the choice of transformers."""
