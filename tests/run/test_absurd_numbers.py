"""Numbers and files beyond all measure: one message, never a traceback or a run without end."""

from __future__ import annotations

import json

import pytest
from spoiling import Bench, assert_refused
from tiny_runs import config_tree, write_config

from megakd.config.file import load_config
from megakd.errors import ConfigError

CONFIG_KEYS = {
    "seed=1180591620717411303424": "seed: must be below 4.29497e+09",
    "train.max_steps=1000000000000000000000": "train.max_steps: must be at most",
    "train.num_train_epochs=1e300": "train.num_train_epochs: must be at most",
    "train.gradient_accumulation_steps=1000000000000": "gradient_accumulation_steps: must be at",
    "task.max_length=1000000000000": "task.max_length: must be at most",
    "log.logging_steps=1000000000000000000000000": "log.logging_steps: must be at most",
}
SIZES = {
    "hidden_size=0": "hidden_size must be a whole number from 1 to 16,777,216 (got 0)",
    "hidden_size=-16": "hidden_size must be a whole number from 1 to 16,777,216 (got -16)",
    "hidden_size=1000000000000": (
        "hidden_size must be a whole number from 1 to 16,777,216 (got 1000000000000)"
    ),
    "hidden_size=15": "hidden_size 15 is not divisible by num_attention_heads 2",
    "num_attention_heads=0": (
        "num_attention_heads must be a whole number from 1 to 16,777,216 (got 0)"
    ),
    "num_hidden_layers=0": "num_hidden_layers must be a whole number from 1 to 16,777,216 (got 0)",
    "intermediate_size=0": "intermediate_size must be a whole number from 1 to 16,777,216 (got 0)",
    "vocab_size=0": "vocab_size must be a whole number from 1 to 16,777,216 (got 0)",
    "max_position_embeddings=0": (
        "max_position_embeddings must be a whole number from 1 to 16,777,216 (got 0)"
    ),
}


@pytest.fixture
def bench(whole_run, tmp_path, one_rank) -> Bench:
    return Bench(tmp_path, whole_run.reviews, whole_run.teacher, one_rank)


@pytest.mark.parametrize("override", CONFIG_KEYS)
def test_a_number_beyond_all_measure_is_refused_by_the_config(tmp_path, override):
    tree = config_tree(tmp_path, {"type": "classification", "dataset": "reviews"})
    path = write_config(tmp_path / "run.yaml", tree)

    with pytest.raises(ConfigError) as refused:
        load_config(path, [override])

    assert CONFIG_KEYS[override] in str(refused.value)


@pytest.mark.parametrize("override", SIZES)
def test_a_size_that_no_model_can_have_is_refused_with_its_key(bench, override):
    said = bench.start(bench.tree(), f"student.model.config.{override}")

    assert_refused(said, bench, "student.model.config", SIZES[override])


def test_a_folder_whose_config_has_such_a_size_is_refused_with_the_file(bench):
    folder = bench.copied()
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_attention_heads": 0}))

    said = bench.start(bench.tree(teacher={"model": str(folder)}))

    assert_refused(said, bench, "teacher.model", file, "num_attention_heads must be a whole number")


def test_a_batch_of_more_rows_than_there_are_is_a_batch_of_all_rows(bench):
    keys = ("train.per_device_train_batch_size", "eval.per_device_eval_batch_size")

    said = bench.start(bench.tree(), "train.max_steps=2", *(f"{key}={10**12}" for key in keys))

    assert said.code == 0, said.err


@pytest.mark.parametrize("opening", ["[", "{a: "])
def test_a_config_that_is_nested_without_measure_is_refused_in_one_line(tmp_path, opening):
    closing = "]" if opening == "[" else "}"
    path = tmp_path / "deep.yaml"
    path.write_text(f"task: {opening * 3000}1{closing * 3000}\n")

    with pytest.raises(ConfigError, match="nested too deeply") as refused:
        load_config(path)

    assert "\n" not in str(refused.value)
