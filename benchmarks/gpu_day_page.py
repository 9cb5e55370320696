"""The page of `gpu_day.py`: machine, parts and numbers as Markdown, made from `results.json`.

The numbers of a part are values, which become one table, and lists of rows, which become a table
each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gpu_day_results import Outcome, Results

NOTE = (
    "**A rehearsal**: tiny sizes on a CPU. The numbers show that the parts run, and say nothing "
    "about a GPU."
)


def page_of(results: Results, abouts: Mapping[str, str]) -> str:
    """Return the page.

    Args:
        results: the outcomes.
        abouts: what all parts do, by name; a part without an outcome is listed as not run.
    """
    parts = results.parts
    abouts = {**abouts, **{name: found.about for name, found in parts.items()}}
    blocks = ["# First day on a GPU", *([NOTE] if results.is_rehearsal else [])]
    blocks += ["## Machine", *_tables(results.machine), "## Parts", _overview(parts, abouts)]
    for name in abouts:
        if name in parts:
            blocks += _part(name, parts[name])
    return "\n\n".join(blocks) + "\n"


def _overview(parts: Mapping[str, Outcome], abouts: Mapping[str, str]) -> str:
    rows = []
    for name, about in abouts.items():
        found = parts.get(name)
        rows.append(
            {
                "part": name,
                "state": found.state if found else "not run",
                "seconds": round(found.seconds) if found else None,
                "what": about,
                "reason": found.reason if found else "",
            }
        )
    return markdown_table(rows)


def _part(name: str, outcome: Outcome) -> list[str]:
    """Return the heading, the numbers, and the end of the output of a part that has failed."""
    blocks = [f"## {name}: {outcome.state}", outcome.about]
    blocks += [outcome.reason] if outcome.reason else []
    blocks += _tables(outcome.numbers)
    return [*blocks, f"```text\n{outcome.tail}\n```"] if outcome.tail else blocks


def _tables(numbers: Mapping[str, Any]) -> list[str]:
    """Return a table of the single values, and a table per list of rows."""
    values = [{"what": k, "value": v} for k, v in numbers.items() if not isinstance(v, list)]
    blocks = [markdown_table(values)] if values else []
    for title, rows in numbers.items():
        if isinstance(rows, list) and rows:
            blocks += [f"### {title}", markdown_table(rows)]
    return blocks


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with a column for every key; a missing value is an empty cell."""
    titles = list(dict.fromkeys(key for row in rows for key in row))
    lines = [titles, ["---"] * len(titles)]
    lines += [[_cell(row.get(title)) for title in titles] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
