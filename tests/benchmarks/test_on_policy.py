"""The comparison of off-policy and on-policy distillation: its data, its runs and its table."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from megakd.config.file import load_config

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import on_policy
from launching import write_config


def test_completions_are_the_partial_sums_and_no_held_out_prompt_is_trained_on(tmp_path: Path):
    on_policy.write_data(tmp_path)
    rows = {
        split: [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "validation")
    }

    for row in rows["validation"]:
        digits = [int(digit) for digit in row["prompt"].rstrip("=").split("+")]
        assert row["completion"].split(",") == [
            str(sum(digits[:count])) for count in range(2, len(digits) + 1)
        ]
    trained = {row["prompt"] for row in rows["train"]}
    assert len(trained) == len(rows["train"])
    assert not trained & {row["prompt"] for row in rows["validation"]}


def test_the_tokenizer_has_a_token_per_character(tmp_path: Path):
    on_policy.write_data(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")

    assert len(tokenizer("12+3=15,").input_ids) == 8
    assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<end>")


def test_every_run_is_a_valid_config_and_only_two_students_write_texts(tmp_path: Path):
    given = on_policy.parse(["--out", str(tmp_path)])
    configs = {name: on_policy.arm(given, name, tmp_path / "start") for name in on_policy.ARMS}
    configs |= {"teacher": on_policy.teacher_config(given), "half": on_policy.half_way(given)}

    for name, config in configs.items():
        path = write_config(tmp_path / f"{name}.yaml", {"output_dir": "x", **config})
        load_config(path, ())
    writing = {name for name, config in configs.items() if "rollout" in config}
    assert writing == {"on_policy", "mixed"}
    assert len({configs[name]["train"]["max_steps"] for name in on_policy.ARMS}) == 1


def test_the_table_has_a_mean_over_the_seeds_for_every_student(capsys: pytest.CaptureFixture[str]):
    cells: on_policy.Cells = {"half-way": {}, "on_policy": {}}
    for right in (0.2, 0.4):
        on_policy.add(cells["half-way"], {"eval/match": right, "eval/loss": 1.0})
        on_policy.add(cells["on_policy"], {"eval/match": 2 * right, "eval/soft_target_kl": 0.1})

    on_policy.show(cells, "the command")

    printed = capsys.readouterr().out
    assert "0.300 ±0.141" in printed
    assert "half-way 0.300; on_policy 0.600" in printed
