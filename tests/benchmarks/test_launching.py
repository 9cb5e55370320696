"""How benchmarks start their ranks, and what happens when a rank fails."""

from __future__ import annotations

from pathlib import Path

import pytest

FAILS = "import os, sys, time\nsys.exit(3) if os.environ['RANK'] == '1' else time.sleep(600)\n"


@pytest.fixture(autouse=True)
def _benchmarks(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repository / "benchmarks"))


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    from launching import start_ranks

    program = tmp_path / "fails.py"
    program.write_text(FAILS, encoding="utf-8")

    assert start_ranks(program, [], 2) == 3  # and does not wait for rank 0's ten minutes


def test_ranks_that_end_well_are_all_waited_for(tmp_path: Path) -> None:
    from launching import start_ranks

    program = tmp_path / "ends.py"
    program.write_text(
        "import os, pathlib, sys, time\n"
        "time.sleep(0.2 * int(os.environ['RANK']))\n"
        "pathlib.Path(sys.argv[1], os.environ['RANK']).touch()\n",
        encoding="utf-8",
    )

    assert start_ranks(program, [str(tmp_path)], 2) == 0
    assert (tmp_path / "0").exists()
    assert (tmp_path / "1").exists()
