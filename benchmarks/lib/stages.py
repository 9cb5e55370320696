"""Steps of whole stages: a made-up case, and the engines of a run."""

from __future__ import annotations

import argparse
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from lib.data import bert, write_labelled
from lib.launching import write_config
from lib.options import parser_of
from megakd.config.run import RunConfig
from megakd.data.batch import Batch, Pass
from megakd.engine.distributed import Ranks
from megakd.run.run_work import RunWork
from megakd.stage import Constant, Stage
from megakd.training.inputs import prepare
from megakd.training.lab import Lab
from megakd.training.log import Reporter
from megakd.training.stage_run import STOP, StageRun

TEMPERATURE = 2.0
WEIGHTS = {"soft_target_kl": 0.5, "hard_cross_entropy": 0.5}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LABELS = ("bad", "fair", "good")
TRAINING_ROWS = 4096


def step_parser(about: str | None, **defaults: Any) -> argparse.ArgumentParser:
    parser = parser_of(about)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=4, help="pairs that do not count")
    parser.add_argument("--teacher", default="6x384", help="heads of 32")
    parser.add_argument("--student", default="3x192")
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--rows", type=int, default=16, help="of each rank's batch")
    parser.add_argument("--length", type=int, default=64, help="tokens of every row")
    parser.add_argument("--case", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(**defaults)
    return parser


def bert_model(size: str) -> dict[str, Any]:
    """Return a BERT from scratch; `6x384` is 6 layers of width 384, heads of 32."""
    layers, width = map(int, size.split("x"))
    return {"config": bert(layers, width, max(1, width // 32), num_labels=len(LABELS))}


def write_case(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Write texts of one length, a vocabulary and run.yaml; return the run config."""
    words = [f"w{number:06d}" for number in range(given.vocabulary - len(SPECIAL))]
    tokenizer, data, rng = folder / "tokenizer", folder / "data", random.Random(0)
    tokenizer.mkdir()
    (tokenizer / "vocab.txt").write_text("\n".join([*SPECIAL, *words]) + "\n", encoding="utf-8")
    for split, count in (("train", TRAINING_ROWS), ("validation", 32)):
        # With the two special tokens, a row has as many tokens as the case says.
        texts = (" ".join(rng.choices(words, k=given.length - 2)) for _ in range(count))
        write_labelled(data / f"{split}.csv", ((text, rng.choice(LABELS)) for text in texts))
    tree = case_config(folder, given)
    write_config(folder / "run.yaml", tree)
    return tree


def case_config(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Return the run config: the quickstart's engines, no evaluation and no save within reach."""
    soft, hard = ({"loss": loss, "weight": weight} for loss, weight in WEIGHTS.items())
    return {
        "output_dir": str(folder / "run"),
        "task": {
            "type": "classification",
            "dataset": str(folder / "data"),
            "text_columns": ["text"],
            "label_column": "label",
            "max_length": given.length,
            "tokenizer": str(folder / "tokenizer"),
        },
        "teacher": {"model": bert_model(given.teacher), "deepspeed": "teacher_zero3"},
        "student": {"model": bert_model(given.student), "deepspeed": "zero2"},
        "method": {"name": "single"},
        "objective": [{**soft, "temperature": TEMPERATURE}, hard],
        "train": {
            "per_device_train_batch_size": given.rows,
            "max_steps": 10**6,
            "learning_rate": 1e-4,
        },
        "save": {"save_steps": 10**6},
        "log": {"logging_steps": 10},
    }


class WatchedCollate:
    """Counts the batches that are made, so that one can wait for the loader's thread."""

    def __init__(self, collate: Callable[..., Batch]) -> None:
        self._collate, self._made = collate, 0
        self._changed = threading.Condition()

    def __call__(self, rows: object, *, dummy_rows: int = 0) -> Batch:
        batch = self._collate(rows, dummy_rows=dummy_rows)
        with self._changed:
            self._made += 1
            self._changed.notify_all()
        return batch

    def forget(self) -> None:
        self._made = 0

    def wait_for(self, batches: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._made >= batches)


class MeasuredStage(StageRun):
    """A stage whose loop hands over after every step."""

    def __init__(self, *arguments: Any, reporter: Reporter, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.reporter = reporter
        loader: Any = self.batch_source
        self.watched = loader._collate = WatchedCollate(loader._collate)  # noqa: SLF001

    def steps_one_by_one(self) -> Iterator[None]:
        """Take the steps of `run_stage`, without evaluations and saves, which are never due."""
        epoch = self.batch_source.steps_per_epoch
        self.reporter.begin(self.stage.name, 0, last=self.last_step, steps_per_epoch=epoch)
        self.meter.begin()
        with closing(self.batches(0)) as every:
            for step, batches in enumerate(every, start=1):
                self.meter.add(self.trainer.train_step(batches))
                self.reporter.advance(step)
                if step % self.config.log.logging_steps == 0:
                    self.log(step, self.reporter)
                self.votes.any(STOP)
                yield


@contextmanager
def measured_stage(config: RunConfig, ranks: Ranks) -> Iterator[tuple[MeasuredStage, Any]]:
    """Build the stage that `single` plans and its teacher, and free both at the end."""
    reporter = Reporter(config.output_dir, is_main=ranks.is_main)
    lab = Lab(RunWork(prepare(config), ranks, reporter))
    name = lab.teacher()
    stage = Stage(
        name="student",
        teachers=(name,),
        objective=config.objective or (),
        strategy=Constant((Pass(teacher=name),)),
        train=config.train,
    )
    with ExitStack() as stack:
        teacher = lab.work.pool.open(name, stage)
        stack.callback(teacher.destroy)
        # The assembly knows the teachers that are ready.
        run = MeasuredStage(stage, lab.work.assembly, teachers={name: teacher}, reporter=reporter)
        stack.callback(run.close)
        yield run, teacher
