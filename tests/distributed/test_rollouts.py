"""Generated texts: greedily the same on any ranks, and the same after any kill."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from equal_runs import difference
from safetensors.torch import load_file
from slow_cases import slow
from tiny_runs import config_tree, llama, merged
from whole_run import read, records

STEPS = 6
GREEDY = {"sampling": {"temperature": 0}}
WORDS = ("the", "cat", "dog", "sat", "on", "a", "mat", "and", "ran", "to", "big", "red", "house")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
    for split, count in (("train", 120), ("validation", 8)):
        lines = (" ".join(rng.choices(WORDS, k=30)) for _ in range(count))
        (folder / f"{split}.txt").write_text("\n\n".join(lines))
    return folder


def write_config(folder: Path, texts: Path, *, zero: int, **sections: Any) -> Path:
    """A student that learns from texts of its own, and of the data."""
    tree = config_tree(
        Path("unused"),
        {
            "type": "causal_lm",
            "train_files": str(texts / "train.txt"),
            "validation_files": str(texts / "validation.txt"),
            "max_length": 24,
            "tokenizer": {"type": "bpe", "vocab_size": 300},
        },
        teacher={"model": llama(2), "deepspeed": f"teacher_zero{3 if zero == 3 else 0}"},
        student={"model": llama(1, 8), "deepspeed": f"zero{zero}"},
        method={"name": "single"},
        objective=[{"loss": "soft_target_kl"}, {"loss": "soft_target_reverse_kl"}],
        rollout={"max_new_tokens": 10, "prompt_tokens": 6, "mix": 0.7},
        seed=1,  # step 1 learns from the data, the others from texts
        # Adam would turn rounding of tiny gradients into whole steps.
        train={"per_device_train_batch_size": 12, "max_steps": STEPS, "adam_epsilon": 0.01},
        # Otherwise the time at which old texts are removed depends on the disk.
        save={"save_steps": 2, "asynchronous": False, "save_total_limit": 2},
        log={"logging_steps": 1},
    )
    return tiny_runs.write_config(folder / "run.yaml", merged(tree, sections))


def finish(
    command: Callable[..., Any], config: Path, out: Path, *overrides: str, world: int = 2
) -> Path:
    command("--config", str(config), f"output_dir={out}", *overrides, world=world, code=0)
    return out


def refused(command: Callable[..., Any], config: Path, out: Path) -> str:
    ended = command("--config", str(config), f"output_dir={out}")
    assert all(ended.codes), ended.text
    return ended.text


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "final" / "model.safetensors")


def texts_of(out: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (out / "rollouts" / "student").glob("*.jsonl")}


def assert_close(actual: Path, wanted: Path) -> None:
    assert texts_of(actual) == texts_of(wanted)
    assert len(texts_of(wanted)) > STEPS // 2
    torch.testing.assert_close(weights(actual), weights(wanted), rtol=0, atol=2e-5)


@pytest.fixture(scope="module")
def one_rank(command, texts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    config = write_config(folder, texts, zero=0, rollout=GREEDY)
    return finish(command, config, folder / "out", world=1)


@pytest.mark.parametrize(("zero", "world"), [(3, 2), *slow((1, 2), (2, 3))])
def test_greedy_texts_and_weights_do_not_depend_on_ranks_or_sharding(
    command, texts, one_rank, tmp_path, zero, world
):
    # All ranks together learn from 12 rows per step, packed by a budget instead of padded.
    keys = {"per_device_train_batch_size": 12 // world, "tokens_per_rank": 40}

    config = write_config(tmp_path, texts, zero=zero, train=keys, rollout=GREEDY)
    out = finish(command, config, tmp_path / "out", world=world)

    assert_close(out, one_rank)


@pytest.mark.slow
@pytest.mark.parametrize("train", [{}, {"tokens_per_rank": 60}], ids=["padded", "packed"])
def test_a_run_killed_before_it_learns_from_a_text_ends_as_if_it_had_never_been(
    command, launch, texts, tmp_path, train
):
    """The kill falls on generation, on learning, or on a checkpoint; texts are stale by a step.

    The texts before the oldest checkpoint are removed.
    """
    config = write_config(tmp_path, texts, zero=2, rollout={"max_staleness": 1}, train=train)
    wanted = finish(command, config, tmp_path / "wanted")
    out, store = tmp_path / "killed", tmp_path / "killed" / "rollouts" / "student"

    for step in (0, 3):
        group = launch("--config", str(config), f"output_dir={out}")
        assert group.wait_until((store / f"step-{step:08d}.jsonl").exists), group.text
        group.kill()
    written = texts_of(out)
    finish(command, config, out)

    actual, kept = texts_of(out), texts_of(wanted)
    assert all(actual.get(name, text) == text for name, text in written.items())
    assert actual.items() >= kept.items()  # the last kill may fall between a text and the removal
    assert len(kept) == STEPS - 2
    assert difference(weights(out), weights(wanted)) == 0


@pytest.mark.slow
def test_a_student_on_policy_goes_on_with_other_ranks(goes_on, texts, tmp_path):
    train = {"per_device_train_batch_size": 6}
    config = write_config(tmp_path, texts, zero=3, rollout=GREEDY, train=train)

    assert_close(*goes_on(config, "student/step-3"))


@pytest.mark.slow
def test_a_student_learns_from_the_texts_of_its_teacher(command, texts, tmp_path):
    """The texts do not depend on what the student has learned, and may be labels."""
    keys = {"mix": 1.0, "by": "teacher"}
    learns = {"train": {"max_steps": 2}, "objective": [{"loss": "hard_cross_entropy"}]}
    config = write_config(tmp_path, texts, zero=0, rollout=keys, **learns)
    first = finish(command, config, tmp_path / "first", world=1)

    second = finish(command, config, tmp_path / "second", "train.learning_rate=0.1", world=1)

    assert texts_of(second) == texts_of(first)
    assert difference(weights(second), weights(first)) > 0


TEXTS = 5
"""In an evaluation."""


@pytest.mark.slow
def test_texts_of_an_evaluation_are_reported_and_depend_on_neither_ranks_nor_sharding(
    command, texts, tmp_path
):
    def lines(zero: int, world: int) -> list[str]:
        generation = {"max_new_tokens": 6, "rows": TEXTS, "prompt_tokens": 4, "match": "exact"}
        folder = tmp_path / str(world)
        path = write_config(
            folder,
            texts,
            zero=zero,
            train={"per_device_train_batch_size": 12 // world, "max_steps": 2},
            objective=[{"loss": "soft_target_kl"}],
            rollout=None,
            eval={"eval_steps": 2, "keep_best": False, "generation": generation},
        )
        out = finish(command, path, folder / "out", world=world)
        (record,) = [one for one in records(out, "student") if "eval/text_tokens" in one]
        (stage,) = read(out)["stages"]
        for name in ("match", "text_tokens", "text_truncated"):
            assert stage[name] == record[f"eval/{name}"]
        assert not [one for one in read(out)["warnings"] if "of guessing" not in one]
        return (out / "texts/student/step-00000002.jsonl").read_text().splitlines()

    alone = lines(0, 1)

    assert len(alone) == TEXTS
    assert lines(2, 3) == lines(3, 2) == alone
