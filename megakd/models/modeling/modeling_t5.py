"""T5 models that classify or score texts, with any number of heads and neurons per layer.

This file needs only torch and transformers, so that a folder with this file loads anywhere
(`trust_remote_code=True`). Module names are those of T5, so that its weights fit unchanged. The
exception is `shared`, which is `encoder.embed_tokens` here, because no other module shares it.

Shapes: B texts, T tokens, D width, H heads.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.t5.modeling_t5 import (
    T5Attention,
    T5Block,
    T5PreTrainedModel,
    T5Stack,
    eager_attention_forward,
)


class T5EncoderConfig(T5Config):
    """Config of a T5 encoder whose layers may have lost heads and neurons.

    head_counts: heads left, one number per attention; None: `num_heads` in all of them. The number
        of columns of the position bias stays `num_heads`.
    neuron_counts: neurons left, one number per feed-forward; None: `d_ff`.
    head_width: width of one head; None: `d_kv`.
    head_columns: for each head of each attention, its column of the position bias, which all layers
        of a stack share; None: the heads use the first columns, in order.
    """

    model_type = "t5_encoder"
    is_encoder_decoder: bool = False
    head_counts: list[int] | None = None
    neuron_counts: list[int] | None = None
    head_width: int | None = None
    head_columns: list[list[int]] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Set the derived values, and check that the lists fit the layers."""
        if self.head_width is not None:
            self.d_kv = self.head_width
        super().__post_init__(**kwargs)
        attentions, feed_forwards = self.counts()
        for key, count in (
            ("head_counts", attentions),
            ("head_columns", attentions),
            ("neuron_counts", feed_forwards),
        ):
            given = getattr(self, key)
            if given is not None and len(given) != count:
                raise ValueError(f"{key} must have {count} entries (got {len(given)})")

    def counts(self) -> tuple[int, int]:
        return self.num_layers, self.num_layers

    def heads_of(self, attention: int) -> int:
        return self.num_heads if self.head_counts is None else self.head_counts[attention]

    def neurons_of(self, feed_forward: int) -> int:
        return self.d_ff if self.neuron_counts is None else self.neuron_counts[feed_forward]


class EncT5Config(T5EncoderConfig):
    """`T5EncoderConfig` with one decoder layer; its self- and cross-attention come last."""

    model_type = "enct5"

    def __post_init__(self, **kwargs: Any) -> None:
        """Set one decoder layer, for any T5 that the config was made from."""
        self.num_decoder_layers = 1
        super().__post_init__(**kwargs)

    def counts(self) -> tuple[int, int]:
        return self.num_layers + 2, self.num_layers + 1


class EmptyLinear(nn.Linear):
    """A map without inputs or without outputs.

    Its weight has no elements and is a buffer, because ZeRO 3 cannot gather an empty parameter.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        weight = self.weight.detach()
        del self.weight
        self.register_buffer("weight", weight)

    def reset_parameters(self) -> None:
        """Do nothing: there is no value to draw."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name for it)
        """Map [..., I] to [..., O], one of them 0; a gradient of zero reaches the input."""
        return nn.functional.pad(input[..., :0], (0, self.out_features))


def _empty(module: nn.Module, *, inputs: tuple[str, ...], output: str) -> None:
    for name in inputs:
        if hasattr(module, name):
            setattr(module, name, EmptyLinear(getattr(module, name).in_features, 0))
    setattr(module, output, EmptyLinear(0, getattr(module, output).out_features))


