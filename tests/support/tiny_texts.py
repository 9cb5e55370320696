"""Random texts of a few words in files, and the decoders that continue them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

WORDS = ("the", "cat", "dog", "sat", "on", "a", "mat", "and", "ran", "to", "big", "red", "house")


def write_texts(folder: Path, *, train: int, validation: int) -> Path:
    """Write train.txt and validation.txt with these numbers of texts of 30 words."""
    rng = random.Random(0)
    for split, count in (("train", train), ("validation", validation)):
        lines = (" ".join(rng.choices(WORDS, k=30)) for _ in range(count))
        (folder / f"{split}.txt").write_text("\n\n".join(lines))
    return folder


def small_llama(layers: int, width: int) -> dict[str, Any]:
    """A Llama from scratch with two heads and the context of its family."""
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 2}
    return {"config": {"model_type": "llama", "num_hidden_layers": layers, **sizes}}
