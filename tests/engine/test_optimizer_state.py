"""The values of an optimizer lie where the optimizer reads them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from pretend_cuda import CUDA, moved_to_cuda, pretended_cuda
from torch import nn

from megakd.engine import optimizer_state
from megakd.engine.optimizer_state import OptimizerState


def test_adams_number_of_updates_is_beside_its_weight(monkeypatch):
    """Fused AdamW refuses a number that lies on the CPU when its weight is on a GPU."""
    monkeypatch.setattr(optimizer_state.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(optimizer_state.dist, "get_world_size", lambda: 1)
    with pretended_cuda():
        model = moved_to_cuda(nn.Linear(3, 2))
        adam = torch.optim.AdamW(model.parameters(), fused=True)
        whole = {name: torch.ones(p.shape) for name, p in model.named_parameters()}

        state = OptimizerState(SimpleNamespace(optimizer=adam, module=model))
        state.load(lambda kind, name, wanted: whole[name].flatten()[wanted], steps=3)

    assert {value.device for kept in adam.state.values() for value in kept.values()} == {CUDA}
