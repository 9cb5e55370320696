"""The embedded corpus `pydocs`: English text that is available wherever megakd is installed.

In the classification view, a text is the beginning of a docstring of one of six packages, with all
package names masked, and the label is its package; all packages have the same number of texts. In
the text view, every docstring of the standard library and of the installed packages is a document.
Both views are deduplicated and split by hash.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from datasets import Features, Value

from megakd.config.task import TaskConfig
from megakd.contract.tasks import TaskType
from megakd.data.arrow import key_of, read_rows, write_rows
from megakd.data.choosing import HASH_RANGE, text_hash
from megakd.data.labels import Classes
from megakd.data.rows import Corpus
from megakd.data.tables import SPLIT_NAMES, SplitName
from megakd.errors import ConfigError, DataError
from megakd.process.garbage import no_collections
from megakd.storage.atomic import write_json
from megakd.storage.folders import whole_folder

logger = logging.getLogger(__name__)

# Increase this number when other code results in different rows of the same sources.
VERSION = 2
PACKAGES = ("networkx", "numpy", "pandas", "scipy", "sklearn", "sympy")
ALIASES = ("nx", "np", "pd", "sp", "scikit-learn", "scikit learn", "scikits")
MASK = "package"
# An underscore ends a word: numpy_dtype and is_numpy name the package too.
NAMED = re.compile(
    r"(?<![^\W_])("
    + "|".join(re.escape(name) for name in sorted((*PACKAGES, *ALIASES), key=len, reverse=True))
    + r")(?![^\W_])",
    re.IGNORECASE,
)
FEWEST_WORDS = 10
MOST_CHARACTERS = 160
FEWEST_ROWS_PER_CLASS = 20
# About 1000 rows per held-out split of the classification view.
HELD_OUT = {"classification": 0.11, "text": 0.02}
VIEW_OF: Mapping[TaskType, str] = {
    "classification": "classification",
    "mlm": "text",
    "causal_lm": "text",
}
# Tests have no useful docstrings, and vendored copies belong to another package.
SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "test", "tests", "idle_test", "_vendor", "vendor", "vendored"}
)
# The corpus must not change with the program that reads it.
SKIPPED_PACKAGES = frozenset({"megakd", "megakd_kernels"})
SITE_FOLDERS = frozenset({"site-packages", "dist-packages"})
TRIPLE_QUOTES = (b'"""', b"'''")
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = ("body", "orelse", "finalbody", "handlers")
ROWS_FILE = "{split}.arrow"
ABOUT_FILE = "about.json"


def pydocs_rows(
    task: TaskConfig, *, cache_dir: Path, roots: Sequence[Path] | None = None
) -> Corpus:
    """Return the rows of the task's view, by default of the modules of this interpreter."""
    view = VIEW_OF.get(task.type)
    if view is None:
        raise ConfigError(
            f"task.type: task.dataset pydocs supports {', '.join(VIEW_OF)} (got {task.type})"
        )
    packages = PACKAGES if view == "classification" else None
    files = source_files(roots if roots is not None else source_roots(), packages)
    numbers = (FEWEST_WORDS, MOST_CHARACTERS, FEWEST_ROWS_PER_CLASS, HELD_OUT[view])
    known = [(f.name, f.size, f.modified_ns) for f in files]
    key = key_of(VERSION, view, PACKAGES, ALIASES, numbers, known)[:32]
    folder = whole_folder(cache_dir / "pydocs" / key, partial(_write_view, view, files))
    about = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
    names = tuple(about["label_names"])
    if view == "classification":
        _check_classes(names)
    return Corpus(
        name="pydocs",
        splits={split: read_rows(folder / ROWS_FILE.format(split=split)) for split in SPLIT_NAMES},
        classes=Classes(names, numbered=False) if names else None,
        metrics=("accuracy",) if view == "classification" else ("perplexity",),
        source_hash=about["sha256"],
    )


def _check_classes(names: Sequence[str]) -> None:
    if len(names) < 2:
        raise DataError(
            f"pydocs: only {len(names)} of its packages ({', '.join(PACKAGES)}) have docstrings on "
            "this machine; classification needs at least 2"
        )
    if missing := [name for name in PACKAGES if name not in names]:
        logger.warning(
            "pydocs: %s not found on this machine; the classes are the other packages",
            ", ".join(missing),
        )


def masked(text: str) -> str:
    """Return the text with every name of a package replaced by a neutral word."""
    return NAMED.sub(MASK, text)


