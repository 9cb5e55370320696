"""Print docs/families.md: what megakd does with every family of the installed transformers.

    python benchmarks/families.py > docs/families.md     # about ten minutes
    python benchmarks/families.py --task mlm bert xlm-roberta

Each family is built small, with random weights, and asked. Progress is on standard error.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed prints what it finds
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import torch  # noqa: E402
from tiny_families import TYPES, build, small_configs  # noqa: E402
from transformers import logging  # noqa: E402

from megakd.config.task import LANGUAGE_TASKS  # noqa: E402
from megakd.data.batch import Batch  # noqa: E402
from megakd.errors import MegakdError, ModelError, one_line  # noqa: E402
from megakd.models.cutting import why_rigid  # noqa: E402
from megakd.models.fitting import ModelSource  # noqa: E402
from megakd.models.layers import check_depth, chosen_layers  # noqa: E402
from megakd.models.outputs import Needs, read_outputs  # noqa: E402
from megakd.models.packing import packing_of  # noqa: E402
from megakd.models.small_copy import no_cache  # noqa: E402
from megakd.models.structure import for_task  # noqa: E402
from megakd.models.views import Kind  # noqa: E402

LAYERS, STAY = 4, 2
TOKENS = 5 + torch.arange(24).reshape(2, 12) * 7 % 400
TITLE = "## Families"
NO, NOT_READ = "no", ""
MARKS = ONE_DOCUMENT, WARPED = "¹", "²"
APART = ("apart", NO)


class Row(NamedTuple):
    """What megakd does with a family: `cells` of the table, `marks` beside its name."""

    family: str
    task: str
    cells: str = NOT_READ
    marks: str = ""


def main() -> None:
    """Print the page, or the tables of some families."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TYPES, action="append")
    parser.add_argument("types", nargs="*", metavar="TYPE")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    rows, untried = [], set[str]()
    for task in asked.task or TYPES:
        for family in asked.types or sorted(TYPES[task]):
            tried = (row_of(family, config, task) for config in small_configs(family, task, LAYERS))
            row = next(filter(None, tried), None)
            print(row or f"{family}: not built", file=sys.stderr, flush=True)
            if row is None:
                untried.add(family)
            else:
                rows.append(row)
    if not asked.types:
        page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
        print(page.partition(TITLE)[0], end="")
    print("\n".join(table(rows, untried)))


def table(rows: list[Row], untried: set[str]) -> Iterator[str]:
    """Yield the lines of the table, in which families with the same cells are one row."""
    tasks: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        tasks.setdefault(row.family, {}).setdefault(row.cells, []).append(row)
    alike: dict[str, list[str]] = {}
    for family, answers in sorted(tasks.items()):
        for cells, same in answers.items():
            which = f" ({', '.join(row.task for row in same)})" if len(answers) > 1 else ""
            marks = "".join(mark for mark in MARKS if any(mark in row.marks for row in same))
            alike.setdefault(cells, []).append(f"`{family}`{marks}{which}")
    not_read = alike.pop(NOT_READ, [])
    yield TITLE
    yield ""
    yield (
        f"With transformers {version('transformers')}, {len(tasks) - len(not_read)} of "
        f"{len(tasks)} families that can be built small are read exactly."
    )
    yield ""
    yield "| Layers | Neurons | Heads | Width | Families |"
    yield "|---|---|---|---|---|"
    for cells, names in sorted(alike.items(), key=lambda item: -len(item[1])):
        yield f"{cells} {', '.join(names)} |"
    yield ""
    if not_read:
        yield f"* Not read: {', '.join(not_read)}."
    untried -= tasks.keys()
    if untried:
        names = ", ".join(f"`{name}`" for name in sorted(untried))
        yield f"* Not tried, because no small model of them can be built: {names}."


def row_of(family: str, config: Any, task: str) -> Row | None:
    """Return the row of a family; None if its small model does not run in transformers."""
    try:
        model = build(config, task)
        with torch.no_grad():
            expected = model(input_ids=TOKENS, **no_cache(model)).logits
    except Exception as error:  # noqa: BLE001 - any family may fail in its own way
        print(family, one_line(error), file=sys.stderr)
        return None
    config = model.config

    def tried(what: str, ask: Callable[[], str]) -> str:
        try:
            return ask()
        except MegakdError as error:
            print(f"{family}: {what}: {error}", file=sys.stderr)
            return NO

    def reads() -> str:
        for_task(config, task)
        return "yes" if is_same(logits_read(model, task), expected) else NO

    if tried("reads", reads) == NO:
        return Row(family, task)
    source = ModelSource(
        name=family,
        folder=None,
        config=config,
        architecture=for_task(config, task),
        where=family,
    )

    def layers() -> str:
        check_depth(source, chosen_layers(source, STAY), where=family)
        return "yes"

    cells = (
        tried("layers", layers),
        tried("neurons", lambda: units(source, "neurons")),
        tried("heads", lambda: units(source, "heads")),
        tried("width", lambda: width(source)),
    )
    marks = ""
    if task == "causal_lm" and tried("packed rows", lambda: packing_of(config, None)) in APART:
        marks += ONE_DOCUMENT
    warp = source.architecture.warp
    if task in LANGUAGE_TASKS and (warp.scale != 1 or warp.softcap is not None):
        marks += WARPED
    return Row(family, task, f"| {' | '.join(cells)} |", marks)


def logits_read(model: torch.nn.Module, task: str) -> torch.Tensor:
    """Return the logits that the losses compute of a model."""
    inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    if task == "causal_lm":
        inputs["position_ids"] = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    labels = TOKENS if task in LANGUAGE_TASKS else torch.zeros(len(TOKENS), dtype=torch.long)
    batch = Batch(inputs, labels, torch.ones_like(TOKENS, dtype=torch.bool))
    with torch.no_grad():
        read = read_outputs(model, batch, Needs())
        if read.logits is not None:
            return read.logits
        weight, bias = read.head.read()
        logits = torch.nn.functional.linear(read.hidden, weight, bias)
    return read.head.warp(logits)


def is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether logits are equal but for rounding."""
    return one.shape == other.shape and bool(
        (one - other).abs().max() <= 1e-5 * other.abs().max().clamp(min=1)
    )


def units(source: ModelSource, kind: Kind) -> str:
    """Return how a model without some units of a kind is written."""
    found = source.architecture.found_units(source.config)
    cuttable = found.heads if kind == "heads" else found.neurons
    if cuttable.why_fixed is not None:
        raise ModelError(cuttable.why_fixed)
    return "yes" if cuttable.keys or source.architecture.shares_bias else "file"


def width(source: ModelSource) -> str:
    """Return how a model with narrower hidden states is written; the reason is an error."""
    rigid = why_rigid(source.config, source.architecture)
    if rigid is not None:
        raise ModelError(rigid)
    found = source.architecture.found_units(source.config)
    is_stated = found.stating_width is not None or source.architecture.shares_bias
    return "yes" if is_stated else "file"


if __name__ == "__main__":
    main()
