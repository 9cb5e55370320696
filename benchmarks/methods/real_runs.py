"""Real runs on real data: teacher, distilled student, and the same student alone.

`python benchmarks methods.real_runs quickstart | sst2 | mrpc | stories | books [--seeds 1,2]
[key=value …]`, by default on two CPU ranks under DeepSpeed's launcher, about five minutes each.
Reads ../shared/data, writes runs/bench/<name>/seed-<n>; started again it goes on where it was.

The quickstart also has the baseline `direct`, and its teacher is trained anew for every seed.
`--maxidisc` also tries every assistant of the same grid, with the same teacher, and prints both
scores and times.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from lib.data import BOOKS, Config, bert, llama, train_section
from lib.launching import (
    FETCHED_TEACHER,
    ROOT,
    SHARED,
    Report,
    fetch_teacher,
    seconds_of,
    trained,
    write_config,
)
from lib.options import integers, need, parsed, parser_of
from lib.stories import MODEL, STORIES, nats_per_token, write_stories_tokenizer
from lib.tables import aligned, mean_and_deviation, print_scores

MIXED = [
    {"loss": "soft_target_kl", "weight": 0.8, "temperature": 1.0},
    {"loss": "hard_cross_entropy", "weight": 0.2},
]
QUICKSTART = Path("launch/examples/quickstart.yaml")
LOWER_IS_BETTER = ("perplexity", "loss")
SOFT = {"loss": "soft_target_kl", "weight": 1.0, "temperature": 2.0}


class Case(NamedTuple):
    """One real run.

    what: for the table. data: must be there, below the folder of real data.
    prepare: makes in a folder what the config reads; config: of that folder.
    """

    what: str
    data: Path
    prepare: Callable[[Path], object]
    config: Callable[[Path], Config]


def sst2(_: Path) -> Config:
    """Sentiment with 4000 labels; the student learns from the teacher on all 67,349 phrases."""
    return {
        "task": _glue("sst2", max_length=64, labelled_examples=4000),
        "teacher": _minilm(steps=150),
        **_student({"config": bert(2, 128, 4)}),
        "objective": [SOFT],
        **_training(rows=16, steps=900, rate=1e-3, evaluate_every=300),
    }


def mrpc(_: Path) -> Config:
    """Paraphrases: all 3668 labels for everybody, and hidden states beside the soft targets."""
    return {
        "task": _glue("mrpc", max_length=96),
        "teacher": _minilm(steps=115),
        **_student({"config": bert(2, 128, 4)}),
        "objective": [SOFT, {"loss": "hidden_mse", "weight": 1.0, "layer_mapping": "uniform"}],
        **_training(rows=16, steps=345, rate=5e-4, evaluate_every=115),
    }


def stories(folder: Path) -> Config:
    """A real pretrained Llama teaches one of a fifth of its size on 1000 stories."""
    return {
        "task": {
            "type": "causal_lm",
            "dataset": str(SHARED / STORIES),
            "text_columns": ["text"],
            "max_length": 256,
            "tokenizer": str(folder / "tokenizer"),
        },
        "teacher": {"model": str(SHARED / MODEL / "hf"), "deepspeed": "teacher_zero3"},
        **_student(_llama(layers=3, width=32, heads=4)),
        "objective": MIXED,
        **_training(rows=8, steps=600, rate=3e-3, evaluate_every=150),
    }


def books(_: Path) -> Config:
    """A teacher is trained on eleven novels, then teaches a student of a quarter of its size."""
    finetune = {"max_steps": 300, "learning_rate": 2e-3, "deepspeed": "zero2"}
    return {
        "task": {
            "type": "causal_lm",
            "dataset": str(SHARED / BOOKS),
            "max_length": 256,
            "tokenizer": {"type": "bpe", "vocab_size": 3000},
            "max_eval_examples": 40,
        },
        "teacher": {
            "model": _llama(layers=4, width=128, heads=4),
            "deepspeed": "teacher_zero3",
            "finetune": finetune,
        },
        **_student(_llama(layers=2, width=64, heads=4)),
        "objective": MIXED,
        **_training(rows=8, steps=250, rate=3e-3, evaluate_every=125),
    }


def _glue(name: str, **keys: Any) -> Config:
    data = {"dataset": f"glue/{name}", "data_dir": str(SHARED / "glue")}
    return {"type": "classification", **data, **keys}


def _minilm(*, steps: int) -> Config:
    finetune = {"max_steps": steps, "learning_rate": 1e-4, "warmup_ratio": 0.1}
    return {
        "model": str(FETCHED_TEACHER),
        "deepspeed": "teacher_zero3",
        "finetune": {**finetune, "deepspeed": "zero2"},
    }


def _student(model: Mapping[str, Any]) -> Config:
    return {
        "student": {"model": model, "deepspeed": "zero2"},
        "method": {"name": "single"},
        "baselines": ["alone"],
    }


def _llama(*, layers: int, width: int, heads: int) -> Config:
    keys = {"num_key_value_heads": heads // 2, "tie_word_embeddings": True}
    return {"config": llama(layers, width, heads, 8 * width // 3, **keys)}


def _training(*, rows: int, steps: int, rate: float, evaluate_every: int) -> Config:
    return {
        "train": train_section(rows, steps, rate),
        "eval": {"eval_steps": evaluate_every, "per_device_eval_batch_size": 2 * rows},
        "save": {"save_steps": evaluate_every},
        "log": {"logging_steps": 25},
    }


def _convert_stories_tokenizer(folder: Path) -> None:
    # The loss shows that the converted tokenizer is the one that the teacher knows.
    data, out = ROOT / SHARED, ROOT / folder
    write_stories_tokenizer(data, out)
    texts = json.loads((data / STORIES).read_text(encoding="utf-8"))
    loss = nats_per_token(data / MODEL / "hf", out / "tokenizer", texts[:100])
    print(f"the teacher on the first 100 stories: {loss:.3f} nats per token", flush=True)


CASES = {
    "sst2": Case("SST-2, 4000 labels", Path("glue/SST-2"), lambda _: fetch_teacher(), sst2),
    "mrpc": Case("MRPC", Path("glue/MRPC"), lambda _: fetch_teacher(), mrpc),
    "stories": Case("TinyStories sample", STORIES, _convert_stories_tokenizer, stories),
    "books": Case("eleven novels", BOOKS, lambda _: None, books),
}


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    reports, others = {}, {}
    if given.name == "quickstart":
        what, path = given.name, QUICKSTART
        fetch_teacher()
    else:
        what, path = CASES[given.name].what, written(given.name, given.output / given.name)
    for seed in given.seeds:
        reports[seed] = _trained(given, path, given.name, seed, ())
        if given.maxidisc:
            others[seed] = _trained(given, path, "quickstart-maxidisc", seed, maxidisc())
    show(f"{what}, {given.ranks} rank(s)", given.command, reports)
    if given.maxidisc:
        print(table({seed: beside(report, others[seed]) for seed, report in reports.items()}))
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("name", choices=["quickstart", *CASES])
    parser.add_argument("--seeds", type=integers, default=[1], help="separated by commas")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    words = "of the quickstart: try every assistant, too"
    parser.add_argument("--maxidisc", action="store_true", help=words)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parsed(parser, __name__, arguments)
    if given.maxidisc and given.name != "quickstart":
        parser.error("--maxidisc: only the quickstart has assistants")
    return given


def _trained(
    given: argparse.Namespace, path: Path, name: str, seed: int, more: Sequence[str]
) -> Any:
    overrides = [*more, *given.overrides, f"seed={seed}"]
    output = given.output / name / f"seed-{seed}"
    return trained(path, output, ranks=given.ranks, overrides=overrides)


def written(name: str, folder: Path) -> Path:
    case = CASES[name]
    need([ROOT / SHARED / case.data])
    case.prepare(folder)
    # Every seed gives its own folder on the command line.
    tree = {"output_dir": str(folder / "run"), **case.config(folder)}
    write_config(ROOT / folder / "run.yaml", tree)
    return folder / "run.yaml"


def scores(report: Report) -> dict[str, float]:
    """Return the headline metric of teacher, distilled and alone, on the report's split."""
    metrics = {"distilled": report["student"]["metrics"], **report["baselines"]}
    if report["teacher"] is not None:
        metrics = {"teacher": report["teacher"]["metrics"], **metrics}
    return {model: values[report["metric_name"]] for model, values in metrics.items()}


