"""DeepSpeed configs: presets, files and inline mappings, merged with settings of the run config.

A `ds_configs` file sets how a model is sharded and offloaded. Batch size, accumulation, learning
rate, clipping and precision are set in the run config, so that every setting has one place.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from megakd.config.train import TrainConfig
from megakd.contract.tasks import Dtype
from megakd.errors import ConfigError, one_line, suggestion
from megakd.process.terminal import in_home

OWN_SECTION = "megakd"
"""The section with megakd's own keys, which DeepSpeed never gets."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The field of `train` that sets the values of DeepSpeed's keys.
_OWNERS = {
    "per_device_train_batch_size": "train_batch_size train_micro_batch_size_per_gpu elasticity",
    "gradient_accumulation_steps": "gradient_accumulation_steps managed_gradient_accumulation",
    "max_grad_norm": "gradient_clipping",
    "learning_rate": "lr learning_rate optimizer",
    "lr_scheduler_type": "scheduler",
    "bf16": "bf16 bfloat16 amp torch_autocast",
    "fp16": "fp16",
}
_OWNED = {key: field for field, keys in _OWNERS.items() for key in keys.split()}
# Top-level keys, for typos only: DeepSpeed silently ignores unknown keys at the top level.
_SECTIONS = _words("""
    megakd zero_optimization activation_checkpointing aio comms_logger communication_data_type
    compile csv_monitor data_types flops_profiler steps_per_print tensorboard wall_clock_breakdown
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
""")
_OFFLOAD_FROM_STAGE = {"offload_optimizer": 1, "offload_param": 3}
_RESUMES = "because a run could not continue from a checkpoint as if it had not stopped"
_TRIED = "because this has never been tried with megakd"
# Key at any level -> the only value that it may have, and why.
_REFUSED: dict[str, tuple[Any, str]] = {
    "gradient_allreduce_op": ("mean", "because losses are scaled for the mean over ranks"),
    "checkpoint": ({}, _RESUMES),
    "elastic_checkpoint": (False, _RESUMES),
    "load_from_fp32_weights": (True, _RESUMES),
    "zenflow": (None, _TRIED),
    # Forwards would read a copy that DeepSpeed makes before the weights are loaded.
    "zero_hpz_partition_size": (1, "because a model would begin with other weights than its own"),
    "super_offload": (False, _TRIED),
    "cpu_offload": (None, "which DeepSpeed has replaced by offload_optimizer"),
    "cpu_offload_param": (None, "which DeepSpeed has replaced by offload_param"),
}


