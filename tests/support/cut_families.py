"""Families that can also lose columns of their hidden states, with the tasks of their models."""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """Tasks of the models, and the key of their config with the number of neurons."""

    tasks: tuple[str, ...]
    neurons: str = "intermediate_size"


TEXTS = ("classification", "regression")
DECODERS = "llama mistral qwen2 qwen3 gemma2 gemma3_text phi granite"
FAMILIES = {
    **{name: Family((*TEXTS, "mlm")) for name in ("bert", "roberta", "electra")},
    "distilbert": Family((*TEXTS, "mlm"), "hidden_dim"),
    **{name: Family(("causal_lm",)) for name in DECODERS.split()},
    "gpt2": Family(("causal_lm",), "n_inner"),
    **{name: Family(TEXTS, "d_ff") for name in ("t5_encoder", "enct5")},
}
