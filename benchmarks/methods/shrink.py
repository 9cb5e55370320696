"""Shrink of a decoder: choice in one trial against trying each candidate.

`python benchmarks methods.shrink --data FOLDER [--case stories | books] [--seeds 1,2,3]`, on the
CPU, one rank.

The teacher of `stories` is a Llama of 260,000 weights, pretrained on TinyStories by the author of
llama2.c. The teacher of `books` is a Llama of 1.5 million weights that is first trained on eleven
novels, once. The student has 0.4 of the weights of its teacher.

`shrink` chooses among all candidates in a trial and repairs the best one. `tried` trains every
candidate alone, for as many steps as a candidate takes in `shrink`, and takes the best on the same
held-out rows. `random` is the shape of the student from random weights, distilled for as many
steps. `cut` is the student before its first step, and `trial` is the student after the trial,
before the repair. `on policy` spends the last tenth of the repair on texts that the student
generates. Each run has a folder below `--out`, is gone on with where it was, and is done once;
`--runs` takes some of them. `--hops` runs only one hop of the stories' Llama to a quarter of the
weights, and two hops through an assistant, at equal numbers of steps. `--trials` runs only trials
of several lengths, with one step of repair, and prints which candidate they choose.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoModelForCausalLM

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
from lib.options import add_runs, integers, need, parsed, parser_of
from lib.tables import mean_and_deviation, mean_text, print_rows, print_scores, table_of

TEACHER = Path("runs/bench/shrink/books-teacher")
ON_POLICY = 10
"""`on policy` takes one of this many steps of the repair on generated texts."""
VARIANTS = ("teacher", "shrink", "tried", "on_policy", "random", "trial", "cut")
ALONE = "layers-"


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


SPARSITY = 0.6
"""Share of the teacher's weights to remove.

