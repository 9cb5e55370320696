"""Run configs of `gpu_day.py`: models from configs and texts that are made up, or tiny ones.

The embedded corpus takes a minute to read, and so short a day has no minutes for it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib import data
from lib.data import write_jsonl

Tree = dict[str, Any]
TOPICS = {"sea": "wave boat salt fish sail", "wood": "tree leaf bark bird moss"}
ANY_TOPIC = "the of and a in it was then we saw"
LETTERS = "aeiouklmnprst"
KD = [{"loss": "soft_target_kl", "weight": 0.5}, {"loss": "hard_cross_entropy", "weight": 0.5}]
NEVER = 10**6


def causal_lm_tree(folder: Path, *, rehearse: bool) -> Tree:
    length, teacher, student = (32, (2, 32), (1, 16)) if rehearse else (512, (8, 1024), (4, 512))
    return {
        **_sections("causal_lm", folder, length=length, rehearse=rehearse),
        "teacher": {"model": llama(*teacher, length=length), "deepspeed": "teacher_zero3"},
        "student": {"model": llama(*student, length=length), "deepspeed": "zero3"},
        "method": {"name": "single"},
        "objective": KD,
        **_schedule(60, rehearse=rehearse),
    }


def minidisc_tree(folder: Path, *, rehearse: bool) -> Tree:
    grid, layers, width = ([0.3, 0.5], 2, 32) if rehearse else ([0.5, 0.7, 0.9], 6, 384)
    # The teacher has random weights; untrained, all of its units are equally important.
    finetune = {"max_steps": 4 if rehearse else 60}
    model = {"config": data.bert(layers, width, max(2, width // 32))}
    method = {"name": "minidisc", "target_sparsity": grid[-1], "sparsities": grid}
    length = 16 if rehearse else 64
    return {
        **_sections("classification", folder, length=length, rehearse=rehearse),
        "teacher": {"model": model, "deepspeed": "teacher_zero3", "finetune": finetune},
        "student": {"model": "from_teacher", "deepspeed": "zero3"},
        "method": {**method, "iterations": 1},
        **_schedule(40, rehearse=rehearse),
    }


def billion_tree(folder: Path, *, rehearse: bool) -> Tree:
    """Return MiniDisc on a Llama of 1.2 billion weights: one trial of three candidates, a student.

    The weights are random, and a few steps show memory and resuming, not what is learned.
    """
    grid = [0.25, 0.375, 0.5] if rehearse else [0.5, 0.6875, 0.875]
    length, layers, width = (32, 2, 512) if rehearse else (1024, 16, 2048)
    model = llama(layers, width, length=length, vocab_size=512 if rehearse else 128256)
    # A model from scratch has no stored weights to cut before it has been trained.
    teacher = {"model": model, "deepspeed": "teacher_zero3", "finetune": {"max_steps": 2}}
    tree = {
        **_sections("causal_lm", folder, length=length, rehearse=rehearse),
        "teacher": teacher,
        "student": {"model": "from_teacher", "deepspeed": "zero3"},
        "method": {"name": "minidisc", "target_sparsity": grid[-1], "sparsities": grid},
        "objective": KD,
        **_schedule(8, rehearse=rehearse),
    }
    tree["train"] |= {"learning_rate": 1e-5}
    tree["eval"] |= {"metric": "accuracy"}
    return tree


def llama_tree(folder: Path, *, rehearse: bool, untried: bool = False) -> Tree:
    """Return a run whose steps are profiled: a Llama of 1.2 billion weights learns from another.

    The shape is that of Llama 3.2 1B; the presets are the defaults of megakd.
    untried: with what is off until a GPU has run it.
    """
    length, layers, width = (64, 2, 32) if rehearse else (4096, 16, 2048)
    model = llama(layers, width, length=length, vocab_size=512 if rehearse else 128256)
    tree = _profiled_tree(folder, model, model, rows=4, rehearse=rehearse)
    if untried:
        clips = {"megakd": {"clip_on_device": True}, "zero_optimization": {"stage": 2}}
        tree["train"]["fused_layers"], tree["student"]["deepspeed"] = "on", clips
    return tree


def smollm2_tree(folder: Path, *, rehearse: bool) -> Tree:
    """Return a run whose steps are profiled: SmolLM2-135M learns from SmolLM2-360M, in shape."""
    length, vocabulary = (64, 512) if rehearse else (2048, 49152)
    sizes = {"max_position_embeddings": length, "vocab_size": vocabulary}
    teacher, student = ((2, 48), (2, 48)) if rehearse else ((32, 960), (30, 576))
    models = [
        {"config": data.llama(
            layers, width, heads := max(3, width // 64), 8 * width // 3,
            num_key_value_heads=heads // 3, tie_word_embeddings=True, **sizes,
        )}
        for layers, width in (teacher, student)
    ]  # fmt: skip
    return _profiled_tree(folder, *models, rows=16, rehearse=rehearse)


def _profiled_tree(
    folder: Path, teacher: Tree, student: Tree, *, rows: int, rehearse: bool
) -> Tree:
    length = student["config"]["max_position_embeddings"]
    return {
        **_sections("causal_lm", folder, length=length, rehearse=rehearse),
        "teacher": {"model": teacher, "deepspeed": "teacher_zero3"},
        "student": {"model": student, "deepspeed": "zero2"},
        "method": {"name": "single"},
        "objective": KD,
        "train": {"per_device_train_batch_size": rows, "max_steps": NEVER, "learning_rate": 1e-5},
        "save": {"save_steps": NEVER},
        "log": {"logging_steps": NEVER, "report_to": []},
    }


def _schedule(steps: int, *, rehearse: bool) -> Tree:
    """Return the sections of a training that is evaluated and saved at its middle and elsewhere."""
    rows = 4 if rehearse else 16
    return {
        "train": {"per_device_train_batch_size": rows, "max_steps": steps, "learning_rate": 5e-4},
        # The last step is what two runs are compared by; the best one may be from before the kill.
        "eval": {"eval_steps": steps // 2, "keep_best": False},
        "save": {"save_steps": steps // 4},
        "log": {"logging_steps": 10, "report_to": []},
    }


def _sections(kind: str, folder: Path, *, length: int, rehearse: bool) -> Tree:
    pieces = "bpe" if kind == "causal_lm" else "wordpiece"
    tokenizer = {"type": pieces, "vocab_size": 300 if rehearse else 8000}
    label = {} if kind == "causal_lm" else {"label_column": "label"}
    texts = write_texts(folder / "texts", rehearse=rehearse)
    source = {"dataset": str(texts), "text_columns": ["text"], **label}
    task = {"type": kind, "max_length": length, "tokenizer": tokenizer, **source}
    return {"output_dir": str(folder / "run"), "task": task}


def write_texts(folder: Path, *, rehearse: bool) -> Path:
    """Write texts of two topics; the full size has 2 million words, of some thousands."""
    rows, longest = ({"train": 400, "validation": 32}, 30) if rehearse else (
        {"train": 12_000, "validation": 256}, 320
    )  # fmt: skip
    letters = random.Random(0)
    names = [] if rehearse else ["".join(letters.choices(LETTERS, k=6)) for _ in range(4000)]
    for split, count in rows.items():
        rng = random.Random(split)
        texts = (_made_up(rng, topic, names, longest) for topic in rng.choices([*TOPICS], k=count))
        write_jsonl(folder / f"{split}.jsonl", texts)
    return folder


def _made_up(
    rng: random.Random, topic: str, names: Sequence[str], longest: int
) -> Mapping[str, str]:
    words = [*f"{TOPICS[topic]} {ANY_TOPIC}".split() * (1 + len(names) // 100), *names]
    return {"text": " ".join(rng.choices(words, k=rng.randint(5, longest))), "label": topic}


def llama(layers: int, width: int, *, length: int, **keys: int) -> Tree:
    """Return a Llama with random weights and heads of 64, or of 16 in a small model."""
    heads = max(2, width // 64)
    sizes = {"max_position_embeddings": length, "num_key_value_heads": max(1, heads // 4)}
    keys |= {**sizes, "tie_word_embeddings": True}
    return {"config": data.llama(layers, width, heads, 4 * width, **keys)}
