"""Models behind the stubs of inference servers: plain transformers with pushed weights."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import torch
from server_stubs import Counting
from transformers import AutoModelForCausalLM

_LOADING = threading.Lock()


def loaded(folder: Path | None) -> Any:
    """Return the causal language model of a folder; the threads of all stubs take turns.

    `from_pretrained` replaces `PreTrainedModel.tie_weights` while it loads. Two threads that load
    at the same time can leave the replacement behind, and later models then have untied weights.
    """
    with _LOADING:
        return AutoModelForCausalLM.from_pretrained(folder)


class Transformer:
    """Continues prompts with the last weights that were pushed, or with those of a folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folders: list[Path] = []
        self._models: dict[str | None, Any] = {}
        self._lock = threading.Lock()
        if folder is not None:
            self._models[None] = loaded(folder)
        self._base = folder

    def load(self, folder: Path) -> None:
        self._models[None] = loaded(folder)
        self.folders.append(folder)

    def continue_(self, prompt: list[int], rules: dict[str, Any]) -> list[int]:
        with self._lock:
            model = self._model(rules["adapter"])
        if model is None:  # nothing has been pushed yet
            return Counting().continue_(prompt, rules)
        ids, random = list(prompt), torch.Generator().manual_seed(rules["seed"])
        while len(ids) - len(prompt) < rules["most"]:
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]  # [V]
            if rules["temperature"] == 0:
                following = int(logits.argmax())
            else:
                chances = torch.softmax(logits / rules["temperature"], -1)
                following = int(torch.multinomial(chances, 1, generator=random))
            ids.append(following)
            if following in rules["ends"]:
                break
        return ids[len(prompt) :]

    def scores(self, prompt: list[int]) -> list[list[float]]:
        """Log-probabilities [T, V] of all next tokens after each token."""
        with torch.no_grad():
            return self._models[None](torch.tensor([prompt])).logits[0].log_softmax(-1).tolist()

    def _model(self, adapter: str | None) -> Any:
        if adapter is not None and adapter not in self._models:
            from peft import PeftModel

            base = loaded(self._base)
            with warnings.catch_warnings(action="ignore"):  # peft calls what transformers renames
                self._models[adapter] = PeftModel.from_pretrained(base, adapter).eval()
        return self._models.get(adapter)
