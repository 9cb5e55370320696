"""Exported folders are read alike by transformers 4 and 5, or say that they are not.

TRANSFORMERS4 names a folder with transformers 4.57.1, tokenizers 0.22.1 and huggingface_hub 0.36.0;
without it, pip installs them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_tokenizers import chat_tokenizer
from tiny_cuts import AUTO, DECODERS, FAMILIES, build, cut, randomised, tokenizer, view_of, written
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    BertTokenizer,
    GemmaTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
)

from megakd.data.encoding import READ_ALIKE, save_tokenizer
from megakd.data.tokenizers import Kind, train_tokenizer
from megakd.models.model_folder import needs_5, rotary_keys_of_4

OLD = ("transformers==4.57.1", "tokenizers==0.22.1", "huggingface_hub==0.36.0")
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}
LONG |= {"original_max_position_embeddings": 8}
UNKNOWN = "<unk>"
TWICE, PART = (
    {"factor": 2.0, "rope_theta": 20.0},
    {"rope_theta": 50.0, "partial_rotary_factor": 0.5},
)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("bert", "roberta", "distilbert", "electra", "gpt2", "gemma2")},
    "llama": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "mistral": ("mistral", {"rope_parameters": {"rope_type": "default", "rope_theta": 3e5}}),
    "granite": ("granite", {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}),
    "llama3": ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}),
    "yarn": ("qwen3", {"rope_parameters": {**YARN, "rope_theta": 1e6}}),
    "linear": ("llama", {"rope_parameters": {**TWICE, "rope_type": "linear"}}),
    "dynamic": ("llama", {"rope_parameters": {**TWICE, "rope_type": "dynamic"}}),
    "phi": ("phi", {"rope_parameters": {"rope_type": "default", **PART}}),
    "longrope": ("llama", {"rope_parameters": {**LONG, "rope_theta": 50.0}}),
    "phi3": ("phi3", {"rope_parameters": {**LONG, "rope_theta": 50.0}, "pad_token_id": 0}),
    "gemma3": ("gemma3_text", {"rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
    }}),
}  # fmt: skip
TEXTS = ["The  naïve student\nreads 'letters'.", "<|im_start|>user", "Ünder </s> [MASK]", "a b  c"]
READ = """
import json, sys, torch, transformers
assert transformers.__version__ == "4.57.1"
with open(sys.argv[1]) as file:
    models, tokenizers, texts = json.load(file)
ids = torch.arange(2, 26).reshape(2, 12)
for folder, auto in models.items():
    # The default attention of 4.57 leaves out the cap of Gemma 2.
    keys = {"output_loading_info": True, "attn_implementation": "eager"}
    model, info = getattr(transformers, auto).from_pretrained(folder, **keys)
    assert not any(info.values()), (folder, info)
    with torch.inference_mode():
        torch.save(model.eval()(input_ids=ids).logits, f"{folder}/logits.pt")
read = {}
for folder in tokenizers:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoded = dict(tokenizer([*texts, texts[0]], [*texts, texts[1]]))
    special = sorted(map(str, tokenizer.all_special_tokens))
    read[folder] = [encoded, dict(tokenizer(texts)), special, tokenizer.padding_side]
    read[folder] += [tokenizer.model_max_length, tokenizer.chat_template]
print(json.dumps(read))
"""


def config_of(name: str) -> Any:
    family, keys = MODELS[name]
    return CONFIG_MAPPING[family](**FAMILIES.get(family, FAMILIES["llama"]) | keys)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with transformers 4.57.1."""
    if folder := os.environ.get("TRANSFORMERS4"):
        return folder
    folder = str(tmp_path_factory.mktemp("four"))
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", folder, *OLD]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot install {' '.join(OLD)}: {done.stderr.strip()[-200:]}")
    return folder


def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    made: dict[str, PreTrainedTokenizerBase] = {"chat": chat_tokenizer("chatml")}
    made["marked"] = chat_tokenizer("llama3")
    kinds: list[Kind] = ["wordpiece", "bpe"]
    for kind in kinds:
        for encodes in (True, False):
            text = [*TEXTS, "the student reads letters"] * 20
            made[f"{kind} {encodes}"] = train_tokenizer(
                lambda text=text: text, kind=kind, vocab_size=120, for_encoder=encodes
            )
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "The", "the", "naïve", "naive", *"a.c'"]
    words = {piece: number for number, piece in enumerate(pieces)}
    made["uncased"] = BertTokenizer(vocab=words, do_lower_case=True)
    made["cased"] = BertTokenizer(vocab=words, do_lower_case=False)
    letters = {c: n for n, c in enumerate(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *"abcĠ▁"])}
    made["roberta"] = RobertaTokenizer(vocab=letters, merges=[], add_prefix_space=True)
    made["spaces"] = PreTrainedTokenizerFast(tokenizer_object=spaced(letters), unk_token=UNKNOWN)
    made["llama"] = LlamaTokenizer(vocab=letters, merges=[])
    made["gemma"] = GemmaTokenizer(vocab=letters | {"<bos>": 30, "<eos>": 31}, merges=[])
    return made


