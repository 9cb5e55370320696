"""Evaluations on gloo ranks: stages whose forwards are counted."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

from cases import lab_of

from megakd.contract.metric import WHOLE, Metric, MetricJudge
from megakd.contract.stage import Pass, Stage
from megakd.contract.views import View
from megakd.methods.minidisc import Sandwich
from megakd.training.recipes import completed
from megakd.training.stage_evaluation import HeldOutLosses
from megakd.training.stage_run import StageRun

VIEWS = {"wide": View((2, 2), (12, 12)), "slim": View((1, 1), (8, 8)), "thin": View((1, 1), (4, 4))}
METRIC = Metric(name="perplexity", parts=("perplexity",), higher_is_better=False)


def evaluated(config_path: str, overrides: list[str], kind: str) -> dict[str, Any]:
    """Run a `trial` or a `plain` stage of one step; return its forwards, and its scores twice.

    Forwards are counted by model and number of rows. The scores are those of the stage, and those
    of a forward for the predictions and another for the losses, view by view.
    """
    views = VIEWS if kind == "trial" else {}
    with lab_of(config_path, overrides, writes=True) as lab:
        teacher = lab.teacher()
        strategy = Sandwich(teacher, tuple(views) or (None,))  # type: ignore[arg-type]
        stage = Stage(
            name="trial",
            teachers=(teacher,),
            start=lab.model(teacher),
            objective=lab.config.objective,
            strategy=strategy,
            views=views,
            judge=MetricJudge(METRIC, next(iter(views), WHOLE)),
            measures_losses=bool(views),
        )
        stage = completed(stage, lab.config)
        frozen = lab.pool.open(teacher, stage)
        run = StageRun(
            stage,
            lab.assembly,
            teachers={teacher: frozen},
            reporter=lab._reporter,
            fingerprint={},
        )
        forwards = Counter[tuple[str, int]]()
        for name, model in (("teacher", frozen.model), ("student", run.student.student)):
            model.model.register_forward_pre_hook(
                functools.partial(_count, forwards, name), with_kwargs=True
            )
        result = run.run(lab.assembly.stage_folder("trial"))
        scores = result.scores or {WHOLE: result.metrics}
        rows = lab.assembly.prepared.encoded.validation
        facts = {
            "batches": sum(1 for _ in run.evaluation.scorer.batches(rows)),
            "forwards": dict(forwards),
            "scores": {view: dict(values) for view, values in scores.items()},
            "apart": {view: _apart(run, strategy.passes(1), view) for view in scores},
        }
        run.close()
        frozen.destroy()
    return facts


def _count(forwards: Counter[tuple[str, int]], name: str, *given: Any) -> None:
    forwards[name, len(given[-1]["input_ids"])] += 1


def _apart(run: StageRun, plan: tuple[Pass, ...], view: str) -> dict[str, float]:
    """Return the scores of one view by two forwards."""
    rows = run.assembly.prepared.encoded.validation
    name = None if view == WHOLE else view
    scores = run.evaluation.scorer.score(functools.partial(run.student.predict, view=name), rows)
    passes = [planned for planned in plan if planned.view == name]
    losses = HeldOutLosses(run.trainer, run.bundle, passes, (view,))
    for batch in run.evaluation.scorer.batches(rows):
        losses.add(batch)
    return scores | losses.means()[view]
