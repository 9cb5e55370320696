"""Predictions of a model for a micro-batch."""

from __future__ import annotations

import torch
from torch import nn

import megakd_kernels
from megakd.contract.batch import IGNORE, Batch, Knowledge, Predictions
from megakd.contract.tasks import Kernels
from megakd.models.knowledge import Needs, read_knowledge


def predict(model: nn.Module, batch: Batch, kernels: Kernels = "auto") -> Predictions:
    """Return logits or scores of a micro-batch; for a language model, the sums for its metrics."""
    return predictions_of(read_knowledge(model, batch, Needs()), batch, kernels)


def predictions_of(read: Knowledge, batch: Batch, kernels: Kernels = "auto") -> Predictions:
    """Return the predictions in a model's outputs for a micro-batch; see `predict`."""
    if read.logits is not None:
        return Predictions(outputs=read.logits.float(), sums=None)
    if read.head is None or read.hidden is None:
        raise TypeError("a language model was read without its head")
    weight, bias = read.head.read()
    stats = megakd_kernels.linear_stats(
        read.hidden,
        weight,
        labels=batch.target_labels,
        ignore_index=IGNORE,
        student_bias=bias,
        softcap_s=read.head.warp.softcap,
        logit_scale_s=read.head.warp.scale,
        impl=kernels,
    )
    sums = torch.stack([stats.ce_sum.double(), stats.agreement.double(), stats.n_valid.double()])
    return Predictions(outputs=None, sums=sums)
