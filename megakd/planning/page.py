"""Text of a plan: a table of memory, a table of phases, and whether the run fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from megakd.planning.cluster import GIGA
from megakd.planning.ledger import PARTS
from megakd.reports.table import aligned_rows

if TYPE_CHECKING:
    from megakd.planning.memory_plan import Plan


def page(plan: Plan) -> str:
    """Return the text that `megakd plan` prints."""
    tables = ("\n".join(aligned_rows(rows)) for rows in (_parts(plan), _phases(plan)))
    return "\n\n".join([_head(plan), *tables, *_calls(plan), _verdict(plan)])


def _head(plan: Plan) -> str:
    cluster = plan.cluster
    nodes = f"{cluster.nodes} node{'s' if cluster.nodes > 1 else ''}"
    ranks = f"{cluster.ranks} rank{'s' if cluster.ranks > 1 else ''}"
    memory = ""
    if cluster.device == "cuda" and cluster.device_memory:
        memory = f" of {cluster.device_memory / GIGA:,.0f} GB"
    elif cluster.host_memory:
        memory = f", {cluster.host_memory / GIGA:,.0f} GB a node"
    kind = "GPU" if cluster.device == "cuda" else "CPU"
    return f"{plan.config.method.name} on {ranks} ({kind}{memory}), {nodes}; GB per rank"


def _parts(plan: Plan) -> list[list[str]]:
    peak = plan.highest.ledger.peaks["device"]
    roles = sorted({share.role for share in peak.shares}, reverse=True)
    rows = [[f"{plan.highest.name}: {peak.when}", *roles]]
    for part in PARTS:
        cells = [
            sum(s for share, s in peak.shares.items() if (share.role, share.part) == (role, part))
            for role in roles
        ]
        if any(cells):
            rows.append([part, *(_gigabytes(cell) for cell in cells)])
    sums = {"kept by the C library": peak.total - sum(peak.shares.values()), "together": peak.total}
    blank = [""] * (len(roles) - 1)
    rows += [[name, _gigabytes(size), *blank] for name, size in sums.items() if size]
    return rows


def _phases(plan: Plan) -> list[list[str]]:
    head = ["phase", "peak", "at", "host", "loading", "network/step", "s/step"]
    is_pruned = any(phase.pruned for phase in plan.phases)
    rows = [[head[0], *(["width", "weights"] if is_pruned else []), *head[1:]]]
    for phase in plan.as_json()["phases"]:
        seconds = phase["seconds_per_step"]
        rows.append(
            [
                phase["name"] if phase["required"] else f"{phase['name']} (optional)",
                *(_left(phase["pruned_to"]) if is_pruned else []),
                _gigabytes(phase["peak_bytes_per_rank"]),
                phase["peak_moment"],
                _gigabytes(phase["host_bytes_per_rank"]) if plan.cluster.device == "cuda" else "-",
                _gigabytes(phase["load_peak_bytes_per_rank"]),
                _gigabytes(phase["network_bytes_per_step"]) if phase["flops_per_step"] else "-",
                "-" if seconds is None else f"{seconds:.3g}",
            ]
        )
    return rows


def _calls(plan: Plan) -> list[str]:
    """Return a paragraph on forwards of the teacher that are not one per micro-batch, if any."""
    lines = [
        f"{phase.name}: {name} answers {count} micro-batches in one forward "
        f"({plan.config.key_of(name)}.micro_batches_per_call)"
        for phase in plan.phases
        for name, count in phase.per_call.items()
    ]
    for phase in plan.phases:
        if phase.forwards:
            one = plan.seconds_of(phase)
            time = "" if one is None else f", {one * phase.forwards:.3g} s together"
            lines.append(f"{phase.name}: {phase.forwards} forwards of the teacher{time}")
    return ["\n".join(lines)] if lines else []


def _left(size: Mapping[str, int] | None) -> list[str]:
    """Return the width and the number of weights of a learner after it was pruned in a phase."""
    return ["-", "-"] if size is None else [str(size["width"]), f"{size['parameters']:,}"]


def _verdict(plan: Plan) -> str:
    base = plan.host_base_bytes
    text = f"In addition, the process of a rank takes {_gigabytes(base)} GB of the host's memory."
    if plan.cluster.device == "cpu":
        text += f" Total: {_gigabytes(plan.peak_bytes_per_rank + base)} GB per rank."
    if plan.fits is None:
        return f"{text}\nThe plan cannot say whether the run fits; set --gpu_memory_gb."
    if plan.fits:
        return f"{text}\nThe run fits."
    text += f"\nThe run does not fit: {_gigabytes(plan.overflow)} GB per rank are missing."
    if not plan.changes:
        return f"{text} No setting that megakd tried makes the run fit."
    changes = (
        f"  {' '.join(change.settings)}  ({_gigabytes(change.peak_bytes_per_rank)} GB)"
        for change in plan.changes
    )
    return "\n".join([f"{text} Each of these changes is enough:", *changes])


def _gigabytes(size: float) -> str:
    digits = 1 if size >= 10 * GIGA else 2 if size >= GIGA else 3
    return f"{size / GIGA:,.{digits}f}"
