"""Dense families of decoders as students: they keep layers, learn, and open in transformers."""

from __future__ import annotations

import pytest
import torch
from loss_terms import term_of
from tiny_cuts import written
from transformers import AutoModelForCausalLM

from megakd.contract.batch import Batch
from megakd.contract.stage import Pass
from megakd.contract.unit_counts import count_units
from megakd.errors import ModelError
from megakd.losses.bundle import StudentBundle
from megakd.losses.objective import build_objective, shape_of, teacher_needs
from megakd.models.architectures import FAMILIES, architecture_of
from megakd.models.cutting import cut_config
from megakd.models.elastic import Elastic
from megakd.models.knowledge import language_model_head, read_knowledge
from megakd.models.layers import with_layers
from megakd.models.loading import check_model

DECODERS = [name for name, entry in FAMILIES.items() if "causal_lm" in entry.tasks]
DENSE = [name for name in DECODERS if FAMILIES[name].experts is None]
UNCUT = [name for name in DECODERS if FAMILIES[name].uncut is not None]
TERMS = (
    term_of("hard_cross_entropy"),
    term_of("soft_target_kl"),
    term_of("hidden_mse", layer_mapping=("0:0", "1:1", "2:3")),
    term_of("relation_kl", layer_mapping=("1:1", "2:3"), relation_heads=2),
)


def batch_of(ids) -> Batch:
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]).expand_as(ids)  # two documents
    valid = torch.ones_like(ids, dtype=torch.bool)
    return Batch({"input_ids": ids, "position_ids": positions}, ids.roll(-1, 1), valid)


def _check_layers(student, teacher):
    """The student's layers are the first and the third of the teacher."""
    architecture = architecture_of(student.config)
    for place, number in ((1, 1), (2, 3)):
        theirs = architecture.block_of(teacher, number).state_dict()
        for name, weight in architecture.block_of(student, place).state_dict().items():
            assert torch.equal(weight, theirs[name])
        kinds = [getattr(m.config, "layer_types", None) for m in (student, teacher)]
        assert kinds[0] is None or kinds[0][place - 1] == kinds[1][number - 1]


@pytest.mark.parametrize("family", DENSE)
def test_a_student_of_some_layers_learns_and_opens_in_transformers(tiny, tmp_path, family):
    task, batch = tiny.task("causal_lm"), batch_of(tiny.input_ids)
    types = ["sliding_attention", "full_attention", "full_attention"]
    keys = {"layer_types": types} if family.startswith("gemma") else {}
    source = tiny.resolve(tiny.save(family, **{FAMILIES[family].layers: 3}, **keys), task)
    fewer = with_layers(source, [1, 3], where="student.layers")
    teacher, student = tiny.load(source, task), tiny.load(fewer, task)
    _check_layers(student, teacher)
    shapes = shape_of(fewer, "causal_lm", 0), shape_of(source, "causal_lm", 0)
    bundle = StudentBundle(
        {"student": student}, build_objective(TERMS, "causal_lm", *shapes), world_size=1
    )
    with torch.no_grad():
        answer = read_knowledge(teacher, batch, teacher_needs(TERMS, *shapes)).detached()
    answer = answer._replace(head=language_model_head(teacher))
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)

    losses = []
    for _ in range(2):
        actual = bundle(batch, {"t": answer}, [Pass(teacher="t")], count_units([batch]))
        optimizer.zero_grad()
        actual.total.backward()
        optimizer.step()
        losses.append(actual.total.item())

    assert losses[1] < losses[0]
    assert all(weight.grad is not None for weight in student.parameters())
    opened = AutoModelForCausalLM.from_pretrained(written(student, tmp_path / "final")).eval()
    expected = student(tiny.input_ids, use_cache=False).logits
    assert torch.equal(opened(tiny.input_ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("family", UNCUT)
def test_a_family_that_cannot_be_cut_says_why(tiny, family):
    model = tiny.load(tiny.save(family), tiny.task("causal_lm"))
    view = FAMILIES["llama"].units(model.config)
    for action in (lambda: Elastic(model), lambda: cut_config(model.config, view)):
        with pytest.raises(ModelError, match=f"a {family} model cannot be cut .* student.layers"):
            action()


@pytest.mark.parametrize("family", [name for name in DECODERS if name not in DENSE])
def test_a_mixture_of_experts_is_a_teacher_and_no_student(tiny, family):
    task = tiny.task("causal_lm")
    source = tiny.resolve(tiny.save(family), task, where="student.model")
    facts = {"task": task, "label_names": (), "tokenizer_size": tiny.vocabulary}

    check_model(source, need_head=True, **facts)
    with pytest.raises(ModelError, match=r"^student.model: a .* mixture of experts, which is supp"):
        check_model(source, need_head=False, **facts)
