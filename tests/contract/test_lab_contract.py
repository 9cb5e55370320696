"""The lab of a run and the lab of a plan offer what the contract promises to methods."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from megakd.contract import lab as contract
from megakd.planning.planning_lab import PlanningLab
from megakd.pruning.builder import ModelPruning
from megakd.run.run_lab import RunLab
from megakd.training.recipes import LabBase


def parameters(function: Any) -> list[tuple[str, object, object]]:
    result = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in result]


@pytest.mark.parametrize(
    ("kind", "promised"),
    [
        *((kind, contract.Lab) for kind in (RunLab, PlanningLab)),
        *((kind, contract.Pruning) for kind in (ModelPruning, PlanningLab)),
    ],
)
def test_a_lab_takes_the_arguments_that_the_contract_names(kind, promised):
    methods = {n: m for n, m in vars(promised).items() if n[0] != "_" and inspect.isfunction(m)}

    for name, method in methods.items():
        assert parameters(getattr(kind, name)) == parameters(method), name


@pytest.mark.parametrize("lab", [RunLab, PlanningLab])
def test_a_lab_sets_the_attributes_of_the_contract_when_it_is_made(lab):
    base, source = (inspect.getsource(made.__init__) for made in (LabBase, lab))

    assert issubclass(lab, LabBase)
    assert "super().__init__(" in source
    assert [n for n in contract.Lab.__annotations__ if f"self.{n}" not in base] == []
