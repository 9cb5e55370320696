"""Checks of tokenizers before a run: chat templates, end tokens, and vocabularies of the models.

A student that learns answers without its own end token, or from a teacher that ends its answers
with another token, generates texts without an end. Pretrained weights fit only the tokenizer that
they were trained with.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megakd.config.task import STUDENT, TaskConfig
from megakd.data.chat_tokens import SETS, ChatCounts, learned
from megakd.data.tokenizers import LOOKED_FOR, from_folder, has_tokenizer_files
from megakd.errors import ConfigError, DataError, TeacherError
from megakd.models.end_tokens import (
    generation_config_of,
    listed_ends,
)
from megakd.models.fitting import ModelSource, listed

logger = logging.getLogger(__name__)


def check_chat_models(
    task: TaskConfig, tokenizer: PreTrainedTokenizerBase, sources: Mapping[str, ModelSource]
) -> None:
    """Compare the templates and the end tokens of the teachers with the student's.

    A student without a tokenizer of its own uses the run's. `task.end_tokens` can accept a teacher
    whose end token does not end the student's texts.
    """
    tokenizers = {
        role: from_folder(source.folder)
        for role, source in sources.items()
        if source.folder is not None and has_tokenizer_files(source.folder)
    }
    student, problems = sources[STUDENT], list[str]()
    of_student = tokenizers.pop(STUDENT, tokenizer)
    template, ends = of_student.chat_template, _end_ids(of_student, student)
    for role, mine in tokenizers.items():
        where = sources[role].where
        if mine.chat_template != template:
            how = "the texts differ" if mine.chat_template and template else "one has none"
            logger.warning(
                "chat templates of %s: %s; both models read the conversations as the tokenizer of "
                "the run writes them, and task.tokenizer and task.chat_template choose another",
                *(f"{where} and {student.where}", how),
            )
        tokens = _tokens(ends, of_student)
        if mine.eos_token is not None and mine.eos_token not in tokens.split(", "):
            problems.append(
                f"{where} ends its answers with {mine.eos_token}, and the texts of "
                f"{student.where} end with {tokens}: a student that learns from this teacher would "
                "not stop; use a student with the teacher's end token in its "
                "generation_config.json or tokenizer_config.json"
            )
    if problems:
        _refuse_ends(task, "\n".join(problems))


def _refuse_ends(task: TaskConfig, problem: str) -> None:
    if task.end_tokens == "check":
        raise ConfigError(f"{problem}; set task.end_tokens: accept to train nevertheless")
    logger.warning("%s (accepted by task.end_tokens)", problem)


def _end_ids(tokenizer: PreTrainedTokenizerBase, source: ModelSource) -> set[int]:
    return {*listed_ends(tokenizer), *listed_ends(generation_config_of(source))}


def _tokens(ids: set[int], tokenizer: PreTrainedTokenizerBase) -> str:
    tokens = (str(tokenizer.convert_ids_to_tokens(number)) for number in ids)
    return ", ".join(sorted(tokens)) or "no token"


def check_answers(
    task: TaskConfig,
    counts: Mapping[str, ChatCounts],
    tokenizer: PreTrainedTokenizerBase,
    student: ModelSource,
) -> None:
    """Check that held-out conversations have answers, and that an end token ends learned ones."""
    for name, tally in counts.items():
        if not name.startswith("train") and not tally.targets:
            of_set = name.removeprefix(f"{SETS}/")
            split = name.partition("/")[0]  # of a mixture, a source follows
            key = f"task.{split}_files" if of_set == name else f"task.evaluation_sets.{of_set}"
            raise DataError(
                f"the rows of {name} are prompts without an answer, so that no model can be "
                f"scored; set {key} to rows with a prompt and a completion"
            )
    trained, ends = learned(counts), _end_ids(tokenizer, student)
    special = {number for tally in trained for number in tally.special}
    cut_off = sum(tally.cut_off for tally in trained)
    if cut_off == sum(tally.rows for tally in trained) > 0:
        _refuse_ends(
            task,
            f"all {cut_off} training rows have an answer that was cut off (finish_reason: length), "
            "so that the student would learn no end; give rows with whole answers, such as those "
            "of megakd answer with a larger --max_new_tokens",
        )
    elif any(tally.targets for tally in trained) and not special & ends:
        problem = (
            f"no answer of the training rows ends with {_tokens(ends, tokenizer)} (eos_token of "
            "the tokenizer, and eos_token_id in the student's generation_config.json)"
            if ends
            else "the tokenizer has no eos_token, and the student no eos_token_id in its "
            "generation_config.json, so that no token ends the student's texts"
        )
        _refuse_ends(
            task,
            f"{problem}; the special tokens that count are {_tokens(special, tokenizer)}; set "
            "eos_token or eos_token_id to the one that ends the answers of the chat template, or "
            "raise task.max_length if all answers are cut",
        )


def check_vocabularies(
    task: TaskConfig, tokenizer: PreTrainedTokenizerBase, sources: Iterable[ModelSource]
) -> None:
    """Raise if a model's weights were trained with a tokenizer other than the run's."""
    models = list(sources)
    problems = [*without_tokenizer(task, models), *other_vocabularies(task, tokenizer, models)]
    if problems:
        raise TeacherError("\n".join(problems))


def without_tokenizer(task: TaskConfig, sources: Iterable[ModelSource]) -> Iterator[str]:
    """Yield an error for each model with weights and without tokenizer files; read no tokenizer.

    The embeddings of such a model mean nothing with a tokenizer that is trained on the run's text,
    or with another model's tokenizer. A tokenizer that `task.tokenizer` names is accepted.
    """
    for folder, source in _pretrained(sources).items():
        if not isinstance(task.tokenizer, str) and not has_tokenizer_files(folder):
            yield (
                f"{source.where}: {source.name} has weights and no tokenizer files ({LOOKED_FOR}), "
                "and its embeddings fit only the tokenizer of its training; set task.tokenizer to "
                "a folder or Hub id with that tokenizer"
            )


def other_vocabularies(
    task: TaskConfig, tokenizer: PreTrainedTokenizerBase, sources: Iterable[ModelSource]
) -> Iterator[str]:
    """Yield an error for each model that has another tokenizer, or no row for one of the tokens.

    Another tokenizer that `task.tokenizer` names is accepted, with a line in the log.
    """
    sources, vocabulary = list(sources), tokenizer.get_vocab()
    others = set[Path | None]()
    for folder, source in _pretrained(sources).items():
        if not has_tokenizer_files(folder):
            continue
        ids = from_folder(folder).get_vocab()
        other = sum(vocabulary.get(token) != number for token, number in ids.items())
        if ids != vocabulary and not isinstance(task.tokenizer, str):
            others.add(folder)
            apart = sorted(ids.items() ^ vocabulary.items(), key=lambda pair: pair[1])
            # A token with two numbers tells more than one that is missing.
            apart.sort(key=lambda pair: pair[0] not in ids or pair[0] not in vocabulary)
            order = dict.fromkeys(token for token, _ in apart)
            named = [f"{t} ({ids.get(t, 'none')}, {vocabulary.get(t, 'none')})" for t in order]
            yield (
                f"{source.where} {source.name} has another tokenizer than the run: "
                f"{len(ids) - other} of its {len(ids)} tokens have the same number among the run's "
                f"{len(vocabulary)}, and others differ: {listed(named, 4)}; soft targets need one "
                "vocabulary: choose models with the same tokenizer, or set task.tokenizer to one "
                "that fits the embeddings of all models"
            )
        elif other:
            logger.warning(
                "%s: %d of the %d tokens of the model's own tokenizer have another id, or no id, "
                "in task.tokenizer %s, which is used as configured",
                *(source.where, other, len(ids), tokenizer.name_or_path),
            )
    for source in sources:
        rows = source.config.vocab_size
        beyond = sorted((number, token) for token, number in vocabulary.items() if number >= rows)
        if beyond and not source.wants_vocabulary and source.folder not in others:
            last, token = beyond[-1]
            cure = f"remove {token if len(beyond) == 1 else f'its tokens from {rows} on'}"
            cure = cure if source.folder else f"raise {source.where}.config.vocab_size"
            yield (
                f"{source.where}: the token {token} of the tokenizer has the number {last}, and "
                f"the embedding of the model has {rows} rows; set task.tokenizer to a tokenizer "
                f"with smaller numbers, or {cure}"
            )


def _pretrained(sources: Iterable[ModelSource]) -> dict[Path, ModelSource]:
    folders: dict[Path, ModelSource] = {}
    for source in sources:
        if source.folder is not None:
            folders.setdefault(source.folder, source)
    return folders
