"""What a finished student says of texts: a label, a set of labels, or a number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import transformers
from transformers import TextClassificationPipeline

from megakd.config.run import RunConfig
from megakd.config.task import LANGUAGE_TASKS
from megakd.data.files import scored_table
from megakd.data.rows import text_columns
from megakd.errors import ConfigError, DataError
from megakd.models.fitting import MULTI_LABEL, model_label_names
from megakd.models.model_folder import brings_code
from megakd.models.thresholds import deciding_threshold, stored_threshold
from megakd.process.files import json_text, write_text
from megakd.process.seals import check_given
from megakd.reports.table import AUTO_CLASSES

TEXTS_AT_ONCE = 32

Text = str | Sequence[str] | Mapping[str, str]
"""A text, or a pair of texts: two texts, or an object with `text` and `text_pair`."""

Prediction = str | list[str] | float


class SetsPipeline(TextClassificationPipeline):
    """A pipeline that gives every label whose probability reaches its threshold in the config."""

    def postprocess(self, model_outputs: Any, *_: object, **__: object) -> Any:
        every = len(self.model.config.id2label or ())
        scored: Any = super().postprocess(model_outputs, top_k=every, _legacy=False)
        least, names = deciding_threshold(self.model.config), model_label_names(self.model.config)
        of_labels = least if isinstance(least, tuple) else [least] * every
        by_label = dict(zip(names, of_labels, strict=True))
        return [one for one in scored if one["score"] >= by_label[one["label"]]]


def pipeline_of(folder: Path, config: RunConfig, **options: object) -> Any:
    """Return a student in a `transformers.pipeline`; one of several labels gives sets of them."""
    check_given(folder, "the student")
    trusted = {"trust_remote_code": True} if brings_code(folder) else {}
    model_config = transformers.AutoConfig.from_pretrained(folder, **trusted)
    if getattr(model_config, "problem_type", None) == MULTI_LABEL:
        stored_threshold(model_config)  # raises before the weights are loaded
        options = {"pipeline_class": SetsPipeline, **options}
    name: Any = AUTO_CLASSES[config.task.type][1]
    return transformers.pipeline(name, model=str(folder), **{**trusted, **options})


def predict_texts(folder: Path, config: RunConfig, texts: Iterable[Text]) -> list[Prediction]:
    """Return what a student says of each text, which is cut at the length of the training.

    Returns:
        A label, all labels of a text if it may have any number of them, or a number.

    Raises:
        ConfigError: the student is a language model.
        DataError: a text is none.
    """
    kind = config.task.type
    if kind in LANGUAGE_TASKS:
        raise ConfigError(f"task.type: a student of {kind} gives no labels; use pipeline()")
    if isinstance(texts, str):
        raise DataError("texts: is one text; give a list of texts")
    asked = [_text_inputs(text, number) for number, text in enumerate(texts, 1)]
    if not asked:
        return []
    made, length = pipeline_of(folder, config), config.task.row_length
    options = {"function_to_apply": "none"} if kind == "regression" else {}
    answers = made(asked, batch_size=TEXTS_AT_ONCE, truncation=True, max_length=length, **options)
    if kind == "regression":
        return [answer["score"] for answer in answers]
    if isinstance(made, SetsPipeline):
        return [[one["label"] for one in answer] for answer in answers]
    return [answer["label"] for answer in answers]


def _text_inputs(text: object, number: int) -> dict[str, str]:
    parts = text
    if isinstance(text, Mapping):
        parts = [text[key] for key in ("text", "text_pair") if key in text]
    parts = [parts] if isinstance(parts, str) else parts
    is_list = isinstance(parts, Sequence) and all(isinstance(part, str) for part in parts)
    if not is_list or len(cast("Sequence[str]", parts)) not in (1, 2):
        raise DataError(
            f"texts: number {number} is {text!r}; give a text, a pair of texts, or an object with "
            "text and text_pair"
        )
    return dict(zip(("text", "text_pair"), cast("Sequence[str]", parts), strict=False))


def write_predictions(config: RunConfig, folder: Path, data: str, to: Path) -> int:
    """Write the rows of a file with the predictions of a model, as jsonl; return their number.

    Each row keeps its columns, and has `prediction` besides; labels are not needed.
    """
    table, _ = scored_table(data, config.task)
    columns = text_columns(table, config.task)
    rows = list[Mapping[str, object]]()
    for record in table.records():
        if isinstance(record, DataError):
            raise record
        rows.append(record.values)
    texts = [[str(row[column]) for column in columns] for row in rows]
    answers = predict_texts(folder, config, texts)
    pairs = zip(rows, answers, strict=True)
    lines = (json_text({**row, "prediction": answer}) for row, answer in pairs)
    write_text(to, "".join(f"{line}\n" for line in lines))
    return len(rows)
