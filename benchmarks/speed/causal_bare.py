"""The run of `speed.causal_step`, the bare loop in plain PyTorch, and the pairs of steps.

The bare loop forms full logits of both models. Processes that measure it do not import megakd's
engines. The chat side of the run has conversations with the tokens of the text rows:

* Equal on both sides: models and their weights, the tokens of every batch, full rows without
  padding, the objective, and everything else in the run config. Different: the source of a row
  (messages that a chat template renders, in place of a text that is packed), its columns (no
  `position_ids`), and the labels.
* all: a row is one answer, so that the same tokens count as in the text row. The losses of both
  sides must agree before the first step and after the warm-up.
* answers: a row is a question and an answer of half a row each. The tokens of the answer count,
  which are half of the targets: the layers of both models and the update do the same work as with
  text rows; the losses, with the products of the output matrices, do half of the work.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lib.clocks import by_turns, timed
from lib.data import llama, write_jsonl
from lib.launching import write_config

Loss = Callable[[Tensor, Tensor], Tensor]
SPECIAL = ("<unk>", "<pad>", "</s>")
LEARNING_RATE = 1e-4
MAX_GRAD_NORM = 1.0
TOKENIZER, DATA, RUN, CHAT = "tokenizer", "data", "run.yaml", "chat"
BETA = 0.5
CLOSE = 1e-4
CHAT_TARGET = 1.01
SAME_TARGETS = "all"
COUNTED = {
    SAME_TARGETS: "all tokens count, as in text",
    "answers": "the answers count, half of the tokens",
}
TEMPLATE = (
    "{% for message in messages %}{{ message.content }}"
    "{{ eos_token if message.role == 'assistant' else ' ' }}{% endfor %}"
)


class Sizes(NamedTuple):
    """Sizes of a case; a model is (layers, width), and has heads of `head` columns."""

    student: tuple[int, int]
    teacher: tuple[int, int]
    vocabulary: int
    rows: int
    length: int
    head: int

    def shape(self, size: tuple[int, int]) -> dict[str, Any]:
        """Return the config of a Llama with an output matrix of its own."""
        layers, width = size
        keys = {"max_position_embeddings": self.length, "tie_word_embeddings": False}
        return llama(layers, width, width // self.head, 3 * width, **keys)


FULL = Sizes((4, 256), (8, 512), vocabulary=32000, rows=4, length=256, head=64)
QUICK = Sizes((2, 32), (2, 64), vocabulary=300, rows=2, length=16, head=16)
TERMS = {
    "forward_kl": {"loss": "soft_target_kl", "weight": 1.0},
    "jsd": {"loss": "soft_target_jsd", "weight": 1.0, "beta": 0.5},
}


def write_case(folder: Path, sizes: Sizes, divergence: str) -> None:
    words = [f"w{number}" for number in range(sizes.vocabulary - len(SPECIAL))]
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[attr-defined]
    roles = dict(zip(("unk_token", "pad_token", "eos_token"), SPECIAL, strict=True))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    fast.save_pretrained(folder / TOKENIZER)
    rng = random.Random(0)
    for split, batches in (("train", 64), ("validation", 1)):
        # The end token makes a document as long as a row.
        drawn = (rng.choices(words, k=sizes.length - 1) for _ in range(batches * sizes.rows))
        write_jsonl(folder / DATA / f"{split}.jsonl", ({"text": " ".join(text)} for text in drawn))
    write_config(folder / RUN, run_tree(folder, sizes, divergence))


def run_tree(folder: Path, sizes: Sizes, divergence: str) -> dict[str, Any]:
    """Return the run config: ZeRO 0 for both models, and neither evaluations nor saves."""
    teacher, student = ({"config": sizes.shape(size)} for size in (sizes.teacher, sizes.student))
    return {
        "output_dir": str(folder / "run"),
        "task": {
            "type": "causal_lm",
            "dataset": str(folder / DATA),
            "text_columns": ["text"],
            "max_length": sizes.length,
            "tokenizer": str(folder / TOKENIZER),
        },
        "teacher": {"model": teacher, "deepspeed": "teacher_zero0"},
        "student": {"model": student, "deepspeed": "zero0"},
        "method": {"name": "single"},
        "objective": [TERMS[divergence]],
        "train": {
            "per_device_train_batch_size": sizes.rows,
            "max_steps": 10**6,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "max_grad_norm": MAX_GRAD_NORM,
        },
        "save": {"save_steps": 10**6},
        "log": {"logging_steps": 10},
    }


def write_chat(folder: Path, sizes: Sizes, counted: str) -> None:
    """Write the texts of a case as conversations, a chat template, and a run.yaml."""
    chat = folder / CHAT
    words = 0 if counted == SAME_TARGETS else sizes.length // 2
    for path in (folder / DATA).iterdir():
        with path.open(encoding="utf-8") as rows:
            texts = [json.loads(line)["text"] for line in rows]
        chats = ({"messages": messages_of(text, words)} for text in texts)
        write_jsonl(chat / DATA / path.name, chats)
    template = chat / "template.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    tree = yaml.safe_load((folder / RUN).read_text(encoding="utf-8"))
    tree["output_dir"] = str(chat / "run")
    del tree["task"]["text_columns"]
    tree["task"] |= {"dataset": str(chat / DATA), "chat_template": str(template)}
    write_config(chat / RUN, tree)


def messages_of(text: str, words: int) -> list[dict[str, Any]]:
    """Return a text as messages: a question of so many words if there are any, and an answer."""
    every = text.split()
    question, answer = " ".join(every[:words]), " ".join(every[words:])
    asked = [{"role": "user", "content": question}] if words else []
    return [*asked, {"role": "assistant", "content": answer}]


class Models(NamedTuple):
    """A student and a frozen teacher of transformers."""

    student: LlamaForCausalLM
    teacher: LlamaForCausalLM


class Bare:
    """The bare loop: forward of both models, loss, backward, clipping, AdamW.

    As all sides of a pair: `step` takes the step of a batch, every batch once and in order; `loss`
    returns its loss in nats per target, without learning.
    """

    def __init__(self, models: Models, ids: Sequence[Any], loss: Loss) -> None:
        self._models, self._ids, self._loss = models, ids, loss
        matrices = [p for p in models.student.parameters() if p.dim() > 1]
        others = [p for p in models.student.parameters() if p.dim() <= 1]
        self._parameters = [*matrices, *others]
        # The groups of megakd: matrices and others, both without decay by default.
        groups = [{"params": group, "weight_decay": 0.0} for group in (matrices, others)]
        self._optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
        models.student.train()
        models.teacher.eval().requires_grad_(requires_grad=False)

    def step(self, index: int) -> None:
        self._forward(self._ids[index]).backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, MAX_GRAD_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()

    @torch.no_grad()
    def loss(self, index: int) -> float:
        return float(self._forward(self._ids[index]))

    def bare(self, loss: Loss) -> Bare:
        """Return another bare loop from the same weights."""
        return Bare(Models(*map(plain_copy, self._models)), self._ids, loss)

    def _forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            soft = self._models.teacher(input_ids=ids, use_cache=False).logits
        logits = self._models.student(input_ids=ids, use_cache=False).logits
        targets = ids[:, 1:].numel()
        return self._loss(logits[:, :-1].float(), soft[:, :-1].float()) / targets


def forward_kl(logits: Tensor, soft: Tensor) -> Tensor:
    return _kl(F.log_softmax(soft, dim=-1), F.log_softmax(logits, dim=-1))


def jsd(logits: Tensor, soft: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence with weights of one half."""
    log_q, log_p = F.log_softmax(logits, dim=-1), F.log_softmax(soft, dim=-1)
    # TRL stacks both and takes logsumexp, which takes longer.
    log_m = torch.logaddexp(log_p, log_q) + math.log(BETA)
    return BETA * _kl(log_p, log_m) + (1 - BETA) * _kl(log_q, log_m)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return F.kl_div(log_b, log_a, reduction="sum", log_target=True)


