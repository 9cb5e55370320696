"""Reports as runs write them: of one teacher and student, and of a choice among candidates."""

from __future__ import annotations

from typing import Any

from megakd.contract.results import AssistantReport, CandidateReport, Report
from megakd.reports.card import CardFacts

TRADEOFF = 0.2
SCORES = {
    1: {0.5: 0.9125, 0.7: 0.899, 0.8: 0.8705, 0.9: 0.8441},
    2: {0.7: 0.8899, 0.8: 0.8766, 0.9: 0.8677},
}
CHOSEN = {1: 0.7, 2: 0.9}


def _scored(accuracy: float, f1: float, mean: float) -> dict[str, float]:
    return {"accuracy": accuracy, "f1": f1, "mean_accuracy_f1": mean}


def _model(parameters: int, encoder: int, metrics: dict[str, float]) -> Any:
    """A model with four bytes for each of its parameters."""
    sizes = {"parameters": parameters, "encoder_parameters": encoder, "bytes": 4 * parameters}
    return {**sizes, "metrics": metrics}


ASSISTANT: AssistantReport = {
    "name": "assistant-1",
    "sparsity": 0.7,
    **_model(15_000_000, 3_193_000, _scored(0.78, 0.88, 0.83)),
}
FACTS = CardFacts(
    title="a student",
    task_type="classification",
    student=None,
    teachers=(None,),
    objective=("soft_target_kl (weight 1.0)",),
    command="megakd train run.yaml",
)


def report_of(**changes: Any) -> Report:
    """A report of two stages and one baseline; `changes` replace keys."""
    report: Report = {
        "method": "single",
        "task": "glue/mrpc",
        "metric_name": "mean_accuracy_f1",
        "evaluated_on": "validation",
        "teacher": _model(22_713_984, 10_645_632, _scored(0.8, 0.9, 0.85)),
        "assistants": [],
        "student": _model(2_090_000, 99_968, _scored(0.75, 0.85, 0.8)),
        "baselines": {"alone": _scored(0.7, 0.8, 0.75)},
        "candidates": [],
        "stages": [
            {
                "name": "teacher",
                "steps": 200,
                "seconds": 78.4,
                "tokens_per_second": 1960.2,
                "peak_memory_bytes": 1_500_000_000,
                "metrics": {"accuracy": 0.8},
            },
            {
                "name": "student",
                "steps": 1200,
                "seconds": 3725.0,
                "tokens_per_second": 12_345.0,
                "peak_memory_bytes": 900_000_000,
                "metrics": {"accuracy": 0.75},
            },
        ],
        "speedup": {"batch": 32, "teacher_ms": 50.0, "student_ms": 5.0},
        "latency": [],
        "cost": None,
        "samples": [],
        "evaluation_sets": {},
        "seconds": {},
        "environment": {},
    }
    report.update(changes)
    return report


def candidates() -> list[CandidateReport]:
    """Two iterations of candidates, one of each chosen."""
    return [
        {
            "iteration": iteration,
            "sparsity": sparsity,
            "parameters": round(10_000_000 * (1 - sparsity)),
            "metric_name": "accuracy",
            "metric": metric,
            "tradeoff": metric + TRADEOFF * sparsity,
            "chosen": CHOSEN[iteration] == sparsity,
        }
        for iteration, scores in SCORES.items()
        for sparsity, metric in scores.items()
    ]


def chosen_report(**changes: Any) -> Report:
    """A report with an assistant, candidates, latencies and cost."""
    times = {1: (12.0, 5.0, 2.0, 2.5), 32: (310.0, 101.0, 31.0, 40.0)}
    names = ("teacher", "assistant-1", "student", "alone")
    place = {"length": 24, "device": "cpu (1 thread)", "dtype": "float32"}
    latency = [
        {"model": model, "batch": batch, "ms": ms, **place}
        for batch, series in times.items()
        for model, ms in zip(names, series, strict=True)
    ]
    return report_of(
        method="minidisc",
        assistants=[ASSISTANT],
        candidates=candidates(),
        speedup={"batch": 1, "teacher_ms": 12.0, "student_ms": 2.0},
        latency=latency,
        cost={
            "trials": 1,
            "seconds": 600.0,
            "alternative": "MaxiDisc",
            "alternative_does": "every assistant tried",
            "alternative_trials": 7,
            "alternative_seconds": 1500.0,
        },
        **changes,
    )


def language_report(**changes: Any) -> Report:
    """A report of a decoder: a perplexity, of which lower is better, and samples."""

    def scored(perplexity: float, loss: float) -> dict[str, float]:
        return {"perplexity": perplexity, "loss": loss, "accuracy": 0.4}

    report = report_of(
        task="texts",
        metric_name="perplexity",
        baselines={"alone": scored(16.0, 2.773)},
        stages=[],
        speedup=None,
        samples=[
            {"prompt": "Return the", "teacher": "name of the file", "student": "the the <list>"}
        ],
        **changes,
    )
    assert report["teacher"] is not None
    report["teacher"]["metrics"] = scored(8.0, 2.079)
    report["student"]["metrics"] = scored(10.0, 2.303)
    return report
