"""What the gloo ranks run of evaluations: stages whose forwards are counted."""

from __future__ import annotations

import functools
import gc
from collections import Counter
from pathlib import Path
from typing import Any

from megakd.config.file import load_config
from megakd.contract.metric import WHOLE, Metric, MetricJudge
from megakd.contract.stage import Pass, Stage
from megakd.contract.views import View
from megakd.engine import distributed
from megakd.inputs.inputs import prepare
from megakd.methods.minidisc import Sandwich
from megakd.run.run_lab import RunLab
from megakd.training.progress import Reporter
from megakd.training.recipes import completed
from megakd.training.stage_evaluation import HeldOutLosses
from megakd.training.stage_run import StageRun

VIEWS = {"wide": View((2, 2), (12, 12)), "slim": View((1, 1), (8, 8)), "thin": View((1, 1), (4, 4))}


def evaluated(config_path: str, overrides: list[str], kind: str) -> dict[str, Any]:
    """Run a `trial` or a `plain` stage of one step; return its forwards, and its scores twice.

    Forwards are counted by model and number of rows. The scores are those of the stage, and those
    of a forward for the predictions and another for the losses, view by view.
    """
    config = load_config(Path(config_path), overrides)
    reporter = Reporter(config.output_dir, is_main=distributed.ranks().is_main)
    lab = RunLab(config, prepare(config), distributed.ranks(), reporter)
    views = VIEWS if kind == "trial" else {}
    teacher = lab.teacher()
    strategy = Sandwich(teacher, tuple(views) or (None,))  # type: ignore[arg-type]
    stage = Stage(
        name="trial",
        teachers=(teacher,),
        start=lab.model(teacher),
        objective=config.objective,
        strategy=strategy,
        views=views,
        judge=_judge(views),
        measures_losses=bool(views),
    )
    stage = completed(stage, config)
    frozen = lab.pool.open(teacher, stage)
    run = StageRun(
        stage, lab.assembly, teachers={teacher: frozen}, reporter=reporter, fingerprint={}
    )
    forwards = Counter[tuple[str, int]]()
    for name, model in (("teacher", frozen.model), ("student", run.student.student)):
        model.model.register_forward_pre_hook(
            functools.partial(_count, forwards, name), with_kwargs=True
        )
    result = run.run(lab.assembly.stage_folder("trial"))
    scores = result.scores or {WHOLE: result.metrics}
    found = {
        "batches": sum(
            1 for _ in run.evaluation.scorer.batches(run.assembly.prepared.encoded.validation)
        ),
        "forwards": dict(forwards),
        "scores": {view: dict(values) for view, values in scores.items()},
        "apart": {view: _apart(run, strategy.passes(1), view) for view in scores},
    }
    run.close()
    frozen.destroy()
    lab.close()
    del run, frozen, lab
    gc.collect()
    return found


def _judge(views: dict[str, View]) -> MetricJudge:
    metric = Metric(name="perplexity", parts=("perplexity",), higher_is_better=False)
    return MetricJudge(metric, next(iter(views), WHOLE))


def _count(forwards: Counter[tuple[str, int]], name: str, *given: Any) -> None:
    forwards[name, len(given[-1]["input_ids"])] += 1


def _apart(run: StageRun, plan: tuple[Pass, ...], view: str) -> dict[str, float]:
    """Return the scores of one view by two forwards."""
    rows = run.assembly.prepared.encoded.validation
    name = None if view == WHOLE else view
    scores = run.evaluation.scorer.score(functools.partial(run.student.predict, view=name), rows)
    own = [planned for planned in plan if planned.view == name]
    losses = HeldOutLosses(run.trainer, run.bundle, own, (view,))
    for batch in run.evaluation.scorer.batches(rows):
        losses.add(batch)
    return scores | losses.means()[view]
