"""Write the docstrings of this interpreter's packages as rows: a corpus that every machine has.

`python launch/pydocs.py labels [FOLDER]`: beginnings of docstrings of six packages, as many of
each, with masked names; the label is the package. `texts`: every docstring of the standard library
and of the installed packages. Rows are deduplicated, split by a hash, and written as train.jsonl,
validation.jsonl and test.jsonl; FOLDER is runs/pydocs-labels or runs/pydocs-texts.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import json
import os
import re
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

PACKAGES = ("networkx", "numpy", "pandas", "scipy", "sklearn", "sympy")
ALIASES = ("nx", "np", "pd", "sp", "scikit-learn", "scikit learn", "scikits")
_NAMES = "|".join(map(re.escape, sorted((*PACKAGES, *ALIASES), key=len, reverse=True)))
# An underscore ends a word: numpy_dtype and is_numpy name the package too.
NAMED = re.compile(rf"(?<![^\W_])({_NAMES})(?![^\W_])", re.IGNORECASE)
FEWEST_WORDS, MOST_CHARACTERS, FEWEST_ROWS_PER_CLASS = 10, 160, 20
# The shares of test and validation. Labels: about 1000 rows are scored, and the 270 of validation
# rank a model's units and layers, for which it reads each of them a dozen times.
HELD_OUT = {"labels": (0.11, 0.03), "texts": (0.02, 0.02)}
SPLITS = ("test", "validation", "train")
# Tests have no useful docstrings, and vendored copies belong to another package.
SKIPPED = {"__pycache__", "test", "tests", "idle_test", "_vendor", "vendor", "vendored"}
SITE = {"site-packages", "dist-packages"}
OURS = {"megakd", "megakd_kernels"}  # the corpus must not change with the program that reads it
Docstring = tuple[str, str]  # its top-level package, and its text without indentation


def source_roots() -> list[Path]:
    """Return the folder of the standard library, then the folders of installed packages."""
    site = (entry for entry in sys.path if Path(entry).name in SITE)
    return [*dict.fromkeys(Path(p).resolve() for p in (sysconfig.get_path("stdlib"), *site))]


def source_files(roots: Iterable[Path], packages: Sequence[str] = ("",)) -> list[tuple[str, Path]]:
    """Return (package, file) of the modules, in an order that does not depend on the file system.

    A package that is in two roots is read from the first, as an import would do.
    """
    files = list[tuple[str, Path]]()
    for root in roots:
        skipped = OURS.union(package for package, _ in files)
        below = [path.relative_to(root) for name in packages for path in _below(root / name)]
        in_order = ((p.parts[0].removesuffix(".py"), p) for p in sorted(below, key=Path.as_posix))
        files += [(package, root / p) for package, p in in_order if package not in skipped]
    return files


def _below(top: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(top):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED | SITE]
        paths = (Path(folder, name) for name in names if name.endswith(".py"))
        yield from filter(Path.is_file, paths)  # a broken link is none


def docstrings(files: Iterable[tuple[str, Path]]) -> Iterator[Docstring]:
    """Yield the docstrings of the files in order, without those of files that are no Python."""
    for package, tree in ((package, _parsed(path)) for package, path in files):
        for node in (tree, *_definitions(tree)):
            # Source code can express a lone surrogate, UTF-8 cannot.
            if text := (ast.get_docstring(node) or "").encode("utf-8", "ignore").decode().strip():
                yield package, text


def _parsed(path: Path) -> ast.Module:
    with warnings.catch_warnings(action="ignore"):  # about old string escapes
        try:
            source = path.read_bytes()
            return ast.parse(source if b'"""' in source or b"'''" in source else b"")
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            return ast.Module([], [])  # MemoryError: the code is nested too deeply


def _definitions(node: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    blocks = (getattr(node, name, ()) for name in ("body", "orelse", "finalbody", "handlers"))
    for child in chain(*blocks):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        if isinstance(child, ast.stmt | ast.excepthandler):
            yield from _definitions(child)


def labelled(corpus: Iterable[Docstring]) -> list[Docstring]:
    """Return the masked beginning of each docstring with its package, each text of one alone."""
    owners, shared = dict[str, Docstring](), set[str]()
    for package, docstring in corpus:
        text = NAMED.sub("package", " ".join(docstring.split()))[:MOST_CHARACTERS]
        if package not in PACKAGES or len(re.findall(r"[^\W\d_]{2,}", text)) < FEWEST_WORDS:
            continue
        if owners.setdefault(_words(text), (package, text))[0] != package:
            shared.add(_words(text))
    return [row for key, row in owners.items() if key not in shared]


def balanced(rows: Iterable[Docstring]) -> list[Docstring]:
    """Return as many rows of each package by turns, by a hash; leave out those with few rows."""
    in_order = sorted(rows, key=lambda row: _hash_of("order", row[1]))
    parts = [[row for row in in_order if row[0] == package] for package in PACKAGES]
    return [*chain(*zip(*(p for p in parts if len(p) >= FEWEST_ROWS_PER_CLASS), strict=False))]


def split_of(text: str, view: str) -> str:
    """Return the split of a text, which depends only on its words: equal texts share a split."""
    place, (test, validation) = _hash_of("split", _words(text)) / 2**64, HELD_OUT[view]
    return SPLITS[(place >= test) + (place >= test + validation)]


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _hash_of(salt: str, text: str) -> int:
    return int.from_bytes(hashlib.sha256(f"pydocs {salt}\0{text}".encode()).digest()[:8], "big")


def rows_of(view: str, roots: Iterable[Path]) -> list[dict[str, str]]:
    """Return the rows of the view `labels` or `texts`, in their order."""
    if view == "labels":
        rows = balanced(labelled(docstrings(source_files(roots, PACKAGES))))
        return [{"text": text, "label": package} for package, text in rows]
    return [{"text": t} for t in dict.fromkeys(t for _, t in docstrings(source_files(roots)))]


def write(rows: Sequence[dict[str, str]], view: str, folder: Path) -> None:
    """Write rows into a new folder, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        (draft := Path(name, "rows")).mkdir()
        for split in SPLITS:
            lines = [json.dumps(row) for row in rows if split_of(row["text"], view) == split]
            (draft / f"{split}.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
        draft.rename(folder)


if __name__ == "__main__":
    view, folder = [*sys.argv[1:], *[""] * 2][:2]
    if view not in HELD_OUT:
        sys.exit(__doc__)
    gc.disable()  # trees of syntax have no cycles
    write(rows_of(view, source_roots()), view, Path(folder or f"runs/pydocs-{view}"))
