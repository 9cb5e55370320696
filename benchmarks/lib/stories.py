"""TinyStories, and the Llama of 260,000 weights that the author of llama2.c pretrained on them.

The tokenizer of llama2.c becomes a folder that transformers can load. Its file is an int32 (the
longest piece), then per piece a float32 score, an int32 length and the bytes of the piece, with
spaces where SentencePiece writes "▁". Pieces 0, 1, 2 are unknown, begin
and end; then 256 bytes, the merged pieces from the first merge to the last, and single characters.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

UNKNOWN, BEGIN = "<unk>", "<s>"
SPECIAL = (UNKNOWN, BEGIN, "</s>")
SPACE = "▁"
STORIES = Path("lm/tinystories_sample/tinystories_1000.json")
MODEL = Path("weights/stories260K")
PARTS = (STORIES, MODEL)
TRAIN = {"per_device_train_batch_size": 4, "learning_rate": 3e-3, "warmup_ratio": 0.02}


class Piece(NamedTuple):
    """A token as SentencePiece writes it; of two possible merges the higher score comes first."""

    text: str
    score: float


def read_pieces(path: Path) -> list[Piece]:
    content, position, pieces = path.read_bytes(), 4, []
    while position < len(content):
        if position + 8 > len(content):
            raise ValueError(f"{path} ends in the middle of piece {len(pieces)}")
        score, length = struct.unpack_from("<fi", content, position)
        text = content[position + 8 : position + 8 + length]
        if len(text) < length:
            raise ValueError(f"{path} ends in the middle of piece {len(pieces)}")
        pieces.append(Piece(text.decode().replace(" ", SPACE), score))
        position += 8 + length
    if tuple(piece.text.strip() for piece in pieces[:3]) != SPECIAL:
        raise ValueError(f"{path} does not begin with the pieces {', '.join(SPECIAL)}")
    return [Piece(name, 0.0) for name in SPECIAL] + pieces[3:]


def merges_of(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best score first, as SentencePiece merges them."""
    number = {piece.text: index for index, piece in enumerate(pieces)}
    merges = []
    for piece in pieces[len(SPECIAL) + 256 :]:
        halves = [(piece.text[:cut], piece.text[cut:]) for cut in range(1, len(piece.text))]
        known = [(left, right) for left, right in halves if left in number and right in number]
        known.sort(key=lambda pair: (number[pair[0]], number[pair[1]]))
        merges += [(-piece.score, pair) for pair in known]
    return [pair for _, pair in sorted(merges, key=lambda entry: entry[0])]


def stories_tokenizer(pieces: Sequence[Piece]) -> PreTrainedTokenizerFast:
    """A transformers tokenizer that begins each text with `<s>`, as the models saw them.

    It names no end token: the models were trained without one.
    """
    vocabulary = {piece.text: index for index, piece in enumerate(pieces)}
    model = models.BPE(
        vocabulary, merges_of(pieces), unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    spaces = [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, vocabulary[BEGIN])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNKNOWN, bos_token=BEGIN, eos_token=None
    )


def write_stories_tokenizer(data: Path, out: Path) -> None:
    """Write the tokenizer of the Llama below the folder of a benchmark, for transformers."""
    pieces = read_pieces(data / MODEL / "tok512.bin")
    stories_tokenizer(pieces).save_pretrained(tokenizer(out))


def tokenizer(out: Path) -> Path:
    return out / "tokenizer"


def stories_task(data: Path, out: Path) -> dict[str, Any]:
    """Return the section `task`: all stories in rows of 256 tokens, of which 5 % are held out."""
    return {
        "type": "causal_lm",
        "dataset": str(data / STORIES),
        "text_columns": ["text"],
        "max_length": 256,
        "tokenizer": str(tokenizer(out)),
        "max_eval_examples": 16,
    }


def stories_teacher(data: Path) -> dict[str, Any]:
    return {"model": str(data / MODEL / "hf"), "deepspeed": "teacher_zero0"}
