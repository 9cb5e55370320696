"""The run configs that ship with megakd, and the sizes that comments and docs give of some."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel

from megakd.config.deepspeed import load_ds_config
from megakd.config.file import load_config

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "launch" / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_an_example_is_a_valid_run_config_with_known_presets(path: Path) -> None:
    config = load_config(path)

    assert load_ds_config(config.student.deepspeed, where="student.deepspeed")
    assert config.output_dir == Path("runs") / path.stem
    assert path.read_text(encoding="utf-8").startswith("# ")
    if path.stem.startswith("minidisc_"):
        assert load_config(path, ("method.name=maxidisc",)).method.name == "maxidisc"


def test_the_quickstart_compares_with_the_labels_alone_for_as_many_steps():
    config = load_config(EXAMPLES / "quickstart.yaml")

    assert (config.method.name, config.baselines) == ("shrink", ("tfidf", "alone"))
    assert config.eval.metric == "f1_macro"
    assert config.trainings["alone"].max_steps == config.trainings["train"].max_steps


def test_the_single_teacher_that_the_pool_example_compares_with_learns_from_soft_targets_alone():
    path = EXAMPLES / "skdbert_glue.yaml"
    suggested = re.findall(r"'((?:method|objective)=[^']*)'", path.read_text(encoding="utf-8"))
    single = suggested[next(i for i, s in enumerate(suggested) if "name: single" in s) :]

    config = load_config(path, single)

    assert [term.loss for term in config.objective or ()] == ["soft_target_kl"]


PAGE = (ROOT / "docs" / "mixed-vocabulary.md").read_text(encoding="utf-8")
CONFIGS = sorted(EXAMPLES.glob("extreme_*.yaml"))
MEGABYTES = {"extreme_48": "2.33", "extreme_92": "6.79", "extreme_96": "7.31"}


def count(model: nn.Module) -> int:
    """Return the number of weights; `parameters` has shared weights once."""
    return sum(parameter.numel() for parameter in model.parameters())


def encoder(shape: BertConfig) -> nn.Module:
    with torch.device("meta"):
        return BertModel(shape, add_pooling_layer=False)


def student_of(path: Path) -> BertConfig:
    config = load_config(path)
    shape = dict(config.student.model.config)
    assert shape.pop("model_type") == "bert"
    size = config.method.own_vocabulary
    return BertConfig(**{"vocab_size": size, **shape})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_table_and_comment_have_the_counted_weights_and_the_sizes_of_the_files(path, tmp_path):
    comment = " ".join(re.findall(r"^# ?(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE))
    shape = student_of(path)
    weights = count(encoder(shape))
    teacher = count(encoder(BertConfig()))  # bert-base-uncased
    BertForMaskedLM(shape).save_pretrained(tmp_path)

    (line,) = re.findall(rf"^\| `{path.stem}` .*?\|(.*)\|$", PAGE, re.MULTILINE)
    cells = [cell.strip() for cell in line.split("|")]
    sizes = [weights * 4, (tmp_path / "model.safetensors").stat().st_size]
    megabytes = [f"{size / 1e6:.2f}" for size in sizes]
    assert cells == [f"{weights:,}", *megabytes, f"{teacher / weights:.1f}"]
    assert cells[1] == MEGABYTES.get(path.stem, cells[1])
    assert f"{cells[1]} MB in fp32" in comment
    assert f"{cells[-1]} times fewer" in comment
