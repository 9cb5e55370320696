"""Published T5 and mT5 checkpoints, read as the text models of `modeling_t5`."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PretrainedConfig

from megakd.errors import ModelError
from megakd.models.modeling.modeling_t5 import EncT5Config, T5EncoderConfig
from megakd.models.weights import StoredTensor

ORIGINALS = ("t5", "mt5")
READ_AS = {cls.model_type: cls for cls in (EncT5Config, T5EncoderConfig)}
"""Config classes that an original can be read as; the first is the default."""
KEPT_KEYS = (
    *("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"),
    *("relative_attention_num_buckets", "relative_attention_max_distance"),
    *("dropout_rate", "layer_norm_epsilon", "initializer_factor", "feed_forward_proj"),
    *("pad_token_id", "eos_token_id"),
)
DECODER = "decoder.block.0."
HEADED = ("transformer.", "classification_head.")
"""Beginnings of the names in a T5ForSequenceClassification or a T5ForTokenClassification."""
# The vocabulary matrix and its copy in old files; the decoder here embeds only a prompt.
EMBEDDINGS = {"shared.weight": "encoder.embed_tokens.weight", "decoder.embed_tokens.weight": None}


def built_as(model_type: str, wanted: str | None, where: str) -> str:
    """Return the model type that a stored or named model is built as."""
    if model_type in ORIGINALS:
        return wanted or next(iter(READ_AS))
    if wanted not in (None, model_type):
        raise ModelError(
            f"{where.partition('.')[0]}.architecture: {wanted} applies only to a T5 checkpoint, "
            f"and {where} is a {model_type!r} model; remove the key"
        )
    return model_type


def read_original(
    config: PretrainedConfig, stored: Mapping[str, StoredTensor], model_type: str, where: str
) -> tuple[PretrainedConfig, dict[str, StoredTensor]]:
    """Return the config and tensors of an original, under the names of the model it is read as.

    The original has no prompt and no head, which start new. Of its decoder, only the first layer is
    used.
    """
    if any(key.startswith(HEADED) for key in stored):
        raise ModelError(
            f"{where} is a T5 with transformers' own classification head, "
            f"{', '.join(config.architectures or ())}, which megakd cannot read; use the T5 that "
            "it was fine-tuned from, with finetune, or another family"
        )
    has_decoder = any(key.startswith(DECODER) for key in stored)
    if stored and model_type == EncT5Config.model_type and not has_decoder:
        raise ModelError(
            f"{where} holds only the encoder of T5, and {model_type} needs the first decoder "
            f"layer; set {where.partition('.')[0]}.architecture: {T5EncoderConfig.model_type}"
        )
    keys = {key: getattr(config, key) for key in KEPT_KEYS}
    names = {key: EMBEDDINGS.get(key, key) for key in stored}
    renamed = {name: stored[key] for key, name in names.items() if name is not None}
    return READ_AS[model_type](**keys), renamed
