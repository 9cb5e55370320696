"""Two engines under one launcher: precision, offload, sharding, checkpointing, ragged ends."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
import torch
from cases import elements, lab_of, local, started
from equal_runs import RAGGED, TERMS, ZERO3, difference, write_pair
from safetensors.torch import load_file
from tiny_runs import NO_DROPOUT, bert, llama
from torch.utils._pytree import tree_leaves

from megakd.contract.stage import Constant, Pass, Stage
from megakd.engine.memory import forget_models
from megakd.models.structure import architecture_of
from megakd.run import teacher_pool
from megakd.storage.folders import write_files


def two_engines(config_path: str, folder: str) -> dict:
    """One step of student and teacher, then a checkpoint: what each engine holds."""
    with started(config_path) as (run, teacher):
        weights = list(teacher.model.parameters())
        before = [local(p).clone() for p in weights]
        run.trainer.train_step(run.source.step(0))
        write_files(Path(folder) / "saved", run.student.files())
        after = [local(p) for p in weights]
        return {
            "teacher_share": sum(p.numel() for p in after) / elements(teacher.model),
            "teacher_devices": {str(p.device) for p in after},
            "teacher_optimizer": type(teacher._engine.optimizer).__name__,
            "teacher_trains": any(p.requires_grad for p in weights),
            "teacher_gradients": sum(p.grad is not None for p in weights),
            "teacher_changed": not all(map(torch.equal, before, after)),
            "student_optimizer": type(run.student._engine.basic_optimizer).__name__,
            "student_elements": elements(run.student.bundle),
        }


def losses(config_path: str, *, scores: bool) -> tuple[bool, list[dict[str, float]]]:
    """Whether the teacher was scored, and the parts of the losses of three steps."""
    with (
        patch.object(teacher_pool, "measure", wraps=teacher_pool.measure) as measuring,
        started(config_path, scores=scores) as (run, _),
    ):
        reports = [run.trainer.train_step(run.source.step(step)) for step in range(3)]
        parts = [{name: float(value) for name, value in r.parts.items()} for r in reports]
        return measuring.called, parts


def consecutive_stages(config_path: str, out: str, *, closes: bool) -> int:
    """Two stages with one teacher, closed between them or not; how often it was opened."""
    with lab_of(config_path, [f"output_dir={out}"]) as lab:
        teacher, objective = lab.teacher(), lab.config.objective
        with patch.object(lab.pool, "open", wraps=lab.pool.open) as opening:
            for name, terms in (("first", objective), ("second", objective[:1])):
                strategy = Constant((Pass(teacher=teacher),))
                lab.train(Stage(name=name, teachers=(teacher,), objective=terms, strategy=strategy))
                if closes:
                    lab.close()
        return opening.call_count


def note_gathers(model, note) -> None:
    """Call `note` with the weights that are made whole together: one, or many by their first."""
    for parameter in model.parameters():
        for way in ("all_gather", "all_gather_coalesced"):
            real = getattr(parameter, way)

            def gather(*args, real=real, alone=parameter, **options):
                note((args[0] if args else options.get("param_list")) or [alone])
                return real(*args, **options)

            setattr(parameter, way, gather)


def head_gathers(config_path: str, overrides: list[str]) -> list[dict]:
    """Count the gathers of the matrix of each model's head, per micro-batch."""
    with started(config_path, overrides) as (run, teacher):
        models = {"teacher": teacher.model, "student": run.student.student}
        counted = dict.fromkeys(models, 0)
        for name, model in models.items():
            head = model.get_submodule(architecture_of(model.config).head).weight

            def note(weights, name=name, head=head):
                counted[name] += any(weight is head for weight in weights)

            note_gathers(model, note)
        per_micro_batch, forward_backward = [], run.student.forward_backward

        def counting(*inputs, **options):
            parts = forward_backward(*inputs, **options)
            per_micro_batch.append(dict(counted))
            counted.update(dict.fromkeys(models, 0))
            return parts

        run.trainer.student.forward_backward = counting
        for step in range(2):
            run.trainer.train_step(run.source.step(step))
        return per_micro_batch


def teacher_gathers(config_path: str, overrides: list[str]) -> int:
    """Count the weights of the teacher that the ranks gather in the second step."""
    with started(config_path, overrides) as (run, teacher):
        gathered: list = []
        note_gathers(teacher.model, gathered.extend)
        for step in range(2):
            gathered.clear()
            run.trainer.train_step(run.source.step(step))
        return len(gathered)


def resident_memory(config_path: str, stages: int) -> list[int]:
    """The resident bytes of this rank after each of several stages, with their models freed."""
    sizes = []
    for _ in range(stages):
        with started(config_path) as (run, teacher):
            run.trainer.train_step(run.source.step(0))
        del run, teacher
        forget_models()
        sizes.append(psutil.Process().memory_info().rss)
    return sizes


@pytest.fixture
def write(tmp_path):
    """A config with the engines and settings of one test: `write(student=..., teacher=...)`."""

    def written(**settings) -> str:
        return write_pair(tmp_path / str(len(list(tmp_path.iterdir()))), **settings)

    return written


@pytest.fixture
def train(workers, write):
    def trained(steps, *, ranks=2, **settings):
        return workers(ranks).run("train", write(**settings), [], steps)[0]

    return trained


