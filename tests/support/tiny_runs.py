"""Tiny data, models and run configs: what a user would write, small enough for seconds."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

GOOD, BAD, OTHER = "good fine great nice", "bad poor ugly awful", "the a film was it and then we"
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SENTENCES = ("the cat sees the dog", "a dog runs", "then it eats and sleeps", "we saw a red house")


def review(rng: random.Random, *, good: bool) -> str:
    """A text whose words tell its class, among words that tell nothing."""
    telling, other = (GOOD if good else BAD).split(), OTHER.split()
    return " ".join(
        rng.choice(telling if rng.random() < 0.7 else other) for _ in range(rng.randint(3, 9))
    )


def reviews(count: int, seed: str) -> Iterator[dict[str, str]]:
    """Rows with a class name."""
    rng = random.Random(seed)
    for number in range(count):
        good = number % 2 == 0
        yield {"text": review(rng, good=good), "label": "positive" if good else "negative"}


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_reviews(folder: Path, *, train: int = 64, validation: int = 26) -> Path:
    """One text, two classes, as jsonl."""
    for split, count in {"train": train, "validation": validation}.items():
        write_jsonl(folder / f"{split}.jsonl", reviews(count, split))
    return folder


def review_task(folder: Path, **keys: Any) -> dict[str, Any]:
    return {"type": "classification", "dataset": str(write_reviews(folder / "reviews")), **keys}


def write_scored_pairs(folder: Path, *, train: int = 64, validation: int = 26) -> Path:
    """Pairs of texts with a score: how much of the second is in the first; as csv."""
    folder.mkdir(parents=True)
    for split, count in {"train": train, "validation": validation}.items():
        rng = random.Random(split)
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("first", "second", "similarity"))
            for _ in range(count):
                one, two = (review(rng, good=rng.random() < 0.5) for _ in range(2))
                shared = len({*one.split()} & {*two.split()}) / len({*two.split()})
                writer.writerow((one, two, round(5 * shared, 2)))
    return folder


def pairs_task(folder: Path, **keys: Any) -> dict[str, Any]:
    columns = {"text_columns": ["first", "second"], "label_column": "similarity"}
    data = str(write_scored_pairs(folder / "pairs"))
    return {"type": "regression", "dataset": data, **columns, **keys}


def write_text(path: Path, *, documents: int = 60) -> Path:
    """Documents of a few sentences, apart by blank lines."""
    rng = random.Random(0)
    texts = (". ".join(rng.choices(SENTENCES, k=rng.randint(1, 6))) for _ in range(documents))
    path.write_text("\n\n".join(f"{text}." for text in texts), encoding="utf-8")
    return path


def text_task(folder: Path, kind: str = "causal_lm", **keys: Any) -> dict[str, Any]:
    """The task of a text that is written into a folder, with a tokenizer of its words."""
    tokenizer = {"type": "bpe" if kind == "causal_lm" else "wordpiece", "vocab_size": 320}
    text = str(write_text(folder / "text.txt"))
    return {"type": kind, "dataset": text, "tokenizer": tokenizer, **keys}


def save_tokenizer(
    folder: Path, texts: Sequence[str], *, kind: Literal["bpe", "wordpiece"]
) -> Path:
    """A tokenizer of these texts, for weights that lie somewhere without one."""
    from megakd.data.tokenizers import train_tokenizer

    tokenizer = train_tokenizer(
        lambda: list(texts) * 2, kind=kind, vocab_size=300, for_encoder=kind == "wordpiece"
    )
    tokenizer.save_pretrained(folder)
    return folder


def bert(layers: int, width: int = 16, **keys: Any) -> dict[str, Any]:
    """A BERT from scratch; dropout as in any BERT."""
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "max_position_embeddings": 32}
    shape = {"num_hidden_layers": layers, "num_attention_heads": 2}
    return {"config": {"model_type": "bert", **sizes, **shape, **keys}}


def llama(layers: int, width: int = 16, **keys: Any) -> dict[str, Any]:
    """A Llama from scratch with grouped heads."""
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "max_position_embeddings": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return {
        "config": {"model_type": "llama", "num_hidden_layers": layers, **sizes, **heads, **keys}
    }


def shape_of(scratch: Mapping[str, Any], **keys: Any) -> Any:
    """The configuration of a model from scratch, for weights that a test writes itself."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**scratch["config"], **keys)


def config_tree(out: Path, task: Mapping[str, Any], **sections: Any) -> dict[str, Any]:
    """A run config: a student of one layer, a few steps; `sections` are merged in."""
    is_language = task["type"] == "causal_lm"
    tree: dict[str, Any] = {
        "output_dir": str(out),
        "task": {"max_length": 16, **task},
        "student": {"model": llama(1) if is_language else bert(1)},
        "method": {"name": "finetune"},
        "train": {
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "learning_rate": 0.01,
            # Of all tasks alike, as references and recorded numbers have it.
            "lr_scheduler_type": "linear",
            "warmup_ratio": 0.0,
        },
        # Times and a second log cost seconds: a test that reads them asks for them.
        "eval": {"latency": False},
        "log": {"logging_steps": 2, "report_to": []},
        "save": {"save_total_limit": None},  # for tests that go back to an earlier step
    }
    return merged(tree, sections)


def merged(tree: dict[str, Any], sections: Mapping[str, Any]) -> dict[str, Any]:
    """Put the keys of sections into those of the tree; all that is no section replaces."""
    for name, section in sections.items():
        both = isinstance(section, dict) and isinstance(tree.get(name), dict)
        tree[name] = {**tree[name], **section} if both else section
    return tree


def write_config(path: Path, tree: Mapping[str, Any]) -> Path:
    """JSON is YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=2), encoding="utf-8")
    return path


def run_in(folder: Path, task: Mapping[str, Any], **sections: Any) -> Path:
    """Write `run.yaml` of a run that has the folder for itself, and writes into `out`."""
    return write_config(folder / "run.yaml", config_tree(folder / "out", task, **sections))
