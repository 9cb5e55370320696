"""The optimizer of an engine, and the weights that decay."""

from __future__ import annotations

import os

import pytest
import torch
from deepspeed.runtime import bf16_optimizer
from forked_ranks import start_rank
from torch import nn

from megakd.config.train import TrainConfig
from megakd.engine.initialize import RATE, _offloads_optimizer, _optimizer, _parameter_groups
from megakd.losses.layer_terms import Projections
from megakd.models.second_vocabulary import SecondSize, SecondVocabulary


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


def test_a_part_of_the_model_has_a_learning_rate_of_its_own():
    model = nn.ModuleDict({"slow": nn.Linear(3, 2), "fast": nn.Linear(3, 2)})

    groups = _parameter_groups(model, 0.1, {"slow.": 0.25})

    one = {id(p): (g[RATE], g["weight_decay"]) for g in groups for p in g["params"]}
    assert {name: one[id(p)] for name, p in model.named_parameters()} == {
        "slow.weight": (0.25, 0.1),
        "slow.bias": (0.25, 0.0),
        "fast.weight": (1.0, 0.1),
        "fast.bias": (1.0, 0.0),
    }


def test_an_optimizer_in_bf16_does_not_print_the_memory(capsys):
    bf16_optimizer.see_memory_usage("begin", force=True)

    assert capsys.readouterr().out == ""


def test_projections_from_the_identity_and_second_vocabularies_do_not_decay():
    size = SecondSize(pieces=6, offset=9, width=2)
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


def test_an_optimizer_is_offloaded_if_it_has_a_target():
    targets = (None, {}, {"device": "none"}, {"device": "cpu"})
    given = [{"zero_optimization": {"offload_optimizer": target}} for target in targets]

    offloaded = [_offloads_optimizer(ds) for ds in (*given, {"zero_optimization": None}, {})]

    assert offloaded == [False, False, False, True, False, False]


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
