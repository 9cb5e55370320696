"""The inference servers of a run: checked before its models load, and as its generator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from torch import nn
from transformers import PreTrainedTokenizerBase

from megakd.config.rollout import (
    RolloutConfig,
    RolloutServerConfig,
    ServerKind,
    TeacherServerConfig,
)
from megakd.config.run import RunConfig
from megakd.contract.tasks import STUDENT
from megakd.engine.collectives import on_main
from megakd.errors import ServerError
from megakd.inputs.inputs import RunInputs
from megakd.models.generation import generation_config_of, listed_ends
from megakd.models.source import ModelSource
from megakd.rollouts.generators import text_tokens
from megakd.rollouts.prompts import prompts_of
from megakd.servers.checks import Wanted, check_agreement, check_sampling, served_models
from megakd.servers.generator import ServerGenerator
from megakd.servers.hidden_states import check_folder
from megakd.servers.http import FIRST_PATIENCE_S, PATIENCE_S, JsonServer
from megakd.servers.protocol import TextServer
from megakd.servers.push import AdapterPush, FullPush, run_name, start_folder
from megakd.servers.sglang import SglangServer
from megakd.servers.vllm import VllmServer, VllmWeightServer

PROBES = 4
"""Prompts by whose greedy texts the replicas are compared."""


def replicas_of(
    config: RolloutServerConfig, *, patience_s: float = PATIENCE_S
) -> list[VllmServer | SglangServer]:
    """Return the replicas of `rollout.server` in the order of the config; nothing is asked yet."""
    kind = SglangServer if config.kind == "sglang" else VllmServer
    if kind is VllmServer and config.push == "full":
        kind = VllmWeightServer
    return list(map(kind, connections(config, patience_s)))


def connections(
    config: RolloutServerConfig | TeacherServerConfig, patience_s: float
) -> list[JsonServer]:
    """Return the connections to all replicas in the order of the config; nothing is asked yet."""
    limit = config.time_limit
    return [JsonServer(url, time_limit_s=limit, patience_s=patience_s) for url in config.url]


def model_names(servers: Sequence[TextServer], wanted: Wanted) -> list[str]:
    """Return the name of the model at each replica; a collective."""
    return on_main(lambda: [model.name for model in served_models(servers, wanted)])


class Served(NamedTuple):
    """The servers of a run, and what the run needs of them."""

    rollouts: RolloutConfig
    server: RolloutServerConfig
    wanted: Wanted
    probes: tuple[tuple[int, ...], ...]


def check_servers(config: RunConfig, inputs: RunInputs) -> None:
    """Check the servers of `rollout.server` before any model loads; a collective.

    Raises:
        ServerError: a server is not there, serves another model or version, has too small a
            context, or disagrees with itself or with another replica; raised on every rank.
    """
    served = _served(config, inputs)
    if served is None:
        return

    def check() -> None:
        if served.wanted.pushed is not None:
            wanted = "a folder that rank 0 and all servers see"
            check_folder(served.wanted.pushed, "rollout.server.folder", wanted, is_made=True)
        servers = replicas_of(served.server, patience_s=FIRST_PATIENCE_S)
        models = served_models(servers, served.wanted)
        check_agreement(servers, models, served.probes, served.wanted)
        sampling = served.rollouts.sampling_at(0)
        check_sampling(servers, models, served.probes[0], served.wanted, sampling)

    on_main(check)


def server_generator(
    config: RunConfig, inputs: RunInputs, model: nn.Module, *, rank: int
) -> ServerGenerator:
    """Return the generator of `rollout.server`; a collective."""
    served = _served(config, inputs)
    if served is None:
        raise TypeError("the run has no rollout.server")
    servers = replicas_of(served.server)
    return ServerGenerator(
        servers,
        models=model_names(servers, served.wanted),
        push=_push(config, served, servers, model),
        wanted=served.wanted,
        place=(rank, served.rollouts.rows_per_call),
    )


def _push(
    config: RunConfig, served: Served, servers: Sequence[TextServer], model: nn.Module
) -> FullPush | AdapterPush | None:
    if served.wanted.pushed is None:
        return None
    folder = start_folder(served.wanted.pushed)
    if served.server.push == "full":
        return FullPush(model, cast("Sequence[SglangServer | VllmWeightServer]", servers), folder)
    keep = served.rollouts.max_staleness + 1
    return AdapterPush(model, cast("Sequence[VllmServer]", servers), folder, keep=keep)


def _served(config: RunConfig, inputs: RunInputs) -> Served | None:
    rollouts = config.rollout
    if rollouts is None or rollouts.server is None:
        return None
    tokens = text_tokens(inputs.tokenizer, inputs.sources)
    served = inputs.sources[rollouts.by]
    known = tokens.known or served.config.vocab_size
    prompts = prompts_of(inputs.encoded.train, rollouts, config, inputs.sources[STUDENT])
    folder = rollouts.server.folder
    wanted = Wanted(
        name=config.served_model or "",
        pushed=None if folder is None else folder.resolve() / run_name(config.output_dir),
        longest=int(prompts.lengths[prompts.continued].max()) + rollouts.longest,
        vocabulary=known,
        end_tokens=tuple(sorted(_ends(rollouts.server.kind, tokens.end, served, inputs.tokenizer))),
        padding=range(known, served.config.vocab_size),
    )
    probes = tuple(map(prompts.prompt, prompts.continued[:PROBES]))
    return Served(rollouts, rollouts.server, wanted, probes)


def _ends(
    kind: ServerKind, ends: frozenset[int], served: ModelSource, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    # vLLM ends texts at the tokens of the request alone. SGLang also ends texts at all end tokens
    # in the folder of the model, and at `<|eom_id|>` of Llama 3 (`additional_stop_token_ids`).
    if kind == "vllm":
        return ends
    added = cast("Any", tokenizer).get_added_vocab()
    ends |= {number for text, number in added.items() if text == "<|eom_id|>"}
    others = (listed_ends(served.config) | listed_ends(generation_config_of(served))) - ends
    if others and served.folder is not None:
        raise ServerError(
            f"rollout.server.kind: sglang ends texts at the tokens {sorted(others)} too, which are "
            f"eos_token_id in config.json or generation_config.json in {served.folder}, and the "
            f"student ends texts with {sorted(ends)}; correct eos_token_id there, or use kind: vllm"
        )
    return ends
