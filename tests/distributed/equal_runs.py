"""One training in many splits: data, models, configs, and a plain process as the reference."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import reference
import tiny_runs
import torch
from lab_scene import pretend_one_rank
from tiny_runs import (
    NO_DROPOUT,
    run_in,
    save_tokenizer,
    shape_of,
    text_task,
    write_jsonl,
    write_reviews,
    write_text,
)
from tiny_runs import bert as scratch_bert
from tiny_runs import llama as scratch_llama
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DistilBertConfig,
)

STEPS = 3
ROWS = 12  # per optimiser step, however they are cut
WORDS = ("the", "red", "green", "dog", "cat", "runs", "sees", "over", "house", "slowly")
ZERO3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
SETTINGS = {
    "learning_rate": 0.05,
    "adam_epsilon": 0.01,  # large: Adam would blow rounding of tiny gradients up to whole steps
    "max_grad_norm": 0.1,
    "temperature": 2.0,
    "total_steps": 100,
    "pairs": ((1, 2), (2, 4)),
    "heads": 4,
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
INNER = {"hard_cross_entropy": 0.3, "embedding_mse": 0.2, "attention_mse": 4.0, "relation_kl": 0.5}
PAIRS = {"layer_mapping": ["1:2", "2:4"]}
OPTIONS = {
    "soft_target_kl": {"temperature": SETTINGS["temperature"]},
    "soft_target_reverse_kl": {"temperature": SETTINGS["temperature"]},
    "hidden_mse": PAIRS,
    "hidden_cosine": PAIRS,
    "attention_mse": {**PAIRS, "fit": "probabilities"},
    "relation_kl": {
        **PAIRS,
        "relations": ["query", "key", "value", "query_key"],
        "relation_heads": SETTINGS["heads"],
    },
}
TERMS = [
    {"loss": "soft_target_kl", "weight": 0.5, "temperature": 2.0},
    {"loss": "hard_cross_entropy", "weight": 0.5},
    {"loss": "hidden_mse", "weight": 0.2, "layer_mapping": ["1:2"]},
]
RAGGED = 41  # rows: no number of ranks or rows per step divides it
# (ranks, rows per micro-batch, micro-batches): each makes the same 12 rows a step.
CUTS = [(1, 12, 1), (1, 2, 6), (2, 6, 1), (2, 1, 6), (3, 4, 1), (3, 2, 2)]
PACKED = {
    "per_device_train_batch_size": ROWS // 2,
    "gradient_accumulation_steps": 1,
    "tokens_per_rank": 40,
}
# The task, the teacher, and how transformers loads a student, by the first part of its name.
KINDS = {
    "bert": ("classification", "bert-teacher", AutoModelForSequenceClassification),
    "llama": ("causal_lm", "llama-teacher", AutoModelForCausalLM),
    "lfm2": ("causal_lm", "llama-teacher", AutoModelForCausalLM),
    "masked": ("mlm", "masked-teacher", AutoModelForMaskedLM),
}


def kind_of(student):
    return KINDS[student.partition("-")[0]]


def bert(layers, width, **keys):
    keys = {"vocab_size": 320, "num_labels": 3, "classifier_dropout": 0.0, **NO_DROPOUT, **keys}
    return shape_of(scratch_bert(layers, width, **keys))


def llama(layers, width, **keys):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return shape_of(scratch_llama(layers, width, **heads, **keys))


SHAPE = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 32}
CONFIGS = {
    "bert-teacher": bert(4, 32),
    "bert-student": bert(2, 16),
    "llama-teacher": llama(4, 32, vocab_size=328),
    "llama-tied": llama(2, 16, vocab_size=320, tie_word_embeddings=True),
    "llama-untied": llama(2, 16, vocab_size=336),
    # It carries a text into the next, so that every row has one.
    "lfm2-student": llama(
        2, 16, model_type="lfm2", vocab_size=320, layer_types=["conv", "full_attention"]
    ),
    "masked-teacher": bert(4, 32, vocab_size=328),
    "masked-tied": bert(2, 16),
    "masked-untied": bert(2, 16, vocab_size=336, tie_word_embeddings=False),
    "masked-roberta": bert(2, 16, model_type="roberta", pad_token_id=0),
    "masked-distilbert": DistilBertConfig(
        **SHAPE, vocab_size=320, dropout=0.0, attention_dropout=0.0
    ),
}


def rows(count, seed):
    rng = random.Random(seed)
    for number in range(count):
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 20)))
        yield {"text": text, "label": None if number % 5 == 4 else number % 3}


def write_folder(folder: Path) -> Path:
    for split, count in {"train": 40, "validation": 13}.items():
        write_jsonl(folder / "data" / f"{split}.jsonl", rows(count, seed=count))
    texts = [row["text"] for row in rows(40, seed=40)]
    for kind in ("bpe", "wordpiece"):
        save_tokenizer(folder / kind, texts, kind=kind)
    torch.manual_seed(0)
    for name, config in CONFIGS.items():
        model = kind_of(name)[-1].from_config(config)
        # Larger than usual, so that teacher and student really disagree.
        for parameter in model.parameters():
            parameter.data.mul_(3 if parameter.dim() > 1 else 1)
        model.save_pretrained(folder / name)
    return folder


def write_random(folder: Path, text: Path, **configs) -> Path:
    """Write models with random weights by name, Llamas or BERTs, and tokenizers of a text."""
    torch.manual_seed(0)
    for name, config in configs.items():
        is_llama = config.model_type == "llama"
        model = (AutoModelForCausalLM if is_llama else AutoModelForMaskedLM).from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder / name)
        kind = "bpe" if is_llama else "wordpiece"
        save_tokenizer(folder / name, text.read_text().split("\n\n"), kind=kind)
    return folder


def write_llama(folder: Path, layers: int, **sizes) -> Path:
    """Write a text, and a Llama with random weights and grouped heads."""
    text = write_text(folder / "text.txt", documents=120)
    return write_random(folder, text, llama=llama(layers, 16, vocab_size=320, **sizes))


def write_pair(
    folder: Path,
    *,
    language=False,
    student="zero2",
    teacher="teacher_zero3",
    models=None,
    objective=TERMS,
    **train,
) -> str:
    """Write a run that distils into two layers, in a folder that is made for it."""
    folder.mkdir()
    if language:
        task = text_task(folder)
    else:
        reviews = write_reviews(folder / "reviews", train=RAGGED, validation=9)
        task = {"type": "classification", "dataset": str(reviews)}
    make, keys = (scratch_llama, {}) if language else (scratch_bert, NO_DROPOUT)
    big, small = models or (make(2, width=24, **keys), make(2, **keys))
    # A large epsilon, so that the size of a gradient shows in the step that Adam takes.
    usual = {"max_steps": 100, "adam_epsilon": 0.01, "gradient_accumulation_steps": 2}
    config = run_in(
        folder,
        task,
        teacher={"model": big, "deepspeed": teacher},
        student={"model": small, "deepspeed": student},
        method={"name": "single"},
        objective=objective,
        train={**usual, **train},
    )
    return str(config)


def in_parts(most):
    """ZeRO 3 that has so many elements at once, as it has few of billions of weights."""
    limits = ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
    both = ZERO3["zero_optimization"] | {f"stage3_{name}": most for name in limits}
    return {"zero_optimization": both}


def zero(stage):
    # 1500: below the sizes of the models here.
    return in_parts(1500) if stage == 3 else {"zero_optimization": {"stage": stage}}


def config_tree(folder, student, terms, stages=(0, 0)):
    """A run of 12 rows a step on two ranks.

    terms: weight by loss.
    stages: the ZeRO stages of student and teacher.
    """
    task, teacher, _ = kind_of(student)
    student_stage, teacher_stage = stages
    return tiny_runs.config_tree(
        Path("unused"),
        {
            "type": task,
            "dataset": str(folder / "data"),
            "tokenizer": str(folder / ("bpe" if task == "causal_lm" else "wordpiece")),
        },
        teacher={"model": str(folder / teacher), "deepspeed": zero(teacher_stage)},
        student={"model": str(folder / student), "deepspeed": zero(student_stage)},
        method={"name": "single"},
        objective=[
            {"loss": name, "weight": weight, **OPTIONS.get(name, {})}
            for name, weight in terms.items()
        ],
        train={
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 2,
            "max_steps": SETTINGS["total_steps"],
            "weight_decay": 0.01,
            **{name: SETTINGS[name] for name in ("learning_rate", "adam_epsilon", "max_grad_norm")},
        },
    )


def cut_of(cut) -> dict:
    """The keys of `train` for (ranks, rows per micro-batch, micro-batches)."""
    _, rows, micro_batches = cut
    return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": micro_batches}


def plain_run(config_path, terms, initial, adapt=lambda student: student):
    """Run the steps by `reference.train`, from equal weights and rows.

    adapt: student -> the student that learns, such as a student with adapters.
    """
    from megakd.config.file import load_config
    from megakd.data.loader import StepLayout, StepLoader, StepShape

    config = load_config(Path(config_path))
    encoded, collate, masking = inputs_of(config)
    layout = StepLayout(StepShape(ROWS, 1))
    loader = StepLoader(encoded.train, collate, layout=layout, seed=config.seed, masking=masking)
    *_, kind = kind_of(Path(config.student.model).name)
    projected = [name for name in terms if name.startswith(("hidden", "embedding"))]
    offset = {name: 2 * index for index, name in enumerate(projected)}
    attention = {"attn_implementation": "eager"} if "attention_mse" in terms else {}
    projections = {n: v for n, v in initial.items() if not n.startswith("learners.")}
    return reference.train(
        adapt(kind.from_pretrained(config.student.model, **attention)),
        kind.from_pretrained(config.teacher.model, **attention).eval(),
        projections,
        [loader.step(index)[0] for index in range(STEPS)],
        SETTINGS | {"weights": terms, "offset": offset},
    )


def inputs_of(config):
    """The encoded rows, the collator and the masking of a run, in the process of the test."""
    from megakd.data.collation import Collator, task_masking
    from megakd.training.inputs import prepare

    with pytest.MonkeyPatch.context() as patch:
        pretend_one_rank(patch)
        inputs = prepare(config)
    task, tokenizer = inputs.config.task, inputs.tokenizer
    return inputs.encoded, Collator(tokenizer, task), task_masking(tokenizer, task)


def difference(actual, wanted) -> float:
    assert actual.keys() == wanted.keys()
    return max((actual[name].float() - wanted[name].float()).abs().max().item() for name in wanted)


def assert_same(actual, expected):
    """Losses and gradients to 1e-6, and the weights after AdamW and clipping."""
    for step in range(STEPS):
        for name, value in expected["losses"][step].items():
            assert actual["losses"][step][name] == pytest.approx(value, rel=2e-6, abs=1e-6), name
        gradients = dict(actual["gradients"][step])
        for name, gradient in expected["gradients"][step].items():
            error = (gradients.pop(name) - gradient).abs().max().item()
            assert error <= 1e-6 * max(1.0, gradient.abs().max().item()), (step, name, error)
        # What no loss reads: the second bias of an untied BERT.
        assert not any(gradient.any() for gradient in gradients.values()), [*gradients]
    assert_same_shards(actual)
    for name, weight in expected["final"].items():
        assert torch.allclose(actual["final"][name], weight, atol=3e-6), name


def assert_same_shards(actual):
    """The shards of all ranks are each weight and each gradient once, before the first update."""
    for own_name, (weight, gradient) in actual["shards"].items():
        name = f"learners.0.{own_name}"
        assert torch.equal(weight, actual["initial"][name].float().flatten()), name
        if name in actual["gradients"][0]:
            expected = actual["gradients"][0][name].flatten()
            assert torch.allclose(gradient, expected, atol=1e-7), name


def assert_equal(ours, theirs, *, of_gradients=2e-6):
    """Two trainings have the same losses, gradients up to this error, and weights at the end."""
    for one, other in zip(ours["losses"], theirs["losses"], strict=True):
        assert one == pytest.approx(other, rel=3e-6, abs=1e-6)
    for one, other in zip(ours["gradients"], theirs["gradients"], strict=True):
        assert one.keys() == other.keys()
        for name, gradient in one.items():
            error = (gradient - other[name]).abs().max().item()
            assert error <= of_gradients * max(1.0, other[name].abs().max().item()), (name, error)
    torch.testing.assert_close(ours["final"], theirs["final"], rtol=0, atol=5e-6)
