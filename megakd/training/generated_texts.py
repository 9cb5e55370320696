"""The generators of a stage, engines or servers, and the batches and scores of their texts.

The student's weights reach them by a folder. They are gathered one parameter at a time, and rank 0
writes them in small shards, so no rank holds the whole model.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import nn

from megakd.config.sections import GenerationConfig, RolloutConfig, Sampling, ServerConfig
from megakd.config.task import STUDENT, TEXTS
from megakd.data.batch import Teacher
from megakd.data.loader import RowOrder, StepLoader
from megakd.engine.collectives import activity, broadcast, on_main, raise_on_all
from megakd.engine.sharding import full_shape, is_first_rank, whole_model
from megakd.errors import ServerError
from megakd.models.cutting import content_of
from megakd.models.end_tokens import TextTokens, text_tokens
from megakd.models.generation import Completion, Generator, complete
from megakd.models.lora import adapter_files
from megakd.models.model_folder import ModelContent, fill_serving_folder
from megakd.process import files
from megakd.teachers.frozen import FrozenTeacher
from megakd.teachers.rollouts import Prompts, RolloutSource, prompts_of
from megakd.teachers.scored_texts import TextEvaluation
from megakd.teachers.servers import (
    FIRST_PATIENCE_S,
    PATIENCE_S,
    Requirements,
    VllmServer,
    running_calls,
)
from megakd.training.batches import StageParts
from megakd.training.checkpoint import steps_in
from megakd.training.evaluation import scorer_for
from megakd.training.inputs import RunInputs
from megakd.training.student import StudentEngine

PROBES, PROBE_TOKENS = 4, 16
"""Prompts by whose greedy texts the replicas are compared, and the tokens of these texts."""

TIME_LIMIT_S = 600.0
"""For the answer to one request, including all retries while a server is busy."""

SHARD_BYTES = 256_000_000
"""Largest size of a shard; rank 0 holds one shard and one parameter at a time."""

Push = Callable[[int], dict[str, Any]]
"""Gives all servers the weights of the student at a version, and returns what changes in the
`ServedModel` of later requests; a collective."""


def replicas_of(config: ServerConfig, *, patience_s: float = PATIENCE_S) -> list[VllmServer]:
    """Return the replicas of a section `server` in its order; nothing is asked yet."""
    return [VllmServer(url, time_limit_s=TIME_LIMIT_S, patience_s=patience_s) for url in config.url]


def check_servers(inputs: RunInputs) -> None:
    """Check the servers of `rollout.server` before any model loads; a collective."""
    rollouts = inputs.config.rollout
    if rollouts is None or rollouts.server is None:
        return
    server = rollouts.server
    prompts, requirements = _asked(inputs, rollouts)
    probes = [prompts.prompt(row) for row in prompts.continued[:PROBES]]

    def check() -> None:
        if server.folder is not None:
            folder = server.folder / run_name(inputs.config.output_dir)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                files.write_text(folder / "probe", "")
                (folder / "probe").unlink()
            except OSError as error:
                raise ServerError(
                    f"rollout.server.folder: {folder} cannot be written ({error.strerror}); name "
                    "a folder that rank 0 and all servers see"
                ) from error
        servers = replicas_of(server, patience_s=FIRST_PATIENCE_S)
        try:
            check_texts(servers, probes, requirements, rollouts.how)
        except ServerError as error:
            raise ServerError(f"rollout.server: {error}") from error

    on_main(check)


def check_texts(
    servers: Sequence[VllmServer],
    prompts: Sequence[tuple[int, ...]],
    requirements: Requirements,
    sampling: Sampling,
) -> None:
    """Check each replica's model and one text by `sampling`, and compare their greedy texts.

    Replicas that state different weights are not compared with each other, and paused replicas are
    not asked: some have weights that an interrupted run has pushed, and all get new weights before
    the first text.
    """
    greedy = Sampling(PROBE_TOKENS, temperature=0.0)
    first: dict[tuple[str | None, int], tuple[str, tuple[int, ...]]] = {}
    for server in servers:
        model = server.model(requirements)
        if model.paused:
            continue
        for number, prompt in enumerate([prompts[0], *prompts]):
            most = min(PROBE_TOKENS, requirements.longest - len(prompt))
            rules = (greedy if number else sampling)._replace(max_new_tokens=most)
            ids = server.complete(prompt, 0, rules, requirements, model=model).ids
            if number == 0:  # sampled texts may differ
                continue
            other, text = first.setdefault((model.weights, number), (server.url, ids))
            if text != ids:
                raise ServerError(
                    f"{other} and {server.url} disagree: their greedy texts for a prompt of "
                    f"{len(prompt)} tokens, beginning with {list(prompt[:8])}, are {list(text)} "
                    f"and {list(ids)}; check that all replicas serve the same weights in the same "
                    "precision"
                )


def server_generator(inputs: RunInputs, model: nn.Module, *, rank: int) -> ServerGenerator:
    """Return the generator of `rollout.server`; a collective."""
    rollouts = inputs.config.rollout
    if rollouts is None or rollouts.server is None:
        raise TypeError("the run has no rollout.server")
    server, (_, requirements) = rollouts.server, _asked(inputs, rollouts)
    servers = replicas_of(server)
    push: Push | None = None
    if server.folder is not None:
        # A folder for this start alone. vLLM keeps cached prefixes by the name and the path of
        # adapters, also of unloaded ones: other weights under a used name or path would continue
        # prompts from the old prefixes.
        run = run_name(inputs.config.output_dir)
        folder = server.folder.resolve() / run / f"{run}-{broadcast(uuid4().hex[:8])}"
        if server.push == "full":
            push = full_push(model, servers, folder)
        else:
            push = adapter_push(model, servers, folder, keep=rollouts.max_staleness + 1)
    place = (rank, rollouts.rows_per_call)
    return ServerGenerator(servers, requirements, push=push, place=place)


def _asked(inputs: RunInputs, rollouts: RolloutConfig) -> tuple[Prompts, Requirements]:
    prompts = prompts_of(inputs.encoded.train, rollouts, inputs.config, inputs.sources[STUDENT])
    tokens = text_tokens(inputs.tokenizer, inputs.sources)
    served = inputs.sources[rollouts.by]
    known = tokens.known or served.config.vocab_size
    return prompts, Requirements(
        name=inputs.config.served_model or "",
        longest=int(prompts.lengths[prompts.continued].max()) + rollouts.max_new_tokens,
        vocabulary=known,
        end_tokens=tuple(sorted(tokens.end)),
        padding=range(known, served.config.vocab_size),
        takes_weights=rollouts.server is not None and rollouts.server.push == "full",
        tokenizer=inputs.tokenizer,
    )


def run_name(output_dir: Path) -> str:
    """Return a name of a run that differs from the names of runs in other output folders."""
    place = hashlib.blake2b(str(output_dir.resolve()).encode(), digest_size=4).hexdigest()
    return f"{output_dir.name}-{place}"


def full_push(model: nn.Module, servers: Sequence[VllmServer], folder: Path) -> Push:
    """Return a push of the whole model by a model folder; adapters are merged into the weights."""

    def write(target: Path, learned: ModelContent) -> None:
        # Every rank iterates over the state, which contains collectives.
        try:
            if is_first_rank():
                # The servers have read it, and other folders of the run are of killed starts.
                shutil.rmtree(folder.parent, ignore_errors=True)
                folder.mkdir(parents=True, exist_ok=True)  # NFS keeps files that are open
                needed = sum(full_shape(p).numel() * p.element_size() for p in model.parameters())
                if (free := shutil.disk_usage(folder).free) < needed:
                    raise ServerError(
                        f"rollout.server.folder: {folder} has {free / 1e9:.1f} GB free, and the "
                        f"weights of the student take {needed / 1e9:.1f} GB; free some space, or "
                        "name another folder"
                    )
                with files.replaced_folder(target) as temporary:
                    fill_serving_folder(temporary, learned, shard_bytes=SHARD_BYTES)
        finally:
            deque(learned.state, maxlen=0)

    def push(version: int) -> dict[str, Any]:
        target, name = folder / f"version-{version}", f"{folder.name}-{version}"
        learned = content_of(model, None)
        raise_on_all(lambda: write(target, learned))
        on_main(lambda: _each(servers, lambda server: server.load_weights(target, name)))
        return {"weights": name}

    return push


def adapter_push(
    model: nn.Module, servers: Sequence[VllmServer], folder: Path, *, keep: int
) -> Push:
    """Return a push of adapters, a name per version, of which `keep` versions stay loaded."""
    loaded: list[str] = []

    def unload_leftovers(server: VllmServer) -> None:
        for name in server.adapters():
            if name.startswith(f"{folder.parent.name}-"):
                server.unload_adapter(name)

    def load(name: str, parts: dict[str, Any]) -> None:
        if not loaded:  # adapters of a killed run may be
            shutil.rmtree(folder.parent, ignore_errors=True)
            _each(servers, unload_leftovers)
        with files.replaced_folder(folder / name) as temporary:
            for file, content in parts.items():
                files.write_content(temporary / file, content)
        _each(servers, lambda server: server.load_adapter(name, folder / name))
        loaded.append(name)
        if len(loaded) > keep:
            old = loaded.pop(0)
            _each(servers, lambda server: server.unload_adapter(old))
            shutil.rmtree(folder / old)

    def push(version: int) -> dict[str, Any]:
        parts, name = adapter_files(model), f"{folder.name}-{version}"
        on_main(lambda: load(name, parts))
        return {"name": name}

    return push


def _each(servers: Sequence[VllmServer], action: Callable[[VllmServer], None]) -> None:
    running_calls([partial(action, one) for one in servers], at_once=len(servers))()


class ServerGenerator:
    """A `Generator` whose texts come from the replicas of an inference server.

    Each prompt is a request of its own. The prompts of a rank go to all replicas in turn, and rank
    r begins with replica r.

    Args:
        push: how the replicas get the weights of the student; None: they keep their weights.
        place: rank of this process, and the number of requests that it makes at the same time.
    """

    def __init__(
        self,
        servers: Sequence[VllmServer],
        requirements: Requirements,
        *,
        push: Push | None,
        place: tuple[int, int],
    ) -> None:
        self._servers, self._requirements, self._push = servers, requirements, push
        # The weights of the start are not those of a version.
        models = on_main(lambda: [server.model(requirements) for server in servers])
        self._models = [model._replace(weights=None) for model in models]
        self._rank, self._at_once = place
        self._version: int | None = None

    def update(self, version: int) -> None:
        """Push the weights that the student has now, once per version; a collective."""
        if self._push is not None and version != self._version:
            with activity(f"sending the weights of step {version} to the servers"):
                changes = self._push(version)
            self._models = [model._replace(**changes) for model in self._models]
            self._version = version

    def begin(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
    ) -> Callable[[], list[Completion]]:
        """Ask for the continuations of this rank's prompts; see `Generator`."""
        calls = []
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            replica = (self._rank + number) % len(self._servers)
            ask = partial(self._servers[replica].complete, model=self._models[replica])
            calls.append(partial(ask, tuple(prompt), seed, sampling, self._requirements))
        return partial(raise_on_all, running_calls(calls, at_once=self._at_once))


