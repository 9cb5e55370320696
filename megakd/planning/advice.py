"""Search for changes that make a run fit; every candidate is planned again, never guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from megakd.config.deepspeed import load_ds_config, shards_within_node, zero_stage
from megakd.config.file import config_of, config_tree
from megakd.config.run import RunConfig
from megakd.inputs.precision import training_dtype
from megakd.planning.cluster import Cluster, Device

WANTED = 3
_MOST_TOGETHER = 4
_MOST_NODES = 64


class Change(NamedTuple):
    """A tested change that makes a run fit: settings of the config or of the command."""

    settings: list[str]
    peak_bytes_per_rank: int


class Case(NamedTuple):
    """A variant of a run, and the settings that lead to it, as typed after the command."""

    config: RunConfig
    cluster: Cluster
    settings: tuple[str, ...] = ()

    def changed(self, setting: str) -> Case:
        config = config_of(config_tree(self.config), setting.split())
        return Case(config, self.cluster, (*self.settings, setting))

    def on_more_nodes(self) -> Case:
        """Return the case on twice as many nodes."""
        nodes, ranks = 2 * self.cluster.nodes, 2 * self.cluster.ranks
        cluster = replace(self.cluster, nodes=nodes, ranks=ranks)
        return Case(self.config, cluster, (*self.settings, f"--nodes {nodes} --ranks {ranks}"))


def find_changes(case: Case, planner: Callable[[Case], tuple[float, int]]) -> list[Change]:
    """Return at most three ways to make a run fit, in order of increasing cost in speed.

    Single settings are tried one by one. If no single setting is enough, the setting with the
    smallest remaining overflow is kept, and other settings are tried together with it.
    """
    found: list[Change] = []
    for _ in range(_MOST_TOGETHER):
        rest: list[tuple[float, Case]] = []
        for other in candidates(case):
            overflow, peak = planner(other)
            if overflow > 0:
                rest.append((overflow, other))
                continue
            found.append(Change(list(other.settings), peak))
            if len(found) == WANTED:
                return found
        if found or not rest:
            return found
        case = min(rest, key=lambda pair: pair[0])[1]
    return found


def candidates(case: Case) -> Iterator[Case]:
    """Yield single settings that save memory, in order of increasing cost in speed."""
    if case.cluster.ranks > 1:
        yield from map(case.changed, _sharding(case.config))
    yield from map(case.changed, _precision(case.config, case.cluster.device))
    if 2 * case.cluster.nodes <= _MOST_NODES:
        yield case.on_more_nodes()
    yield from map(case.changed, _activations(case.config))
    if case.cluster.device == "cuda":
        yield from map(case.changed, _offload(case.config))


def _of_teachers(config: RunConfig, setting: str, *, finetuned: bool = False) -> str:
    names = [n for n, spec in config.teacher_specs.items() if spec.finetune or not finetuned]
    keys = [config.key_of(name).replace("[", ".").removesuffix("]") for name in names]
    return " ".join(f"{key}.{setting}" for key in keys)


def _sharding(config: RunConfig) -> Iterator[str]:
    specs = config.teacher_specs.values()
    for stage in (2, 3):
        if _stage(config.student.deepspeed) < stage:
            yield f"student.deepspeed=zero{stage}"
    if not all(_over_all_ranks(spec.deepspeed) for spec in specs):
        yield _of_teachers(config, "deepspeed=teacher_zero3")
    trained = [spec.finetune for spec in specs if spec.finetune]
    if any(_stage(one.deepspeed) < 3 for one in trained):
        yield _of_teachers(config, "finetune.deepspeed=zero3", finetuned=True)


def _precision(config: RunConfig, device: Device) -> Iterator[str]:
    if training_dtype(config.train, device) == "fp32":
        yield "train.bf16=true"
    wide = {"fp32"} if device == "cuda" else {None, "fp32"}
    if any(spec.dtype in wide for spec in config.teacher_specs.values()):
        yield _of_teachers(config, "dtype=bf16")


def _activations(config: RunConfig) -> Iterator[str]:
    train, task = config.train, config.task
    rows, tokens = train.per_device_train_batch_size, train.tokens_per_rank
    if not train.gradient_checkpointing:
        yield "train.gradient_checkpointing=true"
    if getattr(config.method, "passes_per_backward", 1) is None:
        yield "method.passes_per_backward=1"
    if tokens is not None and tokens > task.row_length:
        yield f"train.tokens_per_rank={max(tokens // 2, task.row_length)}"
    if tokens is None and rows > 1:
        held = -(-train.gradient_accumulation_steps * rows // (rows // 2))
        fewer = f"train.per_device_train_batch_size={rows // 2}"
        yield f"{fewer} train.gradient_accumulation_steps={held}"
    if config.eval_rows() > rows:
        yield f"eval.per_device_eval_batch_size={rows}"


def _offload(config: RunConfig) -> Iterator[str]:
    for preset in ("zero2_offload", "zero3_offload"):
        if config.student.deepspeed != preset:
            yield f"student.deepspeed={preset}"
    offloaded = "teacher_zero3_offload"
    if any(spec.deepspeed != offloaded for spec in config.teacher_specs.values()):
        yield _of_teachers(config, f"deepspeed={offloaded}")


def _over_all_ranks(spec: Any) -> bool:
    ds = load_ds_config(spec, where="deepspeed")
    return zero_stage(ds) == 3 and not shards_within_node(ds)


def _stage(spec: Any) -> int:
    return zero_stage(load_ds_config(spec, where="deepspeed"))
