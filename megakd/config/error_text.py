"""Error messages for run configs, one line per problem, with the keys of the YAML file.

Keys of the release before this one that are gone get what takes their place.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megakd.config.schema import (
    KeyPath,
    annotation_at,
    dotted,
    known_keys,
    paths_ending_in,
    synonyms,
    value_at,
    variants,
)
from megakd.errors import suggestion

_EXPECTED = {
    "string_type": "text",
    "path_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "dataclass_type": "a mapping",
    "tuple_type": "a list",
}
_LIMITS = {
    "greater_than": ("gt", "must be above {:g}"),
    "greater_than_equal": ("ge", "must be at least {:g}"),
    "less_than": ("lt", "must be below {:g}"),
    "less_than_equal": ("le", "must be at most {:g}"),
    "too_short": ("min_length", "needs at least {:g} item(s)"),
    "too_long": ("max_length", "takes at most {:g} item(s)"),
}
_MOST_CHARACTERS = 60


class _Finding(NamedTuple):
    path: KeyPath
    of_branch: bool  # the error means only that this branch of a union does not fit
    detail: ErrorDetails


def schema_problems(error: ValidationError, tree: Any) -> list[str]:
    """Return pydantic's errors, one line per problem, without union branches and internal names."""
    findings = [_finding(detail, tree) for detail in error.errors()]
    groups: dict[KeyPath, list[ErrorDetails]] = {}
    for finding in findings:
        if not _is_echo(finding, findings, tree):
            groups.setdefault(finding.path, []).append(finding.detail)
    problems: list[str] = []
    for path, details in groups.items():
        mismatches = [detail for detail in details if _is_mismatch(detail)]
        if mismatches:
            value, annotation = mismatches[0]["input"], annotation_at(path, tree)
            tags = [tag for tag in ("name", "loss") if value in [*variants(annotation, tag)]]
            hint = f"; write {{{tags[0]}: {value}}}" if tags else ""
            where = dotted(path)
            hint = hint or (f"; {REMOVED[where]}" if where in REMOVED else "")
            problems.append(f"{where}: {_mismatch(mismatches)}{hint}")
        problems += [_line(path, detail, tree) for detail in details if not _is_mismatch(detail)]
    return problems


