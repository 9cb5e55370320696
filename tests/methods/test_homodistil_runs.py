"""HomoDistil through the real commands: results, stops, and settings that cannot work."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny_runs import NO_DROPOUT, bert, config_tree, llama, write_config, write_text
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

METHOD = {"name": "homodistil", "target_width": 12, "cuts": 2, "pruning_end": 6}
TRAIN = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 0.01}


def pruning(folder: Path, kind: str = "mlm", **sections: Any) -> Path:
    """A run config of a teacher with random weights, so that no time goes into its training."""
    text = folder / "text.txt"
    if not text.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(text, documents=80)
    model = (
        bert(2, 24, num_attention_heads=3, hidden_act="relu")
        if kind == "mlm"
        else llama(2, 32, num_attention_heads=4, num_key_value_heads=2)
    )
    method = METHOD if kind == "mlm" else {**METHOD, "target_width": 16, "round_to": 8}
    tree = config_tree(
        folder / "out",
        {"type": kind, "dataset": str(text)},
        teacher=sections.pop("teacher", {"model": model}),
        method={**method, **sections.pop("method", {})},
        train={**TRAIN, **sections.pop("train", {})},
        **sections,
    )
    tree["student"] = {"model": "from_teacher", **sections.get("student", {})}
    return write_config(folder / "run.yaml", tree)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def finished(one_rank, tmp_path_factory) -> tuple[Path, tuple[str, ...]]:
    """The folder of a run, and the models that it has loaded."""
    folder = tmp_path_factory.mktemp("homodistil")
    said = one_rank.train("--config", pruning(folder, eval={"eval_steps": 1, "keep_best": False}))
    assert said.code == 0, said.err
    return folder / "out", tuple(Path(name).name for name in said.loaded)


@pytest.fixture(scope="module")
def pruned(finished) -> Path:
    return finished[0]


def test_all_windows_and_the_report_load_the_teacher_once(finished):
    """`new bert` is the teacher, then the student, which starts as the teacher."""
    _, loaded = finished

    assert loaded == ("new bert", "new bert", "pruning-1", "pruning-2", "student")


def test_the_student_has_the_target_width_in_every_matrix(pruned):
    config = json.loads((pruned / "final" / "config.json").read_text())

    # 3 heads of 4 columns are 12: the stock class can say the shape.
    assert (config["model_type"], config["hidden_size"], config["intermediate_size"]) == (
        "bert",
        12,
        24,
    )
    model = AutoModelForMaskedLM.from_pretrained(pruned / "final")
    assert model.bert.encoder.layer[0].attention.self.query.weight.shape == (12, 12)


def test_the_first_row_of_the_report_is_the_teacher_itself(pruned):
    first = json.loads((pruned / "report.json").read_text())["pruning"][0]

    assert (first["step"], first["width"], first["teacher_kl"]) == (0, 24, 0.0)


def test_sizes_fall_at_the_cuts_and_the_report_lists_them(pruned):
    rows = json.loads((pruned / "report.json").read_text())["pruning"]

    assert [row["step"] for row in rows] == [*range(9)]
    assert [row["width"] for row in rows] == sorted((row["width"] for row in rows), reverse=True)
    assert rows[-1]["width"] == 12
    stages = ["pruning-1", "pruning-2", "student"]
    sizes = [sum(w.numel() for w in weights(pruned / "stages" / s).values()) for s in stages]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == rows[-1]["parameters"]
    by_step = {row["step"]: row["parameters"] for row in rows}
    assert sizes[0] in by_step.values()


def test_a_model_in_flight_loads_with_plain_transformers_and_keeps_its_scale(pruned):
    config = json.loads((pruned / "stages" / "pruning-1" / "config.json").read_text())

    assert config["model_type"] == "cut_bert"
    assert config["score_width"] == 8
    AutoModelForMaskedLM.from_pretrained(pruned / "stages" / "pruning-1", trust_remote_code=True)


def test_an_exported_model_in_flight_has_no_training_state(one_rank, pruned, tmp_path):
    config = pruned.parent / "run.yaml"

    said = one_rank.megakd("export", config, "--stage", "pruning-1", "--to", tmp_path / "model")

    assert said.code == 0, said.err
    assert (pruned / "stages" / "pruning-1" / "training_state").is_dir()
    assert not (tmp_path / "model" / "training_state").exists()
    AutoModelForMaskedLM.from_pretrained(tmp_path / "model", trust_remote_code=True)


@pytest.mark.parametrize("stop", [("pruning-1", 1), ("pruning-2", 3), ("student", 7)])
def test_a_run_stopped_in_any_window_ends_with_the_same_weights(one_rank, pruned, tmp_path, stop):
    config = pruning(tmp_path, save={"save_steps": 1}, eval={"eval_steps": 1, "keep_best": False})

    stopped = one_rank.train("--config", config, stop_at=stop)
    finished = one_rank.train("--config", config)

    assert stopped.code != 0
    assert finished.code == 0, finished.err
    one, other = weights(tmp_path / "out" / "final"), weights(pruned / "final")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    rows, reference = (
        json.loads((out / "report.json").read_text())["pruning"]
        for out in (tmp_path / "out", pruned)
    )
    assert [r["teacher_kl"] for r in rows] == [r["teacher_kl"] for r in reference]


def test_a_run_stopped_between_two_windows_ends_with_the_same_weights(one_rank, pruned, tmp_path):
    config = pruning(tmp_path, eval={"eval_steps": 1, "keep_best": False})

    # The first window has finished; the second has not saved anything yet.
    one_rank.train("--config", config, stop_at=("pruning-2", 3))
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "pruning-2")
    finished = one_rank.train("--config", config)

    assert finished.code == 0, finished.err
    one, other = weights(tmp_path / "out" / "final"), weights(pruned / "final")
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_damaged_training_state_is_named(one_rank, tmp_path):
    config = pruning(tmp_path)
    one_rank.train("--config", config, stop_at=("pruning-2", 3))
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "pruning-2")
    state = tmp_path / "out" / "stages" / "pruning-1" / "training_state" / "model.safetensors"
    state.write_bytes(state.read_bytes()[:-7])

    said = one_rank.train("--config", config)

    assert said.code != 0
    assert "training_state/model.safetensors" in said.err
    assert "remove" in said.err


def test_a_decoder_is_pruned_to_a_stock_model(one_rank, tmp_path):
    said = one_rank.train("--config", pruning(tmp_path, "causal_lm"))

    assert said.code == 0, said.err
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "final").config
    assert (config.model_type, config.hidden_size, config.num_key_value_heads) == ("llama", 16, 1)
    assert config.num_attention_heads == 2
    assert config.intermediate_size == 32


def test_best_evaluations_count_only_after_the_end_of_pruning(one_rank, tmp_path):
    config = pruning(tmp_path, eval={"eval_steps": 1, "keep_best": True})

    said = one_rank.train("--config", config)

    assert said.code == 0, said.err
    best = json.loads((tmp_path / "out/checkpoints/student/best/best.json").read_text())
    assert best["step"] >= METHOD["pruning_end"]
    assert not (tmp_path / "out/checkpoints/pruning-1/best").exists()


def test_early_stopping_waits_for_the_end_of_pruning(one_rank, tmp_path):
    config = pruning(
        tmp_path,
        method={"cuts": 0, "pruning_end": 6},
        train={"early_stopping_patience": 1},
        eval={"eval_steps": 1},
    )

    said = one_rank.train("--config", config)

    assert said.code == 0, said.err
    final = json.loads((tmp_path / "out" / "final" / "config.json").read_text())
    assert final["hidden_size"] == 12


def test_the_random_baseline_has_the_shape_of_the_student(one_rank, tmp_path):
    config = pruning(tmp_path, baselines=["alone", "random"], method={"cuts": 1})

    said = one_rank.train("--config", config)

    assert said.code == 0, said.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["baselines"].keys() == {"alone", "random"}
    shapes = [
        {name: tuple(w.shape) for name, w in weights(tmp_path / "out/stages" / stage).items()}
        for stage in ("student", "random")
    ]
    assert shapes[0] == shapes[1]


def test_a_one_shot_run_jumps_further_from_its_teacher(one_rank, tmp_path):
    """The homotopy: small steps keep the divergence small. One of 24 columns is a large step."""
    jumps = {}
    for schedule in ("one_shot", "cubic"):
        config = pruning(
            tmp_path / schedule,
            method={"schedule": schedule, "pruning_start": 10, "pruning_end": 40, "cuts": 0},
            train={"max_steps": 50, "learning_rate": 0.003},
            eval={"eval_steps": 1},
            teacher={
                "model": bert(2, 24, num_attention_heads=3, initializer_range=0.5, **NO_DROPOUT)
            },
        )
        said = one_rank.train("--config", config)
        assert said.code == 0, said.err
        rows = json.loads((tmp_path / schedule / "out" / "report.json").read_text())["pruning"]
        course = [row["teacher_kl"] for row in rows]
        jumps[schedule] = max(b - a for a, b in pairwise(course))

    assert jumps["cubic"] <= jumps["one_shot"] / 2


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"method": {"target_sparsity": 0.5}}, "exactly one of target_width (got 12) and"),
        ({"method": {"target_width": None}}, "target_width (got None) and target_sparsity (got N"),
        ({"method": {"pruning_start": 6}}, "pruning_end: 6 is not after method.pruning_start 6"),
        ({"method": {"pruning_end": 9}}, "pruning_end: 9 is after the end of the run"),
        ({"method": {"target_width": 24}}, "24 is not possible for a teacher of width 24; use a"),
        ({"method": {"target_width": 1}}, "without columns of heads"),
        ({"student": {"layers": 1}}, "remove student.layers"),
        ({"objective": [{"loss": "hidden_mse"}]}, "set projection: identity in the term"),
        ({"objective": [{"loss": "relation_kl"}]}, "their width falls during the run"),
        (
            {"method": {"target_width": None, "target_sparsity": 0.001}},
            "method.target_sparsity: 0.001",
        ),
        ({"objective": [{"loss": "hidden_cosine"}]}, "hidden_mse with projection: identity"),
        ({"train": {"max_steps": None, "num_train_epochs": 0.1}}, "num_train_epochs 0.1 over the"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(
    one_rank, tmp_path, sections, message
):
    said = one_rank.train("--config", pruning(tmp_path, **sections))

    assert said.code != 0
    assert message in said.err, said.err
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_a_decoder_that_loses_heads_cannot_compare_attention(one_rank, tmp_path):
    objective = [{"loss": "soft_target_kl"}, {"loss": "attention_mse"}]

    said = one_rank.train("--config", pruning(tmp_path, "causal_lm", objective=objective))

    assert said.code != 0
    assert "the student loses heads (from 2 to 1 key-value groups" in said.err


def test_a_task_with_labels_is_refused(one_rank, tmp_path):
    config = json.loads(pruning(tmp_path).read_text())
    config["task"] = {"type": "classification", "dataset": "pydocs", "max_length": 16}

    said = one_rank.train("--config", write_config(tmp_path / "run.yaml", config))

    assert said.code != 0
    assert "homodistil prunes on text and needs" in said.err
