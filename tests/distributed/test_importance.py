"""Importance at any ranks and ZeRO stages is what one plain process finds by its weights."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from cases import elements, lab_of, local
from equal_runs import bert, in_parts, inputs_of
from slow_cases import slow
from tiny_runs import pairs_task
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from megakd.config.file import load_config
from megakd.data.loader import evaluation_batches
from megakd.errors import MegakdError
from megakd.models.fitting import ReadyTeacher
from megakd.training import importance
from megakd.training.allocation import UnitScores, unit_order, view_at

ROWS_PER_BATCH = 6
"""Of all ranks together."""


def measured(config_path: str, overrides: list[str], *, labelled: bool = True) -> dict:
    """Scores of the config's teacher on the validation split, or on its rows without a label."""
    with lab_of(config_path, overrides) as lab:
        prepared = lab.work.assembly.prepared
        rows = prepared.encoded.validation
        if not labelled:
            rows = rows.select([i for i, label in enumerate(rows["label"]) if label < 0])
        try:
            with watching() as facts:
                scores = importance.measure_importance(
                    lab.work.assembly,
                    ReadyTeacher(prepared.sources["teacher"], lab.config.teacher),
                    rows,
                    batch_size=ROWS_PER_BATCH,
                )
        except MegakdError as error:
            return {"error": f"{type(error).__name__}: {error}"}
        # The teacher gets no gradient.
        weights = facts.pop("module").parameters()
        assert not any(w.requires_grad or w.grad is not None for w in weights)
        return {**scores.scaled()._asdict(), **facts}


@contextmanager
def watching():
    """The engine's module; this rank's share of it; per batch, how many weights are whole."""
    facts, used = {"held": []}, []
    start, gradients = importance.frozen_engine, importance.Gates.gradients

    def note(module, inputs):
        used.append(StorageWeakRef(module.weight.untyped_storage()))

    def engine(module, **options):
        started = start(module, **options)
        facts["module"] = module
        facts["share"] = sum(local(w).numel() for w in module.parameters()) / elements(module)
        for part in module.modules():
            if isinstance(part, torch.nn.Linear):
                part.register_forward_pre_hook(note)
        return started

    def at_the_backward(gates, loss):
        facts["held"].append(sum(not weight.expired() for weight in used))
        used.clear()
        return gradients(gates, loss)

    with (
        patch.object(importance, "frozen_engine", engine),
        patch.object(importance.Gates, "gradients", at_the_backward),
    ):
        yield facts


# The student of a config of `equal_runs`; its teacher is measured.
STUDENTS = {"mlm": "masked-tied", "causal_lm": "llama-tied"}
AUTO = {
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "mlm": AutoModelForMaskedLM,
    "causal_lm": AutoModelForCausalLM,
}
# The classes are not numbered as in the data.
NAMES = dict(enumerate("210"))
# DeepSpeed would keep weights as small as these whole, and between forward and backward.
ZERO3 = {**in_parts(0)["zero_optimization"], "memory_efficient_linear": False}


@pytest.fixture(scope="module")
def config_of(write_run, tmp_path_factory):
    """A task and a ZeRO stage of the teacher -> a config."""
    folder = tmp_path_factory.mktemp("importance")
    classes = bert(4, 32, id2label=NAMES, label2id={v: k for k, v in NAMES.items()})
    teachers = {"classification": classes, "regression": bert(4, 32, num_labels=1)}
    torch.manual_seed(0)
    for task, config in teachers.items():
        model = AUTO[task].from_config(config)
        for parameter in model.parameters():  # larger than usual: no gradient is nearly zero
            parameter.data.mul_(4 if parameter.dim() > 1 else 1)
        model.save_pretrained(folder / task)
    regression = {"task": pairs_task(folder), "objective": [{"loss": "hard_mse"}]}

    @functools.cache
    def written(task, stage):
        teacher = {"deepspeed": {"zero_optimization": ZERO3 if stage == 3 else {"stage": stage}}}
        if task in teachers:
            teacher["model"] = str(folder / task)
        # More rows than a rank's share of a batch.
        train = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
        own = regression if task == "regression" else {}
        name = STUDENTS.get(task, "bert-student")
        return write_run(name, {"hard_cross_entropy": 1.0}, teacher=teacher, train=train, **own)

    return written


