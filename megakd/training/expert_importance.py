"""The importance of the experts of a mixture.

It is the sum over tokens of the norm of what an expert gives to hidden states: of its output, times
the weight of the router. This is the score of REAP (Lasby et al. 2025,
https://arxiv.org/abs/2510.13999), whose mean over the tokens of an expert is a sum here: an expert
that few tokens choose changes little.
"""

from __future__ import annotations

import logging

import torch

from megakd.data.batch import Batch, Predictions
from megakd.engine.collectives import activity, all_reduce_, broadcast
from megakd.errors import TeacherError
from megakd.models.experts import contributions_taken
from megakd.models.fitting import ReadyTeacher
from megakd.models.views import UnitOrder
from megakd.training.assembly import Assembly
from megakd.training.evaluation import few, scorer_for

logger = logging.getLogger(__name__)


@activity("measuring the importance of experts")
def expert_order(assembly: Assembly, ready: ReadyTeacher, count: int) -> UnitOrder:
    """Return the order by which each layer of a model keeps its most important experts.

    They are measured on held-out rows, without padding; a collective.

    Args:
        count: of the experts that each layer keeps.
    """
    found, scorer = ready.source.experts, scorer_for(assembly)
    rows = few(assembly.prepared.encoded.validation, assembly.config.task.type)
    with assembly.loaded(ready) as model, contributions_taken(model.model, found) as taken:

        def predict(batch: Batch) -> Predictions:
            taken.valid = batch.valid.flatten()
            return model.predict(batch)

        scorer.loss(predict, rows)
        numbers = sorted(taken.sums)
        sums = all_reduce_(torch.stack([taken.sums[number] for number in numbers]))
    if not sums.isfinite().all():
        raise TeacherError(
            "the outputs of the experts of the teacher are not finite, so that experts cannot be "
            "ranked; set teacher.dtype to bf16 or fp32"
        )
    # The last digits of a sum may differ between ranks, but the order must be equal.
    scores = dict(zip(numbers, broadcast(sums.tolist()), strict=True))
    order = found.order(scores, count)
    stay = sum(scores[n][expert] for n in numbers for expert in (order.experts or ())[n][:count])
    logger.info(
        "experts: %d of %d stay in each of %d layers, with %.1f %% of what all give to %d rows",
        *(count, found.total, len(numbers), 100 * stay / sums.sum().item(), len(rows)),
    )
    return order