The embeddings of the books' teacher stay whole and are a quarter of its weights, so that its layers
keep a fifth of their weights.
"""
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
        prepare=lambda given: books.train_decoder(given.data, given.teacher, jobs=given.jobs),
        sections=lambda given: {
            "task": books.decoder_task(given.data, 8),
            "teacher": {"model": str(given.teacher / "final"), "deepspeed": "teacher_zero0"},
        },
        layers=books.DECODER_LAYERS,
        depths=(6, 4, 3, 2),
        train=books.DECODER_TRAIN,
    ),
}


class Scores(NamedTuple):
    """Held-out losses of one seed, in nats per token.

    alone: by number of layers, each candidate that was trained alone; empty if not all were.
    chosen: layers of the candidate that the trial chose.
    divergences: by number of layers, KL(teacher || candidate) by which the trial chose.
    trial_seconds, alone_seconds: time of the trial, and of training all candidates.
    """

    teacher: float
    shrink: float
    random: float
    cut: float
    trial: float
    chosen: int
    divergences: Mapping[int, float]
    alone: Mapping[int, float]
    on_policy: float | None
    trial_seconds: float
    alone_seconds: float

    @property
    def tried(self) -> float | None:
        """The loss of the best candidate that was trained alone."""
        return min(self.alone.values(), default=None)

    @property
    def best_alone(self) -> int | None:
        """Layers of the best candidate that was trained alone."""
        return min(self.alone, key=lambda layers: self.alone[layers], default=None)


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    case = CASES[given.case]
    need(given.data / part for part in case.parts)
    case.prepare(given)
    write_config(given.out / "run.yaml", config(given))
    legs = [leg(given, name, seed) for seed in given.seeds for name in given.runs]
    run_side_by_side(legs, jobs=given.jobs)
    show = show_hops if given.hops else show_trials if given.trials else show_seeds
    show(given, given.command)
    return 0


def config(given: argparse.Namespace) -> dict[str, Any]:
    case = CASES[given.case]
    return {
        "output_dir": str(given.out / "run"),
        **case.sections(given),
        "student": {"model": "from_teacher", "deepspeed": "zero2"},
        "method": {
            "name": "shrink",
            "target_sparsity": SPARSITY,
            "candidates": [layers / case.layers for layers in case.depths],
            "trial_steps": given.trial,
            "repair_steps": given.steps,
        },
        "train": dict(case.train),
        "log": {"logging_steps": 50},
    }


def variants(given: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    if given.hops:
        # Equal numbers of steps to a quarter of the weights.
        far = ("method.target_sparsity=0.75", "method.candidates=6")
        half = given.steps // 2
        return {
            "one_hop": (*far, f"method.repair_steps={2 * half + given.trial}"),
            "two_hops": (*far, f"method.repair_steps={half}", "method.assistant=auto_2.5"),
        }
    if given.trials:
        once = "method.repair_steps=1"
        return {f"trial-{steps}": (f"method.trial_steps={steps}", once) for steps in given.trials}
    last, case = max(1, given.steps // ON_POLICY), CASES[given.case]
    on_policy = (
        f"method.repair_steps={given.steps - last}",
        f"method.on_policy_steps={last}",
        "rollout={max_new_tokens: 96, prompt_tokens: 32}",
    )
    alone = {f"{ALONE}{n}": (f"method.candidates=[{n / case.layers}]",) for n in case.depths}
    return {"shrink": ("baselines=[random]",), **alone, "on_policy": on_policy}


def leg(given: argparse.Namespace, name: str, seed: int) -> Leg:
    folder, overrides = f"{name}-{seed}", variants(given)[name]
    return Leg(folder, given.out / "run.yaml", given.out / folder, (*overrides, f"seed={seed}"))


def scores_of(
    reports: Mapping[str, Report | None], depths: Sequence[int], run: Path
) -> Scores | None:
    """Return the losses of a seed; None without the report of `shrink`."""
    report = reports["shrink"]
    if report is None:
        return None
    trial, on_policy, chosen = stage_of(report, "trial-1"), reports["on_policy"], chosen_of(report)
    tried = {layers: reports[f"{ALONE}{layers}"] for layers in depths}
    alone = {} if None in tried.values() else {n: r for n, r in tried.items() if r is not None}
    return Scores(
        teacher=report["teacher"]["metrics"]["loss"],
        shrink=_loss(report),
        random=report["baselines"]["random"]["loss"],
        cut=cut_loss(run, chosen),
        trial=trial["metrics"]["loss"],
        chosen=chosen,
        divergences=divergences_of(report),
        alone={layers: _loss(found) for layers, found in alone.items()},
        on_policy=None if on_policy is None else _loss(on_policy),
        trial_seconds=trial["seconds"],
        alone_seconds=sum(
            seconds_of(found)[name] for found in alone.values() for name in ("trial-1", "student")
        ),
    )


def _loss(report: Report) -> float:
    return report["student"]["metrics"]["loss"]


def divergences_of(report: Report) -> dict[int, float]:
    """Return by number of layers KL(teacher || candidate) at the end of the trial of a run."""
    return {_layers(row): row["metric"] for row in report["candidates"]}


def chosen_of(report: Report) -> int:
    """Return the number of layers of the candidate that a trial has chosen."""
    (chosen,) = [_layers(row) for row in report["candidates"] if row["chosen"]]
    return chosen


def _layers(candidate: Report) -> int:
    return int(candidate["shape"].split()[0])


def cut_loss(run: Path, layers: int) -> float:
    """Return the loss of a candidate before its first step, from the log of a run."""
    key = f"eval/layers-{layers}/loss"
    return next(r[key] for r in records_of(run) if r["stage"] == "trial-1" and key in r)


def show_seeds(given: argparse.Namespace, command: str) -> None:
    """Print the losses of the seeds whose `shrink` has finished, and open their students."""
    case, found, opened = CASES[given.case], list[Scores](), set[str]()
    for seed in given.seeds:
        reports = {name: finished(leg(given, name, seed)) for name in variants(given)}
        run = leg(given, "shrink", seed).output
        scores = scores_of(reports, case.depths, run)
        if scores is not None:
            found.append(scores)
            # Opened by transformers alone, without code from the folder.
            model = AutoModelForCausalLM.from_pretrained(run / "final", trust_remote_code=False)
            opened.add(type(model).__name__)
    if found:
        what = f"Shrink of {case.what} to {1 - SPARSITY:g} of its weights, held-out loss in nats"
        extra = [f"final/ opens as {', '.join(sorted(opened))}"]
        show_scores(found, f"{what} per token", command, extra)


def show_scores(found: Sequence[Scores], what: str, command: str, extra: Sequence[str]) -> None:
    """Print the table, and the row for the measurements; `extra` are parts of the numbers."""
    columns = {
        name: [value for one in found if (value := getattr(one, name)) is not None]
        for name in VARIANTS
    }
    for layers in dict.fromkeys(n for one in found for n in one.alone):
        losses = [one.alone[layers] for one in found if layers in one.alone]
        columns[f"{ALONE}{layers} alone"] = losses
    lines = {
        name: {"held-out loss": mean_text(values, 4), "seeds": str(len(values))}
        for name, values in columns.items()
        if values
    }
    print(table_of("variant", lines))
    differences = [difference(found, name) for name in ("tried", "random", "trial")]
    parts = [*filter(None, differences), *_choices(found), *extra]
    print_scores(what, command, columns, extra=parts)


def difference(found: Sequence[Scores], other: str) -> str | None:
    """Return by how much `shrink` differs from a variant, in pairs; negative: `shrink` is better.

    None if no seed has both.
    """
    pairs = [one.shrink - value for one in found if (value := getattr(one, other)) is not None]
    if not pairs:
        return None
    mean, deviation = mean_and_deviation(pairs)
    each = ", ".join(f"{pair:+.4f}" for pair in pairs)
    return f"shrink - {other} {mean:+.4f} (sd {deviation:.4f}; {each})"


def _choices(found: Sequence[Scores]) -> list[str]:
    parts = [f"the trial chose {', '.join(str(one.chosen) for one in found)} layers"]
    parts += [f"trial: {_divergences_line(one.divergences)}" for one in found]
    tried = [one for one in found if one.best_alone is not None]
    if tried:
        right = sum(one.chosen == one.best_alone for one in tried)
        parts.append(f"the best alone have {', '.join(str(one.best_alone) for one in tried)}")
        parts.append(f"the best candidate alone in {right} of {len(tried)} seeds")
    parts += [f"trial {o.trial_seconds:.0f} s, all alone {o.alone_seconds:.0f} s" for o in tried]
    return parts


def _divergences_line(divergences: Mapping[int, float]) -> str:
    return "KL " + ", ".join(f"{layers} layers {kl:.3f}" for layers, kl in divergences.items())


def show_hops(given: argparse.Namespace, command: str) -> None:
    losses = {
        name: [
            _loss(report) for seed in given.seeds if (report := finished(leg(given, name, seed)))
        ]
        for name in variants(given)
    }
    what = "Shrink of a pretrained Llama to a quarter of its weights, held-out loss"
    print_scores(what, command, losses, extra=[f"{len(given.seeds)} seeds"])


def show_trials(given: argparse.Namespace, command: str) -> None:
    parts = []
    for name in variants(given):
        reports = [finished(leg(given, name, seed)) for seed in given.seeds]
        found = [divergences_of(report) for report in reports if report is not None]
        layers = ", ".join(str(min(kl, key=lambda n, kl=kl: kl[n])) for kl in found)
        parts.append(f"{name}: {layers} layers ({'; '.join(map(_divergences_line, found))})")
    what = f"Choices of trials of several lengths, {CASES[given.case].what} to {1 - SPARSITY:g}"
    print_rows(command, (what, "; ".join(parts), f"{len(given.seeds)} seeds"))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_runs(parser, "shrink", jobs=1, data="lm/ and weights/")
    parser.set_defaults(out=None)
    parser.add_argument("--case", choices=CASES, default="stories")
    parser.add_argument("--steps", type=int, default=400, help="of the repair")
    parser.add_argument("--trial", type=int, default=60, help="steps of the trial")
    parser.add_argument("--runs", nargs="*", help="names of the variants; default: all")
    parser.add_argument("--hops", action="store_true", help="compare one hop with two")
    parser.add_argument("--trials", type=integers, help="compare trials of so many steps")
    parser.add_argument("--teacher", type=Path, default=TEACHER, help="folder of books' teacher")
    given = parsed(parser, __name__, arguments)
    if given.hops and given.case != "stories":
        parser.error("--hops: the embeddings of books' teacher are too large for a quarter")
    given.teacher = ROOT / given.teacher
    given.out = given.out or ROOT / "runs/bench/shrink" / CASES[given.case].out
    given.runs = given.runs or [*variants(given)]
    return given