class LocalGenerator:
    """A generator that uses the weights of an engine, `rows_at_once` prompts on a rank."""

    def __init__(
        self, engine: StudentEngine | Teacher, *, tokens: TextTokens, rows_at_once: int
    ) -> None:
        if not isinstance(engine, StudentEngine | FrozenTeacher):
            raise TypeError(f"a {type(engine).__name__} generates no text")
        self._engine = engine
        self._complete = partial(complete, tokens=tokens, rows_at_once=rows_at_once)

    def update(self, version: int) -> None:
        """Do nothing: the engine has the weights."""

    def begin(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
    ) -> Callable[[], list[Completion]]:
        def generate() -> list[Completion]:
            if isinstance(self._engine, FrozenTeacher):
                self._engine.evict()  # a copy of shards to the device may still be running
                module = self._engine.model
            else:
                module = self._engine.student
            with whole_model(module) as model:
                # Ranks that finish early wait here, however long the others generate.
                return raise_on_all(lambda: self._complete(model, prompts, seeds, sampling))

        return generate


def rollout_batches(parts: StageParts, rollouts: RolloutConfig) -> RolloutSource:
    """Return batches of which some steps learn from generated texts; a collective."""
    config, student = parts.assembly.config, parts.models[STUDENT]
    prepared, layout = parts.of_model.prepared, parts.layout
    generator: Generator
    if rollouts.server is None:
        generator = LocalGenerator(
            parts.models[rollouts.by],
            tokens=text_tokens(prepared.tokenizer, prepared.sources),
            rows_at_once=rollouts.rows_per_call,
        )
    elif isinstance(student, StudentEngine):
        rank = parts.assembly.ranks.rank
        generator = server_generator(prepared, student.student, rank=rank)
    else:
        raise TypeError(f"a {type(student).__name__} does not learn")
    train = prepared.encoded.train
    prompts = prompts_of(train, rollouts, config, prepared.sources[STUDENT])
    collate = scorer_for(parts.of_model, parts.stage.train).collate
    data = None
    if "data" in rollouts.draws:
        data = StepLoader(train, collate, layout=layout, seed=config.seed)
    folder = config.output_dir / "rollouts" / parts.stage.name
    if not oldest(parts.checkpoints):  # texts of a start that no checkpoint is left of
        on_main(lambda: shutil.rmtree(folder, ignore_errors=True))
    return RolloutSource(
        config=rollouts,
        prompts=prompts,
        continued=RowOrder(prompts.continued, layout.shape, seed=config.seed),
        data=data,
        collate=collate,
        layout=layout,
        generator=generator,
        folder=folder,
        seed=config.seed,
        oldest=lambda: oldest(parts.checkpoints),
    )


def oldest(folder: Path) -> int:
    """Return the step of the oldest checkpoint of a stage; 0 without one."""
    return min(steps_in(folder), default=0)


def text_evaluation(parts: StageParts, generation: GenerationConfig) -> TextEvaluation:
    """Return the evaluation of the student on generated texts."""
    prepared, config = parts.of_model.prepared, parts.assembly.config
    rows, student = prepared.encoded.validation, prepared.sources[STUDENT]
    return TextEvaluation(
        generation,
        prompts_of(rows, generation, config, student, key="eval.generation"),
        prepared.tokenizer,
        generator=LocalGenerator(
            parts.models[STUDENT],
            tokens=text_tokens(prepared.tokenizer, prepared.sources),
            rows_at_once=generation.rows_per_call,
        ),
        ranks=parts.assembly.ranks,
        folder=config.output_dir / TEXTS / parts.stage.name,
    )
