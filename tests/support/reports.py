"""Reports as runs write them: of one teacher and student, and of a choice among candidates."""

from __future__ import annotations

from typing import Any

from megakd.training.record import Report, Row

TRADEOFF = 0.2
SCORES = {
    1: {0.5: 0.9125, 0.7: 0.899, 0.8: 0.8705, 0.9: 0.8441},
    2: {0.7: 0.8899, 0.8: 0.8766, 0.9: 0.8677},
}
CHOSEN = {1: 0.7, 2: 0.9}


def scored(accuracy: float, f1: float, mean: float) -> dict[str, float]:
    return {"accuracy": accuracy, "f1": f1, "mean_accuracy_f1": mean}


def entries(name: str, numbers: dict[str, Any]) -> dict[str, Any]:
    """The keys of a model in a report."""
    return {f"{name}.{key}": value for key, value in numbers.items()}


def sized(name: str, parameters: int, encoder: int, *, stored: bool = True) -> dict[str, Any]:
    """A model with four bytes for each of its parameters."""
    sizes = {"parameters": parameters, "encoder_parameters": encoder}
    return entries(name, {**sizes, "bytes": 4 * parameters} if stored else sizes)


def report_of(**changes: Any) -> Report:
    """A report of two stages and one baseline; `changes` replace keys, with `__` for a dot."""
    stages = (
        ("teacher", 200, 78.4, 1960.2, 1_500_000_000, 0.8),
        ("student", 1200, 3725.0, 12_345.0, 900_000_000, 0.75),
    )
    keys = ("name", "steps", "seconds", "tokens_per_second", "peak_memory_bytes", "accuracy")
    empty = ("assistants", "batches", "evaluation_sets", "candidates", "pool", "pruning", "samples")
    report: Report = {
        "method": "single",
        "task": "glue/mrpc",
        "metric_name": "mean_accuracy_f1",
        "metrics": ["accuracy", "f1", "mean_accuracy_f1"],
        "evaluated_on": "validation",
        "models": ["teacher", "student", "alone"],
        "teachers": ["teacher"],
        "baselines": ["alone"],
        **sized("teacher", 22_713_984, 10_645_632, stored=False),
        **entries("teacher", scored(0.8, 0.9, 0.85)),
        **sized("student", 2_090_000, 99_968),
        **entries("student", scored(0.75, 0.85, 0.8)),
        **sized("alone", 2_090_000, 99_968),
        **entries("alone", scored(0.7, 0.8, 0.75)),
        **{key: [] for key in (*empty, "warnings")},
        "stages": [dict(zip(keys, stage, strict=True)) for stage in stages],
    }
    return report | {key.replace("__", "."): value for key, value in changes.items()}


def candidates() -> list[Row]:
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


def timed(rounds: int = 9) -> dict[str, Any]:
    """The entries of a teacher and a student that were timed at two batches."""
    report: dict[str, Any] = {
        "batches": [1, 32],
        "latency.tokens": 24,
        "latency.device": "cpu (1 thread)",
        "latency.dtype": "float32",
    }
    for batch, teacher, student in ((1, 12.0, 2.0), (32, 310.0, 31.0)):
        report |= {f"teacher.ms_batch_{batch}": teacher, f"student.ms_batch_{batch}": student}
        report[f"latency.rounds_batch_{batch}"] = rounds
        for name, ratio, spread in (("teacher", 1.0, 0.0), ("student", teacher / student, 0.5)):
            key = f"{name}.speedup_batch_{batch}"
            report |= {key: ratio, f"{key}_low": ratio - spread, f"{key}_high": ratio + spread}
    return report


def chosen_report(**changes: Any) -> Report:
    """A report with an assistant, candidates and latencies."""
    return report_of(
        method="minidisc",
        models=["teacher", "assistant-1", "student", "alone"],
        assistants=["assistant-1"],
        **sized("assistant-1", 15_000_000, 3_193_000),
        **entries("assistant-1", {**scored(0.78, 0.88, 0.83), "sparsity": 0.7}),
        candidates=candidates(),
        **timed(),
        **changes,
    )


def language_report(**changes: Any) -> Report:
    """A report of a decoder: a perplexity, of which lower is better, and samples."""

    def scored(name: str, perplexity: float, loss: float) -> dict[str, float]:
        return entries(name, {"perplexity": perplexity, "loss": loss, "accuracy": 0.4})

    return report_of(
        task="texts",
        metric_name="perplexity",
        metrics=["perplexity", "loss", "accuracy"],
        **scored("teacher", 8.0, 2.079),
        **scored("student", 10.0, 2.303),
        **scored("alone", 16.0, 2.773),
        stages=[],
        samples=[
            {"prompt": "Return the", "teacher": "name of the file", "student": "the the <list>"}
        ],
        **changes,
    )
