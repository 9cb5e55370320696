"""The servers of `rollout.server`: checked before the models load, and as the run's generator.

The student's weights reach them by a folder. They are gathered one parameter at a time, and rank 0
writes them in small shards, so no rank holds the whole model.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast
from uuid import uuid4

from torch import nn

from megakd.config.rollout import RolloutConfig, RolloutServerConfig, TeacherServerConfig
from megakd.contract.completions import Completion, Sampling
from megakd.contract.tasks import STUDENT
from megakd.engine.collectives import agree, on_main, together
from megakd.engine.sharding import full_shape, is_first_rank
from megakd.errors import ServerError
from megakd.inputs.inputs import RunInputs
from megakd.models.cutting import content_of
from megakd.models.lora import adapter_files
from megakd.models.model_folder import ModelContent, fill_serving_folder
from megakd.rollouts.prompts import Prompts, prompts_of
from megakd.rollouts.store import text_tokens
from megakd.servers.agreement import (
    Wanted,
    check_agreement,
    check_sampling,
    checked_completion,
    served_models,
)
from megakd.servers.http import FIRST_PATIENCE_S, PATIENCE_S, JsonServer, RunningCalls
from megakd.servers.vllm import TextRequest, VllmServer, VllmWeightServer
from megakd.storage import atomic

PROBES = 4
"""Prompts by whose greedy texts the replicas are compared."""
SHARD_BYTES = 256_000_000
"""Largest size of a shard; rank 0 holds one shard and one parameter at a time."""


def replicas_of(
    config: RolloutServerConfig | TeacherServerConfig, *, patience_s: float = PATIENCE_S
) -> list[VllmServer]:
    """Return the replicas of a section `server` in its order; nothing is asked yet."""
    takes_weights = isinstance(config, RolloutServerConfig) and config.push == "full"
    kind, limit = VllmWeightServer if takes_weights else VllmServer, config.time_limit
    return [kind(JsonServer(u, time_limit_s=limit, patience_s=patience_s)) for u in config.url]


def model_names(servers: Sequence[VllmServer], wanted: Wanted) -> list[str]:
    """Return the name of the model at each replica; a collective."""
    return on_main(lambda: [model.name for model in served_models(servers, wanted)])


def check_servers(inputs: RunInputs) -> None:
    """Check the servers of `rollout.server` before any model loads; a collective."""
    rollouts = inputs.config.rollout
    if rollouts is None or rollouts.server is None:
        return
    server = rollouts.server
    prompts, wanted = _asked(inputs, rollouts)
    probes = tuple(map(prompts.prompt, prompts.continued[:PROBES]))

    def check() -> None:
        if server.folder is not None:
            _check_folder(server.folder / run_name(inputs.config.output_dir))
        servers = replicas_of(server, patience_s=FIRST_PATIENCE_S)
        models = served_models(servers, wanted)
        with _errors_of("rollout.server"):
            check_agreement(servers, models, probes, wanted)
        with _errors_of("rollout.sampling"):
            check_sampling(servers, models, probes[0], wanted, rollouts.how)

    on_main(check)


def _check_folder(folder: Path) -> None:
    probe = folder / f"megakd-probe-{time.time_ns()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ServerError(
            f"rollout.server.folder: {folder} cannot be written ({error.strerror}); name a folder "
            "that rank 0 and all servers see"
        ) from error


@contextmanager
def _errors_of(key: str) -> Iterator[None]:
    try:
        yield
    except ServerError as error:
        raise ServerError(f"{key}: {error}") from error


def server_generator(inputs: RunInputs, model: nn.Module, *, rank: int) -> ServerGenerator:
    """Return the generator of `rollout.server`; a collective."""
    rollouts = inputs.config.rollout
    if rollouts is None or rollouts.server is None:
        raise TypeError("the run has no rollout.server")
    server, (_, wanted) = rollouts.server, _asked(inputs, rollouts)
    servers = replicas_of(server)
    models, push = model_names(servers, wanted), None
    if server.folder is not None:
        # A folder for this start alone. vLLM keeps cached prefixes by the name and the path of
        # adapters, also of unloaded ones: other weights under a used name or path would continue
        # prompts from the old prefixes.
        run = run_name(inputs.config.output_dir)
        folder = server.folder.resolve() / run / f"{run}-{agree(uuid4().hex[:8])}"
        if server.push == "full":
            push = FullPush(model, cast("Sequence[VllmWeightServer]", servers), folder)
        else:
            push = AdapterPush(model, servers, folder, keep=rollouts.max_staleness + 1)
    place = (rank, rollouts.rows_per_call)
    return ServerGenerator(servers, models=models, push=push, wanted=wanted, place=place)


def _asked(inputs: RunInputs, rollouts: RolloutConfig) -> tuple[Prompts, Wanted]:
    prompts = prompts_of(inputs.encoded.train, rollouts, inputs.config, inputs.sources[STUDENT])
    tokens = text_tokens(inputs.tokenizer, inputs.sources)
    served = inputs.sources[rollouts.by]
    known = tokens.known or served.config.vocab_size
    return prompts, Wanted(
        name=inputs.config.served_model or "",
        longest=int(prompts.lengths[prompts.continued].max()) + rollouts.max_new_tokens,
        vocabulary=known,
        end_tokens=tuple(sorted(tokens.end)),
        padding=range(known, served.config.vocab_size),
    )


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


class FullPush:
    """Pushes the whole model by a model folder; adapters are merged into the weights."""

    def __init__(self, model: nn.Module, servers: Sequence[VllmWeightServer], folder: Path) -> None:
        self._model, self._servers, self._folder = model, servers, folder

    def push(self, version: int) -> Pushed:
        """Give all servers the weights that the student has now; a collective."""
        target = self._folder / f"version-{version}"
        name = f"{self._folder.name}-{version}"
        learned = content_of(self._model, None)
        together(lambda: self._write(target, learned))
        on_main(lambda: _each(self._servers, lambda server: server.load_weights(target, name)))
        return Pushed(weights=name)

    def _write(self, target: Path, learned: ModelContent) -> None:
        # Every rank iterates over the state, which contains collectives.
        try:
            if is_first_rank():
                # The servers have read it, and other folders of the run are of killed starts.
                shutil.rmtree(self._folder.parent, ignore_errors=True)
                self._folder.mkdir(parents=True, exist_ok=True)  # NFS keeps files that are open
                needed, free = _bytes_of(self._model), shutil.disk_usage(self._folder).free
                if free < needed:
                    raise ServerError(
                        f"rollout.server.folder: {self._folder} has {free / 1e9:.1f} GB free, and "
                        f"the weights of the student take {needed / 1e9:.1f} GB; free some space, "
                        "or name another folder"
                    )
                with atomic.replaced_folder(target) as temporary:
                    fill_serving_folder(temporary, learned, shard_bytes=SHARD_BYTES)
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
    RunningCalls([partial(action, one) for one in servers], at_once=len(servers)).results()


def _bytes_of(model: nn.Module) -> int:
    return sum(full_shape(p).numel() * p.element_size() for p in model.parameters())


class ServerGenerator:
    """A `RemoteGenerator` whose texts come from the replicas of an inference server.

    Each prompt is a request of its own. The prompts of a rank go to all replicas in turn, and rank
    r begins with replica r.

    Args:
        models: the name of the model at each replica.
        push: how the replicas get the weights of the student; None: they keep their weights.
        place: rank of this process, and the number of requests that it makes at the same time.
    """

    def __init__(
        self,
        servers: Sequence[VllmServer],
        *,
        models: Sequence[str],
        push: FullPush | AdapterPush | None,
        wanted: Wanted,
        place: tuple[int, int],
    ) -> None:
        self._servers, self._models, self._push = servers, models, push
        self._wanted = wanted
        self._rank, self._at_once = place
        self._version: int | None = None
        self._pushed = Pushed()

    def update(self, version: int) -> None:
        """Push the weights that the student has now, once per version; a collective."""
        if self._push is not None and version != self._version:
            self._pushed = self._push.push(version)
            self._version = version

    def begin(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
    ) -> Callable[[], list[Completion]]:
        """Ask for the continuations of this rank's prompts; see `RemoteGenerator`."""
        calls = []
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            replica = (self._rank + number) % len(self._servers)
            model = self._pushed.adapter or self._models[replica]
            ends = (self._wanted.end_tokens, self._wanted.padding)
            request = TextRequest(tuple(prompt), seed, sampling, model, *ends)
            server, weights = self._servers[replica], self._pushed.weights
            calls.append(partial(self._complete, server, request, weights))
        return partial(together, RunningCalls(calls, at_once=self._at_once).results)

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
    ) -> list[Completion]:
        """Continue this rank's prompts with the weights of the last update; a collective."""
        return self.begin(prompts, seeds, sampling)()

    def _complete(
        self, server: VllmServer, request: TextRequest, weights: str | None
    ) -> Completion:
        text = server.complete(request)
        if weights is not None and text.weights not in {None, weights}:
            raise ServerError(
                f"{server.url}: the text was generated with the weights {text.weights}, and "
                f"{weights} were pushed; the server was restarted, or another run uses it"
            )
        return checked_completion(text, request, vocabulary=self._wanted.vocabulary, url=server.url)
