"""Start a benchmark: `python benchmarks speed.overhead --ranks 2`, from the root of the repository.

Without a name, all benchmarks are listed. `--help` after a name shows the options.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from lib.launching import RunFailedError, UnusableError
from megakd.errors import MegakdError

HERE = Path(__file__).resolve().parent


def listed() -> Iterator[tuple[str, str]]:
    for path in sorted(HERE.glob("*/*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        is_program = any(getattr(node, "name", "") == "main" for node in tree.body)
        # `gpu_day.py` starts its parts.
        is_part = path.parent.name == "gpu_day"
        if is_program and not is_part:
            name = ".".join(path.relative_to(HERE).with_suffix("").parts)
            about = (ast.get_docstring(tree) or "").splitlines()[0]
            yield name.removesuffix(".__main__"), about


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(__doc__, *(f"{name:<28}{about}" for name, about in listed()), sep="\n")
        return 0
    name, *rest = arguments
    place = HERE.joinpath(*name.split("."))
    module = f"{name}.__main__" if place.is_dir() else name
    if not (place / "__main__.py" if place.is_dir() else place.with_suffix(".py")).is_file():
        print(f"benchmarks: error: there is no benchmark {name}; known:", file=sys.stderr)
        print(*(known for known, _ in listed()), sep="\n", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(module).main(rest)
    except (UnusableError, RunFailedError, MegakdError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
