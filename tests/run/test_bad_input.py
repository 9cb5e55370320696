"""What bad data, paths and settings get from the whole command: one message, nothing loaded."""

from __future__ import annotations

from typing import Any

import pytest
from spoiling import LATE, Bench, assert_refused
from tiny_runs import bert, llama, write_jsonl, write_reviews, write_scored_pairs

GOOD_ROWS = '{"text":"a b","label":"x"}\n{"text":"c d","label":"y"}\n{"text":"e","label":"y"}\n'


@pytest.fixture
def bench(whole_run, tmp_path, one_rank) -> Bench:
    return Bench(tmp_path, whole_run.reviews, whole_run.teacher, one_rank)


DATA: dict[str, tuple[str, str | bytes, dict[str, Any], tuple[str, ...]]] = {
    "no rows": ("train.jsonl", "", {}, ("train.jsonl has no rows",)),
    "only a header": ("train.csv", "text,label\n", {}, ("train.csv has no rows",)),
    "an empty text": ("train.txt", "\n\n", {"type": "causal_lm"}, ("train.txt has no rows",)),
    "no text column": (
        "train.jsonl",
        '{"body":"a","label":1}\n',
        {},
        ("column 'text' does not exist", "columns are body, label"),
    ),
    "no such text column": (
        "train.jsonl",
        GOOD_ROWS,
        {"text_columns": ["body"]},
        ("column 'body' (task.text_columns) does not exist", "columns are text, label"),
    ),
    "no such label column": (
        "train.jsonl",
        GOOD_ROWS,
        {"label_column": "class"},
        ("column 'class' (task.label_column) does not exist", "columns are text, label"),
    ),
    "a label outside the range": (
        "train.jsonl",
        '{"text":"a","label":0}\n{"text":"b","label":1}\n{"text":"c","label":7}\n',
        {},
        ("line 3", "label 7 is outside 0..2"),
    ),
    "words for scores": (
        "train.jsonl",
        GOOD_ROWS.splitlines()[0],
        {"type": "regression"},
        ("line 1", "'x' in column 'label' is not a finite number"),
    ),
    "text that is not UTF-8": (
        "train.jsonl",
        b'{"text":"a","label":"x"}\n{"text":"\xff","label":"y"}\n',
        {},
        ("line 2", "text is not UTF-8 (byte 0xff"),
    ),
    "more labels than rows": (
        "train.jsonl",
        GOOD_ROWS,
        {"labelled_examples": 9},
        ("task.labelled_examples: 9", "labelled rows"),
    ),
}


