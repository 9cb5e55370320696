"""Two ways of taking a step, by turns in one process: what the first costs beside the second.

`python benchmarks/paired_steps.py [pool kinds] [--pairs 20] [--ranks 2]`, on CPU ranks.

* pool: a teacher drawn out of five of one size, against one of them alone.
* kinds: features and relations left out, against all four kinds of knowledge.

Both engines take whole steps of megakd's trainer, teacher, losses, backward and update, on the same
batches; who goes first changes with every pair. CPU time is that of all threads of a rank; a
pair's ratio is of the mean over the ranks. Resident memory is that of rank 0.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import yaml
from launching import start_ranks
from machine import markdown_row, print_row, spread_of
from overhead_case import case_config, write_case
from timed_ranks import read, run_rank, timed

from megakd.contract.stage import Constant, Pass, Stage
from megakd.engine.distributed import Ranks
from megakd.engine.student import device_batch
from megakd.inputs.inputs import prepare
from megakd.methods.skdbert import Drawn
from megakd.run.lab import Lab
from megakd.training.progress import Reporter
from megakd.training.stage_run import StageRun

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megakd.config.run import RunConfig

TEACHERS = 5
WHAT = {
    "pool": f"a step with one drawn of {TEACHERS} teachers against one with a single teacher",
    "kinds": "a step without features and relations against one with all four kinds",
}
LEFT_OUT = {"hidden_mse": 0.0, "relation_fsp": 0.0}


def main(arguments: Sequence[str]) -> int:
    """Measures each comparison with ranks of its own, or is one of them."""
    given = parse(arguments)
    if given.case is not None:
        run_rank(given, measured)
        return 0
    for what in given.what:
        with tempfile.TemporaryDirectory(prefix="megakd-steps-") as name:
            write_run(Path(name), given, what)
            options = [*given.options, "--case", name, what]
            code = start_ranks(Path(__file__), options, given.ranks)
            if code != 0:
                return code
            show(read(Path(name)), given, what)
    return 0


def write_run(folder: Path, given: argparse.Namespace, what: str) -> None:
    """The overhead's case with five teachers, or with four kinds of knowledge."""
    write_case(folder, given)
    tree = case_config(folder, given)
    if what == "pool":
        teacher = tree.pop("teacher")
        tree["teachers"] = [{"name": f"t{number}", **teacher} for number in range(TEACHERS)]
        tree["method"] = {"name": "skdbert"}
    else:
        tree["objective"] += [{"loss": loss} for loss in LEFT_OUT]
    (folder / "run.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


def measured(config: RunConfig, ranks: Ranks, given: argparse.Namespace) -> list[Any]:
    """This rank's seconds of both steps, without those of the warm-up; the last is of memory."""
    reporter = Reporter(config.output_dir, is_main=ranks.is_main)
    lab = Lab(config, prepare(config), ranks, reporter)
    names = tuple(map(lab.teacher, lab.config.teacher_specs))
    first, second = (stage_of(config, names, strategy) for strategy in strategies(names, given))
    before = psutil.Process().memory_info().rss
    held = {name: lab.pool.open(name, first) for name in names}
    idle = (psutil.Process().memory_info().rss - before) / len(names)
    assembly = lab.assembly  # knows the teachers that are ready
    runs = [
        StageRun(stage, assembly, teachers=held, reporter=reporter, fingerprint={})
        for stage in (first, second)
    ]
    pairs: list[Any] = []
    for index in range(given.warm_up + given.pairs):
        batches = [device_batch(b, ranks.device) for b in runs[0].source.step(index)]
        order = runs if index % 2 else runs[::-1]
        seconds = [timed(run, batches) for run in order]
        pairs.append(seconds if index % 2 else seconds[::-1])
    for run in runs:
        run.close()
    return [*pairs[given.warm_up :], idle]


def strategies(names: Sequence[str], given: argparse.Namespace) -> tuple[Any, Any]:
    """The two sides of the comparison."""
    alone = Constant((Pass(teacher=names[0]),))
    if given.what == ["pool"]:
        return Drawn(tuple(names), (1 / len(names),) * len(names), seed=1), alone
    return Constant((Pass(teacher=names[0], weights=LEFT_OUT),)), alone


def stage_of(config: RunConfig, names: Sequence[str], strategy: Any) -> Stage:
    """A student's stage; both have all teachers in memory."""
    return Stage(
        name="student",
        teachers=tuple(names),
        objective=config.objective or (),
        strategy=strategy,
        train=config.train,
        deepspeed=config.student.deepspeed,
    )


def show(by_rank: Sequence[Any], given: argparse.Namespace, what: str) -> None:
    """The ratio with its interval, and the row for docs/measurements.md."""
    pairs = list(zip(*(rank[:-1] for rank in by_rank), strict=True))
    ratios = [sum(a for a, _ in pair) / sum(b for _, b in pair) for pair in pairs]
    spread = spread_of(ratios)
    low, high = spread.interval
    steps = [spread_of([pair[index] for pair in by_rank[0][:-1]]).median for index in (0, 1)]
    numbers = f"CPU time {spread.median:.3f} ({1000 * steps[0]:.0f} against "
    numbers += f"{1000 * steps[1]:.0f} ms of rank 0)"
    if what == "pool":
        numbers += f"; a teacher adds {by_rank[0][-1] / 1e6:.1f} MB to rank 0"
    print(f"{WHAT[what]}: {numbers}, 95 %: {low:.3f} to {high:.3f}", flush=True)
    size = f"{given.ranks} rank(s), teacher {given.teacher} {given.teacher_deepspeed}, student "
    size += f"{given.student} {given.deepspeed}, {given.rows} x {given.length} tokens"
    row = markdown_row(
        f"{WHAT[what]}, {size}", given.command, numbers, f"95 %: {low:.3f} to {high:.3f}"
    )
    print_row(row)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; sizes are layers x width."""
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", nargs="*", choices=[*WHAT, []], help="default: both")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=4, help="pairs that do not count")
    parser.add_argument("--teacher", default="6x384", help="of every teacher, heads of 32")
    parser.add_argument("--student", default="3x192")
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--rows", type=int, default=16, help="of each rank's batch")
    parser.add_argument("--length", type=int, default=64, help="tokens of every row")
    parser.add_argument("--deepspeed", default="zero2", help="the student's preset")
    parser.add_argument("--teacher-deepspeed", default="teacher_zero3", help="the teachers'")
    parser.add_argument("--case", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    given.what = given.what or list(WHAT)
    given.options = [word for word in arguments if word not in WHAT]
    given.command = shlex.join(["python", "benchmarks/paired_steps.py", *arguments])
    return given


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
