"""Cost of several teachers, before any teacher is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from planned_runs import CAUSAL, config_of, plan_of, sent, trained
from tiny_runs import bert, llama

from megakd.planning.memory import Share
from megakd.planning.plan import Plan

TEACHER = {"model": bert(3, width=32, vocab_size=64)}


def planned(folder: Path, names: str, method: dict[str, Any], **keys: Any) -> Plan:
    pool = [{**TEACHER, **keys, "name": name} for name in names]
    student = {"model": bert(2, width=16, vocab_size=64)}
    return plan_of(config_of(folder, teachers=pool, student=student, method=method))


def teachers(plan: Plan) -> dict[str, int]:
    return plan.as_json()["roles"]["teacher"]


def test_idle_teachers_cost_their_weights_and_nothing_else(tmp_path):
    one = planned(tmp_path, "a", {"name": "skdbert"})
    five = planned(tmp_path, "abcde", {"name": "skdbert"})

    assert teachers(five)["weights"] == 5 * teachers(one)["weights"]
    others = {part: size for part, size in teachers(one).items() if part != "weights"}
    assert {part: teachers(five)[part] for part in others} == others
    more = five.peak_bytes_per_rank - one.peak_bytes_per_rank
    assert more == 4 * teachers(one)["weights"]


def test_of_offloaded_teachers_that_are_drawn_one_at_a_time_is_on_the_device(tmp_path):
    away = {"deepspeed": "teacher_zero3_offload"}
    here = planned(tmp_path, "a", {"name": "skdbert"})
    alone = planned(tmp_path, "a", {"name": "skdbert"}, **away)
    drawn = planned(tmp_path, "abcde", {"name": "skdbert"}, **away)
    all_asked = planned(tmp_path, "abcde", {"name": "mean_of_teachers"}, **away)

    assert teachers(drawn)["weights"] == teachers(here)["weights"]
    assert teachers(alone)["weights"] == teachers(all_asked)["weights"] == 0


def test_a_step_with_a_drawn_teacher_costs_that_of_one_and_the_mean_that_of_all(tmp_path):
    one = trained(planned(tmp_path, "a", {"name": "skdbert"}))
    drawn = trained(planned(tmp_path, "abc", {"name": "skdbert"}))
    mean = trained(planned(tmp_path, "abc", {"name": "mean_of_teachers"}))

    assert drawn.flops == pytest.approx(one.flops)
    assert sent(drawn, "teacher") == pytest.approx(sent(one, "teacher"))
    assert sent(mean, "teacher") == pytest.approx(3 * sent(one, "teacher"))
    assert mean.flops > 1.5 * one.flops


@pytest.mark.parametrize(
    ("names", "method", "phases"),
    [
        (
            "ab",
            {"name": "skdbert", "distribution": "student_rank"},
            ["pilot-a", "pilot-b", "student"],
        ),
        (
            "ab",
            {"name": "skdbert", "distribution": "teacher_rank"},
            ["a-scored", "b-scored", "student"],
        ),
    ],
)
def test_what_comes_before_the_student_is_planned_too(tmp_path, names, method, phases):
    plan = planned(tmp_path, names, method)
    assert [phase.name for phase in plan.phases if phase.name in phases][:3] == phases


def test_a_teacher_whose_answers_are_on_disk_takes_no_memory_and_no_time(tmp_path):
    answers = str(tmp_path / "answers")
    whole = trained(planned(tmp_path, "a", {"name": "skdbert"}))
    cached = trained(planned(tmp_path, "a", {"name": "skdbert"}, cache=answers))

    weights = Share("teacher", "weights", "device")
    assert whole.most[weights] > 0
    assert weights not in cached.most
    assert cached.flops < whole.flops
    assert sent(cached, "teacher") == 0


@pytest.mark.parametrize("measures_losses", [False, True])
def test_a_teacher_fills_the_cache_once_and_stays_loaded_where_losses_are_measured(
    tmp_path, measures_losses
):
    method = {"name": "shrink", "flops": 0.3, "round_to": 8}
    teacher, student = {**TEACHER, "cache": "auto"}, {"model": "from_teacher"}
    losses = {"losses": measures_losses}
    plan = plan_of(
        config_of(tmp_path, teacher=teacher, student=student, method=method, eval=losses)
    )

    weights = Share("teacher", "weights", "device")
    held = {phase.name: phase.most.get(weights, 0) > 0 for phase in plan.phases}
    assert (held["teacher-answers"], held["student"]) == (True, measures_losses)
    assert [*held].index("teacher-answers") == [*held].index("student") - 1


@pytest.mark.parametrize(
    ("rows", "losses"),
    [({}, ["soft_target_kl", "hidden_mse"]), ({"tokens_per_rank": 128}, ["soft_target_kl"])],
)
def test_teachers_that_share_the_rows_cost_a_step_of_one(tmp_path, rows, losses):
    model = llama(2, width=16, vocab_size=500)

    def step(names: str, method: str, **keys: Any) -> Plan:
        config = config_of(
            tmp_path,
            task={**CAUSAL, "max_length": 32, **keys},
            teachers=[{"model": model, "name": name} for name in names],
            student={"model": model},
            method={"name": method},
            objective=[{"loss": loss} for loss in losses],
            train={"per_device_train_batch_size": 4, **rows},
        )
        return plan_of(config)

    one = step("a", "mean_of_teachers")
    two = step("ab", "routed", teacher_column="expert")
    mean = step("ab", "mean_of_teachers")

    assert trained(two).flops == pytest.approx(trained(one).flops, rel=0.05)
    assert trained(mean).flops > 1.3 * trained(one).flops
    assert one.peak_bytes_per_rank < two.peak_bytes_per_rank < mean.peak_bytes_per_rank
