"""Cost of a student that is pruned while it trains, by window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import bert, write_config

from megakd.config.file import load_config
from megakd.contract.views import View
from megakd.planning.cluster import Cluster
from megakd.planning.engine_memory import Place, Share, Trained
from megakd.planning.phase_traces import Traces, largest_mask
from megakd.planning.plan import Plan, page, plan_run
from megakd.planning.planning_lab import planned_sources
from megakd.planning.timeline import PhasePlan
from megakd.planning.tracing import Inventory, Parameter, Trace
from megakd.pruning.builder import shape_of_cut, weights_of

VOCABULARY = 512
METHOD = {"name": "homodistil", "target_width": 16, "cuts": 2, "pruning_end": 6}
TRACES = Traces()


def planned(folder: Path, *overrides: str, traces: Traces = TRACES, **cluster: Any) -> Plan:
    tree = {
        "output_dir": str(folder / "out"),
        "task": {"type": "mlm", "dataset": "anything", "max_length": 16},
        "teacher": {"model": bert(3, width=32, vocab_size=VOCABULARY)},
        "student": {"model": "from_teacher", "deepspeed": "zero0"},
        "method": METHOD,
        "train": {"per_device_train_batch_size": 4, "max_steps": 8},
    }
    config = load_config(write_config(folder / "run.yaml", tree), overrides)
    place = Cluster(**{"device": "cuda", **cluster})
    return plan_run(config, place, advise=False, traces=traces)


def windows(plan: Plan) -> list[PhasePlan]:
    return [phase for phase in plan.phases if phase.flops]


def averages(phase: PhasePlan, place: Place = "device") -> int:
    return phase.ledger.most[Share("student", "averages", place)]


def makers_of(width: int, layers: int = 3) -> int:
    """Weights of the embeddings (words, 32 positions, 2 types), and 8 squares in each layer."""
    return (VOCABULARY + 32 + 2) * width + layers * 8 * width**2


def test_every_window_is_planned_from_the_model_that_the_last_window_left(tmp_path):
    result = windows(planned(tmp_path))

    assert [phase.name for phase in result] == ["pruning-1", "pruning-2", "student"]
    sizes = [phase.pruned.parameters for phase in result if phase.pruned]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[1] == sizes[2] < sizes[0]
    peaks = [phase.ledger.peaks["device"].total for phase in result]
    assert peaks == sorted(peaks, reverse=True)
    assert len({*peaks}) == 3


def test_page_and_json_show_the_size_that_a_window_leaves(tmp_path):
    plan = planned(tmp_path)
    source = planned_sources(plan.config)["teacher"]
    goal = View((2,) * 3, (32,) * 3, 16, 8)
    left = weights_of(shape_of_cut(source, goal, "mlm"), plan.config.task)
    parameters = sum(shape.numel() for _, shape, _ in left)

    phases = {phase["name"]: phase for phase in plan.as_json()["phases"]}

    assert phases["student"]["pruned_to"] == {"parameters": parameters, "width": 16}
    assert phases["student-scored"]["pruned_to"] is None
    (line,) = (line for line in page(plan).splitlines() if line.startswith("student "))
    assert line.split()[1:3] == ["16", f"{parameters:,}"]


def test_a_run_without_pruning_has_no_column_of_sizes(tmp_path):
    settings = ("method={name: single}", f"student.model={bert(2, vocab_size=VOCABULARY)}")
    objective = "objective=[{loss: soft_target_kl}]"

    plan = planned(tmp_path, *settings, objective)

    (header,) = (line for line in page(plan).splitlines() if line.startswith("phase"))
    assert header.split()[:2] == ["phase", "peak"]
    assert plan.as_json()["roles"]["student"]["averages"] == 0


@pytest.mark.parametrize(
    ("zero", "score", "kept"), [(0, "magnitude", 0), (2, "sensitivity", 1), (3, "platon", 2)]
)
def test_the_ranks_share_the_averages_of_the_weights_that_produce_units(
    tmp_path, zero, score, kept
):
    settings = (f"student.deepspeed=zero{zero}", f"method.score={score}")
    alone, four = (windows(planned(tmp_path, *settings, ranks=n))[0] for n in (1, 4))

    assert averages(alone) == 4 * kept * makers_of(32)
    whole = kept * makers_of(32)
    # At ZeRO 2 a rank may have more of these weights and fewer of the others.
    assert whole <= averages(four) <= (1.25 if zero == 2 else 1.01) * whole


def test_averages_are_on_the_host_if_the_optimizer_is(tmp_path):
    first = windows(planned(tmp_path, "student.deepspeed=zero2_offload"))[0]
    assert averages(first) == 0
    assert averages(first, "host") == 4 * makers_of(32)


def test_at_zero_2_the_rank_with_most_of_the_weights_counts():
    # Two ranks: the first has 80 elements of weight 0, the second 20 of weight 0 and weight 1.
    engine = Trained(
        zero={"stage": 2},
        role="student",
        inventory=Inventory([Parameter(100), Parameter(60)]),
        itemsize=4,
        cluster=Cluster(ranks=2, device="cuda"),
    )

    def held(*numbers: int) -> int:
        return engine.averages(numbers, 1)[Share("student", "averages")].total

    assert (held(0), held(1), held(0, 1)) == (4 * 80, 4 * 60, 4 * 80)


def test_a_mask_copies_the_output_matrix_and_the_last_window_loses_no_unit(tmp_path):
    traces = Traces()
    one_short_text = ("task.max_length=8", "train.per_device_train_batch_size=1")
    planned(tmp_path, *one_short_text, "train.bf16=false", traces=traces)
    first, second, last = (traced for traced in traces.values() if traced.learner)

    copied = read_in_loss(first.masked[0]) - read_in_loss(first.learner[0])
    assert copied > 4 * VOCABULARY * 31 / 2
    assert second.masked
    assert not last.masked


def read_in_loss(run: Trace) -> int:
    """Return the bytes in use while the first loss, which reads the output matrix, is computed."""
    forward = run.moments[: run.turn]
    return max(m.live.total for m in forward if m.module == "objective.groups.0")


def test_a_mask_has_one_unit_less_of_every_kind_that_shrinks_and_no_prefix():
    units = View((2, 2), (5, 5), 8, 4)

    mask = largest_mask(units, View((2, 2), (3, 5), 6, 2))

    assert mask is not None
    assert mask.view == View((2, 2), (4, 5), 7, 3)
    assert mask.order is not None
    assert mask.order.heads == ((0, 1), (0, 1))
    assert mask.order.neurons == ((1, 2, 3, 4, 0), (0, 1, 2, 3, 4))
    assert mask.order.width == (*range(1, 8), 0)
    assert mask.order.queries == (((1, 2, 3, 0),) * 2,) * 2
    assert largest_mask(units, units) is None


def test_a_window_that_is_continued_writes_whole_moments_and_averages_on_the_host(tmp_path):
    first, second, last = windows(planned(tmp_path))

    for phase in (first, second):
        assert phase.pruned is not None
        peak = phase.ledger.peaks["host"]
        assert peak.when == "writing the state for the next window"
        least = 4 * (3 * phase.pruned.left.numel + phase.pruned.left.of(phase.pruned.makers).numel)
        assert peak.total >= least
    assert last.ledger.peaks["host"].when != "writing the state for the next window"


def test_losses_of_held_out_rows_count_where_an_evaluation_has_more_rows(tmp_path):
    rows = ("eval.per_device_eval_batch_size=64", "method.cuts=1")
    traces = Traces()
    plan = planned(tmp_path, *rows, traces=traces)
    measured = [traced.measured for traced in traces.values() if traced.learner]

    assert all(one is not None and one.answers > 0 for one in measured)
    assert "eval.per_device_eval_batch_size 64" in plan.as_json()["peak_moment"]
