"""Does a score of `megakd match` rank teachers? Against the students that each of them teaches.

`python benchmarks methods.match --data FOLDER [--settings clinc150-few,…] [--minutes 40]`, on one
thread of a CPU.

In every setting seven teachers differ in depth, steps, number of labels and errors of the labels.
Each teaches the same student on soft targets alone, whose score on the test rows is the outcome of
the teacher. The scores of `match` are computed before any student learns. The score with the best
mean rank correlation in the first half of the settings, and its sign, is chosen; the other half
tests it. Finished runs are not repeated, and no run starts after `--minutes`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import spearmanr

from evidence.settings import SETTINGS, Rows
from lib import stories
from lib.data import (
    NO_DROPOUT,
    Config,
    bert,
    pieces,
    sizes_of,
    train_section,
    write_jsonl,
    write_labelled,
)
from lib.options import add_runs, need, parsed, parser_of, words_of
from lib.tables import print_rows, table_of

CHOOSING = ("clinc150", "stories", "sst2")
TESTING = ("banking77", "shakespeare", "stories-three")
SHAPE = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "num_key_value_heads", "vocab_size")  # fmt: skip


class Taught(NamedTuple):
    """How a teacher comes about.

    size: layers x width of a BERT from random weights; layers of the pretrained Llama, where 0 is
        its shape with random weights. steps: a share of the steps of all teachers.
    rows: of the labelled rows, `all`, `few` (a quarter), or `wrong` (0.4 of the labels are drawn).
    """

    size: str
    steps: float = 1.0
    rows: str = "all"


CLASSIFIERS = {
    "full": Taught("2x96"),
    "early": Taught("2x96", steps=0.25),
    "few": Taught("2x96", rows="few"),
    "wrong": Taught("2x96", rows="wrong"),
    "shallow": Taught("1x96"),
    "narrow": Taught("1x32"),
    "wide": Taught("1x160"),
}
DECODERS = {
    "given": Taught("5", steps=0.0),
    "tuned": Taught("5"),
    "four": Taught("4"),
    "three": Taught("3"),
    "early": Taught("3", steps=0.25),
    "two": Taught("2"),
    "new": Taught("0"),
}


class Setting(NamedTuple):
    """A task, its pretrained model, and how teachers and students learn.

    rows: the task's training files by kind of `Taught.rows`, and `student`.
    model: the pretrained model of a language model.
    pool: the setting whose teachers it has, if they are not its own.
    """

    name: str
    task: Config
    rows: Mapping[str, Path]
    teachers: Mapping[str, Taught]
    start: Config
    teacher: Config
    student: Config
    model: Path | None = None
    pool: str | None = None

    @property
    def is_classifier(self) -> bool:
        return self.model is None

    def tree(self, out: Path, rows: str, **sections: Any) -> Config:
        return {
            "output_dir": str(out),
            "task": {**self.task, "train_files": str(self.rows[rows])},
            "seed": 1,
            "eval": {"latency": False, "per_device_eval_batch_size": 50},
            "save": {"save_steps": 10**6},
            "log": {"logging_steps": 50, "report_to": []},
            **sections,
        }


def classifier(name: str, data: Path, out: Path) -> Setting:
    known, folder = SETTINGS[name if name in SETTINGS else f"{name}-few"], out / name
    splits = known.splits(data)
    files = {split: folder / f"{split}.csv" for split in ("validation", "test", "student")}
    rows = {kind: folder / f"{kind}.csv" for kind in ("all", "few", "wrong")}
    labelled = by_turns(splits["train"])
    rng, labels = random.Random(0), sorted({label for _, label in labelled})
    wrong = [(t, rng.choice(labels) if rng.random() < 0.4 else one) for t, one in labelled]
    kinds = {"all": labelled, "few": labelled[: len(labelled) // 4], "wrong": wrong}
    for path, content in [
        *((rows[kind], kinds[kind]) for kind in rows),
        (files["student"], splits["train"]),
        (files["validation"], splits["validation"][:300]),
        (files["test"], splits["test"][:600]),
    ]:
        if not path.is_file():
            write_labelled(path, content)
    task = {"type": "classification", "text_columns": ["text"], "label_column": "label"}
    train = train_section(32, 300, 5e-3, warmup_ratio=0.1)
    return Setting(
        name=name,
        task={
            **task,
            "validation_files": str(files["validation"]),
            "test_files": str(files["test"]),
            "max_length": 32,
            "tokenizer": str(vocabulary(folder, [text for text, _ in splits["train"]])),
        },
        rows={**rows, "student": files["student"]},
        teachers=CLASSIFIERS,
        start={"model": bert_of("1x64")},
        teacher={**train, "max_steps": 300},
        student={**train, "max_steps": 150},
    )


def vocabulary(folder: Path, texts: Sequence[str]) -> Path:
    """Return the folder of a tokenizer that is trained on the texts, once."""
    from megakd.data.vocabularies import train_tokenizer

    path = folder / "tokenizer"
    if not path.is_dir():
        made = train_tokenizer(lambda: texts, kind="wordpiece", vocab_size=4000, for_encoder=True)
        made.save_pretrained(path)
    return path


def bert_of(size: str) -> Config:
    layers, width = sizes_of(size)
    return {"config": bert(layers, width, width // 32, initializer_range=0.1, **NO_DROPOUT)}


def by_turns(rows: Rows) -> Rows:
    """Return the rows such that any beginning has nearly as many rows of every class."""
    seen, ordered = dict[str, int](), list[tuple[int, tuple[str, str]]]()
    for text, label in rows:
        seen[label] = seen.get(label, 0) + 1
        ordered.append((seen[label], (text, label)))
    return [row for _, row in sorted(ordered, key=lambda one: one[0])]


def decoder(name: str, data: Path, out: Path) -> Setting:
    folder = out / name
    stories.write_stories_tokenizer(data, out)
    if name == "stories":
        texts = json.loads((data / stories.STORIES).read_text(encoding="utf-8"))
        texts = [one if isinstance(one, str) else one["text"] for one in texts]
    else:
        file = next((data / "lm/tinyshakespeare").glob("*.txt"))
        texts = list(pieces(file.read_text(encoding="utf-8"), 1000))
    random.Random(0).shuffle(texts)
    parts = {"validation": texts[:40], "test": texts[40:120], "all": texts[120:]}
    for split, part in parts.items():
        if not (folder / f"{split}.jsonl").is_file():
            write_jsonl(folder / f"{split}.jsonl", ({"text": text} for text in part))
    train = {**stories.TRAIN, "lr_scheduler_type": "cosine"}
    return Setting(
        name=name,
        task={
            "type": "causal_lm",
            "validation_files": str(folder / "validation.jsonl"),
            "test_files": str(folder / "test.jsonl"),
            "text_columns": ["text"],
            "max_length": 256,
            "tokenizer": str(stories.tokenizer(out)),
        },
        rows={"all": folder / "all.jsonl", "student": folder / "all.jsonl"},
        teachers=DECODERS,
        start={"model": str(data / stories.MODEL / "hf"), "layers": [1, 5]},
        teacher={**train, "max_steps": 200 if name == "stories" else 80},
        student={**train, "max_steps": 100 if name == "stories" else 60},
        model=data / stories.MODEL / "hf",
    )


def pool(setting: Setting, out: Path) -> Path:
    return out / (setting.pool or setting.name)


def teacher_run(setting: Setting, name: str, out: Path) -> Config:
    one = setting.teachers[name]
    if setting.model is None:
        model: Config = {"model": bert_of(one.size)}
    elif one.size != "0":
        model = {"model": str(setting.model), "layers": int(one.size)}
    else:
        config = json.loads((setting.model / "config.json").read_text(encoding="utf-8"))
        model = {"model": {"config": {key: config[key] for key in SHAPE}}}
    train = {**setting.teacher, "max_steps": round(one.steps * setting.teacher["max_steps"])}
    folder = pool(setting, out) / f"teacher-{name}"
    student = {**model, "deepspeed": "zero0"}
    return setting.tree(folder, one.rows, student=student, method={"name": "finetune"}, train=train)


def student_run(setting: Setting, names: Sequence[str], out: Path) -> Config:
    """Return the run of the student of a teacher; of all teachers, only to be matched."""
    folder = out / setting.name / f"student-{'-'.join(names)}"
    trained = {name: pool(setting, out) / f"teacher-{name}/final" for name in names}
    # A teacher without steps is the pretrained model.
    models = {n: trained[n] if setting.teachers[n].steps else setting.model for n in names}
    return setting.tree(
        folder,
        "student",
        teachers=[
            {"name": n, "model": str(models[n]), "deepspeed": "teacher_zero0"} for n in names
        ],
        student={**setting.start, "deepspeed": "zero0"},
        method={"name": "mean_of_teachers"},
        train=setting.student,
    )


def outcomes(setting: Setting, out: Path, until: float) -> dict[str, float]:
    """Return the test score of the student of every teacher; those that there is time for."""
    import megakd

    made: dict[str, float] = {}
    for name, one in setting.teachers.items():
        folder = out / setting.name / f"student-{name}"
        if time.monotonic() > until and not (folder / "report.json").is_file():
            print(f"{setting.name} {name}: no time left", flush=True)
            continue
        began = time.monotonic()
        if one.steps:
            megakd.train(teacher_run(setting, name, out))
        report = megakd.train(student_run(setting, [name], out)).report
        metrics = report["student"]["metrics"]
        made[name] = metrics["accuracy"] if setting.is_classifier else -metrics["loss"]
        teacher = report["teacher"]["metrics"]["loss"]
        seconds = time.monotonic() - began
        print(f"{setting.name} {name}: {made[name]:.4f}, teacher's loss {teacher:.3f}, "
              f"{seconds:.0f} s", flush=True)  # fmt: skip
    return made


def scores(setting: Setting, names: Sequence[str], out: Path) -> dict[str, dict[str, float]]:
    """Return the scores of `match` by teacher, computed once."""
    path = out / setting.name / f"scores-{'-'.join(names)}.json"
    if not path.is_file():
        from megakd.api import load_config
        from megakd.commands.matched_models import match_models
        from megakd.engine import distributed

        distributed.keep_group()
        matched = match_models(load_config(student_run(setting, names, out)))
        keys = ("gap", "kl", "entropy", "same_top", "overlap")
        teachers = {
            name: {"accuracy": row["metrics"]["accuracy"], **{key: row[key] for key in keys}}
            for name, row in matched["teachers"].items()
        }
        path.write_text(json.dumps(teachers, indent=1), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


Correlations = dict[str, dict[str, float]]
"""Spearman's correlation with the outcomes, by setting and score."""