def load_ds_config(spec: str | Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Load and check a DeepSpeed config, without DeepSpeed; see `engine.distributed.check_zero`.

    Inside `zero_optimization`, `"auto"` means DeepSpeed's default. A setting that belongs to the
    run config may also be `"auto"`, as in files written for other trainers, and is removed.

    Args:
        spec: a preset's name, the path of a JSON file, or the mapping itself.
        where: the key of the run config that holds `spec`, such as `student.deepspeed`.
    """
    source, content = where, cast("Any", spec)
    if isinstance(spec, str):
        path = _find(spec, where=where)
        source = f"{where}: {path.name}"
        content = _read_json(path, where=where)
    _check_mapping(content, source)
    _check_mapping(content.get("data_types", {}), f"{source}: data_types")
    ds = _without_owned_keys(copy.deepcopy(dict(content)), source, where=where)
    _check_sections(ds, source)
    if "zero_optimization" in ds:
        ds["zero_optimization"] = _checked_zero(ds["zero_optimization"], source)
    _check_own_section(ds.get(OWN_SECTION, {}), zero_stage(ds), f"{source}: {OWN_SECTION}")
    return ds


def frozen_on(ranks: int, ds: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of a frozen model without ZeRO 3 on one rank; others unchanged.

    DeepSpeed would copy the weights of every module before its forward, and wait for the device: 60
    of the 357 ms of a step in which SmolLM2-135M learns from the 360M on an H200.
    """
    offload = ds.get("zero_optimization", {}).get("offload_param") or {}
    if ranks > 1 or zero_stage(ds) != 3 or offload.get("device", "none") != "none":
        return ds
    return {**ds, OWN_SECTION: {}, "zero_optimization": {"stage": 0}}


def zero_stage(ds: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of a DeepSpeed config, 0 to 3; 0 if the config sets no stage."""
    return ds.get("zero_optimization", {}).get("stage", 0)


def shards_within_node(ds: Mapping[str, Any]) -> bool:
    """Return whether the weights are sharded over the ranks of a node, not over all ranks."""
    return ds.get(OWN_SECTION, {}).get("shard_within_node", False)


def merged_ds_config(ds: Mapping[str, Any], train: TrainConfig, *, dtype: Dtype) -> dict[str, Any]:
    """Return the DeepSpeed config of a training engine.

    Gradient accumulation is 1: the training loop sets the accumulation boundary itself, so that
    the engine does not depend on the number of micro-batches.
    """
    check_trained_sharding(ds, where="student.deepspeed")
    # For every optimizer except its own Adam, DeepSpeed requires explicit permission.
    sgd = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    # Makes 16-bit gradients add up in fp32. ZeRO 0 refuses the key, and at ZeRO 1 DeepSpeed would
    # change to another optimizer.
    adds = dtype != "fp32" and zero_stage(ds) in (2, 3)
    data_types = {"grad_accum_dtype": "fp32", **ds.get("data_types", {})}
    return {
        **_engine_config(ds, dtype=dtype, micro_batch=train.per_device_train_batch_size),
        **({"data_types": data_types} if adds else {}),
        **(sgd if train.optim == "sgd" else {}),
        # Always set: DeepSpeed's default is 1.0, not off.
        "gradient_clipping": float(train.max_grad_norm),
    }


def frozen_ds_config(ds: Mapping[str, Any], *, dtype: Dtype, micro_batch: int) -> dict[str, Any]:
    """Return the DeepSpeed config of an engine without an optimizer, at ZeRO 0 or 3."""
    check_frozen_stage(ds, where="teacher.deepspeed")
    frozen = _engine_config(ds, dtype=dtype, micro_batch=micro_batch)
    frozen.get("zero_optimization", {}).pop("offload_optimizer", None)
    return {**frozen, "gradient_clipping": 0.0}


def check_frozen_stage(ds: Mapping[str, Any], *, where: str) -> None:
    """Check the sharding of a frozen model: ZeRO 0 or 3."""
    stage = zero_stage(ds)
    if stage not in (0, 3):
        raise ConfigError(
            f"{where}: ZeRO stage {stage} shards gradients and optimizer state, and a frozen model "
            "has neither; use stage 0 (teacher_zero0, a copy per rank) or 3 (teacher_zero3, "
            "sharded)"
        )


def check_trained_sharding(ds: Mapping[str, Any], *, where: str) -> None:
    """Check the sharding of a model that learns: over all ranks, not within nodes."""
    if shards_within_node(ds):
        raise ConfigError(
            f"{where}: megakd.shard_within_node works only for a frozen model, because a model "
            "that learns is sharded over all ranks; use zero3, or remove the key"
        )


def preset_names() -> list[str]:
    """Return the names of the presets that come with megakd."""
    return sorted(path.stem for path in _preset_folder().glob("*.json"))


def _preset_folder() -> Path:
    package = Path(__file__).resolve().parents[1]
    inside = package / "ds_configs"
    return inside if inside.is_dir() else package.parent / "ds_configs"


def _find(spec: str, *, where: str) -> Path:
    path = in_home(spec)
    preset = _preset_folder() / f"{spec}.json"
    if path.suffix == ".json" or len(path.parts) != 1:
        if not path.is_file():
            raise ConfigError(f"{where}: the DeepSpeed config {spec} does not exist")
        return path
    if not preset.is_file():
        hint, known = suggestion(spec, preset_names()) or ";", ", ".join(preset_names())
        raise ConfigError(
            f'{where}: unknown preset "{spec}"{hint} known: {known}; the path of a file must end '
            "in .json"
        )
    return preset


def _read_json(path: Path, *, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # Python's parser would silently keep the last value.
        for key, count in Counter(key for key, _ in pairs).items():
            if count > 1:
                raise ValueError(f'contains the key "{key}" twice; remove one of them')
        return dict(pairs)

    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: {path} is not JSON in UTF-8: {one_line(error)}") from error


def _engine_config(ds: Mapping[str, Any], *, dtype: Dtype, micro_batch: int) -> dict[str, Any]:
    precision = {} if dtype == "fp32" else {dtype: {"enabled": True}}
    return {
        # Switches DeepSpeed's own log lines off, because the run has its own log.
        "steps_per_print": 10**9,
        **copy.deepcopy({key: value for key, value in ds.items() if key != OWN_SECTION}),
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        **precision,
    }


def _without_owned_keys(ds: Mapping[str, Any], source: str, *, where: str) -> dict[str, Any]:
    # Settings of the run config may only be `"auto"`.
    owned = {key: _OWNED[key] for key, value in ds.items() if key in _OWNED and not _is_auto(value)}
    if "param_dtype" in ds.get("data_types", {}):
        owned["data_types.param_dtype"] = "bf16"
    section = where.rpartition(".")[0]
    is_frozen = section.startswith("teacher") and not section.endswith("finetune")
    for key, field in owned.items():
        owner = f"{section if section.endswith('finetune') else 'train'}.{field}"
        if is_frozen and field in ("bf16", "fp16"):
            owner = f"{section}.dtype"
        raise ConfigError(
            f'{source} sets "{key}", which megakd takes from {owner}; remove the key there and set '
            f"{owner}"
        )
    return {key: value for key, value in ds.items() if key not in _OWNED}


def _is_auto(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(_is_auto(inner) for inner in value.values())
    return value == "auto"


def _check_sections(ds: Mapping[str, Any], source: str) -> None:
    for key, value in ds.items():
        outer, dot, inner = key.partition(".")
        if dot:
            raise ConfigError(
                f'{source}: DeepSpeed ignores the dotted key "{key}"; write '
                f'{{"{outer}": {{"{inner}": …}}}}'
            )
        near = difflib.get_close_matches(key, (*_SECTIONS, *_OWNED), n=1, cutoff=0.85)
        if near and key not in _SECTIONS:
            raise ConfigError(f'{source}: unknown key "{key}"; did you mean "{near[0]}"?')
        if value == "auto":
            raise ConfigError(f'{source}: {key} cannot be "auto"; set a value or remove the key')
    _refuse_values(ds, f"{source}: ")


def _checked_zero(given: Any, source: str) -> dict[str, Any]:
    # Without `"auto"`, so that DeepSpeed's default holds.
    where = f"{source}: zero_optimization"
    _check_mapping(given, where)
    zero = _without_auto(given)
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ConfigError(f"{where}.stage must be 0, 1, 2 or 3 (got {json.dumps(stage)})")
    # DeepSpeed reads a number in quotes, and the plan does not.
    for key in [key for key, value in zero.items() if isinstance(value, str)]:
        got = json.dumps(zero[key])
        raise ConfigError(f"{where}.{key} must be a number, a mapping, true or false (got {got})")
    _refuse_values(zero, f"{where}.")
    # DeepSpeed 0.19.8 then sends gradients only from the hooks of the last backward of a step:
    # `reduce_gradients` in stage_1_and_2.py skips the weights that only earlier backwards reached.
    if stage == 1 and zero.get("overlap_comm"):
        raise ConfigError(
            f"{where}.overlap_comm: true can give wrong gradients at ZeRO stage 1, because "
            "DeepSpeed does not average weights that the last backward of a step does not reach; "
            "remove the key, or use stage 2 or 3"
        )
    for key, first in _OFFLOAD_FROM_STAGE.items():
        offload = zero.get(key) or {}
        _check_mapping(offload, f"{where}.{key}")
        _refuse_values(offload, f"{where}.{key}.")
        device = offload.get("device", "none")
        if device not in ("none", "cpu"):
            raise ConfigError(
                f'{where}.{key}.device must be "none" or "cpu" (got {json.dumps(device)}); NVMe '
                "has never been tried with megakd"
            )
        if device != "none" and stage < first:
            raise ConfigError(
                f"{where}.{key} needs ZeRO stage {first} or above, and the stage is {stage}; raise "
                "zero_optimization.stage, or remove the key"
            )
    return zero


def _without_auto(section: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in section.items()
        if value != "auto"
    }


def _check_own_section(section: Any, stage: int, where: str) -> None:
    _check_mapping(section, where)
    within = section.get("shard_within_node", False)
    if section.keys() - {"shard_within_node"} or not isinstance(within, bool):
        raise ConfigError(
            f"{where} has the one key shard_within_node, true or false (got {json.dumps(section)})"
        )
    if within and stage != 3:
        raise ConfigError(
            f"{where}.shard_within_node: true needs ZeRO stage 3, which shards the weights, and "
            f"the stage is {stage}; set zero_optimization.stage to 3, or remove the key"
        )


def _check_mapping(section: Any, where: str) -> None:
    if not isinstance(section, Mapping):
        raise ConfigError(f"{where} must be a mapping (got {json.dumps(section):.60})")


def _refuse_values(section: Mapping[str, Any], where: str) -> None:
    for key, (allowed, why) in _REFUSED.items():
        if section.get(key, allowed) != allowed:
            got = json.dumps(section[key])
            raise ConfigError(f"{where}{key} cannot be {got}, {why}; remove the key")
