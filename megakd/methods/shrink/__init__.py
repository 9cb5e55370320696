"""Shrink a model to a budget: choose depth and width in one trial, and repair the cut.

The method follows MiniDisc (Zhang et al. 2024, arXiv 2205.14570): candidates are views of the
teacher with sorted units, and all candidates learn from the teacher at the same time with shared
weights. Here the candidates have the same size and differ in the share of depth and width. The
layers to keep are those whose absence raises the held-out loss most (Shortened LLaMA, Kim et al.
2024, arXiv 2402.02834). The best candidate is cut out, and then learns from the teacher on the
training rows; a decoder learns at last on texts that it generates (GKD, Agarwal et al. 2024, arXiv
2306.13649).

Differs from MiniDisc: candidates are compared by their divergence from the teacher, because they
have the same size; the chosen candidate keeps the weights of the trial and is trained further; all
layers have the same shape; an assistant is used only if `assistant` asks for one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from megakd.contract.lab import Lab, Model, TimedWork
from megakd.contract.metric import Metric
from megakd.contract.results import CandidateReport
from megakd.contract.stage import Constant, Pass, Scores, Stage, StageResult, Verdict
from megakd.contract.tasks import FROM_TEACHER, LANGUAGE_TASKS, STUDENT, TEACHER
from megakd.contract.terms import (
    ATTENTION_TERMS,
    STATE_TERMS,
    STRICT,
    Count,
    HardCrossEntropy,
    SoftTargetKl,
    TermConfig,
)
from megakd.contract.views import View
from megakd.methods.assistants import ImportanceOptions
from megakd.methods.minidisc import Sandwich
from megakd.methods.shrink.budget import (
    SPEED_TOLERANCE,
    TOLERANCE,
    Parameters,
    Share,
    Sizes,
    Speedup,
    timed_candidates,
)
from megakd.methods.shrink.candidates import Budget, Candidate, Family, candidates_of

LARGEST_HOP = 2.5
"""Ratio of the teacher's weights to the student's beyond which an assistant may help."""
SHARE_OF_REPAIR = 0.3
"""The trial takes this share of the repair's steps by default; a tenth chose worse candidates."""
KL = "soft_target_kl"
TRIAL, ASSISTANT = "trial-", "assistant-"
Shares = Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)]
NARROWER = (0.75, 0.5)
"""Shares of the residual width of candidates, beside the whole width."""
BUDGETS = ("parameters", "target_sparsity", "flops", "speedup")


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ShrinkConfig(ImportanceOptions):
    """Cut a model to a budget: the best of several depths and widths, repaired by distillation.

    Exactly one of the first four options is the budget.

    parameters: number of weights of the student, such as 0.6B, 600M or 600000000, as exported.
    target_sparsity: share of the teacher's weights to remove; 0.1 to 0.6 is usual.
    flops: share of the multiplications in the teacher's layers that the student's layers need, such
        as 12%; attention scores, embeddings and output layer are not counted.
    speedup: how much faster than its teacher the student is on this machine, such as 8x; shapes
        with random weights are timed before anything is trained.
    timing: the forward that is timed for `speedup`.
    candidates: number of candidates, from all layers with fewer heads and neurons to few layers
        with all; or the share of the layers that each candidate keeps, such as [1.0, 0.75].
    round_to: multiple of the number of neurons; null: the largest divisor of 64 that divides the
        teacher's number.
    trial_steps: steps in which all candidates learn; null: 0.3 of `repair_steps`.
    repair_steps: steps of the chosen candidate on the training text; null: the steps of `train`.
    on_policy_steps: further steps with the section `rollout`, in the same stage and schedule.
    metric: metric by which candidates are compared; null: held-out `soft_target_kl`.
    assistant: `auto_2.5` shrinks in several hops of at most 2.5 times, with an assistant after each
        hop; `never` shrinks in one hop.
    passes_per_backward: number of candidates that keep their activations at a time; null: all.
    """

    learns_from_rollouts: ClassVar[bool] = True
    name: Literal["shrink"]
    parameters: Parameters | None = None
    target_sparsity: Annotated[float, Field(gt=0, lt=1)] | None = None
    flops: Share | None = None
    speedup: Speedup | None = None
    timing: TimedWork = TimedWork()
    candidates: Count | Shares = 6
    round_to: Count | None = None
    trial_steps: Count | None = None
    repair_steps: Count | None = None
    on_policy_steps: Annotated[int, Field(ge=0)] = 0
    metric: str | None = None
    assistant: Literal["never", "auto_2.5"] = "never"
    passes_per_backward: Count | None = None

    def problems(self, config: Any) -> Iterator[str]:
        yield from super().problems(config)
        budgets = {key: getattr(self, key) for key in BUDGETS}
        if sum(value is not None for value in budgets.values()) != 1:
            given = ", ".join(f"{key} (got {value})" for key, value in budgets.items())
            yield f"method: set exactly one of {given}"
        if self.assistant != "never" and self.speedup is not None:
            yield (
                f"method.assistant: {self.assistant} divides a number of weights into hops, and "
                "method.speedup is a time; set method.parameters, or method.assistant to never"
            )
        if config.student.model != FROM_TEACHER or config.student.layers is not None:
            yield (
                f'student: method "shrink" cuts the student out of its teacher; set student.model '
                f'to "{FROM_TEACHER}" and remove student.layers'
            )
        yield from self._problems_of_rollout(config.rollout)
        yield from self._problems_of_objective(config.objective)

    def _problems_of_rollout(self, rollout: Any) -> Iterator[str]:
        if (rollout is None) != (self.on_policy_steps == 0):
            yield (
                f"method.on_policy_steps: {self.on_policy_steps}, and the section rollout is "
                f"{'missing' if rollout is None else 'set'}; set both or neither"
            )
        if rollout is not None and rollout.from_step not in (0, self.repair_steps):
            yield (
                f"rollout.from_step: {rollout.from_step} is not method.repair_steps "
                f"({self.repair_steps}), after which shrink generates texts; remove "
                "rollout.from_step"
            )

    def _problems_of_objective(self, terms: Sequence[TermConfig] | None) -> Iterator[str]:
        if terms is None:
            return
        if any(isinstance(term, ATTENTION_TERMS) for term in terms):
            yield (
                "objective: the student has fewer heads and layers than its teacher, so that "
                "attention cannot be compared; use soft targets or hidden_mse"
            )
        if self.metric is None and not any(isinstance(t, SoftTargetKl) for t in terms):
            yield (
                f"method.metric: null compares candidates by {KL}, which the objective lacks; add "
                "the term, or set method.metric, for example to accuracy"
            )


