"""Mixtures of experts as students through the command: cut by experts, by layers, and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from slow_cases import slow
from tiny_mixtures import FAMILIES, write_mixture
from tiny_runs import SENTENCES, run_in, write_text
from transformers import AutoModelForCausalLM, AutoTokenizer
from whole_run import finish, read, records

LAYERS = 3


@pytest.fixture
def teacher(tmp_path):
    def write(family: str, **changes: Any) -> tuple[Path, int]:
        folder = write_mixture(tmp_path / family, family, SENTENCES * 3, layers=LAYERS, **changes)
        model = AutoModelForCausalLM.from_pretrained(folder)
        return folder, sum(weight.numel() for weight in model.parameters())

    return write


def config_of(folder: Path, teacher: Path, method: dict[str, Any], **student: Any) -> Path:
    text = write_text(folder / "text.txt", documents=80)
    return run_in(
        folder,
        {"type": "causal_lm", "dataset": str(text)},
        teacher={"model": str(teacher)},
        student={"model": "from_teacher", **student},
        method=method,
        train={"max_steps": 2},
    )


def generated(folder: Path) -> Any:
    """What plain transformers opens and lets write ten tokens."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    tokens = tokenizer("the cat", return_tensors="pt")
    out = model.generate(**tokens, max_new_tokens=10, min_new_tokens=10, do_sample=False)
    assert out.shape[1] == tokens["input_ids"].shape[1] + 10
    return model


@pytest.mark.parametrize(
    "family", ["olmoe", *slow(*(name for name in FAMILIES if name != "olmoe"))]
)
def test_a_mixture_loses_experts_first_and_opens_as_its_stock_class(
    one_rank, teacher, tmp_path, family
):
    start, size = teacher(family)
    whole = AutoModelForCausalLM.from_pretrained(start)
    experts = {n: w for n, w in whole.named_parameters() if ".experts." in n}
    count = next(iter(experts.values())).shape[0]
    # As many as half of the experts of each layer.
    wanted = size - sum(weight.numel() for weight in experts.values()) // 2

    finish(one_rank, config_of(tmp_path, start, {"name": "shrink", "parameters": wanted}))

    out = tmp_path / "out"
    model = generated(out / "final")
    assert type(model) is type(whole)
    assert model.config.num_hidden_layers == LAYERS
    left = {n: w.shape for n, w in model.named_parameters() if ".experts." in n}
    assert left == {n: (count // 2, *w.shape[1:]) for n, w in experts.items()}
    parts = read(out)["student.parts"].split(" · ")
    assert parts[-1] == f"{count // 2} of {count} experts"
    assert sum(weight.numel() for weight in model.parameters()) == read(out)["student.parameters"]
    losses = [r for r in records(out, "student") if "train/loss" in r]
    assert all(("train/router_balance" in r) == (family != "deepseek_v3") for r in losses)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_a_mixture_of_some_layers_learns_from_all_of_them(one_rank, teacher, tmp_path, family):
    start, _ = teacher(family)

    finish(one_rank, config_of(tmp_path, start, {"name": "single"}, layers=[1, 3]))

    model, whole = (generated(folder) for folder in (tmp_path / "out" / "final", start))
    assert model.config.num_hidden_layers == 2
    names = {n.replace("layers.2.", "layers.1.") for n, _ in whole.named_parameters()}
    assert {n for n, _ in model.named_parameters()} == names


@pytest.mark.slow
def test_a_smaller_budget_takes_layers_too(one_rank, teacher, tmp_path):
    """Two layers, of half of the experts."""
    start, size = teacher("mixtral", hidden_size=32, intermediate_size=64)
    whole = AutoModelForCausalLM.from_pretrained(start)
    layer = sum(w.numel() for n, w in whole.named_parameters() if ".layers.0." in n)
    of_experts = sum(w.numel() for n, w in whole.named_parameters() if ".layers.0.mlp.experts" in n)

    wanted = size - layer - of_experts
    finish(one_rank, config_of(tmp_path, start, {"name": "shrink", "parameters": wanted}))

    config = generated(tmp_path / "out" / "final").config
    assert (config.num_hidden_layers, config.num_local_experts) == (2, 2)


@pytest.mark.parametrize(
    ("family", "changes", "advice"),
    [
        (
            "mixtral",
            {},
            "a layer keeps at least 2 of its 4 experts, because a token is routed to 2",
        ),
        (
            "llama4_text",
            {"num_local_experts": 4, "intermediate_size_mlp": 16, "head_dim": 4},
            "its experts stay: not each layer has a module of experts and a router with one matrix",
        ),
    ],
)
def test_a_budget_that_no_number_of_experts_meets_is_refused_before_weights_are_loaded(
    one_rank, teacher, tmp_path, family, changes, advice
):
    start, size = teacher(family, **changes)
    config = config_of(tmp_path, start, {"name": "shrink", "parameters": size // 100})

    outcome = one_rank.train("--config", config)

    assert outcome.code != 0
    (line,) = [line for line in outcome.err.splitlines() if "method.parameters" in line]
    assert advice in line
    assert not outcome.loaded
