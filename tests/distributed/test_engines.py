"""Two engines under one launcher: precision, offload, sharding, checkpointing, ragged ends."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
import torch
import torch.distributed as dist
from cases import elements, lab_of, local, started, summed
from deepspeed.runtime.zero import partition_parameters
from equal_runs import RAGGED, TERMS, ZERO3, difference, write_pair
from safetensors.torch import load_file
from slow_cases import slow
from tiny_runs import NO_DROPOUT, bert, llama
from torch.utils._pytree import tree_leaves

from megakd.data.batch import Pass
from megakd.engine import distributed
from megakd.engine.memory import forget_models
from megakd.engine.sharding import gathered_state
from megakd.models.structure import architecture_of
from megakd.process.seals import write_files
from megakd.run import teacher_pool
from megakd.stage import Constant, Stage


def two_engines(config_path: str, folder: str) -> tuple[float, str, int]:
    """One step of student and teacher, then a checkpoint: the teacher only answers.

    Returns:
        This rank's share of the teacher, the student's optimizer, and its elements.
    """
    with started(config_path) as (run, teacher):
        weights = list(teacher.model.parameters())
        before = [local(p).clone() for p in weights]
        run.trainer.train_step(run.batch_source.step(0))
        write_files(Path(folder) / "saved", run.student.files())
        after = [local(p) for p in weights]
        assert all(map(torch.equal, before, after))
        assert not any(p.requires_grad or p.grad is not None for p in weights)
        assert {str(p.device) for p in after} == {"cpu"}
        optimizer = type(teacher._engine.optimizer).__name__
        assert optimizer in ("NoneType", "DeepSpeedZeRoOffload"), optimizer
        share = sum(p.numel() for p in after) / elements(teacher.model)
        optimizer = type(run.student._engine.basic_optimizer).__name__
        return share, optimizer, elements(run.student.bundle)


def losses(config_path: str, *, scores: bool) -> tuple[bool, list[dict[str, float]]]:
    """Whether the teacher was scored, and the parts of the losses of three steps."""
    with (
        patch.object(teacher_pool, "measure", wraps=teacher_pool.measure) as measuring,
        started(config_path, scores=scores) as (run, _),
    ):
        reports = [run.trainer.train_step(run.batch_source.step(step)) for step in range(3)]
        parts = [{name: float(value) for name, value in r.parts.items()} for r in reports]
        return measuring.called, parts


def consecutive_stages(config_path: str, out: str, *, closes: bool) -> int:
    """Two stages with one teacher, closed between them or not; how often it was opened."""
    with lab_of(config_path, [f"output_dir={out}"]) as lab:
        teacher, objective = lab.teacher(), lab.config.objective
        with patch.object(lab.work.pool, "open", wraps=lab.work.pool.open) as opening:
            for name, terms in (("first", objective), ("second", objective[:1])):
                strategy = Constant((Pass(teacher=teacher),))
                lab.train(Stage(name=name, teachers=(teacher,), objective=terms, strategy=strategy))
                if closes:
                    lab.work.close()
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


def gathers(config_path: str, overrides: list[str]) -> list[dict[str, int]]:
    """Count by micro-batch of two steps how often each model's head is gathered.

    "weights" are all of the teacher.
    """
    with started(config_path, overrides) as (run, teacher):
        models = {"teacher": teacher.model, "student": run.student.student}
        counted = dict.fromkeys((*models, "weights"), 0)
        for name, model in models.items():
            head = model.get_submodule(architecture_of(model.config).head).weight

            def note(weights, name=name, head=head):
                counted[name] += any(weight is head for weight in weights)
                counted["weights"] += len(weights) * (name == "teacher")

            note_gathers(model, note)
        per_micro_batch, forward_backward = [], run.student.forward_backward

        def counting(*inputs, **options):
            parts = forward_backward(*inputs, **options)
            per_micro_batch.append(dict(counted))
            counted.update(dict.fromkeys(counted, 0))
            return parts

        run.trainer.student.forward_backward = counting
        for step in range(2):
            run.trainer.train_step(run.batch_source.step(step))
        return per_micro_batch


def resident_memory(config_path: str, stages: int) -> list[int]:
    """The resident bytes of this rank after each of several stages, with their models freed."""
    sizes = []
    for _ in range(stages):
        with started(config_path) as (run, teacher):
            run.trainer.train_step(run.batch_source.step(0))
        del run, teacher
        forget_models()
        sizes.append(psutil.Process().memory_info().rss)
    return sizes


def taught(config_path: str, overrides: list[str], count: int) -> dict:
    """Two steps with a teacher on `count` nodes: losses, weights, shards, and the gathers."""
    with claimed_nodes(count), sizes_of_gathers() as groups:
        with started(config_path, overrides) as (run, teacher):
            batches = run.batch_source.step(0)
            groups.clear()
            logits = teacher(batches[0]).logits
            answering = list(groups)
            losses = [
                summed(run.trainer.train_step(run.batch_source.step(n)).parts) for n in range(2)
            ]
            shards = [local(p) for p in teacher.model.parameters()]
            facts = {
                "logits": logits,
                "losses": losses,
                "groups": answering,
                "weights": dict(gathered_state(teacher.model)),
                "share": sum(shard.numel() for shard in shards) / elements(teacher.model),
            }
            model = weakref.ref(teacher.model)
        del run, teacher, shards
        forget_models()
    return {**facts, "freed": model() is None}


@contextmanager
def claimed_nodes(count: int) -> Iterator[None]:
    """Equally many ranks on each of `count` nodes of this host, as its launchers would say."""
    node = dist.get_rank() * count // dist.get_world_size()
    launched = patch.dict(os.environ, {"CROSS_RANK": str(node)})
    with launched, patch.dict(distributed._NODE_GROUPS, clear=True):
        yield


@contextmanager
def sizes_of_gathers() -> Iterator[list[int]]:
    """The number of ranks of each gather of weights."""
    groups: list[int] = []
    gather = partition_parameters._dist_allgather_fn

    def noting(part, whole, group=None):
        groups.append(dist.get_world_size(group))
        return gather(part, whole, group)

    with patch.object(partition_parameters, "_dist_allgather_fn", noting):
        yield groups


@pytest.fixture
def write(tmp_path):
    """A config with the engines and settings of one test: `write(student=..., teacher=...)`."""

    def written(**settings) -> str:
        return write_pair(tmp_path / str(len(list(tmp_path.iterdir()))), **settings)

    return written


@pytest.mark.slow
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
        ("zero2", "teacher_zero3_offload"),
        ("zero3", "teacher_zero3"),
        *slow(("zero0", "teacher_zero0"), ("zero2_offload", "teacher_zero3_offload")),
    ],
)
def test_a_teacher_has_no_optimizer_no_gradient_and_no_place_in_a_checkpoint(
    workers, write, tmp_path, student, teacher
):
    path = write(student=student, teacher=teacher)

    result = workers(2).run("test_engines.two_engines", path, str(tmp_path / "saved"))

    for share, optimizer, _ in result:
        assert share == 1 if teacher == "teacher_zero0" else share <= 0.51
        assert (optimizer == "DeepSpeedCPUAdam") is ("offload" in student)
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
    assert elements <= 4.2 * result[0][-1]


# With one micro-batch of 4 the last step has one row, and the other rank only keeps in step.
@pytest.mark.parametrize(("student", "accumulation"), [("zero2", 1), *slow(("zero3", 2))])
def test_a_ragged_end_trains_two_ranks_as_one(workers, write, student, accumulation):
    steps = RAGGED // (8 * accumulation) + 2  # over the end, into the second epoch
    keys = {"student": student, "gradient_accumulation_steps": accumulation}

    one, two = (
        workers(ranks).run(
            "train", write(per_device_train_batch_size=8 // ranks, **keys), [], steps
        )[0]
        for ranks in (1, 2)
    )

    assert difference(two["final"], one["final"]) <= 3e-6
    assert two["scores"] == pytest.approx(one["scores"], abs=1e-6)


@pytest.fixture
def count_gathers(workers, write):
    def count(*overrides, tied=False, **train) -> list[dict[str, int]]:
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
            **train,
        )
        return workers(2).run("test_engines.gathers", path, [*overrides])[0]

    return count


ONE_BY_ONE = "teacher.joins_micro_batches=false"


# A tied teacher has let go of its embedding when the student's forward asks for the head.
@pytest.mark.parametrize(("tied", "teacher"), [(True, 2), *slow((False, 1))])
def test_a_sharded_head_is_made_whole_once_per_micro_batch_whatever_the_losses(
    count_gathers, tied, teacher
):
    _, *result = count_gathers(ONE_BY_ONE, tied=tied)

    # In the first micro-batch DeepSpeed learns who reads the head.
    assert [(one["teacher"], one["student"]) for one in result] == [(teacher, 1)] * 3


def test_a_sharded_teacher_is_made_whole_once_per_step(count_gathers):
    """All but its head, which every micro-batch reads."""
    together, apart = (
        sum(
            one["weights"] - one["teacher"]
            for one in count_gathers(*way, gradient_accumulation_steps=3)[3:]
        )
        for way in ((), (ONE_BY_ONE,))
    )

    assert together > 0
    assert apart == 3 * together


@pytest.mark.slow
@pytest.mark.parametrize("language", [False, True])
def test_a_sharded_teacher_teaches_the_same_after_it_was_scored(workers, write, language):
    """Scoring reads the head in another order, which DeepSpeed's prefetch remembers."""
    models = (llama(2, 24, tie_word_embeddings=True), llama(1)) if language else None
    path = write(language=language, student="zero3", teacher=ZERO3, models=models)

    alone, after = (
        workers(2).run("test_engines.losses", path, scores=scores) for scores in (False, True)
    )

    assert [scored for scored, _ in (*alone, *after)] == [False, False, True, True]
    assert [parts for _, parts in after] == [parts for _, parts in alone]


