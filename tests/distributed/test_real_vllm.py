"""A real vLLM server: it continues, teaches and takes weights as the stubs of the other tests do.

The tests take minutes, and an environment of their own: see tests/support/vllm_cpu/make.sh.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from real_vllm import HOW, vllm_server
from test_rollouts import WORDS, finish, refused, texts_of, weights, write_config
from test_rollouts import texts as texts  # noqa: PLC0414 - a fixture
from tiny_runs import merged
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from megakd.config.sections import Sampling
from megakd.errors import ServerError
from megakd.models.end_tokens import TextTokens
from megakd.models.generation import Completion, complete
from megakd.teachers.servers import Requirements, ServedModel, VllmServer
from megakd.training.generated_texts import check_texts
from megakd.training.served_teachers import REPEATED

pytestmark = [pytest.mark.slow, pytest.mark.skipif("MEGAKD_VLLM" not in os.environ, reason=HOW)]
END, FURTHER_END, KNOWN, VOCABULARY = 2, 0, 290, 320
PROMPTS = tuple((40 + n, 90 + 2 * n, 100) for n in range(6))
# Prefixes are cached by whole blocks, which have 128 tokens on a CPU unless told otherwise.
BLOCKS = ("--block-size", "32")
LORA = ("--enable-lora", "--max-lora-rank", "8", "--max-loras", "2", "--max-cpu-loras", "4")


def write_model(folder: Path, seed: int) -> Path:
    """A Qwen2 with random weights, two end tokens, and rows for unknown tokens."""
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=KNOWN,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
    )
    tokens.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token=special[END], pad_token=special[FURTHER_END]
    )
    fast.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        eos_token_id=END,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.15)
    # Sampling rules of its own, which no text may follow.
    model.generation_config = GenerationConfig(
        eos_token_id=[END, FURTHER_END], do_sample=True, temperature=0.7, top_k=20
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return write_model(folder / "one", 0), write_model(folder / "other", 1)


@pytest.fixture(scope="module")
def url(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("log") / "vllm.txt"
    with vllm_server(folders[0], log, *LORA, *BLOCKS, "--max-logprobs", "64") as url:
        yield url


def connected(url: str) -> VllmServer:
    return VllmServer(url, time_limit_s=300, patience_s=5)


def requirements_of(folder: Path) -> Requirements:
    ends = (FURTHER_END, END)
    return Requirements(str(folder), 128, KNOWN, ends, padding=range(KNOWN, VOCABULARY))


def served(url: str, folder: Path, sampling: Sampling, seed: int = 0) -> list[Completion]:
    server, rest = connected(url), (sampling, requirements_of(folder))
    model = ServedModel(str(folder))
    return [
        server.complete(prompt, seed + number, *rest, model=model)
        for number, prompt in enumerate(PROMPTS)
    ]


def greedy_of(folder: Path) -> list[Completion]:
    tokens = TextTokens(frozenset({END, FURTHER_END}), known=KNOWN)
    model = Qwen2ForCausalLM.from_pretrained(folder).eval()
    return complete(model, PROMPTS, [0] * 6, GREEDY, tokens=tokens, rows_at_once=6)


GREEDY = Sampling(16, temperature=0.0)


def test_texts_are_those_of_the_model_and_end_at_all_its_end_tokens(url, folders):
    assert served(url, folders[0], GREEDY) == greedy_of(folders[0])

    sampled = [text for seed in (0, 6) for text in served(url, folders[0], Sampling(40), seed)]
    assert {text.ids[-1] for text in sampled if text.finished} == {END, FURTHER_END}


def test_sampling_that_vllm_refuses_is_found(url, folders):
    servers, requirements = [connected(url)], requirements_of(folders[0])
    check_texts(servers, PROMPTS, requirements, Sampling(16, temperature=2.0))

    with pytest.raises(ServerError, match=r"temperature.* got 3\.0"):
        check_texts(servers, PROMPTS, requirements, Sampling(16, temperature=3.0))


def test_the_best_tokens_are_those_of_the_model(url, folders):
    text = tuple(range(40, 60))
    best = connected(url).top_k(text, 64, str(folders[0]))
    gaps = []
    for folder in folders[:2]:
        model = Qwen2ForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            logprobs = model(torch.tensor([text])).logits[0, :-1].float().log_softmax(-1)
        its = logprobs.gather(-1, torch.from_numpy(best.ids).long()).numpy()
        gaps.append(np.abs(best.logprobs - its).mean())

    assert gaps[0] < REPEATED < gaps[1]


def test_a_server_takes_other_weights_and_forgets_its_prefixes(url, folders):
    server = connected(url)
    try:
        server.load_weights(folders[1], "run-s1-1")
        assert served(url, folders[0], GREEDY) == greedy_of(folders[1])
        model = server.model(requirements_of(folders[0])._replace(takes_weights=True))
        assert model.weights == "run-s1-1"
    finally:
        server.load_weights(folders[0], "default")
    assert served(url, folders[0], GREEDY) == greedy_of(folders[0])


def write_run(folder: Path, texts: Path, folders: tuple[Path, Path], **keys: Any) -> Path:
    """Two steps of the served model on its greedy texts."""
    student, teacher = map(str, folders)
    tree: dict[str, Any] = {
        "task": {"tokenizer": student, "max_length": 64},
        "teacher": {"model": teacher},
        "student": {"model": student},
        "train": {"max_steps": 2, "per_device_train_batch_size": 6, "learning_rate": 0.01},
        "rollout": {"mix": 1.0, "sampling": {"temperature": 0}, "prompt_tokens": 40},
    }
    return write_config(folder, texts, zero=0, **merged(tree, keys))


def states_versions(url: str) -> bool:
    """Whether answers name their weights, which vLLM does from 0.33 on."""
    major, minor = json.loads(connected(url).ask("/version").text)["version"].split(".")[:2]
    return (int(major), int(minor)) >= (0, 33)


def test_a_run_that_pushes_all_weights_ends_as_one_with_texts_of_its_own_engine(
    url, folders, command, texts, tmp_path
):
    server, out = {"url": [url], "push": "full", "folder": str(tmp_path / "w")}, tmp_path / "out"
    config = write_run(tmp_path, texts, folders, rollout={"server": server})
    if not states_versions(url):
        assert "has no weight_versions, which vLLM states" in refused(command, config, out)
        pytest.skip("refused: vLLM is older than 0.33")
    try:
        finish(command, config, out, world=1)
    finally:
        connected(url).load_weights(folders[0], "default")

    wanted = finish(command, write_run(tmp_path, texts, folders), tmp_path / "own", world=1)
    assert texts_of(out) == texts_of(wanted)
    torch.testing.assert_close(weights(out), weights(wanted), rtol=0, atol=2e-5)


def test_adapters_of_every_start_are_new_to_the_server(url, folders, command, texts, tmp_path):
    """Two runs of one folder: the second one must not learn from texts of the first one."""
    lora = {"lora": {"r": 4}}
    server = {"url": [url], "push": "adapter", "folder": str(tmp_path / "w")}
    local = write_run(tmp_path, texts, folders, student=lora)
    wanted, out = finish(command, local, tmp_path / "own", world=1), tmp_path / "out"
    config = write_run(tmp_path, texts, folders, student=lora, rollout={"server": server})
    finish(command, config, out, "train.learning_rate=1", world=1)
    shutil.rmtree(out)

    finish(command, config, out, world=1)

    assert texts_of(out) == texts_of(wanted)
    assert len(connected(url).adapters()) == 1


def test_adapters_are_loaded_and_unloaded_twice_without_an_error(url, folders, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = Qwen2ForCausalLM.from_pretrained(folders[0])
    with warnings.catch_warnings(action="ignore"):  # peft calls what transformers renames
        get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    server = connected(url)
    before = server.adapters()

    for _ in range(2):
        server.load_adapter("twice", tmp_path)
    assert server.adapters() == [*before, "twice"]
    for _ in range(2):
        server.unload_adapter("twice")

    assert server.adapters() == before
