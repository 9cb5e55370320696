"""A teacher that is sharded within nodes: one whole copy per node, and the same answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import NO_DROPOUT, bert, config_tree, llama, write_config, write_reviews, write_text

NODE = {
    "megakd": {"shard_within_node": True},
    # Small weights are sharded too, and gathered in every forward.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A config with a student at a stage: `written(language=..., student=...)`."""
    folder = tmp_path_factory.mktemp("nodes")
    write_reviews(folder / "reviews", train=41, validation=9)
    write_text(folder / "text.txt")

    def write(*, language: bool, student: str) -> str:
        task = {"type": "classification", "dataset": str(folder / "reviews")}
        if language:
            task = {"type": "causal_lm", "dataset": str(folder / "text.txt")}
            task["tokenizer"] = {"type": "bpe", "vocab_size": 320}
        model = llama(2, width=24) if language else bert(2, width=24, **NO_DROPOUT)
        tree = config_tree(
            Path("unused"),
            task,
            teacher={"model": model, "deepspeed": NODE},
            student={"model": llama(1) if language else bert(1, **NO_DROPOUT)},
            method={"name": "single"},
            objective=[
                {"loss": "soft_target_kl"},
                {"loss": "hidden_mse", "layer_mapping": ["1:2"]},
            ],
            train={"gradient_accumulation_steps": 2},
        )
        tree["student"]["deepspeed"] = student
        return str(write_config(folder / f"{language}-{student}.yaml", tree))

    return write


@pytest.mark.parametrize(
    ("ranks", "nodes", "language", "student"),
    [
        (2, 2, False, "zero2"),  # a rank alone on its node has everything
        (2, 1, False, "zero2"),  # one node: like teacher_zero3
        pytest.param(2, 2, True, "zero3", marks=pytest.mark.slow),
        pytest.param(4, 2, False, "zero2", marks=pytest.mark.slow),
        pytest.param(4, 2, True, "zero3", marks=pytest.mark.slow),
    ],
)
def test_each_node_has_one_copy_of_a_teacher_that_answers_as_if_whole(
    workers, written, ranks, nodes, language, student
):
    path, of_node = written(language=language, student=student), ranks // nodes
    whole = ["teacher.deepspeed=teacher_zero0"]

    expected = workers(ranks).run("node_cases.taught", path, whole, nodes)
    found = workers(ranks).run("node_cases.taught", path, [], nodes)

    for with_copy, with_whole in zip(found, expected, strict=True):
        assert with_copy["share"] == pytest.approx(1 / of_node, abs=0.01)
        assert set(with_copy["groups"]) == ({of_node} if of_node > 1 else set())
        for step, whole_step in zip(with_copy["losses"], with_whole["losses"], strict=True):
            assert step == pytest.approx(whole_step, rel=1e-5)
        if not language:
            torch.testing.assert_close(with_copy["logits"], with_whole["logits"])
        assert with_copy["freed"]
    weights = expected[0]["weights"]
    assert found[0]["weights"].keys() == weights.keys()
    assert all(torch.equal(found[0]["weights"][name], weights[name]) for name in weights)
