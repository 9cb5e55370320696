"""A language model's next tokens at every position: the most likely tokens, or random draws.

Caches keep them in place of logits. Logits are formed for a few positions at a time. A `Readout`
has the end of a model alone, and reads hidden states that a server exports.
Shapes: B rows of a micro-batch, T positions, C positions of a block, V vocabulary, n draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from megakd.config.task import TaskConfig
from megakd.contract.batch import Batch, LogitWarp, TopK
from megakd.errors import ModelError
from megakd.models.fitting import match_names, valueless_model
from megakd.models.knowledge import LanguageModelHead, Needs, language_model_head, read_knowledge
from megakd.models.source import ModelSource
from megakd.models.weights import WeightReader

LOGITS_AT_ONCE = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Most elements of a block of logits; a larger block reads the output matrix less often."""
_POSITIONS = 512
"""Positions whose logits a `Readout` has in memory at a time."""
_ROOM_FOR_DRAWS = 4
"""Memory of a draw over that of a choice of the largest: the cumulative sums are in fp64."""


class TokenCounts(NamedTuple):
    """Draws from a language model's next-token distribution, with replacement.

    ids: [..., n] int32 different token numbers in ascending order; -1 in unused slots, and in all
        slots if the logits are not finite.
    counts: [..., n] uint8, how often each token was drawn; 0 in unused slots.
    """

    ids: Tensor
    counts: Tensor


def most_likely(model: nn.Module, batch: Batch, count: int) -> TopK:
    """Return a language model's most likely next tokens at every position, [B, T, count].

    Under ZeRO 3, call inside a module's forward.
    """

    def read(logits: Tensor, _: slice) -> TopK:
        best, ids = logits.topk(min(count, logits.shape[1]), dim=-1)
        return TopK(ids.int(), best - logits.logsumexp(-1, keepdim=True))

    return TopK(*_of_logits(model, batch, read))


def drawn(model: nn.Module, batch: Batch, numbers: Tensor) -> TokenCounts:
    """Return draws from a language model's softmax at every position, [B, T, n].

    Under ZeRO 3, call inside a module's forward. The numbers [B, T, n] are fp64 and random in [0,
    1).
    """
    flat = numbers.flatten(0, 1)

    def read(logits: Tensor, rows: slice) -> TokenCounts:
        return count_draws(draw(logits, flat[rows]))

    return TokenCounts(*_of_logits(model, batch, read, room=_ROOM_FOR_DRAWS))


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    """Draw int64 tokens [C, n] from softmax(logits [C, V]) by inversion of the cumulative sums.

    The numbers [C, n] are fp64 and random in [0, 1). The sums are in fp64: in fp32, their rounding
    exceeds the probability of most tokens of a large vocabulary. Rows with logits that are not
    finite numbers or -inf get -1.
    """
    sums = logits.double().softmax(-1).cumsum_(-1)
    total = sums[:, -1:]
    # Rounding must not lift a place to the total: no token lies there.
    places = torch.minimum(numbers * total, total.nextafter(torch.zeros_like(total)))
    ids = torch.searchsorted(sums, places, right=True)
    return torch.where(total.isfinite(), ids, -1)


def count_draws(ids: Tensor) -> TokenCounts:
    """Return the different tokens of each row of draws [C, n], with their counts.

    There are at most 255 draws per row; -1 is no token.
    """
    ordered = ids.sort(-1).values
    slots = (ordered.diff(dim=-1) != 0).cumsum(-1)
    slots = functional.pad(slots, (1, 0))  # the first draw has slot 0
    is_token = (ordered >= 0).to(torch.uint8)
    return TokenCounts(
        torch.full_like(ordered, -1).scatter_(-1, slots, ordered).int(),
        torch.zeros_like(is_token).scatter_add_(-1, slots, is_token),
    )