def gain(report: Report) -> float:
    """Return the gain of the distilled student over the student alone; negative for a loss."""
    by_model = scores(report)
    difference = by_model["distilled"] - by_model["alone"]
    return -difference if report["metric_name"] in LOWER_IS_BETTER else difference


def table(rows: Mapping[object, Mapping[str, float]]) -> str:
    """Return a line per seed, then mean and standard deviation over the seeds."""
    # One seed may need a stage that another does without.
    titles = list(dict.fromkeys(title for row in rows.values() for title in row))
    columns = [[row[title] for row in rows.values() if title in row] for title in titles]
    pairs = [mean_and_deviation(column) for column in columns]
    lines = {str(seed): row for seed, row in rows.items()}
    for name, place in (("mean", 0), ("sd", 1)):
        values = (pair[place] for pair in pairs)
        lines[name] = dict(zip(titles, values, strict=True))
    cells = [
        [name, *(f"{row[title]:.4g}" if title in row else "-" for title in titles)]
        for name, row in lines.items()
    ]
    return aligned([["seed", *titles], *cells])


def show(what: str, command: str, reports: Mapping[int, Report]) -> None:
    rows = {
        seed: {**scores(report), "gain": gain(report)}
        | {f"{stage} s": spent for stage, spent in seconds_of(report).items()}
        for seed, report in reports.items()
    }
    print(table(rows))
    first, *_ = reports.values()
    columns = {model: [scores(r)[model] for r in reports.values()] for model in scores(first)}
    columns["gain"] = [gain(report) for report in reports.values()]
    spent = [sum(seconds_of(report).values()) for report in reports.values()]
    extra = [_sizes(first), f"training {mean_and_deviation(spent)[0]:.0f} s"]
    what = f"{what}, {first['metric_name']} on {first['evaluated_on']}, {len(reports)} seed(s)"
    print_scores(what, command, columns, extra=extra)


