"""How a decoder keeps the documents of a row apart, so that it computes each as it does alone.

A mask of packed rows has an element for every pair of positions, keeps fused attention from its
fast path, and makes the host wait for the device when transformers builds the mask. Here the
boundaries of the documents come from the collator. On a GPU, torch's attention for sequences of
different lengths skips everything outside of a document and after a query; on a CPU the documents
are computed one after the other.

Most attentions of transformers see from positions that restart where a document begins; some need
a mask, and others take the boundaries of the documents. Recurrent and convolving layers carry a
document into the next: a row has one document then. A small copy of
the model decides.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from inspect import signature
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from megakd.config.task import TaskType
from megakd.data.batch import Batch, Documents
from megakd.data.collation import documents_of
from megakd.errors import ModelError
from megakd.models.architectures import Known
from megakd.models.fitting import ModelSource
from megakd.models.small_copy import copy_that_runs, logits_of
from megakd.models.structure import architecture_of

logger = logging.getLogger(__name__)

# torch 2.11 has no grouped queries here; later versions do.
_GROUPS_QUERIES = "enable_gqa" in signature(varlen_attn).parameters

VARLEN = "varlen"
"""Name of this attention in configs of models and in `attn_implementation`."""


def register_packed_attention() -> None:
    """Make transformers know this attention; no mask belongs to the name."""
    AttentionInterface.register(VARLEN, attend)


def attend(  # noqa: PLR0913  (the arguments are transformers')
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Return causal attention within documents, as transformers calls its attentions.

    Args:
        query: [B, heads, T, width].
        key: [B, key heads, T, width].
        scaling: factor of the scores; None: 1 / sqrt(width).
        sliding_window: number of positions that a query sees, itself included; None: all.
        cu_seq_lens_q: [documents + 1] int32, the first position of each document in [B * T], and
            B * T; None: every row is a document.
        max_length_q: length of the longest document.

    Returns:
        [B, T, heads, width], and no attention weights.
    """
    del module, attention_mask, unused
    batch, _, length, _ = query.shape
    if cu_seq_lens_q is None or max_length_q is None:
        cu_seq_lens_q = torch.arange(
            0, (batch + 1) * length, length, dtype=torch.int32, device=query.device
        )
        max_length_q = length
    flat = [part.transpose(1, 2).flatten(0, 1) for part in (query, key, value)]  # [B * T, heads, w]
    if query.is_cuda:
        grouped: dict[str, Any] = {}
        if query.shape[1] != key.shape[1]:
            if _GROUPS_QUERIES:
                grouped = {"enable_gqa": True}
            else:
                groups = query.shape[1] // key.shape[1]
                flat[1:] = [part.repeat_interleave(groups, dim=1) for part in flat[1:]]
        out: Any = varlen_attn(
            flat[0],
            flat[1],
            flat[2],
            cu_seq_lens_q,
            cu_seq_lens_q,
            max_length_q,
            max_length_q,
            scale=scaling,
            window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
            **grouped,
        )
    elif query.is_meta:
        out = _without_values(flat, length if length % max_length_q else max_length_q)
    else:
        out = _one_by_one(flat, cu_seq_lens_q.tolist(), scaling, sliding_window)
    return out.unflatten(0, (batch, length)), None


def _one_by_one(
    flat: list[Tensor], starts: list[int], scaling: float | None, window: int | None
) -> Tensor:
    """Return the attention of every document, [B * T, heads, width]."""
    heads, key_heads = flat[0].shape[1], flat[1].shape[1]
    parts = []
    for first, end in pairwise(starts):
        query, key, value = (part[first:end].transpose(0, 1) for part in flat)
        near = None  # [T, T] bool: True where a query sees a key
        if window is not None and end - first > window:
            near = query.new_ones(end - first, end - first, dtype=torch.bool).tril()
            near = near.triu(1 - window)
        parts.append(
            functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=near,
                is_causal=near is None,
                scale=scaling,
                enable_gqa=heads != key_heads,
            ).transpose(0, 1)
        )
    return torch.cat(parts)


def _without_values(flat: list[Tensor], longest: int) -> Tensor:
    """Return the attention of documents of one length, for a memory plan; [B * T, heads, width]."""
    query, key, value = (part.unflatten(0, (-1, longest)).transpose(1, 2) for part in flat)
    is_grouped = query.shape[1] != key.shape[1]
    out = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=is_grouped
    )
    return out.transpose(1, 2).flatten(0, 1)