@pytest.mark.parametrize("case", DATA)
def test_data_that_cannot_be_used(bench, case):
    name, content, task, fragments = DATA[case]
    data = bench.folder / "data"
    data.mkdir()
    (data / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    models = {}
    if task.get("type") in ("causal_lm", "regression"):
        own = llama(1) if task["type"] == "causal_lm" else bert(1)
        models = {"teacher": {"model": own, "finetune": {}}, "student": {"model": own}}

    said = bench.start(bench.tree({"dataset": str(data), **task}, **models))

    assert_refused(said, bench, *fragments)


def test_a_validation_file_with_a_class_of_its_own(bench):
    data = write_reviews(bench.folder / "data")
    write_jsonl(data / "validation.jsonl", [{"text": "a", "label": "neutral"}])

    said = bench.start(bench.tree({"dataset": str(data)}))

    assert_refused(said, bench, "validation.jsonl, line 1", "'neutral' is not one of the 2 classes")


@pytest.mark.parametrize(
    ("key", "fragments"),
    [
        ("task.dataset", ("task.dataset: {} does not exist",)),
        ("teacher.model", ("teacher.model: {} does not exist",)),
        ("student.model", ("student.model: {} does not exist",)),
        ("task.tokenizer", ("task.tokenizer: {} does not exist",)),
        ("train.resume_from_checkpoint", ("train.resume_from_checkpoint: {} does not exist",)),
        ("student.deepspeed", ("student.deepspeed: the DeepSpeed config {} does not exist",)),
    ],
)
def test_a_path_that_is_not_there(bench, key, fragments):
    path = bench.folder / "nowhere"

    said = bench.start(bench.tree(), f"{key}={path}")

    assert_refused(said, bench, *(fragment.format(path) for fragment in fragments))


@pytest.mark.parametrize("below", ["", "x/y"])
def test_an_output_folder_that_cannot_be(bench, below):
    file = bench.folder / "file"
    file.write_text("")

    said = bench.start(bench.tree(), f"output_dir={file / below}")

    assert_refused(said, bench, f"output_dir: {file} is not a writable folder")


HIDDEN = {"loss": "hidden_mse"}
BROKEN: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a pair beyond the student": (
        {"objective": [{**HIDDEN, "layer_mapping": ["7:1"]}], "teacher": LATE},
        ("hidden_mse.layer_mapping 7:1", "the student has layers 0 to 1, the teacher 0 to 2"),
    ),
    "a pair beyond the teacher": (
        {"objective": [{**HIDDEN, "layer_mapping": ["1:1", "1:9"]}]},
        ("hidden_mse.layer_mapping 1:9", "the student has layers 0 to 1, the teacher 0 to 2"),
    ),
    "a small embedding": (
        {"student": {"model": bert(1, vocab_size=10)}, "teacher": LATE},
        ("student.model: the tokenizer has", "the embedding of the model has 10"),
    ),
    "a long text": (
        {"task": {"max_length": 99}, "teacher": LATE},
        ("task.max_length is 99", "at most 32 tokens"),
    ),
    "heads that do not divide": (
        {"student": {"model": bert(1, num_attention_heads=3)}, "teacher": LATE},
        ("student.model.config: hidden_size 16 is not divisible by num_attention_heads 3",),
    ),
    "a key no model has": (
        {"student": {"model": bert(1, hiden_size=3)}},
        ("student.model.config.hiden_size", "did you mean hidden_size?"),
    ),
    "a family for another task": (
        {"student": {"model": llama(1)}},
        ("student.model.config: model_type 'llama' supports causal_lm", "task.type classification"),
    ),
    "a dtype that the device lacks": (
        {"train": {"fp16": True}, "teacher": {**LATE, "finetune": {"fp16": False}}},
        ("train: fp16 is not supported on cpu; supported: fp32, bf16",),
    ),
    "a dtype that the teacher's device lacks": (
        {"teacher": {**LATE, "dtype": "fp16"}},
        ("teacher.dtype: fp16 is not supported on cpu; supported: fp32, bf16",),
    ),
    "kernels that the device lacks": (
        {"train": {"kernels": "triton"}, "teacher": {**LATE, "finetune": {}}},
        ("train.kernels: impl 'triton' ", "use 'chunked'"),
    ),
    "attention of other heads": (
        {
            "teacher": LATE,
            "student": {"model": bert(1, num_attention_heads=4)},
            "objective": [{"loss": "attention_mse"}],
        },
        ("attention_mse: the teacher has 2 attention heads, the student 4", "relation_kl"),
    ),
    "relation heads that do not divide": (
        {"teacher": LATE, "objective": [{"loss": "relation_kl", "relation_heads": 3}]},
        ("relation_kl.relation_heads 3 does not divide", "all of the vectors: 1, 2, 4, 8, 16"),
    ),
    "a flow from the only layer": (
        {"teacher": LATE, "objective": [{"loss": "relation_fsp"}]},
        (
            "relation_fsp needs two mapped layers",
            "uniform maps the only layer",
            '["0:0", "1:2"]',
        ),
    ),
    "a layer that is no layer": (
        {"teacher": LATE, "objective": [{"loss": "relation_kl", "layer_mapping": ["1:3"]}]},
        (
            "relation_kl.layer_mapping 1:3: a layer does not exist; the student has layers 0 to "
            "1, the teacher 0 to 2",
        ),
    ),
    "a preset that only trains": (
        {"teacher": {**LATE, "deepspeed": "zero2"}},
        ("teacher.deepspeed: ZeRO stage 2", "teacher_zero3"),
    ),
    "a temperature of 0": (
        {"objective": [{"loss": "soft_target_kl", "temperature": 0}]},
        ("objective[0].temperature: must be above 0 (got 0)",),
    ),
    "an unknown loss": (
        {"objective": [{"loss": "soft_target_k"}]},
        ('unknown loss "soft_target_k"; did you mean "soft_target_kl"?',),
    ),
    "an unknown method": (
        {"method": {"name": "singel"}},
        ('unknown method "singel"; did you mean "single"?',),
    ),
    "an unknown preset": (
        {"student": {"deepspeed": "zero22"}},
        ('student.deepspeed: unknown preset "zero22"; did you mean "zero2"?',),
    ),
    "an unknown key": (
        {"train": {"lerning_rate": 3}},
        ('train.lerning_rate = 3: unknown key; did you mean "learning_rate"?',),
    ),
    "a wrong type": (
        {"train": {"learning_rate": "fast"}},
        ('train.learning_rate: must be a number (got "fast")',),
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_settings_that_cannot_work(bench, case):
    sections, fragments = BROKEN[case]
    tree = bench.tree(**{k: v for k, v in sections.items() if k != "task"})
    tree["task"] |= sections.get("task", {})

    assert_refused(bench.start(tree), bench, *fragments)


def test_a_deepspeed_file_with_a_knob_of_the_run_config(bench):
    file = bench.folder / "mine.json"
    file.write_text('{"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}')

    said = bench.start(bench.tree(student={"deepspeed": str(file)}))

    assert_refused(said, bench, 'mine.json sets "gradient_clipping"', "train.max_grad_norm")


def test_no_room_for_text_between_the_special_tokens(bench):
    data = write_scored_pairs(bench.folder / "pairs")
    columns = {"text_columns": ["first", "second"], "label_column": "similarity"}
    pairs = {"type": "regression", **columns}
    tree = bench.tree({**pairs, "dataset": str(data), "max_length": 3}, teacher=LATE)

    said = bench.start(tree)

    assert_refused(said, bench, "task.max_length is 3", "3 special tokens to every pair")
