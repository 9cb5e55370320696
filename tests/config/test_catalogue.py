"""`megakd methods`: what there is, and what a wrong name is answered with."""

from __future__ import annotations

import dataclasses
import re

import pytest

from megakd import cli
from megakd.config.options import METHODS
from megakd.config.terms import TERMS


def test_methods_and_losses_are_listed_with_what_they_are_their_options_and_defaults(capsys):
    assert cli.main(["methods"]) == 0

    listed = capsys.readouterr().out
    assert "single\n  Distil one teacher into the student." in listed
    assert "finetune\n  Train the student on the labels alone." in listed
    assert cli.main(["methods", "--losses"]) == 0

    listed = capsys.readouterr().out
    assert "soft_target_jsd\n  beta·KL(teacher || m)" in listed
    assert "    temperature: 1.0\n    on: null\n    beta: 0.5\n" in listed
    assert '    layer_mapping: "uniform"\n' in listed
    assert '    relations: ["query", "key", "value"]\n    relation_heads: null\n' in listed
    assert "    loss:" not in listed


@pytest.mark.parametrize(
    ("words", "absent"), [(["minidisc"], "skdbert"), (["soft_target_kl", "--losses"], "hidden_mse")]
)
def test_one_method_or_loss_is_listed_alone(words, absent, capsys):
    assert cli.main(["methods", *words]) == 0

    out = capsys.readouterr().out
    assert out.startswith(f"{words[0]}\n")
    assert absent not in out


@pytest.mark.parametrize(("words", "kinds"), [([], METHODS), (["--losses"], TERMS)])
def test_every_option_is_explained_once_also_those_that_are_inherited(words, kinds, capsys):
    for name in kinds.names():
        assert cli.main(["methods", name, *words]) == 0

        out, fields = capsys.readouterr().out, dataclasses.fields(kinds.kind(name))
        for option in {field.name for field in fields} - {"name", "loss"}:
            assert len(re.findall(rf"^  {option}: \S", out, re.MULTILINE)) == 1, (name, option)
            assert len(re.findall(rf"^    {option}: ", out, re.MULTILINE)) == 1, (name, option)
        assert name != "direct" or not {"tradeoff", "sparsities"} & {*re.findall(r"\w+", out)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["minidsic"], 'unknown method "minidsic"; did you mean "minidisc"? known: direct, finetu'),
        (["--losses", "KL"], 'unknown loss "KL"; did you mean "soft_target_kl"?'),
        (["hidden_mse"], "hidden_mse is a loss: megakd methods --losses hidden_mse; known: direct"),
        (["no_such_module:X"], "module no_such_module cannot be imported"),
    ],
)
def test_a_method_that_does_not_exist_gets_the_nearest_name(words, message, capsys):
    assert cli.main(["methods", *words]) == 2

    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""
