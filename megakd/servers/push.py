"""The student's weights for inference servers: written by rank 0 into a folder that servers read.

Weights are gathered one parameter at a time, and rank 0 writes them in small shards, so no rank
holds the whole model.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from torch import nn

from megakd.engine.collectives import agree, on_main, together
from megakd.engine.sharding import full_shape, is_first_rank
from megakd.errors import ServerError
from megakd.models.learned import Learned
from megakd.models.lora import adapter_files
from megakd.models.model_folder import fill_serving_folder
from megakd.servers.http import RunningCalls
from megakd.servers.sglang import SglangServer
from megakd.servers.vllm import VllmServer, VllmWeightServer
from megakd.storage import atomic

SHARD_BYTES = 256_000_000
"""Largest size of a shard; rank 0 holds one shard and one parameter at a time."""


class Pushed(NamedTuple):
    """Names of pushed weights on the servers.

    adapter: the name of the adapters in requests; None: the model itself has the weights.
    weights: the version that answers state; None: answers state no version.
    """

    adapter: str | None = None
    weights: str | None = None


def run_name(output_dir: Path) -> str:
    """Return a name of a run that differs from the names of runs in other output folders."""
    place = hashlib.blake2b(str(output_dir.resolve()).encode(), digest_size=4).hexdigest()
    return f"{output_dir.name}-{place}"


def start_folder(pushed: Path) -> Path:
    """Return a folder in the folder of a run for this start alone; a collective.

    vLLM keeps cached prefixes by the name and the path of adapters, also of unloaded ones: other
    weights under a used name or path would continue prompts from the old prefixes.
    """
    return pushed / f"{pushed.name}-{agree(uuid4().hex[:8])}"


class FullPush:
    """Pushes the whole model by a model folder; adapters are merged into the weights.

    The folder is one of `start_folder`, which rank 0 and the servers see.
    """

    def __init__(
        self, model: nn.Module, servers: Sequence[SglangServer | VllmWeightServer], folder: Path
    ) -> None:
        self._model, self._servers, self._folder = model, servers, folder

    def push(self, version: int) -> Pushed:
        """Give all servers the weights that the student has now; a collective."""
        target = self._folder / f"version-{version}"
        name = f"{self._folder.name}-{version}"
        learned = Learned.of(self._model, None)
        together(lambda: self._write(target, learned))
        on_main(lambda: _each(self._servers, lambda server: server.load_weights(target, name)))
        return Pushed(weights=name)

    def _write(self, target: Path, learned: Learned) -> None:
        # Every rank iterates over the state, which contains collectives.
        try:
            if is_first_rank():
                # The servers have read it, and other folders of the run are of killed starts.
                shutil.rmtree(self._folder.parent, ignore_errors=True)
                self._folder.mkdir(parents=True)
                needed, free = _bytes_of(self._model), shutil.disk_usage(self._folder).free
                if free < needed:
                    raise ServerError(
                        f"rollout.server.folder: {self._folder} has {free / 1e9:.1f} GB free, and "
                        f"the weights of the student take {needed / 1e9:.1f} GB; free some space, "
                        "or name another folder"
                    )
                with atomic.replaced_folder(target) as temporary:
                    fill_serving_folder(
                        temporary,
                        config=learned.config,
                        state=learned.state,
                        architecture=learned.architecture,
                        shard_bytes=SHARD_BYTES,
                    )
        finally:
            deque(learned.state, maxlen=0)


class AdapterPush:
    """Pushes the adapters of a student, a name per version; `keep` versions stay loaded."""

    def __init__(
        self, model: nn.Module, servers: Sequence[VllmServer], folder: Path, *, keep: int
    ) -> None:
        self._model, self._servers, self._folder = model, servers, folder
        self._keep = keep
        self._loaded: list[str] | None = None  # None: adapters of a killed run may be loaded

    def push(self, version: int) -> Pushed:
        files = adapter_files(self._model)
        name = f"{self._folder.name}-{version}"
        on_main(lambda: self._load(name, files))
        return Pushed(adapter=name)

    def _load(self, name: str, files: dict[str, Any]) -> None:
        if self._loaded is None:
            shutil.rmtree(self._folder.parent, ignore_errors=True)
            _each(self._servers, self._unload_leftovers)
            self._loaded = []
        with atomic.replaced_folder(self._folder / name) as temporary:
            for file, content in files.items():
                atomic.write_content(temporary / file, content)
        _each(self._servers, lambda server: server.load_adapter(name, self._folder / name))
        self._loaded.append(name)
        while len(self._loaded) > self._keep:
            old = self._loaded.pop(0)
            _each(self._servers, lambda server, old=old: server.unload_adapter(old))
            shutil.rmtree(self._folder / old)

    def _unload_leftovers(self, server: VllmServer) -> None:
        for name in server.adapters():
            if name.startswith(f"{self._folder.parent.name}-"):
                server.unload_adapter(name)


def _each(servers: Sequence[Any], action: Callable[[Any], None]) -> None:
    calls = [lambda server=server: action(server) for server in servers]
    RunningCalls(calls, at_once=len(calls)).results()


def _bytes_of(model: nn.Module) -> int:
    return sum(full_shape(p).numel() * p.element_size() for p in model.parameters())