def shown(value: Any) -> str:
    """Return a value as written by a user, cut to one short line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, float) and not math.isfinite(value):
        text = str(value)
    return cut(text)


def cut(text: str) -> str:
    """Return the text, or the beginning of a text that is too long for a message."""
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"


def _unknown_key(key: str, parent: KeyPath, tree: Any) -> str:
    known = known_keys(parent, tree)
    # The keys of a loss term are its own: other sections have keys of the same names.
    is_item = any(isinstance(part, int) for part in parent)
    others = [] if is_item else paths_ending_in(key)[:1]
    meant = synonyms(key, known) or others or difflib.get_close_matches(key, known, n=1)
    if not meant:
        return f"unknown key; known: {', '.join(known)}"
    listed = " or ".join(f'"{path}"' for path in meant)
    return f"unknown key; did you mean {listed}?"


def _finding(detail: ErrorDetails, tree: Any) -> _Finding:
    # Other parts of a location name a branch of a union.
    path: list[str | int] = []
    node, of_branch = tree, False
    for part in detail["loc"]:
        is_item = isinstance(node, list) and isinstance(part, int)
        of_branch = not (is_item or (isinstance(node, dict) and part in node))
        if not of_branch:
            path.append(part)
            node = value_at((part,), node)
    if of_branch and detail["type"] == "missing":
        path.append(detail["loc"][-1])
    return _Finding(tuple(path), of_branch and _is_mismatch(detail), detail)


def _is_mismatch(detail: ErrorDetails) -> bool:
    return detail["type"] in _EXPECTED or detail["type"] == "literal_error"


def _is_echo(finding: _Finding, findings: Sequence[_Finding], tree: Any) -> bool:
    path, detail = finding.path, finding.detail
    if detail["type"] == "too_short":
        # pydantic counts only valid items: a list with one invalid item may be long enough.
        return len(detail["input"]) >= detail.get("ctx", {})["min_length"]
    if finding.of_branch:
        others = [other for other in findings if not other.of_branch]
        return any(other.path[: len(path)] == path for other in others)
    if detail["type"] == "missing":
        wrong = "unexpected_keyword_argument"
        unknown = [other.path for other in findings if other.detail["type"] == wrong]
        same = [key for *parent, key in unknown if tuple(parent) == path[:-1]]
        return any(f'"{path[-1]}"' in _unknown_key(str(key), path[:-1], tree) for key in same)
    return False


def _line(path: KeyPath, detail: ErrorDetails, tree: Any) -> str:
    kind, value = detail["type"], shown(detail["input"])
    where, context = dotted(path), detail.get("ctx", {})
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _tag_line(path, detail, tree)
    if kind == "unexpected_keyword_argument":
        reason = REMOVED.get(where) or _unknown_key(str(path[-1]), path[:-1], tree)
        return f"{where} = {value}: {reason}"
    if kind == "missing":
        return f"{where}: missing, and it has no default"
    if kind == "finite_number":
        return f"{where}: must be a finite number (got {value})"
    if kind == "value_error":
        return f"{where}: {context['error']}"
    limit = _LIMITS.get(kind)
    text = limit[1].format(context[limit[0]]) if limit else detail["msg"]
    return f"{where or 'the config'}: {text} (got {value})"


def _tag_line(path: KeyPath, detail: ErrorDetails, tree: Any) -> str:
    tag = detail.get("ctx", {})["discriminator"].strip("'")
    known = variants(annotation_at(path, tree), tag)
    listed = f"known: {', '.join(known)}"
    where = dotted((*path, tag))
    if detail["type"] == "union_tag_not_found":
        return f"{where}: missing; {listed}"
    value = detail["input"][tag]
    noun = path[-1] if tag == "name" else tag
    if not isinstance(value, str):
        return f"{where}: must be text (got {shown(value)}); {listed}"
    near = REMOVED.get(f"{where}: {value}") or suggestion(value, known)
    return f"{where}: unknown {noun} {shown(value)}{near or ';'} {listed}"


def _mismatch(details: Sequence[ErrorDetails]) -> str:
    value = details[0]["input"]
    # pydantic lists the values of a literal as `'a', 'b' or 'c'`, and numbers as `1 or 2`.
    literals = [d.get("ctx", {})["expected"] for d in details if d["type"] == "literal_error"]
    words = [word for text in literals for word in re.findall(r"'[^']*'|\d+", str(text))]
    choices = [word.strip("'") for word in words]
    expected = [word.replace("'", '"') for word in words]
    expected += dict.fromkeys(_EXPECTED[d["type"]] for d in details if d["type"] in _EXPECTED)
    near = suggestion(value, choices) if isinstance(value, str) else ""
    hint = _form_hint(value, expected)
    listed = ", ".join(expected[:-1]) + " or " * (len(expected) > 1) + expected[-1]
    return f"must be {listed} (got {shown(value)}){near}{hint}"


def _form_hint(value: Any, expected: Sequence[str]) -> str:
    if isinstance(value, bool | int | float) and "text" in expected:
        return "; put the value in quotes to make it text"
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return f"; write {value[0]} without brackets" if "text" in expected else ""
    if isinstance(value, str) and list(expected) == ["a list"]:
        return f"; write [{value}]"
    return ""


REMOVED: Mapping[str, str] = {
    "teacher.label_order": "gone; write the data's labels into id2label of the model's config.json",
    "teacher.allow_pickle": "gone; convert the weights to safetensors, and remove the key",
    "student.allow_pickle": "gone; convert the weights to safetensors, and remove the key",
    "task.whole_word_masking": "gone; each token is chosen for itself, remove the key",
    "task.encoded": "gone; `megakd encode` fills the cache that a run reads, remove the key",
    "method.name: takd": "; gone: train each teacher as a student, and give it as the teacher;",
    "method.name: mt_bert": "; gone: use mean_of_teachers;",
    "method.target_sparsity": "no key of this method; shrink cuts to parameters, flops or speedup",
    "method.candidates": "gone; shrink keeps the fewest layers, remove the key",
    "method.trial_steps": "gone; shrink has no trials, remove the key",
    "method.repair_steps": "gone; set train.max_steps",
    "method.on_policy_steps": "gone; train.max_steps counts all steps, and rollout.from_step those "
    "on the data",
    "method.assistant": "gone; shrink cuts once, remove the key",
    "method.timing": "gone; shrink times on the device of the run, remove the key",
    "method.allocation: global_raw": "; gone: use global;",
    "rollout.server.kind": "gone; serve with vLLM, and remove the key",
    "teacher.server.check_against": "gone; replicas are compared with each other",
    "teacher.server.kind": "gone; serve with vLLM, and remove the key",
    "teacher.server.states": "gone; servers answer with teacher.server.top_k probabilities",
    "teacher.micro_batches_per_call": "gone; joins_micro_batches is true (all of a step) or false",
    "rollout.mix_per": "gone; each step has one source, as in GKD, remove the key",
    "rollout.files": "gone; give texts that exist as task.train_files, with prompt and completion",
    "rollout.keep_texts": "gone; texts since the oldest checkpoint stay; remove the key",
    "eval.latency": "its keys are gone: models are timed at 1 and 32 texts (a decoder at 1)",
    "save.int8": "gone; megakd export --format onnx --int8 writes a graph with int8 weights",
    "task.data_dir": "gone; name GLUE's files in task.train_files and task.validation_files, with "
    "task.text_columns and task.label_column",
    "task.dataset: pydocs": "gone; set a folder that `python launch/pydocs.py labels` writes",
    "method.score": "gone; units are ranked by their sensitivity; remove the key",
    "method.sensitivity_beta": "gone; the decay of the average is 0.85; remove the key",
    "method.uncertainty_beta": "gone with score: platon; remove the key",
    "method.monotone": "gone; removed units never return; remove the key",
    "method.residual": "gone; homodistil narrows hidden states",
    "method.target_may_win": "gone; the target may win every trial; remove the key",
    "method.sampled_candidates": "gone; all candidates learn in every step; remove the key",
    "method.rank_exponent": "gone; weights are the ranks; remove the key",
    "method.pilot_steps": "gone; pilots take as many steps as the student; remove the key",
    "method.version": "gone; teacher and student learn together, as in version 1; remove the key",
    "method.teacher_steps": "gone with version 2; remove the key",
    "method.table": "gone with version 2; remove the key",
    "method.embeddings": "gone; tables are compared with the layers; remove the key",
    "method.vectors": "gone; norms and biases are compared too; remove the key",
    "method.projection_ratio": "gone; set method.epsilon",
    "method.patient_kd_weight": "gone; it is 10; remove the key",
    "method.threshold": "gone; a hard action uses the kinds of at least 0.5; remove the key",
    "method.noise": "gone; the noise of a phase is 0.2; remove the key",
    "method.restraint": "gone; it is 0.02; remove the key",
    "method.gamma_on": "gone; gamma discounts what follows a phase; remove the key",
    "method.updates": "gone; a selector learns 32 steps after a phase; remove the key",
    "method.hidden": "gone; a selector's layers have width 64; remove the key",
}
"""By the path of a key, or by `path: value` for a choice of it."""
