"""Forward times: what is timed, in which order, and that models are left as they were."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megakd.models import forwards
from megakd.reports.latency import latency_report, measure_latencies

LENGTHS = [*range(1, 17)] * 3
CPU = torch.device("cpu")


def llama() -> LlamaForCausalLM:
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))


def seen_by(model: torch.nn.Module) -> list[dict]:
    calls: list[dict] = []

    def record(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append({"training": module.training, "gradient": torch.is_grad_enabled(), **kwargs})

    model.register_forward_pre_hook(record, with_kwargs=True)
    return calls


def test_a_forward_is_of_texts_of_the_data_without_dropout_or_gradient() -> None:
    model, other = llama().train(), llama()
    calls, before = seen_by(model), torch.get_rng_state()

    measure_latencies({"teacher": model, "student": other}, LENGTHS, [4])

    assert [call["input_ids"].shape for call in calls[:2]] == [(4, 14), (4, 16)]
    assert calls[0]["attention_mask"].sum(dim=1).tolist() == [2, 6, 10, 14]
    assert calls[0]["logits_to_keep"] == 1
    assert not calls[0]["training"]
    assert not calls[0]["gradient"]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("batch", "batches"),
    [
        (1, [[n] for n in (2, 4, 6, 8, 10, 12, 14, 16)]),
        (4, [[2, 6, 10, 14], [4, 8, 12, 16]]),
        (16, [[*range(1, 17)]]),
    ],
)
def test_texts_of_the_data_have_the_lengths_of_its_quantiles(batch, batches) -> None:
    assert forwards.sample_lengths(LENGTHS, batch) == batches
    assert forwards.sample_lengths([5] * 40, batch) == [[5] * batch]


def test_a_time_is_that_of_one_batch(monkeypatch) -> None:
    monkeypatch.setattr(forwards, "milliseconds", lambda _: 16.0)
    assert set(measure_latencies({"a": llama()}, LENGTHS, [1])[1]["a"]) == {2.0}


@pytest.mark.parametrize(("ms", "rounds"), [(1.0, 9), (60.0, 5), (3000.0, 2), (15_000.0, 1)])
def test_slow_models_are_timed_less_often(monkeypatch, ms, rounds):
    monkeypatch.setattr(forwards, "milliseconds", lambda _: ms)

    result = measure_latencies({"a": llama(), "b": llama()}, [4], [1])

    assert result == {1: {"a": [ms] * rounds, "b": [ms] * rounds}}


def test_models_take_every_place_by_turns_at_every_batch_and_the_log_says_so(caplog) -> None:
    caplog.set_level(logging.INFO, logger="megakd")
    order: list[str] = []
    models = {name: llama() for name in "abc"}
    for name, model in models.items():
        model.register_forward_pre_hook(
            lambda _, __, inputs, name=name: order.append(f"{name}{len(inputs['input_ids'])}"),
            with_kwargs=True,
        )

    result = measure_latencies(models, [4], [1, 2])

    assert [(batch, [*times]) for batch, times in result.items()] == [(1, [*"abc"]), (2, [*"abc"])]
    start = order.index("a2")
    assert order[start : start + 9] == ["a2", "b2", "c2", "b2", "c2", "a2", "c2", "a2", "b2"]
    assert "timing a, b, c: batches of 2" in caplog.text


def test_a_decoder_is_timed_with_one_text_at_a_time() -> None:
    assert (forwards.batches_of("causal_lm"), forwards.batches_of("mlm")) == ((1,), (1, 32))


def test_a_speed_up_is_the_median_of_the_rounds_with_its_range() -> None:
    # One round was disturbed, in which both models were slow.
    times = {"teacher": [20, 22, 24, 220, 22], "student": [10, 10, 10, 100, 10]}

    result = latency_report({1: times}, "teacher", [20, 28], device=CPU, dtype="fp32")

    assert result["student.ms_batch_1"] == 10
    key = "student.speedup_batch_1"
    assert [result[f"{key}{end}"] for end in ("_low", "", "_high")] == pytest.approx([2, 2.2, 2.4])
    assert (result["latency.tokens"], result["latency.rounds_batch_1"]) == (24, 5)
    assert result["latency.device"].startswith("cpu (")
    # Of nine rounds, the lowest and the highest ratio do not count.
    nine = {"teacher": [20] * 8 + [900], "student": [10] * 9}
    result = latency_report({1: nine}, "teacher", [20], device=CPU, dtype="fp32")
    assert (result[f"{key}_low"], result[f"{key}_high"]) == (2, 2)
