"""The paths of a vLLM server in development mode, which pause it and give it other weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

Tree = Any


def _pause(stub: Any, _: Tree) -> tuple[int, Tree]:
    """The mode `wait`: the caches are empty when the texts in work are finished."""
    stub.paused = True
    while stub.at_once:
        time.sleep(0.005)
    stub.cached = {}
    return 200, {"status": "paused"}


def _resume(stub: Any, _: Tree) -> tuple[int, Tree]:
    stub.paused = False
    return 200, {"status": "resumed"}


def _reload(stub: Any, body: Tree) -> tuple[int, Tree]:
    """`reload_weights` of the only worker; all values are strings."""
    folder = Path(body["kwargs"]["weights_path"])
    if body["method"] != "reload_weights" or not folder.is_dir():
        message = f"Call to collective_rpc method failed: Repo id must be in the form of {folder}"
        return 500, {"error": {"message": message, "type": "InternalServerError", "code": 500}}
    stub.model.load(folder)
    return 200, {"results": [None]}


def _reset_prefix_cache(stub: Any, _: Tree) -> tuple[int, Tree]:
    stub.cached = {}
    return 200, {"success": True}


def _update_version(stub: Any, body: Tree) -> tuple[int, Tree]:
    stub.weights = body["new_version"]
    return 200, {"success": True, "new_version": stub.weights}


DEVELOPMENT = {
    "/pause?mode=wait": _pause,
    "/resume": _resume,
    "/is_paused": lambda stub, _: (200, {"is_paused": stub.paused}),
    "/collective_rpc": _reload,
    "/reset_prefix_cache?reset_external=true": _reset_prefix_cache,
    "/update_weight_version": _update_version,
    "/weight_info": lambda stub, _: (200, {"weight_version": stub.weights}),
}