@pytest.mark.slow
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


# Small weights are sharded too, and gathered in every forward.
NODE = {"megakd": {"shard_within_node": True}, **ZERO3}


@pytest.mark.parametrize(
    ("ranks", "nodes", "language", "student"),
    [
        (2, 2, False, "zero2"),  # a rank alone on its node has everything
        *slow((2, 1, False, "zero2")),  # one node: like teacher_zero3
        *slow((2, 2, True, "zero3"), (4, 2, False, "zero2"), (4, 2, True, "zero3")),
    ],
)
def test_each_node_has_one_copy_of_a_teacher_that_answers_as_if_whole(
    workers, tmp_path, ranks, nodes, language, student
):
    path = write_pair(tmp_path / "run", language=language, student=student, teacher=NODE)
    of_node = ranks // nodes
    whole = ["teacher.deepspeed=teacher_zero0"]

    expected = workers(ranks).run("test_engines.taught", path, whole, nodes)
    actual = workers(ranks).run("test_engines.taught", path, [], nodes)

    for with_copy, with_whole in zip(actual, expected, strict=True):
        assert with_copy["share"] == pytest.approx(1 / of_node, abs=0.01)
        assert set(with_copy["groups"]) == ({of_node} if of_node > 1 else set())
        for step, whole_step in zip(with_copy["losses"], with_whole["losses"], strict=True):
            assert step == pytest.approx(whole_step, rel=1e-5)
        if not language:
            torch.testing.assert_close(with_copy["logits"], with_whole["logits"])
        assert with_copy["freed"]
    assert difference(actual[0]["weights"], expected[0]["weights"]) == 0
