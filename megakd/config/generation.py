"""The section `eval.generation` of a run config: texts that evaluations generate and score."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator
from pydantic.dataclasses import dataclass

from megakd.config.rollout import SamplingConfig
from megakd.contract.rollouts import Sampling
from megakd.contract.terms import STRICT, Count


def _with_a_group(pattern: str) -> str:
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"is not a regular expression: {error} (got {pattern!r})") from None
    if groups != 1:
        raise ValueError(f"must have one group, the answer, such as '#### (.+)' (got {pattern!r})")
    return pattern


@dataclass(config=STRICT, frozen=True, kw_only=True)
class GenerationConfig:
    """Held-out prompts that every evaluation continues with the student.

    The evaluation reports the length of the texts, the share that `max_new_tokens` cuts, the share
    of distinct pairs of tokens, and the losses of the objective on the texts.
    """

    max_new_tokens: Count
    rows: Count = 64
    """Number of validation rows; the first rows are used."""
    match: Literal["exact", "math"] | None = None
    """Compare the texts with the rows' own completions: `exact` compares the answers as text,
    `math` as mathematics (needs the package math-verify). The metric is `match`."""
    answer: Annotated[str, AfterValidator(_with_a_group)] | None = None
    """Regular expression with one group; the last match in a text is its answer. None: the whole
    text is the answer."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.0)
    rows_per_call: Count = 64
    """Rows that a rank continues at the same time."""
    prompt_tokens: Count | None = None
    """For rows without a prompt (plain text): the number of tokens at the beginning of a row that
    are continued."""

    @property
    def longest(self) -> int:
        """The length limit."""
        return self.max_new_tokens

    @property
    def how(self) -> Sampling:
        """The settings of the generator."""
        given = self.sampling
        return Sampling(self.max_new_tokens, given.temperature, given.top_p, given.top_k)
