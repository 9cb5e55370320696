"""Books and a task in a folder like that of the real data, small enough for seconds."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path


def write_real_data(folder: Path, books: str | Path, words: Sequence[str]) -> Path:
    """Write two books of random words and the intents of clinc150.

    Args:
        folder: the folder of the data.
        books: the folder of the books, below `folder`.
        words: the words of all texts.
    """
    rng = random.Random(0)
    (folder / books).mkdir(parents=True)
    for book in ("one", "two"):
        paragraphs = (" ".join(rng.choices(words, k=40)) for _ in range(60))
        (folder / books / f"{book}.txt").write_text("\n\n".join(paragraphs))
    rows = [[" ".join(rng.choices(words, k=5)), f"intent {n % 3}"] for n in range(30)]
    (folder / "clinc150").mkdir()
    (folder / "clinc150" / "data_full.json").write_text(json.dumps({"train": rows, "val": rows}))
    return folder
