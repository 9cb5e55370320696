"""Times of shapes beside other work."""

from __future__ import annotations

import resource
from types import SimpleNamespace

import pytest

from megakd.pruning.timing import told_if_interrupted


@pytest.mark.parametrize(("interruptions", "told"), [(0, False), (10**9, True)])
def test_other_work_beside_a_timing_is_told(monkeypatch, caplog, interruptions, told):
    counts = iter((7, 7 + interruptions))
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_nivcsw=next(counts, 0)))

    with told_if_interrupted():
        pass

    assert ("may be off by a fifth" in caplog.text) == told
