"""Rollouts, generated with the weights of an engine, and their files on disk.

A step has a file, written whole before the student learns from it:

rollouts/<stage>/step-00000012.jsonl     a line with the number of texts, then a line per text
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from megakd.contract.completions import Completion, Rollout, Sampling, TextTokens
from megakd.contract.tasks import STUDENT
from megakd.data.tokenizers import rows_for
from megakd.engine.collectives import together
from megakd.engine.sharding import whole_model
from megakd.engine.student import StudentEngine
from megakd.errors import DataError
from megakd.models.generation import complete, generation_config_of, listed_ends, stated_ends
from megakd.models.source import ModelSource
from megakd.storage.atomic import write_text
from megakd.teachers.frozen import FrozenTeacher


class RolloutStore:
    """The rollouts of one stage; only rank 0 uses the files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def clear(self) -> None:
        """Remove all texts."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def has(self, step: int) -> bool:
        return self._path(step).is_file()

    def write(self, step: int, rollouts: Sequence[Rollout]) -> None:
        trees = [{"rollouts": len(rollouts)}, *map(_record, rollouts)]
        lines = (json.dumps(tree, separators=(",", ":")) + "\n" for tree in trees)
        write_text(self._path(step), "".join(lines))

    def read(self, step: int) -> list[Rollout]:
        """Return the texts of a step as written; raise DataError if the file is not whole."""
        path = self._path(step)
        try:
            head, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            return [_rollout(lines[number]) for number in range(head["rollouts"])]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(
                f"{path} is not a complete file of rollouts ({type(error).__name__}: {error}); "
                "remove the file, and its texts are generated again"
            ) from error

    def remove_before(self, first: int) -> None:
        for path in self.folder.glob(f"step-{'[0-9]' * 8}.jsonl"):
            if int(path.stem.removeprefix("step-")) < first:
                path.unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.jsonl"


def _record(rollout: Rollout) -> dict[str, object]:
    return {
        "row": rollout.row,
        "version": rollout.version,
        "seed": rollout.seed,
        "finished": rollout.completion.finished,
        "prompt": list(rollout.prompt),
        "completion": list(rollout.completion.ids),
    }


def _rollout(record: Mapping[str, Any]) -> Rollout:
    ids = cast("list[int]", record["completion"])
    return Rollout(
        row=int(record["row"]),
        prompt=tuple(map(int, record["prompt"])),
        completion=Completion(tuple(map(int, ids)), finished=bool(record["finished"])),
        version=int(record["version"]),
        seed=int(record["seed"]),
    )


class LocalGenerator:
    """A generator that uses the weights of an engine, `rows_at_once` prompts on a rank."""

    def __init__(
        self, engine: StudentEngine | FrozenTeacher, *, tokens: TextTokens, rows_at_once: int
    ) -> None:
        self._engine = engine
        self._complete = partial(complete, tokens=tokens, rows_at_once=rows_at_once)

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
    ) -> list[Completion]:
        if isinstance(self._engine, FrozenTeacher):
            self._engine.evict()  # a copy of shards to the device may still be running
            module = self._engine.model
        else:
            module = self._engine.student
        with whole_model(module) as model:
            # Ranks that finish early wait here, however long the others generate.
            return together(lambda: self._complete(model, prompts, seeds, sampling))


def text_tokens(
    tokenizer: PreTrainedTokenizerBase, sources: Mapping[str, ModelSource]
) -> TextTokens:
    """Return the tokens of the texts that the student or a teacher of a run generates."""
    source = sources[STUDENT]
    pad = tokenizer.pad_token_id
    sizes = [one.config.vocab_size for one in sources.values()]
    return TextTokens(
        end=end_tokens_of(tokenizer, source.config, generation_config_of(source)),
        pad=pad if isinstance(pad, int) else 0,
        # No model can read a token that it does not have.
        known=min(rows_for(tokenizer), *sizes),
    )


def end_tokens_of(
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    generation: GenerationConfig | None = None,
) -> frozenset[int]:
    """Return the tokens that end a text: those of the tokenizer and of both configs.

    A config may list end tokens without that of the tokenizer. They are default numbers in the
    model's config (2 in Llama's), which is then left out; of the generation config see
    `stated_ends`.
    """
    ends, of_model = listed_ends(tokenizer), listed_ends(config)
    ends |= of_model if ends <= of_model else frozenset()
    ends |= stated_ends(generation, tokenizer)
    if not ends:
        raise DataError(
            "the tokenizer has no eos_token, and the model's config has no eos_token_id: a "
            "generated text would never end; set eos_token in the folder of the tokenizer"
        )
    return ends
