"""Memory of one phase on one rank at every moment, from the first build to a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megakd.config.deepspeed import load_ds_config
from megakd.config.run import RunConfig
from megakd.contract.stage import Stage
from megakd.contract.tasks import LANGUAGE_TASKS, STUDENT, TEACHER, Dtype
from megakd.models.export import SHARD_BYTES
from megakd.planning.cluster import Cluster
from megakd.planning.engines import Setting, Unsharded, engine_of
from megakd.planning.gathering import Gathering
from megakd.planning.ledger import Holder, Ledger, Part
from megakd.planning.moments import Amount, Inventory, Moment, Trace, block
from megakd.planning.sharded import Learner, learner_of
from megakd.planning.simulated_phase import Traces, planned_dtype, simulated_phase
from megakd.planning.stages import Phase, Work
from megakd.training.engines import ReadyTeacher
from megakd.training.precision import TORCH_DTYPE, training_dtype

STEPS = 2
"""From the second step on, the moments of the optimizer exist."""
_ANSWERS = Holder(TEACHER, "activations", buffer="answers")
_WORK: Mapping[Work, str] = {
    "importance": "measuring importance",
    "scoring": "scoring",
    "timing": "timing all models side by side",
}
MOMENTS = {"adamw": 2, "sgd": 0}


@dataclass
class PhasePlan:
    """Resources of a phase on a rank.

    load_peak: peak bytes of the host while the models are built and loaded.
    flops, network: operations, and bytes sent by role, of one training step.
    required: False if the run continues without the phase when memory is short.
    """

    name: str
    ledger: Ledger
    load_peak: int = 0
    flops: float = 0.0
    network: dict[str, float] = field(default_factory=dict)
    required: bool = True


@dataclass
class FrozenPart:
    """A frozen model on the rank: its engine, its trace, and its gathered weights."""

    name: str
    engine: Unsharded
    run: Trace
    gathering: Gathering


class Timeline:
    """Simulates a phase."""

    def __init__(self, phase: Phase, config: RunConfig, cluster: Cluster, known: Traces) -> None:
        self.phase, self.config, self.cluster = phase, config, cluster
        self.traced = simulated_phase(phase, config, cluster.device, known)
        ledger = Ledger(cluster.device)
        self.plan = PhasePlan(phase.name, ledger, required=phase.work != "timing")
        self.ledger = self.plan.ledger
        self._teachers: list[FrozenPart] = []
        single = self.traced.single
        self._of_one_view = single and max(moment.live.total for moment in single.moments)

    def play(self) -> PhasePlan:
        """Simulate the phase from the first build to the last checkpoint."""
        if self.phase.stage is None:
            self._work_alone(self.phase.work)
            return self.plan
        for name, ready in self.phase.teachers.items():
            if ready.spec.cache is None:
                self._teachers.append(self._frozen(name, ready))
        self._train(self.phase.stage)
        return self.plan

    def _frozen(self, name: str, ready: ReadyTeacher, role: str = TEACHER) -> FrozenPart:
        self.ledger.when = f"loading the {role}"
        part, dtype = self.traced.teachers[name], planned_dtype(ready, self.cluster.device)
        setting = self._setting(role, part.inventory, ready.spec.deepspeed, dtype)
        setting.owner = name
        engine = engine_of(setting)
        engine.load()
        self.plan.load_peak = self.ledger.peaks["host"].total
        return FrozenPart(name, engine, part.runs[0], engine.gathering(part.runs[0]))

    def _setting(
        self, role: str, inventory: Inventory, spec: str | Mapping[str, Any], dtype: Dtype
    ) -> Setting:
        ds = load_ds_config(spec, where=f"{role}.deepspeed")
        return Setting(
            role=role,
            inventory=inventory,
            zero=ds.get("zero_optimization", {}),
            itemsize=TORCH_DTYPE[dtype].itemsize,
            cluster=self.cluster,
            ledger=self.ledger,
        )

    def _work_alone(self, work: Work) -> None:
        """Load all frozen models, then run them one after another."""
        frozen_parts = []
        for name, ready in self.phase.teachers.items():
            is_teacher = work == "importance" or name in self.config.teacher_specs
            frozen_parts.append(self._frozen(name, ready, TEACHER if is_teacher else STUDENT))
        self.ledger.when = _WORK[work]
        if work == "scoring":
            self.ledger.when += f" (eval.per_device_eval_batch_size {self.config.eval_rows()})"
        for frozen in frozen_parts:
            # Activations of gates count as elastic: no weight gets a gradient.
            self._run(frozen, "elastic" if work == "importance" else "activations")

    def _train(self, stage: Stage) -> None:
        role = STUDENT if stage.role == STUDENT else TEACHER
        dtype = training_dtype(stage.train)
        setting = self._setting(role, self.traced.learner.inventory, stage.deepspeed, dtype)
        setting.moments = MOMENTS[stage.train.optim]
        learner = learner_of(setting)
        self.ledger.when = f"loading the {role}"
        learner.load()
        self.plan.load_peak = self.ledger.peaks["host"].total
        self.ledger.when = "initializing DeepSpeed"
        learner.initialize()
        self._fetch_ahead()
        micro_batches = stage.train.gradient_accumulation_steps
        for _ in range(STEPS):
            for number in sorted({0, micro_batches - 1}):
                self._micro_batch(learner, number, number == micro_batches - 1)
            self.ledger.when = "updating the weights"
            learner.update()
        self._evaluate(learner, self.config.eval_rows(stage.train))
        self.ledger.when = "writing the model"
        written = min(learner.at.inventory.numel * learner.at.itemsize, SHARD_BYTES)
        self.ledger.briefly(learner.at.holder("weights", "host", "copy"), block(written))
        self._count(learner, micro_batches)

    def _fetch_ahead(self) -> None:
        """Allocate memory for prefetching: one teacher from the host at a time is on the device."""
        waiting = [
            frozen.engine.at
            for frozen in self._teachers
            if self.traced.asked[frozen.name] < 1
            and frozen.engine.at.place("offload_param") == "host"
        ]
        if waiting and self.cluster.device != "cpu":
            largest = max(waiting, key=lambda at: at.inventory.numel * at.itemsize)
            shards = largest.inventory.sharded(largest.ranks, largest.itemsize)
            self.ledger.put(largest.holder("weights", "device", "fetched"), shards)

    def _micro_batch(self, learner: Learner, number: int, last: bool) -> None:  # noqa: FBT001
        self.ledger.when = "the teacher's forward"
        for frozen in self._teachers:
            if self.traced.asked[frozen.name] < 1:
                self.ledger.drop(_ANSWERS)  # earlier answers belong to another step
            self._run(frozen, "activations")
            self.ledger.put(_ANSWERS, block(self.traced.answers))
        runs = self.traced.learner.runs
        for index, run in enumerate(runs):
            first = number == 0 and index == 0
            self._group(learner, run, first=first, last=last and index == len(runs) - 1)
        self.ledger.drop(_ANSWERS)

    def _group(self, learner: Learner, run: Trace, *, first: bool, last: bool) -> None:
        """Simulate one forward and one backward of the student's engine."""
        self.ledger.when = "the student's forward"
        heads = [frozen.engine.at.holder("gather", "device", "head") for frozen in self._teachers]
        for holder, frozen in zip(heads, self._teachers, strict=True):
            self.ledger.put(holder, self._head(frozen))
        gathering = learner.gathering(run)
        for index, moment in enumerate(run.moments):
            if index == run.turn:
                for holder in heads:
                    self.ledger.drop(holder)
                self.ledger.when = "the student's backward"
                learner.begin_backward(first=first)
            self._hold(learner, moment, gathering, index, "activations")
            learner.finish(moment.finished)
        self._let_go(learner)
        learner.end_backward(last=last)

    def _head(self, frozen: FrozenPart) -> Amount:
        """Return the bytes of the teacher's output matrix, gathered from its shards."""
        at = frozen.engine.at
        if at.stage != 3 or self.config.task.type not in LANGUAGE_TASKS:
            return Amount()
        source = self.phase.teachers[frozen.name].source
        width = source.architecture.hidden_width(source.config)
        return block(source.config.vocab_size * width * at.itemsize)

    def _run(self, frozen: FrozenPart, part: Part) -> None:
        """Simulate the forward of a frozen model."""
        for index, moment in enumerate(frozen.run.moments):
            self._hold(frozen.engine, moment, frozen.gathering, index, part)
        self._let_go(frozen.engine)

    def _hold(
        self, engine: Unsharded, moment: Moment, gathering: Gathering, index: int, part: Part
    ) -> None:
        at, ledger = engine.at, self.ledger
        live, views = self._divided(moment.live, at.role)
        gathered, arriving = gathering.moments[index], at.holder("gather", "device", "arriving")
        if at.is_cpu:  # gloo gathers into a buffer and copies the buffer
            ledger.briefly(arriving, gathered.arriving.times(2))
        ledger.put(at.holder("gather"), gathered.kept)
        ledger.put(at.holder(part, "device", "live"), live)
        ledger.put(at.holder("elastic", "device", "views"), views)
        ledger.briefly(at.holder("workspace"), moment.workspace)
        ledger.briefly(arriving, gathered.arriving)

    def _divided(self, live: Amount, role: str) -> tuple[Amount, Amount]:
        """Split activations between one view and the other views that share its backward."""
        if self._of_one_view is None or role == TEACHER or not live.total:
            return live, Amount()
        share = min(1.0, self._of_one_view / live.total)
        return live.times(share), live.times(1 - share)

    def _let_go(self, engine: Unsharded) -> None:
        """Free the activations and the weights that ZeRO 3 gathered."""
        for part in ("activations", "elastic"):
            self.ledger.drop(engine.at.holder(part, "device", "live"))
        self.ledger.drop(engine.at.holder("elastic", "device", "views"))
        self.ledger.drop(engine.at.holder("gather"))

    def _evaluate(self, learner: Learner, rows: int) -> None:
        run = self.traced.evaluation
        if run is None:
            return
        self.ledger.when = f"evaluating (eval.per_device_eval_batch_size {rows})"
        gathering = learner.gathering(run)
        for index, moment in enumerate(run.moments):
            self._hold(learner, moment, gathering, index, "activations")
        self._let_go(learner)

    def _count(self, learner: Learner, micro_batches: int) -> None:
        """Compute the operations and the network bytes of one step."""
        runs = self.traced.learner.runs
        asked = self.traced.asked
        teachers = sum(asked[frozen.name] * frozen.run.flops for frozen in self._teachers)
        self.plan.flops = micro_batches * (teachers + sum(run.flops for run in runs))
        ranks = self.cluster.ranks
        rest = (ranks - 1) / ranks
        for frozen in self._teachers:
            at = frozen.engine.at
            gathered = frozen.gathering.numel * at.itemsize + self._head(frozen).total
            sent = asked[frozen.name] * micro_batches * rest * gathered
            self.plan.network[TEACHER] = self.plan.network.get(TEACHER, 0.0) + sent
        self.plan.network[learner.at.role] = rest * sent_by(learner, runs, micro_batches)


def sent_by(learner: Learner, runs: tuple[Trace, ...], micro_batches: int) -> float:
    """Return the bytes that a learner's engine reduces and gathers in a step.

    With W ranks, a rank sends (W - 1) / W of these bytes.
    """
    at = learner.at
    weights = at.inventory.numel * at.itemsize
    backwards = micro_batches * len(runs)
    if at.stage == 0:
        return 2.0 * weights  # an all-reduce
    if at.stage == 1:
        return 3.0 * weights  # an all-reduce, and the new weights are gathered
    if at.stage == 2:
        return (2.0 * backwards + 1.0) * weights
    gathered = sum(learner.gathering(run).numel for run in runs) * at.itemsize
    return micro_batches * gathered + backwards * weights
