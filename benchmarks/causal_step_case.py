"""The run of `causal_step.py`: sizes, Llama-shaped models, a word tokenizer, and texts."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from pathlib import Path

SPECIAL = ("<unk>", "<pad>", "</s>")
LEARNING_RATE = 1e-4
MAX_GRAD_NORM = 1.0
TOKENIZER = "tokenizer"
DATA, RUN = "data", "run.yaml"


class Sizes(NamedTuple):
    """Sizes of a case; a model is (layers, width), and has heads of `head` columns."""

    student: tuple[int, int]
    teacher: tuple[int, int]
    vocabulary: int
    rows: int
    length: int
    head: int

    @property
    def targets(self) -> int:
        """The positions that have a next token; every row is one document."""
        return self.rows * (self.length - 1)


FULL = Sizes((4, 256), (8, 512), vocabulary=32000, rows=4, length=256, head=64)
QUICK = Sizes((2, 32), (2, 64), vocabulary=300, rows=2, length=16, head=16)
TERMS = {
    "forward_kl": {"loss": "soft_target_kl", "weight": 1.0},
    "jsd": {"loss": "soft_target_jsd", "weight": 1.0, "beta": 0.5},
}


def llama(size: tuple[int, int], sizes: Sizes) -> dict[str, Any]:
    """Return the keys of a Llama config with an output matrix of its own."""
    layers, width = size
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_attention_heads": width // sizes.head,
        "max_position_embeddings": sizes.length,
        "tie_word_embeddings": False,
    }


def write_case(folder: Path, sizes: Sizes, divergence: str) -> None:
    """Write the texts, the tokenizer and run.yaml of a run with one soft target."""
    words = [f"w{number}" for number in range(sizes.vocabulary - len(SPECIAL))]
    _write_tokenizer(folder / TOKENIZER, words)
    (folder / DATA).mkdir()
    rng = random.Random(0)
    for split, batches in (("train", 64), ("validation", 1)):
        # The end token makes a document as long as a row.
        texts = (
            " ".join(rng.choices(words, k=sizes.length - 1)) for _ in range(batches * sizes.rows)
        )
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (folder / DATA / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    config = yaml.safe_dump(run_tree(folder, sizes, divergence), sort_keys=False)
    (folder / RUN).write_text(config, encoding="utf-8")


def _write_tokenizer(folder: Path, words: list[str]) -> None:
    """Write a tokenizer with one token per word."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[attr-defined]
    roles = dict(zip(("unk_token", "pad_token", "eos_token"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles).save_pretrained(folder)


def run_tree(folder: Path, sizes: Sizes, divergence: str) -> dict[str, Any]:
    """Return the run config: ZeRO 0 for both models, and neither evaluations nor saves."""
    return {
        "output_dir": str(folder / "run"),
        "task": {
            "type": "causal_lm",
            "dataset": str(folder / DATA),
            "text_columns": ["text"],
            "max_length": sizes.length,
            "tokenizer": str(folder / TOKENIZER),
        },
        "teacher": {
            "model": {"config": llama(sizes.teacher, sizes)},
            "deepspeed": "teacher_zero0",
        },
        "student": {"model": {"config": llama(sizes.student, sizes)}, "deepspeed": "zero0"},
        "method": {"name": "single"},
        "objective": [TERMS[divergence]],
        "train": {
            "per_device_train_batch_size": sizes.rows,
            "max_steps": 10**6,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": MAX_GRAD_NORM,
        },
        "save": {"save_steps": 10**6},
        "log": {"logging_steps": 10},
    }
