"""Forward times: what is timed, in which order, and that models are left as they were."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig
from transformers import RobertaForSequenceClassification as Roberta

from megakd.errors import ModelError
from megakd.models import forwards
from megakd.reports import latency
from megakd.reports.latency import Work, measure_latencies


def llama() -> LlamaForCausalLM:
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))


def seen_by(model: torch.nn.Module) -> list[dict]:
    calls: list[dict] = []

    def record(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append({"training": module.training, "gradient": torch.is_grad_enabled(), **kwargs})

    model.register_forward_pre_hook(record, with_kwargs=True)
    return calls


def test_the_median_of_each_model_is_told(monkeypatch) -> None:
    warm_up = [0] * (2 * latency.WARM_UP)
    # The student's turns and the teacher's, swapping places: 1, 2, 3 and 10, 20, 90.
    times = [*warm_up, 10, 1, 2, 20, 90, 3]
    ticks = iter(number for time in times for number in (0.0, time / 1000))
    monkeypatch.setattr(forwards, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))

    result = measure_latencies({"a": llama(), "b": llama()}, Work((1,), 4, rounds=3))

    assert [entry["ms"] for entry in result] == pytest.approx([20.0, 2.0])
    assert [entry["rounds_ms"] for entry in result] == [
        pytest.approx([10.0, 20.0, 90.0]),
        pytest.approx([1.0, 2.0, 3.0]),
    ]
    assert [(entry["model"], entry["batch"]) for entry in result] == [("a", 1), ("b", 1)]


def test_the_forward_has_the_given_shape_without_dropout_or_gradient() -> None:
    model, other = llama().train(), llama()
    calls, before = seen_by(model), torch.get_rng_state()

    measure_latencies({"teacher": model, "student": other}, Work((3,), 7, rounds=2))

    assert len(calls) == latency.WARM_UP + 2
    assert calls[-1]["input_ids"].shape == (3, 7)
    assert calls[-1]["attention_mask"].all()
    assert calls[-1]["logits_to_keep"] == 1
    assert not calls[-1]["training"]
    assert not calls[-1]["gradient"]
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


LENGTHS = [*range(1, 17)] * 3


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


def test_texts_of_the_data_are_padded_in_their_batch_and_timed_beside_those_of_one_length() -> None:
    model = llama()
    calls = seen_by(model)

    result = measure_latencies({"a": model}, Work((4,), 7, rounds=1, of_data=LENGTHS))

    assert [call["input_ids"].shape for call in calls[-10:-4]] == [(4, 14), (4, 16)] * 3
    assert calls[-6]["attention_mask"].sum(dim=1).tolist() == [2, 6, 10, 14]
    assert [(entry["length"], entry.get("lengths")) for entry in result] == [
        (8, [2, 6, 10, 14, 4, 8, 12, 16]),
        (7, None),
    ]


def test_a_time_on_texts_of_the_data_is_that_of_one_batch(monkeypatch) -> None:
    monkeypatch.setattr(latency, "milliseconds", lambda _: 16.0)

    (entry,) = measure_latencies({"a": llama()}, Work((1,), None, of_data=LENGTHS))

    assert (entry["ms"], set(entry["rounds_ms"])) == (2.0, {2.0})


@pytest.mark.parametrize(("ms", "calls"), [(1.0, 3 + 9), (60.0, 3 + 5), (3000.0, 4), (15_000.0, 2)])
def test_slow_models_are_timed_less_often_but_twice_at_least(monkeypatch, ms, calls):
    timed: list[object] = []
    monkeypatch.setattr(
        latency, "milliseconds", lambda call: timed.append(call.args[0][0].func) or ms
    )
    models = {"a": llama(), "b": llama()}

    result = measure_latencies(models, Work((1,), 4))

    assert [entry["ms"] for entry in result] == [ms, ms]
    assert {timed.count(model) for model in models.values()} == {calls}
    assert {len(entry["rounds_ms"]) for entry in result} == {calls - 3 * (ms < latency.LONG_MS)}


def test_a_decoder_also_generates_the_last_tokens_of_a_text() -> None:
    model = llama()
    model.generation_config.eos_token_id = list(range(19))  # that end no text too early
    calls = seen_by(model)
    encoder = Roberta(RobertaConfig(vocab_size=20, hidden_size=8, num_attention_heads=2))

    result = measure_latencies({"a": model, "b": encoder}, Work((2,), 8, generate=3, rounds=1))

    forwards, (written,) = result[:2], result[2:]
    assert not any("generated" in entry for entry in forwards)
    assert (written["model"], written["generated"], written["length"]) == ("a", 3, 8)
    assert written["tokens_per_second"] == pytest.approx(2 * 3 / (written["ms"] / 1000))
    assert [call["input_ids"].shape for call in calls[-3:]] == [(2, 5), (2, 1), (2, 1)]


def test_several_models_take_every_place_by_turns_at_every_batch() -> None:
    order: list[str] = []
    models = {name: llama() for name in "abc"}
    for name, model in models.items():
        model.register_forward_pre_hook(
            lambda _, __, given, name=name: order.append(f"{name}{len(given['input_ids'])}"),
            with_kwargs=True,
        )

    result = measure_latencies(models, Work((1, 2), 4, rounds=3))

    assert [(entry["model"], entry["batch"]) for entry in result] == [
        (name, batch) for batch in (1, 2) for name in "abc"
    ]
    assert all(entry["ms"] > 0 for entry in result)
    assert order[-9:] == ["a2", "b2", "c2", "b2", "c2", "a2", "c2", "a2", "b2"]


def test_a_folder_of_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(tree | {"architectures": ["Novel"]}))
    with pytest.raises(ModelError, match=r"config\.json names the architecture 'Novel'"):
        measure_latencies({"teacher": llama(), "student": tmp_path}, Work((1,), 4))
