"""The key `teacher.server.states`: exact answers, so that every loss on outputs is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_files import message_of

from megakd.config.file import load_config

_TEXT = ("task={type: causal_lm, dataset: rows.jsonl}",)
_TEACHER = "teacher={{model: big, server: {{url: ['http://a:1'], states: /dev/shm/states{}}}{}}}"


@pytest.mark.parametrize(
    "term",
    [
        "loss: soft_target_kl, temperature: 2",
        "loss: soft_target_reverse_kl",
        "loss: soft_target_jsd",
        "loss: soft_target_skew_kl",
        "loss: soft_target_tvd",
    ],
)
def test_every_loss_on_logits_learns_from_exported_states(run_file: Path, term: str) -> None:
    objective = f"objective=[{{{term}}}]"

    config = load_config(run_file, (*_TEXT, _TEACHER.format("", ""), objective))

    assert config.teacher is not None
    assert config.teacher.server is not None
    assert config.teacher.server.states == Path("/dev/shm/states")  # noqa: S108


@pytest.mark.parametrize(
    ("server", "teacher", "objective", "message"),
    [
        (
            ", top_k: 64",
            "",
            "loss: soft_target_kl",
            "teacher.server: the servers return top_k probabilities or export hidden states into "
            "states (got top_k: 64, states: /dev/shm/states); remove one of the two keys",
        ),
        (
            "",
            "",
            "loss: hidden_mse",
            "hidden_mse needs more than the outputs of the teacher, and teacher.server holds only",
        ),
        ("", ", cache: kept", "loss: soft_target_kl", "cannot be combined with teacher.cache"),
    ],
)
def test_a_wrong_section_is_refused(
    run_file: Path, server: str, teacher: str, objective: str, message: str
) -> None:
    given = (*_TEXT, _TEACHER.format(server, teacher), f"objective=[{{{objective}}}]")

    assert message in message_of(run_file, *given)


def test_a_loss_that_top_k_probabilities_do_not_suffice_for_names_the_key(run_file: Path) -> None:
    teacher = "teacher={model: big, server: {url: ['http://a:1']}}"

    message = message_of(run_file, *_TEXT, teacher, "objective=[{loss: soft_target_jsd}]")

    assert "export hidden states with teacher.server.states, or remove" in message
