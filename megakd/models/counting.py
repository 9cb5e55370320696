"""Parameter counts of models."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from megakd.contract.results import ParameterCounts

OUTSIDE_THE_ENCODER = frozenset(
    # Embeddings, poolers and heads, as Hugging Face's models name them, and the decoder of an
    # encoder T5, which reads one token per text, as a pooler does.
    """decoder embeddings embed_tokens embed_positions word_embeddings wte wpe shared
    pooler pre_classifier classifier score cls lm_head qa_outputs predictions
    generator_predictions generator_lm_head discriminator_predictions logits_proj
    vocab_transform vocab_layer_norm vocab_projector""".split()  # noqa: SIM905
)


def parameter_counts(shapes: Iterable[tuple[str, Sequence[int]]]) -> ParameterCounts:
    """Count weights from their names and full shapes; tied weights must be listed once."""
    total = inside = 0
    for name, shape in shapes:
        count = math.prod(shape)
        total += count
        inside += 0 if OUTSIDE_THE_ENCODER.intersection(name.split(".")) else count
    return ParameterCounts(total, inside)


def named_shapes(model: nn.Module) -> Iterator[tuple[str, Sequence[int]]]:
    """Yield the name and full shape of each parameter, also for ZeRO-3 shards."""
    for name, parameter in model.named_parameters():
        yield name, tuple(getattr(parameter, "ds_shape", parameter.shape))
