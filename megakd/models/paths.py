"""Where the parts of a layer are, as attribute paths, and what a family's heads look like."""

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

    projections: of queries, keys and values; the same three times where one module makes all.
    output: takes the heads side by side.
    core: cuts vectors into heads and mixes them, and cannot do so with none.
    norms: what queries and keys go through after that, one head at a time; None: nothing.
    """

    projections: tuple[str, str, str]
    output: str
    core: str
    norms: tuple[str, str] | None = None

    @property
    def is_fused(self) -> bool:
        """Whether queries, keys and values come side by side from one module."""
        return len(set(self.projections)) == 1

    @property
    def vectors(self) -> tuple[str, str, str]:
        """What gives the queries, keys and values that the core goes on with."""
        queries, keys = self.norms or self.projections[:2]
        return queries, keys, self.projections[2]

    def under(self, module: str) -> AttentionPaths:
        """The same paths, from the module's owner."""
        queries, keys, values = (f"{module}.{path}" for path in self.projections)
        norms = self.norms and (f"{module}.{self.norms[0]}", f"{module}.{self.norms[1]}")
        return AttentionPaths(
            (queries, keys, values), f"{module}.{self.output}", f"{module}.{self.core}", norms
        )


class FeedForwardPaths(NamedTuple):
    """The modules of one feed-forward.

    inputs: make the neurons.
    output: takes them.
    gated: the inputs where the config says `is_gated_act`, for families that have both kinds.
    """

    inputs: tuple[str, ...]
    output: str
    gated: tuple[str, ...] = ()

    def of_kind(self, *, is_gated: bool) -> FeedForwardPaths:
        """The same with the inputs that a config asks for."""
        return FeedForwardPaths(self.gated if is_gated and self.gated else self.inputs, self.output)

    def under(self, module: str) -> FeedForwardPaths:
        """The same paths, from the module's owner."""
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
    """The parts of the T5Attention that is `module`."""
    return AttentionPaths((f"{module}.q", f"{module}.k", f"{module}.v"), f"{module}.o", module)


def feed_forward_of_t5(module: str) -> FeedForwardPaths:
    """The parts of the feed-forward that is `module`, gated (v1.1, mT5) or not."""
    return FeedForwardPaths(
        (f"{module}.wi",), f"{module}.wo", gated=(f"{module}.wi_0", f"{module}.wi_1")
    )


@dataclass(frozen=True, kw_only=True)
class MaskedHead:
    """What a masked language model of a family has on its backbone.

    modules: attribute paths of all that belongs to the head.
    transform: what hidden states go through before the decoder, in this order: paths of
        modules, and functions for what is no module.
    decoder: path of the output matrix [V, D], which is the embedding unless the config unties
        them, with its bias [V].
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
    # The generator's; a discriminator has none.
    "electra": MaskedHead(
        modules=("generator_predictions",),
        transform=("generator_predictions",),
        decoder="generator_lm_head",
    ),
}
