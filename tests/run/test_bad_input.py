"""Bad data, settings and models get one message from the whole command; nothing is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from spoiling import LATE, assert_refused


def test_an_output_folder_that_cannot_be(bench):
    file = bench.folder / "file"
    file.write_text("")
    outcome = bench.start(bench.tree(), f"output_dir={file / 'x/y'}")
    assert_refused(outcome, bench, f"output_dir: {file} is not a writable folder")


def test_an_output_folder_where_none_can_be_made(bench):
    outcome = bench.start(bench.tree(), "output_dir=/proc/x")
    assert_refused(outcome, bench, "output_dir: /proc is not a writable folder")


STUDENT = "student.model.config"
MPNET = f"{STUDENT}={{model_type: mpnet, hidden_size: 16, num_attention_heads: 2,"
MPNET += " num_hidden_layers: 2, intermediate_size: 16}"
ALBERT = f"{STUDENT}={{model_type: albert, hidden_size: 16, num_attention_heads: 2,"
ALBERT += " embedding_size: 8, intermediate_size: 16}"
MAPPING = "a layer does not exist; the student has layers 0 to 1, the teacher 0 to 2"
SETTINGS = [
    ("objective=[{loss: hidden_mse, layer_mapping: ['7:1']}]", "layer_mapping 7:1", MAPPING),
    ("objective=[{loss: relation_kl, layer_mapping: ['1:3']}]", "layer_mapping 1:3", MAPPING),
    (f"{STUDENT}.vocab_size=10", "of the tokenizer has the number", "of the model has 10"),
    (
        "student.deepspeed={zero_optimization: {stage: 2, reduce_bucket_sise: 9}}",
        "student.deepspeed: zero_optimization.reduce_bucket_sise: Extra inputs are not permitted",
        'did you mean "reduce_bucket_size"?',
    ),
    ("task.max_length=99", "task.max_length is 99", "at most 32 tokens"),
    (
        "task.text_columns=[text, label]; task.label_column=label; task.max_length=3",
        "task.max_length is 3",
        "3 special tokens to every pair",
    ),
    (
        f"{STUDENT}.num_attention_heads=3",
        f"{STUDENT}: hidden_size 16 is not divisible by num_attention_heads 3",
    ),
    (f"{STUDENT}.hiden_size=3", f"{STUDENT}.hiden_size", 'did you mean "hidden_size"?'),
    (
        f"{ALBERT}; objective=[{{loss: hidden_mse}}]",
        "a albert model has no list of layers",
        "soft_target_kl and hard_cross_entropy can",
    ),
    (
        f"{MPNET}; objective=[{{loss: relation_kl}}]",
        "attention_mse and relation_kl cannot read the attentions of a mpnet model",
        "use hidden_mse",
    ),
    (
        f"{MPNET}; train.gradient_checkpointing=true",
        "train.gradient_checkpointing: transformers does not have it for a mpnet model",
    ),
    ("train.kernels=triton", "train.kernels: impl 'triton' ", "use 'chunked'"),
    ("baselines=[alone]; alone.kernels=triton", "alone.kernels: impl 'triton' ", "use 'chunked'"),
    (
        f"{STUDENT}.num_attention_heads=4; objective=[{{loss: attention_mse}}]",
        "attention_mse: the teacher has 2 attention heads, the student 4",
        "relation_kl",
    ),
    (
        "objective=[{loss: relation_kl, relation_heads: 3}]",
        "relation_kl.relation_heads 3 does not divide",
        "all of the vectors: 1, 2, 4, 8, 16",
    ),
    ("objective=[{loss: relation_fsp}]", "relation_fsp needs two mapped layers", '["0:0", "1:2"]'),
    # A method refuses before its teacher is trained.
    (
        "method={name: knowledge_selection, episodes: 1}",
        "layer_mapping uniform maps the only layer that the student has",
    ),
    # As many steps as the rows give.
    (
        "method={name: knowledge_selection, episodes: 1, phase_steps: 17}; "
        f"objective=[{{loss: soft_target_kl}}]; {STUDENT}.num_hidden_layers=2; "
        "train={per_device_train_batch_size: 8, num_train_epochs: 1}",
        "a phase of 17 steps does not fit into an episode of 8",
    ),
    ("method={name: minidisc}; eval.metric=matthews; student.model=from_teacher", "eval.metric"),
    # Names of models that a run makes, where no model can come from them.
    ("teacher.model=from_teacher", "teacher.model: from_teacher is not a local folder"),
    ("student.model=student_base", "student.model: student_base is not a local folder"),
    ("task.tokenizer=./nowhere", "task.tokenizer: nowhere does not exist"),
    (
        "train.max_steps=null; train.lr_scheduler_type=warmup_stable_decay; "
        "train.lr_scheduler_kwargs={num_decay_steps: 900}; teacher.finetune.max_steps=2000",
        "train.lr_scheduler_type: warmup_stable_decay: ",
        "decay take 900 steps",
    ),
    *(
        (
            f"{STUDENT}.{key}={size}",
            f"{STUDENT}: {key} must be a whole number from 1 to 16,777,216 (got {size})",
        )
        for key, size in (("hidden_size", 10**12), ("vocab_size", 0))
    ),
]
if not torch.ops.mkldnn._is_mkldnn_fp16_supported():  # what DeepSpeed asks
    message = "train: fp16 is not supported on cpu; supported: fp32, bf16"
    SETTINGS.append(("train.fp16=true; teacher.finetune.fp16=false", message))


@pytest.mark.parametrize("case", SETTINGS, ids=lambda case: case[0])
def test_settings_that_cannot_work(bench, case):
    overrides, *fragments = case
    outcome = bench.start(bench.tree(teacher=LATE), *overrides.split("; "))
    assert_refused(outcome, bench, *fragments)


def test_a_batch_of_more_rows_than_there_are_is_a_batch_of_all_rows(bench):
    keys = ("train.per_device_train_batch_size", "eval.per_device_eval_batch_size")
    outcome = bench.start(bench.tree(), "train.max_steps=2", *(f"{key}={10**12}" for key in keys))
    assert outcome.code == 0, outcome.err


WEIGHTS = "model.safetensors"


def cut_short(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-50])


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def remove_head(folder: Path) -> None:
    kept = {k: v for k, v in load_file(folder / WEIGHTS).items() if "classifier" not in k}
    save_file(kept, folder / WEIGHTS)


def change_config(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **keys}))


def named(*labels: str) -> Callable[[Path], None]:
    numbers = {label: number for number, label in enumerate(labels)}
    return partial(change_config, id2label=dict(enumerate(labels)), label2id=numbers)


LABELS = "of the data (negative, positive)"
TEACHERS: dict[str, tuple[tuple[Callable[[Path], None], ...], tuple[str, ...]]] = {
    "cut short": ((cut_short,), ("{}", WEIGHTS, "bytes) is cut short or damaged")),
    "tokenizer": ((break_tokenizer,), ("the tokenizer files in {} cannot be read",)),
    "no head": ((remove_head,), ("teacher.model", "{}", "has no head for classification")),
    "labels": ((named("cat", "dog"),), ("labels (cat, dog)", LABELS)),
    "labels without names": (
        (named("LABEL_0", "LABEL_1"),),
        ("labels (LABEL_0, LABEL_1)", LABELS, "write the data's labels into id2label"),
    ),
    "family": (
        (partial(change_config, model_type="mamba"),),
        ("transformers has no AutoModelForSequenceClassification of a mamba model",),
    ),
    "size": (
        (partial(change_config, num_attention_heads=0),),
        ("{}", "config.json", "num_attention_heads must be a whole number"),
    ),
    # Several faults at once: weight files, then the tokenizer, then head and labels.
    "all": ((remove_head, break_tokenizer, cut_short), ("{}", "is cut short or damaged")),
}


@pytest.mark.parametrize("case", TEACHERS)
def test_a_teacher_folder_that_cannot_be_used(bench, case):
    faults, fragments = TEACHERS[case]
    folder = bench.copied()
    for fault in faults:
        fault(folder)

    outcome = bench.start(bench.tree(teacher={"model": str(folder)}))

    assert_refused(outcome, bench, *(part.replace("{}", str(folder)) for part in fragments))


def test_weights_that_are_not_finite_are_blamed_in_place_of_the_learning_rate(bench):
    folder = bench.copied()
    weights = load_file(folder / WEIGHTS)
    next(one for name, one in weights.items() if name.endswith("query.weight"))[0, 0] = torch.nan
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    outcome = bench.start(bench.tree(teacher={"model": str(folder)}))

    assert outcome.code == 2
    assert f"teacher.model: 1 weight tensors of {folder} are not finite" in outcome.err
    assert "query.weight" in outcome.err
    assert "learning_rate" not in outcome.err


def test_a_student_that_is_cut_short_is_found_before_a_teacher_is_trained(bench):
    folder = bench.copied()
    cut_short(folder)
    outcome = bench.start(bench.tree(teacher=LATE, student={"model": str(folder)}))
    assert_refused(outcome, bench, f"student.model: {folder / WEIGHTS} (", "is cut short")


def test_a_model_with_another_tokenizer_is_not_scored(bench, config):
    other = bench.copied()
    tree = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tree["model"]["vocab"]
    vocabulary.pop(max(vocabulary, key=vocabulary.get))
    (other / "tokenizer.json").write_text(json.dumps(tree))
    outcome = bench.one_rank.megakd("evaluate", config, "--model", other)
    assert_refused(outcome, bench, f"{other} has another tokenizer than the run")
