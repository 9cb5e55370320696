"""report.json: the counts in it, and files that are no report."""

from __future__ import annotations

import math

import pytest
import tiny_cuts
import torch
from reports import chosen_report, language_report

from megakd.errors import CheckpointError
from megakd.models.axes import named_shapes, parameter_counts
from megakd.reports.html import html_report
from megakd.reports.report_file import read_report, write_report
from megakd.reports.table import result_table

LLAMA = ("model.layers", "model.norm")


@pytest.mark.parametrize(
    ("family", "parts", "keys"),
    [
        ("bert", ["bert.encoder"], {}),
        ("roberta", ["roberta.encoder"], {}),
        ("distilbert", ["distilbert.transformer"], {}),
        ("llama", LLAMA, {}),
        ("llama", LLAMA, {"tie_word_embeddings": True}),
    ],
)
def test_encoder_parameters_leave_out_embeddings_pooler_and_head(family, parts, keys):
    model = tiny_cuts.build(family, **keys)
    inside = [p.numel() for part in parts for p in model.get_submodule(part).parameters()]
    assert parameter_counts(named_shapes(model)) == (model.num_parameters(), sum(inside))


def test_a_sharded_parameter_counts_in_full():
    model = torch.nn.Linear(4, 3)
    model.weight.ds_shape = torch.Size((4, 3))  # type: ignore[attr-defined]
    model.weight.data = torch.empty(0)
    assert parameter_counts(named_shapes(model)).parameters == 15


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
