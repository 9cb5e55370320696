"""The loss by which a mixture of experts that learns spreads its tokens over the experts."""

from __future__ import annotations

import torch

from megakd.data.batch import LossInputs
from megakd.engine.collectives import all_reduce_
from megakd.losses.targets import Evaluated, TermGroup

ROUTER_BALANCE = "router_balance"


class RouterBalance(TermGroup):
    """E * sum over the experts of f * P, as in transformers (Switch Transformer, equations 4 to 6).

    Of an expert, f is the share of the tokens that are routed to it, and P is its mean probability,
    over the tokens of all layers (Fedus et al. 2021, https://arxiv.org/abs/2101.03961). The loss is
    the number of experts per token where tokens are spread evenly.

    The product of two means does not add up over ranks. f is therefore counted over the tokens of a
    micro-batch on all ranks, so that the loss and its gradient do not depend on how the rows of the
    micro-batch are divided. Micro-batches are averaged by their tokens. Padding does not count.
    """

    units = {ROUTER_BALANCE: "tokens"}  # noqa: RUF012

    def forward(self, inputs: LossInputs) -> Evaluated:
        """Return the sum over the tokens of this rank; a collective if the model has a routing."""
        routing = inputs.student.routing
        if routing is None or not routing.logits:  # of a model that is dense, or evaluated
            return Evaluated(inputs.per_unit["tokens"].float() * 0, {})
        valid = inputs.batch.valid.flatten()  # [B * T]
        tokens = valid.float()
        summed = routed = torch.zeros(routing.logits[0].shape[-1], device=valid.device)  # [E]
        for logits in routing.logits:
            # Padding may hold NaN.
            shares = logits.float().masked_fill(~valid[:, None], 0.0).softmax(dim=-1)
            chosen = shares.detach().topk(routing.chosen).indices  # [B * T, k]
            each = tokens.repeat_interleave(routing.chosen)
            routed = routed.scatter_add(0, chosen.flatten(), each)
            summed = summed + tokens @ shares
        counts = torch.cat([routed, tokens.sum()[None]])
        if not counts.is_meta:  # a plan has no ranks
            all_reduce_(counts)
        routed, every = counts[:-1], counts[-1].clamp(min=1) * len(routing.logits)
        total = (routed / every * summed).sum() * len(routed) / len(routing.logits)
        result = self.of_one_term(inputs, total)
        return result._replace(total=result.total * routing.coefficient)
