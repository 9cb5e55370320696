"""Checks of tokenizers before a run: chat templates, end tokens, and vocabularies of the models.

A student that learns answers without its own end token, or from a teacher that ends its answers
with another token, generates texts without an end. Pretrained weights fit only the tokenizer that
they were trained with.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from megakd.config.task import TaskConfig
from megakd.contract.tasks import STUDENT
from megakd.data.chat.conversations import is_chat
from megakd.data.chat.counts import SETS, ChatCounts, learned
from megakd.data.chat.tokens import PROMPT_LENGTH
from megakd.data.tokenizers import LOOKED_FOR, from_folder, has_tokenizer_files, rows_for
from megakd.errors import ConfigError, DataError, TeacherError
from megakd.models.fitting import listed
from megakd.models.source import ModelSource

logger = logging.getLogger(__name__)
ACCEPT = "set task.end_tokens: accept to train nevertheless"


@dataclass(frozen=True, kw_only=True)
class ChatFacts:
    """Chat template, end tokens and vocabulary in the files of a model.

    end: the tokenizer's end token; None: none.
    ends: the tokens that end a generated text, of the tokenizer and of generation_config.json.
    size: number of embeddings; without weights, the rows that the tokenizer needs.
    """

    where: str
    template: object
    end: str | None
    ends: frozenset[str]
    size: int


def check_chat_models(
    task: TaskConfig,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    sources: Mapping[str, ModelSource],
) -> None:
    """Log how the teachers' templates, end tokens and vocabularies differ from the student's.

    Nothing is compared if the rows are no conversations. A student without a tokenizer of its own
    uses the run's. `task.end_tokens` can accept a teacher whose end token does not end the
    student's texts.
    """
    if not is_chat(rows) and PROMPT_LENGTH not in rows.column_names:
        return
    student = _chat_facts(sources[STUDENT], task) or _facts(STUDENT, tokenizer, sources[STUDENT])
    problems: list[str] = []
    for role, source in sources.items():
        teacher = None if role == STUDENT else _chat_facts(source, task)
        if teacher is not None:
            for line in differences(teacher, student):
                logger.warning("%s", line)
            if teacher.end is not None and teacher.end not in student.ends:
                problems.append(
                    f"{teacher.where} ends its answers with {teacher.end}, and the texts of "
                    f"{student.where} end with {_listed(student.ends)}: a student that learns from "
                    "this teacher would not stop; use a student with the teacher's end token in "
                    "its generation_config.json or tokenizer_config.json"
                )
    if problems and task.end_tokens == "check":
        raise ConfigError("\n".join(f"{problem}; {ACCEPT}" for problem in problems))
    for problem in problems:
        logger.warning("%s (accepted by task.end_tokens)", problem)


def _chat_facts(source: ModelSource, task: TaskConfig) -> ChatFacts | None:
    if source.folder is None or not has_tokenizer_files(source.folder):
        return None
    return _facts(source.where, from_folder(source.folder, task.type), source)


def _facts(where: str, tokenizer: PreTrainedTokenizerBase, source: ModelSource) -> ChatFacts:
    embeddings = None if source.wants_vocabulary else getattr(source.config, "vocab_size", None)
    return ChatFacts(
        where=where,
        template=tokenizer.chat_template,
        end=cast("str | None", tokenizer.eos_token),
        ends=frozenset(_tokens(_end_ids(tokenizer, source), tokenizer)),
        size=embeddings or rows_for(tokenizer),
    )


def _end_ids(tokenizer: PreTrainedTokenizerBase, source: ModelSource) -> set[int]:
    from megakd.models.generation import generation_config_of, listed_ends

    return {*listed_ends(tokenizer), *listed_ends(generation_config_of(source))}


def _tokens(ids: set[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [str(tokenizer.convert_ids_to_tokens(number)) for number in sorted(ids)]


def differences(teacher: ChatFacts, student: ChatFacts) -> Iterator[str]:
    """Yield a line for every difference between two models, with the choice to make."""
    both = f"{teacher.where} and {student.where}"
    if teacher.template != student.template:
        lacking = [facts.where for facts in (teacher, student) if not facts.template]
        how = f"{' and '.join(lacking)} has none" if lacking else "the texts differ"
        yield (
            f"chat templates of {both}: {how}; both models read the conversations as the tokenizer "
            "of the run writes them, and task.tokenizer and task.chat_template choose another"
        )
    if teacher.ends != student.ends:
        yield (
            f"end tokens of {both}: {_listed(teacher.ends)} and {_listed(student.ends)}; the "
            "student learns the end token of the chat template, so that this token should be in "
            "the student's generation_config.json"
        )
    if teacher.size != student.size:
        yield (
            f"vocabularies of {both}: {teacher.size} and {student.size} embeddings; soft targets "
            "compare the tokens that both have"
        )


def _listed(tokens: frozenset[str]) -> str:
    return ", ".join(sorted(tokens)) or "no token"


def check_answers(
    task: TaskConfig,
    counts: Mapping[str, ChatCounts] | None,
    tokenizer: PreTrainedTokenizerBase,
    student: ModelSource,
) -> None:
    """Check that held-out conversations have answers, and how the learned answers end."""
    by_split: dict[str, list[ChatCounts]] = {}
    for name, tally in (counts or {}).items():
        split = name if name.startswith(f"{SETS}/") else name.split("/")[0]
        by_split.setdefault(split, []).append(tally)
    for split, parts in by_split.items():
        if split != "train" and not any(tally.targets for tally in parts):
            name = split.removeprefix(f"{SETS}/")
            key = f"task.{split}_files" if name == split else f"task.evaluation_sets.{name}"
            raise DataError(
                f"the rows of {split} are prompts without an answer, so that no model can be "
                f"scored; set {key} to rows with a prompt and a completion"
            )
    _check_ends(task, learned(counts), _end_ids(tokenizer, student), tokenizer)


def _check_ends(
    task: TaskConfig,
    trained: list[ChatCounts],
    looked_for: set[int],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    if not any(tally.targets for tally in trained):
        return
    if any(tally.special.get(number) for tally in trained for number in looked_for):
        return
    special = {number for tally in trained for number in tally.special}
    counting = ", ".join(_tokens(special, tokenizer)) or "none"
    if looked_for:
        problem = (
            f"no answer of the training rows ends with {', '.join(_tokens(looked_for, tokenizer))} "
            "(eos_token of the tokenizer, and eos_token_id in the student's "
            f"generation_config.json); the special tokens that count are {counting}; use a "
            "tokenizer whose eos_token ends the answers of the chat template, or raise "
            "task.max_length if all answers are cut"
        )
    else:
        problem = (
            "no token ends the student's texts: the tokenizer has no eos_token (null in "
            "tokenizer_config.json), and the student has no eos_token_id in "
            "generation_config.json; set one of the two to the token that ends the answers (the "
            f"special tokens that count are {counting})"
        )
    if task.end_tokens == "check":
        raise ConfigError(f"{problem}; {ACCEPT}")
    logger.warning("%s (accepted by task.end_tokens)", problem)


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
    if isinstance(task.tokenizer, str):
        return
    for source, folder in _pretrained(sources):
        if not has_tokenizer_files(folder):
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
    yield from _without_rows(vocabulary, sources)
    models = {folder: source for source, folder in _pretrained(sources)}
    tables = {f: from_folder(f, task.type).get_vocab() for f in models if has_tokenizer_files(f)}
    for folder, ids in tables.items():
        source = models[folder]
        other = sum(vocabulary.get(token) != number for token, number in ids.items())
        if ids != vocabulary and not isinstance(task.tokenizer, str):
            yield (
                f"{source.where} {source.name} has a tokenizer of {len(ids)} tokens, and the "
                f"run has another tokenizer, of {len(vocabulary)} tokens"
                f"{_told_apart(ids, vocabulary, source.where)}; soft targets need one vocabulary: "
                f"{_common_tokenizer(tables, sources)}"
            )
        elif other:
            logger.warning(
                "%s: %d of the %d tokens of the model's own tokenizer have another id, or no id, "
                "in task.tokenizer %s, which is used as configured",
                *(source.where, other, len(ids), tokenizer.name_or_path),
            )


def _told_apart(ids: Mapping[str, int], others: Mapping[str, int], where: str) -> str:
    """Return the tokens and numbers of a model's tokenizer and the run's that differ, if few."""
    sides = {where: ids.items() - others.items(), "the run": others.items() - ids.items()}
    if max(map(len, sides.values())) > max(16, len(ids) // 100):
        return ""
    told = []
    for who, pairs in sides.items():
        tokens = [f"{token} ({number})" for number, token in sorted((n, t) for t, n in pairs)]
        told += [f"only {who} has {listed(tokens, 3)}"] if tokens else []
    return f" ({'; '.join(told)})"


def _common_tokenizer(tables: Mapping[Path, Mapping[str, int]], sources: list[ModelSource]) -> str:
    rows = min(source.config.vocab_size for source in sources if not source.wants_vocabulary)
    fitting = [str(folder) for folder, ids in tables.items() if max(ids.values()) < rows]
    pairs = {pair for ids in tables.values() for pair in ids.items()}
    tokens, numbers = map(set, zip(*pairs, strict=True))
    if fitting and len(tokens) == len(numbers) == len(pairs):
        return f"set task.tokenizer to {' or '.join(fitting)}, which fits the embeddings of all"
    return "choose models with the same tokenizer, or set task.tokenizer if the models share one"


def _without_rows(vocabulary: Mapping[str, int], sources: Iterable[ModelSource]) -> Iterator[str]:
    token, number = max(vocabulary.items(), key=lambda item: item[1])
    for source in sources:
        rows = source.config.vocab_size
        if number >= rows and not source.wants_vocabulary:
            cure = f"remove {token}" if source.folder else f"raise {source.where}.config.vocab_size"
            yield (
                f"{source.where}: the token {token} of the tokenizer has the number {number}, and "
                f"the embedding of the model has {rows} rows; set task.tokenizer to a tokenizer "
                f"with smaller numbers, or {cure}"
            )


def _pretrained(sources: Iterable[ModelSource]) -> Iterator[tuple[ModelSource, Path]]:
    seen: set[Path] = set()
    for source in sources:
        if source.folder is not None and source.folder not in seen:
            seen.add(source.folder)
            yield source, source.folder
