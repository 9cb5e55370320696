"""Names of loss terms: the keys of their weights and of their values in logs."""

from __future__ import annotations

from megakd.contract.sources import Source, on_source
from megakd.contract.terms import (
    SOFT_TARGET_DIVERGENCES,
    HardCrossEntropy,
    MethodTerm,
    TermConfig,
)


def source_of(term: TermConfig | MethodTerm) -> Source | None:
    """Return the source that a term is limited to by `on`; None: all targets."""
    # A loss of another package may have an option `on` of its own.
    if isinstance(term, (HardCrossEntropy, *SOFT_TARGET_DIVERGENCES)):
        return term.on
    return None


def term_name(term: TermConfig | MethodTerm) -> str:
    """Return `loss`, or `loss_on_source` for a term that is limited to a source."""
    return on_source(term.loss, source_of(term))
