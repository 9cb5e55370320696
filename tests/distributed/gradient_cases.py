"""A model of a few matrices on gloo ranks; every backward reaches the matrices that it names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from megakd.config.deepspeed import load_ds_config
from megakd.config.train import TrainConfig
from megakd.contract.batch import Losses
from megakd.contract.stage import Pass
from megakd.engine.initialize import training_engine
from megakd.engine.optimizer_state import WEIGHT
from megakd.engine.sharding import gathered, sharded_construction, writes_here
from megakd.engine.student import StudentEngine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RATE, EPSILON, WIDTH = 0.01, 1e-4, 6


class Rows(NamedTuple):
    """Rows of one rank, and the names of the matrices that their loss reads."""

    labels: Tensor
    names: str


class Matrices(nn.Module):
    """Matrices by name; the losses of the named ones are added up."""

    def __init__(self, names: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrices = nn.ModuleDict({name: nn.Linear(WIDTH, 3, dtype=dtype) for name in names})
        for number, linear in enumerate(self.matrices.values()):
            _fill(linear, number)

    def forward(self, batch: Rows, knowledge=None, plan=None, counts=None) -> Losses:
        """Return the sum of the squared outputs of the named matrices."""
        dtype = next(self.parameters()).dtype
        outputs = [self.matrices[name](batch.labels.to(dtype)).float() for name in batch.names]
        return Losses(torch.stack([output.square().mean() for output in outputs]).sum(), {})


def _fill(linear: nn.Linear, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in linear.parameters():
        with gathered([parameter], modify=True), torch.no_grad():
            if writes_here(parameter):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)


def rows(step: int, backward: int, rank: int, names: str, factor: float = 1.0) -> Rows:
    """Return the rows of a rank for one backward."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * backward + rank)
    return Rows(factor * 0.3 * torch.randn(4, WIDTH, generator=generator), names)


def train(preset, dtype: str, steps: list[list[str]], factors: dict[int, float]) -> dict:
    """Take steps, each a list of backwards that name matrices; return what is seen of them.

    factors: factor of the inputs by step; with 1000, gradients overflow in fp16.
    """
    ds = load_ds_config(preset, where="student.deepspeed")
    settings = TrainConfig(learning_rate=RATE, adam_epsilon=EPSILON, max_grad_norm=0.0)
    with _any_precision():
        with sharded_construction(ds, DTYPES[dtype]):
            model = Matrices("abc", DTYPES[dtype])
        engine = training_engine(
            model, ds=ds, train=settings, dtype=dtype, world_size=dist.get_world_size()
        )
        student = StudentEngine(engine)
        facts: dict = {"weights": [_masters(student)], "norms": []}
        for step, backwards in enumerate(steps):
            for number, names in enumerate(backwards):
                batch = rows(step, number, dist.get_rank(), names, factors.get(step, 1.0))
                boundary = number == len(backwards) - 1
                student.forward_backward(batch, {}, [Pass()], {}, boundary=boundary)
            student.step(RATE)
            facts["norms"].append(float(student.gradient_norm()))
            facts["weights"].append(_masters(student))
        student.destroy()
    return facts


@contextmanager
def _any_precision() -> Iterator[None]:
    """Let DeepSpeed use fp16, which it refuses on CPUs without instructions for it."""
    accelerator, known = get_accelerator(), [*DTYPES.values()]
    with (
        patch.object(accelerator, "is_fp16_supported", lambda: True),
        patch.object(accelerator, "supported_dtypes", lambda: known),
    ):
        yield


def _masters(student: StudentEngine) -> dict[str, Tensor]:
    """Return the fp32 weights by name, on rank 0."""
    values = student.optimizer_state.whole()
    return {name: value.clone() for kind, name, value in values if kind == WEIGHT}
