"""Importance at any ranks and ZeRO stages is what one plain process finds by its weights."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from importance_cases import ROWS_PER_BATCH
from tiny_runs import (
    SENTENCES,
    config_tree,
    save_tokenizer,
    write_config,
    write_jsonl,
    write_scored_pairs,
    write_text,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
)

from megakd.pruning.allocation import UnitScores, unit_order, view_at

CLASSES = ("bad", "good", "other")
WORDS = ("the", "red", "green", "dog", "cat", "runs", "sees", "over", "house", "slowly")
HEADS, GROUPS = 4, 2
AUTO = {
    "classification": AutoModelForSequenceClassification,
    "regression": AutoModelForSequenceClassification,
    "mlm": AutoModelForMaskedLM,
    "causal_lm": AutoModelForCausalLM,
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


def bert(**keys):
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    return BertConfig(**sizes, num_attention_heads=HEADS, max_position_embeddings=32, **keys)


def llama():
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS}
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    return LlamaConfig(**sizes, **heads, max_position_embeddings=32, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data and teachers that both sides read; the classes are not numbered as in the data."""
    folder = tmp_path_factory.mktemp("importance")
    rng = random.Random(0)
    for split, count in {"train": 20, "validation": 13}.items():
        rows = [
            {
                "text": " ".join(rng.choices(WORDS, k=rng.randint(1, 20))),
                "label": None if number % 5 == 4 else CLASSES[number % 3],
            }
            for number in range(count)
        ]
        write_jsonl(folder / "classification" / f"{split}.jsonl", rows)
    write_scored_pairs(folder / "regression", train=20, validation=13)
    for language in ("causal_lm", "mlm"):
        (folder / language).mkdir()
        write_text(folder / language / "train.txt", documents=20)
        write_text(folder / language / "validation.txt", documents=13)
    for kind in ("bpe", "wordpiece"):
        save_tokenizer(folder / kind, [" ".join(WORDS), *SENTENCES], kind=kind)
    names = dict(enumerate(reversed(CLASSES)))
    configs = {
        "classification": bert(id2label=names, label2id={v: k for k, v in names.items()}),
        "regression": bert(num_labels=1),
        "mlm": bert(),
        "causal_lm": llama(),
    }
    torch.manual_seed(0)
    for task, config in configs.items():
        model = AUTO[task].from_config(config)
        for parameter in model.parameters():  # larger than usual: no gradient is nearly zero
            parameter.data.mul_(4 if parameter.dim() > 1 else 1)
        model.save_pretrained(folder / f"{task}-teacher")
    return folder


@pytest.fixture
def write(folder, tmp_path):
    """A config: `write(task, ranks, stage)`."""

    def written(task, ranks, stage):
        kind = str(folder / ("bpe" if task == "causal_lm" else "wordpiece"))
        zero = ZERO3 if stage == 3 else {"stage": 0}
        tree = config_tree(
            tmp_path / "out",
            {"type": task, "dataset": str(folder / task), "tokenizer": kind},
            teacher={
                "model": str(folder / f"{task}-teacher"),
                "deepspeed": {"zero_optimization": zero},
            },
            method={"name": "single"},
        )
        if task == "regression":
            tree["task"] |= {"text_columns": ["first", "second"], "label_column": "similarity"}
        tree["train"]["per_device_train_batch_size"] = 8  # more than a rank's share of a batch
        return str(write_config(tmp_path / f"{task}-{ranks}-{stage}.yaml", tree))

    return written


@pytest.fixture(scope="module")
def references() -> dict:
    """By task, from the first test that has computed it."""
    return {}


def plain_importance(config_path) -> tuple[list, list, list]:
    """Sums of |weight times gradient| per head and neuron, normalised; batches of all ranks.

    Last those of the columns, which are multiplied with ones wherever they pass.
    """
    from megakd.config.file import load_config
    from megakd.data.collation import Collator
    from megakd.data.encoding import encode_splits
    from megakd.data.loader import evaluation_batches
    from megakd.data.masking import task_masking
    from megakd.data.splits import load_splits
    from megakd.data.tokenizers import load_tokenizer
    from megakd.inputs.run_data import cache_folder

    config = load_config(Path(config_path), [])
    cache, task = cache_folder(), config.task
    splits = load_splits(task, seed=config.seed, cache_dir=cache)
    tokenizer = load_tokenizer(task, splits, model_folders=[], cache_dir=cache)
    encoded = encode_splits(splits, tokenizer, task, cache_dir=cache)
    model = AUTO[task.type].from_pretrained(config.teacher.model).eval()
    batches = evaluation_batches(
        encoded.validation,
        Collator(tokenizer, task),
        batch_size=ROWS_PER_BATCH,
        rank=0,
        world=1,
        masking=task_masking(tokenizer, task),
    )
    sums, ones = None, torch.ones(model.config.hidden_size, requires_grad=True)
    multiply(model, ones)
    for batch in batches:
        model.zero_grad()
        ones.grad = None
        plain_loss(model, batch).backward()
        found = [
            (m.weight.detach() * m.weight.grad).sum(0).reshape(n, -1).sum(1).abs()
            for m, n in outputs(model)
        ]
        found.append(ones.grad.abs())
        sums = found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]
    normalised = [layer / layer.norm() for layer in sums]
    return normalised[0:-1:2], normalised[1:-1:2], normalised[-1:]


