"""DeepSpeed configs: presets, files and inline mappings, merged with settings of the run config.

A `ds_configs` file sets how a model is sharded and offloaded. Batch size, accumulation, learning
rate, clipping and precision are set in the run config, so that every setting has one place.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megakd.config.paths import expand_path
from megakd.config.sections import TrainConfig
from megakd.config.task import Dtype
from megakd.errors import ConfigError, one_line, suggestion

OWN_SECTION = "megakd"
"""The section with megakd's own keys, which DeepSpeed never gets."""
_OWN_KEYS = ("shard_within_node", "clip_on_device")

# Top-level keys of DeepSpeed, which ignores unknown ones silently: those that the run config sets,
# by field of `train`, and those of a file. What is not listed, such as `checkpoint`, changes how
# losses add up or how a run resumes, or has never been tried.
_FIELDS = {
    "per_device_train_batch_size": "train_batch_size train_micro_batch_size_per_gpu elasticity",
    "gradient_accumulation_steps": "gradient_accumulation_steps managed_gradient_accumulation",
    "max_grad_norm": "gradient_clipping",
    "learning_rate": "lr learning_rate optimizer",
    "lr_scheduler_type": "scheduler",
    "bf16": "bf16 bfloat16 amp torch_autocast data_types.param_dtype",
    "fp16": "fp16",
    "": "megakd zero_optimization activation_checkpointing aio comms_logger compile csv_monitor "
    "communication_data_type data_types flops_profiler steps_per_print tensorboard "
    "wall_clock_breakdown zero_allow_untested_optimizer zero_force_ds_cpu_optimizer",
}
_KEYS = {key: field for field, keys in _FIELDS.items() for key in keys.split()}
# Keys of ZeRO and the only value that they may have. Others have never been tried, or a run could
# not resume; with `zero_hpz_partition_size`, forwards read a copy from before the weights load.
_FIXED: Mapping[str, Any] = {
    "elastic_checkpoint": False,
    "load_from_fp32_weights": True,
    "zenflow": None,
    "zero_hpz_partition_size": 1,
    "super_offload": False,
    "cpu_offload": None,
    "cpu_offload_param": None,
}
_OFFLOADS = {"offload_optimizer": 1, "offload_param": 3}
"""The first ZeRO stage that has each kind of offload."""


