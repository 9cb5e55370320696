"""The sections `teacher`, `teachers` and `student` of a run config."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic.dataclasses import dataclass

from megakd.config.paths import Folder, Place
from megakd.config.rollout import TeacherServerConfig
from megakd.config.train import FinetuneOverrides
from megakd.contract.batch import MOST_DRAWS
from megakd.contract.tasks import STUDENT_BASE, Dtype
from megakd.contract.terms import EACH_ONCE, STRICT, Count, Positive

Attention = Literal["varlen", "sdpa", "eager", "flash_attention_2", "flash_attention_3"]
"""`varlen` computes packed rows document by document; the others are those of transformers."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ScratchModel:
    """A model that starts from random weights."""

    config: dict[str, Any]
    """Keys of the model's Hugging Face config."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ModelConfig:
    """How a model is opened."""

    architecture: Literal["enct5", "t5_encoder"] | None = None
    """Architecture to load a T5 or mT5 checkpoint as; None: enct5."""
    trust_remote_code: bool = False
    attn_implementation: Attention | None = None
    """None: on a GPU `varlen` for causal_lm in 16 bits, else the choice of transformers."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TeacherConfig(ModelConfig):
    """The frozen model that the student learns from, with its own DeepSpeed engine."""

    model: Place | ScratchModel
    """A folder, a Hub id, a config, or `student_base`: the student without its adapters
    (`student.lora`), which teaches without a second model in memory."""
    deepspeed: Place | dict[str, Any] = "teacher_zero3"
    """Preset name, path or inline mapping; ZeRO 0 (replicated) or 3 (sharded)."""
    dtype: Dtype | Literal["fp8"] | None = None
    """None: on a CPU fp32; on a GPU the dtype of the checkpoint, and bf16 for fp32. fp8: bf16 with
    the linear layers in 8 bits."""
    finetune: FinetuneOverrides | None = None
    cache: Literal["auto"] | Folder | None = None
    """Folder with the teacher's answers to the training rows, written by launch/cache_teacher.py.
    The student learns from the folder instead of the model. `auto`: the run asks the teacher once
    about every row, and keeps the answers in its own folder."""
    cache_top_k: Count = 64
    """Number of tokens to keep per position; only for language models."""
    cache_draws: Annotated[int, Field(ge=1, le=MOST_DRAWS)] | None = None
    """Number of random draws to keep per position in place of the most likely tokens, such as 16;
    only for causal_lm. The gradient of the soft targets is then unbiased. Draws do not depend on
    `seed`, so that runs can share a cache."""
    server: TeacherServerConfig | None = None
    """Inference servers that answer instead of the model, which is then not loaded; only for
    causal_lm."""
    joins_micro_batches: bool | None = None
    """Whether one forward answers all micro-batches of a step. None: at ZeRO 3, if they fit into
    memory."""

    @property
    def served_model(self) -> str | None:
        """Name of the model that the teacher's servers have to serve; None if it has no name."""
        if not isinstance(self.model, str) or self.model == STUDENT_BASE:
            return None
        return self.model if self.server is None or self.server.model is None else self.server.model


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


def _all_linear(value: object) -> object:
    if value in ("all-linear", ["all-linear"]):
        return None
    # Strict validation takes the list of a file only where it reads it itself.
    return tuple(value) if isinstance(value, list) else value


@dataclass(config=STRICT, frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters that learn in place of the student's own weights.

    A linear layer W becomes W + alpha / r * B A with a frozen W (Hu et al. 2021,
    https://arxiv.org/abs/2106.09685, section 4.1).
    """

    r: Count = 64
    """Rank of the adapters."""
    alpha: Positive | None = None
    """Factor of the adapters' outputs, divided by `r`; None: 2 r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of the adapters' inputs."""
    target_modules: Annotated[
        Annotated[tuple[str, ...], Field(min_length=1)] | None, BeforeValidator(_all_linear)
    ] = None
    """Names of the adapted linear layers, such as q_proj; None: all of attention and MLP, which
    peft calls all-linear."""

    @property
    def scale(self) -> float:
        """The factor alpha, before the division by `r`."""
        return 2.0 * self.r if self.alpha is None else self.alpha


@dataclass(config=STRICT, frozen=True, kw_only=True)
class KeptLayers:
    """A number of layers to keep, and the rule that chooses them."""

    keep: Count
    """Number of layers to keep."""
    by: Literal["importance", "spacing"] | None = None
    """`importance`: the layers without which the loss of the teacher rises most; `spacing`: the
    first, the last, and evenly spaced layers between. None: by importance if the student starts
    from a teacher that the run loads."""


Layers = Annotated[tuple[Count, ...], Field(min_length=1), EACH_ONCE]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class StudentConfig(ModelConfig):
    """The model that learns."""

    model: Place | ScratchModel
    """A folder, a Hub id, a config, or `from_teacher`. With `from_teacher`, the method cuts the
    student out of the teacher, or the student gets some of the teacher's `layers`."""
    layers: Count | Layers | KeptLayers | None = None
    """Numbers of the layers to keep, counted from 1, or how many layers to keep."""
    teacher: str | None = None
    """Name of the teacher for `from_teacher`, if there are several teachers."""
    lora: LoraConfig | None = None
    """Train low-rank adapters of the model instead of its weights; None: train all weights."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Dropout in place of every dropout of the model's config, also in its exported config; None:
    as the config has it. 0 makes the targets of distillation easier to match."""
    deepspeed: Place | dict[str, Any] = "auto"
    """`auto`: zero2; zero0 on one rank, but for 16 bits on a GPU or in several backwards."""
