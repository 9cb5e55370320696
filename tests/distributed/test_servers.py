"""Training on texts of inference servers: the same texts as those of the run's own engine."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from equal_runs import difference
from safetensors.torch import load_file
from served_models import Transformer
from server_stubs import Stub, serving
from test_rollouts import STEPS, finish, refused, texts_of, weights, write_config
from test_rollouts import texts as texts  # noqa: PLC0414 - a fixture

from megakd.contract.completions import Rollout
from megakd.models.lora import WEIGHTS
from megakd.rollouts.store import RolloutStore

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
    return {"server": {**server, "folder": str(folder), "time_limit": 120, **keys}}


def versions_of(stub: Stub) -> list[str]:
    asked = stub.of("/update_weight_version")
    return [body["new_version"].rpartition("-")[2] for body in asked]


def rollouts_of(out: Path) -> dict[int, list[Rollout]]:
    store = RolloutStore(out / "rollouts" / "student")
    return {step: store.read(step) for step in range(STEPS) if store.has(step)}


@pytest.fixture(scope="module")
def local_run(command, texts, tmp_path_factory):
    """A ZeRO stage -> the finished run with greedy texts of the run's own engine."""

    @functools.cache
    def of(zero: int) -> Path:
        folder = tmp_path_factory.mktemp("own")
        config = write_config(folder, texts, zero=zero, rollout=GREEDY, train=SHORT)
        return finish(command, config, folder / "out")

    return of


def test_greedy_texts_of_servers_train_as_those_of_the_own_engine(
    command, texts, local_run, tmp_path
):
    """Replicas that are slow, busy at times, and remember the prefixes of earlier texts."""
    stubs = replicas()
    for stub in stubs:
        stub.busy, stub.delay_s = 3, 0.01
    with serving(*stubs) as urls:
        keys = GREEDY | served(stubs[0], tmp_path / "w", url=urls)
        config = write_config(tmp_path, texts, zero=3, rollout=keys, train=SHORT)
        out = finish(command, config, tmp_path / "out")

    assert texts_of(out) == texts_of(local_run(3))
    assert difference(weights(out), weights(local_run(3))) == 0
    for stub in stubs:
        assert versions_of(stub) == ["0", "1", "2", "3"]
        assert not stub.paused


def asked_seeds(asked: list[tuple[str, Any]]) -> set[int]:
    """The seeds of the texts, without the greedy texts of the checks."""
    sampled = [body for path, body in asked if path == "/v1/completions"]
    return {body["seed"] for body in sampled if body["temperature"] > 0}


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


def test_a_run_that_was_killed_during_a_push_is_resumed(
    command, launch, texts, local_run, tmp_path
):
    """The kill leaves one of two replicas paused, with the weights of the version before."""
    stubs = first, other = replicas()
    answer = other.answer

    def stuck(path: str, body: Any) -> tuple[int, Any]:
        if path == "/collective_rpc" and body["kwargs"]["weights_path"].endswith("version-3"):
            return 503, {"message": "loading"}
        return answer(path, body)

    other.answer = stuck
    with serving(*stubs) as urls:
        keys = GREEDY | served(first, tmp_path / "w", url=urls)
        config = write_config(tmp_path, texts, zero=0, rollout=keys, train=SHORT)
        out = tmp_path / "out"
        group = launch("--config", str(config), f"output_dir={out}")
        assert group.wait_until(lambda: first.weights.endswith("-3")), group.text
        group.kill()
        written = texts_of(out)
        assert other.paused
        assert other.weights.endswith("-2")
        other.answer = answer

        finish(command, config, out)

    assert written.items() <= texts_of(out).items()
    assert texts_of(out) == texts_of(local_run(0))
    assert difference(weights(out), weights(local_run(0))) == 0


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
