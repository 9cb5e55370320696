"""Memory of one phase on one rank, from the first build to a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megakd.config.deepspeed import load_ds_config
from megakd.config.run import RunConfig
from megakd.contract.stage import Stage
from megakd.contract.tasks import LANGUAGE_TASKS, STUDENT, TEACHER, Dtype
from megakd.models.export import SHARD_BYTES
from megakd.planning.cluster import Cluster
from megakd.planning.engines import Frozen, Setting, Trained, trained
from megakd.planning.gathering import Gathering
from megakd.planning.ledger import Holding, Ledger, Part, Share, together
from megakd.planning.moments import NOTHING, Amount, Inventory, Moment, Trace, block
from megakd.planning.simulated_phase import Traces, planned_dtype, simulated_phase
from megakd.planning.stages import Phase, Work
from megakd.training.engines import ReadyTeacher
from megakd.training.precision import TORCH_DTYPE, training_dtype

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


class FrozenPart(NamedTuple):
    """A frozen model on the rank: its engine, its trace, and its gathered weights."""

    name: str
    engine: Frozen
    run: Trace
    gathering: Gathering


class Timeline:
    """The memory of a phase at each time."""

    def __init__(self, phase: Phase, config: RunConfig, cluster: Cluster, known: Traces) -> None:
        self.phase, self.config, self.cluster = phase, config, cluster
        self.traced = simulated_phase(phase, config, cluster.device, known)
        ledger = Ledger(cluster.device)
        self.plan = PhasePlan(phase.name, ledger, required=phase.work != "timing")
        self._look = ledger.look
        self._resting: Holding = {}
        single = self.traced.learner.single
        self._of_one_view = single and max(moment.live.total for moment in single.moments)

    def play(self) -> PhasePlan:
        """Record the memory of the phase from the first build to the last checkpoint."""
        if self.phase.stage is None:
            self._work_alone(self.phase.work)
        else:
            self._train(self.phase.stage)
        return self.plan

    def _load(self, engine: Frozen) -> None:
        """Record the loading of a model, in addition to the models on the rank."""
        self._look(f"loading the {engine.at.role}", self._resting, engine.loading())
        self.plan.load_peak = self.plan.ledger.peaks["host"].total

    def _frozen(self, name: str, ready: ReadyTeacher, role: str = TEACHER) -> FrozenPart:
        part, dtype = self.traced.teachers[name], planned_dtype(ready, self.cluster.device)
        engine = Frozen(self._setting(role, part.inventory, ready.spec.deepspeed, dtype))
        self._load(engine)
        self._resting = together(self._resting, engine.resting())
        return FrozenPart(name, engine, part.runs[0], engine.gathering(part.runs[0]))

    def _setting(
        self, role: str, inventory: Inventory, spec: str | Mapping[str, Any], dtype: Dtype,
        moments: int = 0,
    ) -> Setting:  # fmt: skip
        return Setting(
            role=role,
            inventory=inventory,
            zero=load_ds_config(spec, where=f"{role}.deepspeed").get("zero_optimization", {}),
            itemsize=TORCH_DTYPE[dtype].itemsize,
            cluster=self.cluster,
            moments=moments,
        )

    def _work_alone(self, work: Work) -> None:
        """Load all frozen models, then run them one after another."""
        parts = []
        for name, ready in self.phase.teachers.items():
            is_teacher = work == "importance" or name in self.config.teacher_specs
            parts.append(self._frozen(name, ready, TEACHER if is_teacher else STUDENT))
        when = _WORK[work]
        if work == "scoring":
            when += f" (eval.per_device_eval_batch_size {self.config.eval_rows()})"
        # Activations of gates count as elastic: no weight gets a gradient.
        kind: Part = "elastic" if work == "importance" else "activations"
        for part in parts:
            for _, held in self._moments(part.engine, part.run, part.gathering, kind):
                self._look(when, self._resting, held)

    def _train(self, stage: Stage) -> None:
        frozen = [
            self._frozen(name, ready)
            for name, ready in self.phase.teachers.items()
            if ready.spec.cache is None
        ]
        role = STUDENT if stage.role == STUDENT else TEACHER
        dtype, moments = training_dtype(stage.train), MOMENTS[stage.train.optim]
        inventory = self.traced.learner.inventory
        learner = trained(self._setting(role, inventory, stage.deepspeed, dtype, moments))
        self._load(learner)
        self._look("initializing DeepSpeed", self._resting, learner.initializing())
        self._resting = together(self._resting, learner.resting(), self._fetched(frozen))
        gatherings = [learner.gathering(run) for run in self.traced.learner.runs]
        micro_batches = stage.train.gradient_accumulation_steps
        self._ask(frozen, learner.accumulated() if micro_batches > 1 else {})
        heads = together(*(part.engine.at.held("gather", self._head(part)) for part in frozen))
        for number, gathering in enumerate(gatherings):
            adds = micro_batches > 1 or number > 0
            self._learn(learner, number, gathering, heads, adds=adds)
        for held in learner.updating():
            self._look("updating the weights", self._resting, held)
        self._evaluate(learner, self.config.eval_rows(stage.train))
        written = block(min(inventory.numel * learner.at.itemsize, SHARD_BYTES))
        copied = learner.at.held("weights", written, "host")
        self._look("writing the model", self._resting, copied)
        gathered = sum(gathering.numel for gathering in gatherings)
        self._count(learner, frozen, gathered, micro_batches)

    def _fetched(self, frozen: list[FrozenPart]) -> Holding:
        """Return the memory for prefetching: one teacher from the host is on the device."""
        waiting = [
            part.engine.at
            for part in frozen
            if self.traced.asked[part.name] < 1 and part.engine.at.place("offload_param") == "host"
        ]
        if not waiting or self.cluster.device == "cpu":
            return {}
        largest = max(waiting, key=lambda at: at.inventory.numel * at.itemsize)
        shards = largest.inventory.sharded(largest.ranks, largest.itemsize)
        return largest.held("weights", shards)

    @property
    def _answers(self) -> Holding:
        return {Share(TEACHER, "activations"): block(self.traced.answers)}

    def _ask(self, frozen: list[FrozenPart], gradients: Holding) -> None:
        """Record the teachers' forwards, with the answers of the teachers before."""
        answers: Holding = {}
        for part in frozen:
            is_drawn = self.traced.asked[part.name] < 1  # earlier answers are of another step
            for _, held in self._moments(part.engine, part.run, part.gathering):
                waiting = {} if is_drawn else answers
                self._look("the teacher's forward", self._resting, gradients, waiting, held)
            answers = self._answers

    def _learn(
        self, learner: Trained, number: int, gathering: Gathering, heads: Holding, *, adds: bool
    ) -> None:
        """Record one forward and one backward of the student's engine.

        Args:
            learner: the engine.
            number: number of the group of passes that share the backward.
            gathering: the weights that the engine gathers for the group.
            heads: output matrices of the teachers, which the forward gathers.
            adds: whether an earlier backward of the step left gradients.
        """
        run, inventory = self.traced.learner.runs[number], learner.at.inventory
        waiting = together(self._resting, self._answers)
        forward = together(waiting, heads, learner.accumulated() if adds else {})
        done: list[int] = []
        for index, (moment, held) in enumerate(self._moments(learner, run, gathering)):
            if index < run.turn:
                self._look("the student's forward", forward, held)
                continue
            done += moment.finished
            gradients = learner.backward(inventory.of(done), adds=adds)
            self._look("the student's backward", waiting, gradients, held)
        gradients = learner.backward(inventory, adds=adds, last=True)
        self._look("the student's backward", waiting, gradients)

    def _head(self, frozen: FrozenPart) -> Amount:
        """Return the bytes of the teacher's output matrix, gathered from its shards."""
        at = frozen.engine.at
        if at.stage != 3 or self.config.task.type not in LANGUAGE_TASKS:
            return NOTHING
        source = self.phase.teachers[frozen.name].source
        width = source.architecture.hidden_width(source.config)
        return block(source.config.vocab_size * width * at.itemsize)

    def _moments(
        self, engine: Frozen, run: Trace, gathering: Gathering, part: Part = "activations"
    ) -> Iterator[tuple[Moment, Holding]]:
        """Yield what each moment of a trace holds, with all buffers that it needs on the way."""
        at = engine.at
        for moment, gathered in zip(run.moments, gathering.moments, strict=True):
            live, views = self._divided(moment.live, at.role)
            # gloo gathers into a buffer and copies the buffer.
            arriving = gathered.arriving.times(2 if at.is_gloo else 1)
            yield (
                moment,
                together(
                    at.held(part, live),
                    at.held("elastic", views),
                    at.held("gather", gathered.kept.plus(arriving)),
                    at.held("workspace", moment.workspace),
                ),
            )

    def _divided(self, live: Amount, role: str) -> tuple[Amount, Amount]:
        """Split activations between one view and the other views that share its backward."""
        if self._of_one_view is None or role == TEACHER or not live.total:
            return live, NOTHING
        share = min(1.0, self._of_one_view / live.total)
        return live.times(share), live.times(1 - share)

    def _evaluate(self, learner: Trained, rows: int) -> None:
        run = self.traced.evaluation
        if run is not None:
            when = f"evaluating (eval.per_device_eval_batch_size {rows})"
            for _, held in self._moments(learner, run, learner.gathering(run)):
                self._look(when, self._resting, held)

    def _count(
        self, learner: Trained, frozen: list[FrozenPart], gathered: int, micro_batches: int
    ) -> None:
        """Compute the operations and the network bytes of one step.

        Args:
            learner: the engine of the student.
            frozen: the teachers.
            gathered: number of weights that the engine gathers per micro-batch.
            micro_batches: number of micro-batches per step.
        """
        runs, asked = self.traced.learner.runs, self.traced.asked
        teachers = sum(asked[part.name] * part.run.flops for part in frozen)
        self.plan.flops = micro_batches * (teachers + sum(run.flops for run in runs))
        answered = sum(
            asked[part.name]
            * (part.gathering.numel * part.engine.at.itemsize + self._head(part).total)
            for part in frozen
        )
        weights = learner.at.inventory.numel * learner.at.itemsize
        backwards = micro_batches * len(runs)
        sent = {
            0: 2 * weights,  # an all-reduce
            1: 3 * weights,  # an all-reduce, and the new weights are gathered
            2: (2 * backwards + 1) * weights,
            3: micro_batches * gathered * learner.at.itemsize + backwards * weights,
        }
        ranks = self.cluster.ranks
        rest = (ranks - 1) / ranks
        self.plan.network[TEACHER] = rest * micro_batches * answered
        own = rest * sent[learner.at.stage]
        self.plan.network[learner.at.role] = self.plan.network.get(learner.at.role, 0.0) + own
