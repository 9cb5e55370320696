"""Distillation losses that never form [N, V] logits; needs torch alone."""

from megakd_kernels.hidden import hidden_cosine_projection_loss, hidden_mse_projection_loss
from megakd_kernels.linear_kd import linear_kd_loss
from megakd_kernels.logits import kd_loss_from_logits
from megakd_kernels.relation import relation_kl_loss
from megakd_kernels.settings import DIVERGENCES, IMPLEMENTATIONS, KDOutput

__all__ = [
    "DIVERGENCES",
    "IMPLEMENTATIONS",
    "KDOutput",
    "hidden_cosine_projection_loss",
    "hidden_mse_projection_loss",
    "kd_loss_from_logits",
    "linear_kd_loss",
    "relation_kl_loss",
]
