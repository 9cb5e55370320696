"""A finished model whose vocabulary is cut to the tokens of given texts.

Kept are the tokens of the texts, all special and added tokens, and the tokens of one character, in
their order. So a text of which no token was unknown has none afterwards; a text whose tokens are
all kept has the same tokens, and the model computes the same for it, bit by bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from megakd.data.tokenizers import from_folder
from megakd.errors import DataError, ModelError
from megakd.models.architectures import counts_padding
from megakd.models.loading import load_finished
from megakd.models.model_folder import write_weights
from megakd.models.weights import SAFETENSORS_INDEX
from megakd.storage.folders import check_given

WHERE = "--vocabulary task"
_TOKENIZER = "tokenizer.json"
_OTHER_FILES = ("vocab.txt", "vocab.json", "merges.txt", "*.model")
"""Vocabularies of other forms, which would contradict tokenizer.json."""
_AT_ONCE = 1000
_CONFIGS = ("config.json", "generation_config.json")

Tokens = frozenset[str]
Numbers = Mapping[int, int]
"""New number of every token that is kept, by its old number."""


class Trimmed(NamedTuple):
    """Numbers of tokens and of weights before and after."""

    tokens: tuple[int, int]
    parameters: tuple[int, int]


def trim_vocabulary(folder: Path, texts: Callable[[], Iterable[str]]) -> Trimmed:
    """Cut the tokenizer, the embeddings and the output matrix of a model folder, in place.

    Args:
        folder: a model folder of megakd or transformers with a WordPiece or BPE tokenizer.
        texts: returns the texts whose tokens are kept; it is called twice.

    Raises:
        DataError: the tokenizer is of another kind, or a text would get other tokens.
    """
    check_given(folder, WHERE)
    backend = _backend(folder)
    tree: dict[str, Any] = json.loads(backend.to_str())
    kept = _kept(tree, {token for row in _tokens(backend, texts()) for token in row}, folder)
    known = {
        **tree["model"]["vocab"],
        **{one["content"]: one["id"] for one in tree["added_tokens"]},
    }
    numbers = {old: new for new, old in enumerate(sorted({known[token] for token in kept}))}
    before, after = _trim_weights(folder, torch.tensor(list(numbers)))
    _write_tokenizer(folder, tree, kept, numbers)
    for name in _CONFIGS:
        if (folder / name).is_file():
            _change_json(folder / name, lambda keys: _renumbered(keys, numbers))
    _check_same(backend, _backend(folder), texts())
    return Trimmed((len(known), len(numbers)), (before, after))


def _backend(folder: Path) -> Tokenizer:
    backend: Tokenizer | None = getattr(
        from_folder(folder, "classification"), "backend_tokenizer", None
    )
    if backend is None or not (folder / _TOKENIZER).is_file():
        raise DataError(f"{WHERE}: {folder} has no {_TOKENIZER}, which alone can be cut")
    backend.no_truncation()
    backend.no_padding()
    return backend


def _tokens(backend: Tokenizer, texts: Iterable[str]) -> Iterator[list[str]]:
    texts = iter(texts)
    while several := list(islice(texts, _AT_ONCE)):
        yield from (one.tokens for one in backend.encode_batch(several))


def _kept(tree: Mapping[str, Any], used: set[str], folder: Path) -> Tokens:
    model, added = tree["model"], {one["content"] for one in tree["added_tokens"]}
    if model["type"] not in _ALPHABETS:
        raise DataError(
            f"{WHERE}: a tokenizer of the kind {model['type']} chooses among all its tokens at "
            "once, and would read other texts differently without some of them; only WordPiece "
            "and BPE can be cut"
        )
    files = [folder / name for name in _CONFIGS if (folder / name).is_file()]
    keys = [key for file in files for key in json.loads(file.read_text(encoding="utf-8")).items()]
    given = [value for key, value in keys if key.endswith("_token_id")]
    configured = {*chain(*(one if isinstance(one, list) else [one] for one in given))}
    named = {token for token, number in model["vocab"].items() if number in configured}
    special = added | named | ({model["unk_token"]} & model["vocab"].keys())
    plain = {token: number for token, number in model["vocab"].items() if token not in special}
    return _ALPHABETS[model["type"]]({**model, "vocab": plain}, frozenset(used | special))


def _wordpiece(model: Mapping[str, Any], wanted: Tokens) -> Tokens:
    prefix, vocabulary = model["continuing_subword_prefix"], model["vocab"]
    letters = {piece for piece in vocabulary if len(piece.removeprefix(prefix)) == 1}
    # Also of pieces that are kept: other pieces may then end where a letter cannot go on.
    for piece in (one for one in vocabulary if not one.startswith("[unused")):
        is_inside, text = piece.startswith(prefix), piece.removeprefix(prefix)
        spelled = {(prefix if n or is_inside else "") + letter for n, letter in enumerate(text)}
        if not spelled <= letters:
            missing = ", ".join(sorted(spelled - letters))
            raise DataError(
                f"{WHERE}: words with {piece} could become unknown, because the tokenizer has no "
                f"piece {missing}; keep the whole vocabulary"
            )
    return wanted | letters


def _bpe(model: Mapping[str, Any], wanted: Tokens) -> Tokens:
    if model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise DataError(
            f"{WHERE}: a BPE tokenizer that marks pieces inside words cannot be cut; keep the "
            "whole vocabulary"
        )
    letters = {piece for piece in model["vocab"] if len(piece) == 1 or piece.startswith("<0x")}
    kept, merges, size = {*wanted, *letters}, _merges(model), 0
    while size < len(kept):  # a kept token needs the parts that it is merged from
        size = len(kept)
        for one, other in reversed(merges):
            if one + other in kept:
                kept |= {one, other}
    return frozenset(kept)


_ALPHABETS: Mapping[str, Callable[[Mapping[str, Any], Tokens], Tokens]] = {
    "WordPiece": _wordpiece,
    "BPE": _bpe,
}
"""By kind of tokenizer, what returns the wanted tokens and those that other texts need."""


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (one.split(" ") if isinstance(one, str) else one for one in model["merges"])
    return [(one, other) for one, other in pairs]


def _trim_weights(folder: Path, rows: Tensor) -> tuple[int, int]:
    """Select the rows of kept tokens; return the numbers of weights before and after."""
    model = load_finished(folder, WHERE)
    pad = model.config.pad_token_id
    if counts_padding(model.config) and rows[pad : pad + 1].tolist() != [pad]:
        raise ModelError(
            f"{WHERE}: a {model.config.model_type} model counts positions from the number of its "
            f"padding token, {pad}, which would change; keep the whole vocabulary"
        )
    tables = _tables(model)
    files = sorted(folder.glob("*.safetensors"))
    state = {name: tensor for file in files for name, tensor in load_file(file).items()}
    if tables.isdisjoint(state):
        raise ModelError(f"{WHERE}: {folder} stores no embeddings of tokens")
    trimmed = {name: t[rows] if name in tables else t for name, t in state.items()}
    for file in (*files, folder / SAFETENSORS_INDEX):
        file.unlink(missing_ok=True)
    write_weights(folder, trimmed.items())
    before, after = (sum(map(torch.numel, each.values())) for each in (state, trimmed))
    return before, after


def _tables(model: PreTrainedModel) -> set[str]:
    output: Any = model.get_output_embeddings()
    matrices = [model.get_input_embeddings().weight]
    matrices += [] if output is None else [output.weight, getattr(output, "bias", None)]
    places = {one.data_ptr() for one in matrices if isinstance(one, Tensor)}
    # An untied head of BERT stores the bias beside its matrix a second time.
    beside = {f"{n.rpartition('.')[0]}.bias" for n, one in model.named_modules() if one is output}
    state = model.state_dict().items()
    return {name for name, one in state if name in beside or one.data_ptr() in places}


def _write_tokenizer(folder: Path, tree: dict[str, Any], kept: Tokens, numbers: Numbers) -> None:
    model = tree["model"]
    model["vocab"] = {t: numbers[n] for t, n in model["vocab"].items() if t in kept}
    if "merges" in model:
        model["merges"] = [
            [one, other] for one, other in _merges(model) if {one, other, one + other} <= kept
        ]
    for one in tree["added_tokens"]:
        one["id"] = numbers[one["id"]]
    tree["post_processor"] = _renumbered_template(tree["post_processor"], numbers)
    (folder / _TOKENIZER).write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
    for path in (path for name in _OTHER_FILES for path in folder.glob(name)):
        path.unlink()

    def renumber(keys: dict[str, Any]) -> dict[str, Any]:
        decoder = keys.get("added_tokens_decoder", {})
        changed = {str(numbers[int(n)]): token for n, token in decoder.items()}
        return {**keys, **({"added_tokens_decoder": changed} if decoder else {})}

    _change_json(folder / "tokenizer_config.json", renumber)


def _renumbered_template(node: Any, numbers: Numbers) -> Any:
    """Return a post-processor with new numbers, in `ids` or as `[token, number]`."""
    if isinstance(node, list):
        is_pair = len(node) == 2 and isinstance(node[0], str) and isinstance(node[1], int)
        if is_pair:
            return [node[0], numbers[node[1]]]
        return [_renumbered_template(one, numbers) for one in node]
    if not isinstance(node, dict):
        return node
    return {
        key: [numbers[n] for n in one] if key == "ids" else _renumbered_template(one, numbers)
        for key, one in node.items()
    }


def _change_json(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    content = change(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _renumbered(keys: dict[str, Any], numbers: Numbers) -> dict[str, Any]:
    def new(value: Any) -> Any:
        return [new(one) for one in value] if isinstance(value, list) else numbers.get(value, value)

    named = {key: new(value) for key, value in keys.items() if key.endswith("_token_id")}
    return {**keys, **named, **({"vocab_size": len(numbers)} if "vocab_size" in keys else {})}


def _check_same(whole: Tokenizer, trimmed: Tokenizer, texts: Iterable[str]) -> None:
    texts = list(texts)
    pairs = zip(texts, _tokens(whole, texts), _tokens(trimmed, texts), strict=True)
    different: Sequence[str] = [text for text, one, other in pairs if one != other]
    if different:
        raise DataError(
            f"{WHERE}: with the tokens of the texts alone, the tokenizer reads {len(different)} of "
            f"them differently, such as {different[0][:80]!r}; keep the whole vocabulary"
        )
