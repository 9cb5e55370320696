"""Evaluation of a student on texts that it generates from held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from megakd.contract.rollouts import Completion, Rollout
from megakd.contract.text_names import MATCH, TEXT_METRIC, file_of_step
from megakd.data.rollout_rows import columns_of_rows, rollout_row
from megakd.data.step_layout import StepLayout, StepShape, collate_step
from megakd.engine.collectives import gather, on_main
from megakd.engine.student import device_batch
from megakd.storage.atomic import json_text, write_text
from megakd.training.answers import matcher
from megakd.training.text_curves import TextCurves, by_position

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from megakd.config.generation import GenerationConfig
    from megakd.contract.batch import Batch
    from megakd.contract.rollouts import Generator
    from megakd.contract.stage import Pass
    from megakd.data.rollout_rows import Prompts
    from megakd.engine.distributed import Ranks
    from megakd.training.scoring import Scorer

Watch = Callable[[Sequence["Pass"]], Sequence["Pass"]]
Losses = Callable[[Iterable["Batch"], Watch], Mapping[str, float]]
"""Function that returns the mean losses of this rank's micro-batches; a collective.

The second argument changes the passes of the step, so that they also collect statistics.
"""


class Text(NamedTuple):
    """One generated text of an evaluation; `matches` is None if texts are not compared."""

    rollout: Rollout
    prompt: str
    text: str
    wanted: str
    matches: bool | None

    def record(self) -> dict[str, object]:
        """Return the text as JSON can store it."""
        return {
            "prompt": self.prompt,
            "text": self.text,
            "wanted": self.wanted,
            "finished": self.rollout.completion.finished,
            "matches": self.matches,
        }


class TextEvaluation:
    """Continues held-out prompts, and scores the texts; every call is a collective.

    Args:
        config: the section `eval.generation`.
        prompts: the validation rows and their prompts; the first that are continued are used.
        tokenizer: the tokenizer of the student.
        generator: the generator of the texts.
        scorer: the scorer of the stage, whose micro-batches are used.
        folder: folder for the texts, a file per evaluation.

    Raises:
        MegakdError: a package is missing.
    """

    def __init__(
        self,
        config: GenerationConfig,
        prompts: Prompts,
        tokenizer: PreTrainedTokenizerBase,
        *,
        generator: Generator,
        scorer: Scorer,
        folder: Path,
    ) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._prompts, self._rows = prompts, prompts.continued[: config.rows].tolist()
        self._generator, self._scorer, self._folder = generator, scorer, folder
        self._match = matcher(config)
        self._curves = TextCurves(config.max_new_tokens)
        self.by_position: dict[str, float] = {}
        """Values of the last evaluation by position in the texts, for the log."""

    def scores(self, version: int, losses: Losses | None) -> dict[str, float]:
        """Generate and score the texts, and write them; the same on every rank.

        Args:
            version: number of updates of the student.
            losses: function that returns the mean losses of micro-batches; None: no losses, and
                nothing by position.

        Raises:
            MegakdError: the texts cannot be written.
        """
        texts = self.texts(version)
        lines = [json_text(text.record()) + "\n" for text in texts]
        on_main(lambda: write_text(file_of_step(self._folder, version), "".join(lines)))
        found = text_metrics(texts)
        if losses is not None:
            measured = losses(self.batches(texts), self._curves.watching)
            curves = self._curves.take()
            self.by_position = by_position(curves)
            found |= {
                f"{TEXT_METRIC}{name}": v for name, v in {**curves.get("", {}), **measured}.items()
            }
        return found

    def texts(self, version: int) -> list[Text]:
        """Return the texts for the first rows, the same on every rank.

        Args:
            version: number of updates of the student.
        """
        ranks: Ranks = self._scorer.ranks
        mine = self._rows[ranks.rank :: ranks.world_size]
        prompts = [self._prompts.prompt(row) for row in mine]
        # The row is the seed: evaluations of one run differ only in the student.
        completions = self._generator.generate(prompts, mine, self._config.how)
        own = [
            self._text(Rollout(row, prompt, completion, version, seed=row))
            for row, prompt, completion in zip(mine, prompts, completions, strict=True)
        ]
        parts = gather(own)
        world = ranks.world_size
        return [parts[number % world][number // world] for number in range(len(self._rows))]

    def batches(self, texts: Sequence[Text]) -> Iterable[Batch]:
        """Yield this rank's micro-batches of the texts, equally many on each rank."""
        ranks: Ranks = self._scorer.ranks
        columns = columns_of_rows([rollout_row(text.rollout) for text in texts])
        shape = StepShape.of_batch(
            len(texts), self._scorer.batch_size, rank=ranks.rank, world=ranks.world_size
        )
        for batch in collate_step(columns, StepLayout(shape), self._scorer.collate):
            yield device_batch(batch, ranks.device)

    def _text(self, rollout: Rollout) -> Text:
        def decoded(ids: Sequence[int], *, skip: bool) -> str:
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip))

        wanted = self._prompts.row(rollout.row).input_ids[len(rollout.prompt) :].tolist()
        text = decoded(rollout.completion.ids, skip=True)
        answer = decoded(wanted, skip=True)
        matches = None if self._match is None else self._match(text, answer)
        return Text(rollout, decoded(rollout.prompt, skip=False), text, answer, matches)


def text_metrics(texts: Sequence[Text]) -> dict[str, float]:
    """Return the metrics of at least one generated text."""
    completions = [text.rollout.completion for text in texts]
    found = {
        "text_tokens": sum(len(completion.ids) for completion in completions) / len(texts),
        "text_truncated": sum(not completion.finished for completion in completions) / len(texts),
        "text_distinct_2": distinct_pairs(completions),
    }
    if texts[0].matches is not None:
        found[MATCH] = sum(bool(text.matches) for text in texts) / len(texts)
    return found


def distinct_pairs(completions: Sequence[Completion]) -> float:
    """Return the share of distinct pairs among all pairs of neighbouring tokens; 1 without pairs.

    Li et al. 2016, "A diversity-promoting objective function", distinct-2.
    """
    pairs = [pair for c in completions for pair in zip(c.ids, c.ids[1:], strict=False)]
    return len(set(pairs)) / len(pairs) if pairs else 1.0
