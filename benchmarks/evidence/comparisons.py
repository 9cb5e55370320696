"""Comparisons of the evidence: arms in groups, and the runs that they refer to.

Every arm trains the same student on the same rows with the same optimizer steps. Arms of one group,
such as a temperature, are compared with the reference arm of their group.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from evidence.settings import EQUAL, POOL, Setting
from megakd.methods.tradeoff import choose

Config = dict[str, Any]


class Place(NamedTuple):
    """The models and results that the config of an arm refers to.

    models: folders of the teachers of the seed.
    caches: folders with the answers of these teachers.
    details: of a finished cell of the seed, by arm.
    """

    setting: Setting
    models: Mapping[str, str]
    caches: Mapping[str, str]
    details: Callable[[str], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm of a comparison.

    config: sections of the run config that replace those of the setting; the keys of `train` that
        are named replace single keys.
    steps: the optimizer steps of the run, as a share of the setting's steps for a student.
    after: arm whose cell of the same seed is read; without its group in `grouped`.
    same_as: whether the run would be that of the cell `after`, from the details of this cell. The
        cell is then copied, because equal runs give equal weights.
    asks_teachers: False for labels alone, also where the student is cut out of a teacher.
    at_equal_cost: whether the arm has cells at equal cost, too.
    """

    config: Callable[[Place], Config]
    steps: float = 1.0
    after: str | None = None
    same_as: Callable[[Mapping[str, float]], bool] | None = None
    asks_teachers: bool = True
    at_equal_cost: bool = True


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A method against its controls, as the page shows them.

    reference: arm of the paper's method. plain: plain distillation from the best teacher; labels:
        the student without a teacher; both without their group, None where no such arm exists.
    arms: by name, in the order of the page.
    """

    title: str
    page: str
    reference: str
    plain: str | None
    labels: str | None
    arms: Collection[str]

    def reference_of(self, arm: str, present: Iterable[str]) -> str:
        """Return the reference arm of an arm's group.

        An arm without a group belongs to the first group that has present arms, else to the first.
        """
        known = {*map(group_of, present)}
        arms = sorted(self.arms, key=lambda one: group_of(one) not in known)
        return arm_beside(arms, self.reference, arm) or self.reference


@dataclass(frozen=True, kw_only=True)
class Trained(Comparison):
    """A comparison whose arms are trained by `evidence`.

    seeds: by setting. teachers: those that the arms need. start: of the student.
    deciding: arms that are repeated in the settings after the first: the method, its closest
        controls and its best variants; none: all arms.
    cached: whether the teachers' answers are kept on disk.
    """

    plain: str
    labels: str
    start: str
    seeds: Mapping[str, tuple[int, ...]]
    teachers: tuple[str, ...]
    arms: Mapping[str, Arm]
    deciding: tuple[str, ...] = ()
    cached: bool = False

    def arms_in(self, setting: str) -> dict[str, Arm]:
        is_first = setting == next(iter(self.seeds))
        chosen = () if is_first else self.deciding
        return {name: self.arms[name] for name in chosen or self.arms}


GROUP = ", "


def named(arm: str) -> str:
    """Return an arm's name without its group."""
    return arm.partition(GROUP)[0]


def group_of(arm: str) -> str:
    """Return the name of an arm's group; empty without a group."""
    return arm.partition(GROUP)[2]


def arm_beside(arms: Iterable[str], name: str, arm: str) -> str | None:
    """Return the arm with a name in the group of another arm, else the first with the name."""
    alike = [one for one in arms if named(one) == name]
    same = (one for one in alike if group_of(one) == group_of(arm))
    return next(same, next(iter(alike), None))


def in_group(arm: str, group: str) -> str:
    return f"{arm}{GROUP}{group}"


def grouped(group: str, arms: Mapping[str, Arm]) -> dict[str, Arm]:
    return {
        in_group(name, group): replace(arm, after=in_group(arm.after, group)) if arm.after else arm
        for name, arm in arms.items()
    }


