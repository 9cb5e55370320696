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
from equal_runs import inputs_of, rows
from tiny_runs import (
    SENTENCES,
    bert,
    llama,
    run_in,
    save_tokenizer,
    shape_of,
    write_jsonl,
    write_scored_pairs,
    write_text,
)
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from megakd.config.file import load_config
from megakd.data.loader import evaluation_batches
from megakd.errors import MegakdError
from megakd.models.source import ReadyTeacher
from megakd.pruning import importance
from megakd.pruning.allocation import UnitScores, unit_order, view_at

ROWS_PER_BATCH = 6
"""Of all ranks together."""


def measured(config_path: str, overrides: list[str], *, labelled: bool = True) -> dict:
    """Scores of the config's teacher on the validation split, or on its rows without a label."""
    with lab_of(config_path, overrides) as lab:
        prepared = lab.assembly.prepared
        rows = prepared.encoded.validation
        if not labelled:
            rows = rows.select([i for i, label in enumerate(rows["label"]) if label < 0])
        try:
            with watching() as facts:
                scores = importance.measure_importance(
                    lab.assembly,
                    ReadyTeacher(prepared.sources["teacher"], lab.config.teacher),
                    rows,
                    batch_size=ROWS_PER_BATCH,
                )
        except MegakdError as error:
            return {"error": f"{type(error).__name__}: {error}"}
        module = facts.pop("module")
        weights = [*module.parameters()]
        return {
            **scores.scaled()._asdict(),
            **facts,
            "learning": sum(w.requires_grad for w in weights),
            "gradients": sum(w.grad is not None for w in weights),
        }


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


CLASSES = ("bad", "good", "other")
HEADS, GROUPS = 4, 2
AUTO = {
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "mlm": AutoModelForMaskedLM,
    "causal_lm": AutoModelForCausalLM,
}
SIZES = {"vocab_size": 320, "num_attention_heads": HEADS}
BERT = bert(3, 32, **SIZES)
# The classes are not numbered as in the data.
NAMES = dict(enumerate(reversed(CLASSES)))
CONFIGS = {
    "classification": shape_of(BERT, id2label=NAMES, label2id={v: k for k, v in NAMES.items()}),
    "regression": shape_of(BERT, num_labels=1),
    "mlm": shape_of(BERT),
    "causal_lm": shape_of(llama(3, 32, **SIZES, num_key_value_heads=GROUPS)),
}
# DeepSpeed would keep weights as small as these whole, and between forward and backward.
ZERO3 = {
    "stage": 3,
    "memory_efficient_linear": False,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("importance")
    for split, count in {"train": 20, "validation": 13}.items():
        named = (
            {**row, "label": None if row["label"] is None else CLASSES[row["label"]]}
            for row in rows(count, seed=count)
        )
        write_jsonl(folder / "classification" / f"{split}.jsonl", named)
        for language in ("causal_lm", "mlm"):
            (folder / language).mkdir(exist_ok=True)
            write_text(folder / language / f"{split}.txt", documents=count)
    write_scored_pairs(folder / "regression", train=20, validation=13)
    texts = [*SENTENCES, *(row["text"] for row in rows(20, seed=20))]
    for kind in ("bpe", "wordpiece"):
        save_tokenizer(folder / kind, texts, kind=kind)
    torch.manual_seed(0)
    for task, config in CONFIGS.items():
        model = AUTO[task].from_config(config)
        for parameter in model.parameters():  # larger than usual: no gradient is nearly zero
            parameter.data.mul_(4 if parameter.dim() > 1 else 1)
        model.save_pretrained(folder / f"{task}-teacher")
    return folder


@pytest.fixture(scope="module")
def config_of(folder, tmp_path_factory):
    configs = tmp_path_factory.mktemp("configs")

    def written(task, stage):
        tokenizer = str(folder / ("bpe" if task == "causal_lm" else "wordpiece"))
        zero = ZERO3 if stage == 3 else {"stage": stage}
        keys = {"type": task, "dataset": str(folder / task), "tokenizer": tokenizer}
        if task == "regression":
            keys |= {"text_columns": ["first", "second"], "label_column": "similarity"}
        teacher = str(folder / f"{task}-teacher")
        config = run_in(
            configs / f"{task}-{stage}",
            keys,
            teacher={"model": teacher, "deepspeed": {"zero_optimization": zero}},
            method={"name": "single"},
            # More than a rank's share of a batch.
            train={"per_device_train_batch_size": 8},
        )
        return str(config)

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
            yield layer.attention.output.dense, HEADS
            yield layer.output.dense, layer.output.dense.in_features
        return
    for layer in model.model.layers:
        yield layer.self_attn.o_proj, GROUPS
        yield layer.mlp.down_proj, layer.mlp.down_proj.in_features


def plain_loss(model, batch):
    logits = model(**batch.inputs).logits
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
TASKS = ("classification", "regression", "mlm", "causal_lm")
CASES = [("classification", 2, 0), *((task, 2, 3) for task in TASKS)]
OTHERS = [("classification", 1, 3), ("causal_lm", 3, 3)]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS]


@pytest.mark.parametrize(("task", "ranks", "stage"), CASES)
def test_importance_is_that_of_one_plain_process(workers, config_of, plain, task, ranks, stage):
    result = workers(ranks).run("test_importance.measured", config_of(task, stage), [])

    heads, neurons = plain(task)
    for rank in result:
        assert_close(rank["heads"] + rank["neurons"], heads + neurons)
        # To the last digit.
        assert all(rank[kind] == result[0][kind] for kind in ("heads", "neurons"))
        # The teacher gets no gradient, and is never whole if it is sharded. The handle of the
        # last gathering may live a moment longer, and one weight with it.
        assert rank["learning"] == rank["gradients"] == 0
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
