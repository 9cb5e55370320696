"""report.json: the counts and versions in it, and damage that is named by its key."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import tiny_cuts
import torch
from reports import chosen_report, language_report, report_of

from megakd.errors import CheckpointError
from megakd.models.axes import named_shapes, parameter_counts
from megakd.reports.html import html_report, write_html_report
from megakd.reports.report_file import read_report, write_report

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


ROW = {"step": 1, "width": 8, "parameters": 90, "teacher_kl": None, "step_seconds": None}
DAMAGE: dict[str, tuple[tuple[str | int, ...], Any, str]] = {
    "no stages": (("stages",), None, "stages is null, and must be a list"),
    "a null time": (("stages", 1, "seconds"), None, "stages[1].seconds is null"),
    "an endless time": (("seconds",), {"data": math.inf}, "seconds.data is inf"),
    "a huge size": (("student", "parameters"), 10**400, "student.parameters is 1000"),
    "a number for a name": (("method",), 3, "method is 3, and must be text"),
    "onnx without bytes": (
        ("student", "onnx"),
        {"metrics": {}},
        "student.onnx.bytes is missing",
    ),
    "pruning in one": (("pruning",), [ROW, [2]], "pruning[1] is [2], and must be a mapping"),
    "a null width": (("pruning",), [{**ROW, "width": None}], "pruning[0].width is null"),
    "a wordy KL": (("pruning",), [{**ROW, "teacher_kl": "far"}], 'pruning[0].teacher_kl is "far"'),
    "half a pruning": (("pruning",), [{"step": 1}], "pruning[0].width is missing"),
    "half a candidate": (("candidates",), [{"iteration": 1}], "candidates[0].sparsity is missing"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_by_its_key(tmp_path, case):
    keys, value, message = DAMAGE[case]
    report: Any = json.loads(json.dumps(report_of()))
    node = report
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))

    with pytest.raises(CheckpointError) as refused:
        write_html_report(tmp_path)

    assert str(refused.value).startswith(f"{path} is damaged: {message}")
    assert f"remove {path} and start the command of the run again" in str(refused.value)


@pytest.mark.parametrize("report", [chosen_report(), language_report()])
def test_what_a_run_writes_is_read_back(tmp_path, report):
    report["student"]["metrics"] = dict.fromkeys(report["student"]["metrics"], math.nan)
    report["student"]["onnx"] = {"bytes": 2_190_000, "metrics": {"accuracy": 0.74}}
    report["pruning"] = [ROW, {**ROW, "step": 2, "teacher_kl": math.nan, "step_seconds": 0.5}]
    text = {"prompt": "2 +", "text": "4", "wanted": "4", "finished": True, "matches": None}
    report["generation"] = [{"stage": "student", "step": 3, "metrics": {}, "texts": [text]}]
    report["warnings"] = [{"stage": "student", "kind": "rollout", "step": 9, "message": "long"}]
    path = tmp_path / "report.json"
    write_report(path, report)

    result = read_report(path)

    assert result["student"]["metrics"] == dict.fromkeys(report["student"]["metrics"])
    kept = ("generation", "warnings")
    assert result["student"]["onnx"] == report["student"]["onnx"]
    assert [result[key] for key in kept] == [report[key] for key in kept]
    assert result["pruning"] == [ROW, {**ROW, "step": 2, "step_seconds": 0.5}]
    assert html_report(result, [])