@pytest.mark.parametrize(
    ("student", "teacher"), [("zero2", "teacher_zero0"), ("zero3", "teacher_zero3")]
)
def test_both_models_in_bf16_bring_the_loss_down(workers, write, student, teacher):
    path = write(student=student, teacher=teacher, bf16=True, adam_epsilon=1e-8)

    result = workers(2).run("train", path, ["teacher.dtype=bf16"], 16)[0]

    assert {weight.dtype for weight in result["final"].values()} == {torch.bfloat16}
    total = [
        sum(term["weight"] * step[term["loss"]] for term in TERMS) for step in result["losses"]
    ]
    assert sum(total[-4:]) < 0.8 * sum(total[:4])


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("zero0", "teacher_zero0"),
        ("zero2", "teacher_zero3_offload"),
        ("zero3", "teacher_zero3"),
        pytest.param("zero2_offload", "teacher_zero3_offload", marks=pytest.mark.slow),
    ],
)
def test_a_teacher_has_no_optimizer_no_gradient_and_no_place_in_a_checkpoint(
    workers, write, tmp_path, student, teacher
):
    path = write(student=student, teacher=teacher)

    for facts in workers(2).run("test_engines.two_engines", path, str(tmp_path / "saved")):
        assert not facts["teacher_trains"]
        assert facts["teacher_gradients"] == 0
        assert not facts["teacher_changed"]
        assert facts["teacher_optimizer"] in ("NoneType", "DeepSpeedZeRoOffload")
        assert facts["teacher_devices"] == {"cpu"}
        share = facts["teacher_share"]
        assert share == 1 if teacher == "teacher_zero0" else share <= 0.51
        assert (facts["student_optimizer"] == "DeepSpeedCPUAdam") is ("offload" in student)
    saved = [
        torch.load(file, weights_only=False)
        for file in sorted((tmp_path / "saved" / "saved").glob("*.pt"))
    ]
    names = {name.split(".")[0] for content in saved for name in content["offsets"]}
    assert names
    assert names <= {"learners", "objective"}
    # Weight and two moments of each element, and at ZeRO-2 the weights once more.
    tensors = [leaf for leaf in tree_leaves(saved) if isinstance(leaf, torch.Tensor)]
    elements = sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())
    assert elements <= 4.2 * facts["student_elements"]


# With one micro-batch of 4 the last step has one row, and the other rank only keeps in step.
@pytest.mark.parametrize(("student", "accumulation"), [("zero2", 1), ("zero3", 2)])
def test_a_ragged_end_trains_two_ranks_as_one(train, student, accumulation):
    steps = RAGGED // (8 * accumulation) + 2  # over the end, into the second epoch
    keys = {"student": student, "gradient_accumulation_steps": accumulation}

    two = train(steps, **keys)
    one = train(steps, ranks=1, per_device_train_batch_size=8, **keys)

    assert difference(two["final"], one["final"]) <= 3e-6
    assert two["scores"] == pytest.approx(one["scores"], abs=1e-6)


# A tied teacher has let go of its embedding when the student's forward asks for the head.
@pytest.mark.parametrize(("tied", "teacher"), [(True, 2), (False, 1)], ids=["tied", "untied"])
def test_a_sharded_head_is_made_whole_once_per_micro_batch_whatever_the_losses(
    workers, write, tied, teacher
):
    path = write(
        language=True,
        student=ZERO3,
        teacher=ZERO3,
        models=(llama(2, 24, tie_word_embeddings=tied), llama(1, tie_word_embeddings=tied)),
        # Two temperatures: two passes over both heads.
        objective=[
            {"loss": "hard_cross_entropy"},
            {"loss": "soft_target_kl"},
            {"loss": "soft_target_reverse_kl", "temperature": 2.0},
        ],
    )

    one = ["teacher.joins_micro_batches=false"]
    _, *result = workers(2).run("test_engines.head_gathers", path, one)[0]

    # In the first micro-batch DeepSpeed learns who reads the head.
    assert result == [{"teacher": teacher, "student": 1}] * 3


def test_a_sharded_teacher_is_made_whole_once_per_step(workers, write):
    path = write(teacher=ZERO3, gradient_accumulation_steps=3)

    def gathers(*overrides):
        return workers(2).run("test_engines.teacher_gathers", path, list(overrides))[0]

    together = gathers()

    assert together > 0
    assert gathers("teacher.joins_micro_batches=false") == 3 * together


@pytest.mark.parametrize(("language", "tied"), [(False, True), (True, True)])
def test_a_sharded_teacher_teaches_the_same_after_it_was_scored(workers, write, language, tied):
    """Scoring reads the head in another order, which DeepSpeed's prefetch remembers."""
    models = (llama(2, 24, tie_word_embeddings=tied), llama(1)) if language else None
    path = write(language=language, student="zero3", teacher=ZERO3, models=models)

    alone, after = (
        workers(2).run("test_engines.losses", path, scores=scores) for scores in (False, True)
    )

    assert [scored for scored, _ in (*alone, *after)] == [False, False, True, True]
    assert [parts for _, parts in after] == [parts for _, parts in alone]


def test_a_teacher_that_stays_open_between_stages_teaches_the_same(workers, write, tmp_path):
    path = write(student="zero3", max_steps=3)
    outs = kept, reopened = tmp_path / "kept", tmp_path / "reopened"
    case = "test_engines.consecutive_stages"

    assert workers(2).run(case, path, str(kept), closes=False) == [1, 1]
    assert workers(2).run(case, path, str(reopened), closes=True) == [2, 2]
    one, other = (load_file(out / "stages/second/model.safetensors") for out in outs)
    assert difference(one, other) == 0


@pytest.mark.slow
def test_the_memory_of_a_stage_comes_back(workers, write):
    """Models of 20 MB and 80 MB: a leak of one model in 18 stages would be seen."""
    models = (bert(2, width=768, **NO_DROPOUT), bert(1, width=384, **NO_DROPOUT))
    path = write(student="zero3", models=models)

    for sizes in workers(2).run("test_engines.resident_memory", path, 20):
        assert sizes[-1] <= 1.05 * sizes[1], [round(size / 1e6) for size in sizes]
