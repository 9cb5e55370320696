"""Docstrings of the standard library and of the installed packages, parsed, never imported."""

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

# Tests document nothing, and vendored copies belong to another package.
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
    """One module. package: the name of the top-level package or module it belongs to."""

    package: str
    name: str
    path: Path
    size: int
    modified_ns: int


class Docstring(NamedTuple):
    """One docstring, unindented; module: the dotted or slashed name of the file it is in."""

    package: str
    module: str
    text: str


def source_roots() -> list[Path]:
    """The folder of the standard library, then those of the installed packages."""
    standard = Path(sysconfig.get_path("stdlib")).resolve()
    site = [Path(entry).resolve() for entry in sys.path if Path(entry).name in SITE_FOLDERS]
    return [root for root in dict.fromkeys([standard, *site]) if root.is_dir()]


def source_files(roots: Sequence[Path]) -> list[SourceFile]:
    """All modules below the roots, in an order that no file system decides.

    A package in two roots is taken from the first, as an import would.
    """
    found: list[SourceFile] = []
    for root in roots:
        earlier = {file.package for file in found}
        files = (file for file in _below(root) if file.package not in earlier)
        found += sorted(files, key=lambda file: file.name)
    return found


def read_docstrings(files: Sequence[SourceFile]) -> Iterator[Docstring | None]:
    """The docstrings of the files in their order; None for a file that is not Python."""
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
            # A link that leads nowhere is no file.
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
        # Old string escapes in other people's code are no business of this run.
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            # The parser reports nesting that is too deep as MemoryError.
            return None


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in (tree, *_definitions(tree)):
        text = ast.get_docstring(node, clean=False)
        if text is not None:
            # A lone surrogate can be written in source and not in UTF-8.
            clean = inspect.cleandoc(text).encode("utf-8", "ignore").decode("utf-8").strip()
            if clean:
                yield clean


def _definitions(
    node: ast.AST,
) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Definitions in source order; only statements are visited, which is ten times faster."""
    for block in BLOCKS:
        for child in getattr(node, block, None) or ():
            if isinstance(child, DEFINITIONS):
                yield child
            if isinstance(child, ast.stmt | ast.excepthandler):
                yield from _definitions(child)
