"""The defaults of `train` where a small decoder learns stories from its teacher: old ones and new.

`python benchmarks methods.story_defaults --data FOLDER [--seeds 1,2,3] [--steps 150]`, one process
on the CPU.

The Llama of llama2.c's stories260K teaches a student of three of its five layers by forward KL, for
equal steps. `before` are the defaults of Hugging Face's Trainer (linear from 5e-5, no warm-up),
`now` those of megakd (unset keys), and the others have its cosine from another rate. The losses are
in nats per token: of the validation rows, by which a rate is chosen, and of the test rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import megakd
from lib.data import write_jsonl
from lib.options import add_runs, need, parsed, parser_of
from lib.stories import PARTS, STORIES, stories_task, stories_teacher, write_stories_tokenizer
from lib.tables import columns_of, print_models

ARMS: dict[str, dict[str, Any]] = {
    "before": {"learning_rate": 5e-5, "lr_scheduler_type": "linear", "warmup_ratio": 0.0},
    "now": {},
    "1e-5": {"learning_rate": 1e-5},
    "2e-4": {"learning_rate": 2e-4},
    "1e-3": {"learning_rate": 1e-3},
}
SPLITS = {"train": 900, "validation": 40, "test": 60}


def main(arguments: Sequence[str]) -> int:
    parser = parser_of(__doc__)
    add_runs(parser, "story_defaults", jobs=1, data=" and ".join(map(str, PARTS)))
    parser.add_argument("--steps", type=int, default=150)
    given = parsed(parser, __name__, arguments)
    need(given.data / part for part in PARTS)
    write_stories_tokenizer(given.data, given.out)
    write_rows(given.data / STORIES, given.out / "rows")

    def losses(arm: str, seed: int) -> dict[str, float]:
        config = config_of(given.data, given.out, arm, seed, given.steps)
        report = megakd.train(config).report
        lines = (Path(config["output_dir"]) / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        last = [row for row in rows if row["stage"] == "student" and "eval/loss" in row][-1]
        return {"validation": last["eval/loss"], "test": math.log(report["student.perplexity"])}

    models = {arm: columns_of(given.seeds, lambda seed, arm=arm: losses(arm, seed)) for arm in ARMS}
    print_models("nats per token", given.command, models, reference="before")
    return 0


def write_rows(stories: Path, folder: Path) -> None:
    texts, first = json.loads(stories.read_text()), 0
    for split, count in SPLITS.items():
        write_jsonl(folder / f"{split}.jsonl", [{"text": t} for t in texts[first : first + count]])
        first += count


def config_of(data: Path, out: Path, arm: str, seed: int, steps: int) -> dict[str, Any]:
    task = {**stories_task(data, out), "dataset": str(out / "rows")}
    task.pop("max_eval_examples")
    return {
        "output_dir": str(out / f"{arm}-{seed}"),
        "seed": seed,
        "task": task,
        "teacher": stories_teacher(data),
        "student": {"model": "from_teacher", "layers": 3},
        "method": {"name": "single"},
        "objective": [{"loss": "soft_target_kl"}],
        "train": {"max_steps": steps, "per_device_train_batch_size": 4, **ARMS[arm]},
        "eval": {"latency": False, "eval_steps": steps},
        "log": {"report_to": []},
    }
