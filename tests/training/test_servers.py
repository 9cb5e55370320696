"""The servers of a run before its models load: what they are asked, and what they cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from server_stubs import END, VOCABULARY, Stub, serving
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerFast

from megakd.config.rollout import RolloutConfig, RolloutServerConfig, SamplingConfig
from megakd.contract.tasks import STUDENT
from megakd.errors import ServerError
from megakd.servers.connect import check_servers

WORDS, FURTHER_END = 38, 37


@pytest.fixture(params=["vllm", "sglang"])
def stub(request: pytest.FixtureRequest) -> Iterator[Stub]:
    stub = Stub(request.param)
    with serving(stub):
        yield stub


def check(stub: Stub, folder: Path, *, ends: list[int], temperature: float = 1.0) -> None:
    """Checks a student of 40 tokens whose tokenizer knows 38, with `ends` in its folder."""
    tokens = Tokenizer(models.WordLevel({f"w{n}": n for n in range(WORDS - 1)}, "w0"))
    tokens.add_special_tokens(["<|eom_id|>"])
    GenerationConfig(eos_token_id=ends).save_pretrained(folder)
    config = PretrainedConfig(vocab_size=VOCABULARY, eos_token_id=END)
    source = SimpleNamespace(folder=folder, config=config, where="student.model", name="tiny")
    inputs: Any = SimpleNamespace(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token=f"w{END}"),
        sources={STUDENT: source},
        encoded=SimpleNamespace(
            train=Dataset.from_dict({"input_ids": [[5, 10]], "prompt_length": [2]})
        ),
    )
    server = RolloutServerConfig(url=(stub.url,), kind=stub.kind, push="none", model="tiny")
    sampling = SamplingConfig(temperature=temperature)
    rollout = RolloutConfig(max_new_tokens=16, sampling=sampling, server=server)
    task = SimpleNamespace(row_length=64)
    names = {"served_model": "tiny", "output_dir": folder / "out"}
    run: Any = SimpleNamespace(rollout=rollout, task=task, **names)
    check_servers(run, inputs)


def rules_of(stub: Stub) -> list[dict[str, Any]]:
    asked = [*stub.of("/v1/completions"), *stub.of("/generate")]
    return [body.get("sampling_params", body) for body in asked]


def test_texts_end_at_the_tokens_of_the_generation_config(stub: Stub, tmp_path: Path):
    """A server that knows them ends texts there, so that the run has to know them too."""
    stub.ends = [END, FURTHER_END]

    check(stub, tmp_path, ends=[END, FURTHER_END])

    rules = rules_of(stub)
    assert [set(own["stop_token_ids"]) for own in rules] == [{END, FURTHER_END}] * 3
    assert [own["temperature"] for own in rules] == [0.0, 0.0, 1.0]
    # SGLang leaves out all end tokens with ignore_eos; vLLM adds those of its folder without.
    assert [own.get("ignore_eos", False) for own in rules] == [stub.kind == "vllm"] * 3


def test_tokens_that_no_tokenizer_knows_are_never_generated(stub: Stub, tmp_path: Path):
    check(stub, tmp_path, ends=[END])

    assert [own["logit_bias"] for own in rules_of(stub)] == [{"38": -100.0, "39": -100.0}] * 3
    stub.spoil = lambda _, tree: spoiled(tree, WORDS)
    with pytest.raises(ServerError, match="token 38, and the student and its tokenizer have 38"):
        check(stub, tmp_path, ends=[END])


def spoiled(tree: Any, token: int) -> Any:
    for place in [tree, *tree.get("choices", [])]:
        place |= {key: [token] for key in ("token_ids", "output_ids") if key in place}
    return tree


def test_sglang_also_ends_texts_at_the_end_of_a_tool_call(tmp_path: Path):
    stub = Stub("sglang")
    with serving(stub):
        check(stub, tmp_path, ends=[END])

    assert {FURTHER_END, END} == set(rules_of(stub)[0]["stop_token_ids"])


def test_an_end_token_of_the_folder_that_the_student_lacks_is_refused_for_sglang(
    stub: Stub, tmp_path: Path
):
    """An ordinary word in the folder of a tokenizer with another end token."""
    if stub.kind == "vllm":
        check(stub, tmp_path, ends=[7])
        return
    with pytest.raises(ServerError, match=r"ends texts at the tokens \[7\] too.* \[1, 37\]"):
        check(stub, tmp_path, ends=[7])
    assert stub.asked == []


def test_sampling_that_a_server_refuses_is_found(tmp_path: Path):
    stub = Stub("vllm")
    with serving(stub), pytest.raises(ServerError, match=r"^rollout\.sampling: .*got 3\.0"):
        check(stub, tmp_path, ends=[END], temperature=3.0)
