"""DeepSpeed configs: presets, files and inline mappings, merged with settings of the run config.

A `ds_configs` file sets how a model is sharded and offloaded. Batch size, accumulation, learning
rate, clipping and precision are set in the run config, so that every setting has one place.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megakd.config.deepspeed_rules import (
    OWN_SECTION,
    check_own_section,
    check_sections,
    check_zero,
    refuse_dotted_keys,
    without_owned_keys,
)
from megakd.errors import ConfigError

if TYPE_CHECKING:
    from megakd.config.train import TrainConfig
    from megakd.contract.tasks import Dtype

# `steps_per_print`: DeepSpeed's own log lines are switched off, because the run has its own log.
_NEVER = 10**9


def load_ds_config(spec: str | Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Load and check a DeepSpeed config.

    Inside `zero_optimization`, `"auto"` means DeepSpeed's default. A setting that belongs to the
    run config may also be `"auto"`, as in files written for other trainers, and is removed.

    Args:
        spec: a preset's name, the path of a JSON file, or the mapping itself.
        where: the key of the run config that holds `spec`, such as `student.deepspeed`.

    Raises:
        ConfigError: the preset or file does not exist, or sets a value of the run config.
    """
    source, content = where, spec
    if isinstance(spec, str):
        path = _find(spec, where=where)
        source = f"{where}: {path.name}"
        content = _read_json(path, where=where)
    if not isinstance(content, Mapping):
        raise ConfigError(f"{source}: must be a mapping (got {json.dumps(content)[:60]})")
    ds = copy.deepcopy(dict(content))
    refuse_dotted_keys(ds, source)
    ds = without_owned_keys(ds, source, where=where)
    check_sections(ds, source)
    ds = check_zero(ds, source)
    check_own_section(ds, source)
    return ds


def preset_of(spec: str | Mapping[str, Any], *, ranks: int, dtype: Dtype) -> Any:
    """Return `zero0` for `auto` on one rank, where ZeRO 2 would only copy; others unchanged.

    In 16 bits ZeRO 2, which `auto` is else, adds up gradients in fp32, and ZeRO 0 cannot.
    """
    return "zero0" if (spec, ranks, dtype) == ("auto", 1, "fp32") else spec


