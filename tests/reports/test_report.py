"""report.json and metrics.jsonl: the counts, the curves, and files that are damaged."""

from __future__ import annotations

import math

import pytest
import tiny_cuts
import torch
from reports import chosen_report, language_report

from megakd.errors import CheckpointError
from megakd.models.structure import parameter_counts
from megakd.reports.html import html_report
from megakd.reports.report_file import curves_of, read_history, read_report, write_report
from megakd.reports.table import result_table

LLAMA = ("model.layers", "model.norm")


@pytest.mark.parametrize(
    ("family", "parts", "keys"),
    [
        ("bert", ["bert.encoder"], {}),
        ("distilbert", ["distilbert.transformer"], {}),
        ("llama", LLAMA, {}),
        ("llama", LLAMA, {"tie_word_embeddings": True}),
    ],
)
def test_encoder_parameters_leave_out_embeddings_pooler_and_head(family, parts, keys):
    model = tiny_cuts.build(family, **keys)
    inside = [p.numel() for part in parts for p in model.get_submodule(part).parameters()]
    assert parameter_counts(model) == (model.num_parameters(), sum(inside))


def test_a_sharded_parameter_counts_in_full():
    model = tiny_cuts.build("bert")
    weight, before = model.bert.encoder.layer[0].output.dense.weight, parameter_counts(model)
    weight.ds_shape, weight.data = weight.shape, torch.empty(0)
    assert parameter_counts(model) == before


@pytest.mark.parametrize("report", [chosen_report(), language_report()])
def test_what_a_run_writes_is_read_back_and_a_number_that_is_not_finite_is_null(tmp_path, report):
    name = f"student.{report['metric_name']}"
    path = tmp_path / "report.json"
    write_report(path, report | {name: math.nan})

    result = read_report(path)

    assert result == report | {name: None}
    assert result_table(result)
    assert html_report(result, [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "report.json is damaged: it is not JSON"),
        ("[" * 100_000, "report.json is damaged: it is not JSON"),
        ("[]", "is not a report of this version of megakd: method, task"),
        ('{"method": "single", "task": "t"}', "megakd: metric_name, metrics, models, student.par"),
    ],
)
def test_a_file_that_is_no_report_is_named_with_what_to_do(tmp_path, content, message):
    path = tmp_path / "report.json"
    path.write_text(content)

    with pytest.raises(CheckpointError, match=message) as refused:
        read_report(path)

    assert f"remove {path} and start the command of the run again" in str(refused.value)


# metrics.jsonl as curves: what is read and what is passed over.


def test_numbers_become_curves_by_stage_and_key_as_they_were_last_logged():
    losses = [(10, 1.0), (20, 9.0), (30, 9.0), (20, 2.0), (30, 3.0), (40, None), (50, math.nan)]
    losses += [(60, math.inf), (70, -math.inf), (80, 10**400), (90, 4.0)]
    history = [{"stage": "student", "step": step, "train/loss": loss} for step, loss in losses]
    history[0]["eval/view/f1"] = 0.1
    history.append({"stage": "teacher", "step": 5, "train/loss": 3.0})
    history.append({"stage": "teacher", "step": 10**400, "train/loss": 1.0})

    assert curves_of(history) == {
        "student": {
            "train/loss": [(10, 1.0), (20, 2.0), (30, 3.0), (90, 4.0)],
            "eval/view/f1": [(10, 0.1)],
        },
        "teacher": {"train/loss": [(5, 3.0)]},
    }


def test_damaged_and_half_lines_are_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"stage": "a"\n[1]\n{"step": 1}\n{"step": 2, "tr')
    assert list(read_history(path)) == [{"step": 1}]
    assert list(read_history(tmp_path / "no such file")) == []
