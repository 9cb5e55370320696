"""Shrink a model to a budget: keep its most important layers, or try shapes, and repair the cut.

The layers to keep are those whose absence raises the held-out loss most (Shortened LLaMA, Kim et
al. 2024, arXiv 2402.02834): the fewest that have the size, or as many as the best of several
candidates in a trial, which follows MiniDisc (Zhang et al. 2024, arXiv 2205.14570). Candidates are
views of the teacher with sorted units, and all learn from the teacher at the same time with shared
weights. Here they have the same size and differ in the share of depth and width. The student is cut
out, and learns from the teacher on the training rows; a decoder learns at last on texts that it
generates (GKD, Agarwal et al. 2024, arXiv 2306.13649).

Differs from MiniDisc: candidates are compared by their divergence from the teacher, because they
have the same size; the chosen candidate keeps the weights of the trial and is trained further; all
layers have the same shape; an assistant is used only if `assistant` asks for one.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from megakd.contract.lab import Lab, Model, TimedWork
from megakd.contract.results import AskedReport, SizedStudent
from megakd.contract.stage import Stage, StageResult
from megakd.contract.tasks import STUDENT, TEACHER
from megakd.contract.terms import (
    ATTENTION_TERMS,
    STATE_TERMS,
    STRICT,
    Count,
    TermConfig,
    soft_terms,
)
from megakd.methods.assistants import ImportanceOptions
from megakd.methods.shrink.candidates import (
    SPEED_TOLERANCE,
    TOLERANCE,
    Budget,
    Candidate,
    Family,
    Sizes,
    candidates_of,
    timed_candidates,
)
from megakd.methods.shrink.stages import (
    SHARED,
    TRIAL,
    BestCandidate,
    Hop,
    judging_name,
    metric_of,
    objective_of,
    repair,
    rows_of,
    train_of,
    train_series,
    trial,
)

LARGEST_HOP = 2.5
"""Ratio of the teacher's weights to the student's beyond which an assistant may help."""
ASSISTANT = "assistant-"
Shares = Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)]
NARROWER = (0.75, 0.5)
"""Shares of the residual width of candidates, beside the whole width."""
WIDTH_STEP = 8
"""Multiple of the residual width, if it is no multiple of the number of heads."""
MEASURE_AGAIN = (
    "; times beside other work are wrong: remove stages/times* of the run, and start again"
)
BUDGETS = ("parameters", "target_sparsity", "flops", "speedup")
_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parameters_of(value: object) -> object:
    """Return the whole number that a text such as "0.6B" or "600M" writes; others unchanged."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMBT]?)\s*", value, re.IGNORECASE)
    if match is None:
        raise ValueError(
            f'must be a number of weights such as 0.6B, 600M or 600000000 (got "{value}")'
        )
    return round(float(match[1]) * _FACTORS[match[2].upper()])


def _with_sign(sign: str, divisor: int, example: str) -> Callable[[object], object]:
    def read(value: object) -> object:
        if not isinstance(value, str):
            return value
        match = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*({sign})?\s*", value, re.IGNORECASE)
        if match is None:
            raise ValueError(f'must be a number such as {example} (got "{value}")')
        return float(match[1]) / (divisor if match[2] else 1)

    return read


