"""Cut the vocabulary of a finished model to the tokens of given texts.

    python launch/trim_vocabulary.py runs/x/final --texts train.csv --columns text --to small

Kept are the tokens of the texts, special and added ones, those that the configs name, and those of
one character: nothing becomes unknown, and a text whose tokens are all kept has the same outputs.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import load_dataset
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer

LOADERS = {".csv": "csv", ".jsonl": "json", ".txt": "text", ".parquet": "parquet"}
LISTS = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids")
COMPARED, KEEP = 8, "keep the whole vocabulary"


def with_numbers(keys: Any, change: Callable[[int], int], name: str = "") -> Any:
    """Return the keys of a config with `change` applied to every number of a token."""
    if isinstance(keys, dict):
        return {key: with_numbers(value, change, key) for key, value in keys.items()}
    if name == "forced_decoder_ids" and keys:  # pairs of a position and a token
        return [[place, change(token)] for place, token in keys]
    if name == "sequence_bias" and keys:  # pairs of tokens and a bias
        return [[[change(token) for token in tokens], bias] for tokens, bias in keys]
    if isinstance(keys, list):
        return [with_numbers(one, change, name) for one in keys]
    is_token = isinstance(keys, int) and (name.endswith("_token_id") or name in LISTS)
    return change(keys) if is_token else keys


def needed_tokens(model: dict[str, Any], wanted: set[str]) -> set[str]:
    """Return the wanted tokens and those that other texts need; cut the merges of a BPE."""
    if model["type"] == "WordPiece":
        prefix = model["continuing_subword_prefix"]
        letters = {piece for piece in model["vocab"] if len(piece.removeprefix(prefix)) == 1}
        for piece in model["vocab"].keys() - wanted:
            inside, text = piece.startswith(prefix), piece.removeprefix(prefix)
            spelled = {(prefix if n or inside else "") + sign for n, sign in enumerate(text)}
            if not spelled <= letters and not piece.startswith("[unused"):  # of no text
                raise SystemExit(f"words with {piece} could become unknown; {KEEP}")
        return wanted | letters
    if model["type"] != "BPE" or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        raise SystemExit(f"a tokenizer of this kind ({model['type']}) cannot be cut; {KEEP}")
    tokens = wanted | {t for t in model["vocab"] if len(t) == 1 or t.startswith("<0x")}
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    size = 0
    while size < len(tokens):  # a token needs the parts that it is merged from
        size = len(tokens)
        tokens |= {part for a, b in reversed(merges) if a + b in tokens for part in (a, b)}
    model["merges"] = [[a, b] for a, b in merges if {a, b, a + b} <= tokens]
    return tokens


def renumbered(node: Any, numbers: dict[int, int]) -> Any:
    """Return a post-processor with new numbers, in `ids` or as `[token, number]`."""
    if isinstance(node, dict):
        new = {key: renumbered(one, numbers) for key, one in node.items()}
        return new | ({"ids": [numbers[n] for n in node["ids"]]} if "ids" in node else {})
    if isinstance(node, list) and [type(one) for one in node] == [str, int]:
        return [node[0], numbers[node[1]]]
    return [renumbered(one, numbers) for one in node] if isinstance(node, list) else node


def cut_tokenizer(tree: dict[str, Any], texts: Sequence[str], named: set[int]) -> dict[int, int]:
    """Cut a tokenizer.json to the tokens of texts; return the new numbers by the old ones."""
    model, added = tree["model"], tree["added_tokens"]
    backend = Tokenizer.from_str(json.dumps({**tree, "truncation": None, "padding": None}))
    used = {token for text in backend.encode_batch(texts) for token in text.tokens}
    known = backend.get_vocab()
    special = {model.get("unk_token"), *(one["content"] for one in added)}
    tokens = needed_tokens(
        model, used | {t for t, n in known.items() if n in named or t in special}
    )
    numbers = {old: new for new, old in enumerate(sorted(known[token] for token in tokens))}
    model["vocab"] = {t: numbers[n] for t, n in model["vocab"].items() if t in tokens}
    tree["added_tokens"] = [{**one, "id": numbers[one["id"]]} for one in added]
    tree["post_processor"] = renumbered(tree["post_processor"], numbers)
    return numbers


def outputs(model: Any, folder: Path, texts: Sequence[str]) -> torch.Tensor:
    """Return the last hidden states of all texts, one after the other."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        encoded = [tokenizer(text, return_tensors="pt", truncation=True) for text in texts]
        outs = [model.eval()(**one, output_hidden_states=True) for one in encoded]
        return torch.cat([one.hidden_states[-1].flatten().float() for one in outs])