def encoded_by(reader: PreTrainedTokenizerBase) -> list[Any]:
    pairs = dict(reader([*TEXTS, TEXTS[0]], [*TEXTS, TEXTS[1]]))
    special = sorted(map(str, reader.all_special_tokens))
    return [pairs, dict(reader(TEXTS)), special, reader.padding_side]


def spaced(letters: dict[str, int]) -> Tokenizer:
    made = Tokenizer(models.BPE(letters, [], unk_token=UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return made


@pytest.mark.parametrize("name", MODELS)
def test_transformers_5_reads_the_keys_of_4_as_its_own(tmp_path: Path, name: str):
    tree = json.loads(config_of(name).to_json_string())

    (tmp_path / "config.json").write_text(json.dumps({**tree, **rotary_keys_of_4(tree)}))

    again = json.loads(AutoConfig.from_pretrained(tmp_path).to_json_string())
    again.get("rope_parameters", {}).pop("type", None)  # another name of the rope_type
    assert tree.items() <= again.items()
    beside = {"original_max_position_embeddings", "partial_rotary_factor"}
    assert again.keys() - tree.keys() <= beside
    assert not needs_5(tmp_path)


def test_an_exported_tokenizer_has_a_class_and_keys_that_transformers_4_and_5_know(tmp_path: Path):
    for name, one in tokenizers().items():
        save_tokenizer(one, tmp_path / name)

        keys = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert keys["tokenizer_class"] in {*READ_ALIKE, "PreTrainedTokenizerFast"}
        assert "extra_special_tokens" not in keys
        again = AutoTokenizer.from_pretrained(tmp_path / name)
        assert encoded_by(again) == encoded_by(one), name
        assert again.chat_template == one.chat_template


def test_what_transformers_4_has_no_keys_for_needs_5(tmp_path: Path):
    local = {"rope_type": "linear", "factor": 4.0, "rope_theta": 20.0}
    tables = {"full_attention": {**local, "rope_type": "default"}, "sliding_attention": local}
    written(build("gemma3_text", rope_parameters=tables), tmp_path / "gemma3")
    written(cut(build("llama"), "causal_lm", view_of(build("llama"), "ragged")), tmp_path / "cut")

    assert needs_5(tmp_path / "gemma3")
    assert needs_5(tmp_path / "cut")


@pytest.mark.slow
def test_transformers_4_computes_and_encodes_what_transformers_5_does(tmp_path: Path, four: str):
    folders, expected = {}, {}
    for name, (family, _) in MODELS.items():
        is_decoder = family in DECODERS or family == "phi3"
        kind = "causal_lm" if is_decoder else "classification"
        model = randomised(AUTO[kind].from_config(config_of(name))).eval()
        folder = written(model, tmp_path / name, tokenizer=tokenizer())
        folders[str(folder)] = AUTO[kind].__name__
        ids = torch.arange(2, 26).reshape(2, 12)
        expected[str(folder)] = model(input_ids=ids).logits
    made = tokenizers()
    for name, one in made.items():
        save_tokenizer(one, tmp_path / name, context=77)
    inputs = [folders, [str(tmp_path / name) for name in made], TEXTS]
    (tmp_path / "inputs.json").write_text(json.dumps(inputs))

    shown = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "inputs.json")],
        env={**os.environ, "PYTHONPATH": four},
        capture_output=True,
        text=True,
        check=False,
    )

    assert shown.returncode == 0, shown.stderr
    logits = {folder: torch.load(f"{folder}/logits.pt") for folder in expected}
    assert [f for f in folders if not torch.allclose(logits[f], expected[f], atol=1e-5)] == []
    read = json.loads(shown.stdout.splitlines()[-1])
    for name, one in made.items():
        assert read[str(tmp_path / name)] == [*encoded_by(one), 77, one.chat_template], name