class WidthsAttention(T5Attention):
    """T5's attention, with as many heads as its projections currently give.

    handles_no_heads: an attention without heads is allowed. Every module is called even then, and
        every parameter gets a gradient, which may be zero.
    """

    handles_no_heads = True

    def __init__(
        self, config: T5EncoderConfig, number: int, *, has_relative_attention_bias: bool = False
    ) -> None:
        heads = config.heads_of(number)
        super().__init__(changed(config, num_heads=max(heads, 1)), layer_idx=number)
        if heads == 0:
            _empty(self, inputs=("q", "k", "v"), output="o")
        self.config = config
        self.columns = config.head_columns and config.head_columns[number]
        self.has_relative_attention_bias = has_relative_attention_bias
        if has_relative_attention_bias:
            self.relative_attention_bias = nn.Embedding(
                config.relative_attention_num_buckets, config.num_heads
            )

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  (no cache here)
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Compute T5Attention; the next layer gets the whole bias [1, H, T, T]."""
        source = hidden_states if key_value_states is None else key_value_states
        vectors = self.q(hidden_states), self.k(source), self.v(source)
        if position_bias is None and self.has_relative_attention_bias:
            length = hidden_states.shape[1]
            position_bias = self.compute_bias(length, length, device=hidden_states.device)
        if vectors[0].shape[-1] == 0:  # through nothing a gradient of zero reaches all
            nothing = vectors[0] + sum(part.sum(1, keepdim=True) for part in vectors[1:])
            if position_bias is not None:
                nothing = nothing + position_bias[:, :0].sum((2, 3))
            return self.o(nothing), position_bias, None
        parts = [
            part.unflatten(-1, (-1, self.key_value_proj_dim)).transpose(1, 2) for part in vectors
        ]
        for name in ("cache", "past_key_values"):  # the second before transformers 5.24
            kwargs.pop(name, None)
        compute = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager",  # noqa: SLF001  (all models read it so)
            eager_attention_forward,
        )
        mixed, weights = compute(
            self,
            *parts,
            mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            position_bias=self._bias_of_heads(position_bias, parts[0].shape[1]),
            **kwargs,
        )
        return self.o(mixed.flatten(2)), position_bias, weights

    def _bias_of_heads(self, position_bias: Tensor | None, heads: int) -> Tensor | None:
        """Return the position bias of the heads that this attention has, [1, heads, T, T]."""
        if position_bias is None or self.columns is None:
            return None if position_bias is None else position_bias[:, :heads]
        columns = torch.tensor(self.columns[:heads], device=position_bias.device)
        return position_bias.index_select(1, columns)


class WidthsBlock(T5Block):
    """A layer of T5 whose parts have their own sizes.

    attention: number of its first attention; a decoder's second attention follows.
    """

    def __init__(
        self, config: T5EncoderConfig, attention: int, feed_forward: int, *, is_first: bool
    ) -> None:
        # The attentions made here are replaced below, so they are small.
        neurons = config.neurons_of(feed_forward)
        sizes = changed(config, num_heads=1, d_ff=max(neurons, 1))
        super().__init__(sizes, layer_idx=attention)
        if neurons == 0:
            dense: Any = self.layer[-1].DenseReluDense
            _empty(dense, inputs=("wi", "wi_0", "wi_1"), output="wo")
        self.layer[0].SelfAttention = WidthsAttention(
            config, attention, has_relative_attention_bias=is_first
        )
        if config.is_decoder:
            self.layer[1].EncDecAttention = WidthsAttention(config, attention + 1)


class WidthsStack(T5Stack):
    """T5's encoder or decoder, made of `WidthsBlock` layers.

    first: number of its first attention and feed-forward in the lists of the config.
    """

    config_class = T5EncoderConfig

    def __init__(self, config: T5EncoderConfig, *, layers: int, first: int = 0) -> None:
        super().__init__(changed(config, num_layers=0))
        self.config = config
        self.block = nn.ModuleList(
            WidthsBlock(config, first + layer, first + layer, is_first=layer == 0)
            for layer in range(layers)
        )


class T5ClassifierModel(T5PreTrainedModel):
    """Base of the two models below: an encoder and a linear head."""

    config_class = T5EncoderConfig
    base_model_prefix = "encoder"
    _no_split_modules = ["WidthsBlock"]  # noqa: RUF012  (transformers' own attribute)

    def __init__(self, config: T5EncoderConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels or 1
        self.encoder = WidthsStack(changed(config, use_cache=False), layers=config.num_layers)
        self.classifier = nn.Linear(config.d_model, self.num_labels)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, T5ClassifierModel):
            deviation = self.config.initializer_factor * self.config.d_model**-0.5
            init.normal_(module.classifier.weight, mean=0.0, std=deviation)
            init.zeros_(module.classifier.bias)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Any, ...]:
        """Return the logits of whole texts.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 0 at padding; None: no padding.
            labels: [B] classes, or scores if there is one label, for the loss.
            token_type_ids: ignored; tokenizers of other families return them.
            output_hidden_states: whether to return the encoder's, L + 1 of [B, T, D].
            return_dict: False: return a tuple.
        """
        del token_type_ids
        encoded = self.encoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            output_hidden_states=bool(output_hidden_states),
        )
        logits = self.classifier(self.summary(encoded.last_hidden_state, attention_mask))
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        output = SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoded.get("hidden_states")
        )
        return output.to_tuple() if return_dict is False else output

    def summary(self, encoded: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return one vector per text, [B, D], from the encoder's last hidden states [B, T, D]."""
        raise NotImplementedError


class T5EncoderForSequenceClassification(T5ClassifierModel):
    """T5's encoder, the mean over a text's tokens, and a linear head.

    T5 itself has no vector for a whole text. The first token has no meaning for T5, and the mean
    works best among the choices that need no new layers (Ni et al. 2022, Sentence-T5).
    """

    def __init__(self, config: T5EncoderConfig) -> None:
        super().__init__(config)
        self.post_init()

    def summary(self, encoded: Tensor, attention_mask: Tensor | None) -> Tensor:
        if attention_mask is None:
            return encoded.mean(1)
        weights = attention_mask.to(encoded.dtype)[..., None]
        return (encoded * weights).sum(1) / weights.sum(1).clamp(min=1)


class EncT5ForSequenceClassification(T5ClassifierModel):
    """EncT5 (Liu et al. 2021): T5's encoder, one decoder layer, and a linear head on the decoder.

    The decoder sees one position, a learned prompt: the only token of its vocabulary,
    `decoder.embed_tokens`. This position attends to the encoder's states.
    """

    config_class = EncT5Config

    def __init__(self, config: EncT5Config) -> None:
        super().__init__(config)
        prompted = changed(config, is_decoder=True, vocab_size=1, use_cache=False)
        self.decoder = WidthsStack(prompted, layers=1, first=config.num_layers)
        self.post_init()

    def summary(self, encoded: Tensor, attention_mask: Tensor | None) -> Tensor:
        # Not len(encoded): torch.export would take it for a constant.
        prompt = torch.zeros(encoded.shape[0], 1, dtype=torch.long, device=encoded.device)
        decoded = self.decoder(
            input_ids=prompt,
            encoder_hidden_states=encoded,
            encoder_attention_mask=attention_mask,
            use_cache=False,
        )
        return decoded.last_hidden_state[:, 0]


def changed(config: T5EncoderConfig, **keys: Any) -> T5EncoderConfig:
    """Return a copy of a config with other values; derived values are not computed again."""
    other = copy.copy(config)
    for key, value in keys.items():
        setattr(other, key, value)
    return other
