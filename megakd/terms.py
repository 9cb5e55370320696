"""The loss terms a run config may list, with their options; imports neither torch nor deepspeed."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", strict=True)
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _layer_pair(text: str) -> str:
    if not re.fullmatch(r"\d+:\d+", text):
        raise ValueError(f"a layer pair is student:teacher, such as 2:6; got {text!r}")
    return text


LayerMapping = (
    Literal["uniform", "last"]
    | Annotated[tuple[Annotated[str, AfterValidator(_layer_pair)], ...], Field(min_length=1)]
)


@dataclass(config=STRICT, frozen=True, kw_only=True)
class HardCrossEntropy:
    """Cross-entropy with the labels of the data, in nats."""

    loss: Literal["hard_cross_entropy"]
    weight: Weight = 1.0


@dataclass(config=STRICT, frozen=True, kw_only=True)
class HardMse:
    """Squared error to the score of the data (regression)."""

    loss: Literal["hard_mse"]
    weight: Weight = 1.0


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SoftTargetKl:
    """KL(teacher || student) at a temperature (Hinton et al. 2015, section 2)."""

    loss: Literal["soft_target_kl"]
    weight: Weight = 1.0
    temperature: Positive = 1.0
    t_squared: bool = True


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SoftTargetReverseKl:
    """KL(student || teacher) at a temperature (Gu et al. 2024, MiniLLM)."""

    loss: Literal["soft_target_reverse_kl"]
    weight: Weight = 1.0
    temperature: Positive = 1.0
    t_squared: bool = True


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SoftTargetJsd:
    """beta·KL(teacher || m) + (1-beta)·KL(student || m), m = beta·teacher + (1-beta)·student.

    Agarwal et al. 2024, GKD, equation 1; beta 0 is forward KL and 1 reverse KL, as peers have it.
    """

    loss: Literal["soft_target_jsd"]
    weight: Weight = 1.0
    temperature: Positive = 1.0
    t_squared: bool = True
    beta: Fraction = 0.5


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SoftTargetMse:
    """Squared error to the teacher's score (regression)."""

    loss: Literal["soft_target_mse"]
    weight: Weight = 1.0


@dataclass(config=STRICT, frozen=True, kw_only=True)
class HiddenMse:
    """Squared error between hidden states of mapped layers (Romero et al. 2015; Jiao et al. 2020).

    layer_mapping: `uniform`, `last`, or student:teacher pairs, 0 being the embedding output.
    """

    loss: Literal["hidden_mse"]
    weight: Weight = 1.0
    layer_mapping: LayerMapping = "uniform"


@dataclass(config=STRICT, frozen=True, kw_only=True)
class HiddenCosine:
    """One minus the cosine between hidden states of mapped layers (Sanh et al. 2019)."""

    loss: Literal["hidden_cosine"]
    weight: Weight = 1.0
    layer_mapping: LayerMapping = "uniform"


TermConfig = Annotated[
    HardCrossEntropy
    | HardMse
    | SoftTargetKl
    | SoftTargetReverseKl
    | SoftTargetJsd
    | SoftTargetMse
    | HiddenMse
    | HiddenCosine,
    Field(discriminator="loss"),
]
SOFT_TARGET_DIVERGENCES = (SoftTargetKl, SoftTargetReverseKl, SoftTargetJsd)
HIDDEN_TERMS = (HiddenMse, HiddenCosine)
