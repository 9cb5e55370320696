"""The page of the evidence, drawn from the stored cells alone.

`python benchmarks evidence --page` writes notebook/evidence.md and its pictures from the files of
notebook/evidence/: the stored cells of every comparison and setting, and notes.yaml with the
reasons that people have found. The words of the page are in page.md.jinja.
"""

from __future__ import annotations

import math
import os
import re
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml
from jinja2 import Environment, StrictUndefined

from evidence.cells import (
    BASES,
    SAME_RUN,
    Basis,
    Cell,
    Stored,
    StoredCellError,
    read_stored,
    stored_path,
)
from evidence.comparisons import COMPARISONS, Comparison, named
from evidence.others import ALL_COMPARISONS, titles_of
from evidence.pictures import forest_plot
from evidence.statistics import Assessed, Difference, Gate, Group, Unit, Verdict, assess, unit_of
from lib.tables import markdown_table, mean_and_deviation
from megakd.storage.atomic import write_text

HERE = Path(__file__).parent
NOTES = "notes.yaml"
NOTE_KEYS = ("title", "page", "why", "tried", "paper_start")
NONE = "-"
"""The text of a value that does not exist."""
METHOD_VERDICTS = {
    "worse": "**helps** in",
    "perhaps worse": "**perhaps helps** in",
    "better": "**does not help** in",
    "perhaps better": "**perhaps does not help** in",
    "cannot be told": "**cannot be told apart** in",
}
"""The verdict about the method, by the verdict about the control."""


def draw(
    folder: Path, page: Path, comparisons: Mapping[str, Comparison] = ALL_COMPARISONS
) -> list[Path]:
    """Write the page of the stored cells and its pictures; return the written files.

    The files depend on the stored cells and notes alone. Pictures lie in `images/` next to the
    page; a picture of the evidence that is no longer drawn is removed.
    """
    notes = read_notes(folder / NOTES, comparisons)  # first: the cells take seconds
    assessed = read_folder(folder, comparisons)
    text = rendered(assessed, notes, comparisons, os.path.relpath(folder, page.parent))
    images = page.parent / "images"
    written = {
        images / f"evidence-{name}.svg": forest_plot(panels)
        for name, settings in assessed.items()
        if (panels := [one for one in settings if one.differences])
    }
    for path in images.glob("evidence-*.svg"):
        if path not in written:
            path.unlink()
    written[page] = text
    for path, content in written.items():
        write_text(path, content)
    return list(written)


