"""An instruct model that people know, cut to two sizes: shrink against plain ways, at equal time.

`python benchmarks methods.instruct --data FOLDER [--sizes 100M,80M] [--steps 240] [--seeds 1]
[--rates 1e-4,3e-4,6e-4]`, on the CPU (hours), or with `DS_ACCELERATOR=cuda` on a GPU, one rank. The
package index must be reachable at the first start.

The teacher is SmolLM2-135M-Instruct, as its quantised package has it. `shrink` cuts it to a size,
and repairs it on conversations about mathematics and stories. For as many seconds each: `layers`
keeps the most important layers whole and distils with megakd, `bare` and `trl` distil the same cut
with a loop in PyTorch and with TRL's GKDTrainer (if it is installed), `random` distils the shape of
`shrink` from random weights. `cut` is the cut without repair. All learn from forward KL in bf16
with the same rate; of several rates, the one with which the bare loop, for `--rate_seconds` from
evenly spaced layers, comes nearest to the teacher on the validation rows. Held-out loss and KL to
the teacher are of the answers in nats per token. Each run has a folder below `--out`, is gone on
with where it was, and is done once. The runs of a seed take turns, `--jobs` seeds side by side;
with other seeds beside them, the seconds of all are longer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lib import instruct
from lib.launching import (
    BENCHMARKS,
    Leg,
    RunFailedError,
    device,
    leg_of,
    records_of,
    report_of,
    seconds_of,
    stage_of,
    variables,
    write_leg_configs,
)
from lib.options import add_runs, fractions, need, parsed, parser_of
from lib.tables import columns_of, print_models
from megakd.methods.shrink import Parameters
from megakd.models.views import evenly_spaced, most_important
from megakd.process.files import replaced_folder
from methods.instruct_loops import DONE

HELD_OUT = ("maths", "stories")
LOADING = threading.Lock()
"""transformers changes torch's default dtype while it loads a model, for all threads."""


class Made(NamedTuple):
    """The folder of a student, and what its training took."""

    folder: Path
    steps: int
    seconds: float


class Size(NamedTuple):
    """A size of the student.

    name: as in the option. layers: how many layers of the teacher have about as many weights.
    """

    name: str
    layers: int


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    need(given.data / part for part in instruct.PARTS)
    given.teacher = instruct.write_model(given.out / "teacher")
    instruct.write_rows(given.data, given.out / "rows")
    given.sizes = [*sizes_of(given)]
    given.rate = best_rate(given)
    write_leg_configs(given.out, configs(given))
    scores = {"teacher": {0: score(given, "teacher", given.teacher)}}
    with ThreadPoolExecutor(given.jobs) as pool:
        of_seeds = pool.map(partial(scored, given), given.seeds)
        for seed, of_seed in zip(given.seeds, of_seeds, strict=True):
            for name, numbers in of_seed.items():
                scores.setdefault(name, {})[seed] = numbers
    models = {name: columns_of(by_seed, by_seed.__getitem__) for name, by_seed in scores.items()}
    what = f"SmolLM2-135M-Instruct, {given.steps} steps of {given.batch} conversations"
    print_models(what, given.command, models, reference=[*models][1])
    return 0


def scored(given: argparse.Namespace, seed: int) -> dict[str, dict[str, float]]:
    models = {}
    for size in given.sizes:
        for arm in given.runs:
            made = MAKERS.get(arm, distilled)(given, arm, size, seed)
            cost = {"steps": made.steps, "seconds": made.seconds}
            scores = score(given, f"{arm}-{size.name}-{seed}", made.folder)
            models[f"{arm} {size.name}"] = {**scores, **cost}
    return models


def sizes_of(given: argparse.Namespace) -> Iterator[Size]:
    """Yield the sizes with the number of layers that is nearest to each."""
    shape = AutoConfig.from_pretrained(given.teacher)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape)
    layer = sum(weight.numel() for weight in model.model.layers[0].parameters())
    rest = model.num_parameters() - layer * shape.num_hidden_layers
    for name in given.names:
        yield Size(name, round((TypeAdapter(Parameters).validate_python(name) - rest) / layer))


