"""The chat side of `causal_step.py`: conversations with the tokens of the text rows.

Equal on both sides: models and their weights, the tokens of every batch, full rows without
padding, the objective, and everything else in the run config. Different: the source of a row
(messages that a chat template renders, in place of a text that is packed), its columns (no
`position_ids`), and the labels:

* all: a row is one answer, so that the same tokens count as in the text row. The losses of both
  sides must agree before the first step and after the warm-up.
* answers: a row is a question and an answer of half a row each. The tokens of the answer count,
  which are half of the targets: the layers of both models and the update do the same work as with
  text rows; the losses, with the products of the output matrices, do half of the work.
"""

from __future__ import annotations

import json
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import yaml
from causal_step_case import DATA, RUN

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from causal_step_case import Sizes
    from causal_step_megakd import Megakd

TARGET = 1.01
SAME_TARGETS = "all"
COUNTED = {
    SAME_TARGETS: "all tokens count, as in text",
    "answers": "the answers count, half of the tokens",
}
CHAT = "chat"
TEMPLATE = (
    "{% for message in messages %}{{ message.content }}"
    "{{ eos_token if message.role == 'assistant' else ' ' }}{% endfor %}"
)


def write_chat(folder: Path, sizes: Sizes, counted: str) -> None:
    """Write the texts of a case as conversations, a chat template, and run.yaml of a run on them.

    Args:
        folder: the folder of the case, see `write_case`.
        sizes: the sizes of the case.
        counted: a key of COUNTED.
    """
    chat = folder / CHAT
    (chat / DATA).mkdir(parents=True)
    words = question_words(sizes, counted)
    for path in (folder / DATA).iterdir():
        with path.open(encoding="utf-8") as rows:
            texts = [json.loads(line)["text"] for line in rows]
        lines = (json.dumps({"messages": messages_of(text, words)}) + "\n" for text in texts)
        (chat / DATA / path.name).write_text("".join(lines), encoding="utf-8")
    template = chat / "template.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    tree = yaml.safe_load((folder / RUN).read_text(encoding="utf-8"))
    tree["output_dir"] = str(chat / "run")
    del tree["task"]["text_columns"]
    tree["task"] |= {"dataset": str(chat / DATA), "chat_template": str(template)}
    (chat / RUN).write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


def question_words(sizes: Sizes, counted: str) -> int:
    """Return the number of words in the question of every row."""
    return 0 if counted == SAME_TARGETS else sizes.length // 2


def messages_of(text: str, words: int) -> list[dict[str, Any]]:
    """Return a text as messages: a question of so many words if there are any, and an answer."""
    every = text.split()
    question, answer = " ".join(every[:words]), " ".join(every[words:])
    asked = [{"role": "user", "content": question}] if words else []
    return [*asked, {"role": "assistant", "content": answer}]


@contextmanager
def opened(case: Path, count: int) -> Iterator[tuple[Megakd, Megakd]]:
    """Build the engines of the runs on chat rows and on text rows, and free them at the end."""
    # The bare loop runs in processes without megakd, which import this module too.
    from causal_step_megakd import running

    from megakd.config.file import load_config
    from megakd.run.main import started

    configs = [load_config(folder / RUN) for folder in (case / CHAT, case)]
    with started(configs[0]) as ranks, ExitStack() as stack:
        chat, text = (stack.enter_context(running(config, ranks, count)) for config in configs)
        check_same_tokens(chat, text)
        print(f"targets of a step: {chat.targets} in chat, {text.targets} in text", flush=True)
        yield chat, text


def check_same_tokens(chat: Megakd, text: Megakd) -> None:
    """Compare the tokens of all batches.

    Raises:
        ValueError: the tokens differ, so the sides do not compute the same.
    """
    if any(not ours.equal(theirs) for ours, theirs in zip(chat.ids, text.ids, strict=True)):
        raise ValueError("the batches of chat rows do not have the tokens of the text rows")
