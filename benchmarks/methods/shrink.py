"""Shrink of a decoder: choice in one trial against trying each candidate.

`python benchmarks methods.shrink --data FOLDER [--case stories | books] [--seeds 1,2,3]`, on the
CPU, one rank.

The teacher of `stories` is a Llama of 260,000 weights, pretrained on TinyStories by the author of
llama2.c. The teacher of `books` is a Llama of 1.5 million weights that is first trained on eleven
novels, once. The student has 0.4 of the weights of its teacher, or 1 - `--sparsity`.

`shrink` chooses among all candidates in a trial and repairs the best one; `cut` is the loss of the
student before its first step, `trial` after the trial. `layers-N` trains one candidate alone and
without a trial, for as many steps as a candidate takes in `shrink`, or for `--alone` steps, so that
it takes as long as `shrink`. `random` is the shape of the student from random
weights, distilled for as many steps. `on_policy` spends the last tenth of the repair on texts that
the student generates. Each run has a folder below `--out`, is gone on with where it was, and is
done once; `--runs` takes some of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib import books, stories
from lib.data import BOOKS, Config
from lib.launching import (
    ROOT,
    Leg,
    Report,
    finished,
    records_of,
    run_side_by_side,
    seconds_of,
    stage_of,
    write_config,
)
from lib.options import add_runs, need, parsed, parser_of
from lib.tables import Columns, columns_of, print_models

TEACHER = ROOT / "runs/bench/shrink/books-teacher"


class Case(NamedTuple):
    """A teacher that is cut.

    what: the teacher, for the table.
    out: folder of the runs below runs/bench/shrink.
    parts: paths that must exist below the data folder.
    prepare: makes what the sections read. sections: the sections `task` and `teacher`.
    layers: layers of the teacher. depths: numbers of layers of the candidates.
    train: rows of a step and the rate.
    """

    what: str
    out: str
    parts: tuple[Path, ...]
    prepare: Callable[[argparse.Namespace], None]
    sections: Callable[[argparse.Namespace], Config]
    layers: int
    depths: tuple[int, ...]
    train: Mapping[str, Any]


CASES = {
    "stories": Case(
        what="a pretrained Llama of 260,032 weights",
        out="",
        parts=stories.PARTS,
        prepare=lambda given: stories.write_stories_tokenizer(given.data, given.out),
        sections=lambda given: {
            "task": stories.stories_task(given.data, given.out),
            "teacher": stories.stories_teacher(given.data),
        },
        layers=stories.LAYERS,
        # The student does not fit into fewer layers.
        depths=(5, 4, 3, 2),
        train=stories.TRAIN,
    ),
    "books": Case(
        what="a Llama of 1,473,152 weights, trained on novels,",
        out="books",
        parts=(BOOKS,),
        prepare=lambda given: books.train_decoder(given.data, TEACHER, jobs=given.jobs),
        sections=lambda given: {
            "task": books.decoder_task(given.data, 8),
            "teacher": {"model": str(TEACHER / "final"), "deepspeed": "teacher_zero0"},
        },
        layers=books.DECODER_LAYERS,
        depths=(6, 4, 3, 2),
        train=books.DECODER_TRAIN,
    ),
}


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    case = CASES[given.case]
    need(given.data / part for part in case.parts)
    case.prepare(given)
    write_config(given.out / "run.yaml", config(given))
    legs = [leg(given, name, seed) for seed in given.seeds for name in given.runs]
    run_side_by_side(legs, jobs=given.jobs)
    what = f"Shrink of {case.what} to {1 - given.sparsity:g} of its weights"
    print_models(what, given.command, models(given), reference=given.runs[0])
    return 0


def config(given: argparse.Namespace) -> dict[str, Any]:
    case = CASES[given.case]
    return {
        "output_dir": str(given.out / "run"),
        **case.sections(given),
        "student": {"model": "from_teacher", "deepspeed": "zero2"},
        "method": {
            "name": "shrink",
            "target_sparsity": given.sparsity,
            "candidates": [layers / case.layers for layers in case.depths],
            "trial_steps": given.trial,
            "repair_steps": given.steps,
        },
        "train": dict(case.train),
        "log": {"logging_steps": 50},
    }


def variants(given: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    last, case = max(1, given.steps // 10), CASES[given.case]
    on_policy = (
        f"method.repair_steps={given.steps - last}",
        f"method.on_policy_steps={last}",
        "rollout={max_new_tokens: 96, prompt_tokens: 32}",
    )
    steps = ("method.trial_steps=null", f"method.repair_steps={given.alone}")
    alone = {f"layers-{n}": (f"method.candidates=[{n / case.layers}]", *steps) for n in case.depths}
    return {"shrink": ("baselines=[random]",), **alone, "on_policy": on_policy}


def leg(given: argparse.Namespace, name: str, seed: int) -> Leg:
    folder, overrides = f"{name}-{seed}", variants(given)[name]
    return Leg(folder, given.out / "run.yaml", given.out / folder, (*overrides, f"seed={seed}"))


def models(given: argparse.Namespace) -> dict[str, Columns]:
    def of_run(name: str, seed: int) -> dict[str, float | None]:
        one = leg(given, name, seed)
        report = finished(one)
        return {} if report is None else numbers(report, one.output)

    runs = {
        name: columns_of(given.seeds, lambda seed, name=name: of_run(name, seed))
        for name in given.runs
    }
    others = {name: {"loss": columns.pop(name)} for columns in runs.values()
              for name in ("teacher", "random") if name in columns}  # fmt: skip
    return runs | others


def numbers(report: Report, run: Path) -> dict[str, float | None]:
    """Return held-out losses in nats per token, the choice of the trial, and times."""
    seconds = seconds_of(report)
    columns = {
        "loss": report["student.loss"],
        "teacher": report["teacher.loss"],
        "seconds": seconds.get("trial-1", 0.0) + seconds["student"],
    }
    if "random" in report["baselines"]:
        columns["random"] = report["random.loss"]
    if report["candidates"]:
        trial = stage_of(report, "trial-1")
        layers = {int(row["shape"].split()[0]): row for row in report["candidates"]}
        (chosen,) = (number for number, row in layers.items() if row["chosen"])
        columns |= {
            "layers": chosen,
            "trial": trial["loss"],
            "trial s": trial["seconds"],
        }
        # The loss of the candidate before its first step.
        key = f"eval/layers-{chosen}/loss"
        of_trial = (one for one in records_of(run) if one["stage"] == "trial-1")
        columns["cut"] = next(one[key] for one in of_trial if key in one)
        columns |= {f"KL of {number} layers": row["metric"] for number, row in layers.items()}
    return columns


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_runs(parser, "shrink", jobs=1, data="lm/ and weights/")
    parser.set_defaults(out=None)
    parser.add_argument("--case", choices=CASES, default="stories")
    # The embeddings of the books' teacher stay whole and are a quarter of its weights, so that its
    # layers keep a fifth of theirs.
    words = "share of the teacher's weights to remove"
    parser.add_argument("--sparsity", type=float, default=0.6, help=words)
    parser.add_argument("--steps", type=int, default=400, help="of the repair")
    parser.add_argument("--trial", type=int, default=60, help="steps of the trial")
    parser.add_argument("--alone", type=int, help="steps of layers-N; default: trial and repair")
    parser.add_argument("--runs", nargs="*", help="names of the variants; default: all")
    given = parsed(parser, __name__, arguments)
    given.alone = given.alone or given.trial + given.steps
    given.out = given.out or ROOT / "runs/bench/shrink" / CASES[given.case].out
    given.runs = given.runs or [*variants(given)]
    return given
