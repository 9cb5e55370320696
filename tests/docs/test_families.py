"""The page on model families says what the table of families does."""

from __future__ import annotations

import re

import pytest
from transformers import CONFIG_MAPPING

from megakd.models.architectures import FAMILIES

DECODERS = {name: entry for name, entry in FAMILIES.items() if "causal_lm" in entry.tasks}


@pytest.fixture(scope="module")
def rows(repository) -> dict[str, tuple[str, ...]]:
    text = (repository / "docs" / "families.md").read_text(encoding="utf-8")
    row = r"^\| [^|]+ \| `(\w+)` \| (\w+) \| (\w+) \| (\w+) \| `(\w+)` \|$"
    result = re.findall(row, text, re.MULTILINE)
    return {name: tuple(rest) for name, *rest in result}


def test_every_decoder_has_a_row(rows):
    assert rows.keys() == DECODERS.keys()


@pytest.mark.parametrize("family", DECODERS)
def test_a_row_says_what_a_family_can_do(rows, family):
    entry = DECODERS[family]
    lacking = entry.lacking_in_fused_attention(CONFIG_MAPPING[family]())

    teacher, student, cut, attention = rows[family]

    assert teacher == "yes"
    assert student == ("yes" if entry.experts is None else "no")
    assert cut == ("yes" if entry.uncut is None else "no")
    assert attention == ("varlen" if lacking is None else "eager")
    assert not (student == "no" and cut == "yes")


def test_every_key_that_changes_logits_is_named(repository):
    text = (repository / "docs" / "families.md").read_text(encoding="utf-8")
    both = [(entry.logit_divisor, entry.logit_softcap) for entry in DECODERS.values()]
    keys = {key for keys in both for key in keys if key}
    assert {key for key in keys if f"`{key}: " not in text} == set()
