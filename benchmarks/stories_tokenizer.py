"""The tokenizer of llama2.c's `stories` models as a folder that transformers can load.

`python benchmarks/stories_tokenizer.py tok512.bin FOLDER [--check MODEL TEXTS.json]`; the check
prints the model's nats per token on a JSON list of texts, which only a right tokenizer makes low.

The file is an int32 (the longest piece), then per piece a float32 score, an int32 length and the
bytes of the piece, with spaces where SentencePiece writes "▁". Pieces 0, 1, 2 are unknown, begin
and end; then 256 bytes, the merged pieces from the first merge to the last, and single characters.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from collections.abc import Sequence

UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
SPECIAL = (UNKNOWN, BEGIN, END)
SPACE = "▁"


class Piece(NamedTuple):
    """A token as SentencePiece writes it; of two possible merges the higher score comes first."""

    text: str
    score: float


def read_pieces(path: Path) -> list[Piece]:
    """The pieces of a llama2.c tokenizer file, in the order of their numbers.

    Raises:
        ValueError: the file ends in the middle of a piece, or begins with other pieces.
    """
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
    found = []
    for piece in pieces[len(SPECIAL) + 256 :]:
        halves = [(piece.text[:cut], piece.text[cut:]) for cut in range(1, len(piece.text))]
        known = [(left, right) for left, right in halves if left in number and right in number]
        known.sort(key=lambda pair: (number[pair[0]], number[pair[1]]))
        found += [(-piece.score, pair) for pair in known]
    return [pair for _, pair in sorted(found, key=lambda entry: entry[0])]


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


def write_tokenizer(source: Path, folder: Path) -> None:
    """Converts a llama2.c tokenizer file into a folder."""
    stories_tokenizer(read_pieces(source)).save_pretrained(folder)


@torch.no_grad()
def nats_per_token(model_folder: Path, tokenizer_folder: Path, texts: Sequence[str]) -> float:
    """Mean cross-entropy of the model over all tokens after the first of each text.

    Texts are cut to the model's context.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    model = LlamaForCausalLM.from_pretrained(model_folder).eval()
    total, targets = 0.0, 0
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        ids = ids[:, : model.config.max_position_embeddings]
        count = ids.shape[1] - 1
        total += float(model(input_ids=ids, labels=ids).loss) * count
        targets += count
    return total / targets


def main(arguments: Sequence[str]) -> int:
    """Converts, and checks if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="tok512.bin")
    parser.add_argument("folder", type=Path, help="where the tokenizer goes")
    parser.add_argument("--check", nargs=2, type=Path, metavar=("MODEL", "TEXTS"))
    given = parser.parse_args(arguments)
    write_tokenizer(given.source, given.folder)
    print(f"{given.folder} holds the tokenizer")
    if given.check:
        model, texts = given.check
        loss = nats_per_token(model, given.folder, json.loads(texts.read_text(encoding="utf-8")))
        print(f"{loss:.3f} nats per token, perplexity {math.exp(loss):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
