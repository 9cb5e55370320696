"""Time that a save takes from the training: written beside the next steps, or between two steps.

`python benchmarks speed.saves [--ranks 1] [--pairs 5] [--steps 16] [--student 24x1024]`, on CPU
ranks; 333M weights and 4 GB a save by default.

A round is three blocks of steps in changing order: one without a save, one that begins with a save
between two steps, and one that begins with a save beside the steps and ends when the checkpoint has
its name. A save takes from training what its block is longer than the block without.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from lib import stages
from lib.clocks import Clocks, by_turns, over_ranks, timed
from lib.options import parsed, positive
from lib.tables import print_rows, spread_of
from megakd.config.run import RunConfig
from megakd.engine.distributed import Ranks
from megakd.training.checkpoint import CheckpointWriter

NONE, BETWEEN, BESIDE = "no save", "between two steps", "beside the steps"


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    if given.case is not None:
        stages.run_rank(given, measure)
        return 0
    by_rank = stages.on_ranks(__name__, given, partial(stages.write_case, given=given))
    show(over_ranks([rank["rounds"] for rank in by_rank]), by_rank, given)
    return 0


def measure(config: RunConfig, ranks: Ranks, given: argparse.Namespace) -> dict[str, Any]:
    with stages.measured_stage(config, ranks) as (stage, _):
        steps = stage.steps_one_by_one()

        def side(save: str) -> Any:
            return lambda _: timed(partial(block, stage, steps, given.steps, save=save))

        rounds = by_turns([*map(side, (NONE, BETWEEN, BESIDE))], given.pairs, warm_up=1)
        checkpoint = next(stage.checkpoints.folder.glob("step-*"))
        return {
            "rounds": rounds,
            "bytes": sum(path.stat().st_size for path in checkpoint.iterdir()),
        }


def block(stage: stages.MeasuredStage, steps: Iterator[None], count: int, *, save: str) -> None:
    """Take steps, beginning with a save."""
    if save != NONE:
        stage.saves = CheckpointWriter(stage.checkpoints, beside=save == BESIDE)
        stage._save(stage.trainer.step, is_last=False)  # noqa: SLF001 - as the stage does
    for _ in range(count):
        next(steps)
    stage.saves.publish()


def show(
    rounds: Sequence[Sequence[Clocks]],
    by_rank: Sequence[dict[str, Any]],
    given: argparse.Namespace,
) -> None:
    size = f"{by_rank[0]['bytes'] / 1e9:.2f} GB"
    alone = spread_of([one[0].wall for one in rounds])
    print(f"{given.steps} steps without a save: {alone.median:.1f} s")
    rows = []
    for number, name in enumerate((BETWEEN, BESIDE), start=1):
        longer = spread_of([one[number].wall - one[0].wall for one in rounds])
        print(f"a save {name} of {size} takes {longer.median:.2f} s ({longer.between(2)})")
        what = f"save of {size} {name}, {given.ranks} rank(s), student {given.student}"
        rows.append((what, f"{longer.median:.2f} s", f"95 %: {longer.between(2)}"))
    print_rows(given.command, *rows)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    sizes = {"student": "24x1024", "teacher": "1x64", "rows": 2, "length": 16}
    parser = stages.step_parser(__doc__, ranks=1, pairs=5, **sizes)
    parser.add_argument("--steps", type=positive, default=16, help="of a block")
    return parsed(parser, __name__, arguments)
