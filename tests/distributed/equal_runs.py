"""The same training in many cuts: data, models, configs, and one plain process to compare with."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from tiny_runs import save_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    LlamaConfig,
    RobertaConfig,
)

STEPS = 3
ROWS = 12  # per optimiser step, however they are cut
WORDS = ("the", "red", "green", "dog", "cat", "runs", "sees", "over", "house", "slowly")
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
SETTINGS = {
    "learning_rate": 0.05,
    "adam_epsilon": 0.01,  # large: Adam would blow rounding of tiny gradients up to whole steps
    "max_grad_norm": 0.5,
    "temperature": 2.0,
    "total_steps": 100,
}
CLASSIFICATION = {
    "hard_cross_entropy": 0.3,
    "soft_target_kl": 0.7,
    "hidden_mse": 0.2,
    "hidden_cosine": 0.4,
}
LANGUAGE = {
    "hard_cross_entropy": 0.3,
    "soft_target_kl": 0.5,
    "soft_target_reverse_kl": 0.2,
    "hidden_mse": 0.2,
}
INNER = {
    "hard_cross_entropy": 0.3,
    "embedding_mse": 0.2,
    "attention_mse": 4.0,
    "relation_kl": 0.5,
}
RELATION_HEADS = 4
PAIRS = ["1:2", "2:4"]
OPTIONS = {
    "soft_target_kl": {"temperature": SETTINGS["temperature"]},
    "soft_target_reverse_kl": {"temperature": SETTINGS["temperature"]},
    "hidden_mse": {"layer_mapping": PAIRS},
    "hidden_cosine": {"layer_mapping": PAIRS},
    "attention_mse": {"layer_mapping": PAIRS, "fit": "probabilities"},
    "relation_kl": {
        "layer_mapping": PAIRS,
        "relations": ["query", "key", "value", "query_key"],
        "relation_heads": RELATION_HEADS,
    },
}


# The task, the teacher, and how transformers loads a student, by the first part of its name.
KINDS = {
    "bert": ("classification", "bert-teacher", AutoModelForSequenceClassification),
    "llama": ("causal_lm", "llama-teacher", AutoModelForCausalLM),
    "masked": ("mlm", "masked-teacher", AutoModelForMaskedLM),
}


def kind_of(student):
    return KINDS[student.partition("-")[0]]


def bert(layers, width, *, config=BertConfig, vocabulary=320, **keys):
    return config(
        **keys,
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=32,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout=0.0,
    )


def distilbert(layers, width):
    return DistilBertConfig(
        vocab_size=320,
        dim=width,
        n_layers=layers,
        n_heads=2,
        hidden_dim=2 * width,
        max_position_embeddings=32,
        dropout=0.0,
        attention_dropout=0.0,
    )


def llama(layers, width, *, vocabulary, tied):
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )


def rows(count, seed):
    rng = random.Random(seed)
    for number in range(count):
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 20)))
        yield {"text": text, "label": None if number % 5 == 4 else number % 3}


def write_folder(folder: Path) -> Path:
    """Write data and models that both sides read."""
    data = folder / "data"
    data.mkdir()
    for split, count in {"train": 40, "validation": 13}.items():
        lines = [json.dumps(row) for row in rows(count, seed=count)]
        (data / f"{split}.jsonl").write_text("\n".join(lines))
    for kind in ("bpe", "wordpiece"):
        texts = [row["text"] for row in rows(40, seed=40)]
        save_tokenizer(folder / kind, texts, kind=kind)
    torch.manual_seed(0)
    models = {
        "bert-teacher": AutoModelForSequenceClassification.from_config(bert(4, 32)),
        "bert-student": AutoModelForSequenceClassification.from_config(bert(2, 16)),
        "llama-teacher": AutoModelForCausalLM.from_config(llama(4, 32, vocabulary=328, tied=False)),
        "llama-tied": AutoModelForCausalLM.from_config(llama(2, 16, vocabulary=320, tied=True)),
        "llama-untied": AutoModelForCausalLM.from_config(llama(2, 16, vocabulary=336, tied=False)),
    }
    models |= {
        name: AutoModelForMaskedLM.from_config(config)
        for name, config in {
            "masked-teacher": bert(4, 32, vocabulary=328),
            "masked-tied": bert(2, 16),
            "masked-untied": bert(2, 16, vocabulary=336, tie_word_embeddings=False),
            "masked-roberta": bert(2, 16, config=RobertaConfig, pad_token_id=0),
            "masked-distilbert": distilbert(2, 16),
        }.items()
    }
    for name, model in models.items():
        # Larger than usual, so that teacher and student really disagree.
        for parameter in model.parameters():
            parameter.data.mul_(3 if parameter.dim() > 1 else 1)
        model.save_pretrained(folder / name)
    return folder


def config_tree(folder, student, weights, *, student_zero, teacher_zero):
    task, teacher, _ = kind_of(student)
    terms = [
        {"loss": name, "weight": weight, **OPTIONS.get(name, {})}
        for name, weight in weights.items()
    ]
    return {
        "output_dir": str(folder / "out"),
        "task": {
            "type": task,
            "dataset": str(folder / "data"),
            "max_length": 16,
            "tokenizer": str(folder / ("bpe" if task == "causal_lm" else "wordpiece")),
        },
        "teacher": {"model": str(folder / teacher), "deepspeed": zero(teacher_zero)},
        "student": {"model": str(folder / student), "deepspeed": zero(student_zero)},
        "method": {"name": "single"},
        "objective": terms,
        "train": {
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 2,
            "max_steps": SETTINGS["total_steps"],
            "learning_rate": SETTINGS["learning_rate"],
            "adam_epsilon": SETTINGS["adam_epsilon"],
            "max_grad_norm": SETTINGS["max_grad_norm"],
            "weight_decay": 0.01,
        },
    }


def zero(stage):
    return ZERO3 if stage == 3 else {"zero_optimization": {"stage": stage}}


def write(tree, path: Path) -> str:
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def plain_run(config_path, weights, initial, adapt=lambda student: student):
    """The same steps by `reference.train`, from the same weights and rows.

    adapt: student -> the student that learns, such as a student with adapters.
    """
    import reference

    from megakd.config.file import load_config
    from megakd.data.collation import Collator
    from megakd.data.encoding import encode_splits
    from megakd.data.loader import StepLoader
    from megakd.data.masking import task_masking
    from megakd.data.splits import load_splits
    from megakd.data.step_layout import StepLayout, StepShape
    from megakd.data.tokenizers import load_tokenizer
    from megakd.inputs.run_data import cache_folder

    config = load_config(Path(config_path), [])
    cache, task = cache_folder(), config.task
    splits = load_splits(task, seed=config.seed, cache_dir=cache)
    tokenizer = load_tokenizer(task, splits, model_folders=[], cache_dir=cache)
    encoded = encode_splits(splits, tokenizer, task, cache_dir=cache)
    collate = Collator(tokenizer, task)
    loader = StepLoader(
        encoded.train,
        collate,
        layout=StepLayout(StepShape(ROWS, 1)),
        seed=config.seed,
        masking=task_masking(tokenizer, task),
    )
    *_, kind = kind_of(Path(config.student.model).name)
    projected = [name for name in weights if name.startswith(("hidden", "embedding"))]
    settings = SETTINGS | {
        "weights": weights,
        "pairs": ((1, 2), (2, 4)),
        "offset": {name: 2 * index for index, name in enumerate(projected)},
        "heads": RELATION_HEADS,
    }
    attention = {"attn_implementation": "eager"} if "attention_mse" in weights else {}
    projections = {n: v for n, v in initial.items() if not n.startswith("learners.")}
    return reference.train(
        adapt(kind.from_pretrained(config.student.model, **attention)),
        kind.from_pretrained(config.teacher.model, **attention).eval(),
        projections,
        [loader.step(index)[0] for index in range(STEPS)],
        settings,
    )


def assert_same(found, expected):
    """Losses and gradients to 1e-6, and the weights after AdamW and clipping."""
    for step in range(STEPS):
        for name, value in expected["losses"][step].items():
            assert found["losses"][step][name] == pytest.approx(value, rel=2e-6, abs=1e-6), name
        gradients = dict(found["gradients"][step])
        for name, gradient in expected["gradients"][step].items():
            error = (gradients.pop(name) - gradient).abs().max().item()
            assert error <= 1e-6 * max(1.0, gradient.abs().max().item()), (step, name, error)
        # What no loss reads: the second bias of an untied BERT.
        assert not any(gradient.any() for gradient in gradients.values()), [*gradients]
    assert_same_shards(found)
    for name, weight in expected["final"].items():
        assert torch.allclose(found["final"][name], weight, atol=3e-6), name


# (ranks, rows per micro-batch, micro-batches): each makes the same 12 rows a step.
CUTS = [(1, 12, 1), (1, 2, 6), (2, 6, 1), (2, 1, 6), (3, 4, 1), (3, 2, 2)]


def assert_same_shards(found):
    """The shards of all ranks are each weight and each gradient once, before the first update."""
    (shards,) = found["shards"]
    for own_name, (weight, gradient) in shards.items():
        name = f"learners.0.{own_name}"
        assert torch.equal(weight, found["initial"][name].float().flatten()), name
        if name in found["gradients"][0]:
            expected = found["gradients"][0][name].flatten()
            assert torch.allclose(gradient, expected, atol=1e-7), name
