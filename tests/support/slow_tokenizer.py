"""A tokenizer in plain Python: it has no backend and does not tell the words of its tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizer

WORDS = ["[UNK]", "[PAD]", "a", "b", "A"]
SPECIAL = {"unk_token": "[UNK]", "pad_token": "[PAD]"}


class Words(PreTrainedTokenizer):
    """A tokenizer without a backend, with a setting that its vocabulary does not show."""

    vocab_files_names = {"vocab_file": "words.json"}  # noqa: RUF012  (Transformers' form)

    def __init__(self, vocab_file: str | None = None, *, lower: bool = False, **keys: Any) -> None:
        self.words = json.loads(Path(vocab_file).read_text()) if vocab_file else WORDS
        self.lower = lower
        super().__init__(lower=lower, **(SPECIAL | keys))

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words)}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return (text.lower() if self.lower else text).split()

    def _convert_token_to_id(self, token: str) -> int:
        return self.words.index(token) if token in self.words else 0

    def _convert_id_to_token(self, index: int) -> str:
        return self.words[index]

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        path = Path(save_directory) / f"{filename_prefix or ''}words.json"
        path.write_text(json.dumps(self.words))
        return (str(path),)