def _split(value: object) -> object:
    """Return the parts of a text with commas; one number alone is a list of one."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    if isinstance(value, list):
        return tuple(value)
    return value if value is None or isinstance(value, tuple) else (value,)


def falling(key: str, sizes: Sequence[float] | None, *, sign: int = 1) -> Iterator[str]:
    """Yield the problem of sizes that do not begin with the largest model."""
    shown = [sign * float(f"{size:.6g}") for size in sizes or ()]  # as the models are named
    if any(first <= second for first, second in pairwise(shown)):
        listed = ", ".join(f"{size:,g}" for size in sizes or ())
        yield f"{key}: the largest model comes first, and sizes differ (got {listed})"


def short_name(parameters: int) -> str:
    """Return a number of weights as a user writes it, such as 600M."""
    factors = {letter: factor for letter, factor in _FACTORS.items() if factor <= parameters}
    letter = max(factors, key=factors.__getitem__)
    return f"{parameters / factors[letter]:.6g}{letter}"


T = TypeVar("T")
Several = Annotated[tuple[T, ...], BeforeValidator(_split), Field(min_length=1)]
Parameters = Annotated[int, BeforeValidator(parameters_of), Field(ge=1)]
Speedup = Annotated[float, BeforeValidator(_with_sign("x", 1, "8x or 8")), Field(gt=1)]
Share = Annotated[float, BeforeValidator(_with_sign("%", 100, "12% or 0.12")), Field(gt=0, lt=1)]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ShrinkConfig(ImportanceOptions):
    """Cut a model to a budget in depth and width, and repair it by distillation.

    Exactly one of the first four options is the budget. Several numbers, the largest model first,
    are the sizes of several students that learn in one run.

    parameters: number of weights of the student, such as 0.6B, 600M or 600000000, as exported.
    target_sparsity: share of the teacher's weights to remove; 0.1 to 0.6 is usual.
    flops: share of the multiplications in the teacher's layers that the student's layers need, such
        as 12%; attention scores, embeddings and output layer are not counted.
    speedup: how much faster than its teacher the student is on this machine, such as 8x; shapes
        with random weights are timed before anything is trained.
    timing: the forward that is timed for `speedup`.
    candidates: 1 takes the fewest layers that have the size, with all heads and neurons or most of
        them; a larger number tries as many shapes, from all layers with fewer heads and neurons to
        the fewest; or the share of the layers that each candidate keeps, such as [1.0, 0.75].
    round_to: multiple of the number of neurons; null: the largest divisor of 64 that divides the
        teacher's number.
    trial_steps: steps in which several candidates learn; null: 0.3 of `repair_steps`.
    repair_steps: steps of the chosen candidate on the training text; null: the steps of `train`.
    on_policy_steps: further steps with the section `rollout`, in the same stage and schedule.
    metric: metric by which candidates are compared; null: held-out `soft_target_kl`, of a
        regression `soft_target_mse`.
    assistant: `auto_2.5` shrinks in several hops of at most 2.5 times, with an assistant after each
        hop; `never` shrinks in one hop.
    passes_per_backward: number of candidates that keep their activations at a time; null: all.
    """

    learns_from_rollouts: ClassVar[bool] = True
    name: Literal["shrink"]
    parameters: Several[Parameters] | None = None
    target_sparsity: Annotated[float, Field(gt=0, lt=1)] | None = None
    flops: Several[Share] | None = None
    speedup: Several[Speedup] | None = None
    timing: TimedWork = TimedWork()
    candidates: Count | Shares = 1
    round_to: Count | None = None
    trial_steps: Count | None = None
    repair_steps: Count | None = None
    on_policy_steps: Annotated[int, Field(ge=0)] = 0
    metric: str | None = None
    assistant: Literal["never", "auto_2.5"] = "never"
    passes_per_backward: Count | None = None

    @property
    def is_series(self) -> bool:
        """True if the config asks for several students."""
        return any(len(sizes or ()) > 1 for sizes in (self.parameters, self.flops, self.speedup))

    @property
    def has_trial(self) -> bool:
        """True if the config asks for several candidates, among which a trial chooses."""
        asked = self.candidates
        return (asked if isinstance(asked, int) else len(asked)) > 1

    def problems(self, config: Any) -> Iterator[str]:
        yield from super().problems(config)
        yield from falling("method.parameters", self.parameters)
        yield from falling("method.flops", self.flops)
        yield from falling("method.speedup", self.speedup, sign=-1)
        budgets = {key: getattr(self, key) for key in BUDGETS}
        if sum(value is not None for value in budgets.values()) != 1:
            given = ", ".join(f"{key} (got {value})" for key, value in budgets.items())
            yield f"method: set exactly one of {given}"
        if self.assistant != "never" and (self.flops or self.speedup or self.is_series):
            yield (
                f"method.assistant: {self.assistant} divides one number of weights into hops; set "
                "one number as method.parameters, or method.assistant to never"
            )
        if self.trial_steps is not None and not self.has_trial:
            yield (
                f"method.trial_steps: {self.trial_steps}, and there is one candidate; set "
                "method.candidates, for example to 6, or remove method.trial_steps"
            )
        if self.metric is not None and not (self.has_trial or self.is_series):
            yield (
                f"method.metric: {self.metric} compares candidates, and there is one; remove the "
                "key, or set method.candidates"
            )
        yield from self._problems_of_timing()
        yield from self._problems_of_rollout(config.rollout)
        (soft,) = soft_terms(config.task.type)
        yield from self._problems_of_objective(config.objective, soft.loss)

    def _problems_of_timing(self) -> Iterator[str]:
        if self.timing != TimedWork() and self.speedup is None:
            yield "method.timing: only method.speedup times forwards; set it, or remove the key"
        if (self.timing.runtime, self.timing.device) == ("onnx", "cuda"):
            yield (
                "method.timing.runtime: onnx is timed on the CPU (got device cuda); set "
                "method.timing.device to cpu, or method.timing.runtime to torch"
            )

    def _problems_of_rollout(self, rollout: Any) -> Iterator[str]:
        if (rollout is None) != (self.on_policy_steps == 0):
            yield (
                f"method.on_policy_steps: {self.on_policy_steps}, and the section rollout is "
                f"{'missing' if rollout is None else 'set'}; set both or neither"
            )
        if rollout is not None and self.assistant != "never" and rollout.by != STUDENT:
            yield (
                f"rollout.by: {rollout.by} is not loaded beside the last assistant (method."
                f"assistant {self.assistant}); set it to student, or method.assistant to never"
            )
        if rollout is not None and rollout.from_step not in (0, self.repair_steps):
            yield (
                f"rollout.from_step: {rollout.from_step} is not method.repair_steps "
                f"({self.repair_steps}), after which shrink generates texts; remove "
                "rollout.from_step"
            )

    def _problems_of_objective(
        self, terms: Sequence[TermConfig] | None, divergence: str
    ) -> Iterator[str]:
        if terms is None:
            return
        if any(isinstance(term, ATTENTION_TERMS) for term in terms):
            yield (
                "objective: the student has fewer heads and layers than its teacher, so that "
                "attention cannot be compared; use soft targets or hidden_mse"
            )
        is_judged = self.metric is None and (self.has_trial or self.is_series)
        if is_judged and not any(judging_name(term, divergence) for term in terms):
            yield (
                f"method.metric: null compares candidates by {divergence}, which the objective "
                "lacks; add the term, or set method.metric, for example to accuracy"
            )


def run(config: ShrinkConfig, lab: Lab) -> StageResult:
    """Find the candidates, sort the teacher, then choose cuts and repair them."""
    sizes = sizes_of(config, lab, lab.given(TEACHER))
    weights = sizes.weights(sizes.family.units)
    wanted = budgets(config, weights)
    first, *others = hops(config, wanted, weights)
    refused_early = wanted if config.is_series else [first]
    groups = {one: _candidates(config, sizes, one) for one in refused_early}
    teacher = lab.teacher()
    start = _start(config, lab, teacher, sizes, [*chain(*groups.values())])
    hop = Hop(teacher, start, lab.pruning.layer_scores(teacher))
    if config.is_series:
        results = train_series(config, lab, hop, groups)
    else:
        results = [_train_one(config, lab, hop, groups[first], others)]
    for budget, result in zip(wanted, results, strict=True):
        lab.record.sizes.append(SizedStudent(result.name, result.folder, _asked(config, budget)))
    return results[-1]


def _start(
    config: ShrinkConfig, lab: Lab, teacher: str, sizes: Sizes, candidates: Sequence[Candidate]
) -> Model:
    """Return the model that students are cut out of; its units are sorted, unless all stay."""
    kept = {(one.heads, one.neurons, one.width) for one in candidates}
    widths = {width for *_, width in kept}
    if config.assistant != "never":  # later hops may lose anything
        widths |= {*sizes.widths}
    elif kept == {(*sizes.family.most, None)}:
        return lab.model(teacher)
    return config.ranked_units(lab, teacher, residual=widths != {None}).source


def budgets(config: ShrinkConfig, parameters: int) -> list[Budget]:
    """Return the sizes of the students, in order; `parameters`: number of the teacher's weights."""
    if config.flops is not None:
        key, text = "method.flops", _of_operations
        return [Budget(key, one, TOLERANCE, text, f"{one:g}") for one in config.flops]
    if config.speedup is not None:
        key, text = "method.speedup", _speedup
        return [
            Budget(key, 1 / x, SPEED_TOLERANCE, text, f"{x:g}x", MEASURE_AGAIN)
            for x in config.speedup
        ]
    key = "method.parameters" if config.parameters else "method.target_sparsity"
    share = 1 - (config.target_sparsity or 0.0)
    targets = config.parameters or (max(1, round(share * parameters)),)
    return [Budget(key, one, TOLERANCE, _weights, short_name(one)) for one in targets]


