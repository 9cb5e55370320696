"""Evaluations on one and two ranks: one forward of each model, and the same scores."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from cases import lab_of
from equal_runs import ZERO3, write_llama
from slow_cases import slow
from tiny_runs import run_in
from transformers import LlamaModel

from megakd.data.batch import Pass
from megakd.methods.minidisc import Sandwich
from megakd.models.views import View
from megakd.stage import WHOLE, Metric, MetricJudge, Stage
from megakd.training.evaluation import HeldOutLosses
from megakd.training.lab import with_defaults
from megakd.training.stage_run import StageRun, run_stage

VIEWS = {"wide": View((2, 2), (12, 12)), "slim": View((1, 1), (8, 8)), "thin": View((1, 1), (4, 4))}
METRIC = Metric(name="perplexity", parts=("perplexity",), higher_is_better=False)


def evaluated(config_path: str, overrides: list[str], kind: str) -> dict[str, Any]:
    """Run a `trial` or a `plain` stage of one step; return its forwards, and its scores twice.

    Forwards are counted by model and number of rows. The scores are those of the stage, and those
    of a forward for the predictions and another for the losses.
    """
    views = VIEWS if kind == "trial" else {}
    with lab_of(config_path, overrides, writes=True) as lab:
        teacher = lab.teacher()
        strategy = Sandwich(teacher, tuple(views) or (None,), 3)  # type: ignore[arg-type]
        stage = Stage(
            name="trial",
            teachers=(teacher,),
            start=lab.model(teacher),
            objective=lab.config.objective,
            strategy=strategy,
            views=views,
            judge=MetricJudge(METRIC, next(iter(views), WHOLE)),
        )
        stage = with_defaults(stage, lab.config)
        frozen = lab.work.pool.open(teacher, stage)
        forwards, runs = Counter[tuple[str, int]](), list[Any]()
        forward, close = LlamaModel.forward, StageRun.close

        def counted(model: Any, *given: Any, **named: Any) -> Any:
            name = "teacher" if model is frozen.model.model else "student"
            forwards[name, len(named["input_ids"])] += 1
            return forward(model, *given, **named)

        # The engine stays open.
        open_run = mock.patch.object(StageRun, "close", autospec=True, side_effect=runs.append)
        with mock.patch.object(LlamaModel, "forward", counted), open_run:
            result = run_stage(
                stage,
                lab.work.assembly,
                teachers={teacher: frozen},
                reporter=lab.work._reporter,
                checkpoint=None,
            )
        (run,) = runs
        scores = result.scores or {WHOLE: result.metrics}
        rows = lab.work.assembly.prepared.encoded.validation
        facts = {
            "batches": sum(1 for _ in run.scorer.batches(rows)),
            "forwards": dict(forwards),
            "scores": {view: dict(values) for view, values in scores.items()},
            "apart": {view: _apart(run, strategy.passes(1), view) for view in scores},
        }
        close(run)
        frozen.destroy()
    return facts


def _apart(run: StageRun, plan: tuple[Pass, ...], view: str) -> dict[str, float]:
    rows = run.assembly.prepared.encoded.validation
    name = None if view == WHOLE else view
    scores = run.scorer.score(functools.partial(run.student.predict, view=name), rows)
    if name is not None:
        return scores
    losses = HeldOutLosses(run.trainer, run.bundle, plan)
    for batch in run.scorer.batches(rows):
        losses.add(batch)
    return scores | losses.means()


ROWS = 5
"""Rows of an evaluation's micro-batch; a training step has others."""
PRESETS = {2: ("zero2", "teacher_zero0"), 3: (ZERO3, "teacher_zero3")}
TERMS = ("hard_cross_entropy", "soft_target_kl", "hidden_mse")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_llama(tmp_path_factory.mktemp("evaluation"), 2, intermediate_size=16)


def config_of(folder: Path, out: Path, *, zero: int) -> Path:
    student, teacher = PRESETS[zero]
    return run_in(
        out,
        {"type": "causal_lm", "dataset": str(folder / "text.txt")},
        teacher={"model": str(folder / "llama"), "deepspeed": teacher},
        student={"model": "from_teacher", "deepspeed": student},
        method={"name": "minidisc"},
        objective=[{"loss": term} for term in TERMS],
        train={"per_device_train_batch_size": 3, "max_steps": 1},
        eval={"per_device_eval_batch_size": ROWS},
    )


@pytest.mark.parametrize(("ranks", "zero"), [(2, 3), *slow((1, 2), (2, 2))])
def test_an_evaluation_of_a_trial_runs_each_candidate_once_and_asks_no_teacher(
    workers, folder, tmp_path, ranks, zero
):
    config = config_of(folder, tmp_path, zero=zero)

    for one in workers(ranks).run("test_evaluation_forwards.evaluated", str(config), [], "trial"):
        turns = one["batches"]  # after the last step
        assert ("teacher", ROWS) not in one["forwards"]
        assert one["forwards"]["student", ROWS] == 3 * turns
        for view, scores in one["scores"].items():
            assert scores == pytest.approx(one["apart"][view], rel=1e-6), view


@pytest.mark.parametrize("ranks", [*slow(1), 2])
def test_losses_on_held_out_rows_take_no_second_forward(workers, folder, tmp_path, ranks):
    config = config_of(folder, tmp_path, zero=2)

    for losses in (False, True):
        overrides = [f"eval.losses={str(losses).lower()}", f"output_dir={tmp_path / str(losses)}"]
        for one in workers(ranks).run(
            "test_evaluation_forwards.evaluated", str(config), overrides, "plain"
        ):
            turns = one["batches"]
            (scores,), (apart,) = one["scores"].values(), one["apart"].values()
            assert one["forwards"].get(("teacher", ROWS), 0) == losses * 2 * turns
            assert one["forwards"]["student", ROWS] == (1 + losses) * turns
            assert set(TERMS) <= scores.keys() if losses else not set(TERMS) & scores.keys()
            assert scores == pytest.approx({n: apart[n] for n in scores}, rel=1e-6)
