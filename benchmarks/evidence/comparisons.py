"""Comparisons of the evidence: a method's arms, and the settings in which they are trained.

Every arm trains the same student on the same rows with the same optimizer steps. Arms of one group,
such as a temperature, are compared with the first arm of the group's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from evidence.settings import POOL, STUDENT_LAYERS, Setting
from lib.data import Config

BEST = "six"
GROUP = ", "
"""Between the name of an arm and its group."""


class Place(NamedTuple):
    """The models and results that the config of an arm refers to.

    models: folders of the teachers of the seed. caches: folders with their answers.
    details: of finished cells of the seed, by arm.
    """

    setting: Setting
    models: Mapping[str, str]
    caches: Mapping[str, str]
    details: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm of a comparison.

    config: sections of the run config that replace those of the setting; the keys of `train` that
        are named replace single keys.
    steps: the optimizer steps of the run, as a share of the setting's steps for a student.
    after: arm whose cell of the same seed is read.
    """

    config: Callable[[Place], Config]
    steps: float = 1.0
    after: str | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A method against its controls.

    arms: by name; the first is the reference. seeds: by setting. teachers: those that the arms
    need. cached: whether the teachers' answers are stored on disk. quick: arms of `--quick`.
    """

    arms: Mapping[str, Arm]
    seeds: Mapping[str, tuple[int, ...]]
    teachers: tuple[str, ...] = (BEST,)
    cached: bool = False
    quick: tuple[str, ...] = ()

    def reference_of(self, arm: str) -> str:
        """Return the reference in the group of an arm, else the first arm."""
        first = next(iter(self.arms))
        alike = first.partition(GROUP)[0] + GROUP + arm.partition(GROUP)[2]
        return alike if alike in self.arms else first


def grouped(group: str, arms: Mapping[str, Arm]) -> dict[str, Arm]:
    return {f"{name}{GROUP}{group}": arm for name, arm in arms.items()}


def _student(place: Place) -> Config:
    layers = list(STUDENT_LAYERS)
    return {"student": {"model": place.models[BEST], "deepspeed": "zero0", "layers": layers}}


def labels_alone(place: Place) -> Config:
    train = {"learning_rate": place.setting.label_rate}
    return {**_student(place), "method": {"name": "finetune"}, "train": train}


def teacher_section(place: Place, name: str = BEST) -> Config:
    return {"model": place.models[name], "deepspeed": "teacher_zero0", "dtype": "bf16"}


def _soft(temperature: float) -> list[Config]:
    return [{"loss": "soft_target_kl", "temperature": temperature}]


def _pool_arm(temperature: float, **method: Any) -> Arm:
    def config(place: Place) -> Config:
        teachers = [
            {"name": name, **teacher_section(place, name), "cache": place.caches[name]}
            for name in POOL
        ]
        sections = {"teachers": teachers, "method": method, "objective": _soft(temperature)}
        return {**_student(place), **sections}

    return Arm(config=config)


def pool_arms(temperature: float) -> dict[str, Arm]:
    return {
        "uniform": _pool_arm(temperature, name="skdbert"),
        "teacher rank": _pool_arm(temperature, name="skdbert", distribution="teacher_rank"),
        "mean": _pool_arm(temperature, name="mean_of_teachers"),
        "best teacher": _pool_arm(temperature, name="single", teacher=BEST),
    }


KINDS = ("hard_cross_entropy", "soft_target_kl", "hidden_mse", "relation_fsp")
ALL_KINDS: list[Config] = [{"loss": kind} for kind in KINDS]


def _taught(place: Place, objective: list[Config], **method: Any) -> Config:
    teacher = teacher_section(place)
    return {**_student(place), "teacher": teacher, "method": method, "objective": objective}


def _single(objective: list[Config]) -> Arm:
    return Arm(config=lambda place: _taught(place, objective, name="single"))


def _selection(**options: Any) -> Arm:
    return Arm(
        config=lambda place: _taught(place, ALL_KINDS, name="knowledge_selection", **options)
    )


def _selector(**options: Any) -> Arm:
    return _selection(episodes=3, episode_steps=100, **options)


def _fixed(place: Place) -> Config:
    """The mean weights of the learned selector of the same seed, at every step."""
    weights = place.details["soft"]
    objective = [{"loss": kind, "weight": round(weights[kind], 4)} for kind in KINDS]
    return _taught(place, objective, name="single")


SELECTION_ARMS = {
    "soft": _selector(),
    "hard": _selector(action="hard"),
    "phases of 1": _selector(phase_steps=1),  # the paper without a refinement
    "all kinds": _single(ALL_KINDS),
    "fixed mean weights": Arm(config=_fixed, after="soft"),
    "random soft": _selection(policy="random_soft"),
    "random hard": _selection(policy="random_hard"),
    **{f"only {kind}": _single([{"loss": kind}]) for kind in KINDS},
    "labels": Arm(config=labels_alone),
}


def _cut(sparsity: float, *, steps: float = 1.0, **method: Any) -> Arm:
    """Return the arm of a method that cuts the student out of the teacher."""

    def config(place: Place) -> Config:
        return {
            "teacher": teacher_section(place),
            "student": {"model": "from_teacher", "deepspeed": "zero0"},
            "method": {"target_sparsity": sparsity, **method},
        }

    return Arm(config=config, steps=steps)


def _cut_labels(sparsity: float) -> Arm:
    cut = _cut(sparsity, name="evidence_labels:Labels")

    def config(place: Place) -> Config:
        return cut.config(place) | {"train": {"learning_rate": place.setting.cut_label_rate}}

    return Arm(config=config)


def assistant_arms(sparsity: float) -> dict[str, Arm]:
    return {
        # The target learns in two trials, each with half of the steps.
        "minidisc": _cut(
            sparsity, steps=0.5, name="minidisc", sparsities=[0.5, 0.7, 0.85, sparsity]
        ),
        "direct": _cut(sparsity, name="direct"),
        "labels": _cut_labels(sparsity),
    }


THREE = (1, 2, 3)

COMPARISONS = {
    "plain": Comparison(
        seeds={"clinc150": (1, 2, 3, 4, 5)},
        arms={
            "T 1": _single(_soft(1.0)),
            "T 4": _single(_soft(4.0)),
            "labels": Arm(config=labels_alone),
        },
    ),
    "skdbert": Comparison(
        seeds=dict.fromkeys(
            ("clinc150-few", "clinc150-few-10-epochs", "banking77-few", "sst2-few"), THREE
        ),
        teachers=tuple(POOL),
        cached=True,
        arms={
            **grouped("T 1", pool_arms(1.0)),
            **grouped("T 4", pool_arms(4.0)),
            "labels": Arm(config=labels_alone),
        },
    ),
    "selection": Comparison(
        seeds={"clinc150-few": THREE, "banking77-few": THREE},
        arms=SELECTION_ARMS,
        quick=("soft", "only soft_target_kl", "labels"),
    ),
    "minidisc": Comparison(
        seeds={"clinc150-few": THREE, "banking77-few": THREE, "sst2-few": THREE},
        arms={
            **grouped("0.97", assistant_arms(0.97)),
            **grouped("0.9", assistant_arms(0.9)),
            # Every assistant is trained, which takes several times as long: at one sparsity alone.
            **grouped(
                "0.95", {**assistant_arms(0.95), "maxidisc": _cut(0.95, steps=0.5, name="maxidisc")}
            ),
        },
        quick=("minidisc, 0.97", "direct, 0.97", "labels, 0.97"),
    ),
}
