"""Keys that a DeepSpeed config may set, and keys that belong to the run config instead."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from megakd.errors import ConfigError

# DeepSpeed's key -> the field of `train` that sets the value.
_OWNED = {
    "train_batch_size": "per_device_train_batch_size",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "elasticity": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "managed_gradient_accumulation": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "lr": "learning_rate",
    "learning_rate": "learning_rate",
    "optimizer": "learning_rate",
    "scheduler": "lr_scheduler_type",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp16": "fp16",
    "amp": "bf16",
    "torch_autocast": "bf16",
}
_PRECISION = ("bf16", "fp16")
OWN_SECTION = "megakd"
"""The section with megakd's own keys, which DeepSpeed never gets."""
_OWN_KEYS = frozenset(("shard_within_node",))
# Top-level keys, for typos only: DeepSpeed silently ignores unknown keys at the top level.
_SECTIONS = (
    OWN_SECTION,
    "zero_optimization",
    "activation_checkpointing",
    "aio",
    "comms_logger",
    "communication_data_type",
    "compile",
    "csv_monitor",
    "data_types",
    "flops_profiler",
    "steps_per_print",
    "tensorboard",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)
# Below the top level DeepSpeed refuses unknown keys, but only after the models are loaded.
# Deprecated keys are left out; a test compares this list with the installed DeepSpeed.
_ZERO_KEYS = frozenset(
    [
        "allgather_bucket_size",
        "allgather_partitions",
        "allgather_sequential",
        "compute_grad_norm",
        "contiguous_gradients",
        "elastic_checkpoint",
        "enable_sanity_checks",
        "gather_16bit_weights_on_model_save",
        "ignore_unused_parameters",
        "leaf_module",
        "legacy_stage1",
        "load_from_fp32_weights",
        "log_trace_cache_warnings",
        "max_live_parameters",
        "max_reuse_distance",
        "memory_efficient_linear",
        "model_persistence_threshold",
        "module_granularity_threshold",
        "offload_optimizer",
        "offload_param",
        "overlap_comm",
        "override_module_apply",
        "param_persistence_threshold",
        "parameter_alignment",
        "pipeline_loading_checkpoint",
        "prefetch_bucket_size",
        "reduce_bucket_size",
        "reduce_scatter",
        "round_robin_gradients",
        "save_muon_momentum_buffer_in_memory",
        "stage",
        "stage3_allgather_sequential",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "stage3_use_all_reduce_for_fetch_params",
        "sub_group_size",
        "use_all_reduce_for_fetch_params",
        "use_multi_rank_bucket_allreduce",
        "zenflow",
        "zero_hpz_partition_size",
        "zero_quantized_gradients",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_weights",
    ]
)
_OFFLOAD_KEYS = {
    "offload_param": frozenset(
        ("buffer_count", "buffer_size", "device", "max_in_cpu", "nvme_path", "pin_memory")
    ),
    "offload_optimizer": frozenset(
        [
            "buffer_count",
            "cpuadam_cores_perc",
            "device",
            "fast_init",
            "nvme_path",
            "pin_memory",
            "pipeline_read",
            "pipeline_write",
            "ratio",
            "super_offload",
        ]
    ),
}
# Keys of `zero_optimization` and of its offload sections whose values are whole numbers.
_WHOLE = frozenset(
    [
        "allgather_bucket_size",
        "buffer_count",
        "buffer_size",
        "max_in_cpu",
        "max_live_parameters",
        "max_reuse_distance",
        "model_persistence_threshold",
        "module_granularity_threshold",
        "param_persistence_threshold",
        "prefetch_bucket_size",
        "reduce_bucket_size",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "sub_group_size",
        "zero_hpz_partition_size",
    ]
)
_OFFLOAD_FROM_STAGE = {"offload_optimizer": 1, "offload_param": 3}
_DEVICES = ("none", "cpu")
_RESUMES = "because a run could not continue from a checkpoint as if it had not stopped"
_TRIED = "because this has never been tried with megakd"
# Key at any level -> the only value that it may have, and why.
_REFUSED: dict[str, tuple[Any, str]] = {
    "gradient_allreduce_op": ("mean", "because losses are scaled for the mean over ranks"),
    "checkpoint": ({}, _RESUMES),
    "elastic_checkpoint": (False, _RESUMES),
    "load_from_fp32_weights": (True, _RESUMES),
    "zenflow": (None, _TRIED),
    "super_offload": (False, _TRIED),
}


