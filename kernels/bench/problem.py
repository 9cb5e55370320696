"""Random inputs of a case, with logits as models have them, and one run of a loss over them.

The student's logits are normal with standard deviation 4 (trained models: 3 to 8), the
teacher's are the student's plus noise of deviation 1. Zeros, or logits close to zero, would be
faster and easier than what happens in training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import TOP_K, Case

LOGIT_DEVIATION = 4.0
TEACHER_NOISE = 1.0
_ROWS_AT_ONCE = 256
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The tensors of a case; those that its loss does not have are empty.

    student: hidden states [N, Hs], or logits [N, V] ("rows", "logits"), or queries [1, L, Hs].
    student_weight: [V, Hs], or the projection [Ht, Hs] of a hidden loss.
    teacher: like student, with Ht.
    teacher_weight: [V, Ht].
    labels: [N] int64; all count.
    topk_ids, topk_logprobs: [N, TOP_K], the teacher's largest log-probabilities.
    """

    case: Case
    student: Tensor
    student_weight: Tensor
    teacher: Tensor
    teacher_weight: Tensor
    labels: Tensor
    topk_ids: Tensor
    topk_logprobs: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """Tensors with gradients: hidden states first, weight second if there is one."""
        return tuple(each for each in (self.student, self.student_weight) if each.requires_grad)

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the values as leaves of another type."""
        return self._changed(
            lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor
        )

    def cut(self, rows: int) -> Problem:
        """Return the problem of its last rows, with new leaves."""
        n = min(rows, self.case.n)
        short = self._changed(lambda tensor: tensor[:, -n:] if tensor.dim() == 3 else tensor[-n:])
        whole = self._changed(lambda tensor: tensor)
        heads = {name: getattr(whole, name) for name in ("student_weight", "teacher_weight")}
        return replace(short, case=self.case.cut(n), **heads)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Problem:
        tensors = {name: each for name, each in vars(self).items() if isinstance(each, Tensor)}
        changed = {
            name: change(each.detach()).requires_grad_(each.requires_grad)
            for name, each in tensors.items()
        }
        return Problem(case=self.case, **changed)


Loss = Callable[[Problem], Tensor]


def run(loss: Loss, problem: Problem) -> Tensor:
    """The loss, after its backward if the case has one; gradients are left in the leaves."""
    with torch.set_grad_enabled(problem.case.mode == "fwd_bwd"):
        value = loss(problem)
    if value.requires_grad:
        value.backward()
    return value.detach()


def drop_gradients(problem: Problem) -> None:
    """Makes the next backward write gradients instead of adding to them."""
    for leaf in problem.leaves:
        leaf.grad = None


def make_problem(case: Case, device: torch.device, *, seed: int = 0) -> Problem:
    """Random inputs on the device, the same at every call."""
    source = _Source(case, device, torch.Generator(device).manual_seed(seed))
    kinds = {"rows": source.logits, "logits": source.logits, "relation": source.relation,
             "hidden_mse": source.hidden, "hidden_cosine": source.hidden}  # fmt: skip
    return kinds.get(case.kind, source.heads)()


class _Source:
    """Draws the tensors of one case."""

    def __init__(self, case: Case, device: torch.device, generator: torch.Generator) -> None:
        self.case = case
        self.dtype = DTYPES[case.dtype]
        self.device = device
        self.generator = generator

    def logits(self) -> Problem:
        """[N, V] of both, in fp32 as the product of the heads leaves them."""
        case = self.case
        student = self._normal(case.n, case.v, deviation=LOGIT_DEVIATION, dtype=torch.float32)
        teacher = self._normal(case.n, case.v, deviation=TEACHER_NOISE, dtype=torch.float32)
        return self._problem(student=student, teacher=teacher.add_(student), labels=self._labels())

    def relation(self) -> Problem:
        """Queries whose scores have deviation 1; longer ones would see nothing but themselves."""
        case = self.case
        return self._problem(
            student=self._normal(1, case.n, case.hs), teacher=self._normal(1, case.n, case.ht)
        )

    def hidden(self) -> Problem:
        case = self.case
        return self._problem(
            student=self._normal(case.n, case.hs),
            student_weight=self._normal(case.ht, case.hs, deviation=case.hs**-0.5),
            teacher=self._normal(case.n, case.ht),
        )

    def heads(self) -> Problem:
        """Two LM heads; the teacher's repeats the student's in its first Hs columns."""
        case = self.case
        student = self._normal(case.n, case.hs)
        weight = self._normal(case.v, case.hs, deviation=LOGIT_DEVIATION * case.hs**-0.5)
        teacher: dict[str, Tensor] = {}
        if case.kind == "topk":
            teacher["topk_ids"], teacher["topk_logprobs"] = self._largest(student, weight)
        elif case.ht:
            extra = case.ht - case.hs
            noise = self._normal(case.v, extra, deviation=TEACHER_NOISE * extra**-0.5)
            teacher["teacher"] = torch.cat((student, self._normal(case.n, extra)), dim=1)
            teacher["teacher_weight"] = torch.cat((weight, noise), dim=1)
        return self._problem(student, student_weight=weight, labels=self._labels(), **teacher)

    def _largest(self, student: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and log-probabilities of a teacher, the student with noise; unique ids."""
        parts = []
        for rows in student.split(_ROWS_AT_ONCE):
            logits = (rows @ weight.T).float()
            logits += self._normal(*logits.shape, deviation=TEACHER_NOISE, dtype=torch.float32)
            logprobs, ids = F.log_softmax(logits, dim=-1).topk(min(TOP_K, self.case.v // 2))
            parts.append((ids, logprobs))
        return torch.cat([ids for ids, _ in parts]), torch.cat([each for _, each in parts])

    def _labels(self) -> Tensor:
        case = self.case
        return torch.randint(0, case.v, (case.n,), device=self.device, generator=self.generator)

    def _normal(
        self, *shape: int, deviation: float = 1.0, dtype: torch.dtype | None = None
    ) -> Tensor:
        out = torch.empty(shape, device=self.device, dtype=dtype or self.dtype)
        return out.normal_(0.0, deviation, generator=self.generator)

    def _problem(self, student: Tensor, **tensors: Tensor) -> Problem:
        missing = student.new_empty(0)
        names = ("student_weight", "teacher", "teacher_weight", "labels", "topk_ids",
                 "topk_logprobs")  # fmt: skip
        given = {name: tensors.get(name, missing.clone()) for name in names}
        with_gradient = self.case.mode == "fwd_bwd" and self.case.kind not in {"rows", "gemms"}
        student.requires_grad_(with_gradient)
        weight = given["student_weight"]
        weight.requires_grad_(with_gradient and weight.numel() > 0)
        return Problem(case=self.case, student=student, **given)