class Link(NamedTuple):
    """The start of a hop.

    teacher: name of the model that teaches.
    start: the model that contains the candidates.
    layer_scores: importance of each layer of `start`.
    """

    teacher: str
    start: Model
    layer_scores: tuple[float, ...]


def run(config: ShrinkConfig, lab: Lab) -> StageResult:
    """Find the candidates, sort the teacher, then choose a cut and repair it, for each hop."""
    sizes = sizes_of(config, lab, lab.given(TEACHER))
    first, *others = budgets(config, sizes.weights(sizes.family.units))
    candidates = _candidates(config, sizes, first)
    teacher = lab.teacher()
    ranked = config.ranked_units(lab, teacher, residual=len(sizes.widths) > 1)
    link = Link(teacher, ranked.source, lab.pruning.layer_scores(teacher))
    for number, budget in enumerate(others, start=1):
        link = _assistant(config, lab, link, candidates, number)
        candidates = _candidates(config, sizes_of(config, lab, link.start), budget)
    chosen, _ = _choose(config, lab, link, candidates, len(others) + 1)
    return lab.train(_repair(config, lab, link.teacher, chosen))


def budgets(config: ShrinkConfig, parameters: int) -> list[Budget]:
    """Return the sizes to shrink to, in order; the last is the student's.

    `parameters`: number of weights of the teacher.
    """
    if config.flops is not None:
        return [Budget("method.flops", config.flops, TOLERANCE, _of_operations)]
    if config.speedup is not None:
        return [Budget("method.speedup", 1 / config.speedup, SPEED_TOLERANCE, _speedup)]
    share = 1 - (config.target_sparsity or 0.0)
    target = config.parameters or round(share * parameters)
    count = math.ceil(math.log(max(parameters / target, 1)) / math.log(LARGEST_HOP) - 1e-9)
    ratio = (target / parameters) ** (1 / max(count, 1))
    hops = range(1, 1 if config.assistant == "never" else count)
    targets = [*(round(parameters * ratio**hop) for hop in hops), target]
    return [Budget("method.parameters", one, TOLERANCE, _weights) for one in targets]


