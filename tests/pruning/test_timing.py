"""Times of shapes beside other work."""

from __future__ import annotations

import time

import pytest

from megakd.pruning import builder


@pytest.mark.parametrize(("waited_ns", "told"), [(0, False), (10**9, True)])
def test_other_work_beside_a_timing_is_told(tmp_path, monkeypatch, caplog, waited_ns, told):
    thread = tmp_path / "7" / "schedstat"
    thread.parent.mkdir()
    thread.write_text("10 5 1")
    monkeypatch.setattr(builder, "THREADS", tmp_path)

    with builder.told_if_interrupted():
        time.sleep(0.01)
        thread.write_text(f"10 {5 + waited_ns} 1")

    assert ("may be off by a fifth" in caplog.text) == told