Packing = Literal["positions", "mask", "masks_by_type", "apart"]
"""What keeps documents apart: positions that restart, or boundaries for an attention that takes
them; a mask [B, 1, T, T]; a mask for each type of layer; or that a row has one document."""

DOCUMENTS = (9, 12)
"""Tokens of the two documents of the row that decides."""

ROW = 5 + torch.arange(sum(DOCUMENTS))[None] * 7 % 400

POSITIONS = torch.cat([torch.arange(count) for count in DOCUMENTS])[None]

LARGEST_DIFFERENCE = 1e-5
"""Of logits, as a part of the largest; where documents mix it is above 1e-3."""

Parts = Sequence[Tensor]
"""Logits [1, T, V] of each of the two documents."""


def packing_of(config: PretrainedConfig, attention: str | None) -> Packing:
    """Return how a decoder with an attention keeps documents apart; None: transformers' choice.

    A small copy of the model is tried once per config, on the CPU, alike on every rank.

    Raises:
        ModelError: the model does not even compute a padded text as it computes it alone.
    """
    return _PACKINGS.answer(config, attention)


def packing_at(where: str, config: PretrainedConfig, attention: str | None) -> Packing:
    """Return what `packing_of` returns; its error names the key of the model."""
    try:
        return packing_of(config, attention)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error


def _takes_boundaries(attention: str | None) -> bool:
    return (attention or "").startswith((VARLEN, "flash_attention"))


def _packing_tried(config: PretrainedConfig, attention: str | None) -> Packing:
    # An attention that takes boundaries lacks parts of others, such as sinks: theirs is right.
    takes_boundaries = _takes_boundaries(attention)
    chosen = None if takes_boundaries else attention
    model = copy_that_runs(config, "causal_lm", tokens=ROW, attention=chosen)
    if model is None:
        return "apart"
    with torch.no_grad():
        alone = [logits_of(model, part) for part in ROW.split(DOCUMENTS, dim=1)]

    def row(**inputs: Any) -> Parts:
        return logits_of(model, ROW, position_ids=POSITIONS, **inputs).split(DOCUMENTS, dim=1)

    def with_boundaries() -> Parts:
        register_packed_attention()
        model.set_attn_implementation(VARLEN)  # for flash attention too, which no CPU has
        return row(**_boundaries(documents_of(POSITIONS.numpy())))

    ways: dict[Packing, Callable[[], Parts]] = {
        "positions": row,
        "mask": lambda: row(attention_mask=document_mask(POSITIONS, alone[0].dtype)),
        "masks_by_type": lambda: row(attention_mask=_masks_by_type(model, POSITIONS)),
        "apart": lambda: _padded(model),
    }
    boundaries: dict[Packing, Callable[[], Parts]]
    boundaries = {"positions": with_boundaries, "apart": lambda: alone}
    for way, compute in (boundaries if takes_boundaries else ways).items():
        if _is_same(compute, alone):
            return way
    raise ModelError(
        f"a {config.model_type} model does not compute a text beside padding as it computes it "
        "alone, so that texts cannot share a batch; use another family"
    )


# Without keys of a config that do not change how its model mixes tokens.
_PACKINGS = Known(
    _packing_tried, without=("vocab_size", "dtype", "_name_or_path", "architectures", "use_cache")
)


def _padded(model: PreTrainedModel) -> Parts:
    # The documents are rows, padded on the right.
    ids = pad_sequence([part[0] for part in ROW.split(DOCUMENTS, dim=1)], batch_first=True)
    mask = (torch.arange(max(DOCUMENTS)) < torch.tensor(DOCUMENTS)[:, None]).long()
    rows = logits_of(model, ids, attention_mask=mask)
    return [row[None, :count] for row, count in zip(rows, DOCUMENTS, strict=True)]


@torch.no_grad()
def _is_same(compute: Callable[[], Parts], alone: Parts) -> bool:
    try:
        together = compute()
    except Exception as error:  # noqa: BLE001 - a model refuses arguments in its own way
        logger.debug("documents cannot share a row: %s", error)
        return False
    largest = max(float(part.abs().max()) for part in alone)
    differences = [(one - other).abs().max() for one, other in zip(together, alone, strict=True)]
    return all(bool(difference <= LARGEST_DIFFERENCE * largest) for difference in differences)