def _weights(size: float) -> str:
    return f"{round(size):,} weights"


def _of_operations(size: float) -> str:
    return f"{size:.1%} of the layers' operations"


def _speedup(size: float) -> str:
    return f"a speed-up of {1 / size:.2f}x"


def sizes_of(config: ShrinkConfig, lab: Lab, model: Model) -> Sizes:
    """Return the sizes of the shapes that can be cut out of a model."""
    pruning = lab.pruning
    family = Family(
        units=model.units._replace(width=None, head_width=None),
        depth=model.depth,
        is_stock=lambda view: pruning.has_stock_config(model, view),
        round_to=config.round_to,
    )
    return Sizes(lab, model, family, (None, *_widths(config, lab, model, family)))


def _widths(config: ShrinkConfig, lab: Lab, model: Model, family: Family) -> Iterator[int]:
    """Yield narrower widths of the hidden states; a decoder keeps its width."""
    if lab.config.task.type == "causal_lm" or isinstance(config.candidates, tuple):
        return
    if any(isinstance(term, STATE_TERMS) for term in objective_of(lab)):
        return
    head = model.width // model.heads.keys
    for share in NARROWER:
        width = round(share * model.heads.keys) * head
        if 0 < width < model.width and family.possible(width)[0]:
            yield width


def _candidates(config: ShrinkConfig, sizes: Sizes, budget: Budget) -> list[Candidate]:
    if config.speedup is not None:
        return timed_candidates(sizes, budget, config.candidates, config.timing)
    size = sizes.weights if config.flops is None else sizes.operations
    return candidates_of(sizes.of(size), budget, config.candidates)


def _assistant(
    config: ShrinkConfig, lab: Lab, link: Link, candidates: Sequence[Candidate], number: int
) -> Link:
    chosen, kept = _choose(config, lab, link, candidates, number)
    stage = _repair(config, lab, link.teacher, chosen)
    train = _train(lab, config.repair_steps)
    name = f"{ASSISTANT}{number}"
    result = lab.train(dataclasses.replace(stage, name=name, rollouts=None, train=train))
    scores = tuple(link.layer_scores[layer - 1] for layer in kept)
    return Link(lab.assistant(result, None), lab.source(result.folder), scores)


def _choose(
    config: ShrinkConfig, lab: Lab, link: Link, candidates: Sequence[Candidate], number: int
) -> tuple[StageResult, tuple[int, ...]]:
    """Run the trial of a hop; return its result, the best candidate, and the layers it keeps."""
    stage = _trial(config, lab, link, candidates, number)
    result = lab.train(stage)
    lab.record.candidates += _rows(config, lab, link, result, candidates, number=number)
    kept = stage.views[result.view or candidates[0].name].layers or ()
    return result, kept


def _trial(
    config: ShrinkConfig, lab: Lab, link: Link, candidates: Sequence[Candidate], number: int
) -> Stage:
    units = link.start.units
    views: dict[str, View] = {one.name: one.view(link.layer_scores, units) for one in candidates}
    steps = config.trial_steps or max(1, round(SHARE_OF_REPAIR * _repair_steps(config, lab)))
    return Stage(
        name=f"{TRIAL}{number}",
        teachers=(link.teacher,),
        start=link.start,
        objective=objective_of(lab),
        strategy=Sandwich(link.teacher, tuple(views)),
        views=views,
        judge=BestCandidate(_metric(config, lab), tuple(views)),
        passes_per_backward=config.passes_per_backward,
        measures_losses=True,
        train=_train(lab, steps),
    )


