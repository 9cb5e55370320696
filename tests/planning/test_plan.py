"""`megakd plan`: from a run config to numbers, and what to change where they are too large."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from tiny_runs import bert, llama, write_config

from megakd.config.file import load_config
from megakd.config.run import RunConfig
from megakd.errors import ConfigError, ModelError
from megakd.planning.cluster import Cluster, Rates, rates_of
from megakd.planning.engine_memory import PARTS, Peak
from megakd.planning.phase_traces import Traces
from megakd.planning.plan import Plan, page, plan_run

CLASSES = {"type": "classification", "dataset": "anything", "max_length": 16}
CAUSAL = {"type": "causal_lm", "dataset": "anything", "max_length": 16}
MINIDISC = {"name": "minidisc", "target_sparsity": 0.5, "sparsities": [0.25, 0.5], "round_to": 1}


def config_of(tmp_path: Path, *overrides: str, **sections: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "output_dir": str(tmp_path / "out"),
        "task": CLASSES,
        "teacher": {"model": bert(3, width=32, vocab_size=64)},
        "student": {"model": bert(2, width=16, vocab_size=64)},
        "method": {"name": "single"},
        "train": {"per_device_train_batch_size": 4},
    }
    return load_config(write_config(tmp_path / "run.yaml", tree | sections), overrides)


# Of the same few models, made once for all tests here.
TRACES = Traces()


def planned(config: RunConfig, **cluster: Any) -> Plan:
    place = Cluster(**{"device": "cuda", **cluster})
    return plan_run(config, place, advise=False, traces=TRACES)


def advised(config: RunConfig, cluster: Cluster) -> Plan:
    return plan_run(config, cluster, traces=TRACES)


def test_the_json_has_the_keys_of_the_contract(tmp_path: Path) -> None:
    found = json.loads(json.dumps(planned(config_of(tmp_path), ranks=2).as_json()))

    assert found["ranks"] == 2
    assert set(found["roles"]) == {"teacher", "student"}
    assert all(set(parts) == set(PARTS) for parts in found["roles"].values())
    for key in ("peak_bytes_per_rank", "load_peak_bytes_per_rank", "host_base_bytes"):
        assert isinstance(found[key], int)
        assert found[key] > 0
    assert found["seconds_per_step"] is None
    assert found["fits"] is None
    assert found["changes"] == []


def test_nothing_is_started_and_no_weight_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    keys = bert(2, width=16, vocab_size=64)["config"]
    (folder / "config.json").write_text(json.dumps(keys))

    plan = planned(config_of(tmp_path, student={"model": str(folder)}))

    assert plan.peak_bytes_per_rank > 0
    assert not dist.is_initialized()


def test_bytes_are_those_of_the_models(tmp_path: Path) -> None:
    config = config_of(tmp_path, student={"model": bert(2, vocab_size=64), "deepspeed": "zero0"})
    plan = planned(config)
    student = plan.as_json()["roles"]["student"]

    assert student["optimizer"] >= 2 * student["weights"]
    assert student["gradients"] >= student["weights"]


@pytest.mark.parametrize("student", ["zero0", "zero1", "zero2", "zero3", "zero3_offload"])
@pytest.mark.parametrize("teacher", ["teacher_zero0", "teacher_zero3"])
def test_more_ranks_never_need_more_memory(tmp_path: Path, student: str, teacher: str) -> None:
    overrides = (f"student.deepspeed={student}", f"teacher.deepspeed={teacher}")
    config = config_of(tmp_path, *overrides)

    peaks = [planned(config, ranks=ranks).peak_bytes_per_rank for ranks in (2, 4, 8, 64)]

    assert peaks == sorted(peaks, reverse=True)


def test_gradient_checkpointing_and_smaller_batches_need_less(tmp_path: Path) -> None:
    def activations(*overrides: str) -> int:
        plan = planned(config_of(tmp_path, *overrides))
        return plan.as_json()["roles"]["student"]["activations"]

    whole = activations("eval.per_device_eval_batch_size=1")
    less = ("eval.per_device_eval_batch_size=1", "train.gradient_checkpointing=true")

    assert activations(*less) < whole
    assert activations(less[0], "train.per_device_train_batch_size=1") < whole


def test_an_evaluation_that_is_the_peak_is_named_with_its_key(tmp_path: Path) -> None:
    settings = ("eval.per_device_eval_batch_size=999", "student.deepspeed=zero0")
    plan = planned(config_of(tmp_path, *settings))

    assert "eval.per_device_eval_batch_size 999" in plan.as_json()["peak_moment"]
    assert "eval.per_device_eval_batch_size 999" in page(plan)


def test_an_evaluation_needs_no_more_than_training_where_no_batch_is_given(tmp_path: Path) -> None:
    traces = Traces()
    plan_run(config_of(tmp_path), Cluster(device="cuda"), traces=traces)

    (trained,) = (traced for traced in traces.values() if traced.learner)
    evaluation, training = (
        max(moment.live.total for moment in trace.moments)
        for trace in (trained.evaluation, trained.learner[0])
    )
    assert evaluation < training


def test_rates_turn_operations_and_bytes_into_seconds(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    rates = Rates(tflops=1e-3, gbps=1e-3)
    plan = planned(config, ranks=2, rates=rates)
    phase = next(phase for phase in plan.phases if phase.flops)
    sent = sum(phase.network.values())

    assert plan.seconds_per_step == pytest.approx(phase.flops / 1e9 + sent / 1e6)
    assert planned(config, ranks=2, rates=Rates(tflops=1.0)).seconds_per_step is None
    assert planned(config, rates=Rates(tflops=1.0)).seconds_per_step is not None


def test_a_run_with_fine_tuning_needs_no_less_than_the_fine_tuning(tmp_path: Path) -> None:
    large = {"model": bert(3, width=64, vocab_size=64), "finetune": {"max_steps": 2}}
    alone = config_of(
        tmp_path,
        teacher=None,
        student={"model": large["model"]},
        method={"name": "finetune"},
    )
    whole = planned(config_of(tmp_path, teacher=large), device="cpu", ranks=2)
    fine_tuning = planned(alone, device="cpu", ranks=2)

    assert whole.highest.name == "teacher-finetune"
    assert whole.peak_bytes_per_rank == fine_tuning.peak_bytes_per_rank


def test_all_models_are_scored_and_timed_at_the_end(tmp_path: Path) -> None:
    finetuned = {"model": bert(3, width=32, vocab_size=64), "finetune": {"max_steps": 2}}
    config = config_of(tmp_path, "baselines=[alone]", teacher=finetuned)

    plan = planned(config)

    names = [phase.name for phase in plan.phases]
    ends = ["student-scored", "alone-scored", "teacher-scored", "latency"]
    assert names == ["teacher-finetune", "student", "alone", *ends]
    assert all(phase.ledger.peaks["device"].total for phase in plan.phases)


def test_a_run_without_timing_plans_none(tmp_path: Path) -> None:
    config = config_of(tmp_path, "eval.latency=false", teacher={"model": bert(3, width=32)})

    assert "latency" not in [phase.name for phase in planned(config).phases]


def test_a_run_fits_where_its_models_cannot_be_timed_side_by_side(tmp_path: Path) -> None:
    """The run goes on without: a phase that is not required is no peak."""
    finetuned = {"model": bert(3, width=32, vocab_size=64), "finetune": {"max_steps": 2}}
    plan = planned(config_of(tmp_path, teacher=finetuned))
    timing = plan.phases[-1]
    timing.ledger.peaks["device"] = Peak(total=10**15)

    assert not timing.required
    assert plan.peak_bytes_per_rank < 10**15
    assert "latency (optional)" in page(plan)


def test_a_language_model_is_planned_with_its_loss(tmp_path: Path) -> None:
    models = {"teacher": {"model": llama(3, width=32, vocab_size=64)}}
    models["student"] = {"model": llama(2, vocab_size=64)}

    plan = planned(config_of(tmp_path, task=CAUSAL, **models))

    assert plan.as_json()["roles"]["student"]["workspace"] > 0


def test_terms_of_two_sources_are_planned_over_half_of_the_positions_each(tmp_path: Path) -> None:
    models = {"teacher": {"model": llama(3, width=32, vocab_size=64)}}
    models["student"] = {"model": llama(2, vocab_size=64)}
    kl = {"loss": "soft_target_kl"}

    both = [{**kl, "on": "data"}, {**kl, "on": "rollouts"}]
    models["rollout"] = {"max_new_tokens": 8, "prompt_tokens": 4}
    limited, whole = (
        planned(config_of(tmp_path, task=CAUSAL, objective=terms, **models))
        for terms in (both, [kl])
    )

    flops = [next(p.flops for p in plan.phases if p.flops) for plan in (limited, whole)]
    assert flops[0] == pytest.approx(flops[1], rel=1e-3)
    assert limited.as_json()["peak_bytes_per_rank"] >= whole.as_json()["peak_bytes_per_rank"]


def test_minidisc_plans_importance_and_its_trials(tmp_path: Path) -> None:
    student = {"model": "from_teacher"}
    held = {}
    for together in (None, 1):
        method = {**MINIDISC, "passes_per_backward": together}
        plan = planned(config_of(tmp_path, student=student, method=method), ranks=2)
        held[together] = plan.as_json()["roles"]["student"]["elastic"]
        before_scoring = [phase.name for phase in plan.phases[:3]]
        assert before_scoring == ["specification", "trial-1", "trial-2"]

    assert held[None] > held[1] == 0


def test_candidates_that_share_a_backward_hold_less_with_gradient_checkpointing(
    tmp_path: Path,
) -> None:
    student = {"model": "from_teacher"}

    def activations(*overrides: str) -> int:
        plan = planned(config_of(tmp_path, *overrides, student=student, method=MINIDISC))
        student_parts = plan.as_json()["roles"]["student"]
        return student_parts["activations"] + student_parts["elastic"]

    assert activations("train.gradient_checkpointing=true") < activations()


def test_relations_of_queries_and_of_queries_with_keys_are_planned(tmp_path: Path) -> None:
    loss = "objective=[{loss: relation_kl, relation_heads: 2, relations: [query, query_key]}]"

    plan = planned(config_of(tmp_path, loss))

    assert plan.as_json()["roles"]["student"]["workspace"] > 0


@pytest.mark.parametrize("name", ["maxidisc", "direct"])
def test_every_leg_of_the_baselines_is_planned(tmp_path: Path, name: str) -> None:
    method = {**MINIDISC, "name": name}

    plan = planned(config_of(tmp_path, student={"model": "from_teacher"}, method=method))

    assert len([phase for phase in plan.phases if phase.flops]) == (3 if name == "maxidisc" else 1)


def test_a_baseline_of_the_method_is_planned_and_importance_once(tmp_path: Path) -> None:
    student = {"model": "from_teacher"}

    plan = planned(config_of(tmp_path, student=student, method=MINIDISC, baselines=["direct"]))

    names = [phase.name for phase in plan.phases if not phase.name.endswith("-scored")]
    assert names == ["specification", "trial-1", "trial-2", "direct"]


def test_what_fits_says_so_and_what_does_not_names_changes_that_would(tmp_path: Path) -> None:
    wide = ("train.bf16=false", "teacher.dtype=fp32")
    config = config_of(
        tmp_path, "student.deepspeed=zero0", "teacher.deepspeed=teacher_zero0", *wide
    )
    peak = planned(config, ranks=8).peak_bytes_per_rank
    roomy = Cluster(ranks=8, device="cuda", device_memory=2 * peak)
    small = Cluster(ranks=8, device="cuda", device_memory=round(0.95 * peak))

    fitting, not_fitting = advised(config, roomy), advised(config, small)

    assert fitting.fits
    assert not_fitting.fits is False
    assert "The run fits." in page(fitting)
    assert "The run does not fit" in page(not_fitting)
    assert not_fitting.changes
    for change in not_fitting.changes:
        assert change.peak_bytes_per_rank <= 0.95 * small.device_memory  # type: ignore[operator]
        assert " ".join(change.settings) in page(not_fitting)


def test_a_change_that_is_named_really_fits(tmp_path: Path) -> None:
    config = config_of(tmp_path, "student.deepspeed=zero0", "teacher.deepspeed=teacher_zero0")
    peak = planned(config, ranks=8).peak_bytes_per_rank
    cluster = Cluster(ranks=8, device="cuda", device_memory=round(0.98 * peak))
    change = next(
        change
        for change in advised(config, cluster).changes
        if all("--nodes" not in setting for setting in change.settings)
    )
    words = [word for setting in change.settings for word in setting.split()]

    overrides = ["student.deepspeed=zero0", "teacher.deepspeed=teacher_zero0", *words]
    again = advised(config_of(tmp_path, *overrides), cluster)

    assert again.fits
    assert again.peak_bytes_per_rank == change.peak_bytes_per_rank


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "unheard-of"}', "{}"])
def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(content)

    with pytest.raises(ModelError, match=r"^student.model: "):
        planned(config_of(tmp_path, student={"model": str(folder)}))


def test_a_model_without_a_config_is_refused_before_the_network_is_asked(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()

    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        planned(config_of(tmp_path, student={"model": str(tmp_path / "empty")}))


def test_ranks_are_shared_by_the_nodes_alike() -> None:
    with pytest.raises(ConfigError, match="9 ranks cannot be divided equally between 2 nodes"):
        Cluster(ranks=9, nodes=2)


def test_rates_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text('{"tflops": 400, "gbps": 45}')
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"speed": 1}')

    assert rates_of(path) == Rates(tflops=400, gbps=45)
    with pytest.raises(ConfigError, match="must hold a mapping"):
        rates_of(wrong)
    for wrong_rate in (0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="must be a finite number above 0"):
            Rates(tflops=wrong_rate)
