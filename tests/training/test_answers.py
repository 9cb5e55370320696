"""The answers of generated texts, compared as text or as mathematics."""

from __future__ import annotations

import sys

import pytest

from megakd.config.rollout import GenerationConfig
from megakd.errors import ConfigError
from megakd.rollouts.text_evaluation import answer_of, matcher

GSM8K = r"#### (.+)"


def _matcher(match: str, answer: str | None = None):
    found = matcher(GenerationConfig(max_new_tokens=4, match=match, answer=answer))  # type: ignore[arg-type]
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("text", "pattern", "answer"),
    [
        (" 12 \n", None, "12"),
        ("2 + 2 = 4\n#### 4", GSM8K, "4"),
        ("#### 3\nno, #### 4 \n", GSM8K, "4"),
        ("the answer is 4", GSM8K, None),
    ],
)
def test_the_last_match_of_a_text_is_its_answer(text, pattern, answer):
    assert answer_of(text, pattern) == answer


def test_texts_are_compared_by_their_answers_alone_and_match_nothing_without_one():
    match, text = _matcher("exact", GSM8K), "Natalia sold 48.\n#### 72"

    assert match("anything\n#### 72", text)
    assert not match("anything\n#### 73", text)
    assert not match("72", "72")
    assert not match("72", text)
    assert matcher(GenerationConfig(max_new_tokens=4)) is None


def test_mathematics_is_compared_by_value():
    pytest.importorskip("math_verify")
    match = _matcher("math")

    assert match(r"The answer is $\frac{1}{2}$", "$0.5$")
    assert match("1,000", "$1000$")
    assert not match("$0.4$", "$0.5$")


def test_mathematics_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)

    with pytest.raises(ConfigError, match=r"install megakd\[eval\], or set the key to exact"):
        _matcher("math")