def trim(source: Path, to: Path, texts: Sequence[str], **loading: Any) -> str:
    """Write the model in `source` with fewer tokens to a new folder; return what has changed."""
    name: Any = AutoConfig.from_pretrained(source, **loading).architectures
    kinds = [k for k in ("SequenceClassification", "MaskedLM") if name[0].endswith(k)]
    auto = getattr(transformers, f"AutoModelFor{[*kinds, 'CausalLM'][0]}")
    model = auto.from_pretrained(source, dtype="auto", **loading)
    before, expected = model.num_parameters(), outputs(model, source, texts[:COMPARED])
    configs = {f.name: json.loads(f.read_text()) for f in source.glob("*config.json")}
    named = set[int]()
    with_numbers(configs, lambda number: named.add(number) or number)
    tree = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    numbers = cut_tokenizer(tree, texts, named)
    head = model.get_output_embeddings()
    around = [name.rpartition(".")[0] for name, one in model.named_modules() if one is head]
    beside = [one for name in around for one in model.get_submodule(name).parameters(recurse=False)]
    tables = {model.get_input_embeddings().weight, *beside, *(head.parameters() if head else ())}
    for table in tables:  # an untied head of BERT has its bias beside the matrix too
        table.data = table.data[list(numbers)].clone()
    model.save_pretrained(to)
    for file in (*source.glob("*.py"), *source.glob("*.jinja")):
        (to / file.name).write_bytes(file.read_bytes())
    configs["config.json"]["vocab_size"] = len(numbers)
    configs["tokenizer_config.json"].pop("added_tokens_decoder", None)  # are in tokenizer.json
    for name, keys in configs.items():
        new = with_numbers(keys, lambda number: numbers.get(number, number))
        (to / name).write_text(json.dumps(new, indent=2) + "\n", encoding="utf-8")
    (to / "tokenizer.json").write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
    small = auto.from_pretrained(to, dtype="auto", **loading)
    now = outputs(small, to, texts[:COMPARED])
    if len(now) != len(expected) or not torch.allclose(now, expected, atol=1e-4):
        raise SystemExit(f"outputs change: positions may follow the padding token; {KEEP}")
    weights = f"{before / 1e6:.2f}M -> {small.num_parameters() / 1e6:.2f}M"
    return f"{len(numbers):,} tokens are kept; weights: {weights}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="a final/ folder")
    parser.add_argument("--texts", nargs="+", required=True, help=f"files: {', '.join(LOADERS)}")
    parser.add_argument("--columns", nargs="+", default=["text"], help="their columns with texts")
    parser.add_argument("--to", type=Path, required=True, help="the new folder")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the folder's code")
    options = parser.parse_args()
    if options.to.exists():
        parser.error(f"--to: {options.to} exists; name a new folder")
    rows = [load_dataset(LOADERS[Path(f).suffix], data_files=f)["train"] for f in options.texts]
    texts = [text for part in rows for name in options.columns for text in part[name] if text]
    with tempfile.TemporaryDirectory(dir=options.to.absolute().parent) as folder:
        new, keys = Path(folder, "new"), {"trust_remote_code": options.trust_remote_code}
        print(options.to, trim(options.model, new, texts, **keys), sep="\n")
        new.rename(options.to)
