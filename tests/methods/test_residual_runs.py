"""Whole runs whose students have narrower hidden states than their teacher."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import OneRank, Outcome
from tiny_runs import bert, config_tree, llama, write_config, write_reviews, write_text
from whole_run import finish, read, records, weights

from megakd.config.file import load_config
from megakd.contract.views import View
from megakd.models.elastic import Elastic
from megakd.models.loading import load_model, resolve_model

GRID, TARGET, WIDTH = [0.3, 0.6, 0.85], 0.85, 32
TOKENS = torch.arange(5, 35).reshape(3, 10)


class Residual:
    """A run with a teacher of its own."""

    def __init__(self, one_rank: OneRank, folder: Path, task: dict[str, Any]) -> None:
        self.one_rank, self.folder, self.kind = one_rank, folder, task["type"]
        self.out = folder / "out"
        model = (
            llama(2, width=WIDTH, num_attention_heads=4, num_key_value_heads=2)
            if self.kind == "causal_lm"
            else bert(2, width=WIDTH, num_attention_heads=4)
        )
        self.tree = config_tree(
            self.out,
            task,
            teacher={"model": model, "finetune": {"max_steps": 12}},
            student={"model": "from_teacher"},
            eval={"eval_steps": 4},
        )
        self.tree["train"] |= {"max_steps": 8, "learning_rate": 0.003}

    def run(self, **method: Any) -> Outcome:
        options = {"sparsities": GRID, "target_sparsity": TARGET, "round_to": 4, "residual": True}
        if self.kind != "classification":
            options["metric"] = "accuracy"
        self.tree["method"] = {**options, **method}
        return finish(self.one_rank, write_config(self.folder / "run.yaml", self.tree))

    def model(self, folder: Path):
        """A folder's model as megakd loads it."""
        task = load_config(self.folder / "run.yaml").task
        labels = ("negative", "positive") if self.kind == "classification" else ()
        source = resolve_model(str(folder), task, where="student.model")
        facts = {"ds": None, "dtype": torch.float32, "seed": 1, "need_head": True}
        size = source.config.vocab_size
        return load_model(source, task=task, label_names=labels, tokenizer_size=size, **facts)


def text_task(folder: Path, kind: str, tokenizer: str) -> tuple[Path, dict[str, Any]]:
    text = write_text(folder / "text.txt", documents=20)
    made = {"type": tokenizer, "vocab_size": 320}
    return folder, {"type": kind, "dataset": str(text), "tokenizer": made}


@pytest.fixture
def classifier(one_rank, tmp_path) -> Residual:
    reviews = write_reviews(tmp_path / "reviews")
    return Residual(one_rank, tmp_path, {"type": "classification", "dataset": str(reviews)})


def result(out: Path, stage: str) -> dict[str, Any]:
    return json.loads((out / "stages" / stage / "result.json").read_text())


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(input_ids=TOKENS).logits


@pytest.fixture(scope="module")
def masked(one_rank, tmp_path_factory) -> tuple[Residual, Outcome]:
    """One trial with the objective that is there without one."""
    run = Residual(one_rank, *text_task(tmp_path_factory.mktemp("masked"), "mlm", "wordpiece"))
    return run, run.run(name="minidisc", iterations=1)


def test_what_is_exported_scores_as_the_narrower_view_did(masked):
    run, _ = masked
    trial = result(run.out, "trial-1")

    seen = trial["scores"][f"sparsity-{TARGET:g}"]
    assert trial["view"] == f"sparsity-{TARGET:g}"
    assert read(run.out)["student"]["metrics"]["loss"] == pytest.approx(seen["loss"], rel=1e-5)
    # 32 * sqrt(0.15) is 12.4, in fours.
    assert json.loads((run.out / "final" / "config.json").read_text())["hidden_size"] == 12


def test_without_an_objective_the_last_layers_relations_are_learned_alone(masked):
    run, answer = masked

    logged = [r for r in records(run.out, "trial-1") if "train/loss" in r]
    terms = {name for name in logged[-1] if name.endswith("relation_kl")}
    assert len(terms) == len(GRID)
    assert not any("soft" in name or "hidden" in name for name in logged[-1])
    # Heads of 8 rows: 32 does not divide them, the teacher's four heads do.
    assert (
        "relation_kl of the last layer, of queries, keys and values, with 4 relation" in answer.err
    )


def test_columns_are_sorted_in_the_specification_and_the_teacher_is_what_it_was(masked):
    run, _ = masked
    units = json.loads((run.out / "stages" / "specification" / "units.json").read_text())
    teacher, ordered = (
        run.model(run.out / "stages" / stage) for stage in ("teacher-finetune", "specification")
    )

    order = sorted(range(WIDTH), key=lambda column: (-units["width"][column], column))
    assert order != list(range(WIDTH))
    torch.testing.assert_close(
        ordered.get_input_embeddings().weight, teacher.get_input_embeddings().weight[:, order]
    )
    torch.testing.assert_close(logits(ordered), logits(teacher), atol=1e-5, rtol=1e-5)


def test_a_narrower_assistant_teaches_a_still_narrower_student(one_rank, tmp_path):
    """Two trials of a sharded decoder; its heads of queries share keys by twos."""
    run = Residual(one_rank, *text_task(tmp_path, "causal_lm", "bpe"))
    run.tree["objective"] = [{"loss": "soft_target_kl"}, {"loss": "relation_kl"}]
    run.tree["student"]["deepspeed"] = "zero3"

    run.run(name="minidisc", tradeoff=0.0)

    report = read(run.out)
    (assistant,) = report["assistants"]
    widths = [
        weights(run.out / folder)["model.norm.weight"].numel()
        for folder in ("stages/specification", "stages/trial-1", "final")
    ]
    assert widths[0] == WIDTH > widths[1] > widths[2] == 12
    assert assistant["parameters"] > report["student"]["parameters"]
    seen = result(run.out, "trial-2")["scores"][f"sparsity-{TARGET:g}"]
    assert report["student"]["metrics"]["loss"] == pytest.approx(seen["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["direct", "maxidisc"])
def test_a_dense_cut_is_the_sorted_teachers_view(classifier, name):
    run = classifier

    run.run(name=name)

    cut = run.model(run.out / "stages" / ("cut" if name == "direct" else f"cut-sparsity-{TARGET}"))
    state = cut.state_dict()
    heads, neurons = (
        tuple(len(state[f"bert.encoder.layer.{layer}.{path}.weight"]) // rows for layer in (0, 1))
        for path, rows in (("attention.self.query", 8), ("intermediate.dense", 1))
    )
    ordered = run.model(run.out / "stages" / "specification")
    with Elastic(ordered).viewing(View(heads, neurons, 12)):
        expected = logits(ordered)
    torch.testing.assert_close(logits(cut), expected, atol=1e-5, rtol=0)
    assert heads[-1] > 0  # whose relations are compared


def test_relations_that_no_candidate_can_be_cut_into_are_refused_before_a_model_loads(classifier):
    tree = {
        **classifier.tree,
        "objective": [{"loss": "relation_kl", "relation_heads": 16}],
        "method": {"name": "minidisc", "residual": True, "round_to": 4},
    }

    outcome = classifier.one_rank.train(
        "--config", write_config(classifier.folder / "r.yaml", tree)
    )

    assert (outcome.code, outcome.loaded) == (2, ())
    wanted = r"relation_heads 16 .* does not divide 8, the width that .* use one of 1, 2, 4, 8"
    assert re.search(wanted, outcome.err), outcome.err
