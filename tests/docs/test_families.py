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


def test_every_decoder_has_a_row_that_says_what_the_family_can_do(rows):
    wanted = {}
    for family, entry in DECODERS.items():
        lacking = entry.lacking_in_fused_attention(CONFIG_MAPPING[family]())
        student, cut = ("yes" if one is None else "no" for one in (entry.experts, entry.uncut))
        wanted[family] = ("yes", student, cut, "varlen" if lacking is None else "eager")

    assert rows == wanted
    assert [name for name, row in rows.items() if row[1:3] == ("no", "yes")] == []


def test_every_key_that_changes_logits_is_named(repository):
    text = (repository / "docs" / "families.md").read_text(encoding="utf-8")
    both = [(entry.logit_divisor, entry.logit_softcap) for entry in DECODERS.values()]
    keys = {key for keys in both for key in keys if key}
    assert {key for key in keys if f"`{key}: " not in text} == set()