def zero_stage(ds: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of a DeepSpeed config, 0 to 3; 0 if the config sets no stage."""
    return ds.get("zero_optimization", {}).get("stage", 0)


def shards_within_node(ds: Mapping[str, Any]) -> bool:
    """Return whether the weights are sharded over the ranks of a node, not over all ranks."""
    return ds.get(OWN_SECTION, {}).get("shard_within_node", False)


def merged_ds_config(
    ds: Mapping[str, Any], train: TrainConfig, *, dtype: Dtype, world_size: int
) -> dict[str, Any]:
    """Return the DeepSpeed config of a training engine.

    Gradient accumulation is 1: the training loop sets the accumulation boundary itself, so that
    the engine does not depend on the number of micro-batches.

    Args:
        ds: config from `load_ds_config`.
        train: config with the micro-batch size and the clipping norm.
        dtype: dtype of the weights in forward and backward.
        world_size: number of ranks.

    Raises:
        ConfigError: the size of a shard group of `ds` does not divide the number of ranks, or the
            weights are sharded within nodes.
    """
    check_trained_sharding(ds, where="student.deepspeed")
    group = ds.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)
    if group > 1 and world_size % group:
        raise ConfigError(
            f"zero_hpz_partition_size {group} does not divide the {world_size} ranks of this run; "
            "set the key to the number of GPUs of a node"
        )
    # For every optimizer except its own Adam, DeepSpeed requires explicit permission.
    sgd = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return {
        **_engine_config(ds, dtype=dtype, micro_batch=train.per_device_train_batch_size),
        **_accumulation(ds, dtype),
        **(sgd if train.optim == "sgd" else {}),
        # Always set: DeepSpeed's default is 1.0, not off.
        "gradient_clipping": float(train.max_grad_norm),
    }


def frozen_ds_config(ds: Mapping[str, Any], *, dtype: Dtype, micro_batch: int) -> dict[str, Any]:
    """Return the DeepSpeed config of an inference engine: no optimizer, ZeRO 0 or 3.

    Args:
        ds: config from `load_ds_config`.
        dtype: dtype of the weights.
        micro_batch: rows per rank, which DeepSpeed requires even without training.

    Raises:
        ConfigError: the ZeRO stage is 1 or 2, or the config needs an optimizer.
    """
    check_frozen_stage(ds, where="teacher.deepspeed")
    frozen = _engine_config(ds, dtype=dtype, micro_batch=micro_batch)
    frozen.get("zero_optimization", {}).pop("offload_optimizer", None)
    return {**frozen, "gradient_clipping": 0.0}


def check_frozen_stage(ds: Mapping[str, Any], *, where: str) -> None:
    """Check that a DeepSpeed config works for an engine without an optimizer.

    Raises:
        ConfigError: the ZeRO stage is 1 or 2, or weights are sharded a second time per node.
    """
    stage = zero_stage(ds)
    if stage not in (0, 3):
        raise ConfigError(
            f"{where}: ZeRO stage {stage} shards gradients and optimizer state, and a frozen model "
            "has neither; use stage 0 (teacher_zero0, a copy per rank) or 3 (teacher_zero3, "
            "sharded)"
        )
    if ds.get("zero_optimization", {}).get("zero_hpz_partition_size", 1) > 1:
        raise ConfigError(
            f"{where}: DeepSpeed cannot use zero_hpz_partition_size without an optimizer; remove "
            "the key"
        )


def check_trained_sharding(ds: Mapping[str, Any], *, where: str) -> None:
    """Check that a DeepSpeed config works for a model that learns.

    Raises:
        ConfigError: the weights are sharded within nodes.
    """
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
    path = Path(spec).expanduser()
    preset = _preset_folder() / f"{spec}.json"
    if path.suffix == ".json" or len(path.parts) != 1:
        if not path.is_file():
            raise ConfigError(f"{where}: the DeepSpeed config {spec} does not exist")
        return path
    if not preset.is_file():
        near = difflib.get_close_matches(spec, preset_names(), n=1)
        hint = f'; did you mean "{near[0]}"?' if near else ";"
        raise ConfigError(
            f'{where}: unknown preset "{spec}"{hint} known: {", ".join(preset_names())}; the path '
            "of a file must end in .json"
        )
    return preset


def _read_json(path: Path, *, where: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        problem = f"is not JSON: line {error.lineno}, column {error.colno}: {error.msg}"
    except UnicodeDecodeError as error:
        problem = f"is not UTF-8 text (byte {error.start}); save the file as UTF-8"
    except OSError as error:
        problem = f"cannot be read: {error.strerror}"
    except _DuplicateKeyError as error:
        problem = f'contains the key "{error}" twice; remove one of them'
    raise ConfigError(f"{where}: {path} {problem}")


class _DuplicateKeyError(Exception):
    """A JSON object has a key twice; Python's parser would silently keep the last value."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise _DuplicateKeyError(twice[0])
    return dict(pairs)


def _accumulation(ds: Mapping[str, Any], dtype: Dtype) -> dict[str, Any]:
    """Return the section that makes 16-bit gradients add up in fp32, where DeepSpeed can.

    ZeRO 0 refuses the key, and at ZeRO 1 DeepSpeed would change to another optimizer.
    """
    if dtype == "fp32" or zero_stage(ds) not in (2, 3):
        return {}
    return {"data_types": {"grad_accum_dtype": "fp32", **ds.get("data_types", {})}}


def _engine_config(ds: Mapping[str, Any], *, dtype: Dtype, micro_batch: int) -> dict[str, Any]:
    precision = {} if dtype == "fp32" else {dtype: {"enabled": True}}
    return {
        "steps_per_print": _NEVER,
        **copy.deepcopy({key: value for key, value in ds.items() if key != OWN_SECTION}),
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        **precision,
    }
