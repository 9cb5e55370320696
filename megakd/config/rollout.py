"""The sections about generated text: `rollout`, `eval.generation`, and the keys `server`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from megakd.config.paths import Folder, Name
from megakd.contract.batch import Source
from megakd.contract.completions import Sampling
from megakd.contract.tasks import STUDENT
from megakd.contract.terms import EACH_ONCE, STRICT, Count, Fraction


def address(text: str) -> str:
    """Return the address of a server without the version of its API; ValueError if it is none."""
    given = re.fullmatch(r"https?://([^/\s:\[\]]+|\[[\da-fA-F:.]+\])(:\d+)?(/[^\s?#]*)?", text)
    # http.client sends neither a host such as a..b nor letters beyond ASCII.
    is_sent = given is not None and text.isascii() and ".." not in given[1]
    if given is None or not is_sent or int((given[2] or ":0")[1:]) > 65535:
        raise ValueError(f"must be of the form http://host:port (got {text!r})")
    # The base of other clients ends in the version of the API.
    return text.rstrip("/").removesuffix("/v1")


Urls = Annotated[
    tuple[Annotated[str, AfterValidator(address)], ...], Field(min_length=1), EACH_ONCE
]


@dataclass(config=STRICT, frozen=True, kw_only=True)
class ServerConfig:
    """Replicas of a vLLM server, in an environment of their own."""

    url: Urls
    """Addresses of the replicas, such as http://node7:8000; all replicas serve one model."""
    model: Name | None = None
    """Name or path of the model as the servers state it; None: that of `rollout.by`, or the
    teacher's `model`, as in the config."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class RolloutServerConfig(ServerConfig):
    """Servers that generate texts."""

    push: Literal["full", "adapter", "none"]
    """How the servers get the weights of the student before they generate: `full` writes the whole
    model into `folder`, `adapter` the adapters of `student.lora`; `none` leaves the servers as they
    are."""
    folder: Folder | None = None
    """Folder for the pushed weights, which rank 0 writes and all servers read, such as a folder in
    /dev/shm if the servers run on the node of rank 0."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TeacherServerConfig(ServerConfig):
    """Servers that answer in place of a teacher's own engine.

    They return the largest log-probabilities of the next token at every position.
    """

    top_k: Count = 64
    """Number of tokens per position that the servers return."""


@dataclass(config=STRICT, frozen=True, kw_only=True)
class SamplingConfig:
    """Settings of the sampling; the defaults sample from the model as it is."""

    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """0: the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Count | None = None


@dataclass(config=STRICT, frozen=True, kw_only=True)
class TextsConfig:
    """How prompts are continued, in training and in evaluations."""

    max_new_tokens: Count
    """Maximum number of generated tokens per row."""
    sampling: SamplingConfig = SamplingConfig()
    rows_per_call: Count = 64
    """Rows that a rank continues at the same time."""
    prompt_tokens: Count | None = None
    """For rows without a prompt (plain text): the number of tokens at the beginning of a row that
    are continued."""

    @property
    def how(self) -> Sampling:
        how = self.sampling
        return Sampling(self.max_new_tokens, how.temperature, how.top_p, how.top_k)


@dataclass(config=STRICT, frozen=True, kw_only=True)
class RolloutConfig(TextsConfig):
    """Rows of a step are replaced by texts that the student generates from the rows' prompts."""

    mix: Fraction = 1.0
    """Probability of a step to learn from texts, and not from the rows of the data as they are;
    lambda of GKD (Agarwal et al. 2024, algorithm 1)."""
    from_step: Annotated[int, Field(ge=0)] = 0
    """The steps before this step use the data alone."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """How many updates the student may be ahead of the texts: texts are generated for
    `max_staleness` + 1 steps at a time. A server generates for `max_staleness` steps at a time,
    one step ahead, while the student learns."""
    by: str = STUDENT
    """The model that generates: `student`, or the name of a teacher for sequence-level distillation
    (Kim and Rush 2016)."""
    server: RolloutServerConfig | None = None
    """Inference servers that generate the texts in place of the run's own engine."""

    @property
    def draws(self) -> set[Source]:
        """Sources that the steps learn from: generated texts (`rollouts`) and the `data`."""
        data: set[Source] = {"data"} if self.mix < 1 or self.from_step else set()
        return data | ({"rollouts"} if self.mix else set())

    @property
    def works_ahead(self) -> bool:
        """True if a server generates the next texts while the student learns."""
        return self.server is not None and self.max_staleness > 0


def rollout_block(step: int, config: RolloutConfig) -> range:
    """Return the steps whose texts are generated together with the texts of `step`."""
    size = config.max_staleness + (0 if config.works_ahead else 1)
    first = config.from_step + (step - config.from_step) // size * size
    return range(first, first + size)


def _with_a_group(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"is not a regular expression: {error} (got {pattern!r})") from None
    if groups != 1:
        raise ValueError(f"must have one group, the answer, such as '#### (.+)' (got {pattern!r})")
    return pattern


@dataclass(config=STRICT, frozen=True, kw_only=True)
class GenerationConfig(TextsConfig):
    """Held-out prompts that every evaluation continues with the student.

    The evaluation reports the length of the texts, the share that `max_new_tokens` cuts, and the
    share whose answer is that of the row.
    """

    rows: Count = 64
    """Number of validation rows; the first rows are used."""
    match: Literal["exact"] | None = None
    """Compare the answers in the texts with those in the rows' own completions, as text. The metric
    is `match`."""
    answer: Annotated[str, AfterValidator(_with_a_group)] | None = None
    """Regular expression with one group; the last match in a text is its answer. None: the whole
    text is the answer."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.0)
