"""Inference servers: they generate texts of pushed weights, and teach, as own engines do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from cases import started
from equal_runs import LANGUAGE, difference
from safetensors.torch import load_file
from served_models import Transformer
from server_stubs import Stub, serving
from slow_cases import slow
from test_rollouts import STEPS, finish, refused, texts_of, weights, write_config
from test_rollouts import texts as texts  # noqa: PLC0414 - a fixture
from tiny_runs import llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from megakd.config.task import file_of_step
from megakd.engine import distributed
from megakd.errors import MegakdError
from megakd.models.cutting import content_of
from megakd.models.lora import WEIGHTS
from megakd.teachers.rollouts import Rollout, read_rollouts
from megakd.teachers.servers import VllmServer
from megakd.training.generated_texts import adapter_push, full_push
from megakd.training.stage_folder import consume, write_stage_folder

GREEDY = {"mix": 1.0, "sampling": {"temperature": 0}}
SHORT = {"max_steps": 4}
AHEAD = {"mix": 1.0, "max_staleness": 1}


def replicas() -> list[Stub]:
    """Two servers whose model is a plain Llama with the weights that are pushed."""
    stubs = [Stub(name="student", model=Transformer()) for _ in range(2)]
    for stub in stubs:
        stub.development = True
    return stubs


def served(stub: Stub, folder: Path, **keys: Any) -> dict[str, Any]:
    server = {"url": [stub.url], "model": stub.name, "push": "full"}
    return {"server": {**server, "folder": str(folder), **keys}}


def rollouts_of(out: Path) -> dict[int, list[Rollout]]:
    paths = {n: file_of_step(out / "rollouts" / "student", n) for n in range(STEPS)}
    return {step: read_rollouts(path) for step, path in paths.items() if path.is_file()}


def asked_seeds(asked: list[tuple[str, Any]]) -> set[int]:
    """The seeds of the texts, without the greedy texts of the checks."""
    sampled = [body for path, body in asked if path == "/v1/completions"]
    return {body["seed"] for body in sampled if body["temperature"] > 0}


@pytest.mark.slow
def test_texts_are_made_a_step_ahead_and_a_killed_run_asks_only_for_those_it_lacks(
    command, launch, texts, tmp_path
):
    (stub, _), out = replicas(), tmp_path / "out"
    with serving(stub):
        keys = AHEAD | served(stub, tmp_path / "w")
        config = write_config(tmp_path, texts, zero=2, rollout=keys)
        group = launch("--config", str(config), f"output_dir={out}")
        third = out / "rollouts" / "student" / "step-00000003.jsonl"
        assert group.wait_until(third.exists), group.text
        group.kill()
        written, before = texts_of(out), len(stub.asked)
        on_disk = {text.seed for answer in rollouts_of(out).values() for text in answer}

        finish(command, config, out)

    made, last = rollouts_of(out), texts_of(out)
    assert all(last.get(name, text) == text for name, text in written.items())
    versions = {step: {text.version for text in answer} for step, answer in made.items()}
    # Those before the oldest checkpoint are removed.
    assert versions == {step: {step - 1} for step in range(2, STEPS)}
    assert all(0 < len(text.completion) <= 10 for answer in made.values() for text in answer)
    assert on_disk <= asked_seeds(stub.asked[:before])
    later = asked_seeds(stub.asked[before:])
    assert later
    assert on_disk.isdisjoint(later)


@pytest.mark.slow
def test_a_run_that_was_killed_during_a_push_ends_as_one_with_texts_of_its_own_engine(
    command, launch, texts, tmp_path
):
    """The kill leaves one of two replicas paused, with the weights of the version before.

    They are slow, busy at times, and remember the prefixes of earlier texts.
    """
    local = write_config(tmp_path, texts, zero=3, rollout=GREEDY, train=SHORT)
    wanted, out = finish(command, local, tmp_path / "own"), tmp_path / "out"
    stubs = first, other = replicas()
    answer = other.answer
    for stub in stubs:
        stub.busy, stub.delay_s = 3, 0.01

    def stuck(path: str, body: Any) -> tuple[int, Any]:
        if path == "/collective_rpc" and body["kwargs"]["weights_path"].endswith("version-3"):
            return 503, {"message": "loading"}
        return answer(path, body)

    other.answer = stuck
    with serving(*stubs) as urls:
        keys = GREEDY | served(first, tmp_path / "w", url=urls)
        config = write_config(tmp_path, texts, zero=3, rollout=keys, train=SHORT)
        group = launch("--config", str(config), f"output_dir={out}")
        assert group.wait_until(lambda: first.weights.endswith("-3")), group.text
        group.kill()
        written = texts_of(out)
        assert other.paused
        assert other.weights.endswith("-2")
        other.answer = answer

        finish(command, config, out)

    assert written.items() <= texts_of(out).items()
    assert texts_of(out) == texts_of(wanted)
    assert difference(weights(out), weights(wanted)) == 0
    for stub in stubs:
        assert stub.weights.endswith("-3")
        assert not stub.paused


def test_a_replica_that_is_restarted_between_two_blocks_ends_the_run(command, texts, tmp_path):
    """It has the weights of its start, and would answer without complaint."""
    stubs, folder = replicas(), tmp_path / "w"
    stub, answer, sampled = stubs[1], stubs[1].answer, []

    def restarting(path: str, body: Any) -> tuple[int, Any]:
        if path == "/v1/completions" and stub.weights.endswith("-2") and not sampled:
            sampled.append(body)
            stub.restart()
        return answer(path, body)

    stub.answer = restarting
    with serving(*stubs) as urls:
        keys = GREEDY | served(stubs[0], folder, url=urls)
        config = write_config(tmp_path, texts, zero=0, rollout=keys)
        outcome = refused(command, config, tmp_path / "out")

    assert "was generated with the weights default, and out-" in outcome
    assert "the server was restarted" in outcome
    assert len(texts_of(tmp_path / "out")) == 2


def test_a_folder_that_cannot_be_written_is_named_before_a_model_loads(command, texts, tmp_path):
    (stub, _), folder = replicas(), tmp_path / "file"
    folder.touch()
    with serving(stub):
        keys = GREEDY | served(stub, folder)
        outcome = refused(
            command, write_config(tmp_path, texts, zero=0, rollout=keys), tmp_path / "out"
        )

    assert f"rollout.server.folder: {folder}" in outcome
    assert stub.model.folders == []


@pytest.mark.slow
def test_adapters_reach_a_vllm_server_before_every_step(command, texts, tmp_path):
    """Also those of a run that is started again: the server keeps cached texts of every name."""
    short = write_config(tmp_path, texts, zero=0, train={"max_steps": 2})
    base = finish(command, short, tmp_path / "base") / "final"
    stub = Stub(name="base", model=Transformer(base))
    keys = {"student": {"model": str(base), "lora": {"r": 4}}, "train": SHORT}
    keys["task"] = {"tokenizer": str(base)}
    local = write_config(tmp_path, texts, zero=3, rollout=GREEDY, **keys)
    wanted, out = finish(command, local, tmp_path / "own"), tmp_path / "out"
    with serving(stub):
        server = served(stub, tmp_path / "w", push="adapter")
        config = write_config(tmp_path, texts, zero=3, rollout=GREEDY | server, **keys)
        finish(command, config, out, "train.learning_rate=0.5")
        shutil.rmtree(out)
        finish(command, config, out)

    asked = stub.of("/v1/load_lora_adapter")
    names = [body["lora_name"] for body in asked]
    assert [name.rpartition("-")[2] for name in names] == ["0", "1", "2", "3"] * 2
    assert len({*names, *(body["lora_path"] for body in asked)}) == 2 * len(asked)
    assert [*stub.loaded] == names[-1:]
    assert texts_of(out) == texts_of(wanted)
    actual, expected = (load_file(at / "final" / WEIGHTS) for at in (out, wanted))
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


# Weights are pushed shard by shard, at every ZeRO stage.


@contextmanager
def pushing(config_path: str, folder: str, urls: list[str], kind: Any, **options: Any):
    servers = [VllmServer(url, time_limit_s=60) for url in urls]
    with started(config_path) as (run, _):
        yield run, kind(run.student.student, servers, Path(folder) / "run/run-s1", **options)


def full(config_path: str, folder: str, urls: list[str]) -> str | None:
    """Two updates of the student with a push after each, then the export; the pushed version."""
    with pushing(config_path, folder, urls, full_push) as (run, push):
        with patch("megakd.training.generated_texts.SHARD_BYTES", 3000):
            for version in (1, 2):
                run.trainer.train_step(run.batch_source.step(version - 1))
                pushed = push(version)
        models = {"student": content_of(run.student.student, None)}
        if distributed.ranks().is_main:
            write_stage_folder(Path(folder) / "export", models, extra={})
        else:
            consume(models, None)
    return pushed["weights"]


def failing(config_path: str, folder: str, urls: list[str]) -> list[str]:
    """The messages of a folder without room and of a server that loads nothing; then a step."""
    answers = []
    with pushing(config_path, folder, urls, full_push) as (run, push):
        for free in (0, 10**18):
            try:
                with patch("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free)):
                    push(1)
            except MegakdError as error:
                answers.append(str(error))
        run.trainer.train_step(run.batch_source.step(0))
    return answers


def adapters(config_path: str, folder: str, urls: list[str]) -> list[str]:
    """Three updates with a push after each; the names of the pushed adapters."""
    names = []
    with pushing(config_path, folder, urls, adapter_push, keep=2) as (run, push):
        for version in (1, 2, 3):
            run.trainer.train_step(run.batch_source.step(version - 1))
            names.append(push(version)["name"])
    return names


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def pushes_of(stub: Stub) -> list[tuple[str, str]]:
    folders = [body["kwargs"]["weights_path"] for body in stub.of("/collective_rpc")]
    versions = [body["new_version"] for body in stub.of("/update_weight_version")]
    return list(zip(folders, versions, strict=True))


@pytest.mark.parametrize(("zero", "student"), [(3, "llama-tied"), *slow((0, "llama-untied"))])
def test_names_and_bytes_pushed_are_those_of_the_exported_model(
    workers, write_run, tmp_path, zero, student
):
    path = write_run(student, LANGUAGE, (zero, 0))
    stubs = [Stub(), Stub()]
    for stub in stubs:
        stub.development = True
    with serving(*stubs) as urls:
        versions = workers(2).run("test_servers.full", path, str(tmp_path), urls)

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
        answer = workers(2).run("test_servers.failing", path, str(tmp_path), urls)

    assert answer[0] == answer[1]
    room, refused = answer[0]
    assert "rollout.server.folder" in room
    assert "has 0.0 GB free, and the weights of the student take" in room
    assert f"{stub.url}/collective_rpc answered 500 and did not load" in refused
    assert "out of memory" in refused


@pytest.mark.slow
def test_adapters_get_a_new_name_per_version_and_old_versions_are_unloaded(
    workers, write_run, tmp_path
):
    path = write_run("llama-tied", LANGUAGE, (3, 0), student={"lora": {"r": 4}})
    stubs = [Stub(), Stub()]
    for stub in stubs:  # a killed run has left its adapters, and another run uses the server
        stub.loaded = {"run-2": "gone", "other-1": "there"}
    with serving(*stubs) as urls:
        names = workers(2).run("test_servers.adapters", path, str(tmp_path), urls)

    assert names == [["run-s1-1", "run-s1-2", "run-s1-3"]] * 2
    for stub in stubs:
        assert set(stub.loaded) == {"other-1", "run-s1-2", "run-s1-3"}
    run = tmp_path / "run" / "run-s1"
    assert {path.name for path in run.iterdir()} == {"run-s1-2", "run-s1-3"}
    two, three = (tensors_of(run / name) for name in ("run-s1-2", "run-s1-3"))
    assert two.keys() == three.keys()
    assert all("lora_" in name for name in two)
    assert any(not torch.equal(two[name], three[name]) for name in two)


# Served teachers.

KL = [{"loss": "soft_target_kl"}]
PACKED = {"train": {"max_steps": 3, "tokens_per_rank": 60}}


@pytest.fixture(scope="module")
def trained(command, texts, tmp_path_factory) -> Path:
    """The folder of a model that teaches, with its tokenizer; its probabilities are not uniform."""
    folder = tmp_path_factory.mktemp("teacher")
    student = {"model": llama(2)}
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
        sections |= {"teacher": teacher, "student": {"model": llama(1, 8)}, "objective": KL}
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


@pytest.mark.parametrize("keys", [*slow({"zero": 3}), {"zero": 2, "generates": True}])
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


@pytest.mark.slow
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