@pytest.fixture(scope="module")
def plain(config_of):
    """Task -> sums of |weight times gradient| per head and neuron, normalised.

    From batches of all ranks.
    """

    @functools.cache
    def of(task) -> tuple[list, list]:
        config = load_config(Path(config_of(task, 0)))
        encoded, collate, masking = inputs_of(config)
        model = AUTO[task].from_pretrained(config.teacher.model).eval()
        ways = {"batch_size": ROWS_PER_BATCH, "rank": 0, "world": 1, "masking": masking}
        sums = None
        for batch in evaluation_batches(encoded.validation, collate, **ways):
            model.zero_grad()
            plain_loss(model, batch).backward()
            parts = [
                (m.weight.detach() * m.weight.grad).sum(0).reshape(n, -1).sum(1).abs()
                for m, n in outputs(model)
            ]
            sums = parts if sums is None else [a + b for a, b in zip(sums, parts, strict=True)]
        normalised = [layer / layer.norm() for layer in sums]
        return normalised[::2], normalised[1::2]

    return of


def outputs(model):
    """Per layer, what takes the heads and how many there are, then what takes the neurons."""
    if hasattr(model, "bert"):
        for layer in model.bert.encoder.layer:
            yield layer.attention.output.dense, model.config.num_attention_heads
            yield layer.output.dense, layer.output.dense.in_features
        return
    for layer in model.model.layers:
        yield layer.self_attn.o_proj, model.config.num_key_value_heads
        yield layer.mlp.down_proj, layer.mlp.down_proj.in_features


def plain_loss(model, batch):
    packed = {"use_cache": False} if "position_ids" in batch.inputs else {}
    logits = model(**batch.inputs, **packed).logits
    if batch.labels.is_floating_point():
        labelled = ~batch.labels.isnan()
        return F.mse_loss(logits[labelled, 0], batch.labels[labelled])
    if batch.labels.dim() == 1:
        logits = logits.flip(1)  # the teacher's last class is the data's first
    labelled = batch.labels != -100
    return F.cross_entropy(logits[labelled], batch.labels[labelled])


def assert_close(actual, expected) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(torch.tensor(ours), theirs, atol=3e-6, rtol=1e-5)


# (task, ranks, ZeRO stage); 13 rows in batches of 6: the last one leaves ranks with nothing.
CASES = [("causal_lm", 2, 3)]
SLOW = [("classification", 2, 3), ("classification", 2, 0), ("regression", 2, 3), ("mlm", 2, 3)]
SLOW += [("classification", 1, 3), ("causal_lm", 3, 3)]


@pytest.mark.parametrize(("task", "ranks", "stage"), [*CASES, *slow(*SLOW)])
def test_importance_is_that_of_one_plain_process(workers, config_of, plain, task, ranks, stage):
    result = workers(ranks).run("test_importance.measured", config_of(task, stage), [])

    heads, neurons = plain(task)
    for rank in result:
        assert_close(rank["heads"] + rank["neurons"], heads + neurons)
        # To the last digit.
        assert all(rank[kind] == result[0][kind] for kind in ("heads", "neurons"))
        # A sharded teacher is never whole. The handle of the last gathering may live a moment
        # longer, and one weight with it.
        if stage == 3:
            assert rank["share"] <= 1.02 / ranks
            assert ranks == 1 or max(rank["held"]) <= 1


def test_scores_and_cut_do_not_depend_on_how_a_batch_is_dealt(workers, config_of, plain):
    """A batch of 6 on two ranks: 3 rows at a time, then 2 and 1, then one by one."""
    heads, neurons = plain("mlm")
    whole = UnitScores(*(tuple(tuple(n.tolist()) for n in kind) for kind in (heads, neurons)))

    for count, accumulation in ((3, 1), (2, 2), (1, 4)):
        dealt = [
            f"train.per_device_train_batch_size={count}",
            f"train.gradient_accumulation_steps={accumulation}",
        ]
        result = workers(2).run("test_importance.measured", config_of("mlm", 0), dealt)[0]
        scores = UnitScores(result["heads"], result["neurons"])
        assert_close(scores.heads + scores.neurons, heads + neurons)
        assert unit_order(scores).heads == unit_order(whole).heads
        assert [view_at(scores, s, round_to=1) for s in (0.5, 0.9)] == [
            view_at(whole, s, round_to=1) for s in (0.5, 0.9)
        ]


def test_importance_in_bf16_is_that_in_fp32_up_to_rounding(workers, config_of, plain):
    path = config_of("classification", 3)

    result = workers(2).run("test_importance.measured", path, ["teacher.dtype=bf16"])[0]

    heads, neurons = plain("classification")
    for ours, exact in zip(result["heads"] + result["neurons"], heads + neurons, strict=True):
        assert 1e-5 < torch.dist(torch.tensor(ours), exact) < 0.1  # of norm 1


def test_rows_without_a_label_are_refused_on_all_ranks(workers, config_of):
    path = config_of("classification", 3)

    answer = workers(2).run("test_importance.measured", path, [], labelled=False)

    assert answer[0] == answer[1]
    assert answer[0]["error"].startswith("DataError: none of the 2 rows that importance is")
