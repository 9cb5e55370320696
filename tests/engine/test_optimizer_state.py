"""The optimizer of an engine: what it learns with, what decays, and cuts of its state."""

from __future__ import annotations

import math
import os
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime import bf16_optimizer
from forked_ranks import start_rank
from hypothesis import given
from hypothesis import strategies as st
from pretend_cuda import CUDA, moved_to_cuda, pretended_cuda
from torch import nn

from megakd.config.sections import TrainConfig
from megakd.engine import optimizer_state
from megakd.engine.initialize import _optimizer, _parameter_groups
from megakd.engine.optimizer_state import OptimizerState, StoredParts, file_of
from megakd.errors import CheckpointError
from megakd.losses.layer_terms import Projections
from megakd.models.second_vocabulary import SecondSize, SecondVocabulary
from megakd.process.seals import write_files
from megakd.training import student
from megakd.training.student import StudentEngine


@pytest.mark.parametrize(
    ("train", "kind"), [({}, torch.optim.AdamW), ({"optim": "sgd"}, torch.optim.SGD)]
)
def test_adamw_learns_unless_sgd_is_asked_for_and_matrices_alone_decay(train, kind):
    groups = _parameter_groups(nn.Linear(3, 2), 0.1, {})

    optimizer = _optimizer(groups, TrainConfig(weight_decay=0.1, **train), offloaded=False)

    assert isinstance(optimizer, kind)
    assert {group.get("momentum", 0) for group in optimizer.param_groups} == {0}
    decay = {p.dim(): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay == {2: 0.1, 1: 0.0}


def test_an_optimizer_in_bf16_does_not_print_the_memory(capsys):
    bf16_optimizer.see_memory_usage("begin", force=True)

    assert capsys.readouterr().out == ""


def test_projections_from_the_identity_and_second_vocabularies_do_not_decay():
    size = SecondSize(pieces=6, offset=9)
    model = nn.ModuleDict(
        {
            "identity": Projections(1, 4, 4, is_identity=True),
            "learned": Projections(1, 3, 4),
            "second": SecondVocabulary(size, 4, torch.float32),
        }
    )

    groups = _parameter_groups(model, 0.1, {})

    result = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    decaying = [name for name, p in model.named_parameters() if result[id(p)]]
    assert decaying == ["learned.0.weight"]


def test_an_engine_starts_without_torchs_inductor_and_leaves_the_compiler_alone(tmp_path):
    # The first import of Muon decides, so a new process has to make it.
    program, log = tmp_path / "program.py", tmp_path / "log.txt"
    program.write_text(
        "import sys, torch\n"
        "from deepspeed.runtime import compiler\n"
        "from megakd.engine.initialize import _import_muon_without_compiling\n"
        "assert 'deepspeed.runtime.zero.muon.original_muon' not in sys.modules\n"
        "_import_muon_without_compiling()\n"
        "assert 'deepspeed.runtime.zero.muon.original_muon' in sys.modules\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules\n"
        "assert compiler.compile() is torch.compile\n"
    )

    process = start_rank([str(program)], variables=os.environ, log=log)
    process.join()

    assert process.exitcode == 0, log.read_text()


SIZE = 23


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


@pytest.mark.parametrize("norm", [math.inf, torch.tensor(2.0)])
def test_every_norm_is_on_the_device_of_the_engine_also_of_a_step_that_overflows(norm):
    """Norms of many steps are read as one tensor. DeepSpeed gives a number for an overflow."""
    engine: Any = SimpleNamespace(
        device=torch.device("meta"),
        optimizer=SimpleNamespace(param_groups=[]),
        zero_optimization=lambda: True,
        get_global_grad_norm=lambda: norm,
        train=lambda: None,
        step=lambda: None,
    )

    kept = StudentEngine(engine).step(1e-3)

    assert kept is not None
    assert (kept.device, kept.dtype) == (engine.device, torch.float32)


def write(folder: Path, cuts: list[int]) -> torch.Tensor:
    """Write the parts of a value between some places, a rank each; return the whole."""
    whole, ends = torch.arange(float(SIZE)), [0, *sorted(cuts), SIZE]
    for rank, (first, last) in enumerate(pairwise(ends)):
        parts = {"weight": {"w": whole[first:last]} if last > first else {}}
        write_files(folder, file_of(rank, parts, offsets={"w": first}, facts={"steps": 3}))
    return whole


@given(st.lists(st.integers(0, SIZE), max_size=5), st.integers(0, SIZE), st.integers(0, SIZE))
def test_every_slice_is_read_from_whichever_ranks_have_it(tmp_path_factory, cuts, one, other):
    folder = tmp_path_factory.mktemp("parts")
    whole, wanted = write(folder, cuts), slice(*sorted((one, other)))

    stored = StoredParts(folder)

    assert torch.equal(stored.read("weight", "w", wanted), whole[wanted])
    assert stored.size("weight", "w") == SIZE
    assert (stored.names, stored.facts) == ({"weight": ["w"]}, {"steps": 3})


def test_a_part_that_is_not_there_is_an_error_before_anything_is_set(tmp_path, monkeypatch):
    monkeypatch.setattr(student, "raise_on_all", lambda read: read())
    write(tmp_path, [9])
    model = torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.zeros(SIZE))})
    optimizer: Any = torch.optim.SGD(model.parameters())
    engine: Any = SimpleNamespace(optimizer=optimizer, module=model, train=model.train)

    (tmp_path / "engine-1.pt").unlink()
    with pytest.raises(
        CheckpointError, match=r"holds 9 of 23 values of weight of w: files are mis"
    ):
        StudentEngine(engine).load(tmp_path)

    assert not model["w"].any()
    (tmp_path / "engine-0.pt").unlink()
    with pytest.raises(CheckpointError, match="has no engine-<rank>"):
        StudentEngine(engine).load(tmp_path)