def hops(config: ShrinkConfig, wanted: Sequence[Budget], parameters: int) -> list[Budget]:
    """Return the sizes of the assistants, if there are any, and of the last student."""
    last = wanted[-1]
    if config.assistant == "never":
        return [last]
    count = math.ceil(math.log(max(parameters / last.target, 1)) / math.log(LARGEST_HOP) - 1e-9)
    ratio = (last.target / parameters) ** (1 / max(count, 1))
    targets = (round(parameters * ratio**hop) for hop in range(1, count))
    return [*(last._replace(target=one) for one in targets), last]


def _weights(size: float) -> str:
    return f"{round(size):,} weights"


def _of_operations(size: float) -> str:
    return f"{size:.1%} of the layers' operations"


def _speedup(size: float) -> str:
    return f"a speed-up of {1 / size:.2f}x"


def _asked(config: ShrinkConfig, budget: Budget) -> AskedReport:
    if config.speedup is None:
        what = "parameters" if config.flops is None else "flops"
        return {"what": what, "value": budget.target}
    work = config.timing
    asked: AskedReport = {"what": "speedup", "value": 1 / budget.target, "batch": work.batch}
    if isinstance(work.tokens, int):
        asked["tokens"] = work.tokens
    return {**asked, "runtime": work.runtime, "device": work.device}


