"""Why gradients are sent during the backward at ZeRO 3, and never at ZeRO 1."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from cases import sgd_engine
from torch import Tensor, nn

from megakd.engine.memory import destroy
from megakd.engine.sharding import gathered_state


class Pair(nn.Module):
    """Two matrices of which the second can be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(4, 4, bias=False) for _ in range(2))

    def forward(self, inputs: Tensor, *, both: bool) -> Tensor:
        answer = self.first(inputs)
        return (answer + self.second(inputs)).sum() if both else answer.sum()


def update(**zero: object) -> dict[str, float]:
    """The change of each matrix in a step of SGD; the mean over ranks is 2 · 1.5 and 1.5."""
    torch.manual_seed(0)
    pair = Pair()
    before = {name: weight.clone() for name, weight in gathered_state(pair)}
    engine = sgd_engine(pair, 1.0, reduce_bucket_size=1000, **zero)
    inputs = torch.full((1, 4), float(dist.get_rank() + 1))
    for is_last in (False, True):
        engine.set_gradient_accumulation_boundary(is_last)
        engine.backward(engine(inputs, both=not is_last), scale_wrt_gas=False)
    engine.step()
    after = dict(gathered_state(pair))
    destroy(engine)
    if dist.get_rank() > 0:  # rank 0 has read the weights
        return {}
    return {name: float((before[name] - after[name]).mean()) for name in before}


# The reason to refuse `overlap_comm` at stage 1; once the second case fails, the refusal can go.
@pytest.mark.parametrize(("stage", "is_mean"), [(3, True), (1, False)])
def test_a_weight_that_the_last_backward_does_not_reach_gets_the_mean_gradient(
    workers, stage, is_mean
):
    change = workers(2).run("test_overlap.update", stage=stage, overlap_comm=True)[0]

    assert change["first.weight"] == pytest.approx(3.0)
    assert (change["second.weight"] == pytest.approx(1.5)) is is_mean
