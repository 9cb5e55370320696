"""Garbage collection is off inside the block, and as before behind it."""

from __future__ import annotations

import gc
from contextlib import suppress

import pytest

from megakd.process.garbage import no_collections


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("error", [ImportError, None])
def test_no_collection_runs_inside_and_afterwards_all_is_as_before(enabled, error):
    (gc.enable if enabled else gc.disable)()
    try:
        with suppress(ImportError), no_collections():
            assert not gc.isenabled()
            if error:
                raise error
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