def _metric(config: ShrinkConfig, lab: Lab) -> Metric:
    if config.metric is not None:
        return lab.metric(config.metric)
    return Metric(name=KL, parts=(KL,), higher_is_better=False)


def _repair(config: ShrinkConfig, lab: Lab, teacher: str, chosen: StageResult) -> Stage:
    """Return the stage that repairs the chosen cut, and finishes it on its own texts."""
    steps, rollout = config.repair_steps, lab.config.rollout
    if rollout is not None:
        repair = _repair_steps(config, lab)
        steps = repair + config.on_policy_steps
        rollout = dataclasses.replace(rollout, from_step=repair)
    return Stage(
        name=STUDENT,
        teachers=(teacher,),
        start=lab.source(chosen.folder),
        objective=objective_of(lab),
        strategy=Constant((Pass(teacher=teacher),)),
        rollouts=rollout,
        train=_train(lab, steps),
    )


def _repair_steps(config: ShrinkConfig, lab: Lab) -> int:
    return config.repair_steps or lab.steps_of_student()


def _train(lab: Lab, steps: int | None) -> Any:
    """Return the section `train` with another number of steps; None: as the config has it."""
    return None if steps is None else dataclasses.replace(lab.config.train, max_steps=steps)


def objective_of(lab: Lab) -> tuple[TermConfig, ...]:
    """Return the objective of the config, or the default.

    The default is the divergence from the teacher. A labelled row of a classifier or a regression
    also has the loss on its label; a classifier's weighs as much as the divergence of the row.
    """
    if lab.config.objective is not None:
        return lab.config.objective
    if lab.config.task.type == "classification":
        labels = HardCrossEntropy(loss="hard_cross_entropy", count="rows")
        return (*lab.soft_terms(1.0), labels)
    is_language = lab.config.task.type in LANGUAGE_TASKS
    return lab.soft_terms(1.0) if is_language else (*lab.soft_terms(1.0), *lab.hard_terms())


def _rows(
    config: ShrinkConfig,
    lab: Lab,
    link: Link,
    result: StageResult,
    candidates: Sequence[Candidate],
    *,
    number: int,
) -> Iterator[CandidateReport]:
    """Yield the rows of the report for a trial, with scores of the evaluation that decided."""
    metric, count = _metric(config, lab), lab.pruning.parameters
    units = link.start.units
    whole = count(link.start, units._replace(head_width=None)).parameters
    for one in candidates:
        parameters = count(link.start, one.view(link.layer_scores, units)).parameters
        yield {
            "iteration": number,
            "sparsity": round(1 - parameters / whole, 4),
            "parameters": parameters,
            "metric": metric.of(result.scores[one.name]),
            "tradeoff": metric.worth(result.scores[one.name]),
            "chosen": one.name == result.view,
            "shape": one.shape(),
        }


@plain_dataclass(frozen=True)
class BestCandidate:
    """A judge that compares candidates of one size by one metric; of equal ones, the first wins."""

    metric: Metric
    names: tuple[str, ...]

    def __call__(self, scores: Scores, step: int) -> Verdict:
        """Return the best candidate; a value that is not a number loses."""
        del step
        values = {name: self.metric.worth(scores[name]) for name in self.names}
        known = {name: -math.inf if math.isnan(v) else v for name, v in values.items()}
        best = max(self.names, key=lambda name: known[name])
        return Verdict(known[best], best)


def random_start(config: ShrinkConfig, lab: Lab, student: StageResult) -> Stage:
    """Return the stage of the baseline `random`: the student's shape from random weights.

    The model is distilled with the same objective, for the steps of all trials and repairs.
    """
    trained = [r for r in lab.results if r.name == STUDENT or r.name.startswith((TRIAL, ASSISTANT))]
    steps = sum(result.steps for result in trained)
    stage = _repair(config, lab, lab.teacher(), student)
    rollouts, first = stage.rollouts, max(steps - config.on_policy_steps, 0)
    return dataclasses.replace(
        stage,
        name="random",
        start=lab.source(student.folder).fresh,
        train=_train(lab, steps or None),
        rollouts=rollouts and dataclasses.replace(rollouts, from_step=first),
    )


BASELINES = {"random": random_start}