CHOSEN, _SCORE = "chosen", "trial score "


def first_trial(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores of MiniDisc's first trial and the sparsity that was chosen, as details.

    Empty for other methods.
    """
    rows = [row for row in report["candidates"] if row.get("iteration") == 1]
    scores = {f"{_SCORE}{row['sparsity']:g}": row["metric"] for row in rows}
    chosen = [row["sparsity"] for row in rows if row["chosen"]]
    return scores | ({CHOSEN: chosen[0]} if chosen else {})


BEST = "six"


def _student(place: Place) -> Config:
    layers = list(place.setting.student_layers)
    return {"student": {"model": place.models[BEST], "deepspeed": "zero0", "layers": layers}}


def labels_alone(place: Place) -> Config:
    return {**_student(place), "method": {"name": "finetune"}, **_at(place.setting.label_rate)}


LABELS = Arm(config=labels_alone, asks_teachers=False)


def _at(rate: float) -> Config:
    return {"train": {"learning_rate": rate}}


def _soft(temperature: float, **keys: Any) -> list[Config]:
    return [{"loss": "soft_target_kl", "temperature": temperature, **keys}]


def _teacher(place: Place, name: str = BEST) -> Config:
    return {"model": place.models[name], "deepspeed": "teacher_zero0", "dtype": "bf16"}


def teacher_sections(place: Place, names: tuple[str, ...], *, cached: bool = True) -> list[Config]:
    """Return the section `teachers`. cached: whether answers come from the teachers' caches."""
    return [
        {"name": name, **_teacher(place, name)} | ({"cache": place.caches[name]} if cached else {})
        for name in names
    ]


def _pool_arm(temperature: float, **keys: Any) -> Arm:
    objective = keys.pop("objective", None) or _soft(temperature)

    def config(place: Place) -> Config:
        sections = {
            "teachers": teacher_sections(place, tuple(place.setting.pool)),
            "method": keys,
            "objective": objective,
        }
        return {**_student(place), **sections}

    return Arm(config=config)


def pool_arms(temperature: float) -> dict[str, Arm]:
    return {
        "uniform": _pool_arm(temperature, name="skdbert"),
        "teacher rank": _pool_arm(temperature, name="skdbert", distribution="teacher_rank"),
        "student rank": _pool_arm(temperature, name="skdbert", distribution="student_rank"),
        "mean": _pool_arm(temperature, name="mean_of_teachers"),
        "best teacher": _pool_arm(temperature, name="single", teacher=BEST),
    }


KINDS = ("hard_cross_entropy", "soft_target_kl", "hidden_mse", "relation_fsp")
PER_LABEL: list[Config] = [{"loss": kind} for kind in KINDS]
"""All kinds; with few labels, a labelled row weighs more than a row of the soft targets."""
PER_ROW: list[Config] = [PER_LABEL[0] | {"count": "rows"}, *PER_LABEL[1:]]
"""All kinds; a labelled row weighs as much as a row of the soft targets: the method's default."""


def _kinds(place: Place, objective: list[Config], **method: Any) -> Config:
    sections = {"teacher": _teacher(place), "method": method, "objective": objective}
    return {**_student(place), **sections}


def _kinds_arm(objective: list[Config], **method: Any) -> Arm:
    return Arm(config=lambda place: _kinds(place, objective, **method))


def _selector(objective: list[Config] = PER_LABEL, **options: Any) -> Arm:
    method = {"name": "knowledge_selection", "episodes": 3, "episode_steps": 100, **options}
    return _kinds_arm(objective, **method)


def _fixed(place: Place) -> Config:
    """The mean weights of the learned selector of the same seed, at every step."""
    weights = place.details("soft")
    objective = [{"loss": kind, "weight": round(weights[kind], 4)} for kind in KINDS]
    return _kinds(place, objective, name="knowledge_selection", policy="all")


def _policy(policy: str, objective: list[Config] = PER_LABEL) -> Arm:
    return _kinds_arm(objective, name="knowledge_selection", policy=policy)


def _only(kind: str) -> Arm:
    return _kinds_arm([{"loss": kind}], name="single")


def _at_equal_steps(arm: Arm) -> Arm:
    """Return an arm that has cells at equal steps only, because other controls are closer."""
    return replace(arm, at_equal_cost=False)


SELECTION_ARMS = {
    "soft": _selector(),
    "hard": _selector(action="hard"),
    "all kinds": _policy("all"),
    "fixed mean weights": Arm(config=_fixed, after="soft"),
    "random soft": _policy("random_soft"),
    "random hard": _at_equal_steps(_policy("random_hard")),
    "only soft_target_kl": _only("soft_target_kl"),
    **{f"only {kind}": _at_equal_steps(_only(kind)) for kind in KINDS if kind != "soft_target_kl"},
    "restraint 0": _selector(restraint=0),
    "restraint 0.002": _selector(restraint=0.002),
    "phases of 1": _selector(phase_steps=1),
    "no exploration": _selector(exploration=0),
    "all kinds per row": _at_equal_steps(_policy("all", PER_ROW)),
    "soft per row": _at_equal_steps(_selector(PER_ROW)),
    "labels": LABELS,
}


def _cut(place: Place, sparsity: float, method: Config) -> Config:
    grid = {"target_sparsity": sparsity, "sparsities": [*GRID, sparsity]}
    return {
        "teacher": _teacher(place),
        "student": {"model": "from_teacher", "deepspeed": "zero0"},
        "method": {**grid, **method},
    }


GRID = (0.5, 0.7, 0.85)
TRADEOFF = 0.2
"""MiniDisc's default."""


def _assistants(sparsity: float, **method: Any) -> Arm:
    """Return the arm of a method whose target learns in two trials, each with half of the steps."""
    return replace(_one_leg(sparsity, **method), steps=0.5)


def _one_leg(sparsity: float, **method: Any) -> Arm:
    return Arm(config=lambda place: _cut(place, sparsity, method))


def _cut_labels(sparsity: float) -> Arm:
    method = {"name": "evidence_labels:Labels"}

    def config(place: Place) -> Config:
        return _cut(place, sparsity, method) | _at(place.setting.cut_label_rate)

    return Arm(config=config, asks_teachers=False)


def _other_choice(sparsity: float, **options: Any) -> Arm:
    """Return MiniDisc with another rule of choice: the same run if the choice is the same."""
    weight = options.get("tradeoff", TRADEOFF)
    may_win = options.get("target_may_win", True)

    def has_same_choice(details: Mapping[str, float]) -> bool:
        scores = {
            float(key.removeprefix(_SCORE)): value
            for key, value in details.items()
            if key.startswith(_SCORE)
        }
        chosen, _ = choose(scores, weight=weight, target=sparsity, target_may_win=may_win)
        return chosen == details[CHOSEN]

    arm = _assistants(sparsity, name="minidisc", **options)
    return replace(arm, after="minidisc", same_as=has_same_choice)


def assistant_arms(sparsity: float) -> dict[str, Arm]:
    return {
        "minidisc": _assistants(sparsity, name="minidisc"),
        "target barred": _other_choice(sparsity, target_may_win=False),
        "lambda 0": _other_choice(sparsity, tradeoff=0.0),
        "lambda 0.4": _other_choice(sparsity, tradeoff=0.4),
        "direct": _one_leg(sparsity, name="direct"),
        "labels": _cut_labels(sparsity),
    }


def variant_arms(sparsity: float) -> dict[str, Arm]:
    """Return changed second trials of MiniDisc at one sparsity."""
    options = {
        "both teach": {"teaches": "both"},
        "split teachers": {"teaches": "split"},
        "target alone": {"alone": True},
        "one schedule": {"one_schedule": True},
        "all three": {"one_schedule": True, "teaches": "both", "alone": True},
    }
    name = "evidence_variants:Variant"
    return {arm: _assistants(sparsity, name=name, **keys) for arm, keys in options.items()}


THREE = (1, 2, 3)
POOL_DECIDING = ("uniform", "teacher rank", "mean", "best teacher")
SELECTION_DECIDING = ("soft", "hard", "all kinds", "fixed mean weights", "random soft")
ASSISTANTS_DECIDING = ("minidisc", "direct", "both teach", "all three", "labels")

COMPARISONS = {
    "plain": Trained(
        title="Plain distillation: the soft targets of one teacher",
        page="losses.md",
        start="layers 2 and 5 of the teacher",
        reference="soft targets",
        plain="soft targets",
        labels="labels",
        # Five where a seed takes less than ten minutes with two runs side by side.
        seeds={"clinc150": (1, 2, 3, 4, 5)},
        teachers=(BEST,),
        arms={
            **grouped("T 1", {"soft targets": _kinds_arm(_soft(1.0), name="single")}),
            **grouped("T 4", {"soft targets": _kinds_arm(_soft(4.0), name="single")}),
            "labels": LABELS,
        },
    ),
    "skdbert": Trained(
        title="SKDBERT: a teacher drawn at every step",
        page="pools.md",
        start="layers 2 and 5 of the best teacher",
        reference="uniform",
        plain="best teacher",
        labels="labels",
        seeds=dict.fromkeys(
            ("clinc150-few", "clinc150-few-10-epochs", "banking77-few", "sst2-few"), THREE
        ),
        deciding=(*(in_group(arm, t) for t in ("T 1", "T 4") for arm in POOL_DECIDING), "labels"),
        teachers=tuple(POOL),
        cached=True,
        arms={**grouped("T 1", pool_arms(1.0)), **grouped("T 4", pool_arms(4.0)), "labels": LABELS},
    ),
    "equal_teachers": Trained(
        title="Equal teachers: one that is drawn at every step, against their mean",
        page="pools.md",
        start="layers 2 and 5 of the teacher `six`",
        reference="uniform",
        # The gate asks the mean: one of them teaches less than the labels (-2.1 points).
        plain="mean",
        labels="labels",
        seeds={"clinc150-few-equal": THREE},
        teachers=(*EQUAL, BEST),
        cached=True,
        arms={
            "uniform": _pool_arm(1.0, name="skdbert"),
            "mean": _pool_arm(1.0, name="mean_of_teachers"),
            "one teacher": _pool_arm(1.0, name="single", teacher=BEST),
            "labels": LABELS,
        },
    ),
    "selection": Trained(
        title="Knowledge selection: learned weights of the kinds of knowledge",
        page="selection.md",
        start="layers 2 and 5 of the best teacher",
        reference="soft",
        plain="only soft_target_kl",
        labels="labels",
        seeds={"clinc150-few": THREE, "banking77-few": THREE},
        deciding=(*SELECTION_DECIDING, "only soft_target_kl", "labels"),
        teachers=(BEST,),
        arms=SELECTION_ARMS,
    ),
    "minidisc": Trained(
        title="MiniDisc: an assistant chosen in one trial",
        page="minidisc.md",
        start="cut out of the sorted teacher",
        reference="minidisc",
        plain="direct",
        labels="labels",
        seeds={"clinc150-few": THREE, "banking77-few": THREE, "sst2-few": THREE},
        deciding=tuple(in_group(arm, "0.97") for arm in ASSISTANTS_DECIDING),
        teachers=(BEST,),
        arms={
            **grouped("0.9", assistant_arms(0.9)),
            **grouped("0.95", assistant_arms(0.95)),
            # Every assistant is trained, which takes several times as long: at one sparsity alone.
            **grouped("0.95", {"maxidisc": _assistants(0.95, name="maxidisc")}),
            **grouped("0.97", assistant_arms(0.97) | variant_arms(0.97)),
        },
    ),
}
