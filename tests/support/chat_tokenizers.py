"""Tokenizers with the chat templates of real models, and conversations to encode with them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "chat_templates"
CORPUS = (
    "What is 2 + 2?\n\nIt is 4.\n\n",
    "the cat sees the dog and then it runs\n",
    "<think> so\n",
)


class Family(NamedTuple):
    """The special tokens of a family of models; `end` ends an answer."""

    template: str
    end: str
    special: tuple[str, ...]
    bos: str | None = None


CHATML_TOKENS = ("<|im_start|>", "<|endoftext|>")
LLAMA_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>")
GEMMA_TOKENS = ("<start_of_turn>", "<eos>")
PHI_TOKENS = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
DEEPSEEK_TOKENS = ("<|User|>", "<|Assistant|>", "<|tool_calls_begin|>", "<|tool_calls_end|>")
FAMILIES = {
    "qwen3": Family("qwen3.jinja", "<|im_end|>", CHATML_TOKENS),
    "chatml": Family("chatml.jinja", "<|im_end|>", CHATML_TOKENS),
    "marks": Family("chatml_with_marks.jinja", "<|im_end|>", CHATML_TOKENS),
    "llama3": Family("llama3.jinja", "<|eot_id|>", LLAMA_TOKENS, "<|begin_of_text|>"),
    "llama32": Family("llama32.jinja", "<|eot_id|>", LLAMA_TOKENS, "<|begin_of_text|>"),
    "phi3": Family("phi3.jinja", "<|endoftext|>", PHI_TOKENS),
    "phi4_mini": Family("phi4_mini.jinja", "<|endoftext|>", PHI_TOKENS),
    "deepseek": Family(
        "deepseek.jinja", "<|end_of_sentence|>", DEEPSEEK_TOKENS, "<|begin_of_sentence|>"
    ),
    "gemma": Family("gemma.jinja", "<end_of_turn>", GEMMA_TOKENS, "<bos>"),
    "gemma3": Family("gemma3.jinja", "<end_of_turn>", GEMMA_TOKENS, "<bos>"),
}


def template_of(family: str) -> str:
    return (TEMPLATES / FAMILIES[family].template).read_text(encoding="utf-8")


@cache
def _backend(*, merges: bool) -> str:
    """A byte-level BPE that joins any characters; without merges, a token is a byte."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    size = 400 if merges else 256
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS * 20, trainer)
    return made.to_str()


def chat_tokenizer(family: str, *, merges: bool = True, **keys: Any) -> PreTrainedTokenizerFast:
    kind = FAMILIES[family]
    names = {"eos_token": kind.end, "pad_token": kind.special[-1]}
    if kind.bos is not None:
        names["bos_token"] = kind.bos
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(merges=merges)), **names, **keys
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(kind.special)})  # type: ignore[dict-item]
    tokenizer.chat_template = template_of(family)
    return tokenizer


def asked(*contents: str, system: str | None = None) -> list[dict[str, Any]]:
    """Messages of user and assistant in turn."""
    turns = [
        {"role": "assistant" if number % 2 else "user", "content": content}
        for number, content in enumerate(contents)
    ]
    return turns if system is None else [{"role": "system", "content": system}, *turns]