def multiply(model, ones) -> None:
    """The hidden states on their way into every layer, and out of the last."""
    blocks = model.bert.encoder.layer if hasattr(model, "bert") else model.model.layers
    for block in blocks:
        block.register_forward_pre_hook(lambda _, inputs: (inputs[0] * ones, *inputs[1:]))
    blocks[-1].register_forward_hook(lambda *given: given[-1] * ones)


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


# (task, ranks, ZeRO stage); 13 rows in batches of 6: the last one leaves ranks with nothing.
TASKS = ("classification", "regression", "mlm", "causal_lm")
# Another number of ranks means other processes, which take seconds to start.
OTHERS = [("classification", 1, 0), ("classification", 1, 3), ("classification", 3, 3)]
OTHERS += [("causal_lm", 3, 3), *((task, 2, 0) for task in TASKS[1:])]
CASES = [("classification", 2, 0), *((task, 2, 3) for task in TASKS)]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS]


@pytest.mark.parametrize(("task", "ranks", "stage"), CASES)
def test_importance_is_that_of_one_plain_process(workers, write, references, task, ranks, stage):
    path = write(task, ranks, stage)
    if task not in references:
        references[task] = plain_importance(path)

    with_width = ranks > 1
    case = "importance_cases.measured_with_width" if with_width else "importance_cases.measured"
    found, *others = workers(ranks).run(case, path, [])

    heads, neurons, columns = references[task]
    expected = [*heads, *neurons, *(columns if with_width else ())]
    scores = [*found["heads"], *found["neurons"], *([found["width"]] if with_width else [])]
    for mine, theirs in zip(scores, expected, strict=True):
        torch.testing.assert_close(torch.tensor(mine), theirs, atol=3e-6, rtol=1e-5)
    for other in others:  # to the last digit
        assert all(other[kind] == found[kind] for kind in ("heads", "neurons", "width"))


@pytest.mark.parametrize("task", ["classification", "mlm"])
def test_scores_and_cut_do_not_depend_on_how_a_batch_is_dealt(workers, write, references, task):
    """A batch of 6 on two ranks: 3 rows at a time, then 2 and 1, then one by one."""
    path = write(task, 2, 0)
    if task not in references:
        references[task] = plain_importance(path)  # the whole batch at once, in one process
    heads, neurons, _ = references[task]
    whole = UnitScores(*(tuple(tuple(n.tolist()) for n in kind) for kind in (heads, neurons)))

    for rows, accumulation in ((3, 1), (2, 2), (1, 4)):
        dealt = [
            f"train.per_device_train_batch_size={rows}",
            f"train.gradient_accumulation_steps={accumulation}",
        ]
        found = workers(2).run("importance_cases.measured", path, dealt)[0]
        scores = UnitScores(found["heads"], found["neurons"])
        for mine, theirs in zip(scores.heads + scores.neurons, [*heads, *neurons], strict=True):
            torch.testing.assert_close(torch.tensor(mine), theirs, atol=3e-6, rtol=1e-5)
        assert unit_order(scores).heads == unit_order(whole).heads
        assert [view_at(scores, s, round_to=1) for s in (0.5, 0.9)] == [
            view_at(whole, s, round_to=1) for s in (0.5, 0.9)
        ]


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_a_sharded_teacher_is_never_whole_and_gets_no_gradient(workers, write, task):
    path = write(task, 2, 3)

    for facts in workers(2).run("importance_cases.measured_with_width", path, []):
        assert facts["local"] <= 0.51 * facts["whole"]
        # The handle of the last gathering may live a moment longer, and one weight with it.
        assert max(facts["held"]) <= 1
        assert facts["learning"] == facts["gradients"] == 0


@pytest.mark.parametrize("stage", [0, 3])
def test_importance_in_bf16_is_that_in_fp32_up_to_rounding(workers, write, stage):
    path = write("classification", 2, stage)

    exact = workers(2).run("importance_cases.measured", path, [])[0]
    found = workers(2).run("importance_cases.measured", path, ["teacher.dtype=bf16"])[0]

    for kind in ("heads", "neurons"):
        for mine, expected in zip(found[kind], exact[kind], strict=True):
            assert mine != expected
            assert torch.dist(torch.tensor(mine), torch.tensor(expected)) < 0.1  # of norm 1


def test_rows_without_a_label_are_refused_on_all_ranks(workers, write):
    path = write("classification", 2, 3)

    said = workers(2).run("importance_cases.measured_without_labels", path)

    assert len({answer["error"] for answer in said}) == 1
    assert said[0]["error"].startswith("DataError: none of the 2 rows that importance is")


def test_a_stage_that_shards_gradients_is_refused(workers, write):
    path = write("classification", 2, 0)
    tree = json.loads(Path(path).read_text())
    tree["teacher"]["deepspeed"] = "zero2"
    Path(path).write_text(json.dumps(tree))

    with pytest.raises(AssertionError, match="stage 2 shards gradients"):
        workers(2).run("importance_cases.measured", path, [])
