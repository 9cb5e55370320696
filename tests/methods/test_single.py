"""One teacher: the default loss terms, and students that start as some of its layers."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_runs import llama, run_in, write_text
from whole_run import finish, weights

from megakd.config.file import load_config
from megakd.config.sections import RolloutConfig
from megakd.config.terms import hard_terms, soft_terms
from megakd.methods import single


def starting_as(folder: Path, layers: Any, **sections: Any) -> Path:
    """A run config of a teacher of four layers that is trained for a few steps."""
    text = write_text(folder / "text.txt", documents=400)
    return run_in(
        folder,
        {"type": "causal_lm", "dataset": str(text)},
        **{"teacher": {"model": llama(4), "finetune": {"max_steps": 8}}, **sections},
        method={"name": "single"},
        student={"model": "from_teacher", "layers": layers},
        save={"save_steps": 1},
    )


def of_layers(out: Path, kept: list[int]) -> bool:
    """True if the student has the weights of these layers of the fine-tuned teacher."""
    final = weights(out / "final")
    taught = weights(out / "stages" / "teacher-finetune")
    place = re.compile(r"(?<=layers\.)\d+")
    names = {name: place.sub(lambda result: str(kept[int(result[0])] - 1), name) for name in final}
    return all(torch.equal(final[name], taught[names[name]]) for name in final)


def test_a_number_of_layers_means_those_that_the_teacher_needs_most_measured_once(
    one_rank, tmp_path
):
    config = starting_as(tmp_path, 2)

    outcome = one_rank.train("--config", config, "train.learning_rate=0", stop_at=("student", 2))
    again = finish(one_rank, config, "train.learning_rate=0")

    stage = json.loads((tmp_path / "out" / "stages" / "layers" / "result.json").read_text())
    scores = [stage["metrics"][f"layer_{number}"] for number in range(1, 5)]
    best = sorted(sorted(range(1, 5), key=lambda number: -scores[number - 1])[:2])
    assert of_layers(tmp_path / "out", best)
    assert stage["metrics"].keys() == {f"layer_{number}" for number in range(1, 5)}
    for shown in (" ".join(f"{score:.3f}" for score in scores), "held-out rows"):
        assert shown in outcome.err
    assert "student: resumed at step 3" in again.err


def test_spacing_measures_nothing_and_layers_that_know_less_than_guessing_are_warned_of(
    one_rank, tmp_path
):
    """Weights so large that the teacher is sure of wrong tokens."""
    wild = {"model": llama(4, initializer_range=1.0), "finetune": {"max_steps": 1}}
    config = starting_as(tmp_path, {"keep": 2, "by": "spacing"}, teacher=wild)

    outcome = finish(one_rank, config, "train.learning_rate=0")

    assert not (tmp_path / "out" / "stages" / "layers").exists()
    assert of_layers(tmp_path / "out", [1, 4])
    warned = r"the loss of the layers 1, 4 before the first step is [\d.]+ nats, above the 5\.\d"
    assert re.search(warned, outcome.err)


@pytest.mark.parametrize("kept", [{"server": {"url": ["http://x"]}}, {"cache": "kept"}], ids=str)
def test_a_teacher_that_is_not_loaded_is_not_measured_unless_asked(tmp_path, kept):
    config = starting_as(tmp_path, 2, teacher={"model": "gpt2", **kept})

    assert not load_config(config).ranks_layers
    assert load_config(config, ["student.layers={keep: 2, by: importance}"]).ranks_layers


@pytest.mark.parametrize(
    ("rollout", "terms"),
    [
        (None, {"hard_cross_entropy": 0.5, "soft_target_kl": 0.5}),
        ({}, {"soft_target_kl": 1.0}),
        ({"mix": 0.2}, {"soft_target_kl": 1.0}),
    ],
    ids=["data", "texts", "texts and data"],
)
def test_single_learns_generated_texts_with_soft_targets_alone(rollout, terms):
    texts = None if rollout is None else RolloutConfig(max_new_tokens=4, **rollout)
    lab: Any = SimpleNamespace(
        config=SimpleNamespace(
            objective=None, rollout=texts, task=SimpleNamespace(soft_labels=None)
        ),
        teacher=lambda name: "teacher",
        train=lambda stage: stage,
        hard_terms=partial(hard_terms, "causal_lm"),
        soft_terms=partial(soft_terms, "causal_lm"),
    )

    stage: Any = single.run(single.SingleConfig(name="single"), lab)

    assert {term.loss: term.weight for term in stage.objective} == terms
