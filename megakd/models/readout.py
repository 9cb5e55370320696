"""The end of a language model, without its layers: the final norm and the output matrix."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megakd.config.task import TaskConfig
from megakd.contract.batch import LogitWarp
from megakd.errors import ModelError
from megakd.models.fitting import valueless_model
from megakd.models.knowledge import LanguageModelHead
from megakd.models.matching import match_names
from megakd.models.source import ModelSource
from megakd.models.weights import StoredTensor, WeightReader

_POSITIONS = 512
"""Positions whose logits are in memory at a time."""


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
    paths = (f"{architecture.backbone}.{architecture.final_norm}", architecture.head)
    norm, output = (_read(empty.get_submodule(path), path, known, source, dtype) for path in paths)
    return Readout(norm, output, architecture.logit_warp(source.config))


def _read(
    module: nn.Module,
    path: str,
    known: Mapping[str, StoredTensor],
    source: ModelSource,
    dtype: torch.dtype,
) -> nn.Module:
    reader = WeightReader(source.where)
    module = module.to(dtype).to_empty(device="cpu").requires_grad_(requires_grad=False).eval()
    for name, tensor in module.state_dict(keep_vars=True).items():
        stored = known.get(f"{path}.{name}")
        if stored is None:
            raise ModelError(
                f"{source.where}: {source.folder} has no tensor {path}.{name}, which the logits of "
                "exported hidden states need; give the folder of the whole model"
            )
        tensor.copy_(reader.read(stored))
    return module