LOSSES = {"forward_kl": forward_kl, "jsd": jsd}
"""Of logits [B, T, V] of the student and of the teacher: sums in nats."""


def random_models(sizes: Sizes) -> Models:
    """Return both models with random weights, the same at every call."""
    torch.manual_seed(0)
    shapes = (sizes.shape(size) for size in (sizes.student, sizes.teacher))
    configs = (LlamaConfig(**shape, vocab_size=sizes.vocabulary) for shape in shapes)
    return Models(*map(LlamaForCausalLM, configs))


def random_ids(sizes: Sizes, count: int) -> list[Tensor]:
    """Return token numbers [B, T] of so many batches, the same at every call."""
    drawn = torch.Generator().manual_seed(0)
    shape = (sizes.rows, sizes.length)
    return [torch.randint(sizes.vocabulary, shape, generator=drawn) for _ in range(count)]


def plain_copy(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Return a model with the same weights, which no engine knows."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    return copy


def paired(side: Any, beside: Any, given: argparse.Namespace, *, agree: bool) -> list[list[float]]:
    """Return the CPU seconds of the steps of both sides; `agree`: compare their losses, too."""
    if agree:
        check_agree(side, beside, 0)
    for index in range(given.warm_up):
        side.step(index)
        beside.step(index)
    if agree:
        check_agree(side, beside, given.warm_up)

    def seconds(one: Any, number: int) -> float:
        return timed(functools.partial(one.step, given.warm_up + number)).cpu

    return by_turns([functools.partial(seconds, one) for one in (side, beside)], given.pairs)


def check_agree(side: Any, beside: Any, steps: int) -> None:
    """Compare the losses of both sides after so many steps."""
    ours, theirs = side.loss(steps), beside.loss(steps)
    if abs(ours - theirs) > CLOSE * abs(theirs):
        raise ValueError(f"after {steps} steps the loss is {ours}, and the other side's {theirs}")
    print(f"after {steps} steps the losses agree: {ours:.6f} and {theirs:.6f}", flush=True)
