"""A served teacher teaches as its own engine does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from served_models import Transformer
from server_stubs import Stub, serving
from test_rollouts import finish, refused, small_llama, texts_of, weights, write_config
from test_rollouts import texts as texts  # noqa: PLC0414 - a fixture
from transformers import AutoModelForCausalLM, AutoTokenizer

KL = [{"loss": "soft_target_kl"}]
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

    def written(*, zero=0, server=None, generates=False, **keys) -> Path:
        teacher = {"model": str(trained)} | ({"server": server} if server else {})
        if not generates:
            keys["rollout"] = None
        sections = {"train": {"max_steps": 3}, "task": {"tokenizer": str(trained)}, **keys}
        sections |= {"teacher": teacher, "student": {"model": small_llama(1, 8)}, "objective": KL}
        return write_config(tmp_path, texts, zero=zero, **sections)

    return written


Served = tuple[dict[str, Any], list[Any]]


@contextmanager
def serving_teacher(trained: Path) -> Iterator[Served]:
    """Servers of the trained model, one of them slow and busy at first, and `teacher.server`.

    With all tokens but one, the remaining probability is that of the last token.
    """
    most = json.loads((trained / "config.json").read_text())["vocab_size"] - 1
    stubs = [Stub(name="t", model=Transformer(trained)) for _ in range(2)]
    stubs[0].delay_s, stubs[0].busy = 0.01, 2
    with serving(*stubs) as urls:
        yield {"url": urls, "model": "t", "top_k": most}, stubs


@pytest.mark.parametrize("keys", [{"zero": 3}, {"zero": 2, "generates": True}])
def test_the_weights_are_those_of_a_teacher_in_its_own_engine(
    command, config, trained, tmp_path, keys
):
    """Rows are packed."""
    keys = {**PACKED, **keys}
    wanted = finish(command, config(**keys), tmp_path / "own")
    with serving_teacher(trained) as (server, stubs):
        out = finish(command, config(server=server, **keys), tmp_path / "out")

    assert texts_of(out) == texts_of(wanted)
    assert bool(texts_of(out)) == ("generates" in keys)
    torch.testing.assert_close(weights(out), weights(wanted), rtol=0, atol=2e-5)
    assert json.loads((out / "report.json").read_text())["teachers"] == []
    assert all(len(stub.of("/v1/completions")) > 8 for stub in stubs)


def test_replicas_of_different_weights_are_refused_before_the_run(
    command, config, trained, tmp_path
):
    other = AutoModelForCausalLM.from_pretrained(trained)
    torch.nn.init.normal_(other.model.layers[1].mlp.down_proj.weight)
    other.save_pretrained(tmp_path / "other")
    with serving_teacher(trained) as (server, stubs):
        stubs[1].model = Transformer(tmp_path / "other")

        outcome = refused(command, config(server=server), tmp_path / "out")

    assert "in the mean log-probability of the best tokens of 8 texts" in outcome


def test_a_server_that_mixes_up_its_answers_ends_the_run_on_all_ranks(
    command, config, trained, tmp_path
):
    with serving_teacher(trained) as (server, (stub, _)):

        def mix_up(path: str, tree: Any) -> Any:
            # Right before the run, wrong in the first step.
            if len(stub.of(path)) > 18 and path == "/v1/completions":
                tree["choices"][0]["prompt_token_ids"].reverse()
            return tree

        stub.spoil = mix_up

        outcome = refused(command, config(server=server), tmp_path / "out")

    assert "the answer is not about the text that was sent" in outcome
