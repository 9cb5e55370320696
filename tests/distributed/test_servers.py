"""Training on texts of inference servers: the same texts as those of the run's own engine."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from served_models import Transformer
from server_stubs import Stub, serving
from test_rollouts import STEPS, finish, texts_of, weights, write_config
from test_rollouts import texts as texts  # noqa: PLC0414 - a fixture

from megakd.contract.completions import Rollout
from megakd.rollouts.store import read_rollouts, rollout_files

GREEDY = {"mix": {"rollout": 1.0}, "sampling": {"temperature": 0}}
SHORT = {"max_steps": 3}
AHEAD = {"mix": {"rollout": 1.0}, "max_staleness": 1, "keep_texts": True}


@pytest.fixture
def stub() -> Iterator[Stub]:
    """An SGLang server whose model is a plain Llama with the weights that are pushed."""
    stub = Stub("sglang", name="student", model=Transformer())
    with serving(stub):
        yield stub


def served(stub: Stub, folder: Path, **keys: Any) -> dict[str, Any]:
    server = {"url": [stub.url], "kind": stub.kind, "model": stub.name, "push": "full"}
    return {"server": {**server, "folder": str(folder), "time_limit": 120, **keys}}


def rollouts_of(out: Path) -> dict[int, list[Rollout]]:
    """Step -> the texts that the step learned from."""
    files = rollout_files(out / "rollouts" / "student")
    return {int(path.stem.rpartition("-")[2]): read_rollouts(path) for path in files}


@pytest.mark.parametrize("zero", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_greedy_texts_of_a_server_train_as_those_of_the_own_engine(
    launch, texts, stub, tmp_path, zero
):
    """The weights reach the server before every step, and no answer is lost or exchanged."""
    local = write_config(tmp_path, texts, zero=zero, rollout=GREEDY, train=SHORT)
    own = finish(launch, local, tmp_path / "own")
    keys = GREEDY | served(stub, tmp_path / "w")
    config = write_config(tmp_path, texts, zero=zero, rollout=keys, train=SHORT)

    out = finish(launch, config, tmp_path / "out")

    assert texts_of(out) == texts_of(own)
    assert len(stub.model.folders) == SHORT["max_steps"]
    for name, weight in weights(own).items():
        assert torch.equal(weights(out)[name], weight), name


def test_the_next_texts_are_made_while_the_student_learns(launch, texts, stub, tmp_path):
    keys = AHEAD | served(stub, tmp_path / "w")

    out = finish(launch, write_config(tmp_path, texts, zero=2, rollout=keys), tmp_path / "out")

    versions = {step: {text.version for text in said} for step, said in rollouts_of(out).items()}
    assert versions == {0: {0}} | {step: {step - 1} for step in range(1, STEPS)}
    pushed = [body["weight_version"] for body in stub.of("/update_weights_from_disk")]
    assert [name.rpartition("-")[2] for name in pushed] == [str(k) for k in range(STEPS - 1)]
    assert all(0 < len(t.completion.ids) <= 10 for said in rollouts_of(out).values() for t in said)


def asked_seeds(asked: list[tuple[str, Any]]) -> set[int]:
    """The seeds of the texts, without the greedy texts of the checks."""
    sampled = [body["sampling_params"] for path, body in asked if path == "/generate"]
    return {rules["sampling_seed"] for rules in sampled if rules["temperature"] > 0}


def test_a_killed_run_reads_its_texts_and_asks_only_for_others(launch, texts, stub, tmp_path):
    keys = AHEAD | served(stub, tmp_path / "w")
    config, out = write_config(tmp_path, texts, zero=0, rollout=keys), tmp_path / "out"
    group = launch("--config", str(config), f"output_dir={out}")
    third = out / "rollouts" / "student" / "step-00000003.jsonl"
    assert group.wait_until(third.exists), group.text
    group.kill()
    written, before = texts_of(out), len(stub.asked)
    on_disk = {text.seed % 2**31 for said in rollouts_of(out).values() for text in said}

    finish(launch, config, out)

    assert written.items() <= texts_of(out).items()
    assert len(texts_of(out)) == STEPS
    assert on_disk <= asked_seeds(stub.asked[:before])
    later = asked_seeds(stub.asked[before:])
    assert later
    assert on_disk.isdisjoint(later)


def refused(launch: Callable[..., Any], config: Path, out: Path) -> str:
    group = launch("--config", str(config), f"output_dir={out}")
    assert all(group.wait()), group.text
    return group.text


def test_replicas_that_disagree_are_refused_before_a_model_loads(launch, texts, stub, tmp_path):
    class Wrong(Transformer):
        def continue_(self, prompt: list[int], rules: dict[str, Any]) -> list[int]:
            return [*super().continue_(prompt, rules)[:4], 2, 2, 2, 2, 2, 2]

    other = Stub("sglang", name="student", model=Wrong())
    with serving(other):
        server = served(stub, tmp_path / "w", url=[stub.url, other.url])
        config = write_config(tmp_path, texts, zero=0, rollout=GREEDY | server)
        said = refused(launch, config, tmp_path / "out")

    assert f"{stub.url} and {other.url} disagree" in said
    assert "Traceback" not in said
    assert stub.model.folders == []


def test_a_server_that_is_not_there_is_named_before_a_model_loads(launch, texts, stub, tmp_path):
    gone = Stub("sglang", name="student")
    with serving(gone):
        pass
    config = write_config(tmp_path, texts, zero=0, rollout=GREEDY | served(gone, tmp_path / "w"))

    said = refused(launch, config, tmp_path / "out")

    assert f"GET {gone.url}/get_model_info: no server answers there" in said
    assert "Traceback" not in said


def test_a_folder_that_cannot_be_written_is_named(launch, texts, stub, tmp_path):
    (tmp_path / "file").touch()
    server = served(stub, tmp_path / "file")
    config = write_config(tmp_path, texts, zero=0, rollout=GREEDY | server)

    said = refused(launch, config, tmp_path / "out")

    assert f"rollout.server.folder: {tmp_path / 'file'}" in said
    assert "Traceback" not in said


def test_a_server_that_loses_the_pushed_weights_stops_the_run(launch, texts, stub, tmp_path):
    """A restarted server would otherwise answer with the weights that it started with."""

    def spoil(path: str, tree: Any) -> Any:
        if path == "/generate" and len(stub.model.folders) == 3:
            tree["meta_info"]["weight_version"] = "default"
        return tree

    stub.spoil = spoil
    config = write_config(tmp_path, texts, zero=0, rollout=GREEDY | served(stub, tmp_path / "w"))

    said = refused(launch, config, tmp_path / "out")

    assert "was generated with the weights default, and out-" in said
    assert len(texts_of(tmp_path / "out")) == 2


@pytest.fixture(scope="module")
def adapted(launch, texts, tmp_path_factory) -> Path:
    """A trained student, which adapters can build on."""
    folder = tmp_path_factory.mktemp("base")
    keys = {"max_steps": 2}
    return finish(launch, write_config(folder, texts, zero=0, train=keys), folder / "out") / "final"


@pytest.mark.slow
def test_adapters_reach_a_vllm_server_before_every_step(launch, texts, adapted, tmp_path):
    """Also those of a run that is started again: the server keeps cached texts of every name."""
    stub = Stub("vllm", name="base", model=Transformer(adapted))
    keys = {"student": {"model": str(adapted), "lora": {"r": 4}}, "train": SHORT}
    keys["task"] = {"tokenizer": str(adapted)}
    own = write_config(tmp_path, texts, zero=3, rollout=GREEDY, **keys)
    wanted, out = finish(launch, own, tmp_path / "own"), tmp_path / "out"
    with serving(stub):
        server = served(stub, tmp_path / "w", push="adapter")
        config = write_config(tmp_path, texts, zero=3, rollout=GREEDY | server, **keys)
        group = launch("--config", str(config), f"output_dir={out}", "train.learning_rate=0.5")
        assert group.wait() == [0, 0], group.text
        shutil.rmtree(out)
        finish(launch, config, out)

    asked = stub.of("/v1/load_lora_adapter")
    names = [body["lora_name"] for body in asked]
    assert [name.rpartition("-")[2] for name in names] == ["0", "1", "2"] * 2
    assert len({*names, *(body["lora_path"] for body in asked)}) == 2 * len(asked)
    assert [*stub.loaded] == names[-1:]
    assert texts_of(out) == texts_of(wanted)
    found = load_file(out / "final" / "adapter" / "adapter_model.safetensors")
    for name, tensor in load_file(
        wanted / "final" / "adapter" / "adapter_model.safetensors"
    ).items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-5, msg=name)
