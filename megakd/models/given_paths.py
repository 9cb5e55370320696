"""Attribute paths of the parts of a layer, and of the heads of masked language models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from transformers.activations import ACT2FN

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class AttentionPaths(NamedTuple):
    """The modules of one attention.

    projections: paths of queries, keys and values; equal paths if one module makes all three.
    output: the module that takes the concatenated heads.
    core: the module that splits vectors into heads and mixes them; it fails without heads.
    norms: norms of queries and of keys after the projections, per head; None: no norms.
    """

    projections: tuple[str, str, str]
    output: str
    core: str
    norms: tuple[str, str] | None = None

    @property
    def is_fused(self) -> bool:
        """True if one module makes queries, keys and values, concatenated."""
        return len(set(self.projections)) == 1

    @property
    def makers(self) -> tuple[str, ...]:
        """Paths of all linear maps."""
        return (*self.projections, self.output)

    @property
    def vectors(self) -> tuple[str, str, str]:
        """Paths of the modules that produce the queries, keys and values for the core."""
        queries, keys = self.norms or self.projections[:2]
        return queries, keys, self.projections[2]

    def under(self, module: str) -> AttentionPaths:
        """Return the same paths, relative to the owner of `module`."""
        queries, keys, values = (f"{module}.{path}" for path in self.projections)
        norms = self.norms and (f"{module}.{self.norms[0]}", f"{module}.{self.norms[1]}")
        return AttentionPaths(
            (queries, keys, values), f"{module}.{self.output}", f"{module}.{self.core}", norms
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
        """Paths of all linear maps."""
        return (*self.inputs, self.output)

    def of_kind(self, *, is_gated: bool) -> FeedForwardPaths:
        """Return the paths with the inputs of the gated or the ungated kind."""
        return FeedForwardPaths(self.gated if is_gated and self.gated else self.inputs, self.output)

    def under(self, module: str) -> FeedForwardPaths:
        """Return the same paths, relative to the owner of `module`."""
        inputs, gated = (
            tuple(f"{module}.{path}" for path in paths) for paths in (self.inputs, self.gated)
        )
        return FeedForwardPaths(inputs, f"{module}.{self.output}", gated)


ATTENTION_OF_BERT = AttentionPaths(
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output.dense",
    "attention.self",
)
FEED_FORWARD_OF_BERT = FeedForwardPaths(("intermediate.dense",), "output.dense")
ATTENTION_OF_LLAMA = AttentionPaths(
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj", "self_attn"
)


def attention_of_t5(module: str) -> AttentionPaths:
    """Return the parts of the T5Attention at the path `module`."""
    return AttentionPaths((f"{module}.q", f"{module}.k", f"{module}.v"), f"{module}.o", module)


def feed_forward_of_t5(module: str) -> FeedForwardPaths:
    """Return the parts of the feed-forward at the path `module`, gated (v1.1, mT5) or not."""
    return FeedForwardPaths(
        (f"{module}.wi",), f"{module}.wo", gated=(f"{module}.wi_0", f"{module}.wi_1")
    )


@dataclass(frozen=True, kw_only=True)
class MaskedHead:
    """The head of a family's masked language models.

    modules: attribute paths of all modules that belong to the head.
    transform: the steps between the hidden states and the decoder, in order: paths of modules, and
        functions for steps that are no module.
    decoder: path of the output matrix [V, D] with its bias [V]; the matrix is the embedding unless
        the config unties them.
    """

    modules: tuple[str, ...]
    transform: tuple[str | Callable[[Tensor], Tensor], ...]
    decoder: str


MASKED_HEADS: Mapping[str, MaskedHead] = {
    "bert": MaskedHead(
        modules=("cls",),
        transform=("cls.predictions.transform",),
        decoder="cls.predictions.decoder",
    ),
    "roberta": MaskedHead(
        modules=("lm_head",),
        transform=("lm_head.dense", ACT2FN["gelu"], "lm_head.layer_norm"),
        decoder="lm_head.decoder",
    ),
    "distilbert": MaskedHead(
        modules=("vocab_transform", "vocab_layer_norm"),
        transform=("vocab_transform", "activation", "vocab_layer_norm"),
        decoder="vocab_projector",
    ),
    # The head of the generator; a discriminator has none.
    "electra": MaskedHead(
        modules=("generator_predictions",),
        transform=("generator_predictions",),
        decoder="generator_lm_head",
    ),
}