def correlations(outcome: Mapping[str, float], scored: Mapping[str, Mapping[str, float]]) -> Any:
    names = [name for name in outcome if name in scored]
    wanted = [outcome[name] for name in names]
    keys = next(iter(scored.values()))
    return {key: float(spearmanr([scored[n][key] for n in names], wanted)[0]) for key in keys}


def chosen(known: Correlations) -> tuple[str, float]:
    """Return the score with the largest mean correlation in the choosing half, and its sign."""
    half = [known[name] for name in CHOOSING if name in known]
    means = {key: fmean(np.nan_to_num([one[key] for one in half])) for key in half[0]}
    best = max(means, key=lambda key: abs(means[key]))
    return best, float(np.sign(means[best]))


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    until = time.monotonic() + 60 * given.minutes
    known: Correlations = {}
    for name in given.settings:
        setting = setting_of(name, given)
        outcome = outcomes(setting, given.out, until)
        if len(outcome) > 2:
            scored = scores(setting, list(outcome), given.out)
            known[name] = correlations(outcome, scored)
            lines = {n: {"outcome": outcome[n], **scored[n]} for n in outcome}
            print(table_of(name, {n: rounded(line) for n, line in lines.items()}), flush=True)
    print(table_of("rank correlation", {name: rounded(line) for name, line in known.items()}))
    if any(name in known for name in CHOOSING):
        tell(known, given.command)
    return 0


