"""All passes of a plan in one forward, and predictions where there is no plan."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from loss_scene import term_of
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import megakd_kernels
from megakd.config.task import Kernels
from megakd.config.terms import Shape
from megakd.data.batch import IGNORE, Batch, Losses, Outputs, Pass, Predictions, count_units
from megakd.losses.bundle import StudentBundle
from megakd.losses.objective import build_objective
from megakd.models.views import View

CE = term_of("hard_cross_entropy", weight=0.25)
KL = term_of("soft_target_kl", weight=0.75)
SHAPE = Shape(1, 4, 3)
LABELS = torch.tensor([2, IGNORE, 0, IGNORE])
INPUTS = torch.tensor([[1.0, -1.0], [0.5, 2.0], [-1.0, 0.0], [9.0, 9.0]])
VALID = torch.tensor([[True, True], [True, False], [True, True], [False, False]])


class Classifier(nn.Module):
    """Two numbers in, three classes out."""

    config = SimpleNamespace(type_vocab_size=2)

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)

    def forward(self, numbers: Tensor) -> Any:
        return SimpleNamespace(logits=self.linear(numbers))


def bundle(world_size: int = 1, smoothing: float = 0.0) -> StudentBundle:
    torch.manual_seed(0)
    labels = replace(CE, label_smoothing=smoothing)
    objective = build_objective((labels, KL), "classification", SHAPE, SHAPE)
    return StudentBundle({"student": Classifier()}, objective, world_size=world_size)


def taught(seed: int) -> Outputs:
    return Outputs(logits=torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)))


def losses(student: StudentBundle, *plan: Pass) -> Losses:
    batch = Batch({"numbers": INPUTS}, LABELS, VALID)
    return student(batch, {"a": taught(1), "b": taught(2)}, plan, count_units([batch]))


def solved(student: StudentBundle, *plan: Pass) -> tuple[dict[str, Tensor], Tensor]:
    """Return the reported terms and the gradient."""
    student.zero_grad()
    result = losses(student, *plan)
    result.total.backward()
    return result.parts, student.student.get_parameter("linear.weight").grad.clone()


def test_the_loss_is_the_weighted_sum_of_the_terms_and_the_world_size_is_in_the_gradient_alone():
    actual, of_two = (losses(bundle(world_size=n), Pass(teacher="a")) for n in (1, 2))

    parts = {name: value.item() for name, value in actual.parts.items()}
    expected = 0.25 * parts["hard_cross_entropy"] + 0.75 * parts["soft_target_kl"]
    assert parts["loss"] == pytest.approx(expected)
    assert actual.total.item() == pytest.approx(expected)
    assert set(parts) == {"loss", "hard_cross_entropy", "soft_target_kl", "top1_agreement"}
    assert not any(value.requires_grad for value in actual.parts.values())
    assert of_two.total.item() == pytest.approx(2 * actual.total.item())
    torch.testing.assert_close(of_two.parts, actual.parts)


OFF = {"hard_cross_entropy": 0.0, "soft_target_kl": 0.0}


@pytest.mark.parametrize("last", [9.0, torch.nan], ids=["finite", "not finite"])
def test_a_pass_without_any_term_has_a_loss_of_zero_with_gradients_of_zero(last):
    student, inputs = bundle(), INPUTS.clone()
    inputs[3] = last
    batch, plan = Batch({"numbers": inputs}, LABELS, VALID), (Pass(teacher="a", weights=OFF),)

    result = student(batch, {"a": taught(1)}, plan, count_units([batch]))
    result.total.backward()

    assert result.total.item() == 0
    assert {name: value.item() for name, value in result.parts.items()} == {"loss": 0.0}
    for name, weight in student.named_parameters():
        assert weight.grad is not None, name
        if "bias" in name or last == 9.0:  # a matrix has the product of zero and its input
            assert not weight.grad.any(), name


def weigh(inputs: Any) -> dict[str, float]:
    """Return factors when both models have answered."""
    assert inputs.student.logits.shape == inputs.taught.logits.shape == (4, 3)
    return {"soft_target_kl": 0.0, "hard_cross_entropy": 0.5}


@pytest.mark.parametrize(
    "options", [{"weights": {"soft_target_kl": 0.0}, "scale": 0.5}, {"weigh": weigh}]
)
def test_a_pass_is_scaled_and_computes_and_reports_what_it_gives_a_weight(kernel_calls, options):
    calls = kernel_calls("kd_loss_from_logits")

    result = losses(bundle(), Pass(teacher="a", **options))

    expected = 0.5 * 0.25 * result.parts["hard_cross_entropy"].item()
    assert result.total.item() == pytest.approx(expected)
    assert "soft_target_kl" not in result.parts
    if "weights" in options:  # known before anything is computed
        assert [teacher for (_, teacher, *_), _ in calls] == [None]
        assert result.parts.keys() == {"hard_cross_entropy", "loss"}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])  # a group for both terms, and one for each
def test_a_term_that_only_one_pass_leaves_out_is_the_mean_over_all_passes(smoothing):
    student = bundle(smoothing=smoothing)
    of_a, of_b = (losses(student, Pass(teacher=teacher)).parts for teacher in "ab")

    off = {"a": {"hard_cross_entropy": 0.0}, "b": {"soft_target_kl": 0.0}}
    result = losses(student, *(Pass(teacher=t, weights=weights) for t, weights in off.items()))

    for name in ("hard_cross_entropy", "soft_target_kl"):
        assert result.parts[name].item() == pytest.approx((of_a[name] + of_b[name]).item() / 2)
    wanted = 0.75 * of_a["soft_target_kl"] + 0.25 * of_b["hard_cross_entropy"]
    assert result.total.item() == pytest.approx(wanted.item())


def test_a_term_whose_own_weight_is_nothing_is_still_reported():
    student = bundle()
    weighted = losses(student, Pass(teacher="a"))
    student.objective.weights["soft_target_kl"] = 0.0

    result = losses(student, Pass(teacher="a"))

    assert result.parts["soft_target_kl"] == weighted.parts["soft_target_kl"] > 0
    assert result.total.item() == pytest.approx(0.25 * result.parts["hard_cross_entropy"].item())


def test_passes_add_up_and_those_of_one_view_report_their_mean():
    student = bundle()
    passes = [Pass(teacher="a", view="small", scale=0.5)]
    passes += [Pass(teacher=name, view="large", scale=2.0) for name in "ab"]

    result, gradient = solved(student, *passes)

    apart = [solved(student, planned)[1] for planned in passes]
    torch.testing.assert_close(gradient, sum(apart))
    a, b = (losses(student, Pass(teacher=name)).parts for name in "ab")
    for name in ("hard_cross_entropy", "soft_target_kl"):
        assert result[f"small/{name}"].item() == pytest.approx(a[name].item())
        assert result[f"large/{name}"].item() == pytest.approx((a[name] + b[name]).item() / 2)


def test_without_a_plan_a_classifier_gives_its_outputs_in_fp32():
    student = bundle().to(torch.bfloat16)
    numbers = INPUTS.bfloat16()

    result = student(Batch({"numbers": numbers}, LABELS, VALID))

    assert isinstance(result, Predictions)
    assert result.sums is None
    assert result.outputs.dtype == torch.float32
    torch.testing.assert_close(result.outputs, student.student(numbers=numbers).logits.float())


IDS = torch.tensor([[5, 6, 7], [8, 9, 3]])
TEXTS = Batch({"input_ids": IDS}, IDS, torch.ones(2, 3).bool())


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).eval()


def language_bundle(model: LlamaForCausalLM, **views: View) -> StudentBundle:
    objective = build_objective((CE,), "causal_lm", Shape(1, 8, 20), None)
    return StudentBundle({"student": model}, objective, world_size=1, views=views)


def test_a_pass_without_any_term_gives_a_language_model_gradients_of_zero():
    model = tiny_llama()

    plan = [Pass(weights={"hard_cross_entropy": 0.0})]
    result = language_bundle(model)(TEXTS, None, plan, count_units([TEXTS]))
    result.total.backward()

    assert result.total.item() == 0
    without = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert without == ["lm_head.weight"]  # as with terms on hidden states alone
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_views_of_one_width_form_one_gradient_of_the_head(kernel_calls):
    model = tiny_llama()
    views = {"wide": View((2,), (8,)), "slim": View((1,), (4,)), "narrow": View((1,), (4,), 4)}
    scales = {"wide": 0.5, "slim": 0.2, "narrow": 0.3}
    student = language_bundle(model, **views)

    def of(*names: str) -> tuple[Losses, list[Tensor]]:
        plan = [Pass(view=name, scale=scales[name]) for name in names]
        result = student(TEXTS, None, plan, count_units([TEXTS]))
        student.zero_grad()
        result.total.backward()
        return result, [p.grad.clone() for p in model.parameters()]

    apart = [of(name) for name in views]
    calls = kernel_calls("linear_kd_loss")
    together, gradients = of(*views)

    assert len(calls) == 2  # the head of the narrow view has fewer columns
    for name, (alone, _) in zip(views, apart, strict=True):
        reported = f"{name}/hard_cross_entropy"
        torch.testing.assert_close(together.parts[reported], alone.parts[reported])
    for gradient, *parts in zip(gradients, *(result for _, result in apart), strict=True):
        torch.testing.assert_close(gradient, torch.stack(parts).sum(0))


@pytest.mark.parametrize("kernels", ["chunked", "reference"])
def test_losses_and_predictions_go_the_way_that_was_chosen(kernel_calls, kernels):
    calls = kernel_calls("kd_loss_from_logits", "linear_stats")
    student = bundle()
    student.kernels = kernels
    language_model = bundle()
    language_model.learners[0], language_model.kernels = tiny_llama(), kernels

    losses(student, Pass(teacher="a"))
    language_model(TEXTS)

    # Hard and soft targets, and what metrics are made of.
    assert [options.get("impl") for _, options in calls] == [kernels] * 2
    assert get_args(Kernels) == megakd_kernels.IMPLEMENTATIONS  # what a config may choose