def sizes_of(config: ShrinkConfig, lab: Lab, model: Model) -> Sizes:
    """Return the sizes of the shapes that can be cut out of a model."""
    pruning = lab.pruning
    family = Family(
        units=model.units._replace(width=None, head_width=None),
        depth=model.depth,
        is_stock=lambda view: pruning.has_stock_config(model, view),
        round_to=config.round_to,
    )
    if (
        lab.config.task.type == "causal_lm"
        or isinstance(config.candidates, tuple)
        or any(isinstance(term, STATE_TERMS) for term in objective_of(lab))
    ):
        return Sizes(lab, model, family, (None,))
    widths = narrower(model.width, model.heads.keys)
    possible = [w for w in widths if 0 < w < model.width and family.possible(w)[0]]
    return Sizes(lab, model, family, (None, *possible))


def narrower(width: int, heads: int) -> list[int]:
    """Return about three quarters and half of a width, in whole heads if the width has them."""
    # T5 has widths that are no multiple of the number of heads.
    step = WIDTH_STEP if width % heads else width // heads
    return list(dict.fromkeys(round(share * width / step) * step for share in NARROWER))


def _candidates(config: ShrinkConfig, sizes: Sizes, budget: Budget) -> list[Candidate]:
    if config.speedup is not None:
        return timed_candidates(sizes, budget, config.candidates, config.timing)
    size = sizes.weights if config.flops is None else sizes.operations
    return candidates_of(sizes.of(size), budget, config.candidates)


def _train_one(
    config: ShrinkConfig,
    lab: Lab,
    hop: Hop,
    candidates: Sequence[Candidate],
    others: Sequence[Budget],
) -> StageResult:
    """Choose and repair one student, after the assistants if there are `others` to reach."""
    for number, budget in enumerate(others, start=1):
        start, kept = _choose(config, lab, hop, candidates, number)
        stage = repair(config, lab, hop.teacher, start, config.repair_steps)
        train = train_of(lab, config.repair_steps)
        name = f"{ASSISTANT}{number}"
        result = lab.train(dataclasses.replace(stage, name=name, rollouts=None, train=train))
        hop = hop.at(lab.source(result.folder), kept)
        hop = hop._replace(teacher=lab.assistant(result, None))
        candidates = _candidates(config, sizes_of(config, lab, hop.start), budget)
    start, _ = _choose(config, lab, hop, candidates, len(others) + 1)
    return lab.train(repair(config, lab, hop.teacher, start, config.repair_steps))


def _choose(
    config: ShrinkConfig, lab: Lab, hop: Hop, candidates: Sequence[Candidate], number: int
) -> tuple[Model, tuple[int, ...]]:
    """Return the model cut to the best candidate of a trial, and the kept layers."""
    named = {one.name: one for one in candidates}
    views = {name: hop.view(one) for name, one in named.items()}
    if len(views) == 1:  # there is nothing to choose
        (view,) = views.values()
        return lab.pruning.cut(hop.start, view, f"cut-{number}"), view.layers or ()
    judge = BestCandidate(metric_of(config, lab), tuple(named))
    result = lab.train(trial(config, lab, hop, views, judge, number))
    lab.record.candidates += rows_of(lab, hop, named, result.scores, judge=judge, iteration=number)
    return lab.source(result.folder), views[result.view or candidates[0].name].layers or ()


def random_start(config: ShrinkConfig, lab: Lab, student: StageResult) -> Stage:
    """Return the stage of the baseline `random`: the student's shape from random weights.

    The model is distilled with the same objective, for the steps of all trials and repairs.
    """
    before = (TRIAL, ASSISTANT, SHARED)
    trained = [r for r in lab.results if r.name == STUDENT or r.name.startswith(before)]
    steps = sum(result.steps for result in trained)
    start = lab.source(student.folder).fresh
    stage = repair(config, lab, lab.teacher(), start, config.repair_steps)
    rollouts, first = stage.rollouts, max(steps - config.on_policy_steps, 0)
    return dataclasses.replace(
        stage,
        name="random",
        train=train_of(lab, steps or None),
        rollouts=rollouts and dataclasses.replace(rollouts, from_step=first),
    )


BASELINES = {"random": random_start}
