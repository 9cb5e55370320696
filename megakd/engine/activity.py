"""What the ranks do: a line of the log, and a part of the error of a rank that waits too long."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)
_running: list[str] = []


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Log the activity of the body, such as `reading the data`, unless it is part of another."""
    if not _running:
        logger.info("… %s", what)
    _running.append(what)
    try:
        yield
    except RuntimeError as error:  # of a collective, see `collectives.reports_lost_peer`
        error.add_note(what)
        raise
    finally:
        _running.pop()
