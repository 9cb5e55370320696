"""The identity of a stage names what was kept of its teachers' answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megakd.config.models import TeacherConfig
from megakd.run import stage_identity


def facts(**spec: Any) -> Any:
    ready = SimpleNamespace(spec=TeacherConfig(model="large", **spec))
    config = SimpleNamespace(base_teachers=frozenset())
    assembly: Any = SimpleNamespace(
        config=config, teachers={"one": ready}, frozen_facts=lambda _: {"model": "m"}
    )
    return stage_identity._teacher(assembly, "one")


def test_kept_answers_are_part_of_a_teacher_and_each_kind_is_another(tmp_path):
    kept = [
        facts(cache=tmp_path, **options)
        for options in ({}, {"cache_draws": 64}, {"cache_draws": 64, "cache_seed": 1})
    ]

    assert facts(cache_draws=16) == facts() == {"model": "m"}
    assert facts(cache=tmp_path, cache_top_k=8) == {"model": "m", "cached": 8}
    assert all(one != other for one in kept for other in kept if one is not other)
