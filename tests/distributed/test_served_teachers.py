"""A served teacher teaches as its own engine does, by its best tokens or its hidden states."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting_stubs import Exporting, ExportingTransformer
from served_models import Transformer
from server_stubs import Stub, serving
from test_rollouts import finish, refused, small_llama, texts_of, weights, write_config
from test_rollouts import texts as texts  # noqa: PLC0414 - a fixture
from transformers import AutoModelForCausalLM, AutoTokenizer

KL = [{"loss": "soft_target_kl"}]
TWO_TERMS = [
    {"loss": "soft_target_kl", "weight": 0.5, "temperature": 2.0},
    {"loss": "soft_target_reverse_kl", "weight": 0.5, "temperature": 2.0},
]
JSD = [{"loss": "soft_target_jsd", "beta": 0.3}]
PACKED = {"train": {"max_steps": 3, "tokens_per_rank": 60}}


@pytest.fixture(scope="module")
def trained(command, texts, tmp_path_factory) -> Path:
    """The folder of a model that teaches, with its tokenizer; its probabilities are not uniform."""
    folder = tmp_path_factory.mktemp("teacher")
    student = {"model": small_llama(2, 16)}
    path = write_config(folder, texts, zero=0, student=student, train={"max_steps": 1})
    made = finish(command, path, folder / "out", world=1) / "final"
    model = AutoModelForCausalLM.from_pretrained(made)
    for parameter in model.parameters():
        parameter.data.mul_(8 if parameter.dim() > 1 else 1.5)
    model.save_pretrained(folder / "sharp")
    AutoTokenizer.from_pretrained(made).save_pretrained(folder / "sharp")
    return folder / "sharp"


@pytest.fixture
def config(texts, trained, tmp_path):
    """A run, by default without generated texts, whose teacher may be served."""

    def written(objective=KL, *, zero=0, server=None, generates=False, tokens=None, **keys) -> Path:
        student = small_llama(1, 8)
        if tokens:
            student["config"]["vocab_size"] = tokens
        teacher = {"model": str(trained)} | ({"server": server} if server else {})
        if not generates:
            keys["rollout"] = None
        sections = {"train": {"max_steps": 3}, "task": {"tokenizer": str(trained)}, **keys}
        sections |= {"teacher": teacher, "student": {"model": student}, "objective": objective}
        return write_config(tmp_path, texts, zero=zero, **sections)

    return written


Served = tuple[dict[str, Any], list[Any]]


@contextmanager
def exporting(folder: Path, trained: Path) -> Iterator[Served]:
    """Servers of the trained model with slow and late files, and the key `teacher.server`."""
    states = folder / "states"
    states.mkdir()
    stubs = [Exporting(states, name="t", model=ExportingTransformer(trained)) for _ in range(2)]
    stubs[0].write_s, stubs[0].busy = 0.01, 2
    with serving(*stubs) as urls:
        yield {"url": urls, "model": "t", "states": str(states)}, stubs
    assert not list(states.iterdir())


@contextmanager
def scoring(folder: Path, trained: Path) -> Iterator[Served]:
    """With all tokens but one, the remaining probability is that of the last token."""
    del folder
    most = json.loads((trained / "config.json").read_text())["vocab_size"] - 1
    stubs = [Stub("vllm", name="t", model=Transformer(trained)) for _ in range(2)]
    with serving(*stubs) as urls:
        yield {"url": urls, "model": "t", "top_k": most}, stubs


@pytest.mark.parametrize(
    ("serve", "objective", "keys", "tolerance"),
    [
        # Packed rows, and a student with more tokens than the teacher has.
        (exporting, JSD, {**PACKED, "zero": 3, "tokens": 320}, 1e-6),
        (exporting, TWO_TERMS, {"zero": 2, "generates": True}, 1e-6),
        (scoring, KL, {**PACKED, "generates": True}, 2e-5),
    ],
)
def test_the_weights_are_those_of_a_teacher_in_its_own_engine(
    command, config, trained, tmp_path, serve, objective, keys, tolerance
):
    wanted = finish(command, config(objective, **keys), tmp_path / "own")
    with serve(tmp_path, trained) as (server, stubs):
        server["check_against"] = str(trained)
        out = finish(command, config(objective, server=server, **keys), tmp_path / "out")

    assert texts_of(out) == texts_of(wanted)
    assert bool(texts_of(out)) == ("generates" in keys)
    torch.testing.assert_close(weights(out), weights(wanted), rtol=0, atol=tolerance)
    assert json.loads((out / "report.json").read_text())["teacher"] is None
    assert all(len(stub.of("/v1/completions")) > 8 for stub in stubs)


def test_servers_of_other_weights_are_refused_before_the_run(command, config, trained, tmp_path):
    """Norm and head are those of the teacher."""
    other = AutoModelForCausalLM.from_pretrained(trained)
    torch.nn.init.normal_(other.model.layers[1].mlp.down_proj.weight)
    other.save_pretrained(tmp_path / "other")
    with exporting(tmp_path, trained) as (server, stubs):
        for stub in stubs:
            stub.model = ExportingTransformer(tmp_path / "other")
        server["check_against"] = str(trained)

        outcome = refused(command, config(server=server), tmp_path / "out")

    assert f"from {trained} in the mean log-probability of the best tokens of 8 texts" in outcome


def test_a_folder_that_a_rank_does_not_see_is_refused_before_the_run(
    command, config, trained, tmp_path
):
    with exporting(tmp_path, trained) as (server, stubs):
        server["states"] = str(tmp_path / "elsewhere")

        outcome = refused(command, config(server=server), tmp_path / "out")

    assert f"teacher.server.states: {tmp_path / 'elsewhere'} cannot be written" in outcome
    assert not any(stub.of("/v1/completions") for stub in stubs)


def test_a_server_that_mixes_up_its_files_ends_the_run_on_all_ranks(
    command, config, trained, tmp_path
):
    with exporting(tmp_path, trained) as (server, (stub, _)):
        # Right before the run, wrong in the first step.
        stub.change = lambda tensors: (
            tensors
            if len(stub.written) <= 16
            else tensors | {"token_ids": tensors["token_ids"].flip(0)}
        )

        outcome = refused(command, config(server=server), tmp_path / "out")

    assert "tokens that differs at position" in outcome