def rendered(
    assessed: Mapping[str, Sequence[Assessed]],
    notes: Mapping[str, Mapping[str, Any]],
    comparisons: Mapping[str, Comparison],
    raw: str,
) -> str:
    environment = Environment(  # noqa: S701 - the page is Markdown
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    wrap = partial(textwrap.fill, width=115, break_long_words=False, break_on_hyphens=False)
    environment.filters |= {
        "wrapped": lambda text: wrap(" ".join(text.split())),
        "bullet": lambda text: wrap(f"* {' '.join(text.split())}", subsequent_indent="  "),
        "cost": cost,
    }
    functions = (conclusion, unit_of, teachers, machine, gates, compared_table, plain_table)
    template = environment.from_string((HERE / "page.md.jinja").read_text(encoding="utf-8"))
    text = template.render(
        {function.__name__: function for function in functions},
        introduction=(HERE / "introduction.md").read_text(encoding="utf-8").rstrip(),
        titles_of=lambda name: defaultdict(str, titles_of(name)),
        missing=", ".join(f"`{name}`" for name in comparisons if name not in assessed),
        runs=[
            c for n in assessed if n in COMPARISONS for s in assessed[n] for c in s.stored.runs()
        ],
        sections=[
            (name, comparisons[name], dict.fromkeys(NOTE_KEYS) | notes.get(name, {}), settings)
            for name, settings in assessed.items()
        ],
        raw=raw,
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def read_folder(folder: Path, comparisons: Mapping[str, Comparison]) -> dict[str, list[Assessed]]:
    assessed: dict[str, list[Assessed]] = {name: [] for name in comparisons}
    for path in sorted(folder.glob("*.json")):
        stored = read_stored(path)
        if stored.comparison not in comparisons:
            raise StoredCellError(
                f"{path}: cells of the comparison {stored.comparison}, which does not exist; there "
                f"are {', '.join(comparisons)}; move the file away"
            )
        if path != stored_path(folder, stored.comparison, stored.setting):
            raise StoredCellError(
                f"{path}: cells of {stored.comparison} in the setting {stored.setting}, which "
                f"belong to {stored_path(folder, stored.comparison, stored.setting).name}"
            )
        assessed[stored.comparison].append(assess(stored, comparisons[stored.comparison]))
    for name, settings in assessed.items():
        order = {setting: place for place, setting in enumerate(titles_of(name))}
        settings.sort(key=lambda one, order=order: order.get(one.stored.setting, len(order)))
    return {name: settings for name, settings in assessed.items() if settings}


def read_notes(path: Path, known: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the hand-written notes by comparison; empty if the file does not exist."""
    if not path.is_file():
        return {}
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        notes = {name: dict(note) for name, note in tree.items()}
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise StoredCellError(f"{path}: no mapping of comparisons to notes ({error})") from error
    if unknown := sorted(notes.keys() - set(known)):
        raise StoredCellError(
            f"{path}: notes on {', '.join(unknown)}; the comparisons are {', '.join(known)}"
        )
    for name, note in notes.items():
        if other := sorted(note.keys() - set(NOTE_KEYS)):
            keys = f"{', '.join(other)}; the keys are {', '.join(NOTE_KEYS)}"
            raise StoredCellError(f"{path}: {name} has the key {keys}")
    return notes


def cost(runs: Sequence[Cell]) -> str:
    hours = sum(run.cpu_seconds for run in runs) / 3600
    return f"{len(runs)} runs ({hours:.1f} hours of CPU time)"


def teachers(stored: Stored) -> str:
    finals = defaultdict[str, list[float]](list)
    for teacher in stored.teachers:
        finals[teacher.teacher].append(teacher.final)
    decimals = unit_of(stored).decimals
    return ", ".join(f"{name} {spread(finals[name], decimals)}" for name in sorted(finals))


def machine(stored: Stored) -> str:
    facts = [stored.machine, *(f"{name} {version}" for name, version in stored.versions.items())]
    return ", ".join(filter(None, facts))


def gates(groups: Sequence[Group]) -> list[tuple[Gate, str]]:
    """Return the gates with their groups; a gate with one outcome in all groups names none."""
    groups_of = defaultdict[Gate, list[str]](list)
    for group in groups:
        for gate in group.gates:
            groups_of[gate].append(group.name)
    return [
        (gate, f" ({', '.join(filter(None, names))})" if len(names) < len(groups) else "")
        for gate, names in groups_of.items()
    ]


def compared_table(one: Assessed, groups: Iterable[Group]) -> str:
    return markdown_table([
        _row(one, arm, is_reference=arm == group.reference)
        for group in groups
        for arm in sorted(group.arms, key=lambda arm: arm != group.reference)
    ])  # fmt: skip


def plain_table(stored: Stored, groups: Iterable[Group]) -> str:
    return markdown_table([_cells_of(stored, arm) for group in groups for arm in group.arms])


def _row(one: Assessed, arm: str, *, is_reference: bool) -> dict[str, str]:
    by_basis = {d.basis: d for d in one.differences if d.arm == arm}
    of_bases = [by_basis.get(basis) for basis in BASES]
    cells = _cells_of(one.stored, arm)
    texts = [_difference_text(one.stored, each) for each in of_bases]
    if is_reference:
        cells["arm"], texts = f"**{arm}**", ["reference", "reference"]
    both = partial(_by_basis, of_bases)
    return {
        **{key: cells.pop(key) for key in ("arm", "seeds", "score (sd)")},
        "equal steps (95 %)": texts[0],
        "equal cost (95 %)": texts[1],
        "p after Holm": both(lambda each: p_text(each.adjusted)),
        "paired t (p)": both(paired_text),
        "verdict": " / ".join(dict.fromkeys(each.verdict for each in of_bases if each)) or NONE,
        "pairs needed": both(lambda each: str(each.pairs_needed or NONE)),
        **cells,
    }


def _by_basis(of_bases: Sequence[Any], text: Callable[[Any], str]) -> str:
    """Join the texts of both bases; the first alone without a value at equal cost."""
    shown = [text(one) if one else NONE for one in of_bases]
    return " / ".join(shown if of_bases[1] else shown[:1])


def _difference_text(stored: Stored, each: Difference | None) -> str:
    if each is None:
        return NONE
    mean, low, high = (signed(x, unit_of(stored)) for x in (each.mean, each.low, each.high))
    pairs = "" if each.pairs == len(stored.of(each.arm, each.basis)) else f", {each.pairs} pairs"
    return f"{mean} ({low} to {high}){pairs}"


def _cells_of(stored: Stored, arm: str) -> dict[str, str]:
    decimals = unit_of(stored).decimals
    of_bases = [list(stored.of(arm, basis).values()) for basis in BASES]
    joined = partial(_by_basis, of_bases)

    def whole(field: str) -> str:
        return joined(lambda cells: f"{statistics.fmean(getattr(c, field) for c in cells):,.0f}")

    return {
        "arm": arm,
        "seeds": joined(_seeds),
        "score (sd)": joined(lambda cells: spread([c.score for c in cells], decimals)),
        "held-out KL": joined(_divergence),
        "steps": whole("steps"),
        "CPU s": whole("cpu_seconds"),
        "teacher rows": whole("teacher_rows"),
    }


def _seeds(cells: Sequence[Cell]) -> str:
    """Return the number of cells, and how many of them are copies of the reference's."""
    same = sum(SAME_RUN in cell.details for cell in cells)
    return f"{len(cells)} ({same} same)" if same else str(len(cells))


def _divergence(cells: Sequence[Cell]) -> str:
    values = [cell.divergence for cell in cells if cell.divergence is not None]
    return spread(values, 4) if values else NONE


def spread(values: Sequence[float], decimals: int) -> str:
    """Return mean and standard deviation; a single value has no deviation."""
    mean, deviation = mean_and_deviation(values)
    text = f"{mean:.{decimals}f}"
    return f"{text} ({deviation:.{decimals}f})" if len(values) > 1 else text


def p_text(p: float) -> str:
    if math.isnan(p):
        return NONE
    return "<0.001" if p < 0.0005 else f"{p:.3f}"


def paired_text(each: Difference) -> str:
    if math.isnan(each.paired_t):
        return NONE
    return f"{each.paired_t:+.1f} ({p_text(each.paired_p)})"


def signed(value: float, unit: Unit) -> str:
    return NONE if math.isnan(value) else f"{value:+.{unit.decimals}f}"


class Placed(NamedTuple):
    """A difference with its setting and its group."""

    setting: str
    group: str
    unit: Unit
    difference: Difference


def conclusion(settings: Sequence[Assessed], reference: str) -> str:
    """Return whether the method helps, against plain distillation and against the other arms.

    Plain distillation is replaced by labels alone in a comparison without plain distillation.
    """
    groups = [(one, group) for one in settings for group in one.groups if group.is_compared]
    if not groups:
        return "**Not compared**: no setting passes its gates, so nothing is said about the method."
    controls = {
        next((arm for arm in (group.plain, group.labels) if arm != group.reference), None)
        for _, group in groups
    }
    placed = [
        Placed(one.stored.setting, group.name, unit_of(one.stored), each)
        for one, group in groups
        for each in one.differences
        if each.reference == group.reference
    ]
    against = [one for one in placed if one.difference.arm in controls]
    others = [one for one in placed if one.difference.arm not in controls]
    sentences = " ".join(filter(None, (_headline(against, reference), _others(others, reference))))
    return sentences or "**Cannot be told**: no two arms have a common seed."


def _headline(against: Sequence[Placed], reference: str) -> str:
    names = ", ".join(dict.fromkeys(f"`{named(one.difference.arm)}`" for one in against))
    clauses = [
        f"at equal {basis}, `{reference}` {verdicts}"
        for basis in BASES
        if (verdicts := _verdicts([one for one in against if one.difference.basis == basis]))
    ]
    return f"Compared with {names} {'; '.join(clauses)}." if clauses else ""


def _verdicts(placed: Sequence[Placed]) -> str:
    gains = {verdict: list[str]() for verdict in METHOD_VERDICTS}
    for one in placed:
        place = f"{one.setting}, {one.group}" if one.group else one.setting
        # The method's score less the control's.
        mean, low, high = (
            signed(-value + 0.0, one.unit)
            for value in (one.difference.mean, one.difference.high, one.difference.low)
        )
        between = "one pair or no spread" if low == NONE else f"95 % interval {low} to {high}"
        gains[one.difference.verdict].append(f"{place} ({mean} {one.unit.name}, {between})")
    return ", ".join(
        f"{METHOD_VERDICTS[v]} {', '.join(places)}" for v, places in gains.items() if places
    )


def _others(others: Sequence[Placed], reference: str) -> str:
    """Return the sentence about the arms that are not the control; each run counts once."""
    if not others:
        return ""
    bases = defaultdict[Placed, list[Basis]](list)
    for one in others:
        same = replace(one.difference, basis=BASES[0])
        bases[one._replace(difference=same)].append(one.difference.basis)
    by_verdict: dict[Verdict, list[Placed]] = {
        verdict: [one for one in bases if one.difference.verdict == verdict]
        for verdict in get_args(Verdict)
    }

    def names(verdict: Verdict) -> str:
        listed = "; ".join(
            f"`{one.difference.arm}` in {one.setting} at equal {' and '.join(bases[one])}, "
            f"{signed(one.difference.mean, one.unit)} {one.unit.name}"
            for one in by_verdict[verdict]
        )
        return f"{len(by_verdict[verdict])}{f' ({listed})' if listed else ''}"

    favoured = {"perhaps better": "the other arm", "perhaps worse": f"`{reference}`"}
    perhaps = "".join(
        f"{names(verdict)} perhaps in favour of {whom}, "
        for verdict, whom in favoured.items()
        if by_verdict[verdict]
    )
    return (
        f"Differences of the other arms: {names('better')} in favour of the other arm, "
        f"{len(by_verdict['worse'])} in favour of `{reference}`, {perhaps}"
        f"{len(by_verdict['cannot be told'])} that cannot be told from zero."
    )
