"""The keys `rollout.server` and `teacher.server`: inference servers that generate and teach."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from megakd.config.paths import Folder
from megakd.contract.terms import STRICT, Count, Positive

_LAST_PORT = 65535
ServerKind = Literal["vllm", "sglang"]


def _address(text: str) -> str:
    given = re.fullmatch(r"https?://([^/\s:\[\]]+|\[[\da-fA-F:.]+\])(:\d+)?(/[^\s?#]*)?", text)
    if given is None or int((given[2] or ":0")[1:]) > _LAST_PORT:
        raise ValueError(f"must be of the form http://host:port (got {text!r})")
    return text.rstrip("/")


def _different(urls: tuple[str, ...]) -> tuple[str, ...]:
    twice = sorted({url for url in urls if urls.count(url) > 1})
    if twice:
        raise ValueError(f"must name each replica once (got {', '.join(twice)} more than once)")
    return urls


Urls = Annotated[
    tuple[Annotated[str, AfterValidator(_address)], ...],
    Field(min_length=1),
    AfterValidator(_different),
]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class RolloutServerConfig:
    """Replicas of an inference server, in an environment of their own, that generate texts."""

    url: Urls
    """Addresses of the replicas, such as http://node7:8000; all replicas serve one model."""
    kind: ServerKind
    push: Literal["full", "adapter", "none"]
    """How the servers get the weights of the student before they generate: `full` writes the whole
    model into `folder`, `adapter` the adapters of `student.lora`; `none` leaves the servers as they
    are."""
    model: str | None = None
    """Name or path of the model as the servers state it; None: the model that `rollout.by` names,
    as in the config."""
    folder: Folder | None = None
    """Folder for the pushed weights, which rank 0 writes and all servers read, such as a folder in
    /dev/shm if the servers run on the node of rank 0."""
    time_limit: Positive = 600.0
    """Seconds for the answer to one request, including all retries while a server is busy."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TeacherServerConfig:
    """Replicas of an inference server that answer in place of a teacher's own engine.

    The servers return the largest log-probabilities of the next token at every position (`top_k`),
    or write the hidden states of every position into files (`states`).
    """

    url: Urls
    """Addresses of the replicas; all replicas serve one model."""
    kind: Literal["vllm"] = "vllm"
    model: str | None = None
    """Name or path of the model as the servers state it; None: the teacher's `model`."""
    top_k: Count | None = None
    """Number of tokens per position that the servers return; None: 64 without `states`."""
    states: Folder | None = None
    """Folder into which the servers write hidden states, and from which every rank reads and
    deletes them, such as a folder in /dev/shm; not with `top_k`. Each rank has the final norm and
    the output matrix of the teacher, so that the soft targets are exact."""
    check_against: Folder | None = None
    """Folder with the model of the servers: rank 0 loads it before the run, and compares its
    answers with those of the servers. None: the servers are compared with themselves alone."""
    time_limit: Positive = 600.0
    """Seconds for the answer to one request, including all retries while a server is busy."""

    @property
    def best_tokens(self) -> int:
        """Number of tokens per position that the servers return; without `states`."""
        return self.top_k or 64
