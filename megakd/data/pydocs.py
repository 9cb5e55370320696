"""The embedded corpus `pydocs`: English text that is available wherever megakd is installed.

The texts are the docstrings of the standard library and of installed packages. In the
classification view, the text is the first sentence of a docstring with all package names masked,
and the label is its package. In the text view, every docstring is a document. Both views are
deduplicated and split by hash.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from datasets import Features, Value

from megakd.config.task import TaskConfig
from megakd.contract.tasks import TaskType
from megakd.data.cache import cached_folder, key_of, read_rows, write_rows
from megakd.data.choosing import HASH_RANGE, text_hash
from megakd.data.docstrings import (
    SourceFile,
    read_docstrings,
    source_files,
    source_roots,
)
from megakd.data.found import Found
from megakd.data.labels import Classes
from megakd.data.tables import SPLIT_NAMES, SplitName
from megakd.errors import ConfigError, DataError
from megakd.storage.atomic import write_json

logger = logging.getLogger(__name__)

# Increase this number when the same sources result in different rows.
VERSION = 1
PACKAGES = (
    "transformers",
    "torch",
    "sympy",
    "pandas",
    "networkx",
    "numpy",
    "huggingface_hub",
    "tensorboard",
    "pydantic",
    "setuptools",
    "tkinter",
    "asyncio",
)
ALIASES = (
    "pytorch",
    "hugging face hub",
    "hugging face",
    "hugging-face",
    "huggingface",
    "hf",
    "np",
    "pd",
    "nx",
    "tk",
)
MASK = "package"
# An underscore ends a word: torch_dtype and is_torch name the package too.
NAMED = re.compile(
    r"(?<![^\W_])("
    + "|".join(re.escape(name) for name in sorted((*PACKAGES, *ALIASES), key=len, reverse=True))
    + r")(?![^\W_])",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`\"'(\[])")
FEWEST_WORDS = 3
MOST_CHARACTERS = 1000
FEWEST_ROWS_PER_CLASS = 20
# About 2000 rows per held-out split of the classification view.
HELD_OUT = {"classification": 0.045, "text": 0.02}
VIEW_OF: Mapping[TaskType, str] = {
    "classification": "classification",
    "mlm": "text",
    "causal_lm": "text",
}
ROWS_FILE = "{split}.arrow"
ABOUT_FILE = "about.json"

Labelled = tuple[str, str]
"""(package, text)"""


def pydocs_rows(task: TaskConfig, *, cache_dir: Path, roots: Sequence[Path] | None = None) -> Found:
    """Return the rows of the view for the task type.

    Args:
        task: a task of type classification, mlm or causal_lm.
        cache_dir: folder in which the corpus is built once.
        roots: folders to search for modules; None searches the folders of this interpreter.

    Raises:
        ConfigError: a key of the task does not fit.
        DataError: fewer than two of the packages are installed.
    """
    _check(task)
    view = VIEW_OF[task.type]
    files = source_files(roots if roots is not None else source_roots())
    key = key_of(VERSION, [(f.name, f.size, f.modified_ns) for f in files])[:32]
    corpus = cache_dir / "pydocs" / f"{key}-docstrings"

    def write_view(fresh: Path) -> None:
        cached_folder(corpus, partial(_write_corpus, files))
        _write_view(view, _read_corpus(corpus), fresh)

    folder = cached_folder(cache_dir / "pydocs" / f"{key}-{view}", write_view)
    about = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
    _warn_of_missing(about["missing"])
    names = tuple(about["label_names"])
    return Found(
        name="pydocs",
        splits={split: read_rows(folder / ROWS_FILE.format(split=split)) for split in SPLIT_NAMES},
        classes=Classes(names, numbered=False) if names else None,
        metrics=("accuracy",) if view == "classification" else ("perplexity",),
        source_hash=about["sha256"],
    )


def first_sentence(docstring: str) -> str:
    """Return the first sentence of the first paragraph, on one line."""
    paragraph = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    line = " ".join(paragraph.split())
    return SENTENCE_END.split(line, maxsplit=1)[0][:MOST_CHARACTERS]


def masked(text: str) -> str:
    """Return the text with every name of a package replaced by a neutral word."""
    return NAMED.sub(MASK, text)


def classification_rows(corpus: Iterable[Labelled]) -> list[Labelled]:
    """Return (package, masked first sentence) of each unique text.

    Texts that occur in two packages are left out.
    """
    owners: dict[str, Labelled] = {}
    shared: set[str] = set()
    for package, docstring in corpus:
        if package not in PACKAGES:
            continue
        text = masked(first_sentence(docstring))
        if len(re.findall(r"[^\W\d_]{2,}", text)) < FEWEST_WORDS:
            continue
        key = _normal(text)
        if owners.setdefault(key, (package, text))[0] != package:
            shared.add(key)
    return [row for key, row in owners.items() if key not in shared]


def split_of(text: str, view: str) -> SplitName:
    """Return the split of a text, which depends only on its words.

    Equal texts are therefore in the same split.
    """
    position = text_hash(_normal(text), salt="pydocs split") / HASH_RANGE
    if position < HELD_OUT[view]:
        return "test"
    return "validation" if position < 2 * HELD_OUT[view] else "train"


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _check(task: TaskConfig) -> None:
    if task.type not in VIEW_OF:
        raise ConfigError(
            f"task.type: task.dataset pydocs supports {', '.join(VIEW_OF)} (got {task.type})"
        )
    for key in ("data_dir", "dataset_config", "text_columns", "label_column"):
        if getattr(task, key) is not None:
            raise ConfigError(
                f"task.{key}: not supported with task.dataset pydocs; remove the key (got "
                f"{str(getattr(task, key))!r})"
            )


def _write_corpus(files: Sequence[SourceFile], folder: Path) -> None:
    logger.info("building the corpus pydocs from %d modules (under a minute, once)", len(files))
    unreadable = 0

    def rows() -> Iterator[dict[str, object]]:
        nonlocal unreadable
        for docstring in read_docstrings(files):
            if docstring is None:
                unreadable += 1
            else:
                yield {"package": docstring.package, "text": docstring.text}

    features = Features({"package": Value("string"), "text": Value("string")})
    write_rows(rows(), features, folder / "docstrings.arrow")
    if unreadable:
        logger.info("pydocs: %d modules could not be parsed and were left out", unreadable)


def _read_corpus(folder: Path) -> Iterator[Labelled]:
    for batch in read_rows(folder / "docstrings.arrow").iter(batch_size=1000):
        columns: Mapping[str, list[str]] = batch  # pyright: ignore[reportAssignmentType]
        yield from zip(columns["package"], columns["text"], strict=True)


def _write_view(view: str, corpus: Iterable[Labelled], folder: Path) -> None:
    if view == "classification":
        rows = classification_rows(corpus)
        names = _label_names(rows)
    else:
        rows = [("", text) for text in dict.fromkeys(text for _, text in corpus)]
        names = ("",)
    numbers = {name: number for number, name in enumerate(names)}
    features = Features({"text": Value("string")})
    if view == "classification":
        features["label"] = Value("int64")
    digest = hashlib.sha256()
    parts: dict[SplitName, list[dict[str, object]]] = {split: [] for split in SPLIT_NAMES}
    for package, text in rows:
        if package in numbers:
            split = split_of(text, view)
            digest.update(json.dumps([split, package, text]).encode())
            parts[split].append({"text": text, "label": numbers[package]})
    for split, part in parts.items():
        write_rows(part, features, folder / ROWS_FILE.format(split=split))
    about = {
        "label_names": [name for name in names if name],
        "missing": [name for name in PACKAGES if view == "classification" and name not in names],
        "sha256": digest.hexdigest(),
    }
    write_json(folder / ABOUT_FILE, about)


def _label_names(rows: Sequence[Labelled]) -> tuple[str, ...]:
    counts = Counter(package for package, _ in rows)
    names = tuple(name for name in PACKAGES if counts[name] >= FEWEST_ROWS_PER_CLASS)
    if len(names) < 2:
        raise DataError(
            f"pydocs: only {len(names)} of its packages ({', '.join(PACKAGES)}) have docstrings on "
            "this machine; classification needs at least 2"
        )
    return names


def _warn_of_missing(missing: Sequence[str]) -> None:
    if missing:
        logger.warning(
            "pydocs: %s not found on this machine; the classes are the other packages",
            ", ".join(missing),
        )
