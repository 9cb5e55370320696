"""The timings of losses of a few numbers."""

import importlib
from pathlib import Path

KERNELS = Path(__file__).parents[1]


def test_small_losses_are_timed_in_every_form(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(KERNELS))
    small = importlib.import_module("bench.small")
    for name in ("_CALLS", "_ROUNDS", "_WARM_UP"):
        monkeypatch.setattr(small, name, 2)

    assert small.main() == 0

    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 5
    assert all(float(cell) > 0 for row in rows for cell in row.strip("|").split("|")[2:])