def _sizes(report: Report) -> str:
    student = report["student"]["parameters"]
    if report["teacher"] is None:
        return f"{student:,} parameters"
    teacher = report["teacher"]["parameters"]
    return f"{teacher:,} to {student:,} parameters ({teacher / student:.1f}x)"


def maxidisc() -> list[str]:
    method = yaml.safe_load((ROOT / QUICKSTART).read_text(encoding="utf-8"))["method"]
    # MaxiDisc also trains the target without an assistant.
    method = {key: value for key, value in method.items() if key != "target_may_win"}
    return [f"method={json.dumps(method | {'name': 'maxidisc'})}", "baselines=[]", "alone=null"]


def beside(report: Report, other: Report) -> dict[str, float]:
    """Return the scores and the seconds of MiniDisc and of MaxiDisc.

    The seconds are those of the search and its students: neither teacher nor baselines count.
    """
    score, best = scores(report)["distilled"], scores(other)["distilled"]
    ours, theirs = _search_seconds(report), _search_seconds(other)
    times = {"minidisc s": ours, "maxidisc s": theirs, "share": ours / theirs}
    return {"minidisc": score, "maxidisc": best, "difference": score - best, **times}


def _search_seconds(report: Report) -> float:
    left_out = {"teacher-finetune", *report["baselines"]}
    return sum(spent for stage, spent in seconds_of(report).items() if stage not in left_out)