def document_mask(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [B, 1, T, T]: 0 where a query sees a key of its document, else the lowest number.

    Positions [B, T] restart with every document.
    """
    document = (positions.diff(dim=1, prepend=positions[:, :1]) != 1).cumsum(dim=1)
    sees = (document[:, :, None] == document[:, None, :]).tril()[:, None]
    lowest = torch.finfo(dtype).min
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, lowest)


def _masks_by_type(model: nn.Module, positions: Tensor) -> dict[str, Any]:
    # For a backbone that ignores positions. The shape, dtype and device of the hidden states are
    # read; a sharded table of embeddings is empty here.
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    hidden = table.new_empty((*positions.shape, 0))
    # Neither a mask nor a cache, which transformers 5.24 names otherwise.
    facts: Any = (model.config, hidden, None, None, positions)
    full, sliding = create_causal_mask(*facts), create_sliding_window_causal_mask(*facts)
    return {"full_attention": full, "sliding_attention": sliding}


def _boundaries(documents: Documents) -> dict[str, Any]:
    starts, longest = documents
    return {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def inputs_of_documents(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Return the inputs of a forward, which keep the documents of a decoder's rows apart.

    Rows of a model that cannot keep documents apart have one document each, padded on the right.
    """
    inputs, config = dict(batch.inputs), model.config
    name: str = config._attn_implementation or ""  # type: ignore[union-attr, operator]  # noqa: SLF001
    packing = packing_of(config, name)  # type: ignore[arg-type]
    if packing == "apart":
        del inputs["position_ids"]  # they restart at padding, and some models take none
        mask = batch.valid.long()
        mask[:, 0] = 1  # of a dummy row, to avoid NaN
        return {**inputs, "attention_mask": mask}
    if packing == "mask":
        dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
        return {**inputs, "attention_mask": document_mask(inputs["position_ids"], dtype)}
    if packing == "masks_by_type":
        return {**inputs, "attention_mask": _masks_by_type(model, inputs["position_ids"])}
    if _takes_boundaries(name) and batch.documents is not None:
        return {**inputs, **_boundaries(batch.documents)}
    return inputs


def set_attention(
    model: PreTrainedModel, source: ModelSource, task: TaskType, device: torch.device
) -> None:
    """Choose the attention of a loaded model.

    Without `attn_implementation`, packed rows on a GPU use `varlen` if torch's kernel supports the
    model; transformers chooses elsewhere.
    """
    register_packed_attention()
    config, wanted = model.config, source.attn_implementation
    lacking = architecture_of(config).lacking_in_fused_attention(config)
    if lacking is not None and wanted in (VARLEN, "sdpa"):
        raise ModelError(
            f"{source.where.removesuffix('.model')}.attn_implementation: the {config.model_type} "
            f"model has {lacking}, which {wanted} does not support; use eager, or remove the key"
        )
    check_varlen(config, source)
    is_packed = wanted == VARLEN or (wanted is None and task == "causal_lm")
    if is_packed and device.type == "cuda":
        if _has_kernel(model):
            wanted = VARLEN
        elif wanted is not None:
            raise ModelError(
                f"{source.where.removesuffix('.model')}.attn_implementation: varlen needs bf16 or "
                "fp16 on a GPU, no attention dropout, and heads of at most 256 columns, a multiple "
                "of 8; use sdpa"
            )
    if wanted is not None:
        model.set_attn_implementation(wanted)
    if task == "causal_lm":  # tried here, and not in a forward of all ranks
        packing_at(source.where, config, config._attn_implementation)  # noqa: SLF001


def _has_kernel(model: PreTrainedModel) -> bool:
    config = model.config
    if architecture_of(config).lacking_in_fused_attention(config) is not None:
        return False
    # Whether rows are packed does not depend on the device.
    if "apart" in (packing_of(config, None), packing_of(config, VARLEN)):
        return False
    width = architecture_of(config).heads(config).width
    dropout = getattr(config, "attention_dropout", 0.0) or getattr(config, "attn_pdrop", 0.0)
    is_narrow = model.dtype in (torch.bfloat16, torch.float16)
    return is_narrow and not dropout and width % 8 == 0 and width <= 256


def check_varlen(config: PretrainedConfig, source: ModelSource) -> None:
    """Raise ModelError if `attn_implementation` is varlen and a model's attention is another."""
    if source.attn_implementation == VARLEN and packing_of(config, VARLEN) == "apart":
        raise ModelError(
            f"{source.where.removesuffix('.model')}.attn_implementation: varlen does not compute "
            f"the attention of a {config.model_type} model; remove the key"
        )
