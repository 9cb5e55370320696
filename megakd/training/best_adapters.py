"""The best evaluation of a student with adapters: `best/` holds the adapters alone.

The frozen weights do not change, so the adapters of the best evaluation are put back into the
student at the end of its stage, and the merged model is written once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megakd.engine.collectives import on_main
from megakd.models.lora import adapter_config, adapter_files, load_adapters
from megakd.storage.finished_folder import write_finished


def write_best_adapters(folder: Path, model: Any, extra: Mapping[str, str | bytes]) -> bool:
    """Write the adapters of a model with small files, whole or not at all; a collective.

    Returns:
        False if the model has no adapters; nothing is written.

    Raises:
        MegakdError: the disk is full; the old folder is unchanged.
    """
    if adapter_config(model) is None:
        return False
    files = adapter_files(model)
    on_main(lambda: write_finished(folder, {**files, **extra}))
    return True


def adapters_put_back(model: Any, best: Path) -> bool:
    """Put the adapters of the best evaluation back into a model; a collective.

    Returns:
        False if the model has no adapters, and is therefore unchanged.
    """
    if adapter_config(model) is None:
        return False
    load_adapters(model, best)
    return True
