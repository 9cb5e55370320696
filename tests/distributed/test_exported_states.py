"""A teacher of exported hidden states teaches as its own engine does, with every loss on logits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting_stubs import Exporting, ExportingTransformer
from server_stubs import serving
from test_rollouts import finish, texts_of, weights, write_config
from test_rollouts import texts as texts  # noqa: PLC0414 - a fixture
from tiny_texts import small_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

TERMS = [
    {"loss": "soft_target_kl", "weight": 0.5, "temperature": 2.0},
    {"loss": "soft_target_reverse_kl", "weight": 0.5, "temperature": 2.0},
]
JSD = [{"loss": "soft_target_jsd", "beta": 0.3}]


@pytest.fixture(scope="module")
def trained(launch, texts, tmp_path_factory) -> Path:
    """The folder of a model that teaches, with its tokenizer; its probabilities are not uniform."""
    folder = tmp_path_factory.mktemp("teacher")
    student = {"model": small_llama(2, 16)}
    path = write_config(folder, texts, zero=0, student=student, train={"max_steps": 1})
    made = finish(launch, path, folder / "out", world=1) / "final"
    model = AutoModelForCausalLM.from_pretrained(made)
    for parameter in model.parameters():
        parameter.data.mul_(8 if parameter.dim() > 1 else 1.5)
    model.save_pretrained(folder / "sharp")
    AutoTokenizer.from_pretrained(made).save_pretrained(folder / "sharp")
    return folder / "sharp"


def config(
    folder: Path, texts: Path, trained: Path, objective: list[Any], *, zero: int = 0, **keys: Any
) -> Path:
    """A run without generated texts, unless `rollout` is given."""
    server = keys.pop("server", None)
    teacher = {"model": str(trained)} | ({"server": server} if server else {})
    train = {"max_steps": 3, **keys.pop("train", {})}
    student = small_llama(1, 8)
    if "vocabulary" in keys:
        student["config"]["vocab_size"] = keys["vocabulary"]
    path = write_config(
        folder,
        texts,
        zero=zero,
        teacher=teacher,
        student={"model": student},
        task={"tokenizer": str(trained)},
        train=train,
    )
    tree = json.loads(path.read_text()) | {"objective": objective}
    if not keys.pop("rollout", False):
        del tree["rollout"]
    path.write_text(json.dumps(tree))
    return path


@contextmanager
def exporting(
    folder: Path, trained: Path, count: int = 2
) -> Iterator[tuple[dict, list[Exporting]]]:
    """Servers of the trained model with slow and late files, and the key `teacher.server`."""
    states = folder / "states"
    states.mkdir()
    stubs = [Exporting(states, name="t", model=ExportingTransformer(trained)) for _ in range(count)]
    stubs[0].write_s, stubs[0].busy = 0.01, 2
    with serving(*stubs) as urls:
        yield {"url": urls, "model": "t", "states": str(states)}, stubs
    assert not list(states.iterdir())


@pytest.mark.parametrize(
    ("zero", "objective", "keys"),
    [
        (0, TERMS, {}),
        # Packed rows, and a student with more tokens than the teacher has.
        (3, JSD, {"train": {"tokens_per_rank": 60}, "vocabulary": 320}),
        pytest.param(2, TERMS, {"rollout": True}, id="on-policy"),
    ],
)
def test_the_weights_are_those_of_a_teacher_in_its_own_engine(
    launch, texts, trained, tmp_path, zero, objective, keys
):
    path = config(tmp_path, texts, trained, objective, zero=zero, **keys)
    wanted = finish(launch, path, tmp_path / "own")
    with exporting(tmp_path, trained) as (server, stubs):
        server["check_against"] = str(trained)
        keys = {**keys, "server": server}
        path = config(tmp_path, texts, trained, objective, zero=zero, **keys)
        out = finish(launch, path, tmp_path / "out")

    assert texts_of(out) == texts_of(wanted)
    assert bool(texts_of(out)) == ("rollout" in keys)
    for name, weight in weights(wanted).items():
        torch.testing.assert_close(weights(out)[name], weight, rtol=0, atol=1e-6, msg=name)
    assert json.loads((out / "report.json").read_text())["teacher"] is None
    assert all(len(stub.of("/v1/completions")) > 8 for stub in stubs)


def changed_copy(folder: Path, copy: Path) -> Path:
    """Write the model with another MLP in its last layer; norm and head stay."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.normal_(model.model.layers[1].mlp.down_proj.weight)
    model.save_pretrained(copy)
    return copy


def refused(launch, path: Path, out: Path) -> str:
    group = launch("--config", str(path), f"output_dir={out}")
    assert all(group.wait()), group.text
    assert "Traceback" not in group.text
    return group.text


def test_a_server_of_other_weights_is_refused_before_the_run(launch, texts, trained, tmp_path):
    other = changed_copy(trained, tmp_path / "other")
    with exporting(tmp_path, trained, count=1) as (server, (stub,)):
        stub.model = ExportingTransformer(other)
        server["check_against"] = str(trained)
        path = config(tmp_path, texts, trained, TERMS, server=server)

        said = refused(launch, path, tmp_path / "out")

    assert f"from {trained} in the mean log-probability of the best tokens of 8 texts" in said


def test_a_folder_that_a_rank_does_not_see_is_refused_before_the_run(
    launch, texts, trained, tmp_path
):
    with exporting(tmp_path, trained, count=1) as (server, (stub,)):
        server["states"] = str(tmp_path / "elsewhere")
        path = config(tmp_path, texts, trained, TERMS, server=server)

        said = refused(launch, path, tmp_path / "out")

    assert f"teacher.server.states: {tmp_path / 'elsewhere'} cannot be written" in said
    assert not stub.of("/v1/completions")


def test_a_server_that_mixes_up_its_files_ends_the_run_on_all_ranks(
    launch, texts, trained, tmp_path
):
    with exporting(tmp_path, trained, count=1) as (server, (stub,)):
        # Right before the run, wrong in the first step.
        stub.change = lambda tensors: (
            tensors
            if len(stub.written) <= 16
            else tensors | {"token_ids": tensors["token_ids"].flip(0)}
        )
        path = config(tmp_path, texts, trained, TERMS, server=server)

        said = refused(launch, path, tmp_path / "out")

    assert "tokens that differs at position" in said