def load_ds_config(spec: str | Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Load and check a DeepSpeed config, without DeepSpeed; see `engine.distributed.check_zero`.

    `"auto"` means DeepSpeed's default. A setting that belongs to the run config may also be
    `"auto"`, as in files written for other trainers, and is removed.

    Args:
        spec: a preset's name, the path of a JSON file, or the mapping itself.
        where: the key of the run config that holds `spec`, such as `student.deepspeed`.
    """
    source, content = where, spec
    if isinstance(spec, str):
        name, content = _read(spec, where=where)
        source = f"{where}: {name}"
    ds = _without_auto(_mapping(content, source))
    section = where.rpartition(".")[0]
    is_trained = section == "student" or section.endswith("finetune")
    types = _mapping(ds.get("data_types", {}), f"{source}: data_types")
    for key in (*ds, *(f"data_types.{key}" for key in types)):
        field = _KEYS.get(key)
        if not field:
            continue
        owner = f"{section if section.endswith('finetune') else 'train'}.{field}"
        if not is_trained and field in ("bf16", "fp16"):
            owner = f"{section}.dtype"
        raise ConfigError(
            f'{source} sets "{key}", which megakd takes from {owner}; remove the key there and set '
            f"{owner}"
        )
    for key in [key for key in ds if key not in _KEYS]:
        near = suggestion(key, _KEYS) or f"; known: {_FIELDS['']}"
        raise ConfigError(f'{source}: unknown key "{key}"{near}')
    _check_zero(ds.get("zero_optimization", {}), f"{source}: zero_optimization")
    _check_roles(ds, source, is_trained=is_trained)
    return ds


def _check_roles(ds: Mapping[str, Any], source: str, *, is_trained: bool) -> None:
    stage, own = zero_stage(ds), _mapping(ds.get(OWN_SECTION, {}), f"{source}: {OWN_SECTION}")
    problem, within = "", own.get("shard_within_node", False)
    if own.keys() - {*_OWN_KEYS} or not all(isinstance(one, bool) for one in own.values()):
        known = " and ".join(_OWN_KEYS)
        problem = f" has the keys {known}, true or false (got {json.dumps(own)})"
    elif clips_on_device(ds) and (stage not in (1, 2) or not is_trained):
        problem = ".clip_on_device: true is for a model that learns at ZeRO stage 1 or 2; remove it"
    elif within and is_trained:
        problem = ".shard_within_node works only for a frozen model; use zero3, or remove the key"
    elif within and stage != 3:
        problem = (
            f".shard_within_node: true needs ZeRO stage 3, not {stage}; set zero_optimization.stage"
        )
    if problem:
        raise ConfigError(f"{source}: {OWN_SECTION}{problem}")
    if not is_trained and stage not in (0, 3):
        raise ConfigError(
            f"{source}: ZeRO stage {stage} shards gradients and optimizer state, and a frozen "
            "model has neither; use stage 0 (teacher_zero0, a copy per rank) or 3 (teacher_zero3, "
            "sharded)"
        )


def _check_zero(zero: Any, where: str) -> None:
    stage = _mapping(zero, where).get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ConfigError(f"{where}.stage must be 0, 1, 2 or 3 (got {json.dumps(stage)})")
    # DeepSpeed 0.19.8 then sends gradients only from the hooks of the last backward of a step:
    # `reduce_gradients` in stage_1_and_2.py skips the weights that only earlier backwards reached.
    if stage == 1 and zero.get("overlap_comm"):
        raise ConfigError(
            f"{where}.overlap_comm: true can give wrong gradients at ZeRO stage 1, because "
            "DeepSpeed does not average weights that the last backward of a step does not reach; "
            "remove the key, or use stage 2 or 3"
        )
    offloads = {key: (zero.get(key) or {}, first) for key, first in _OFFLOADS.items()}
    sections = {where: zero, **{f"{where}.{key}": part for key, (part, _) in offloads.items()}}
    for path, section in sections.items():
        for key, value in _mapping(section, path).items():
            if value != _FIXED.get(key, value):
                raise ConfigError(
                    f"{path}.{key} cannot be {json.dumps(value)}, which a run could not resume or "
                    "has never been tried with megakd; remove the key"
                )
    # DeepSpeed reads a number in quotes, and the plan does not.
    for key in [key for key, value in zero.items() if isinstance(value, str)]:
        got = json.dumps(zero[key])
        raise ConfigError(f"{where}.{key} must be a number, a mapping, true or false (got {got})")
    for key, (section, first) in offloads.items():
        device = section.get("device", "none")
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


def clips_on_device(ds: Mapping[str, Any]) -> bool:
    """Return whether ZeRO 1 or 2 clips gradients in bf16 without a number on the host."""
    return ds.get(OWN_SECTION, {}).get("clip_on_device", False)


def merged_ds_config(ds: Mapping[str, Any], train: TrainConfig, *, dtype: Dtype) -> dict[str, Any]:
    """Return the DeepSpeed config of a training engine.

    Gradient accumulation is 1: the training loop sets the accumulation boundary itself, so that
    the engine does not depend on the number of micro-batches.
    """
    merged = _engine_config(ds, dtype=dtype, micro_batch=train.per_device_train_batch_size)
    # Always set: DeepSpeed's default is 1.0, not off.
    merged["gradient_clipping"] = float(train.max_grad_norm)
    # Makes 16-bit gradients add up in fp32. ZeRO 0 refuses the key, and at ZeRO 1 DeepSpeed would
    # change to another optimizer.
    if dtype != "fp32" and zero_stage(ds) in (2, 3):
        merged["data_types"] = {"grad_accum_dtype": "fp32", **ds.get("data_types", {})}
    if train.optim == "sgd":
        # For every optimizer except its own Adam, DeepSpeed requires explicit permission.
        merged |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return merged


def frozen_ds_config(ds: Mapping[str, Any], *, dtype: Dtype, micro_batch: int) -> dict[str, Any]:
    """Return the DeepSpeed config of an engine without an optimizer, at ZeRO 0 or 3."""
    frozen = _engine_config(ds, dtype=dtype, micro_batch=micro_batch)
    frozen.get("zero_optimization", {}).pop("offload_optimizer", None)
    return {**frozen, "gradient_clipping": 0.0}


def _engine_config(ds: Mapping[str, Any], *, dtype: Dtype, micro_batch: int) -> dict[str, Any]:
    return {
        # Switches DeepSpeed's own log lines off, because the run has its own log.
        "steps_per_print": 10**9,
        **copy.deepcopy({key: value for key, value in ds.items() if key != OWN_SECTION}),
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        **({} if dtype == "fp32" else {dtype: {"enabled": True}}),
    }


def preset_names() -> list[str]:
    """Return the names of the presets that come with megakd."""
    return sorted(path.stem for path in _preset_folder().glob("*.json"))


def _preset_folder() -> Path:
    package = Path(__file__).resolve().parents[1]
    inside = package / "ds_configs"
    return inside if inside.is_dir() else package.parent / "ds_configs"


def _read(spec: str, *, where: str) -> tuple[str, Any]:
    # The name of the file and its content.
    path, preset = expand_path(spec), _preset_folder() / f"{spec}.json"
    is_file = path.suffix == ".json" or len(path.parts) != 1
    if not is_file and not preset.is_file():
        hint, known = suggestion(spec, preset_names()) or ";", ", ".join(preset_names())
        raise ConfigError(
            f'{where}: unknown preset "{spec}"{hint} known: {known}; the path of a file must end '
            "in .json"
        )
    path = path if is_file else preset

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # Python's parser would silently keep the last value.
        if len(content := dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice in a mapping; remove one of them")
        return content

    try:
        return path.name, json.loads(path.read_text("utf-8"), object_pairs_hook=unique)
    except FileNotFoundError as error:
        raise ConfigError(f"{where}: the DeepSpeed config {spec} does not exist") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: {path} is not JSON in UTF-8: {one_line(error)}") from error


def _without_auto(section: Mapping[str, Any]) -> dict[str, Any]:
    # Also without sections in which every value is `"auto"`.
    plain = {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in section.items()
        if value != "auto"
    }
    return {key: value for key, value in plain.items() if value != {} or section[key] == {}}


def _mapping(section: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(section, Mapping):
        raise ConfigError(f"{where} must be a mapping (got {json.dumps(section):.60})")
    return section
