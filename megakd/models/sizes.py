"""Checks of the sizes in a model's config."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megakd.errors import ModelError
from megakd.models.architectures import HEAD_COUNTS, Architecture

if TYPE_CHECKING:
    from transformers import PretrainedConfig

LARGEST = 2**24
"""Larger than any size in a model, and small enough for products of two sizes."""


def check_sizes(config: PretrainedConfig, architecture: Architecture, where: str) -> None:
    """Raise if no module can be built from a config.

    Raises:
        ModelError: a size is not a whole number from 1 to `LARGEST`, or the heads do not divide the
            width.
    """
    if hasattr(config, HEAD_COUNTS):  # a cut model: a layer may have no heads or neurons left
        return
    for key in _size_keys(architecture):
        size = getattr(config, key, None)
        if size is not None and not (isinstance(size, int) and 1 <= size <= LARGEST):
            raise ModelError(
                f"{where}: {key} must be a whole number from 1 to {LARGEST:,} (got {size!r})"
            )
    heads, width = getattr(config, architecture.attention_heads), architecture.hidden_width(config)
    if getattr(config, "head_dim", None) is None and width % heads:
        raise ModelError(
            f"{where}: {architecture.width} {width} is not divisible by "
            f"{architecture.attention_heads} {heads}"
        )


def _size_keys(architecture: Architecture) -> tuple[str, ...]:
    own = (architecture.layers, architecture.width, architecture.attention_heads)
    shared = ("num_key_value_heads", "head_dim", "vocab_size", "type_vocab_size", "embedding_size")
    return (*own, architecture.neurons, architecture.positions or "d_kv", *shared)


def context_length(config: PretrainedConfig) -> int | None:
    """Return the number of positions of a model; None if its config states no limit."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
