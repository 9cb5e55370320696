"""The engine that learns: one forward and one backward per micro-batch, one step per step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megakd.contract.batch import Batch, Counts, Knowledge, Losses, Predictions
from megakd.contract.stage import Pass, backward_groups
from megakd.engine.distributed import together
from megakd.engine.initialize import Engine
from megakd.engine.sharding import gathered_state
from megakd.engine.shards import Shard, local_shards
from megakd.errors import CheckpointError
from megakd.storage.tensors import write_tensors


class StudentEngine:
    """A DeepSpeed training engine around a bundle, at any ZeRO stage.

    passes_per_backward: how many passes of a plan keep their activations at a time; None: all.
    """

    def __init__(self, engine: Engine, *, passes_per_backward: int | None = None) -> None:
        self._engine = engine
        self._passes_per_backward = passes_per_backward
        self._norm: Tensor | None = None

    @property
    def bundle(self) -> nn.Module:
        """The module the engine owns."""
        return self._engine.module

    @property
    def student(self) -> Any:
        """The model that learns, without what is beside it in the bundle."""
        return self._engine.module.student

    def forward_backward(
        self,
        batch: Batch,
        knowledge: Mapping[str, Knowledge],
        plan: Sequence[Pass],
        counts: Counts,
        *,
        boundary: bool,
    ) -> Losses:
        """Adds one micro-batch to the step's gradient.

        Args:
            batch: one micro-batch.
            knowledge: what each planned teacher said of it; their heads are held open while
                the student's forward forms its gradients.
            plan: the passes of the step.
            counts: global unit counts of the step.
            boundary: whether this is the step's last micro-batch.
        """
        self._engine.train()
        total, parts = torch.zeros((), device=batch.labels.device), dict[str, Tensor]()
        groups = backward_groups(plan, self._passes_per_backward)
        for number, group in enumerate(groups, start=1):
            # Before the forward: ZeRO 2 reduces during the backward and must know.
            self._engine.set_gradient_accumulation_boundary(boundary and number == len(groups))
            losses = self._forward(batch, knowledge, group, counts)
            self._engine.backward(losses.total, scale_wrt_gas=False)
            total = total + losses.total.detach()
            for name, value in losses.parts.items():
                parts[name] = parts[name] + value if name in parts else value
        return Losses(total, parts)

    def _forward(
        self,
        batch: Batch,
        knowledge: Mapping[str, Knowledge],
        plan: Sequence[Pass],
        counts: Counts,
    ) -> Losses:
        with ExitStack() as stack:
            for said in knowledge.values():
                if said.head is not None:
                    stack.enter_context(said.head.open())
            return self._engine(batch, knowledge, plan, counts)

    def local_shards(self) -> Iterator[Shard]:
        """Yield this rank's part of the first learner's weights and gradients.

        Between the last backward of a step and the update, as in `Strategy.before_update`.
        """
        scale = self._engine.optimizer.loss_scale if self._engine.fp16_enabled() else 1.0
        return local_shards(self.student, loss_scale=float(scale))

    def step(self, learning_rate: float) -> None:
        """Applies the gradient of the step, clipped, at this learning rate."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._norm = self._whole_gradient_norm()
        self._engine.step()

    def gradient_norm(self) -> Tensor | None:
        """Global norm before clipping, of the last step; a device tensor."""
        norm = self._norm
        if norm is None:
            norm = self._engine.get_global_grad_norm()
        return None if norm is None else torch.as_tensor(norm)

    def _whole_gradient_norm(self) -> Tensor | None:
        """At ZeRO 0 DeepSpeed keeps no norm, but every rank has the whole gradient."""
        if self._engine.zero_optimization() or self._engine.bfloat16_enabled():
            return None
        if self._engine.fp16_enabled():
            return None
        gradients = [p.grad for p in self.bundle.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    @torch.no_grad()
    def predict(self, batch: Batch, view: str | None = None) -> Predictions:
        """Outputs of one micro-batch, without dropout; of a view where one is named."""
        self._engine.eval()
        with self._engine.module.opened_head(batch):
            return self._engine(batch, view=view)

    def student_state(self) -> Iterator[tuple[str, Tensor]]:
        """The student's weights, one at a time, on the CPU of rank 0; projections left out."""
        return gathered_state(self.student)

    def save(self, folder: Path, tag: str) -> None:
        """Writes the engine's shards into folder/tag; a collective.

        Raises:
            OSError: on every rank alike, if a write failed on any.
        """
        engine = self._engine
        writer, copy_scripts = engine.checkpoint_engine, engine._copy_recovery_script  # noqa: SLF001
        careful = CarefulWriter(writer)
        engine.checkpoint_engine = careful
        # Rank 0 alone copies two scripts: on a full disk it would leave the others waiting.
        engine._copy_recovery_script = lambda _: None  # noqa: SLF001
        try:
            engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
        finally:
            engine.checkpoint_engine = writer
            engine._copy_recovery_script = copy_scripts  # noqa: SLF001
        together(careful.raise_failure)

    def load(self, folder: Path, tag: str) -> None:
        """Reads what `save` wrote; a collective.

        Raises:
            CheckpointError: DeepSpeed found nothing it could read.
        """
        path, _ = self._engine.load_checkpoint(str(folder), tag=tag)
        if path is None:  # DeepSpeed only warns, and the run would go on with new weights
            raise CheckpointError(f"DeepSpeed cannot read its checkpoint in {folder / tag}")

    def destroy(self) -> None:
        """Frees the engine's memory and hooks."""
        self._engine.destroy()


class CarefulWriter:
    """DeepSpeed's checkpoint writer, except that a failed write waits to be raised.

    Raised at once, on one rank, it would leave the others in DeepSpeed's barriers.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def save(self, state_dict: Any, path: str) -> None:
        """Writes one file, or keeps the reason why not."""
        try:
            write_tensors(Path(path), state_dict)
        except OSError as error:
            self._failure = error

    def raise_failure(self) -> None:
        """Raises the last failed write, if there was one."""
        if self._failure is not None:
            raise self._failure


def device_batch(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with all its tensors on a device, except the numbers of its rows."""
    return _moved(batch._replace(rows=None), device)._replace(rows=batch.rows)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Batch):
        return Batch(*(_moved(part, device) for part in value))
    if isinstance(value, Mapping):
        return {name: _moved(part, device) for name, part in value.items()}
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
