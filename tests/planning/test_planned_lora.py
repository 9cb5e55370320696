"""A plan counts gradients and optimizer states of the adapters alone, and all weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from planned_runs import CAUSAL, config_of, plan_of
from tiny_runs import llama

from megakd.planning.cluster import Cluster
from megakd.planning.engine_memory import Holding, Part, Share, Trained
from megakd.planning.plan import Plan, SizedCase, candidates
from megakd.planning.tracing import Inventory, Parameter

WIDTH, VOCABULARY, LAYERS, RANK = 32, 96, 2, 2
# Llama: queries, output [W, W]; keys, values [W / 2, W]; three matrices of an MLP [2 W, W].
ADAPTERS = LAYERS * RANK * (2 * 2 * WIDTH + 2 * (WIDTH + WIDTH // 2) + 3 * 3 * WIDTH)
FROZEN, LEARNED, RANKS = 4000, 48, 4


def planned(tmp_path: Path, student: dict[str, Any], **sections: Any) -> Plan:
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    shape = llama(LAYERS, WIDTH, vocab_size=VOCABULARY)["config"]
    (model / "config.json").write_text(json.dumps(shape))
    given = {"student": {"model": str(model), **student}, "method": {"name": "finetune"}}
    train = {"per_device_train_batch_size": 1, "bf16": False}
    config = config_of(tmp_path, task=CAUSAL, train=train, **{**given, **sections})
    return plan_of(config, ranks=1)


def parts(tmp_path: Path, student: dict[str, Any]) -> dict[str, int]:
    return planned(tmp_path, student).as_json()["roles"]["student"]


def test_a_plan_has_moments_of_the_adapters_alone_and_the_weights_of_all(tmp_path: Path) -> None:
    whole = parts(tmp_path, {"deepspeed": "zero0"})
    result = parts(tmp_path, {"deepspeed": "zero0", "lora": {"r": RANK}})
    assert result["optimizer"] == 2 * 4 * ADAPTERS
    assert result["weights"] == whole["weights"] + 4 * ADAPTERS
    assert result["gradients"] < whole["gradients"] / 3


def test_a_plan_of_the_base_as_teacher_has_its_forward_and_no_second_model(tmp_path: Path) -> None:
    lora, objective = {"lora": {"r": RANK}}, [{"loss": "soft_target_kl"}]
    teachers = {"base": "student_base", "second": str(tmp_path / "model")}
    method = {"name": "single"}
    plans = {
        name: planned(tmp_path, lora, teacher={"model": model}, method=method, objective=objective)
        for name, model in teachers.items()
    }

    trained = {name: next(p for p in plan.phases if p.flops) for name, plan in plans.items()}

    held = {name: phase.ledger.most[Share("teacher", "weights")] for name, phase in trained.items()}
    assert held["base"] == 0
    assert held["second"] > 0
    assert trained["base"].flops == pytest.approx(trained["second"].flops, rel=0.01)


def test_what_a_base_takes_from_its_student_is_no_change_that_saves_memory(tmp_path: Path) -> None:
    sections = {"teacher": {"model": "student_base"}, "objective": [{"loss": "soft_target_kl"}]}
    whole = planned(tmp_path, {"lora": {"r": RANK}}, method={"name": "single"}, **sections)
    case = SizedCase(whole.config, Cluster(ranks=2, device="cuda"))

    settings = [" ".join(other.settings) for other in candidates(case)]

    assert any("student." in one for one in settings)
    assert not any("teacher." in one for one in settings)


def held(holding: Holding, part: Part) -> int:
    return sum(amount.total for share, amount in holding.items() if share == Share("student", part))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_frozen_weights_take_their_bytes_once_at_every_zero_stage(stage, itemsize):
    def resting(*parameters: Parameter) -> Holding:
        engine = Trained(
            role="student",
            inventory=Inventory(parameters),
            zero={"stage": stage, "reduce_bucket_size": 1},
            itemsize=itemsize,
            cluster=Cluster(ranks=RANKS, device="cuda"),
        )
        return engine.resting()

    learned = Parameter(LEARNED)
    frozen = Parameter(FROZEN, learns=False)
    alone, both = resting(learned), resting(frozen, learned)

    for part in ("optimizer", "gradients"):
        assert held(both, part) == held(alone, part)
    share = FROZEN // RANKS if stage == 3 else FROZEN
    assert held(both, "weights") - held(alone, "weights") == itemsize * share
