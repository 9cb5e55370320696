"""Where the modules of an attention and of a feed-forward are."""

from __future__ import annotations

from typing import NamedTuple


class AttentionPaths(NamedTuple):
    """The modules of one attention.

    projections: paths of queries, keys and values; equal paths if one module makes all three.
    output: the module that takes the concatenated heads.
    core: the module that splits vectors into heads and mixes them; it fails without heads.
    """

    projections: tuple[str, str, str]
    output: str
    core: str

    @property
    def is_fused(self) -> bool:
        """True if one module makes queries, keys and values, concatenated."""
        return len(set(self.projections)) == 1

    @property
    def makers(self) -> tuple[str, ...]:
        return (*self.projections, self.output)

    def under(self, module: str) -> AttentionPaths:
        """Return the same paths, relative to the owner of `module`."""
        queries, keys, values = (f"{module}.{path}" for path in self.projections)
        return AttentionPaths(
            (queries, keys, values), f"{module}.{self.output}", f"{module}.{self.core}"
        )


class FeedForwardPaths(NamedTuple):
    """The modules of one feed-forward.

    inputs: the modules that make the neurons.
    output: the module that takes the neurons.
    gated: replaces `inputs` if the config sets `is_gated_act`, in families that have both kinds.
    """

    inputs: tuple[str, ...]
    output: str
    gated: tuple[str, ...] = ()

    @property
    def makers(self) -> tuple[str, ...]:
        return (*self.inputs, self.output)

    def under(self, module: str) -> FeedForwardPaths:
        inputs, gated = (
            tuple(f"{module}.{path}" for path in paths) for paths in (self.inputs, self.gated)
        )
        return FeedForwardPaths(inputs, f"{module}.{self.output}", gated)
