"""Mixtures of experts at ZeRO 3 whose ranks use different experts."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from equal_runs import ZERO3
from torch import Tensor, nn

from megakd.engine.initialize import frozen_engine
from megakd.engine.memory import destroy


class Mixture(nn.Module):
    """A block whose experts are modules; a token's expert is its first number."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        said = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            mine = tokens[:, 0] == number
            if mine.any():
                said[mine] = expert(tokens[mine])
        return said


def farthest_from_whole() -> float:
    """The largest error of a sharded block, each rank using the expert of its own number."""
    torch.manual_seed(0)
    whole = Mixture()
    sharded = nn.Sequential(copy.deepcopy(whole))
    tokens = torch.rand(3, 4)
    tokens[:, 0] = dist.get_rank()
    engine = frozen_engine(sharded, ds=ZERO3, dtype="fp32", rows=3)
    with torch.no_grad():
        error = max((engine(tokens) - whole(tokens)).abs().max().item() for _ in range(3))
    destroy(engine)
    return error
