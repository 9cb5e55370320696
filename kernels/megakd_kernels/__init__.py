"""Exact distillation losses that never form [N, V] logits; needs torch, and Triton on CUDA."""

import torch

if torch.__version__ < "2.11":  # compared as a version
    raise ImportError(f"megakd_kernels needs torch 2.11 or newer, got {torch.__version__}")

from megakd_kernels.hidden import hidden_cosine_projection_loss, hidden_mse_projection_loss
from megakd_kernels.linear_kd import linear_kd_loss
from megakd_kernels.logits import kd_loss_from_logits
from megakd_kernels.relation import relation_kl_loss
from megakd_kernels.settings import DIVERGENCES, IMPLEMENTATIONS, KDOutput
from megakd_kernels.statistics import LinearStats, linear_stats
from megakd_kernels.topk import TOPK_MODES, topk_kd_loss

__all__ = [
    "DIVERGENCES",
    "IMPLEMENTATIONS",
    "TOPK_MODES",
    "KDOutput",
    "LinearStats",
    "hidden_cosine_projection_loss",
    "hidden_mse_projection_loss",
    "kd_loss_from_logits",
    "linear_kd_loss",
    "linear_stats",
    "relation_kl_loss",
    "topk_kd_loss",
]