def refuse_dotted_keys(ds: Mapping[str, Any], source: str) -> None:
    """Check that no key has a dot, such as `zero_optimization.stage`.

    Raises:
        ConfigError: a key has a dot; the message names the key and its nested form.
    """
    for key in _keys(ds):
        outer, dot, inner = key.partition(".")
        if dot:
            nested = f'{{"{outer}": {{"{inner}": …}}}}'
            raise ConfigError(
                f'{source}: DeepSpeed does not support the dotted key "{key}"; write {nested}'
            )


def without_owned_keys(ds: Mapping[str, Any], source: str, *, where: str) -> dict[str, Any]:
    """Return the config without settings of the run config, which may only be `"auto"`.

    Args:
        ds: a DeepSpeed config.
        source: file or key that `ds` comes from, for messages.
        where: key of the run config that holds `ds`; determines the key to set instead.

    Raises:
        ConfigError: `ds` sets a value of the run config; the message names the key to set instead.
    """
    for key, value in ds.items():
        if key in _OWNED and not _is_auto(value):
            raise ConfigError(_owned_elsewhere(key, _owner(_OWNED[key], where), source))
    data_types = ds.get("data_types")
    if isinstance(data_types, Mapping) and "param_dtype" in data_types:
        raise ConfigError(_owned_elsewhere("data_types.param_dtype", _owner("bf16", where), source))
    return {key: value for key, value in ds.items() if key not in _OWNED}


def check_sections(ds: Mapping[str, Any], source: str) -> None:
    """Check the top-level keys.

    Raises:
        ConfigError: a key is misspelt or `"auto"`, or has a value that does not work with megakd.
    """
    for key, value in ds.items():
        near = difflib.get_close_matches(key, (*_SECTIONS, *_OWNED), n=1, cutoff=0.85)
        if near and key not in _SECTIONS:
            raise ConfigError(f'{source}: unknown key "{key}"; did you mean "{near[0]}"?')
        if value == "auto":
            raise ConfigError(f'{source}: {key} cannot be "auto"; set a value or remove the key')
    _refuse_values(ds, f"{source}: ")


def check_zero(ds: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return the config without `"auto"` in `zero_optimization`, so that DeepSpeed's default holds.

    Raises:
        ConfigError: the stage is not 0 to 3, a key is unknown, a size is not a whole number, an
            offload section is invalid or needs a higher stage, or gradients would be wrong.
    """
    if "zero_optimization" not in ds:
        return dict(ds)
    zero, where = ds["zero_optimization"], f"{source}: zero_optimization"
    if not isinstance(zero, Mapping):
        raise ConfigError(f"{where} must be a mapping (got {json.dumps(zero)})")
    _refuse_unknown(zero, _ZERO_KEYS, where)
    stage = zero.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ConfigError(f"{where}.stage must be 0, 1, 2 or 3 (got {json.dumps(stage)})")
    zero = _without_auto(zero)
    _check_whole_numbers(zero, where)
    _check_overlap(zero, int(stage), where)
    _refuse_values(zero, f"{where}.")
    for key in _OFFLOAD_KEYS:
        _check_offload(key, zero.get(key), int(stage), where)
    return {**ds, "zero_optimization": zero}


def check_own_section(ds: Mapping[str, Any], source: str) -> None:
    """Check the section `megakd`.

    Raises:
        ConfigError: a key is unknown, or `shard_within_node` is not a boolean or needs ZeRO 3.
    """
    section, where = ds.get(OWN_SECTION, {}), f"{source}: {OWN_SECTION}"
    if not isinstance(section, Mapping):
        raise ConfigError(f"{where} must be a mapping (got {json.dumps(section)})")
    _refuse_unknown(section, _OWN_KEYS, where)
    within = section.get("shard_within_node", False)
    if not isinstance(within, bool):
        raise ConfigError(
            f"{where}.shard_within_node must be true or false (got {json.dumps(within)})"
        )
    stage = ds.get("zero_optimization", {}).get("stage", 0)
    if within and stage != 3:
        raise ConfigError(
            f"{where}.shard_within_node: true needs ZeRO stage 3, which shards the weights, and "
            f"the stage is {stage}; set zero_optimization.stage to 3, or remove the key"
        )


def _without_auto(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section without keys that are `"auto"`, also in nested sections."""
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in section.items()
        if value != "auto"
    }


