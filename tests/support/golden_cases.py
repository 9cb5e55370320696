"""Runs whose numbers are recorded: every method, and every kind of row, on tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from chat_runs import model as chat_model
from chat_tokenizers import asked
from mixed_runs import mixed
from tiny_runs import (
    bert,
    llama,
    reviews,
    save_tokenizer,
    write_jsonl,
    write_reviews,
    write_scored_pairs,
    write_text,
)
from transformers import BertConfig, BertForSequenceClassification

Tree = dict[str, Any]
STEPS = 20
BPE = {"type": "bpe", "vocab_size": 300}
KL = {"loss": "soft_target_kl", "temperature": 2.0}
CROSS = {"loss": "hard_cross_entropy", "weight": 0.5}
LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
ROLLOUT = {"max_new_tokens": 6, "prompt_tokens": 6, "mix": 0.5}


def _reviews(data: Path, folder: str = "reviews", **task: Any) -> Tree:
    return {"type": "classification", "dataset": str(data / folder), **task}


def _text(data: Path, kind: str, **task: Any) -> Tree:
    tokenizer = {"tokenizer": BPE} if kind == "causal_lm" else {}
    return {"type": kind, "dataset": str(data / "text.txt"), **tokenizer, **task}


def _chat(data: Path, **task: Any) -> Tree:
    return {"type": "causal_lm", "dataset": str(data / "chat.jsonl"), "max_length": 64, **task}


def _teachers(*layers: int) -> list[Tree]:
    return [
        {"name": f"t{count}", "model": bert(count, 24), "finetune": {"max_steps": 8}}
        for count in layers
    ]


def _student_of(method: Tree, data: Path) -> Tree:
    wide = bert(2, 40, num_attention_heads=20, intermediate_size=80)
    return {
        "task": _reviews(data),
        "teacher": {"model": wide, "finetune": {"max_steps": 8}},
        "student": {"model": "from_teacher"},
        "method": method,
        "eval": {"eval_steps": 10},
    }


def cases(data: Path) -> dict[str, Tree]:
    single = {"name": "single"}
    masked = {"task": _text(data, "mlm"), "teacher": {"model": bert(2, 24)}, "method": single}
    causal = {
        "task": _text(data, "causal_lm"),
        "teacher": {"model": llama(2, 24)},
        "method": single,
        "objective": [KL, CROSS],
        "eval": {"eval_steps": 10, "losses": True},
    }
    chat = {
        "task": _chat(data),
        "teacher": {"model": str(data / "chat-teacher")},
        "student": {"model": str(data / "chat-student")},
        "method": single,
        "objective": [KL, CROSS],
    }
    pool = {"task": _reviews(data), "teachers": _teachers(2, 3)}
    within_documents = {"attn_implementation": "varlen"}
    sparse = {"target_sparsity": 0.75, "sparsities": [0.25, 0.5, 0.75]}
    return {
        "labels": {
            "task": _reviews(data, labelled_examples=32),
            "teacher": {"model": bert(2, 24), "finetune": {"learning_rate": 0.003}},
            "method": single,
            "objective": [
                KL,
                CROSS,
                {"loss": "hidden_mse", "weight": 0.1, "layer_mapping": ["1:2"]},
            ],
            "baselines": ["alone"],
            "train": {"gradient_accumulation_steps": 2, "lr_scheduler_type": "cosine"},
            "eval": {"eval_steps": 10, "latency": False},
        },
        "pairs": {
            "task": {
                "type": "regression",
                "dataset": str(data / "pairs"),
                "label_column": "similarity",
                "text_columns": ["first", "second"],
            },
            "train": {"warmup_ratio": 0.2},
        },
        "soft_labels": {"task": _reviews(data, "soft", soft_labels="p"), "method": single},
        "soft_sets": {"task": _reviews(data, "sets", soft_labels="p"), "method": single},
        "masked": masked,
        # Its models are timed.
        "causal": {**causal, "eval": {**causal["eval"], "latency": True}},
        "packed": {
            **causal,
            "teacher": {"model": llama(2, 24), **within_documents},
            "student": {"model": llama(1), **within_documents},
        },
        "chat": chat,
        "last_answers": {**chat, "task": _chat(data, train_on="last", bad_rows="drop")},
        "on_policy": {
            **causal,
            "objective": [KL, {**CROSS, "on": "data"}],
            "rollout": ROLLOUT,
            "train": {"per_device_train_batch_size": 8},
        },
        "lora": {**chat, "student": {"model": str(data / "chat-student"), "lora": LORA}},
        "stream": {
            **masked,
            "task": {
                "type": "mlm",
                "train_files": str(data / "texts.jsonl"),
                "streaming": True,
                "tokenizer": str(data / "t2"),
                "max_eval_examples": 8,
            },
        },
        "mixture": {
            **causal,
            "task": {
                "type": "causal_lm",
                "mixture": {
                    "text": {"files": str(data / "text.txt"), "weight": 0.7},
                    "rows": {"files": str(data / "texts.jsonl"), "weight": 0.3},
                },
                "tokenizer": BPE,
                "validation_files": str(data / "held_out.txt"),
            },
        },
        "cache": {
            "task": _reviews(data),
            "teacher": {"model": bert(2, 24), "cache": str(data.parent / "cache")},
            "method": single,
            "objective": [KL],
        },
        "skdbert": {**pool, "method": {"name": "skdbert"}},
        "mean_of_teachers": {**pool, "method": {"name": "mean_of_teachers"}},
        "routed": {
            "task": {
                "type": "classification",
                "dataset": str(data / "routed"),
                "teacher_column": "by",
            },
            "teachers": [{"name": name, "model": str(data / name)} for name in ("t2", "t3")],
            "method": {"name": "routed"},
        },
        "mixed_vocabulary": {
            "task": {
                "type": "mlm",
                "dataset": str(data / "words.txt"),
                "tokenizer": {"type": "wordpiece", "vocab_size": 300},
            },
            "teacher": {"model": bert(2, 16)},
            "student": {"model": bert(2, 8)},
            "method": {"name": "mixed_vocabulary", "student_vocabulary": 100},
        },
        "homodistil": {
            "task": _text(data, "mlm"),
            "teacher": {"model": bert(2, 24, num_attention_heads=3, hidden_act="relu")},
            "student": {"model": "from_teacher"},
            "method": {"name": "homodistil", "target_width": 12, "cuts": 2, "pruning_end": 12},
        },
        "knowledge_selection": {
            "task": _reviews(data),
            "teacher": {"model": bert(4), "finetune": {"max_steps": 8}},
            "student": {"model": bert(2)},
            "method": {"name": "knowledge_selection", "episodes": 2, "phase_steps": 3},
        },
        "shrink": {
            "task": _text(data, "causal_lm"),
            "teacher": {
                "model": llama(4, 32, num_attention_heads=4, num_key_value_heads=2),
                "finetune": {"max_steps": 8},
            },
            "student": {"model": "from_teacher"},
            "method": {"name": "shrink", "parameters": "33K", "round_to": 4},
            "rollout": {"max_new_tokens": 4, "prompt_tokens": 4, "from_step": 6},
            "train": {"max_steps": 8},
            "eval": {"eval_steps": 3},
        },
        "minidisc": _student_of({"name": "minidisc", **sparse}, data),
        "maxidisc": _student_of({"name": "maxidisc", **sparse}, data),
        "direct": _student_of({"name": "direct", "target_sparsity": 0.75}, data),
    }


CASES: dict[str, Callable[[Path], Tree]] = {
    name: lambda data, name=name: cases(data)[name] for name in cases(Path())
}


def classifier(folder: Path, layers: int) -> None:
    """Write a BERT with random weights for the classes and the words of the reviews."""
    texts = [row["text"] for row in reviews(64, "train")]
    save_tokenizer(folder, texts, kind="wordpiece")
    torch.manual_seed(layers)
    named = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    shape = {key: value for key, value in bert(layers, 24)["config"].items() if key != "model_type"}
    config = BertConfig(**shape, **named, vocab_size=300, initializer_range=0.5)
    BertForSequenceClassification(config).save_pretrained(folder)


def write_soft_labels(folder: Path) -> None:
    """Write reviews with probabilities of one label, and of any number of labels."""
    for name in ("soft", "sets"):
        write_reviews(folder / name)
        train = folder / name / "train.jsonl"
        rows = [json.loads(line) for line in train.read_text().splitlines()]
        for number, row in enumerate(rows):
            share = (number % 9 + 1) / 10
            row["p"] = [share, 1 - share] if name == "soft" else [share, (number % 5) / 4]
        write_jsonl(train, rows)
    for file in (folder / "sets").glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        write_jsonl(file, [{**row, "label": [row["label"]]} for row in rows])


def write_data(folder: Path) -> Path:
    """Write the data of all cases, and the two decoders in ChatML."""
    write_reviews(folder / "reviews")
    write_scored_pairs(folder / "pairs")
    text = write_text(folder / "text.txt")
    texts = [{"text": document} for document in text.read_text().split("\n\n")]
    write_jsonl(folder / "texts.jsonl", texts[::-1])
    rows = [
        {"messages": [*asked(f"Question {n}", f"Answer {n % 7}"), *asked("And?", "No")]}
        for n in range(40)
    ]
    write_jsonl(folder / "chat.jsonl", rows)
    write_soft_labels(folder)
    write_reviews(folder / "routed")
    labelled = folder / "routed" / "train.jsonl"
    named = [
        line.replace("}", f', "by": "t{2 + number % 2}"}}')
        for number, line in enumerate(labelled.read_text().splitlines())
    ]
    labelled.write_text("\n".join(named) + "\n")
    mixed(folder / "mixed").with_name("text.txt").rename(folder / "words.txt")
    write_text(folder / "held_out.txt", documents=12)
    for layers in (2, 3):
        classifier(folder / f"t{layers}", layers)
    chat_model(folder / "chat-teacher")
    chat_model(folder / "chat-student")
    return folder
