"""`megakd plan`: memory, network and time of a run, computed before anything is loaded."""

from __future__ import annotations

from dataclasses import replace

import psutil

from megakd.config.run import RunConfig
from megakd.errors import ConfigError
from megakd.planning.advice import Case, find_changes
from megakd.planning.cluster import Cluster
from megakd.planning.memory_plan import Plan
from megakd.planning.simulated_phase import Traces
from megakd.planning.sources import planned_sources
from megakd.planning.stages import PlanningLab
from megakd.planning.timeline import Timeline

MISCELLANY = 60_000_000
"""Bytes of a process in addition to its imports.

They hold the process group, data, the tokenizer, and code that DeepSpeed loads at first use.

Measured on CPU ranks: 15 MB before the first model, 45 MB by the end of the first step.
"""


def plan_run(
    config: RunConfig,
    cluster: Cluster,
    *,
    advise: bool = True,
    traces: Traces | None = None,
) -> Plan:
    """Plan a run from configs only, and search for changes if the run does not fit.

    Args:
        config: config of the run.
        cluster: machines of the run.
        advise: whether to search for changes.
        traces: traces of earlier plans, which take most of the time; None: no earlier
            traces.

    Raises:
        MegakdError: a model's config cannot be read, or the run cannot work.
    """
    if config.task.max_length is None:
        raise ConfigError(
            "task.max_length: missing, and a plan reads no data; set it to the tokens of the "
            "longest row to plan for (a run takes the length of 99 % of the training rows)"
        )
    base, known = host_base_bytes(), Traces() if traces is None else traces

    def planned(case: Case) -> Plan:
        ranks, device = case.cluster.ranks, case.cluster.device
        lab = PlanningLab(case.config, planned_sources(case.config), ranks=ranks, device=device)
        phases = [Timeline(phase, case.config, case.cluster, known).play() for phase in lab.play()]
        return Plan(config=case.config, cluster=case.cluster, phases=phases, host_base_bytes=base)

    case = Case(config, cluster)
    plan = planned(case)
    if plan.fits is not False or not advise:
        return plan
    return replace(plan, changes=find_changes(case, planned))


def host_base_bytes() -> int:
    """Return the bytes of a rank's process before its models are built.

    The result is the size of this process, after the imports of a run, plus `MISCELLANY`.
    """
    from megakd.reports import html
    from megakd.training import progress, stage_run

    del html, progress, stage_run
    return psutil.Process().memory_info().rss + MISCELLANY
