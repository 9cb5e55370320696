"""The check of servers of hidden states: one answer, and one that norm and head agree with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

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


def check(folder: Path, *stubs: Exporting, spoil: Callable = lambda *_: None) -> None:
    source = resolve_model(str(folder / "model"), TASK, where="teacher.model")
    readout = load_readout(source, TASK, torch.float32)
    spoil(stubs[0], readout)
    server = TeacherServerConfig(
        url=tuple(stub.url for stub in stubs), states=folder / "states", time_limit=20
    )
    replicas = teacher_replicas(server, source)
    check_states(replicas, ["tiny"] * len(stubs), TEXTS, readout)


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
    with pytest.raises(ServerError, match=message):
        check(folder, stub, spoil=spoil)


def test_replicas_that_disagree_are_refused(folder: Path, stub: Exporting):
    other = Exporting(folder / "states", model=ExportingTransformer(folder / "model"))
    other_layer(other, count=1)
    with serving(other), pytest.raises(ServerError, match=r"differ by .* at most 0\.05") as caught:
        check(folder, stub, other)

    assert stub.url in str(caught.value)
    assert other.url in str(caught.value)
