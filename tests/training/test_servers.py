"""Servers of a run: what they are asked before its models load, and the texts that they make."""

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

from megakd.config.sections import RolloutConfig, RolloutServerConfig, Sampling, SamplingConfig
from megakd.config.task import STUDENT
from megakd.errors import ServerError
from megakd.models.generation import Completion
from megakd.teachers.servers import Requirements
from megakd.training.generated_texts import ServerGenerator, check_servers, replicas_of

WORDS, FURTHER_END = 38, 37


@pytest.fixture
def pair() -> Iterator[tuple[Stub, Stub]]:
    stubs = Stub(), Stub()
    with serving(*stubs):
        yield stubs


@pytest.fixture
def stub(pair: tuple[Stub, Stub]) -> Stub:
    return pair[0]


def check(stub: Stub, folder: Path, *, ends: list[int], temperature: float = 1.0) -> None:
    """Checks a student of 40 tokens whose tokenizer knows 38, with `ends` in its folder."""
    tokens = Tokenizer(models.WordLevel({f"w{n}": n for n in range(WORDS - 1)}, "w0"))
    tokens.add_special_tokens(["<|eom_id|>"])
    GenerationConfig(eos_token_id=ends).save_pretrained(folder)
    config = PretrainedConfig(vocab_size=VOCABULARY, eos_token_id=END)
    source = SimpleNamespace(folder=folder, config=config, where="student.model", name="tiny")
    server = RolloutServerConfig(url=(stub.url,), push="none", model="tiny")
    sampling = SamplingConfig(temperature=temperature)
    rollout = RolloutConfig(max_new_tokens=16, sampling=sampling, server=server)
    task = SimpleNamespace(row_length=64)
    names = {"served_model": "tiny", "output_dir": folder / "out"}
    inputs: Any = SimpleNamespace(
        config=SimpleNamespace(rollout=rollout, task=task, **names),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token=f"w{END}"),
        sources={STUDENT: source},
        encoded=SimpleNamespace(
            train=Dataset.from_dict({"input_ids": [[5, 10]], "prompt_length": [2]})
        ),
    )
    check_servers(inputs)


def requests_of(stub: Stub) -> list[dict[str, Any]]:
    return stub.of("/v1/completions")


def test_texts_end_at_the_tokens_of_the_generation_config(stub: Stub, tmp_path: Path):
    """A server that knows them ends texts there, so that the run has to know them too."""
    stub.ends = [END, FURTHER_END]

    check(stub, tmp_path, ends=[END, FURTHER_END])

    rules = requests_of(stub)
    assert [set(rule["stop_token_ids"]) for rule in rules] == [{END, FURTHER_END}] * 2
    assert [rule["temperature"] for rule in rules] == [1.0, 0.0]
    # vLLM would add the end tokens of its folder.
    assert [rule["ignore_eos"] for rule in rules] == [True] * 2


def test_tokens_that_no_tokenizer_knows_are_never_generated(stub: Stub, tmp_path: Path):
    check(stub, tmp_path, ends=[END])

    assert [rule["logit_bias"] for rule in requests_of(stub)] == [{"38": -100.0, "39": -100.0}] * 2

    def spoiled(_: str, tree: Any) -> Any:
        for choice in tree.get("choices", []):
            choice["token_ids"] = [WORDS]
        return tree

    stub.spoil = spoiled
    with pytest.raises(ServerError, match="token 38, and the student and its tokenizer have 38"):
        check(stub, tmp_path, ends=[END])


def test_sampling_that_a_server_refuses_is_found(stub: Stub, tmp_path: Path):
    with pytest.raises(ServerError, match=r"^rollout\.server: .*got 3\.0"):
        check(stub, tmp_path, ends=[END], temperature=3.0)


PROMPTS = [[5], [8], [11], [14], [17]]
SAMPLING = Sampling(3, temperature=0.7)


def generator_of(
    stubs: Any, *, rank: int = 0, at_once: int = 8, push: Any = None
) -> ServerGenerator:
    urls = tuple(stub.url for stub in stubs)
    config = RolloutServerConfig(url=urls, push="none")
    return ServerGenerator(
        replicas_of(config),
        Requirements("tiny", 64, VOCABULARY, (END,)),
        push=push,
        place=(rank, at_once),
    )


def prompts_of(stub: Stub) -> list[list[int]]:
    return sorted(body["prompt"] for body in requests_of(stub))


@pytest.mark.parametrize("rank", [0, 1])
def test_prompts_go_to_all_replicas_in_turn_and_answers_keep_their_order(pair, rank):
    made = generator_of(pair, rank=rank)

    answer = made.begin(PROMPTS, range(5), SAMPLING)()

    assert answer == [Completion((p + 3, p + 6, p + 9), finished=False) for (p,) in PROMPTS]
    first, other = pair[rank], pair[1 - rank]
    assert prompts_of(first) == PROMPTS[::2]
    assert prompts_of(other) == PROMPTS[1::2]
    other.spoil = lambda path, tree: {"choices": []} if path == "/v1/completions" else tree
    with pytest.raises(ServerError, match=other.url):
        made.begin(PROMPTS, range(5), SAMPLING)()


def test_each_text_gets_its_own_seed_and_few_requests_run_at_once(pair):
    pair[0].delay_s = 0.05

    generator_of(pair[:1], at_once=2).begin(PROMPTS, [10, 20, 30, 40, 50], SAMPLING)()

    seeds = sorted(rule["seed"] for rule in requests_of(pair[0]))
    assert seeds == [10, 20, 30, 40, 50]
    assert pair[0].most_at_once <= 2
    assert generator_of(pair[1:]).begin([], [], SAMPLING)() == []
    assert prompts_of(pair[1]) == []


def test_a_version_is_pushed_once_and_an_answer_with_other_weights_is_refused(pair):
    pushed: list[int] = []
    made = generator_of(pair[:1], push=lambda n: pushed.append(n) or {"weights": f"run-{n}"})

    for version in (0, 0, 3, 3, 4):
        made.update(version)

    assert pushed == [0, 3, 4]
    with pytest.raises(ServerError, match="with the weights default, and run-4 were pushed"):
        made.begin(PROMPTS, range(5), SAMPLING)()
    pair[0].weights = "run-4"
    assert len(made.begin(PROMPTS, range(5), SAMPLING)()) == 5
