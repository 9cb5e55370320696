"""Samples of language models: the prompts, and who answers them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from megakd.config.task import TaskConfig
from megakd.contract.batch import Batch, TopK
from megakd.contract.tasks import TaskType
from megakd.data.token_tables import pack
from megakd.models.generation import most_likely
from megakd.reports.samples import NEW_TOKENS, PROMPTS, Prompts, held_out_prompts

CPU = torch.device("cpu")
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


def prompts_of(rows: Dataset, kind: TaskType = "causal_lm", length: int = 64) -> Prompts:
    task = TaskConfig(type=kind, dataset="texts", max_length=length)
    prompts = held_out_prompts(rows, Letters(), task, CPU)  # type: ignore[arg-type]
    assert prompts is not None
    return prompts


def test_prompts_are_the_beginnings_of_documents_one_of_each_row() -> None:
    prompts = prompts_of(packed((3, 40), (5, 24), (7, 10), (9, 54), (11, 64), (13, 64)))

    # Of a row the longest document; at most three rows.
    assert prompts.shown == [Letters().decode([*range(first, first + 16)]) for first in (3, 9, 11)]
    assert len(prompts.shown) == PROMPTS


def test_a_text_ends_at_its_end_token_and_all_ranks_ask_as_often() -> None:
    class Ending(Counting):
        def top_k(self, batch: Batch, count: int) -> TopK:
            answer = super().top_k(batch, count)
            has_ended = len(self.asked) > 2
            return answer._replace(ids=torch.full_like(answer.ids, EOS)) if has_ended else answer

    prompts = prompts_of(packed((3, 64)))
    model = Ending()

    assert prompts.answers(model) == [Letters().decode([19, 20])]
    assert len(model.asked) == NEW_TOKENS


def test_a_decoder_says_what_transformers_generates() -> None:
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


def test_a_masked_model_fills_hidden_tokens_that_are_not_special() -> None:
    rows = Dataset.from_dict({"input_ids": [[0, *range(3, 13), 1], [0, 5, 1], [0, 1]]})
    prompts = prompts_of(rows, "mlm")
    model = Counting()

    answers = prompts.answers(model)

    assert prompts.shown == ["ab_defgh_j", "_"]
    # The mask is token 2, and Counting says the next one.
    assert answers == ["a, a", "a"]
    assert (model.asked[0].inputs["input_ids"] == 2).sum() == 3


def test_other_tasks_have_no_prompt() -> None:
    rows = Dataset.from_dict({"input_ids": [[3, 4]], "label": [1]})
    task = TaskConfig(type="classification", dataset="texts", max_length=64)

    assert held_out_prompts(rows, Letters(), task, CPU) is None  # type: ignore[arg-type]
