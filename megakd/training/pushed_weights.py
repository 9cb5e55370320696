"""The student's weights for inference servers: written by rank 0 into a folder that servers read.

Weights are gathered one parameter at a time, and rank 0 writes them in small shards, so no rank
holds the whole model.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from megakd.engine.collectives import on_main, together
from megakd.engine.sharding import full_shape, is_first_rank
from megakd.errors import ServerError
from megakd.models.export import fill_serving_folder
from megakd.models.lora import adapter_files
from megakd.servers.threads import Running
from megakd.storage import atomic
from megakd.training.stage_folder import Learned

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import nn

    from megakd.servers.protocol import AdapterServer, WeightServer

SHARD_BYTES = 256_000_000
"""Largest size of a shard; rank 0 holds one shard and one parameter at a time."""


class Pushed(NamedTuple):
    """How servers name the weights that they got.

    adapter: the name of the adapters in requests; None: the model itself has the weights.
    weights: the version that answers state; None: answers state no version.
    """

    adapter: str | None = None
    weights: str | None = None


class Push(Protocol):
    """A way to give servers the weights of the student."""

    def push(self, version: int) -> Pushed:
        """Give all servers the weights that the student has now; a collective.

        Args:
            version: number of updates of the student.

        Raises:
            MegakdError: the folder cannot be written, or a server does not load the weights; raised
                on every rank.
        """
        ...


def run_name(output_dir: Path) -> str:
    """Return the beginning of all names of a run's weights; other output folders have others."""
    place = hashlib.blake2b(str(output_dir.resolve()).encode(), digest_size=4).hexdigest()
    return f"{output_dir.name}-{place}"


class FullPush:
    """Pushes the whole model by a model folder; adapters are merged into the weights.

    Args:
        model: the student, sharded or not.
        servers: all replicas.
        folder: a folder for this run alone, which rank 0 and the servers see.
        start: a text that no other start of any run has, the same on all ranks.
    """

    def __init__(
        self, model: nn.Module, servers: Sequence[WeightServer], folder: Path, *, start: str
    ) -> None:
        self._model, self._servers, self._folder = model, servers, folder
        self._start = start

    def push(self, version: int) -> Pushed:
        """Write the weights and let all servers read them; see `Push`."""
        name = f"{self._folder.name}-{self._start}-{version}"
        target = self._folder / name
        learned = Learned.of(self._model, None)
        together(lambda: self._write(target, learned))
        on_main(lambda: _each(self._servers, lambda server: server.load_weights(target, name)))
        return Pushed(weights=name)

    def _write(self, target: Path, learned: Learned) -> None:
        """Write on rank 0; every rank iterates over the state, which contains collectives."""
        try:
            if is_first_rank():
                shutil.rmtree(self._folder, ignore_errors=True)  # the servers have read it
                self._folder.mkdir(parents=True)
                _check_room(self._folder, _bytes_of(self._model))
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
    """Pushes the adapters of a student, under a name and a path that were never used before.

    vLLM keeps the cached prefixes of an adapter by its name and path, also after the adapter was
    unloaded: other weights under a used name would continue prompts from the old prefixes.

    Args:
        model: a student with adapters, sharded or not.
        servers: all replicas.
        folder: a folder for this run alone, which rank 0 and the servers see.
        start: a text that no other start of any run has, the same on all ranks.
        keep: number of versions that stay loaded.
    """

    def __init__(
        self,
        model: nn.Module,
        servers: Sequence[AdapterServer],
        folder: Path,
        *,
        start: str,
        keep: int,
    ) -> None:
        self._model, self._servers, self._folder = model, servers, folder
        self._start, self._keep = start, keep
        self._loaded: list[str] | None = None  # None: adapters of a killed run may be loaded

    def push(self, version: int) -> Pushed:
        """Write the adapters, let all servers load them, and unload old versions; see `Push`."""
        files = adapter_files(self._model)
        name = f"{self._folder.name}-{self._start}-{version}"
        on_main(lambda: self._load(name, files))
        return Pushed(adapter=name)

    def _load(self, name: str, files: dict[str, Any]) -> None:
        if self._loaded is None:
            shutil.rmtree(self._folder, ignore_errors=True)
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

    def _unload_leftovers(self, server: AdapterServer) -> None:
        for name in server.adapters():
            if name.startswith(f"{self._folder.name}-"):
                server.unload_adapter(name)


def _each(servers: Sequence[Any], action: Callable[[Any], None]) -> None:
    """Call `action` for all servers at the same time."""
    calls = [lambda server=server: action(server) for server in servers]
    Running(calls, at_once=len(calls)).results()


def _bytes_of(model: nn.Module) -> int:
    return sum(full_shape(p).numel() * p.element_size() for p in model.parameters())


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ServerError(
            f"rollout.server.folder: {folder} has {free / 1e9:.1f} GB free, and the weights of the "
            f"student take {needed / 1e9:.1f} GB; free some space, or name another folder"
        )
