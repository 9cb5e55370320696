"""Docstrings of the standard library and of installed packages, parsed without an import."""

from __future__ import annotations

import ast
import inspect
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from megakd.process.garbage import no_collections

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


class SourceFile(NamedTuple):
    """The file of one module.

    package: name of the top-level package or module that the file belongs to.
    """

    package: str
    name: str
    path: Path
    size: int
    modified_ns: int


class Docstring(NamedTuple):
    """One docstring, without indentation.

    module: dotted or slashed name of the file that contains the docstring.
    """

    package: str
    module: str
    text: str


def source_roots() -> list[Path]:
    """Return the folder of the standard library, then the folders of installed packages."""
    standard = Path(sysconfig.get_path("stdlib")).resolve()
    site = [Path(entry).resolve() for entry in sys.path if Path(entry).name in SITE_FOLDERS]
    return [root for root in dict.fromkeys([standard, *site]) if root.is_dir()]


def source_files(roots: Sequence[Path]) -> list[SourceFile]:
    """Return all modules below the roots, in an order that does not depend on the file system.

    A package that is in two roots is read from the first root, as an import would do.
    """
    found: list[SourceFile] = []
    for root in roots:
        earlier = {file.package for file in found}
        files = (file for file in _below(root) if file.package not in earlier)
        found += sorted(files, key=lambda file: file.name)
    return found


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
                yield Docstring(file.package, file.name, text)


def _below(root: Path) -> Iterator[SourceFile]:
    for folder, subfolders, names in os.walk(root):
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
                yield _source_file(root, path)


def _source_file(root: Path, path: Path) -> SourceFile:
    relative, status = path.relative_to(root), path.stat()
    return SourceFile(
        package=relative.parts[0].removesuffix(".py"),
        name=relative.as_posix(),
        path=path,
        size=status.st_size,
        modified_ns=status.st_mtime_ns,
    )


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
        text = ast.get_docstring(node, clean=False)
        if text is not None:
            # Source code can express a lone surrogate, UTF-8 cannot.
            clean = inspect.cleandoc(text).encode("utf-8", "ignore").decode("utf-8").strip()
            if clean:
                yield clean


def _definitions(
    node: ast.AST,
) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for block in BLOCKS:
        for child in getattr(node, block, None) or ():
            if isinstance(child, DEFINITIONS):
                yield child
            if isinstance(child, ast.stmt | ast.excepthandler):
                yield from _definitions(child)
