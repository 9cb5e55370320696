"""Every family of decoders: losses of its own logits, and students of some of its layers."""

from __future__ import annotations

import pytest
import torch
from loss_scene import term_of
from torch.nn import functional
from transformers import AutoModelForCausalLM

from megakd.config.terms import Shape
from megakd.data.batch import IGNORE, Batch, Pass, count_units
from megakd.losses.bundle import StudentBundle
from megakd.losses.objective import build_objective, logits_of
from megakd.models.draws import most_likely
from megakd.models.loading import check_model
from megakd.models.outputs import LanguageModelHead, Needs, predict, read_outputs
from megakd.models.routing import has_balance
from megakd.teachers.frozen import FrozenModel

TERMS = (
    term_of("hard_cross_entropy", weight=0.25),
    term_of("soft_target_kl", weight=0.75, temperature=2.0),
)
SPARSE = ["gpt_oss", "qwen3_moe"]
# The others have the head of Llama.
HEADS = ["llama", "gemma2", "granite", "gpt2", "phi", *SPARSE]


def batch_of(tiny) -> Batch:
    """Two rows, one of them padded; the last token predicts nothing."""
    ids = tiny.input_ids
    valid = torch.ones_like(ids, dtype=torch.bool)
    valid[1, 9:] = False
    labels = ids.roll(-1, 1).masked_fill(~valid, IGNORE)
    labels[:, -1] = IGNORE
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return Batch({"input_ids": ids, "position_ids": positions}, labels, valid)


def model_of(tiny, family, dtype=torch.float64, **keys):
    return tiny.load(tiny.save(family, **keys), tiny.task("causal_lm")).to(dtype)


def dtype_of(family):
    """The most precise dtype; the products of experts have no fp64."""
    return torch.float32 if family in SPARSE else torch.float64


def own_logits(model, batch):
    return model(**batch.inputs, use_cache=False).logits


def expected_loss(student_logits, teacher_logits, batch):
    chosen = batch.labels != IGNORE
    ours, theirs, labels = student_logits[chosen], teacher_logits[chosen], batch.labels[chosen]
    soft = functional.kl_div(
        (ours / 2).log_softmax(-1), (theirs / 2).softmax(-1), reduction="batchmean"
    )
    return 0.25 * functional.cross_entropy(ours, labels) + 0.75 * 4 * soft


@pytest.mark.parametrize("family", HEADS)
def test_the_loss_and_its_gradient_are_those_of_the_models_own_logits(tiny, family):
    dtype, batch = dtype_of(family), batch_of(tiny)
    teacher = model_of(tiny, family, dtype)
    student = model_of(tiny, "llama" if family in SPARSE else family, dtype)
    with torch.no_grad():
        for number, weight in enumerate(student.parameters()):
            weight.mul_(0.9 - 0.01 * number)
    shape = Shape(2, 16, 300)
    bundle = StudentBundle(
        {"student": student}, build_objective(TERMS, "causal_lm", shape, shape), world_size=1
    )
    answer = FrozenModel(teacher, needs=Needs(), label_order=None).read(batch).detached()
    answers = {"t": answer._replace(head=LanguageModelHead(teacher))}

    actual = bundle(batch, answers, [Pass(teacher="t")], count_units([batch]))
    actual.total.backward()
    ours = {name: weight.grad for name, weight in student.named_parameters()}
    student.zero_grad()
    logits = own_logits(student, batch), own_logits(teacher, batch).detach()
    expected = expected_loss(*logits, batch)
    expected.backward()

    assert actual.total.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, weight in student.named_parameters():
        torch.testing.assert_close(ours[name], weight.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", HEADS)
def test_scores_caches_and_plugins_see_the_models_own_logits(tiny, family):
    model, batch = model_of(tiny, family, dtype_of(family)), batch_of(tiny)
    with torch.no_grad():
        logits = own_logits(model, batch)
        sums = predict(model, batch).sums
        cached = most_likely(model, batch, 5)
        plugged = logits_of(read_outputs(model, batch, Needs()))

    chosen = batch.labels != IGNORE
    missed = functional.cross_entropy(logits[chosen], batch.labels[chosen], reduction="sum")
    right = (logits.argmax(-1) == batch.labels)[chosen].sum()
    best = logits.log_softmax(-1).topk(5)
    assert sums.tolist() == pytest.approx([missed.item(), right.item(), chosen.sum().item()])
    assert torch.equal(cached.ids, best.indices.int())
    torch.testing.assert_close(cached.logprobs, best.values.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plugged, logits.flatten(0, 1).float(), rtol=1e-5, atol=1e-5)


MIXTURES = {
    **{name: {} for name in SPARSE},
    "mixtral": {"num_local_experts": 4, "num_key_value_heads": 1},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_of_experts_teaches_and_learns(tiny, family):
    """As a student, and by teacher.finetune."""
    task = tiny.task("causal_lm")
    folder = tiny.save(family, AutoModelForCausalLM, **MIXTURES[family])
    facts = {"task": task, "label_names": (), "tokenizer_size": tiny.vocabulary}
    teacher = tiny.resolve(folder, task)

    for need_head in (True, False):
        check_model(teacher, need_head=need_head, **facts)
    assert has_balance(teacher.config)
