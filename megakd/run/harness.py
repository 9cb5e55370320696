"""`megakd evaluate --tasks`: scores a model folder on tasks of lm-eval (Gao et al. 2024).

The package lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) is optional.
"""

from __future__ import annotations

import json
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from megakd.errors import ConfigError, DataError, suggestion
from megakd.models.export import brings_code
from megakd.run.scored_folder import RESULTS
from megakd.run.writable import check_writable
from megakd.storage import atomic

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from megakd.run.scored_folder import ScoredFolder


def evaluate_tasks(
    folder: ScoredFolder,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    chat_template: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Score a decoder on tasks of lm-eval, and write the scores to `lm_eval.json`.

    Args:
        folder: the model, and the folder that the file is written to.
        tasks: names of tasks or groups; `*` matches several.
        include_path: folder of YAML files with further tasks.
        limit: number of rows of each task; None: all rows.
        chat_template: whether prompts are rendered with the chat template of the model.
        trust_remote_code: whether the model code in the folder may run.

    Returns:
        `model`, `lm_eval` (version), `limit`, `chat_template` and `results`: an entry per task,
        metric and filter with `task`, `metric`, `filter`, `value`, `stderr` (null if unknown),
        `higher_is_better`, `shots` and `rows`.

    Raises:
        MegakdError: lm-eval is not installed, a task is unknown, its data cannot be loaded, or the
            model needs code that may not run.
    """
    _check_model(folder.model, trust_remote_code=trust_remote_code)
    check_writable(folder.out, where=f"the folder of {RESULTS}")
    harness, manager = _harness(include_path)
    names = _known(tasks, manager)
    model = {"pretrained": str(folder.model), "trust_remote_code": trust_remote_code}
    try:
        said = harness.simple_evaluate(
            model="hf",
            model_args=model,
            tasks=names,
            device=_device(),
            limit=limit,
            apply_chat_template=chat_template,
            log_samples=False,
            task_manager=manager,
        )
    except OSError as error:  # also those of the Hub and of connections
        raise DataError(f"--tasks {','.join(names)}: the data cannot be loaded: {error}") from error
    facts = {"model": str(folder.model), "lm_eval": harness.__version__}
    options = {"limit": limit, "chat_template": chat_template}
    found = {**facts, **options, "results": result_entries(said)}
    atomic.write_json(folder.out / RESULTS, found)
    return found


def _check_model(folder: Path, *, trust_remote_code: bool) -> None:
    keys = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    built = ", ".join(keys.get("architectures") or ())
    if "SequenceClassification" in built or "MaskedLM" in built:
        raise ConfigError(
            f"{folder} holds a {built}, and the tasks of lm-eval are for models that continue "
            "text; score the model without --tasks"
        )
    if brings_code(folder) and not trust_remote_code:
        raise ConfigError(
            f"{folder} has model code of its own, which transformers runs only on request; add "
            "--trust_remote_code"
        )


def _harness(include_path: Path | None) -> tuple[Any, Any]:
    """Return the package and its tasks."""
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"--include_path {include_path}: the folder does not exist")
    try:
        package, tasks = import_module("lm_eval"), import_module("lm_eval.tasks")
    except ImportError as error:
        raise ConfigError(
            f"--tasks needs the package lm-eval, which cannot be imported ({error}); "
            "install megakd[tasks]"
        ) from error
    folder = None if include_path is None else str(include_path)
    return package, tasks.TaskManager(include_path=folder)


def _known(tasks: Sequence[str], manager: Any) -> list[str]:
    """Return the names of tasks that the given names match."""
    if not tasks:
        raise ConfigError("--tasks: no name is given; write names such as gsm8k,ifeval")
    found: list[str] = []
    for name in tasks:
        matching = sorted(manager.match_tasks([name]))
        if not matching:
            near = suggestion(name, manager.all_tasks)
            raise ConfigError(
                f'--tasks: lm-eval has no task "{name}"{near or ";"} "lm-eval ls tasks" lists '
                "all tasks, and --include_path adds a folder of tasks"
            )
        found += matching
    return list(dict.fromkeys(found))


def _device() -> str:
    wants_cpu = os.environ.get("DS_ACCELERATOR") == "cpu"
    return "cuda" if torch.cuda.is_available() and not wants_cpu else "cpu"


def result_entries(said: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the results of lm-eval's `simple_evaluate` as one entry per task, metric and filter.

    lm-eval names a value `metric,filter`, and its standard error `metric_stderr,filter`.
    """
    entries: list[dict[str, Any]] = []
    for task, values in said["results"].items():
        higher = said.get("higher_is_better", {}).get(task) or {}
        rows = said.get("n-samples", {}).get(task) or {}
        for key, value in values.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            entries.append({
                "task": task,
                "metric": metric,
                "filter": chosen,
                "value": _number(value),
                "stderr": _number(values.get(f"{metric}_stderr,{chosen}")),
                "higher_is_better": higher.get(metric),
                "shots": said.get("n-shot", {}).get(task),
                "rows": rows.get("effective"),
            })  # fmt: skip
    return entries


def _number(value: object) -> float | None:
    """Return a number; None for "N/A", with which lm-eval marks an unknown standard error."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
