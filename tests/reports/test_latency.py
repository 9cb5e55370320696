"""Models that are asked for a report: forward times, and samples of language models."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from megakd.config.task import TaskConfig, TaskType
from megakd.data.batch import Batch, TopK
from megakd.data.token_tables import pack
from megakd.models import timing
from megakd.models.draws import most_likely
from megakd.reports.samples import NEW_TOKENS, PROMPTS, SamplePrompts, held_out_prompts
from megakd.run import run_report
from megakd.run.run_report import latency_report

LENGTHS = [*range(1, 17)] * 3
CPU = torch.device("cpu")


def llama() -> LlamaForCausalLM:
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))


def timed(
    models: dict[str, Any], lengths: list[int], batches: list[int], reference: str = "a"
) -> dict[str, Any]:
    return latency_report(models, reference, lengths, batches, device=CPU, dtype="fp32")


def seen_by(model: torch.nn.Module) -> list[dict]:
    calls: list[dict] = []

    def record(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append({"training": module.training, "gradient": torch.is_grad_enabled(), **kwargs})

    model.register_forward_pre_hook(record, with_kwargs=True)
    return calls


def test_a_forward_is_of_texts_of_the_data_without_dropout_or_gradient():
    model, other = llama().train(), llama()
    calls, before = seen_by(model), torch.get_rng_state()

    timed({"a": model, "b": other}, LENGTHS, [4])

    assert [call["input_ids"].shape for call in calls[:2]] == [(4, 14), (4, 16)]
    assert calls[0]["attention_mask"].sum(dim=1).tolist() == [2, 6, 10, 14]
    assert calls[0]["logits_to_keep"] == 1
    assert not calls[0]["training"]
    assert not calls[0]["gradient"]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("batch", "batches"),
    [
        (1, [[n] for n in range(2, 17, 2)]),
        (4, [[2, 6, 10, 14], [4, 8, 12, 16]]),
        (16, [[*range(1, 17)]]),
    ],
)
def test_texts_of_the_data_have_the_lengths_of_its_quantiles(batch, batches):
    assert timing.sample_lengths(LENGTHS, batch) == batches
    assert timing.sample_lengths([5] * 40, batch) == [[5] * batch]
    # A decoder is timed with one text at a time.
    assert (timing.batches_of("causal_lm"), timing.batches_of("mlm")) == ((1,), (1, 32))


@pytest.mark.parametrize(("ms", "rounds"), [(1.0, 9), (60.0, 5), (3000.0, 2), (15_000.0, 1)])
def test_a_time_is_that_of_one_batch_and_slow_models_are_timed_less_often(monkeypatch, ms, rounds):
    monkeypatch.setattr(timing, "milliseconds", lambda _: ms)

    result = timed({"a": llama(), "b": llama()}, [4], [1])

    assert result["latency.rounds_batch_1"] == rounds
    assert result["a.ms_batch_1"] == result["b.ms_batch_1"] == ms
    # Texts of several lengths are several batches.
    assert timed({"a": llama()}, LENGTHS, [1])["a.ms_batch_1"] == ms / 8


def test_models_take_every_place_by_turns_at_every_batch_and_the_log_says_so(caplog) -> None:
    caplog.set_level(logging.INFO, logger="megakd")
    order: list[str] = []
    models = {name: llama() for name in "abc"}
    for name, model in models.items():
        model.register_forward_pre_hook(
            lambda _, __, inputs, name=name: order.append(f"{name}{len(inputs['input_ids'])}"),
            with_kwargs=True,
        )

    result = timed(models, [4], [1, 2])

    assert result["batches"] == [1, 2]
    start = order.index("a2")
    assert order[start : start + 9] == ["a2", "b2", "c2", "b2", "c2", "a2", "c2", "a2", "b2"]
    assert "timing a, b, c: batches of 2" in caplog.text


def test_a_speed_up_is_the_median_of_the_rounds_with_its_range(monkeypatch):
    models = {"teacher": llama(), "student": llama()}
    # One round was disturbed, in which both models were slow.
    rounds = [(20, 10), (22, 10), (24, 10), (220, 100), (22, 10)]
    monkeypatch.setattr(run_report, "by_turns", lambda _: rounds)

    result = timed(models, [24], [1], "teacher")

    assert result["student.ms_batch_1"] == 10
    key = "student.speedup_batch_1"
    assert [result[f"{key}{end}"] for end in ("_low", "", "_high")] == pytest.approx([2, 2.2, 2.4])
    assert (result["latency.tokens"], result["latency.rounds_batch_1"]) == (24, 5)
    assert result["latency.device"].startswith("cpu (")
    # Of nine rounds, the lowest and the highest ratio do not count.
    rounds = [(20, 10)] * 8 + [(900, 10)]
    result = timed(models, [24], [1], "teacher")
    assert (result[f"{key}_low"], result[f"{key}_high"]) == (2, 2)


# Samples: the prompts, and who answers them.

EOS = 1


class Letters:
    """A tokenizer whose tokens are letters; 0 is [CLS], 1 ends a text, 2 is the mask."""

    eos_token_id, mask_token_id, pad_token_id = EOS, 2, 0
    all_special_ids = (0, 1, 2)

    def decode(self, ids: list[int]) -> str:
        return "".join("[]_"[i] if i < 3 else chr(94 + i) for i in ids)


class Counting:
    """A model that answers the token after the last token, and notes its inputs."""

    def __init__(self) -> None:
        self.asked: list[Batch] = []

    def top_k(self, batch: Batch, count: int) -> TopK:
        self.asked.append(batch)
        assert batch.targets is not None
        ids = (batch.inputs["input_ids"].flatten()[batch.targets] + 1)[:, None]
        return TopK(ids.int().expand(-1, count), torch.zeros(ids.shape))


class Model(NamedTuple):
    """A plain model, asked as the engine asks it."""

    model: torch.nn.Module

    @torch.no_grad()
    def top_k(self, batch: Batch, count: int) -> TopK:
        return most_likely(self.model, batch, count)


def packed(*documents: tuple[int, int], row: int = 64) -> Dataset:
    """Rows of documents, each (first token, length): tokens that count up."""
    rows = pack(([first + i % 20 for i in range(length)] for first, length in documents), row)
    return Dataset.from_list([{k: v.tolist() for k, v in r._asdict().items()} for r in rows])


def prompts_of(rows: Dataset, kind: TaskType = "causal_lm", length: int = 64) -> SamplePrompts:
    task = TaskConfig(type=kind, dataset="texts", max_length=length)
    prompts = held_out_prompts(rows, Letters(), task, CPU)  # type: ignore[arg-type]
    assert prompts is not None
    return prompts


def test_prompts_are_the_beginnings_of_documents_one_of_each_row():
    prompts = prompts_of(packed((3, 40), (5, 24), (7, 10), (9, 54), (11, 64), (13, 64)))

    # Of a row the longest document; at most three rows.
    assert prompts.shown == [Letters().decode([*range(first, first + 16)]) for first in (3, 9, 11)]
    assert len(prompts.shown) == PROMPTS


def test_a_text_ends_at_its_end_token_and_all_ranks_ask_as_often():
    class Ending(Counting):
        def top_k(self, batch: Batch, count: int) -> TopK:
            answer = super().top_k(batch, count)
            has_ended = len(self.asked) > 2
            return answer._replace(ids=torch.full_like(answer.ids, EOS)) if has_ended else answer

    prompts = prompts_of(packed((3, 64)))
    model = Ending()

    assert prompts.answers(model) == [Letters().decode([19, 20])]
    assert len(model.asked) == NEW_TOKENS


def test_a_decoder_says_what_transformers_generates():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=32, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    prompts = prompts_of(packed((3, 64), (9, 64)))

    ids = torch.tensor([[*range(3, 19)], [*range(9, 25)]])
    generated = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip

    ended = [row[: row.index(EOS)] if EOS in row else row for row in generated[:, 16:].tolist()]
    assert prompts.answers(Model(model)) == [
        Letters().decode([token for token in row if token > 2]) for row in ended
    ]


def test_a_masked_model_fills_hidden_tokens_that_are_not_special():
    rows = Dataset.from_dict({"input_ids": [[0, *range(3, 13), 1], [0, 5, 1], [0, 1]]})
    prompts = prompts_of(rows, "mlm")
    model = Counting()

    answers = prompts.answers(model)

    assert prompts.shown == ["ab_defgh_j", "_"]
    # The mask is token 2, and Counting says the next one.
    assert answers == ["a, a", "a"]
    assert (model.asked[0].inputs["input_ids"] == 2).sum() == 3
