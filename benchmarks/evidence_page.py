"""The page of the evidence, drawn from the stored cells alone.

`python benchmarks/evidence_page.py` writes notebook/evidence.md and its pictures from the files of
notebook/evidence/: the stored cells of every comparison and setting, and notes.yaml with the
reasons that people have found.
"""

from __future__ import annotations

import os
import sys
import textwrap
from typing import TYPE_CHECKING, Any

import yaml
from evidence_cells import STORED, StoredCellError, read_stored, stored_path
from evidence_comparisons import COMPARISONS
from evidence_gates import assess
from evidence_others import ALL_COMPARISONS, titles_of
from evidence_pictures import forest_plot
from evidence_sentences import conclusion
from evidence_statistics import unit_of
from evidence_tables import compared_table, plain_table, spread
from launching import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from evidence_arms import Comparison
    from evidence_cells import Cell, Stored
    from evidence_gates import Assessed, Group

PAGE = ROOT / "benchmarks/notebook/evidence.md"
NOTES = "notes.yaml"
NOTE_KEYS = ("title", "page", "why", "tried", "paper_start")
WIDTH = 115
INTRODUCTION = ROOT / "benchmarks/evidence_introduction.md"


def draw(
    folder: Path, page: Path, comparisons: Mapping[str, Comparison] = ALL_COMPARISONS
) -> list[Path]:
    """Write the page of the stored cells and its pictures; return the written files.

    The files depend on the stored cells and notes alone. Pictures lie in `images/` next to the
    page; a picture of the evidence that is no longer drawn is removed.

    Args:
        folder: folder of the stored cells, with or without notes.yaml.
        page: file of the page.
        comparisons: by name, in the order of the page.

    Raises:
        StoredCellError: a file is damaged, of another version, or of an unknown comparison.
    """
    from megakd.storage.atomic import write_text

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
    """Return the stored settings of each comparison, both in the order of their definitions.

    Raises:
        StoredCellError: a file is damaged, of another version, of an unknown comparison, or has
            the name of another comparison or setting.
    """
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
    """Return the hand-written notes by comparison; empty if the file does not exist.

    Raises:
        StoredCellError: the file has another form, or a key or comparison that does not exist.
    """
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
    """Return the test scores of the teachers over the seeds."""
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


def main() -> int:
    """Draw the page."""
    try:
        for path in draw(STORED, PAGE):
            print(path)
    except StoredCellError as error:
        print(f"evidence: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