def best_rate(given: argparse.Namespace) -> float:
    """Return the rate with which a short run on evenly spaced layers ends nearest to the teacher.

    It is chosen once, on the validation rows.
    """
    if len(given.rates) == 1:
        return given.rates[0]
    depth = AutoConfig.from_pretrained(given.teacher).num_hidden_layers
    start = given.out / "rates" / "start"
    if not start.exists():
        write_cut(given, evenly_spaced(depth, given.sizes[0].layers), start)
    with ThreadPoolExecutor(given.jobs) as pool:
        tries = pool.map(partial(tried, given, start), given.rates)
        losses = dict(zip(given.rates, tries, strict=True))
    print(f"KL on the validation rows by rate: {losses}", flush=True)
    return min(losses, key=losses.__getitem__)


def tried(given: argparse.Namespace, start: Path, rate: float) -> float:
    """Return the divergence on the validation rows after a short run with a rate."""
    folder = given.out / "rates" / f"{rate:g}"
    if not (folder / DONE).is_file():
        run_loop(given, "bare", start, folder, rate=rate, seconds=given.rate_seconds)
    return score(given, f"rate-{rate:g}", folder, names=("validation",))["KL, validation"]


def configs(given: argparse.Namespace) -> dict[str, Any]:
    rows = given.out / "rows"
    shared = {
        "task": {
            "type": "causal_lm",
            "train_files": str(rows / "train.jsonl"),
            "validation_files": str(rows / "validation.jsonl"),
            "max_length": instruct.MAX_LENGTH,
        },
        "teacher": {"model": str(given.teacher), "dtype": "bf16"},
        "objective": [{"loss": "soft_target_kl"}],
        "train": {
            "max_steps": given.steps,
            "per_device_train_batch_size": given.batch,
            "learning_rate": given.rate,
            "lr_scheduler_type": "cosine",
            "warmup_ratio": 0.03,
            "bf16": True,
        },
        "eval": {"latency": False, "losses": True},
    }
    return {
        "shrink": {
            **shared,
            "student": {"model": "from_teacher"},
            "method": {"name": "shrink", "parameters": given.names[0]},
        },
        "single": {**shared, "student": {"model": "-"}, "method": {"name": "single"}},
    }


def shrink_leg(given: argparse.Namespace, size: Size, seed: int) -> Leg:
    words = (f"method.parameters={size.name}", f"seed={seed}")
    return leg_of(given.out, f"shrink-{size.name}-{seed}", "shrink", words)


def shrunk(given: argparse.Namespace, arm: str, size: Size, seed: int) -> Made:
    del arm
    return trained(given, shrink_leg(given, size, seed), given.steps)


def cut(given: argparse.Namespace, arm: str, size: Size, seed: int) -> Made:
    """Return the teacher's most important layers, as they are."""
    folder = given.out / f"{arm}-{size.name}-{seed}"
    if not folder.exists():
        leg = shrink_leg(given, size, seed)
        report_of(leg, ranks=1, jobs=given.jobs)
        measured = json.loads((leg.output / "stages/layers/result.json").read_text())["metrics"]
        scores = [measured[f"layer_{number}"] for number in range(1, len(measured) + 1)]
        write_cut(given, most_important(scores, size.layers), folder)
    return Made(folder, 0, 0.0)


def write_cut(given: argparse.Namespace, layers: Sequence[int], folder: Path) -> None:
    """Write some of the teacher's layers, counted from 1, as they are."""
    with LOADING:
        model = AutoModelForCausalLM.from_pretrained(given.teacher, dtype=torch.float32)
    model.model.layers = torch.nn.ModuleList([model.model.layers[n - 1] for n in layers])
    model.config.num_hidden_layers = len(layers)
    with replaced_folder(folder) as written:
        AutoTokenizer.from_pretrained(given.teacher).save_pretrained(written)
        model.save_pretrained(written)


def distilled(given: argparse.Namespace, arm: str, size: Size, seed: int) -> Made:
    """Return a student that megakd distils for as long as `shrink` takes."""
    if arm == "layers":
        student = f"student.model={cut(given, 'cut', size, seed).folder}"
    else:
        like = shrunk(given, "shrink", size, seed).folder
        shape = json.loads((like / "config.json").read_text())
        student = f"student.model={json.dumps({'config': shape})}"
    steps = steps_for(given, size, seed)
    words = (student, f"train.max_steps={steps}", f"seed={seed}")
    return trained(given, leg_of(given.out, f"{arm}-{size.name}-{seed}", "single", words), steps)


