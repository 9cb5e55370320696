"""The check of servers of hidden states: one answer, and one that norm and head agree with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting_stubs import Exporting, ExportingTransformer
from server_stubs import serving
from transformers import LlamaConfig, LlamaForCausalLM

from megakd.config.rollout import TeacherServerConfig
from megakd.config.task import TaskConfig
from megakd.errors import ServerError
from megakd.models.loading import resolve_model
from megakd.models.next_tokens import Readout, load_readout
from megakd.models.source import ModelSource
from megakd.servers.teachers import check_states, teacher_replicas

TEXTS = [(5, 8, 30, 2), (7, 9), (1, 2, 3, 4, 5, 6)]
TASK = TaskConfig(type="causal_lm", dataset="d", max_length=32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, num_hidden_layers=3))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "states").mkdir()
    return tmp_path


@pytest.fixture
def stub(folder: Path) -> Iterator[Exporting]:
    stub = Exporting(folder / "states", model=ExportingTransformer(folder / "model"))
    with serving(stub):
        yield stub


def source_of(folder: Path) -> ModelSource:
    return resolve_model(str(folder / "model"), TASK, where="teacher.model")


def readout_of(folder: Path) -> Readout:
    return load_readout(source_of(folder), TASK, torch.float32)


def checked(folder: Path, readout: Readout, *stubs: Exporting) -> Any:
    server = TeacherServerConfig(
        url=tuple(stub.url for stub in stubs), states=folder / "states", time_limit=20
    )
    replicas: Any = teacher_replicas(server, source_of(folder))
    return check_states(replicas, ["tiny"] * len(stubs), TEXTS, readout)


def test_the_answers_are_the_probabilities_of_the_model(folder: Path, stub: Exporting):
    answers = checked(folder, readout_of(folder), stub)

    model = LlamaForCausalLM.from_pretrained(folder / "model")
    for text, answer in zip(TEXTS, answers, strict=True):
        with torch.no_grad():
            wanted = model(torch.tensor([text])).logits[0, :-1].log_softmax(-1)
        assert len(answer.ids) == len(text) - 1
        ids, logprobs = map(torch.from_numpy, answer)
        torch.testing.assert_close(logprobs, wanted.gather(1, ids.long()), rtol=0, atol=1e-5)
        assert torch.equal(ids[:, 0].long(), wanted.argmax(1))
    assert len(stub.of("/v1/completions")) == 2 * len(TEXTS)


def other_layer(stub: Exporting, _: object = None, count: int = 2) -> None:
    """Let the server export the output of an earlier layer."""
    stub.model.layers.layers = stub.model.layers.layers[:count]


def other_token(stub: Exporting, _: object) -> None:
    stub.model.continue_ = lambda _prompt, _rules: [40]


def other_width(stub: Exporting, _: object) -> None:
    stub.change = lambda tensors: (
        tensors | {"hidden_states": tensors["hidden_states"][..., :8].contiguous()}
    )


def other_head(_: object, readout: Readout) -> None:
    readout.weight.data.copy_(readout.weight.flip(0))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_layer, r"greedy tokens of .* less likely .* \[num_hidden_layer"),
        (other_token, r"generated token 40, and the teacher has 40 tokens"),
        (other_width, r"shape \[4, 1, 8\] .* \[4, 1, 16\] is expected"),
        (other_head, r"serves the weights of teacher\.model"),
    ],
)
def test_a_server_of_another_model_is_found_without_a_reference(folder, stub, spoil, message):
    readout = readout_of(folder)
    spoil(stub, readout)

    with pytest.raises(ServerError, match=message):
        checked(folder, readout, stub)


def test_replicas_that_disagree_are_refused(folder: Path, stub: Exporting):
    other = Exporting(folder / "states", model=ExportingTransformer(folder / "model"))
    other_layer(other, count=1)
    with serving(other), pytest.raises(ServerError, match=r"differ by .* at most 0\.05") as caught:
        checked(folder, readout_of(folder), stub, other)

    assert stub.url in str(caught.value)
    assert other.url in str(caught.value)
