"""Print docs/families.md: what megakd does with every family of the installed transformers.

    python benchmarks/families.py > docs/families.md     # about ten minutes
    python benchmarks/families.py --task mlm bert xlm-roberta

Each family is built small, with random weights, and asked. Progress is on standard error.
"""

from __future__ import annotations

import argparse
import os
import re
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
from megakd.models.knowledge import Needs, read_knowledge  # noqa: E402
from megakd.models.layers import check_depth  # noqa: E402
from megakd.models.packing import packing_of  # noqa: E402
from megakd.models.small_copy import no_cache  # noqa: E402
from megakd.models.structure import for_task  # noqa: E402
from megakd.models.views import Kind  # noqa: E402

LAYERS, STAY = 4, (1, 4)
TOKENS = 5 + torch.arange(24).reshape(2, 12) * 7 % 400
TITLES = {
    "causal_lm": "Decoders (`task.type: causal_lm`)",
    "mlm": "Masked language models (`mlm`)",
    "classification": "Classifiers (`classification`, `regression`)",
}
PACKED = {"positions": "yes", "mask": "with masks", "masks_by_type": "with masks", "apart": "no"}
NO, READ = "no", "exactly"


class Row(NamedTuple):
    """What megakd does with a family; `why` has the reasons for each no."""

    family: str
    reads: str
    logits: str = ""
    depth: str = ""
    neurons: str = ""
    heads: str = ""
    width: str = ""
    packing: str = ""
    why: tuple[str, ...] = ()


def main() -> None:
    """Print the page, or the tables of some families."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TYPES, action="append")
    parser.add_argument("types", nargs="*", metavar="TYPE")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    if not asked.types:
        page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
        print(page.partition("\n## Decoders")[0].rstrip())
    for task in asked.task or TYPES:
        print("\n".join(["", *table(task, asked.types or sorted(TYPES[task]))]))


def table(task: str, types: list[str]) -> Iterator[str]:
    """Yield the lines of the table of a task, and the reasons below it."""
    rows, unbuilt = [], []
    for family in types:
        tried = (row_of(family, config, task) for config in small_configs(family, task, LAYERS))
        row = next(filter(None, tried), None)
        print(row or f"{family}: not built", file=sys.stderr, flush=True)
        if row is None:
            unbuilt.append(family)
        else:
            rows.append(row)
    reads = sum(row.reads == READ for row in rows)
    yield f"## {TITLES[task]}"
    yield ""
    yield (
        f"{reads} of {len(rows)} families that can be built small are read exactly, with "
        f"transformers {version('transformers')}."
    )
    yield ""
    columns = ["Reads", "Logits", "Layers", "Neurons", "Heads", "Width"]
    columns += ["Packed rows"] * (task == "causal_lm")
    yield f"| {' | '.join(columns)} | Families |"
    yield "|---" * (len(columns) + 1) + "|"
    alike: dict[str, list[str]] = {}
    for row in rows:
        alike.setdefault(cells_of(row, len(columns)), []).append(f"`{row.family}`")
    for cells, names in sorted(alike.items(), key=lambda item: -len(item[1])):
        yield f"{cells} {', '.join(names)} |"
    yield ""
    yield "Why not:"
    yield ""
    families: dict[str, list[str]] = {}
    for row in rows:
        for reason in row.why:
            families.setdefault(reason, []).append(row.family)
    yield from (f"* {reason}: {', '.join(names)}." for reason, names in sorted(families.items()))
    if unbuilt:
        names = ", ".join(f"`{name}`" for name in unbuilt)
        yield f"* Not tried, because no small model of them can be built: {names}."


def cells_of(row: Row, columns: int) -> str:
    """Return the cells of a row in a table, in which families with the same cells are one row."""
    return f"| {' | '.join(row[1 : columns + 1])} |"


def row_of(family: str, config: Any, task: str) -> Row | None:
    """Return the row of a family; None if its small model does not run in transformers."""
    try:
        model = build(config, task)
        with torch.no_grad():
            expected = model(input_ids=TOKENS, **no_cache(model)).logits
    except Exception as error:  # noqa: BLE001 - any family may fail in its own way
        print(family, one_line(error), file=sys.stderr)
        return None
    config, why = model.config, list[str]()

    def tried(what: str, ask: Callable[[], str]) -> str:
        try:
            return ask()
        except MegakdError as error:
            reason = str(error).removeprefix(f"{family}: ").partition("; ")[0]
            # What torch says of shapes differs by family.
            reason = re.sub(r"(does not compute what is left of it) \(.*", r"\1", reason)
            for name in (f"a {family} model", f"a {config.model_type} model"):
                reason = reason.replace(name, "the model")
            if not reason.startswith("of its heads"):  # those are listed by themselves
                why.append(f"{what}: {reason}")
            return NO

    def reads() -> str:
        for_task(config, task)
        same = is_same(logits_read(model, task), expected)
        return READ if same else "with other logits"

    answer = tried("reads", reads)
    if answer == NO:
        return Row(family, NO, why=tuple(why))
    architecture = for_task(config, task)
    source = ModelSource(
        name=family, folder=None, config=config, architecture=architecture, where=family
    )
    return Row(
        family,
        answer,
        " ".join(warp_of(source, task)),
        tried("layers", lambda: check_depth(source, STAY, where=family) or "yes"),
        tried("neurons", lambda: units(source, "neurons")),
        tried("heads", lambda: units(source, "heads")),
        tried("width", lambda: width(source)),
        tried("packed rows", lambda: PACKED[packing_of(config, None)])
        if task == "causal_lm"
        else "",
        tuple(why),
    )


def warp_of(source: ModelSource, task: str) -> Iterator[str]:
    """Yield the factor and the cap of the logits, where there are any."""
    warp = source.architecture.warp
    if task in LANGUAGE_TASKS and warp.scale != 1:
        yield f"times {warp.scale:g}"
    if task in LANGUAGE_TASKS and warp.softcap is not None:
        yield f"cap {warp.softcap:g}"


def logits_read(model: torch.nn.Module, task: str) -> torch.Tensor:
    """Return the logits that the losses compute of a model."""
    inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    if task == "causal_lm":
        inputs["position_ids"] = torch.arange(TOKENS.shape[1]).expand_as(TOKENS)
    labels = TOKENS if task in LANGUAGE_TASKS else torch.zeros(len(TOKENS), dtype=torch.long)
    batch = Batch(inputs, labels, torch.ones_like(TOKENS, dtype=torch.bool))
    with torch.no_grad():
        read = read_knowledge(model, batch, Needs())
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
    """Return how a model without some units of a kind is written; the reason is an error."""
    found = source.architecture.found_units(source.config)
    cuttable = found.heads if kind == "heads" else found.neurons
    if cuttable.uncut is not None:
        raise ModelError(cuttable.uncut)
    return "yes" if cuttable.keys or source.architecture.shares_bias else "with its file"


def width(source: ModelSource) -> str:
    """Return how a model with narrower hidden states is written; the reason is an error."""
    rigid = why_rigid(source.config, source.architecture)
    if rigid is not None:
        raise ModelError(rigid)
    found = source.architecture.found_units(source.config)
    is_stated = found.stating_width is not None or source.architecture.shares_bias
    return "yes" if is_stated else "with its file"


if __name__ == "__main__":
    main()
