"""Configs of runs that are planned and never started, and their plans."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tiny_runs import write_config

from megakd.config.file import load_config
from megakd.config.run import RunConfig
from megakd.models.fitting import ReadyTeacher
from megakd.models.outputs import Needs
from megakd.reports.plan import Cluster, PhasePlan, Plan, plan_run
from megakd.reports.plan_phases import planned_sources
from megakd.training.precision import joins_micro_batches, largest_step

CLASSES = {"type": "classification", "dataset": "anything", "max_length": 16}
CAUSAL = {**CLASSES, "type": "causal_lm"}
PROCESS = 1000
"""Bytes of a rank's process, so that plans of different tests can be compared."""
_PLANS: dict[str, Plan] = {}


def config_of(folder: Path, *overrides: str, **sections: Any) -> RunConfig:
    """A run of the method `single`; `sections` are added, or replace those here."""
    tree: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "task": CLASSES,
        "method": {"name": "single"},
        "train": {"per_device_train_batch_size": 4},
    }
    return load_config(write_config(folder / "run.yaml", tree | sections), overrides)


def plan_of(config: RunConfig, process: int = PROCESS, **cluster: Any) -> Plan:
    """The plan for two GPUs, unless `cluster` says otherwise; equal runs are planned once."""
    place = Cluster(**{"device": "cuda", "ranks": 2, **cluster})
    key = repr((replace(config, output_dir=Path()), process, place))
    if key not in _PLANS:
        _PLANS[key] = plan_run(config, place, process=process)
    return _PLANS[key]


def trained(plan: Plan) -> PhasePlan:
    (phase,) = (phase for phase in plan.phases if phase.flops and not phase.forwards)
    return phase


def sent(phase: PhasePlan, role: str) -> int:
    return sum(size for (of_role, _), size in phase.sent.items() if of_role == role)


def per_call(config: RunConfig, *hidden_layers: int) -> int:
    """How many micro-batches the teacher answers in one forward on a CPU."""
    ready = ReadyTeacher(planned_sources(config)["teacher"], config.teacher_specs["teacher"])
    needs = Needs(hidden_layers=hidden_layers)
    joins = joins_micro_batches(ready, needs, config.train, config, dtype="fp32", device="cpu")
    return largest_step(config.train, config.task).micro_batches if joins else 1