def _of_logits(
    model: nn.Module,
    batch: Batch,
    read: Callable[[Tensor, slice], tuple[Tensor, Tensor]],
    *,
    room: int = 1,
) -> Iterator[Tensor]:
    knowledge = read_knowledge(model, batch, Needs())
    if knowledge.hidden is None:
        raise TypeError("a language model was read without its hidden states")
    head = language_model_head(model)
    hidden, answers = knowledge.hidden.flatten(0, -2), []
    most = LOGITS_AT_ONCE.get(hidden.device.type, LOGITS_AT_ONCE["cpu"]) // room
    with head.open():
        weight, bias = head.read()
        step = max(1, most // len(weight))
        for start in range(0, len(hidden), step):
            rows = slice(start, start + step)
            logits = head.warp(functional.linear(hidden[rows], weight, bias).float())
            answers.append(read(logits, rows))
    shape = knowledge.hidden.shape[:-1]
    return (torch.cat(parts).unflatten(0, shape) for parts in zip(*answers, strict=True))


class Readout(nn.Module):
    """The final norm and the output matrix of a language model, on every rank as a whole.

    norm: the module of transformers itself, so that its formula is that of the family.
    """

    def __init__(self, norm: nn.Module, output: nn.Module, warp: LogitWarp) -> None:
        super().__init__()
        self.norm = norm
        self.output = output
        self.head = LanguageModelHead(output, warp)

    @property
    def weight(self) -> Tensor:
        """The output matrix [V, D]."""
        return self.head.read()[0]

    @torch.no_grad()
    def forward(self, states: Tensor) -> Tensor:
        """Return the input of the output matrix for states [..., D] after the last layer."""
        return self.norm(states.to(self.weight))

    @torch.no_grad()
    def logprobs(self, states: Tensor) -> Tensor:
        """Return the log-probabilities [N, V] of the next tokens for states [N, D], in fp32."""
        weight, bias = self.head.read()
        product = nn.functional.linear(self(states), weight, bias)
        return self.head.warp(product.float()).log_softmax(-1)

    def most_likely(self, states: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return fp32 log-probabilities and numbers [N, count] of the likeliest next tokens.

        For states [N, D]; the most likely tokens come first. Both tensors are on the CPU.
        """
        best = [self.logprobs(some).topk(count) for some in states.split(_POSITIONS)]
        values, tokens = zip(*best, strict=True)
        return torch.cat(values).cpu(), torch.cat(tokens).cpu()


def load_readout(source: ModelSource, task: TaskConfig, dtype: torch.dtype) -> Readout:
    """Build the end of a language model on the CPU, without gradients, from its weight files.

    Only the tensors of the end are read.
    """
    architecture = source.architecture
    if architecture.final_norm is None:
        raise ModelError(
            f"{source.where}: a {source.config.model_type} model has no norm after its last layer, "
            "so its logits cannot be computed from exported hidden states; use teacher.server.top_k"
        )
    empty = valueless_model(source, task, source.config)
    stored = match_names(empty, source.stored).stored
    # Under all names of tied tensors, not only under the first name.
    tensors = empty.state_dict(keep_vars=True)
    of_tensor = {id(tensors[name]): place for name, place in stored.items()}
    known = {name: of_tensor[id(t)] for name, t in tensors.items() if id(t) in of_tensor}
    reader, parts = WeightReader(source.where), []
    for path in (f"{architecture.backbone}.{architecture.final_norm}", architecture.head):
        module = empty.get_submodule(path).to(dtype).to_empty(device="cpu")
        for name, tensor in module.requires_grad_(requires_grad=False).state_dict().items():
            if f"{path}.{name}" not in known:
                raise ModelError(
                    f"{source.where}: {source.folder} has no tensor {path}.{name}, which the "
                    "logits of exported hidden states need; give the folder of the whole model"
                )
            tensor.copy_(reader.read(known[f"{path}.{name}"]))
        parts.append(module.eval())
    norm, output = parts
    return Readout(norm, output, architecture.logit_warp(source.config))
