"""Students, also with adapters, learn at any ranks, ZeRO stages and cuts as in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from equal_runs import (
    CLASSIFICATION,
    CUTS,
    INNER,
    LANGUAGE,
    PACKED,
    assert_same,
    assert_same_shards,
    cut_of,
    difference,
    plain_run,
)
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from slow_cases import slow
from whole_run import weights

from megakd.models.lora import WEIGHTS

RECOMPUTED = {"gradient_checkpointing": True}
OFFLOADED = {"deepspeed": "teacher_zero3_offload"}
CHUNKED, REFERENCE = {"kernels": "chunked"}, {"kernels": "reference"}


def terms_of(student):
    return CLASSIFICATION if student.startswith("bert") else LANGUAGE


ONE_BY_ONE = {"joins_micro_batches": False}
# (student, ZeRO stages of student and teacher); CUT has (2, 3).
STAGES = [("bert-student", 1, 3), ("llama-untied", 3, 0), ("masked-tied", 2, 3)]
SLOW_STAGES = [("bert-student", *stages) for stages in ((0, 0), (3, 3), (3, 0))]
SLOW_STAGES += [("llama-tied", *stages) for stages in ((3, 3), (0, 0), (1, 0))]
SLOW_STAGES += [("llama-untied", 1, 3), ("llama-untied", 3, 3)]
SLOW_STAGES += [("masked-tied", *stages) for stages in ((0, 3), (1, 0), (3, 3))]
SLOW_STAGES += [("masked-untied", 2, 0), ("masked-distilbert", 3, 3), ("masked-roberta", 3, 3)]
# Micro-batches and ranks for every kind of student.
CUT = [("bert-student", CUTS[1]), ("llama-tied", CUTS[3])]
SLOW_CUT = [("bert-student", CUTS[number]) for number in (2, 3, 4)]
SLOW_CUT += [("llama-tied", CUTS[4]), ("masked-tied", CUTS[1]), ("masked-tied", CUTS[5])]


def cases(stages, cuts):
    """(student, its terms, stages, ranks, sections of the config)"""
    yield from ((student, terms_of(student), zero, 2, {}) for student, *zero in stages)
    for student, cut in cuts:
        yield student, terms_of(student), (2, 3), cut[0], {"train": cut_of(cut)}


CASES = [*cases(STAGES, CUT), ("llama-untied", LANGUAGE, (2, 3), 2, {"train": PACKED})]
SLOW_CASES = [
    *cases(SLOW_STAGES, SLOW_CUT),
    ("bert-student", INNER, (3, 3), 2, {}),
    ("llama-tied", INNER, (3, 3), 2, {"train": RECOMPUTED | CHUNKED}),
    ("lfm2-student", LANGUAGE, (3, 3), 2, {}),
    # The answers of a teacher to a whole step at once are those to one micro-batch after another.
    ("llama-tied", LANGUAGE, (2, 3), 2, {"teacher": ONE_BY_ONE}),
    ("bert-student", INNER, (0, 3), 2, {"train": REFERENCE}),
    ("bert-student", INNER, (1, 0), 2, {"train": RECOMPUTED}),
    ("llama-tied", INNER, (2, 0), 2, {"train": CHUNKED}),
    ("llama-tied", INNER, (3, 3), 2, {"train": RECOMPUTED}),
    ("llama-untied", INNER, (3, 0), 2, {"train": RECOMPUTED | REFERENCE}),
    ("masked-tied", INNER, (2, 3), 2, {}),
    ("lfm2-student", LANGUAGE, (2, 0), 3, {"train": cut_of(CUTS[5])}),
    ("bert-student", CLASSIFICATION, (2, 3), 2, {"teacher": OFFLOADED}),
]


@pytest.mark.parametrize(
    ("student", "terms", "stages", "ranks", "sections"),
    [*CASES, *slow(*SLOW_CASES)],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_a_student_distils_as_in_one_plain_process(distil, student, terms, stages, ranks, sections):
    path, result = distil(student, terms, stages, ranks=ranks, **sections)

    assert_same(result[0], plain_run(path, terms, result[0]["initial"]))
    if stages[0] == 3:  # the student is really sharded
        whole = sum(weight.numel() for weight in result[0]["initial"].values())
        assert all(rank["local_elements"] <= 0.51 * whole for rank in result)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_shards_of_a_bf16_student_are_its_fp32_weights_and_gradients(distil, stage):
    _, result = distil("bert-student", CLASSIFICATION, (stage, 0), steps=1, train={"bf16": True})

    assert_same_shards(result[0])


# Nothing but a layer's projections has a gradient then, and the layer is repeated in the backward.
@pytest.mark.parametrize(("student", "stage"), [("masked-tied", 3), *slow(("llama-tied", 2))])
def test_relations_can_be_all_that_is_learned(distil, student, stage):
    alone = {"relation_kl": 1.0}

    path, (actual, _) = distil(student, alone, (stage, 3), steps=1, train=RECOMPUTED)

    expected = plain_run(path, alone, actual["initial"])
    assert actual["losses"][0]["relation_kl"] == pytest.approx(expected["losses"][0]["relation_kl"])
    for name, gradient in actual["gradients"][0].items():
        wanted = expected["gradients"][0].get(name, torch.zeros_like(gradient))
        assert torch.allclose(gradient, wanted, atol=1e-6), name


# Adapters.

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "bert": r".*encoder\.layer.*(query|key|value|dense)",
}
HEAD = {"llama": (), "bert": ("classifier", "bert.pooler")}
TOKENS = {"hard_cross_entropy": 0.3, "soft_target_kl": 0.5, "soft_target_reverse_kl": 0.2}
ADAPTERS = {"lora": {"r": 4, "alpha": 6.0}}


def adapt(student, initial):
    """A model -> the model with the adapters of the run, made by peft without megakd."""
    kind = student.partition("-")[0]

    def adapted(model):
        config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS[kind])
        inject_adapter_in_model(config, model)
        for module in HEAD[kind]:
            model.get_submodule(module).requires_grad_(requires_grad=True)
        adapters = {n.removeprefix("learners.0."): t for n, t in initial.items() if "lora" in n}
        assert model.load_state_dict(adapters, strict=False).unexpected_keys == []
        return model

    return adapted


@pytest.mark.parametrize(
    ("student", "stages"),
    [
        ("llama-untied", (3, 0)),
        *slow(("bert-student", (1, 3)), ("bert-student", (3, 3))),
        *slow(("llama-tied", (0, 0)), ("llama-tied", (2, 0))),
    ],
)
def test_adapters_and_a_head_learn_on_two_ranks_as_in_one_plain_process(distil, student, stages):
    terms = terms_of(student)

    path, (result, _) = distil(student, terms, stages, student=ADAPTERS)

    initial = result["initial"]
    assert_same(result, plain_run(path, terms, initial, adapt(student, initial)))
    learning = ("lora_", "objective", *HEAD[student.partition("-")[0]])
    for name, weight in initial.items():
        learns = any(part in name for part in learning)
        assert torch.equal(result["final"][name], weight) is not learns, name
        assert "lora_B" not in name or not weight.any(), name


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_the_base_without_adapters_teaches_as_a_second_model_would(distil, write_run, models, zero):
    student, base = {"lora": {**ADAPTERS["lora"], "dropout": 0.0}}, {"model": "student_base"}
    second = write_run("llama-tied", TOKENS, teacher={"model": str(models / "llama-tied")})

    _, (result, _) = distil("llama-tied", TOKENS, (zero, 0), student=student, teacher=base)

    initial = result["initial"]
    assert_same(result, plain_run(second, TOKENS, initial, adapt("llama-tied", initial)))
    assert abs(result["losses"][0]["soft_target_kl"]) < 1e-6
    assert result["losses"][-1]["soft_target_kl"] > 1e-4


@pytest.fixture(scope="module", params=[*slow(0), 3])
def adapted(request, command, write_run) -> Path:
    """The folder of a run with adapters whose first steps are better than the last.

    Adam's steps are as large as the rate.
    """
    train = {"max_steps": 4, "learning_rate": 2.0, "lr_scheduler_type": "constant"}
    sections = {"train": {**train, "adam_epsilon": 1e-8}, "eval": {"eval_steps": 1}}
    path = write_run("llama-untied", LANGUAGE, (request.param, 0), student=ADAPTERS, **sections)
    command("--config", path, code=0)
    return Path(f"{path}-out")


def test_a_checkpoint_has_the_adapters_alone(adapted):
    stage, checkpoint = adapted / "stages/student", adapted / "checkpoints/student/step-4"

    names = [
        name
        for file in checkpoint.glob("engine-*.pt")
        for name in torch.load(file, weights_only=True)["offsets"]
    ]
    assert any("lora_" in name for name in names)
    assert all("lora_" in name or name.startswith("objective.") for name in names)
    learned = sum(tensor.numel() for tensor in load_file(stage / WEIGHTS).values())
    assert learned < max(tensor.numel() for tensor in weights(stage).values())
    written = sum(file.stat().st_size for file in checkpoint.glob("*.pt"))
    assert written < 4 * 8 * learned + 200_000, (written, learned)


def test_the_adapters_of_the_best_evaluation_are_merged_and_not_the_last(adapted, models):
    stage = adapted / "stages/student"
    (kept,) = (adapted / "checkpoints/student/best").iterdir()

    best = load_file(kept / Path(WEIGHTS).name)
    assert int(kept.name.removeprefix("step-")) < 4
    assert difference(load_file(stage / WEIGHTS), best) == 0
    assert not (kept / "model.safetensors").exists()
    base, merged = weights(models / "llama-untied"), weights(stage)
    assert merged.keys() == base.keys()
    for name, weight in base.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (best.get(f"{module}.lora_{factor}.weight") for factor in "AB")
        expected = weight if a is None else weight + 6 / 4 * b @ a
        assert torch.allclose(merged[name], expected, atol=1e-5, rtol=1e-5), name
