"""The key `rollout.server`: what it accepts, and the messages for what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_files import message_of

from megakd.config.file import load_config
from megakd.config.rollout import RolloutConfig, RolloutServerConfig, rollout_block

_TEXT = ("task={type: causal_lm, dataset: rows.jsonl}",)
_SERVER = "url: ['http://a:8000'], kind: sglang, push: full, folder: w"


def _rollout(server: str, more: str = "") -> str:
    return f"rollout={{max_new_tokens: 4{more}, server: {{{server}}}}}"


def test_the_model_is_the_student_unless_it_has_another_name(run_file: Path) -> None:
    config = load_config(run_file, (*_TEXT, _rollout(_SERVER)))

    assert config.served_model == "student"
    named = load_config(run_file, (*_TEXT, _rollout(f"{_SERVER}, model: m")))
    assert named.served_model == "m"
    teacher = _rollout("url: ['http://a:8000/'], kind: vllm, push: none", ", by: teacher")
    taught = load_config(run_file, (*_TEXT, teacher))
    assert taught.served_model == "teacher"
    assert taught.rollout is not None
    assert taught.rollout.server is not None
    assert taught.rollout.server.url == ("http://a:8000",)


def test_an_address_of_ipv6_is_taken() -> None:
    url = "http://[::1]:8000"

    assert RolloutServerConfig(url=(url,), kind="vllm", push="none").url == (url,)


def test_servers_of_both_kinds_take_the_whole_student(run_file: Path) -> None:
    for kind in ("vllm", "sglang"):
        server = f"url: ['http://a:1'], kind: {kind}, push: full, folder: w"
        rollout = load_config(run_file, (*_TEXT, _rollout(server))).rollout

        assert rollout is not None
        assert rollout.server is not None
        assert (rollout.server.kind, rollout.server.push) == (kind, "full")


@pytest.mark.parametrize(
    ("server", "more", "message"),
    [
        ("url: [], kind: sglang, push: none", "", "rollout.server.url"),
        ("url: ['a:8000'], kind: sglang, push: none", "", "must be of the form http://host:port"),
        ("url: ['http://::1:8000'], kind: sglang, push: none", "", "must be of the form http://h"),
        ("url: ['http://a:99999'], kind: sglang, push: none", "", "must be of the form http://h"),
        (
            "url: ['http://a:1', 'http://a:1/'], kind: vllm, push: none",
            "",
            "must name each replica once (got http://a:1 more than once)",
        ),
        ("url: ['http://a:1'], kind: tgi, push: none", "", "rollout.server.kind"),
        ("url: ['http://a:1'], kind: vllm", "", "rollout.server.push: missing"),
        (
            "url: ['http://a:1'], kind: vllm, push: adapter, folder: w",
            "",
            "rollout.server.push: adapter pushes the adapters of the student, and student.lora",
        ),
        (
            "url: ['http://a:1'], kind: sglang, push: adapter, folder: w",
            "",
            "adapter is supported with kind: vllm alone; use push: full",
        ),
        ("url: ['http://a:1'], kind: sglang, push: full", "", "rollout.server.folder: missing"),
        ("url: ['http://a:1'], kind: vllm, push: full", "", "rollout.server.folder: missing"),
        (
            "url: ['http://a:1'], kind: sglang, push: none, folder: w",
            "",
            "rollout.server.folder: is not used with push: none",
        ),
        (_SERVER, ", by: teacher", "rollout.by is teacher, whose weights do not change"),
        (
            _SERVER,
            ", files: a.jsonl",
            "cannot be combined with rollout.files, which names texts that",
        ),
    ],
)
def test_a_wrong_section_is_refused(run_file: Path, server: str, more: str, message: str) -> None:
    assert message in message_of(run_file, *_TEXT, _rollout(server, more))


def test_a_student_without_a_name_needs_the_name_of_the_served_model(run_file: Path) -> None:
    scratch = "student={model: {config: {model_type: llama}}}"

    message = message_of(run_file, *_TEXT, scratch, _rollout(_SERVER))

    assert "rollout.server.model: missing, and the config names no model" in message


@pytest.mark.parametrize("staleness", [0, 1, 2, 5])
def test_texts_that_a_server_makes_one_step_ahead_are_not_staler_than_allowed(
    staleness: int,
) -> None:
    server = RolloutServerConfig(url=("http://a:1",), kind="sglang", push="none")
    rollout = RolloutConfig(max_new_tokens=4, max_staleness=staleness, from_step=3, server=server)

    for step in range(3, 40):
        block = rollout_block(step, rollout)
        requested_at = block[0] - (1 if rollout.works_ahead else 0)
        assert step in block
        assert block[-1] - requested_at == staleness


_TAUGHT = "objective=[{loss: soft_target_kl}]"
_TEACHER = "teacher={{model: big, server: {{url: ['http://a:1']{}}}{}}}"


def test_a_served_teacher_answers_with_64_tokens_of_its_own_model(run_file: Path) -> None:
    config = load_config(run_file, (*_TEXT, _TEACHER.format("", ""), _TAUGHT))

    assert config.teacher is not None
    assert config.teacher.server is not None
    assert config.teacher.server.best_tokens == 64
    assert config.teacher.served_model == "big"
    named = load_config(run_file, (*_TEXT, _TEACHER.format(", model: m", ""), _TAUGHT))
    assert named.teacher is not None
    assert named.teacher.served_model == "m"


@pytest.mark.parametrize(
    ("more", "overrides", "message"),
    [
        (
            ", cache: kept",
            (),
            "teacher.server: cannot be combined with teacher.cache; remove one of",
        ),
        (
            ", finetune: {max_steps: 3}",
            (),
            "teacher.server: cannot be combined with teacher.finetune",
        ),
        (
            "",
            ("objective=[{loss: soft_target_kl, temperature: 2}]",),
            "at temperature 2: teacher.server holds only the largest probabilities, at te",
        ),
        (
            "",
            ("objective=[{loss: soft_target_reverse_kl}]",),
            "soft_target_reverse_kl needs all probabilities of the teacher, and teacher.server",
        ),
        (
            "",
            ("objective=[{loss: hidden_mse}]",),
            "hidden_mse needs more than the outputs of the teacher, and teacher.server holds only",
        ),
        (
            "",
            ("method={name: minidisc, target_sparsity: 0.5}",),
            'teacher.server: method "minidisc" uses the model of the teacher itself',
        ),
        (
            "",
            ("rollout={max_new_tokens: 4, by: teacher}",),
            "rollout.by: teacher is not loaded (teacher.server), so it generates no texts",
        ),
    ],
)
def test_a_served_teacher_is_refused_where_its_model_is_needed(
    run_file: Path, more: str, overrides: tuple[str, ...], message: str
) -> None:
    assert message in message_of(run_file, *_TEXT, _TEACHER.format("", more), _TAUGHT, *overrides)


def test_a_teacher_without_a_name_cannot_be_served(run_file: Path) -> None:
    scratch = "teacher={model: {config: {model_type: llama}}, server: {url: ['http://a:1']}}"

    assert "which no server can serve; set teacher.model to the folder" in message_of(
        run_file, *_TEXT, scratch, _TAUGHT
    )


def test_only_language_models_are_served(run_file: Path) -> None:
    message = message_of(run_file, _TEACHER.format("", ""), _TAUGHT)

    assert "teacher.server: supported only for causal_lm, and task.type is classif" in message
