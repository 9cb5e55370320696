"""A served teacher teaches as its own engine does, also texts that the student has generated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from served_models import Transformer
from server_stubs import Stub, serving
from test_rollouts import finish, texts_of, weights, write_config
from test_rollouts import texts as texts  # noqa: PLC0414 - a fixture
from tiny_texts import small_llama

SHORT = {"max_steps": 3, "tokens_per_rank": 60}


@pytest.fixture(scope="module")
def trained(launch, texts, tmp_path_factory) -> Path:
    """The folder of a trained model, which teaches."""
    folder = tmp_path_factory.mktemp("teacher")
    student = {"model": small_llama(2, 16)}
    path = write_config(folder, texts, zero=0, student=student, train={"max_steps": 2})
    return finish(launch, path, folder / "out") / "final"


def config(folder: Path, texts: Path, trained: Path, **keys: Any) -> Path:
    objective = [{"loss": "soft_target_kl"}]
    teacher = {"model": str(trained), **keys}
    task = {"tokenizer": str(trained)}
    path = write_config(folder, texts, zero=0, teacher=teacher, task=task, train=SHORT)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"objective": objective}))
    return path


def vocabulary(trained: Path) -> int:
    return json.loads((trained / "config.json").read_text())["vocab_size"]


def test_the_weights_are_those_of_a_teacher_in_its_own_engine(launch, texts, trained, tmp_path):
    """With all tokens but one, the remaining probability is that of the last token."""
    wanted = finish(launch, config(tmp_path, texts, trained), tmp_path / "own")
    stubs = [Stub("vllm", name="t", model=Transformer(trained)) for _ in range(2)]
    with serving(*stubs) as urls:
        server = {"url": urls, "model": "t", "top_k": vocabulary(trained) - 1}
        server["check_against"] = str(trained)
        out = finish(launch, config(tmp_path, texts, trained, server=server), tmp_path / "out")

    assert texts_of(out) == texts_of(wanted)
    for name, weight in weights(wanted).items():
        torch.testing.assert_close(weights(out)[name], weight, rtol=0, atol=2e-5, msg=name)
    assert json.loads((out / "report.json").read_text())["teacher"] is None
    assert all(len(stub.of("/v1/completions")) > 8 for stub in stubs)


def refused(launch, path: Path, out: Path) -> str:
    group = launch("--config", str(path), f"output_dir={out}")
    assert all(group.wait()), group.text
    assert "Traceback" not in group.text
    return group.text


def test_servers_of_another_model_than_the_reference_are_refused(launch, texts, trained, tmp_path):
    class Sharper(Transformer):
        def scores(self, prompt: list[int]) -> list[list[float]]:
            logits = torch.tensor(super().scores(prompt)) * 3
            return logits.log_softmax(-1).tolist()

    stub = Stub("vllm", name="t", model=Sharper(trained))
    with serving(stub) as urls:
        server = {"url": urls, "model": "t", "top_k": 8, "check_against": str(trained)}
        said = refused(launch, config(tmp_path, texts, trained, server=server), tmp_path / "out")

    assert f"from {trained} in the mean log-probability of the best tokens of 8 texts" in said


def test_a_server_that_teaches_and_is_not_there_is_named(launch, texts, trained, tmp_path):
    gone = Stub("vllm", name="t")
    with serving(gone) as urls:
        pass
    server = {"url": urls, "model": "t"}

    said = refused(launch, config(tmp_path, texts, trained, server=server), tmp_path / "out")

    assert f"{gone.url}/version: no server answers there" in said
