"""Operations of teachers and students by closed form, for their FLOP/s.

A forward takes 2 operations per token for every weight that multiplies it, and 4 for every column
of every layer and token that it attends to; a backward takes as many again for the inputs of a
product, and for its weight if that learns. A student's step is thus the usual 6·N per token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from torch import nn
from transformers import PreTrainedModel

from megakd.contract.batch import Unit
from megakd.contract.stage import Pass, teacher_names
from megakd.contract.views import View
from megakd.models.axes import full_shape, weight_axes
from megakd.models.structure import architecture_of
from megakd.teachers.frozen import FrozenTeacher

if TYPE_CHECKING:
    from megakd.losses.bundle import StudentBundle
    from megakd.training.trainer import Trainer

PEAK_TFLOPS = {
    "B200": 2250.0, "H200 NVL": 835.0, "H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0,
    "H100": 989.0, "H800": 989.0, "H20": 148.0, "A100": 312.0, "A800": 312.0, "A40": 149.7,
    "A10G": 70.0, "A10": 125.0, "L40S": 362.0, "L40": 181.0, "L4": 121.0, "V100": 125.0,
    "T4": 65.0, "MI300X": 1307.0,
}  # fmt: skip
"""Dense products of 16 bits by device, 1e12 operations per second, from the makers' data sheets."""


def peak_tflops(device: str) -> float | None:
    """Return the rate of a device by its name; None if it is not known."""
    return next((p for name, p in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device)), None)


def work_of(
    model: PreTrainedModel, view: View | None = None, *, learns: bool = False
) -> tuple[int, int]:
    """Return how often a token is multiplied by a weight, and the columns of all layers.

    view: a part of the model that runs alone. learns: counts a backward too.
    """
    architecture, weights = architecture_of(model.config), 0
    axes = {} if view is None else weight_axes(model)
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):  # a token reads a row, and multiplies nothing
            continue
        for name, weight in module.named_parameters(path, recurse=False):
            shape = list(full_shape(weight))
            for place, axis in enumerate(axes.get(name, ())):
                length = None if axis is None else axis.length(view)
                shape[place] = shape[place] if length is None else length
            if len(shape) == 3 and hasattr(type(module), "_apply_gate"):  # of all experts
                shape[0] = getattr(model.config, "num_experts_per_tok", shape[0])
            if len(shape) > 1:
                weights += math.prod(shape) * (2 + weight.requires_grad if learns else 1)
    layers = architecture.number_of_layers(model.config)
    return weights, (3 if learns else 1) * layers * architecture.hidden_width(model.config)


class StepWork:
    """The operations of the steps of a stage, by the passes of a step.

    divides_rows: whether a teacher reads a part of the rows, or every teacher reads all.
    """

    def __init__(self, trainer: Trainer, *, divides_rows: bool) -> None:
        self._trainer, self._divides_rows = trainer, divides_rows
        self._known: dict[tuple[str, str | None], tuple[int, int]] = {}

    def of(self, plan: Sequence[Pass], counts: Mapping[Unit, int]) -> tuple[float, float]:
        """Return the operations of students and of teachers in a step, over all ranks.

        A model that learns beside the student counts as a student, and an answer from a cache or a
        server as nothing.
        """
        bundle, names = cast("StudentBundle", self._trainer.student.bundle), teacher_names(plan)
        passes = {(one.learner or bundle.role, one.view) for one in plan}
        passes |= {(name, None) for name in names}
        readers = len(names) if self._divides_rows else 1
        tokens, length = counts["tokens"], counts["tokens"] / max(1, counts["examples"])
        student = teacher = 0.0
        for name, view in passes:
            learns = name in bundle.by_role
            asked = None if learns else self._trainer.teachers.get(name)
            if asked is not None and not isinstance(asked, FrozenTeacher):
                continue
            if (name, view) not in self._known:
                # A teacher that is no model of its own is the student without its adapters.
                whole = bundle.by_role[name if learns else bundle.role]
                model = cast("PreTrainedModel", whole if asked is None else asked.model)
                part = None if view is None else bundle.views[view]
                self._known[name, view] = work_of(model, part, learns=learns)
            weights, columns = self._known[name, view]
            work = tokens * (2 * weights + 4 * columns * length)
            if learns:
                student += work
            else:
                teacher += work / readers
        return student, teacher