def _check_whole_numbers(section: Mapping[str, Any], where: str) -> None:
    for key, value in section.items():
        if key not in _WHOLE:
            continue
        # 5e8 is a fraction in JSON, and DeepSpeed accepts it.
        is_whole = isinstance(value, int | float) and not isinstance(value, bool) and value % 1 == 0
        if not is_whole or value < 0:
            raise ConfigError(
                f"{where}.{key} must be a whole number, 0 or above (got {json.dumps(value)})"
            )


def _check_overlap(zero: Mapping[str, Any], stage: int, where: str) -> None:
    # DeepSpeed 0.19.8 then sends gradients only from the hooks of the last backward of a step:
    # `reduce_gradients` in stage_1_and_2.py skips the weights that only earlier backwards reached.
    if stage == 1 and zero.get("overlap_comm"):
        raise ConfigError(
            f"{where}.overlap_comm: true can give wrong gradients at ZeRO stage 1, because "
            "DeepSpeed does not average weights that the last backward of a step does not reach; "
            "remove the key, or use stage 2 or 3"
        )


def _check_offload(key: str, offload: Any, stage: int, section: str) -> None:
    where = f"{section}.{key}"
    if offload is None:
        return
    if not isinstance(offload, Mapping):
        raise ConfigError(f"{where} must be a mapping (got {json.dumps(offload)})")
    _refuse_unknown(offload, _OFFLOAD_KEYS[key], where)
    _check_whole_numbers(offload, where)
    _refuse_values(offload, f"{where}.")
    device = offload.get("device", "none")
    if device not in _DEVICES:
        raise ConfigError(
            f'{where}.device must be "none" or "cpu" (got {json.dumps(device)}); NVMe has never '
            "been tried with megakd"
        )
    if device != "none" and stage < _OFFLOAD_FROM_STAGE[key]:
        raise ConfigError(
            f"{where} needs ZeRO stage {_OFFLOAD_FROM_STAGE[key]} or above, and the stage is "
            f"{stage}; raise zero_optimization.stage, or remove the key"
        )


def _refuse_values(section: Mapping[str, Any], where: str) -> None:
    for key, (allowed, why) in _REFUSED.items():
        if section.get(key, allowed) != allowed:
            got = json.dumps(section[key])
            raise ConfigError(f"{where}{key} cannot be {got}, {why}; remove the key")


def _refuse_unknown(section: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    for key in section:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = (
                f'; did you mean "{near[0]}"?' if near else f"; known: {', '.join(sorted(known))}"
            )
            raise ConfigError(f'{where}: unknown key "{key}"{hint}')


def _keys(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield str(key)
            yield from _keys(value)


def _is_auto(value: Any) -> bool:
    if isinstance(value, Mapping):
        return bool(value) and all(_is_auto(inner) for inner in value.values())
    return value == "auto"


def _owner(field: str, where: str) -> str:
    """Return the run config's key for a field of `train`, given the section that holds `where`."""
    section = where.rpartition(".")[0]
    if section.endswith("finetune"):
        return f"{section}.{field}"
    if section.startswith("teacher") and field in _PRECISION:
        return f"{section}.dtype"
    return f"train.{field}"


def _owned_elsewhere(key: str, owner: str, source: str) -> str:
    return (
        f'{source} sets "{key}", which megakd takes from {owner}; remove the key there and set '
        f"{owner}"
    )
