"""The student's training engine: a forward and a backward per micro-batch, an update per step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megakd.data.batch import (
    Batch,
    Counts,
    Documents,
    Losses,
    Outputs,
    Pass,
    Predictions,
    Targets,
    add_parts,
    backward_groups,
    copied_to,
)
from megakd.engine.collectives import raise_on_all
from megakd.engine.initialize import RATE, Engine
from megakd.engine.memory import destroy
from megakd.engine.optimizer_state import (
    AVERAGES,
    LEARNER,
    OptimizerState,
    Shard,
    StoredParts,
    file_of,
)
from megakd.engine.sharding import evaluating, memory_efficient_linear
from megakd.errors import CheckpointError, TrainingError
from megakd.models.views import Cut, Maker, View

_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

OVERFLOWS = (
    "fp16 cannot hold it even where the loss is not scaled; use train.bf16 or fp32, or lower the "
    "weights of the objective"
)


class StudentEngine:
    """A DeepSpeed training engine around a bundle, at any ZeRO stage.

    averages: values that a strategy keeps for each element of `local_shards`, [n] by name of the
        weight; they are saved and loaded with the moments.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        engine.train()
        self.averages: dict[str, Tensor] = {}
        self._gradients = StepGradients(engine)

    @property
    def bundle(self) -> nn.Module:
        return self._engine.module

    @property
    def student(self) -> Any:
        """The first learner, without the other modules of the bundle."""
        return self._engine.module.student

    def forward_backward(
        self,
        batch: Batch,
        answers: Mapping[str, Outputs],
        plan: Sequence[Pass],
        counts: Counts,
        *,
        boundary: bool,
    ) -> dict[str, Tensor]:
        """Add the gradient of one micro-batch to that of the step, and return the losses' parts.

        The heads of the frozen teachers, whose outputs stand by name, are kept gathered during the
        student's forward, which computes gradients.
        """
        parts: dict[str, Tensor] = {}
        groups = backward_groups(plan)
        for number, group in enumerate(groups, start=1):
            is_last = boundary and number == len(groups)
            self._gradients.begin(is_last=is_last)
            with memory_efficient_linear(self._engine):
                losses = self._forward(batch, answers, group, counts)
                self._gradients.backward(losses.total, is_last=is_last)
            add_parts(parts, losses.parts)
        return parts

    def _forward(
        self,
        batch: Batch,
        answers: Mapping[str, Outputs],
        plan: Sequence[Pass],
        counts: Counts,
        **options: Any,
    ) -> Losses:
        with ExitStack() as stack:
            for answer in answers.values():
                if answer.head is not None:
                    stack.enter_context(answer.head.open())
            return self._engine(batch, answers, plan, counts, **options)

    def local_shards(self) -> Iterator[Shard]:
        """Yield this rank's part of the first learner's weights and gradients.

        Call it between the last backward of a step and the update: in `Strategy.before_update`.
        """
        return self.optimizer_state.shards(loss_scale=self._gradients.scale)

    @property
    def optimizer_state(self) -> OptimizerState:
        return OptimizerState(self._engine)

    def keep(self, cut: Cut | None) -> None:
        self._engine.module.elastic.keep(cut)

    @property
    def units(self) -> View:
        """The units of the first learner, in a stage with `pruned_to`."""
        return self._engine.module.elastic.prunable

    @property
    def makers(self) -> Mapping[str, Maker]:
        """The matrices that produce units by name, in a stage with `pruned_to`."""
        return self._engine.module.elastic.makers

    def step(self, learning_rate: float) -> Tensor | None:
        """Clip the gradient of the step, and update the weights with this learning rate.

        Return the global norm of the gradient before clipping, a device tensor.
        """
        engine, norm = self._engine, None
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate * group.get(RATE, 1.0)
        # An update may change the scale. At ZeRO 0, DeepSpeed's norm includes the scale.
        scale = 1.0 if engine.zero_optimization() else self._gradients.scale
        if not (engine.zero_optimization() or engine.bfloat16_enabled() or engine.fp16_enabled()):
            # DeepSpeed keeps no norm, but ranks have all gradients.
            gradients = [p.grad for p in self.bundle.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
        try:
            engine.step()
        except Exception as error:  # DeepSpeed raises a plain one
            if "loss scale already at minimum" not in str(error):
                raise
            raise TrainingError(
                f"the gradient of the objective overflows in every step: {OVERFLOWS}"
            ) from error
        norm = engine.get_global_grad_norm() if norm is None else norm
        if norm is not None:  # of a step that overflowed, it is a number
            norm = torch.as_tensor(norm, dtype=torch.float32, device=engine.device) / scale
        self._gradients.forget()
        return norm

    def scaling(self) -> dict[str, float]:
        """Return the scale of the loss under fp16, and the number of steps that overflowed."""
        skipped = float(self._engine.skipped_steps)
        return {"train/loss_scale": self._gradients.scale, "train/skipped_steps": skipped}

    @torch.no_grad()
    def measure(
        self,
        batch: Batch,
        answers: Mapping[str, Outputs],
        plan: Sequence[Pass],
    ) -> Losses:
        """Return the losses and the predictions of one micro-batch, out of one forward.

        It has no dropout and no gradient. The parts are sums over this rank's units.
        """
        counts = dict.fromkeys(
            self._engine.module.counters,
            torch.ones((), dtype=torch.long, device=batch.valid.device),
        )
        with evaluating(self.bundle):
            return self._forward(batch, answers, plan, counts, scored=True)

    @torch.no_grad()
    def predict(self, batch: Batch, view: str | None = None) -> Predictions:
        """Return predictions for one micro-batch without dropout, of a view if `view` is given."""
        with evaluating(self.bundle):
            return self._engine(batch, view=view)

    def files(self) -> dict[str, Any]:
        """Return this rank's part of the engine's state as files; a collective.

        The tensors may be those of the engine, which the next step changes.

        Returns:
            the content of each file by its name, for `torch.save`.
        """
        values, rank = self.optimizer_state, self._engine.global_rank
        facts = {
            "steps": values.steps,
            "skipped_steps": int(self._engine.skipped_steps),
            "loss_scale": {k: v for k, v in self._loss_scale.items() if k in _SCALE},
        }
        averages = {LEARNER + name: part for name, part in self.averages.items()}
        parts = {**values.parts(), AVERAGES: averages}
        return file_of(rank, parts, offsets=values.offsets, facts=facts)

    def load(self, folder: Path) -> None:
        """Read a state that any number of ranks wrote; a collective."""
        values = self.optimizer_state
        # On shared storage, a rank may not see all files.
        stored = raise_on_all(lambda: _stored(folder, values))
        values.load(stored.read, steps=stored.facts["steps"])
        self._engine.skipped_steps = stored.facts["skipped_steps"]
        self._loss_scale.update(stored.facts["loss_scale"])
        self.averages.clear()
        for name in stored.names.get(AVERAGES, ()):
            part = stored.read(AVERAGES, name, values.part_of(name)).to(self._engine.device)
            if len(part):
                self.averages[name.removeprefix(LEARNER)] = part

    @property
    def _loss_scale(self) -> dict[str, Any]:
        # The live values that scale the loss: of ZeRO, or of 16 bits at ZeRO 0.
        optimizer = self._engine.optimizer
        scaler = getattr(optimizer, "loss_scaler", getattr(optimizer, "loss_scale_config", None))
        return {} if scaler is None else vars(scaler)

    def destroy(self) -> None:
        destroy(self._engine)


def _stored(folder: Path, values: OptimizerState) -> StoredParts:
    stored = StoredParts(folder)
    for kind in values.kinds:
        for name, size in values.sizes.items():
            there = stored.size(kind, name)
            if there != size:
                raise CheckpointError(
                    f"{folder} holds {there} of {size} values of {kind} of {name}: files are "
                    "missing, or it was written for another model"
                )
    return stored


def device_batch(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with all tensors on a device, except `rows`."""
    return batch if device.type == "cpu" else _moved(batch, device)  # batches are made there


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Batch | Targets | Documents):
        parts = value._asdict().items()
        return type(value)(*(v if name == "rows" else _moved(v, device) for name, v in parts))
    if isinstance(value, Mapping):
        return {name: _moved(part, device) for name, part in value.items()}
    return copied_to(value, device) if isinstance(value, Tensor) else value


class StepGradients:
    """The backwards of a step: `begin` and `backward` for each, then `forget` after the update.

    DeepSpeed's ZeRO optimizers overwrite a kept gradient when a backward reaches its weight. A
    weight that is not reached, because a loss was left out or a head was not used, would get a
    gradient of an earlier step at ZeRO 3 and with an offloaded optimizer. Only the kept gradients
    of such weights are cleared: to reach every weight, with a loss of 0, would gather every weight
    at ZeRO 3.
    """

    def __init__(self, engine: Any) -> None:
        self._engine, self._is_first = engine, True

    @property
    def scale(self) -> float:
        """The factor of the gradients until the update: that of the loss under fp16, else 1."""
        engine = self._engine
        return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0

    def begin(self, *, is_last: bool) -> None:
        """Prepare a forward and its backward, during which ZeRO 2 reduces gradients."""
        self._engine.set_gradient_accumulation_boundary(is_last and not self._copies_once)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradients of a loss; the last backward completes those of the step."""
        engine = self._engine
        # Without ZeRO, DeepSpeed divides by the scale and does not multiply.
        scaled = loss if engine.zero_optimization() else loss * self.scale
        engine.backward(scaled, scale_wrt_gas=False)
        if is_last and self._copies_once:
            engine.set_gradient_accumulation_boundary(is_boundary=True)
            engine.optimizer.finalize_gradient_accumulation_boundary()
        if self._is_first:
            _clear_missed_sums(engine.optimizer)
        if is_last and engine.zero_cpu_offload():
            _clear_missed_copies(engine.optimizer)
        self._is_first = is_last

    def forget(self) -> None:
        """Let go of gradients that overflowed, to which DeepSpeed would add for ever."""
        kept = getattr(self._engine.optimizer, "averaged_gradients", {})
        kept.update(dict.fromkeys(kept))

    @property
    def _copies_once(self) -> bool:
        # All gradients are copied to an offloaded optimizer after several backwards: at ZeRO 2 and
        # 3, the last backward would copy only gradients of weights that it reaches.
        offloads = self._engine.zero_cpu_offload() and self._engine.zero_optimization_stage() > 1
        return offloads and not self._is_first


def _clear_missed_sums(optimizer: Any) -> None:
    is_zero_3, offset = hasattr(optimizer, "grad_partitions_flat_buffer"), 0
    for weight in chain(*optimizer.fp16_groups) if is_zero_3 else ():
        size = weight.partition_numel()
        if weight.ds_id not in optimizer._offload_boundary_param_ids:  # noqa: SLF001
            optimizer.grad_partitions_flat_buffer.narrow(0, offset, size).zero_()
        offset += size
    for number, kept in getattr(optimizer, "accumulated_grads_in_cpu", {}).items():
        if number not in optimizer._offload_accumulated_param_ids:  # noqa: SLF001
            kept.zero_()


def _clear_missed_copies(optimizer: Any) -> None:
    flats = getattr(optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO 3
    flats = optimizer.single_partition_of_fp32_groups if flats is None else flats
    for number, (group, *_, start, size) in optimizer.grad_position.items():
        if number not in optimizer.norm_for_param_grads:
            flats[group].grad.narrow(0, int(start), int(size)).zero_()
