"""Servers get the names and bytes of the exported model, shard by shard, at every ZeRO stage."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from cases import started
from equal_runs import LANGUAGE
from safetensors.torch import load_file
from server_stubs import Stub, serving
from transformers import AutoModelForCausalLM

from megakd.engine import distributed
from megakd.errors import MegakdError
from megakd.models.cutting import content_of
from megakd.servers.texts import AdapterPush, FullPush
from megakd.servers.vllm import VllmServer
from megakd.training.stage_folder import consume, write_stage_folder


def full(config_path: str, overrides: list[str], folder: str, urls: list[str]) -> str | None:
    """Two updates of the student with a push after each, then the export; the pushed version."""
    servers = [VllmServer(url, time_limit_s=60) for url in urls]
    with started(config_path, overrides) as (run, _):
        student = run.student.student
        push = FullPush(student, servers, Path(folder) / "run" / "run-s1")
        with patch("megakd.servers.texts.SHARD_BYTES", 3000):
            for version in (1, 2):
                run.trainer.train_step(run.source.step(version - 1))
                pushed = push.push(version)
        models = {"student": content_of(student, None)}
        if distributed.ranks().is_main:
            write_stage_folder(Path(folder) / "export", models, extra={})
        else:
            consume(models, None)
    return pushed["weights"]


def refused(config_path: str, overrides: list[str], folder: str, urls: list[str]) -> list[str]:
    """The messages of a folder without room and of a server that loads nothing; then a step."""
    servers = [VllmServer(url, time_limit_s=60) for url in urls]
    answers = []
    with started(config_path, overrides) as (run, _):
        push = FullPush(run.student.student, servers, Path(folder) / "run" / "run-s1")
        for needed in (10**18, 1):
            try:
                with patch("megakd.servers.texts._bytes_of", lambda _, needed=needed: needed):
                    push.push(1)
            except MegakdError as error:
                answers.append(str(error))
        run.trainer.train_step(run.source.step(0))
    return answers


def adapters(config_path: str, overrides: list[str], folder: str, urls: list[str]) -> list[str]:
    """Three updates with a push after each; the names of the pushed adapters."""
    servers = [VllmServer(url, time_limit_s=60) for url in urls]
    names = []
    with started(config_path, overrides) as (run, _):
        push = AdapterPush(run.student.student, servers, Path(folder) / "run" / "run-s1", keep=2)
        for version in (1, 2, 3):
            run.trainer.train_step(run.source.step(version - 1))
            names.append(push.push(version)["name"])
    return names


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def pushes_of(stub: Stub) -> list[tuple[str, str]]:
    folders = [body["kwargs"]["weights_path"] for body in stub.of("/collective_rpc")]
    versions = [body["new_version"] for body in stub.of("/update_weight_version")]
    return list(zip(folders, versions, strict=True))


@pytest.mark.parametrize(("zero", "student"), [(3, "llama-tied"), (0, "llama-untied")])
def test_names_and_bytes_pushed_are_those_of_the_exported_model(
    workers, write_run, tmp_path, zero, student
):
    path = write_run(student, LANGUAGE, (zero, 0))
    stubs = [Stub(), Stub()]
    for stub in stubs:
        stub.development = True
    with serving(*stubs) as urls:
        versions = workers(2).run("test_pushed_weights.full", path, [], str(tmp_path), urls)

    run, last = tmp_path / "run" / "run-s1", tmp_path / "run" / "run-s1" / "version-2"
    pushed, wanted = tensors_of(last), tensors_of(tmp_path / "export")
    assert versions == ["run-s1-2", "run-s1-2"]
    assert len(list(last.glob("*.safetensors"))) > 3
    assert pushed.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert pushed[name].dtype == tensor.dtype
        assert torch.equal(*(t.contiguous().view(torch.uint8) for t in (pushed[name], tensor)))
    # Earlier versions make room; every replica reads every version.
    assert [path.name for path in run.iterdir()] == ["version-2"]
    for stub in stubs:
        folders = [(str(run / f"version-{k}"), f"run-s1-{k}") for k in (1, 2)]
        assert pushes_of(stub) == folders
    reloaded = AutoModelForCausalLM.from_pretrained(last)
    assert reloaded.config.architectures == ["LlamaForCausalLM"]


def test_a_push_that_fails_ends_on_all_ranks_with_the_same_message(workers, write_run, tmp_path):
    path, stub = write_run("llama-tied", LANGUAGE, (3, 0)), Stub()
    stub.development, answer, failed = True, stub.answer, (500, {"error": "out of memory"})
    stub.answer = lambda path, body: failed if path == "/collective_rpc" else answer(path, body)
    with serving(stub) as urls:
        answer = workers(2).run("test_pushed_weights.refused", path, [], str(tmp_path), urls)

    assert answer[0] == answer[1]
    room, refused = answer[0]
    assert "rollout.server.folder" in room
    assert "the weights of the student take 1000000000.0 GB" in room
    assert f"{stub.url}/collective_rpc answered 500 and did not load" in refused
    assert "out of memory" in refused


def test_adapters_get_a_new_name_per_version_and_old_versions_are_unloaded(
    workers, write_run, tmp_path
):
    path = write_run("llama-tied", LANGUAGE, (3, 0), student={"lora": {"r": 4}})
    stubs = [Stub(), Stub()]
    for stub in stubs:  # a killed run has left its adapters, and another run uses the server
        stub.loaded = {"run-2": "gone", "other-1": "there"}
    with serving(*stubs) as urls:
        names = workers(2).run("test_pushed_weights.adapters", path, [], str(tmp_path), urls)

    assert names == [["run-s1-1", "run-s1-2", "run-s1-3"]] * 2
    for stub in stubs:
        assert set(stub.loaded) == {"other-1", "run-s1-2", "run-s1-3"}
    run = tmp_path / "run" / "run-s1"
    assert {path.name for path in run.iterdir()} == {"run-s1-2", "run-s1-3"}
    two, three = (tensors_of(run / name) for name in ("run-s1-2", "run-s1-3"))
    assert two.keys() == three.keys()
    assert all("lora_" in name for name in two)
    assert any(not torch.equal(two[name], three[name]) for name in two)
