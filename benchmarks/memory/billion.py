"""A teacher of over a billion weights goes through MiniDisc on CPU ranks, within its plan's memory.

`python benchmarks memory.billion [llama-sgd enct5-sgd llama-adamw] [--ranks 2]`; some minutes a
case, up to 22 GB, and up to 15 GB below $TMPDIR. A teacher with random weights in bf16 is written
to a folder; then its importance is measured on both ranks, the sorted teacher and the widest of
seven candidates are cut, all seven learn for one step in one backward, are evaluated, and the
chosen one is written. Printed is the peak of every rank against what `megakd plan` says of the same
config.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import save_file

from lib.data import llama, write_jsonl
from lib.launching import write_config
from lib.options import parsed, parser_of
from lib.tables import print_rows
from megakd.data.vocabularies import train_tokenizer
from megakd.models.modeling.modeling_t5 import EncT5Config
from megakd.models.own_models import OWN_MODELS
from memory import plan

GRID = [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95]
IDS = 32000
LENGTH = 64
ROWS = 2
WORDS = [f"word{number}" for number in range(1000)]


class Case(NamedTuple):
    """A teacher and what its students learn by."""

    task: str
    teacher: transformers.PretrainedConfig
    optim: str


def decoder(layers: int, width: int, neurons: int, heads: tuple[int, int], ids: int = IDS) -> Any:
    """Return the config of a Llama with an output matrix of its own."""
    keys = {"num_key_value_heads": heads[1], "max_position_embeddings": LENGTH}
    shape = llama(layers, width, heads[0], neurons, vocab_size=ids, **keys)
    return transformers.LlamaConfig(**shape, tie_word_embeddings=False)


CASES = {
    # TinyLlama's shape; most of T5 v1.1 XL's encoder under one decoder layer; and a model of a
    # third of their weights, whose AdamW moments fit beside it.
    "llama-sgd": Case("causal_lm", decoder(22, 2048, 5632, (32, 4)), "sgd"),
    "enct5-sgd": Case(
        "classification",
        EncT5Config(vocab_size=IDS, d_model=2048, d_kv=64, d_ff=5120, num_layers=21,
                    num_decoder_layers=1, num_heads=32, feed_forward_proj="gated-gelu"),
        "sgd",
    ),
    "llama-adamw": Case("causal_lm", decoder(30, 1024, 2816, (16, 4)), "adamw"),
}  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    rows, fits = [], True
    for name in given.cases:
        with tempfile.TemporaryDirectory(prefix="megakd-billion-") as temporary:
            folder, case = Path(temporary), CASES[name]
            write_texts(folder / "data", case.task)
            weights = write_teacher(folder / "teacher", case)
            config = write_config(folder / "run.yaml", run_tree(case, folder))
            told, measured = plan.planned_and_measured(config, given.ranks)
        base = told.host_base_bytes
        for phase in told.as_json()["phases"]:
            peak = max(phase["peak_bytes_per_rank"], phase["load_peak_bytes_per_rank"]) + base
            print(f"  {phase['name']}: {peak / 1e9:.2f} GB predicted", flush=True)
        print(f"  measured, from folder to folder: {measured.run / 1e9:.2f} GB", flush=True)
        predicted = max(plan.predicted_peaks(told))
        fits = fits and measured.run <= predicted
        what = f"{name}, {weights / 1e9:.2f}B weights, {given.ranks} ranks"
        numbers = f"measured {measured.run / 1e9:.2f} GB, predicted {predicted / 1e9:.2f} GB"
        print(f"{what}: {numbers}", flush=True)
        rows.append((what, numbers, f"{predicted / measured.run - 1:+.1%}"))
    print_rows(given.command, *rows)
    return 0 if fits else 1


def write_texts(folder: Path, task: str) -> None:
    drawn = random.Random(0)
    for split, count in (("train", 64), ("validation", 4 * ROWS)):
        rows = [{"text": " ".join(drawn.choices(WORDS, k=2 * LENGTH))} for _ in range(count)]
        if task == "classification":
            rows = [row | {"label": drawn.choice("abc")} for row in rows]
        write_jsonl(folder / f"{split}.jsonl", rows)


def write_teacher(folder: Path, case: Case) -> int:
    """Write a Hugging Face folder; return how many weights it has."""
    is_decoder = case.task == "causal_lm"
    if is_decoder:
        made: Any = transformers.LlamaForCausalLM
    else:
        case.teacher.num_labels = 3
        made = OWN_MODELS["enct5"].models["AutoModelForSequenceClassification"]
    with torch.device("meta"):
        empty = made(case.teacher)
    drawn = torch.Generator().manual_seed(0)
    state = {
        name: torch.empty(parameter.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=drawn)
        for name, parameter in empty.named_parameters()
    }
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    case.teacher.architectures = [made.__name__]
    case.teacher.dtype = torch.bfloat16
    case.teacher.save_pretrained(folder)
    kind = "bpe" if is_decoder else "unigram"
    tokenizer = train_tokenizer(
        lambda: WORDS, kind=kind, vocab_size=1200, for_encoder=not is_decoder
    )
    tokenizer.save_pretrained(folder)
    return sum(tensor.numel() for tensor in state.values())


def run_tree(case: Case, folder: Path) -> dict[str, Any]:
    teacher = str(folder / "teacher")
    labels = {} if case.task == "causal_lm" else {"label_column": "label"}
    task = {"type": case.task, "dataset": str(folder / "data"), "max_length": LENGTH}
    method = {"name": "minidisc", "target_sparsity": GRID[-1], "sparsities": GRID}
    train = {"per_device_train_batch_size": ROWS, "max_steps": 1, "learning_rate": 1e-5}
    return {
        "output_dir": str(folder / "run"),
        "task": {**task, "text_columns": ["text"], **labels},
        "teacher": {"model": teacher, "deepspeed": "teacher_zero3", "dtype": "bf16"},
        "student": {"model": "from_teacher", "deepspeed": "zero2"},
        "method": {**method, "iterations": 1, "metric": "accuracy"},
        "train": {**train, "optim": case.optim, "bf16": True},
        "eval": {"eval_steps": 1, "per_device_eval_batch_size": ROWS},
        "log": {"report_to": []},
    }


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="default: all")
    parser.add_argument("--ranks", type=int, default=2)
    given = parsed(parser, __name__, arguments)
    given.cases = given.cases or list(CASES)
    return given
