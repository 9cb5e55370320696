"""The lab of a run and the lab of a plan offer what the contract promises to methods."""

from __future__ import annotations

import inspect

import pytest

from megakd.contract.lab import Lab as Contract
from megakd.planning.lab import PlanningLab
from megakd.run.lab import Lab
from megakd.training.lab_base import LabBase

METHODS = {
    name: member
    for name, member in vars(Contract).items()
    if not name.startswith("_") and inspect.isfunction(member)
}
PROPERTIES = [name for name, member in vars(Contract).items() if isinstance(member, property)]


def parameters(function) -> list[tuple[str, object, object]]:
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in found]


@pytest.mark.parametrize("lab", [Lab, PlanningLab])
@pytest.mark.parametrize("name", METHODS)
def test_a_lab_takes_the_arguments_that_the_contract_names(lab, name):
    assert parameters(getattr(lab, name)) == parameters(METHODS[name])


@pytest.mark.parametrize("lab", [Lab, PlanningLab])
def test_a_lab_has_the_properties_of_the_contract(lab):
    assert [name for name in PROPERTIES if not isinstance(getattr(lab, name, None), property)] == []


@pytest.mark.parametrize("lab", [Lab, PlanningLab])
def test_a_lab_sets_the_attributes_of_the_contract_when_it_is_made(lab):
    source = inspect.getsource(LabBase.__init__)

    assert issubclass(lab, LabBase)
    assert "super().__init__(" in inspect.getsource(lab.__init__)
    assert [name for name in Contract.__annotations__ if f"self.{name}" not in source] == []
