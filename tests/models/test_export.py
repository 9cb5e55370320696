"""Exported folders load with plain transformers, bring code they need, and are written whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from tiny_cuts import build, cut, loaded, logits, task_of, tokenizer, view_of, written
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from megakd.config.run import SaveConfig
from megakd.config.task import TaskConfig
from megakd.data.tokenizers import load_tokenizer
from megakd.errors import MegakdError
from megakd.models import model_folder as export
from megakd.models.architectures import CUT_FILE
from megakd.models.model_folder import brings_code, file_of_code, hub_id, write_weights
from megakd.process.seals import CHECKSUMS, copy_finished, damage, seal
from megakd.run.finished_run import export_run


def test_shards_load_and_the_index_is_complete(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(export, "SHARD_BYTES", 1000)
    model = build("llama")

    written(model, tmp_path / "final")

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    index = json.loads((tmp_path / "final" / "model.safetensors.index.json").read_text())
    files = {path.name for path in (tmp_path / "final").glob("*.safetensors")}
    assert torch.equal(logits(loaded), logits(model))
    assert set(index["weight_map"].values()) == files
    assert set(index["weight_map"]) == set(model.state_dict())
    assert index["metadata"]["total_size"] == 4 * model.num_parameters()
    assert f"model-00001-of-{len(files):05d}.safetensors" in files


def test_no_more_tensors_are_alive_than_a_shard_holds(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(export, "SHARD_BYTES", 2 * 400)
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def state() -> Iterator[tuple[str, Tensor]]:
        nonlocal most
        for number in range(12):
            tensor = torch.full((100,), float(number))
            alive.add(tensor)
            most = max(most, len(alive))
            yield str(number), tensor
            del tensor

    write_weights(tmp_path, state())

    # Two in the shard and the next. Freed memory is used again, and a tensor that comes to lie
    # where an earlier one was must not be taken for a tied one.
    assert most <= 4
    shards = [load_file(path) for path in tmp_path.glob("*.safetensors")]
    assert {name: float(value[0]) for shard in shards for name, value in shard.items()} == {
        str(number): float(number) for number in range(12)
    }


@pytest.mark.parametrize("shard", [1, 10**9], ids=["one by one", "at once"])
def test_tensors_of_every_dtype_and_shape_are_read_as_they_were(
    tmp_path: Path, monkeypatch, shard: int
) -> None:
    monkeypatch.setattr(export, "SHARD_BYTES", shard)
    table, base = torch.randn(7, 3), torch.arange(12.0).reshape(3, 4)
    state = [
        ("table", table),
        ("narrow", torch.randn(3).bfloat16()),
        ("wide", torch.randn(5)),  # begins at no multiple of four bytes
        ("scalar", torch.tensor(2.5)),
        ("nothing", torch.empty(0, 4)),
        ("counts", torch.arange(3)),
        ("row", base[1]),  # of a larger memory
        ("turned", base.T),
        ("head", table),  # tied
    ]

    dtype, result = write_weights(tmp_path, state), {}
    for file in tmp_path.glob("*.safetensors"):
        result |= load_file(file)

    assert dtype == torch.float32
    assert result.keys() == dict(state[:-1]).keys()
    for name, tensor in state[:-1]:
        assert result[name].dtype == tensor.dtype
        assert torch.equal(result[name], tensor)


def test_the_config_states_the_dtype_of_the_weights_and_no_code_and_the_runs_own_is_unchanged(
    tmp_path: Path,
) -> None:
    model = build("bert")
    model.config.auto_map = {"AutoConfig": "configuration_bert.BertConfig"}  # which BERT lacks
    before = model.config.to_dict()

    state = [(name, value.bfloat16()) for name, value in model.state_dict().items()]
    written(model, tmp_path / "final", state=state)

    config = AutoConfig.from_pretrained(tmp_path / "final", trust_remote_code=True)
    assert config.dtype == torch.bfloat16
    assert config.id2label == {0: "no", 1: "yes", 2: "perhaps"}
    assert model.config.to_dict() == before


def test_the_tokenizer_forgets_the_length_of_its_last_call(tmp_path: Path) -> None:
    called = tokenizer()
    called(["w3", "w4"], truncation=True, max_length=2, padding=True)

    folders = [
        written(build("bert"), tmp_path / name, tokenizer=one)
        for name, one in (("called", called), ("fresh", tokenizer()))
    ]

    called_file, fresh = ((folder / "tokenizer.json").read_bytes() for folder in folders)
    assert called_file == fresh


@pytest.mark.parametrize(
    ("family", "given", "length"),
    [
        ("roberta", None, 30),  # two of its positions are of the padding
        ("gpt2", 4096, 32),
        ("llama", 16, 16),
        ("enct5", 64, 64),  # its positions have no end
    ],
)
def test_an_exported_tokenizer_cuts_texts_at_the_context_of_the_model(
    tmp_path: Path, family: str, given: int | None, length: int
) -> None:
    cutting = tokenizer()
    cutting.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    cutting.model_max_length = given or cutting.model_max_length

    folder = written(build(family), tmp_path / "final", tokenizer=cutting)

    cut_text = AutoTokenizer.from_pretrained(folder)("w3 " * 99, truncation=True)
    assert len(cut_text["input_ids"]) == length
    ids = torch.tensor([cut_text["input_ids"]])
    assert loaded(folder, task_of(family))(input_ids=ids).logits.isfinite().all()
    assert cutting.model_max_length > length or given == length  # the run's own is unchanged


def test_an_exported_tokenizer_has_neither_settings_of_this_machine_nor_a_pad_token_of_the_run(
    tmp_path: Path,
) -> None:
    table = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))  # noqa: S106
    PreTrainedTokenizerFast(tokenizer_object=table, eos_token="</s>").save_pretrained(tmp_path)  # noqa: S106
    task, no_rows = TaskConfig(type="causal_lm", dataset="d", tokenizer=str(tmp_path)), None
    read = load_tokenizer(task, cast("Any", no_rows), model_folders=(), cache_dir=tmp_path)
    assert "is_local" in read.init_kwargs

    folder = written(build("llama"), tmp_path / "final", tokenizer=read)

    keys = json.loads((folder / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only", "name_or_path", "pad_token"} & keys.keys()
    assert str(tmp_path) not in "".join(file.read_text() for file in folder.glob("*.json"))
    settings = GenerationConfig.from_pretrained(folder)
    assert (settings.eos_token_id, settings.pad_token_id) == (1, None)


@pytest.mark.parametrize("ends", [None, [9, 2]], ids=["of the tokenizer", "several"])
def test_generation_ends_with_the_tokenizers_end_or_the_models_own(tmp_path: Path, ends) -> None:
    model, ending = build("llama"), tokenizer()
    model.config.eos_token_id = ends or model.config.eos_token_id
    ending.eos_token = "w2"  # noqa: S105  (no password)

    written(model, tmp_path / "final", tokenizer=ending)
    classifier = written(build("bert"), tmp_path / "classifier")

    generation = GenerationConfig.from_pretrained(tmp_path / "final")
    assert (generation.eos_token_id, generation.pad_token_id) == (ends or 2, 1)
    assert not (classifier / "generation_config.json").exists()


def test_a_failure_keeps_the_old_folder_and_takes_the_state_to_its_end(
    tmp_path: Path, monkeypatch
) -> None:
    model, taken = build("bert"), []
    old = (written(model, tmp_path / "final") / "model.safetensors").read_bytes()

    def state() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in model.state_dict().items():
            taken.append(name)
            yield name, tensor + 1

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "SHARD_BYTES", 500)
    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(MegakdError, match=r"no space left while writing .*final.*nothing was"):
        written(model, tmp_path / "final", state=state())

    assert (tmp_path / "final" / "model.safetensors").read_bytes() == old
    assert taken == list(model.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_hub_id_is_told_from_a_path(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "runs" / "final").mkdir(parents=True)  # a folder that looks like an id
    monkeypatch.chdir(tmp_path)
    specs = ["bert-base-uncased", "meta-llama/Llama-3.1-8B", "./bert", "a/b/c", "/models/bert"]
    assert [spec for spec in [*specs, "runs/final"] if hub_id(spec) is not None] == specs[:2]


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
def test_the_file_of_the_class_lies_beside_the_weights_and_megakd_never_runs_it(family, tmp_path):
    model = smaller(family)

    folder = written(model, tmp_path / "final")

    config = json.loads((folder / "config.json").read_text())
    text = (folder / FILES[family]).read_text()
    assert text == file_of_code(model.config).read_text()
    assert config["architectures"] == [type(model).__name__]
    assert f"{FILES[family][:-3]}.{type(model).__name__}" in config["auto_map"].values()
    assert brings_code(folder)
    copy_finished(folder, tmp_path / "copy", changes={"README.md": "card"}, remedy="")
    assert (tmp_path / "copy" / FILES[family]).read_text() == text
    assert brings_code(tmp_path / "copy")

    (folder / FILES[family]).write_text("raise SystemExit('this must not run')\n")
    (folder / CHECKSUMS).unlink()
    result = loaded(folder, task_of(family))

    assert type(result) is type(model)
    assert torch.equal(logits(result), logits(model))


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


def test_the_export_of_a_folder_that_an_older_version_wrote_brings_todays_code(tmp_path):
    """An older file ignores the cache of a transformers that gives it another name."""
    stage = written(smaller("llama"), tmp_path / "stages" / "student")
    (stage / "result.json").write_text("{}")
    (stage / "modeling_cut.py").write_text("# of an older version")
    (stage / CHECKSUMS).unlink()
    seal(stage)
    config: Any = SimpleNamespace(output_dir=tmp_path, save=SaveConfig())

    exported = export_run(config, "student", tmp_path / "exported")

    assert (exported / "modeling_cut.py").read_text() == CUT_FILE.read_text()
    assert damage(exported) is None
