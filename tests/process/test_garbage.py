"""Garbage collection is off inside the block, and as before behind it."""

from __future__ import annotations

import gc

import pytest

from megakd.process.garbage import no_collections


def test_no_collection_runs_inside_and_all_run_again_behind_it():
    with no_collections():
        assert not gc.isenabled()

    assert gc.isenabled()


def test_an_error_inside_switches_collections_on_again():
    with pytest.raises(ImportError), no_collections():
        raise ImportError

    assert gc.isenabled()


def test_collections_that_were_off_before_stay_off():
    gc.disable()
    try:
        with no_collections():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