def classification_rows(corpus: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return (package, masked beginning) of the docstrings, each text of one package alone."""
    owners: dict[str, tuple[str, str]] = {}
    shared: set[str] = set()
    for package, docstring in corpus:
        if package not in PACKAGES:
            continue
        text = masked(" ".join(docstring.split()))[:MOST_CHARACTERS]
        if len(re.findall(r"[^\W\d_]{2,}", text)) < FEWEST_WORDS:
            continue
        key = _normal(text)
        if owners.setdefault(key, (package, text))[0] != package:
            shared.add(key)
    return [row for key, row in owners.items() if key not in shared]


def balanced(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the same number of rows of each package by turns, in the order of a hash.

    Packages with few rows are left out.
    """
    in_order = sorted(rows, key=lambda row: text_hash(row[1], salt="pydocs order"))
    parts = [[row for row in in_order if row[0] == package] for package in PACKAGES]
    large = [part for part in parts if len(part) >= FEWEST_ROWS_PER_CLASS]
    return [*chain.from_iterable(zip(*large, strict=False))]


def split_of(text: str, view: str) -> SplitName:
    """Return the split of a text, which depends only on its words: equal texts share a split."""
    position = text_hash(_normal(text), salt="pydocs split") / HASH_RANGE
    if position < HELD_OUT[view]:
        return "test"
    return "validation" if position < 2 * HELD_OUT[view] else "train"


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _write_view(view: str, files: Sequence[SourceFile], folder: Path) -> None:
    logger.info("building the corpus pydocs from %d modules (under a minute, once)", len(files))
    docstrings = list(read_docstrings(files))
    corpus = [docstring for docstring in docstrings if docstring is not None]
    if unreadable := len(docstrings) - len(corpus):
        logger.info("pydocs: %d modules could not be parsed and were left out", unreadable)
    if view == "classification":
        rows = balanced(classification_rows(corpus))
    else:
        rows = [("", text) for text in dict.fromkeys(text for _, text in corpus)]
    names = [*dict.fromkeys(package for package, _ in rows)]
    features = Features({"text": Value("string")})
    if view == "classification":
        features["label"] = Value("int64")
    digest = hashlib.sha256()
    parts: dict[SplitName, list[dict[str, object]]] = {split: [] for split in SPLIT_NAMES}
    for package, text in rows:
        split = split_of(text, view)
        digest.update(json.dumps([split, package, text]).encode())
        parts[split].append({"text": text, "label": names.index(package)})
    for split, part in parts.items():
        write_rows(part, features, folder / ROWS_FILE.format(split=split))
    about = {"label_names": [*filter(None, names)], "sha256": digest.hexdigest()}
    write_json(folder / ABOUT_FILE, about)


class SourceFile(NamedTuple):
    """The file of one module; `package` is the top-level package that it belongs to."""

    package: str
    name: str
    path: Path
    size: int
    modified_ns: int


class Docstring(NamedTuple):
    """One docstring, without indentation, and its top-level package."""

    package: str
    text: str


def source_roots() -> list[Path]:
    """Return the folder of the standard library, then the folders of installed packages."""
    standard = Path(sysconfig.get_path("stdlib")).resolve()
    site = [Path(entry).resolve() for entry in sys.path if Path(entry).name in SITE_FOLDERS]
    return [root for root in dict.fromkeys([standard, *site]) if root.is_dir()]


def source_files(roots: Sequence[Path], packages: Sequence[str] | None = None) -> list[SourceFile]:
    """Return the modules below the roots, in an order that does not depend on the file system.

    A package that is in two roots is read from the first root, as an import would do.

    Args:
        packages: the packages to read, which are folders; None: all packages and modules.
    """
    files: list[SourceFile] = []
    for root in roots:
        earlier = {file.package for file in files}
        folders = [root] if packages is None else [root / name for name in packages]
        below = chain.from_iterable(_below(root, folder) for folder in folders)
        new = (file for file in below if file.package not in earlier)
        files += sorted(new, key=lambda file: file.name)
    return files


def read_docstrings(files: Sequence[SourceFile]) -> Iterator[Docstring | None]:
    """Yield the docstrings of the files in order; None for a file that cannot be parsed."""
    with no_collections():
        for file in files:
            try:
                source = file.path.read_bytes()
            except OSError:
                yield None
                continue
            if not any(quotes in source for quotes in TRIPLE_QUOTES):
                continue
            tree = _parsed(source)
            if tree is None:
                yield None
                continue
            for text in _docstrings(tree):
                yield Docstring(file.package, text)


def _below(root: Path, top: Path) -> Iterator[SourceFile]:
    for folder, subfolders, names in os.walk(top):
        subfolders[:] = [
            name
            for name in subfolders
            if name not in SKIPPED_FOLDERS | SITE_FOLDERS
            and not (Path(folder) == root and name in SKIPPED_PACKAGES)
        ]
        for name in names:
            path = Path(folder, name)
            # A broken link is not a file.
            if name.endswith(".py") and path.is_file():
                relative, status = path.relative_to(root), path.stat()
                package = relative.parts[0].removesuffix(".py")
                times = status.st_size, status.st_mtime_ns
                yield SourceFile(package, relative.as_posix(), path, *times)


def _parsed(source: bytes) -> ast.Module | None:
    with warnings.catch_warnings():
        # Warnings about old string escapes in other packages are not relevant here.
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            # The parser raises MemoryError for code that is nested too deeply.
            return None


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in (tree, *_definitions(tree)):
        text = ast.get_docstring(node) or ""
        # Source code can express a lone surrogate, UTF-8 cannot.
        if clean := text.encode("utf-8", "ignore").decode("utf-8").strip():
            yield clean


def _definitions(node: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for block in BLOCKS:
        for child in getattr(node, block, None) or ():
            if isinstance(child, DEFINITIONS):
                yield child
            if isinstance(child, ast.stmt | ast.excepthandler):
                yield from _definitions(child)
