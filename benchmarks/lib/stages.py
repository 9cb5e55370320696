"""Steps of whole stages: a made-up case, the engines of a run, and pairs of steps by turns."""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lib.clocks import by_turns, timed
from lib.data import bert, sizes_of, write_labelled
from lib.launching import start_benchmark, write_config
from lib.options import parser_of
from lib.tables import spread_of
from megakd.config.file import load_config
from megakd.config.run import RunConfig
from megakd.contract.batch import Batch
from megakd.contract.stage import Constant, Pass, Stage
from megakd.engine.collectives import gather
from megakd.engine.distributed import Ranks
from megakd.engine.student import device_batch
from megakd.inputs.inputs import prepare
from megakd.run.main import started
from megakd.run.run_lab import RunLab
from megakd.teachers.frozen import FrozenTeacher
from megakd.training.progress import Reporter
from megakd.training.stage_run import StageRun

TEMPERATURE = 2.0
WEIGHTS = {"soft_target_kl": 0.5, "hard_cross_entropy": 0.5}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LABELS = ("bad", "fair", "good")
TRAINING_ROWS = 4096


def step_parser(about: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Return the parser of a benchmark of steps; sizes are layers x width."""
    parser = parser_of(about)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=4, help="pairs that do not count")
    parser.add_argument("--teacher", default="6x384", help="heads of 32")
    parser.add_argument("--student", default="3x192")
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--rows", type=int, default=16, help="of each rank's batch")
    parser.add_argument("--length", type=int, default=64, help="tokens of every row")
    parser.add_argument("--deepspeed", default="zero2", help="the student's preset")
    parser.add_argument("--teacher-deepspeed", default="teacher_zero3", help="the teacher's preset")
    parser.add_argument("--case", type=Path, help=argparse.SUPPRESS)
    parser.set_defaults(**defaults)
    return parser


def bert_model(size: str) -> dict[str, Any]:
    """Return a BERT from scratch; `6x384` is 6 layers of width 384, heads of 32."""
    layers, width = sizes_of(size)
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
        "teacher": {"model": bert_model(given.teacher), "deepspeed": given.teacher_deepspeed},
        "student": {"model": bert_model(given.student), "deepspeed": given.deepspeed},
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


Measure = Callable[[RunConfig, Ranks, argparse.Namespace], Any]


def on_ranks(
    module: str, given: argparse.Namespace, write: Callable[[Path], object], *words: str
) -> Any:
    """Return what all ranks of a benchmark have measured in a case of their own."""
    with tempfile.TemporaryDirectory(prefix="megakd-steps-") as name:
        write(Path(name))
        start_benchmark(module, [*given.arguments, "--case", name, *words], given.ranks)
        return json.loads((Path(name) / "measured.json").read_text(encoding="utf-8"))


def run_rank(given: argparse.Namespace, measure: Measure) -> None:
    """Measure on one rank, in the folder of the case; rank 0 writes what all have measured."""
    config = load_config(given.case / "run.yaml")
    with started(config) as ranks:
        measured = gather(measure(config, ranks, given))
        if ranks.is_main:
            (given.case / "measured.json").write_text(json.dumps(measured), encoding="utf-8")


class Bench:
    """The lab of a run, whose stages a benchmark takes step by step."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.config, self.prepared = config, prepare(config)
        self.reporter = Reporter(config.output_dir, is_main=ranks.is_main)
        self.lab = RunLab(config, self.prepared, ranks, self.reporter)

    def stage(self, name: str, teachers: Sequence[str], strategy: Any, **changes: Any) -> Stage:
        fields = {
            "objective": self.config.objective or (),
            "strategy": strategy,
            "train": self.config.train,
            "deepspeed": self.config.student.deepspeed,
        }
        return Stage(name=name, teachers=tuple(teachers), **fields | changes)

    def teacher(self, name: str, stage: Stage) -> FrozenTeacher:
        """Return the engine of a teacher, as `RunLab.train` opens it."""
        return self.lab.pool.open(name, stage)

    @contextmanager
    def runs(
        self, stages: Sequence[Stage], teachers: dict[str, Any], kind: type[StageRun] = StageRun
    ) -> Iterator[list[Any]]:
        """Build the students' engines, and free them and those of the teachers at the end."""
        with ExitStack() as stack:
            for teacher in teachers.values():
                stack.callback(teacher.destroy)
            runs = list[StageRun]()
            for stage in stages:
                # The assembly knows the teachers that are ready.
                runs.append(
                    kind(
                        stage,
                        self.lab.assembly,
                        teachers=teachers,
                        reporter=self.reporter,
                        fingerprint={},
                    )
                )
                stack.callback(runs[-1].close)
            yield runs


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
        """Count from 0 again."""
        self._made = 0

    def wait_for(self, batches: int) -> None:
        """Block until so many are made."""
        with self._changed:
            self._changed.wait_for(lambda: self._made >= batches)


class MeasuredStage(StageRun):
    """A stage whose loop hands over after every step."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        loader: Any = self.source
        self.watched = loader._collate = WatchedCollate(loader._collate)  # noqa: SLF001

    def steps_one_by_one(self) -> Iterator[None]:
        """Run the body of `run` between the start and the end of a stage."""
        if self.ranks.is_main:
            self.reporter.begin(self.stage.name, self.extent(0))
        self.health.begin()
        for report in self.trainer.fit(self._on_device(0)):
            self._after_step(report)
            yield


@contextmanager
def measured_stage(config: RunConfig, ranks: Ranks) -> Iterator[tuple[MeasuredStage, Any]]:
    """Build the stage that `single` plans and its teacher, and free both at the end."""
    bench = Bench(config, ranks)
    name = bench.lab.teacher()
    stage = bench.stage("student", [name], Constant((Pass(teacher=name),)))
    teacher = bench.teacher(name, stage)
    with bench.runs([stage], {name: teacher}, MeasuredStage) as (run,):
        yield run, teacher


def alternated(runs: Sequence[StageRun], given: argparse.Namespace) -> list[list[float]]:
    """Return the CPU seconds of the steps of all runs on the same batches, without the warm-up."""
    first, count = runs[0], given.warm_up + given.pairs
    batches = [
        [device_batch(batch, first.ranks.device) for batch in first.source.step(index)]
        for index in range(count)
    ]

    def step(run: StageRun, index: int) -> float:
        return timed(partial(run.trainer.train_step, batches[index])).cpu

    return by_turns([partial(step, run) for run in runs], given.pairs, warm_up=given.warm_up)


class Ratio(NamedTuple):
    """A ratio of CPU times, as text: its median, its interval, and the seconds behind it.

    least: of the fastest steps of every rank.
    """

    median: float
    between: str
    least: float
    milliseconds: str


def ratio_over_ranks(by_rank: Sequence[Sequence[Sequence[float]]]) -> Ratio:
    """Return the ratio of the first step of all pairs over the second, of the sums over ranks."""
    columns = list(zip(*by_rank, strict=True))
    spread = spread_of([sum(a for a, _ in one) / sum(b for _, b in one) for one in columns])
    least = [sum(min(pair[side] for pair in rank) for rank in by_rank) for side in (0, 1)]
    ms = [1000 * spread_of([pair[side] for pair in by_rank[0]]).median for side in (0, 1)]
    milliseconds = f"{ms[0]:.0f} against {ms[1]:.0f} ms of rank 0"
    return Ratio(spread.median, spread.between(), least[0] / least[1], milliseconds)
