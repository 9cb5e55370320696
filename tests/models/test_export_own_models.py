"""Folders of models that transformers lacks: they bring their code, and megakd runs its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_cuts import build, cut, loaded, logits, task_of, view_of, written

from megakd.config.run import SaveConfig
from megakd.models.model_folder import brings_code
from megakd.models.own_models import OWN_MODELS
from megakd.reports.latency import Work, measure_latencies
from megakd.run.finished_run import export_run
from megakd.storage.folders import CHECKSUMS, copy_finished, damage, seal

FILES = {"bert": "modeling_cut.py", "llama": "modeling_cut.py", "enct5": "modeling_t5.py"}
LOAD = """
import json, sys, torch, transformers
with open("inputs.json") as file:
    folders = json.load(file)
for folder, auto in folders.items():
    kind = getattr(transformers, auto)
    model = kind.from_pretrained(folder, trust_remote_code=True).eval()
    ids = torch.arange(2, 26).reshape(2, 12)
    with torch.inference_mode():
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.save(found, f"{folder}/found.pt")
    transformers.AutoTokenizer.from_pretrained(folder)
    if hasattr(model, "generate"):
        model.generate(ids, max_new_tokens=2, pad_token_id=1)
    if "AutoModel" in model.config.auto_map:
        transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(f"{folder}/again")
    kind.from_pretrained(f"{folder}/again", trust_remote_code=True)
assert "megakd" not in sys.modules
"""


def smaller(family: str, view: str = "empty"):
    whole = build(family)
    return cut(whole, task_of(family), view_of(whole, view))


@pytest.mark.parametrize("family", FILES)
def test_the_file_of_the_class_lies_beside_the_weights(family, tmp_path):
    model = smaller(family)

    folder = written(model, tmp_path / "final")

    config = json.loads((folder / "config.json").read_text())
    text = (folder / FILES[family]).read_text()
    assert text == OWN_MODELS[model.config.model_type].file.read_text()
    assert config["architectures"] == [type(model).__name__]
    assert f"{FILES[family][:-3]}.{type(model).__name__}" in config["auto_map"].values()
    assert brings_code(folder)


@pytest.mark.parametrize("first", [None, "ragged"], ids=["of a stock model", "of one of ours"])
def test_a_stock_model_brings_no_code(first, tmp_path):
    model = smaller("llama", "uniform")
    if first is not None:
        written(smaller("llama", first), tmp_path / "first")
        view = view_of(build("llama"), "uniform")._replace(heads=(1, 1, 1), neurons=(1, 1, 1))
        model = cut(loaded(tmp_path / "first", "causal_lm"), "causal_lm", view)

    folder = written(model, tmp_path / "final")

    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    assert list(folder.glob("*.py")) == []
    assert not brings_code(folder)


def test_a_copy_of_the_folder_keeps_the_code(tmp_path):
    folder = written(smaller("bert"), tmp_path / "stage")
    copy_finished(folder, tmp_path / "final", changes={"README.md": "card"}, remedy="")
    assert (tmp_path / "final" / "modeling_cut.py").is_file()
    assert brings_code(tmp_path / "final")


def test_plain_transformers_loads_the_folders(tmp_path):
    models = {family: smaller(family) for family in FILES}
    folders = {family: written(model, tmp_path / family) for family, model in models.items()}
    autos = {"causal_lm": "AutoModelForCausalLM"}
    inputs = {
        str(folder): autos.get(task_of(family), "AutoModelForSequenceClassification")
        for family, folder in folders.items()
    }
    (tmp_path / "inputs.json").write_text(json.dumps(inputs))

    shown = subprocess.run(
        [sys.executable, "-I", "-c", LOAD],
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )

    assert shown.returncode == 0, shown.stderr
    assert "no-op" not in shown.stderr
    ids = torch.arange(2, 26).reshape(2, 12)
    for family, folder in folders.items():
        expected = models[family](input_ids=ids).logits
        assert torch.allclose(torch.load(folder / "found.pt"), expected, atol=1e-5), family


@pytest.mark.parametrize("family", FILES)
def test_megakd_never_runs_the_code_of_a_folder(family, tmp_path):
    model = smaller(family)
    folder = written(model, tmp_path / "final")
    (folder / FILES[family]).write_text("raise SystemExit('this must not run')\n")
    (folder / CHECKSUMS).unlink()

    result = loaded(folder, task_of(family))
    latency = measure_latencies({"cut": folder}, Work((1,), 4, rounds=1))

    assert type(result) is type(model)
    assert torch.equal(logits(result), logits(model))
    assert latency[0]["ms"] > 0


def test_the_export_of_a_folder_that_an_older_version_wrote_brings_todays_code(tmp_path):
    """An older file ignores the cache of a transformers that gives it another name."""
    stage = tmp_path / "stages" / "student"
    written(smaller("llama"), stage)
    (stage / "result.json").write_text("{}")
    (stage / "modeling_cut.py").write_text("# of an older version")
    (stage / CHECKSUMS).unlink()
    seal(stage)
    config: Any = SimpleNamespace(output_dir=tmp_path, save=SaveConfig())

    exported = export_run(config, "student", tmp_path / "exported")

    assert (exported / "modeling_cut.py").read_text() == OWN_MODELS["cut_llama"].file.read_text()
    assert damage(exported) is None
