"""Whole runs whose students have narrower hidden states than their teacher."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import OneRank, Outcome
from tiny_runs import bert, config_tree, llama, write_config, write_text
from transformers import AutoModelForMaskedLM
from whole_run import finish, read, records, weights

GRID, TARGET, WIDTH = [0.3, 0.6, 0.85], 0.85, 32
TOKENS = torch.arange(5, 35).reshape(3, 10)


class Residual:
    """A run with a teacher of its own."""

    def __init__(self, one_rank: OneRank, folder: Path, kind: str) -> None:
        self.one_rank, self.folder, self.out = one_rank, folder, folder / "out"
        text = str(write_text(folder / "text.txt", documents=20))
        if kind == "causal_lm":
            tokenizer = "bpe"
            model = llama(2, width=WIDTH, num_attention_heads=4, num_key_value_heads=2)
        else:
            tokenizer, model = "wordpiece", bert(2, width=WIDTH, num_attention_heads=4)
        self.tree = config_tree(
            self.out,
            {"type": kind, "dataset": text, "tokenizer": {"type": tokenizer, "vocab_size": 320}},
            teacher={"model": model, "finetune": {"max_steps": 12}},
            student={"model": "from_teacher"},
            eval={"eval_steps": 4},
        )
        self.tree["train"] |= {"max_steps": 8, "learning_rate": 0.003}

    def run(self, **method: Any) -> Outcome:
        options = {"sparsities": GRID, "target_sparsity": TARGET, "round_to": 4, "residual": True}
        self.tree["method"] = {**options, "name": "minidisc", "metric": "accuracy", **method}
        return finish(self.one_rank, write_config(self.folder / "run.yaml", self.tree))


def result(out: Path, stage: str) -> dict[str, Any]:
    return json.loads((out / "stages" / stage / "result.json").read_text())


@pytest.fixture(scope="module")
def masked(one_rank, tmp_path_factory) -> tuple[Residual, Outcome]:
    """One trial with the objective that is there without one."""
    run = Residual(one_rank, tmp_path_factory.mktemp("masked"), "mlm")
    return run, run.run(iterations=1)


def test_what_is_exported_scores_as_the_narrower_view_did(masked):
    run, _ = masked
    trial = result(run.out, "trial-1")

    seen = trial["scores"][f"sparsity-{TARGET:g}"]
    assert trial["view"] == f"sparsity-{TARGET:g}"
    assert read(run.out)["student.loss"] == pytest.approx(seen["loss"], rel=1e-5)
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
        AutoModelForMaskedLM.from_pretrained(run.out / "stages" / stage).eval()
        for stage in ("teacher-finetune", "specification")
    )

    order = sorted(range(WIDTH), key=lambda column: (-units["width"][column], column))
    assert order != list(range(WIDTH))
    torch.testing.assert_close(
        ordered.get_input_embeddings().weight, teacher.get_input_embeddings().weight[:, order]
    )
    with torch.inference_mode():
        expected = teacher(TOKENS).logits
        torch.testing.assert_close(ordered(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_narrower_assistant_teaches_a_still_narrower_student(one_rank, tmp_path):
    """Two trials of a sharded decoder; its heads of queries share keys by twos."""
    run = Residual(one_rank, tmp_path, "causal_lm")
    run.tree["objective"] = [{"loss": "soft_target_kl"}, {"loss": "relation_kl"}]
    run.tree["student"]["deepspeed"] = "zero3"

    run.run(tradeoff=0.0)

    report = read(run.out)
    (assistant,) = report["assistants"]
    widths = [
        weights(run.out / folder)["model.norm.weight"].numel()
        for folder in ("stages/specification", "stages/trial-1", "final")
    ]
    assert widths[0] == WIDTH > widths[1] > widths[2] == 12
    assert report[f"{assistant}.parameters"] > report["student.parameters"]
    seen = result(run.out, "trial-2")["scores"][f"sparsity-{TARGET:g}"]
    assert report["student.loss"] == pytest.approx(seen["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["direct", "maxidisc"])
def test_other_methods_narrow_their_students_too(one_rank, tmp_path, name):
    run = Residual(one_rank, tmp_path, "mlm")

    run.run(name=name)

    words = weights(run.out / "final")["bert.embeddings.word_embeddings.weight"]
    assert words.shape[1] == 12


def test_relations_that_no_candidate_can_be_cut_into_are_refused_before_a_model_loads(
    one_rank, tmp_path
):
    run = Residual(one_rank, tmp_path, "mlm")
    run.tree["objective"] = [{"loss": "relation_kl", "relation_heads": 16}]
    run.tree["method"] = {"name": "minidisc", "residual": True, "round_to": 4, "metric": "accuracy"}

    outcome = one_rank.train("--config", write_config(tmp_path / "r.yaml", run.tree), code=2)

    assert not outcome.loaded
    wanted = r"relation_heads 16 .* does not divide 8, the width that .* use one of 1, 2, 4, 8"
    assert re.search(wanted, outcome.err), outcome.err