def steps_for(given: argparse.Namespace, size: Size, seed: int) -> int:
    """Return the steps of a student in all of the seconds of `shrink`.

    Evaluations before the first step and after the last one take as long for any number of steps.
    """
    leg = shrink_leg(given, size, seed)
    report = report_of(leg, ranks=1)
    stage, seconds = stage_of(report, "student"), sum(seconds_of(report).values())
    times = {
        record["step"]: record["time"]
        for record in records_of(leg.output)
        if record["stage"] == "student" and "train/loss" in record
    }
    # The median: a leg that was stopped has its pause between two records.
    pairs = pairwise(sorted(times.items()))
    each = [(ended - began) / (last - first) for (first, began), (last, ended) in pairs]
    step = statistics.median(each) if each else stage["seconds"] / stage["steps"]
    return stage["steps"] + round((seconds - stage["seconds"]) / step)


def trained(given: argparse.Namespace, leg: Leg, steps: int) -> Made:
    report = report_of(leg, ranks=1, jobs=given.jobs)
    return Made(leg.output / "final", steps, sum(seconds_of(report).values()))


def looped(given: argparse.Namespace, arm: str, size: Size, seed: int) -> Made:
    """Return a student of another loop, which starts from `cut`."""
    folder = given.out / f"{arm}-{size.name}-{seed}"
    if not (folder / DONE).is_file():
        start = cut(given, "cut", size, seed).folder
        seconds = shrunk(given, "shrink", size, seed).seconds
        run_loop(given, arm, start, folder, rate=given.rate, seconds=seconds, seed=seed)
    done = json.loads((folder / DONE).read_text())
    return Made(folder, done["steps"], done["seconds"])


def run_loop(
    given: argparse.Namespace, loop: str, start: Path, folder: Path, **options: float
) -> None:
    """Distil from a start with the loop of another, which writes `DONE` at last."""
    print(f"{folder}:", flush=True)
    options |= {
        "loop": loop,
        "start": start,
        "teacher": given.teacher,
        "rows": given.out / "rows/train.jsonl",
        "to": folder,
        "batch": given.batch,
    }
    words = (word for key, value in options.items() for word in (f"--{key}", str(value)))
    # No rank: TRL would build a process group.
    command = [sys.executable, str(BENCHMARKS), "methods.instruct_loops", *words]
    if code := subprocess.run(command, env=variables(), check=False).returncode:
        raise RunFailedError(f"{folder}: the loop ended with exit code {code}")


MAKERS: Mapping[str, Callable[[argparse.Namespace, str, Size, int], Made]] = {
    "shrink": shrunk,
    "cut": cut,
    "bare": looped,
    "trl": looped,
}


def score(
    given: argparse.Namespace, name: str, folder: Path, names: Sequence[str] = HELD_OUT
) -> dict[str, float]:
    """Return the scores of a model on the held-out rows, which are computed once."""
    path = given.out / "scores" / f"{name}.json"
    if not path.is_file():
        print(f"scoring {name}", flush=True)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(scores_of(given, folder, names)))
    return json.loads(path.read_text())


def scores_of(given: argparse.Namespace, folder: Path, names: Sequence[str]) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(given.teacher)
    model, teacher = opened(folder), opened(given.teacher)
    numbers: dict[str, float] = {"millions": round(model.num_parameters() / 1e6, 1)}
    for name in names:
        rows = instruct.rows_of(given.out / "rows" / f"{name}.jsonl")
        some = instruct.encoded(rows, tokenizer)
        losses = instruct.losses_of(model, teacher, some, pad=tokenizer.pad_token_id)
        numbers |= {f"{key}, {name}": value for key, value in losses.items()}
    return numbers


def opened(folder: Path) -> Any:
    with LOADING:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model.eval().to(device())


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_runs(parser, "instruct", jobs=1, data="gsm8k/ and lm/")
    parser.set_defaults(seeds=[1])
    parser.add_argument("--sizes", default="100M,80M", help="the largest first")
    parser.add_argument("--steps", type=int, default=240, help="of `shrink`")
    parser.add_argument("--batch", type=int, default=4, help="conversations of a step")
    parser.add_argument("--rates", type=fractions, default=[3e-4], help="the best is taken")
    parser.add_argument("--rate_seconds", type=int, default=300)
    parser.add_argument("--runs", default="shrink,cut,layers,random,bare,trl")
    given = parsed(parser, __name__, arguments)
    given.names, given.runs = given.sizes.split(","), given.runs.split(",")
    if "trl" in given.runs and importlib.util.find_spec("trl") is None:
        print("trl is not installed: skipped", flush=True)
        given.runs.remove("trl")
    return given