def tell(known: Correlations, command: str) -> None:
    score, sign = chosen(known)
    tests = {name: sign * known[name][score] for name in TESTING if name in known}
    if tests:
        each = (f"{name} {value:.2f}" for name, value in tests.items())
        words = ", ".join([f"mean {fmean(tests.values()):.2f}", *each])
        what = f"rank correlation with outcomes: {sign:+.0f} * {score}, chosen"
        print_rows(command, (what, words, "-"))


def rounded(line: Mapping[str, float]) -> dict[str, str]:
    return {key: f"{value:.4f}" for key, value in line.items()}


def setting_of(name: str, given: argparse.Namespace) -> Setting:
    if name == "stories-three":
        # The same teachers with a larger student, which learns for longer.
        known = setting_of("stories", given)
        student, start = {**known.student, "max_steps": 150}, {**known.start, "layers": [1, 3, 5]}
        return known._replace(name=name, start=start, student=student, pool=known.name)
    is_text = name in ("stories", "shakespeare")
    return (decoder if is_text else classifier)(name, given.data, given.out)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_runs(parser, "match", jobs=None, data="lm/, glue/, clinc150/, banking77/, weights/")
    known = (*CHOOSING, *TESTING)
    parser.add_argument("--settings", type=words_of(known), default=[*known])
    parser.add_argument("--minutes", type=float, default=40.0)
    given = parsed(parser, __name__, arguments)
    need([given.data])
    return given
