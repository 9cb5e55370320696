"""Training with two vocabularies in plain PyTorch, from the equations, on one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM

IGNORE = -100


class Pair:
    """A student and a teacher with a second table, from the initial weights of a bundle.

    initial: weights of the bundle by name.
    configs: the learners by role, in the bundle's order.
    method: options of the method, and `offset`, the number of the first piece of the student.
    """

    def __init__(
        self, initial: dict[str, Tensor], configs: dict[str, BertConfig], method: dict[str, Any]
    ) -> None:
        self.models: dict[str, BertForMaskedLM] = {}
        self.second: dict[str, Tensor] = {}
        self.method = method
        for number, (role, config) in enumerate(configs.items()):
            prefix = f"learners.{number}."
            weights = {
                n.removeprefix(prefix): w for n, w in initial.items() if n.startswith(prefix)
            }
            extra = {n: weights.pop(n) for n in list(weights) if n.startswith("second_vocabulary.")}
            model = BertForMaskedLM(config)
            model.load_state_dict(weights, strict=False)
            model.tie_weights()
            self.models[role] = model
            if extra:
                self.second = {
                    n.removeprefix("second_vocabulary."): nn.Parameter(w.clone())
                    for n, w in extra.items()
                }
        self.projections = {
            name.rpartition(".")[2]: nn.Parameter(weight.clone())
            for name, weight in initial.items()
            if name.startswith("objective.")
        }

    def parameters(self) -> list[nn.Parameter]:
        result = [p for model in self.models.values() for p in model.parameters()]
        return [*result, *self.second.values(), *self.projections.values()]  # type: ignore[list-item]

    def weights(self) -> dict[str, Tensor]:
        """All weights of the models, as `folder_weights` of the test names them."""
        prefixes = {"student": "", "teacher": "teacher/"}
        result = {
            f"{prefixes[role]}{name}": weight.detach()
            for role, model in self.models.items()
            for name, weight in model.named_parameters()
        }
        second = {f"teacher/second_vocabulary/{n}": w.detach() for n, w in self.second.items()}
        return result | second

    def student_loss(self, batch: Any) -> tuple[Tensor, int]:
        out = self.models["student"](**batch.inputs).logits
        labels = batch.labels
        total = functional.cross_entropy(
            out.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"
        )
        return total, int((labels != IGNORE).sum())

    def teacher_loss(self, batch: Any) -> tuple[Tensor, int]:
        """Cross-entropy of mixed text; each target has the softmax of its own vocabulary."""
        model, inputs = self.models["teacher"], dict(batch.inputs)
        table = model.bert.embeddings.word_embeddings.weight
        if self.second:  # else the teacher reads its own words alone
            table = torch.cat([table[: self.method["offset"]], self.second["table.weight"]])
        vectors = functional.embedding(inputs.pop("input_ids"), table)
        hidden = model.bert(inputs_embeds=vectors, **inputs).last_hidden_state
        hidden = model.cls.predictions.transform(hidden).flatten(0, 1)
        first = functional.cross_entropy(
            model.cls.predictions.decoder(hidden),
            batch.labels.flatten(),
            ignore_index=IGNORE,
            reduction="sum",
        )
        count = (batch.labels != IGNORE).sum()
        if not self.second:
            return first, int(count)
        chosen = functional.linear(
            hidden[batch.second.positions], self.second["table.weight"], self.second["bias"]
        )
        second = functional.cross_entropy(
            chosen, batch.second.labels, ignore_index=IGNORE, reduction="sum"
        )
        count = count + (batch.second.labels != IGNORE).sum()
        return first + second, int(count)

    def projection_loss(self) -> Tensor:
        """The mean squared error over all compared elements."""
        total, elements, is_down = torch.zeros(()), 0, self.method["projections"] != "up"
        ours, theirs = (
            dict(self.models[role].bert.encoder.layer.named_parameters())
            for role in ("student", "teacher")
        )
        pairs = [(ours[name], theirs[name], False) for name in ours]
        if self.second:
            student = self.models["student"].bert.embeddings.word_embeddings.weight
            pairs.append((student, self.second["table.weight"], True))
        for first, second, is_table in pairs:
            source, target = (second, first) if is_down else (first, second)
            value = source
            if not is_table:
                value = self._matrix("rows", source.shape[0], target.shape[0]) @ value
            if source.dim() > 1:
                value = value @ self._matrix("columns", source.shape[1], target.shape[1])
            total = total + (value - target).square().sum()
            elements += target.numel()
        return total / self.method.get("epsilon", elements)

    def _matrix(self, side: str, given: int, wanted: int) -> Tensor:
        return self.projections[f"{side}_{given}_to_{wanted}"]


def trained(pair: Pair, steps: list[list[Any]], train: dict, *, learners: list[str]) -> list[dict]:
    """Take AdamW steps over batches of one rank; return the losses of every step."""
    second = {id(p) for p in pair.second.values()}
    teachers = second | {id(p) for p in pair.models["teacher"].parameters()}
    factor, decay = train.get("teacher_factor", 1.0), train["weight_decay"]
    groups = [
        {
            "params": [p],
            "weight_decay": 0.0 if p.dim() < 2 or id(p) in second else decay,
            "factor": factor if id(p) in teachers else 1.0,
        }
        for p in pair.parameters()
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, eps=train["adam_epsilon"])
    collected = []
    for number, batches in enumerate(steps):
        rate = train["learning_rate"] * (1 - number / len(steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        optimizer.zero_grad()
        parts = {role: _mean(pair, role, batches) for role in learners}
        if pair.projections:
            parts["projection"] = pair.projection_loss()
        torch.stack(list(parts.values())).sum().backward()
        optimizer.step()
        collected.append({name: float(value.detach()) for name, value in parts.items()})
    return collected


def _mean(pair: Pair, role: str, batches: list[Any]) -> Tensor:
    loss = pair.teacher_loss if role == "teacher" else pair.student_loss
    parts = [batch.for_role(role) for batch in batches]
    sums, counts = zip(*map(loss, parts), strict=True)
    return torch.stack(sums).sum() / sum(counts)
