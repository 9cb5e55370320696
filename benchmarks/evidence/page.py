"""The page of the evidence, drawn from the stored cells alone.

`python benchmarks evidence --page` writes notebook/evidence.md and its pictures from the files of
notebook/evidence/: the stored cells of every comparison and setting, and notes.yaml with the
reasons that people have found.
"""

from __future__ import annotations

import math
import os
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from evidence.cells import (
    BASES,
    SAME_RUN,
    STORED,
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
from evidence.statistics import Assessed, Difference, Group, Unit, assess, unit_of
from lib.launching import ROOT
from lib.tables import markdown_table, mean_and_deviation
from megakd.storage.atomic import write_text

PAGE = ROOT / "benchmarks/notebook/evidence.md"
NOTES = "notes.yaml"
NOTE_KEYS = ("title", "page", "why", "tried", "paper_start")
WIDTH = 115
INTRODUCTION = ROOT / "benchmarks/evidence/introduction.md"


def draw(
    folder: Path, page: Path, comparisons: Mapping[str, Comparison] = ALL_COMPARISONS
) -> list[Path]:
    """Write the page of the stored cells and its pictures; return the written files.

    The files depend on the stored cells and notes alone. Pictures lie in `images/` next to the
    page; a picture of the evidence that is no longer drawn is removed.
    """
    found = read_folder(folder, comparisons)
    notes = read_notes(folder / NOTES, comparisons)
    raw = os.path.relpath(folder, page.parent)
    pictures = {
        f"evidence-{name}.svg": forest_plot(panels)
        for name, settings in found.items()
        if (panels := [one for one in settings if one.differences])
    }
    sections = [
        _section(name, comparisons[name], settings, notes=notes.get(name, {}), raw=raw)
        for name, settings in found.items()
    ]
    rest = [_wrapped(text) for text in (_missing(comparisons, found), _all_runs(found)) if text]
    images = page.parent / "images"
    for path in images.glob("evidence-*.svg"):
        if path.name not in pictures:
            path.unlink()
    written = {images / name: text for name, text in pictures.items()}
    written[page] = (
        "\n\n".join([INTRODUCTION.read_text(encoding="utf-8").rstrip(), *rest, *sections]) + "\n"
    )
    for path, text in written.items():
        write_text(path, text)
    return list(written)


def read_folder(folder: Path, comparisons: Mapping[str, Comparison]) -> dict[str, list[Assessed]]:
    found: dict[str, list[Assessed]] = {}
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
        assessed = assess(stored, comparisons[stored.comparison])
        found.setdefault(stored.comparison, []).append(assessed)
    return {
        name: sorted(found[name], key=lambda one: _place(one.stored))
        for name in comparisons
        if name in found
    }


def _place(stored: Stored) -> tuple[int, str]:
    names = [*titles_of(stored.comparison)]
    known = stored.setting in names
    return (names.index(stored.setting) if known else len(names), stored.setting)


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
            raise StoredCellError(
                f"{path}: {name} has the key {', '.join(other)}; the keys are "
                f"{', '.join(NOTE_KEYS)}"
            )
    return notes


def _missing(comparisons: Iterable[str], found: Mapping[str, Any]) -> str:
    names = ", ".join(f"`{name}`" for name in comparisons if name not in found)
    return f"No cell is stored yet of {names}." if names else ""


def _all_runs(found: Mapping[str, Sequence[Assessed]]) -> str:
    """Return how many runs of `evidence.py` are stored, and what their training has cost."""
    names = [name for name in found if name in COMPARISONS]
    runs = [run for name in names for one in found[name] for run in one.stored.runs()]
    if not runs:
        return ""
    return (
        f"The page has {_cost(runs)} that `evidence.py` trains, two side by side. The training of "
        "the teachers, and the start and evaluation of every run, come on top."
    )


def _cost(runs: Sequence[Cell]) -> str:
    hours = sum(run.cpu_seconds for run in runs) / 3600
    return f"{len(runs)} runs ({hours:.1f} hours of CPU time)"


def _section(
    name: str,
    comparison: Comparison,
    settings: Sequence[Assessed],
    *,
    notes: Mapping[str, Any],
    raw: str,
) -> str:
    title = notes.get("title", comparison.title)
    page = notes.get("page", comparison.page)
    blocks = [f"## {title}", _wrapped(f"The method and its options: [{page}](../../docs/{page}).")]
    if any(one.differences for one in settings):
        alt = f"Differences of the arms of {name} from {comparison.reference}, by setting"
        blocks.append(f"![{alt}](images/evidence-{name}.svg)")
    blocks.append(_wrapped(conclusion(settings, comparison.reference)))
    blocks += [_wrapped(f"**Why.** {notes['why']}")] if "why" in notes else []
    blocks += _tried(notes.get("tried"))
    blocks += [_setting(name, one, notes.get("paper_start"), raw) for one in settings]
    return "\n\n".join(blocks)


def _tried(tried: str | Sequence[str] | None) -> list[str]:
    """Return what was tried as a paragraph, or as a list of paragraphs."""
    if not tried:
        return []
    if isinstance(tried, str):
        return [_wrapped(f"**Tried.** {tried}")]
    return ["**Tried.**\n\n" + "\n".join(_bullet(item) for item in tried)]


def _setting(name: str, one: Assessed, paper_start: str | None, raw: str) -> str:
    stored = one.stored
    titles = titles_of(name)
    title = f", {titles[stored.setting]}" if stored.setting in titles else ""
    file = stored_path(STORED, name, stored.setting).name
    lines = [
        f"Data: `{stored.setting}`{title}.",
        f"Score: {stored.metric}, in {unit_of(stored).name}.",
        f"Start of the student: {_start(stored.start, paper_start)}.",
        *_teachers(one),
        *_machine(one),
        f"Trained: {_cost(stored.runs())}.",
        f"Raw cells: [{file}]({raw}/{file}).",
    ]
    compared = [group for group in one.groups if group.is_compared]
    others = [group for group in one.groups if not group.is_compared]
    blocks = [f"### {name} on {stored.setting}", _wrapped(" ".join(lines)), _gates(one.groups)]
    if compared:
        blocks += [_references(compared), compared_table(one, compared)]
    if others:
        blocks += [_not_compared(others), plain_table(stored, others)]
    return "\n\n".join(filter(None, blocks))


def _start(start: str, paper_start: str | None) -> str:
    return f"{start} (**the paper's: {paper_start}**)" if paper_start else start


def _teachers(one: Assessed) -> list[str]:
    finals: dict[str, list[float]] = {}
    for teacher in one.stored.teachers:
        finals.setdefault(teacher.teacher, []).append(teacher.final)
    decimals = unit_of(one.stored).decimals
    texts = [f"{name} {spread(finals[name], decimals)}" for name in sorted(finals)]
    return [f"Teachers' scores (sd): {', '.join(texts)}."] if texts else []


def _machine(one: Assessed) -> list[str]:
    facts = [one.stored.machine, *(f"{name} {v}" for name, v in one.stored.versions.items())]
    return [f"Machine: {', '.join(filter(None, facts))}."] if any(facts) else []


def _gates(groups: Sequence[Group]) -> str:
    """Return a line per gate; a gate with the same outcome in all groups has one line."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for group in groups:
        for gate in group.gates:
            lines.setdefault(gate, []).append(group.name)
    return "\n".join(
        _bullet(f"{gate}{_in_groups(names, len(groups))}: **{state}**; {says}.")
        for (gate, state, says), names in lines.items()
    )


def _in_groups(names: Sequence[str], count: int) -> str:
    shown = [name for name in names if name]
    return f" ({', '.join(shown)})" if shown and len(names) < count else ""


def _references(compared: Sequence[Group]) -> str:
    names = ", ".join(f"`{group.reference}`" for group in compared)
    return f"Reference{'s' if len(compared) > 1 else ''}, in bold: {names}."


def _not_compared(groups: Sequence[Group]) -> str:
    failed = [
        ", ".join(gate.name for gate in group.gates if gate.state == "failed") for group in groups
    ]
    reasons = [
        f"{group.name or 'all arms'} ({gates})" for group, gates in zip(groups, failed, strict=True)
    ]
    return _wrapped(f"**Not compared**, because a gate has failed: {'; '.join(reasons)}.")


def _wrapped(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), WIDTH, **_KEEP)


def _bullet(text: str) -> str:
    words = " ".join(text.split())
    return textwrap.fill(f"* {words}", WIDTH, subsequent_indent="  ", **_KEEP)


_KEEP: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


def compared_table(one: Assessed, groups: Iterable[Group]) -> str:
    """Return the Markdown table of the groups that are compared; the reference arms are bold."""
    shown = [
        _row(one, arm, is_reference=arm == group.reference)
        for group in groups
        for arm in sorted(group.arms, key=lambda arm: arm != group.reference)
    ]
    return markdown_table(shown)


def plain_table(stored: Stored, groups: Iterable[Group]) -> str:
    return markdown_table([_cells_of(stored, arm) for group in groups for arm in group.arms])


def _row(one: Assessed, arm: str, *, is_reference: bool) -> dict[str, str]:
    by_basis = {d.basis: d for d in one.differences if d.arm == arm}
    found = [by_basis.get(basis) for basis in BASES]
    cells = _cells_of(one.stored, arm)
    texts = [_difference_text(one.stored, each) for each in found]
    if is_reference:
        cells["arm"], texts = f"**{arm}**", ["reference", "reference"]
    tests = {
        "equal steps (95 %)": texts[0],
        "equal cost (95 %)": texts[1],
        "p after Holm": _both(found, lambda each: p_text(each.adjusted)),
        "verdict": " / ".join(dict.fromkeys(each.verdict for each in found if each)) or NONE,
        "pairs needed": _both(found, lambda each: str(each.pairs_needed or NONE)),
    }
    first = {key: cells.pop(key) for key in ("arm", "seeds", "score (sd)")}
    return {**first, **tests, **cells}


def _difference_text(stored: Stored, each: Difference | None) -> str:
    if each is None:
        return NONE
    unit = unit_of(stored)
    text = f"{signed(each.mean, unit)} ({signed(each.low, unit)} to {signed(each.high, unit)})"
    cells = len(stored.of(each.arm, each.basis))
    return text if each.pairs == cells else f"{text}, {each.pairs} pairs"


def _both(found: Sequence[Difference | None], text: Callable[[Difference], str]) -> str:
    """Return the texts of both bases; the first alone without a difference at equal cost."""
    said = [NONE if each is None else text(each) for each in found]
    return " / ".join(said if any(one is not None for one in found[1:]) else said[:1])


def _cells_of(stored: Stored, arm: str) -> dict[str, str]:
    decimals = unit_of(stored).decimals

    def joined(text: Callable[[Sequence[Cell]], str]) -> str:
        found = [list(stored.of(arm, basis).values()) for basis in BASES]
        return " / ".join(
            text(cells) if cells else NONE for cells in (found if found[1] else found[:1])
        )

    return {
        "arm": arm,
        "seeds": joined(_seeds),
        "score (sd)": joined(lambda cells: spread([c.score for c in cells], decimals)),
        "held-out KL": joined(_divergence),
        "steps": joined(lambda cells: whole([c.steps for c in cells])),
        "CPU s": joined(lambda cells: whole([c.cpu_seconds for c in cells])),
        "teacher rows": joined(lambda cells: whole([c.teacher_rows for c in cells])),
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


def whole(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):,.0f}"


def p_text(p: float) -> str:
    """Return a p-value with three decimals; a dash if it is NaN."""
    if math.isnan(p):
        return NONE
    return "<0.001" if p < 0.0005 else f"{p:.3f}"


METHOD_VERDICTS = {
    "worse": "**helps** in",
    "better": "**does not help** in",
    "cannot be told": "**cannot be told apart** in",
}
"""The verdict about the method, by the verdict about the control."""


NONE = "-"
"""The text of a value that does not exist."""


class Found(NamedTuple):
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
    controls = {arm for _, group in groups if (arm := _control(group))}
    found = [_found(one, group, each) for one, group in groups for each in _of(one, group)]
    sentences = [_headline(found, controls, reference), _others(found, controls, reference)]
    return (
        " ".join(filter(None, sentences)) or "**Cannot be told**: no two arms have a common seed."
    )


def signed(value: float, unit: Unit) -> str:
    """Return a difference with its sign; a dash if there is none."""
    return NONE if math.isnan(value) else f"{value:+.{unit.decimals}f}"


def _control(group: Group) -> str | None:
    return next((arm for arm in (group.plain, group.labels) if arm != group.reference), None)


def _of(one: Assessed, group: Group) -> Iterable[Difference]:
    return (each for each in one.differences if each.reference == group.reference)


def _found(one: Assessed, group: Group, difference: Difference) -> Found:
    return Found(one.stored.setting, group.name, unit_of(one.stored), difference)


def _headline(found: Sequence[Found], controls: Iterable[str], reference: str) -> str:
    """Return the sentence about the method and its control."""
    against = [one for one in found if one.difference.arm in set(controls)]
    names = ", ".join(dict.fromkeys(f"`{named(one.difference.arm)}`" for one in against))
    clauses = [
        f"at equal {basis}, `{reference}` {said}"
        for basis in BASES
        if (said := _verdicts(against, basis))
    ]
    return f"Compared with {names} {'; '.join(clauses)}." if clauses else ""


def _verdicts(found: Sequence[Found], basis: Basis) -> str:
    """Return the method's verdicts with the places, the gains and their intervals."""
    said = []
    for verdict, words in METHOD_VERDICTS.items():
        gains = [
            f"{one.setting}{f', {one.group}' if one.group else ''} ({_gain(one)})"
            for one in found
            if one.difference.basis == basis and one.difference.verdict == verdict
        ]
        said += [f"{words} {', '.join(gains)}"] if gains else []
    return ", ".join(said)


def _gain(one: Found) -> str:
    """Return the method's score less the control's, with the interval."""
    mean, low, high = (
        signed(-value + 0.0, one.unit)
        for value in (one.difference.mean, one.difference.high, one.difference.low)
    )
    between = "one pair or no spread" if low == NONE else f"95 % interval {low} to {high}"
    return f"{mean} {one.unit.name}, {between}"


def _others(found: Sequence[Found], controls: Iterable[str], reference: str) -> str:
    """Return the sentence about the arms that are not the control; each run counts once."""
    others = [one for one in found if one.difference.arm not in set(controls)]
    bases = defaultdict[Found, list[Basis]](list)
    for one in others:
        bases[one._replace(difference=replace(one.difference, basis=BASES[0]))].append(
            one.difference.basis
        )
    better, worse, untold = (
        [one for one in bases if one.difference.verdict == verdict]
        for verdict in ("better", "worse", "cannot be told")
    )
    if not others:
        return ""
    names = "; ".join(
        f"`{one.difference.arm}` in {one.setting} at equal {' and '.join(bases[one])}, "
        f"{signed(one.difference.mean, one.unit)} {one.unit.name}"
        for one in better
    )
    return (
        f"Differences of the other arms: {len(better)} in favour of the other arm"
        f"{f' ({names})' if names else ''}, {len(worse)} in favour of `{reference}`, "
        f"{len(untold)} that cannot be told from zero."
    )
