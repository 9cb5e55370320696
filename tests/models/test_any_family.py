"""Models of any family of transformers are read as transformers computes them, or refused."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from family_reading import reading_of
from tiny_families import SMALL, TYPES
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForImageTextToText

from megakd.config.task import TaskConfig
from megakd.errors import ModelError
from megakd.models.structure import find_architecture

# Of different structure each; the slow test has all types.
FAST = {
    "causal_lm": "bart bloom camembert cohere2 ctrl dbrx falcon falcon_mamba gemma2 gemma3n_text "
    "gpt_neox gpt2 granite jetmoe lfm2 llama mixtral modernbert-decoder mpt olmo2 opt stablelm",
    "mlm": "albert deberta deberta-v2 distilbert longformer modernbert mpnet",
    "classification": "bart bert deberta-v2 llama modernbert mpnet",
}
LEAST = 0.95
"""Share of the types that run in transformers and are read exactly."""

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("task", "model_type"), [(task, name) for task, names in FAST.items() for name in names.split()]
)
def test_outputs_and_hidden_states_are_those_of_transformers(tmp_path, task, model_type):
    reading = reading_of(model_type, task, tmp_path / "model")

    assert reading.result == "equal", reading
    if model_type == "longformer":  # its layers see other positions than its outputs have
        assert reading.hidden == "refused"


@pytest.mark.slow
@pytest.mark.parametrize("task", TYPES)
def test_nearly_every_type_is_read_exactly_and_no_type_is_read_otherwise(tmp_path, task, capsys):
    readings = [reading_of(name, task, tmp_path / name) for name in sorted(TYPES[task])]

    results = Counter(reading.result for reading in readings)
    with capsys.disabled():
        print(task, dict(results), *readings, sep="\n")  # noqa: T201
    ran = results["equal"] + results["refused"] + results["differs"]
    assert [str(reading) for reading in readings if reading.result == "differs"] == []
    assert results["equal"] >= LEAST * ran
    for reading in readings:
        if reading.result == "refused":
            assert reading.model_type.split("-")[0] in reading.why.lower()
            # A run names the key of a model that mixes texts with padding, before it is loaded.
            mixes = "texts cannot share a batch" in reading.why
            assert mixes or reading.why.startswith("teacher.model")


VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
TASK = TaskConfig(type="causal_lm", dataset="d", max_length=16)
MULTIMODAL = {
    "gemma3": ({}, VISION, {"mm_tokens_per_image": 1}),
    "llava": ({"model_type": "llama"}, {**VISION, "model_type": "clip_vision_model"}, {}),
}


def saved_multimodal(folder, model_type):
    text, vision, keys = MULTIMODAL[model_type]
    config = CONFIG_MAPPING[model_type](text_config={**SMALL, **text}, vision_config=vision, **keys)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("model_type", MULTIMODAL)
def test_the_text_part_of_a_multimodal_checkpoint_is_read_alone(tiny, caplog, model_type):
    whole = saved_multimodal(tiny.folder, model_type)

    with caplog.at_level("INFO"):
        model = tiny.load(tiny.folder, TASK)

    assert re.search(r"\d+ stored weights are not used, such as .*vision", caplog.text)
    ids = torch.arange(5, 29).reshape(2, 12)
    with torch.no_grad():
        ours, theirs = (one(input_ids=ids, use_cache=False).logits for one in (model, whole))
    torch.testing.assert_close(ours, theirs)


def test_a_multimodal_model_without_a_class_for_its_text_is_refused(tiny):
    tiny.folder.mkdir()
    CONFIG_MAPPING["qwen2_vl"]().save_pretrained(tiny.folder)

    with pytest.raises(ModelError, match=r"has no AutoModelForCausalLM of a qwen2_vl model"):
        tiny.resolve(tiny.folder, TASK, with_weights=False)


def test_a_model_without_layers_and_embeddings_is_refused():
    config = AutoConfig.for_model("perceiver", num_latents=8, d_latents=16, d_model=16)

    with pytest.raises(ModelError, match="has no module whose forward gives last_hidden_state"):
        find_architecture(config, "classification")
