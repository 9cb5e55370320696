"""The export of a model with the vocabulary of its task, scored before and after."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from megakd.commands.scored_models import score_folder
from megakd.config.run import RunConfig
from megakd.contract.tasks import LANGUAGE_TASKS
from megakd.data.chat.conversations import is_chat
from megakd.data.tokenizers import training_texts
from megakd.errors import ConfigError
from megakd.inputs.run_data import splits_of
from megakd.models.trimming import WHERE, trim_vocabulary
from megakd.reports.quantities import short_count
from megakd.reports.table import score
from megakd.run.finished_run import adding, export_run
from megakd.run.main import started
from megakd.run.run_report import row_count


def export_trimmed(
    config: RunConfig, stage: str | None, to: Path, *, add: Callable[[Path], None] | None
) -> list[str]:
    """Export a stage with the tokens of its texts; return what to print.

    The texts are those of the training rows and, if there are test rows to be scored, of the
    validation rows.

    Args:
        add: called with the folder after its vocabulary is cut, see `export_run`.
    """
    lines: list[str] = []
    add = add or adding(config.save.formats)
    with started(config) as ranks:
        splits = splits_of(config)
        has_text = "text" in splits.train.column_names and not is_chat(splits.train)
        if ranks.world_size > 1 or splits.stream or not has_text:
            raise ConfigError(
                f"{WHERE} needs one process and training rows with a text: conversations and "
                "streams have none; leave the option out"
            )
        # Texts whose tokens are all kept cannot show what a cut costs.
        others = () if splits.test is None else (splits._replace(train=splits.validation),)

        def texts() -> Iterator[str]:
            return chain.from_iterable(map(training_texts, (splits, *others)))

        def trim(folder: Path) -> None:
            # Per token of another vocabulary, a loss does not compare.
            is_scored = config.task.type not in LANGUAGE_TASKS
            before = score_folder(config, splits, ranks, folder) if is_scored else None
            trimmed = trim_vocabulary(folder, texts)
            weights, fewer = map(short_count, trimmed.parameters)
            lines.append(
                f"tokens: {trimmed.tokens[0]:,} before, {trimmed.tokens[1]:,} now; weights: "
                f"{weights} before, {fewer} now"
            )
            if before is not None:
                split, rows = "test" if others else "validation", row_count(splits.held_out)
                now = score(*score_folder(config, splits, ranks, folder))
                lines.append(
                    f"{before[0]} on {split} ({rows:,} rows): {score(*before)} before, {now} now"
                )
            if add is not None:
                add(folder)

        export_run(config, stage, to, add=trim)
    return lines
