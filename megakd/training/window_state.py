"""The training state at the end of a window, with which the next window of a run continues.

    stages/<stage>/training_state/    whole tensors in fp32, as safetensors, and rest.pt

The tensors are the weights, the optimizer's moments and the strategy's shards. They are cut like
the model of the window.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from megakd.engine.collectives import gather, on_main
from megakd.engine.optimizer_state import LEARNER
from megakd.errors import CheckpointError
from megakd.models.cutting import cut_state
from megakd.models.model_folder import write_weights
from megakd.models.weights import WeightReader, check_weight_files
from megakd.process.seeding import random_state, set_random_state
from megakd.storage.atomic import write_content
from megakd.storage.folders import check_given

if TYPE_CHECKING:
    from torch import Tensor

    from megakd.contract.batch import BatchSource
    from megakd.contract.stage import Strategy
    from megakd.contract.views import Axes, Cut
    from megakd.engine.distributed import Ranks
    from megakd.engine.student import StudentEngine

FOLDER = "training_state"
REST = "rest.pt"


class WindowState(NamedTuple):
    """State that the next window needs in addition to the model.

    tensors: keys `<kind>/<weight>` and whole tensors; every rank must iterate to the end.
    rest: the remaining values, as the content of a file.
    """

    tensors: Iterator[tuple[str, Tensor]]
    rest: bytes

    @staticmethod
    def of(
        student: StudentEngine,
        strategy: Strategy,
        batches: BatchSource,
        *,
        axes: Mapping[str, Axes],
        cut: Cut | None,
    ) -> WindowState:
        """Return the state of a stage, cut like its model if `cut` is given; a collective."""
        tensors = _whole(student, strategy)
        if cut is not None:
            tensors = _cut(tensors, axes, cut)
        rest = {
            "steps": student.optimizer_state.steps,
            "batches": batches.state_dict(),
            "random": gather(random_state()),
        }
        file = io.BytesIO()
        torch.save(rest, file)
        return WindowState(tensors, file.getvalue())

    def write(self, folder: Path) -> None:
        """Write the state into the folder of a stage that is not sealed yet."""
        (folder / FOLDER).mkdir()
        write_weights(folder / FOLDER, self.tensors)
        write_content(folder / FOLDER / REST, self.rest)


def files_of_window(names: Iterable[str]) -> list[str]:
    """Return the files of a training state among the files of a stage's folder."""
    return [name for name in names if name.startswith(f"{FOLDER}/")]


def _whole(student: StudentEngine, strategy: Strategy) -> Iterator[tuple[str, Tensor]]:
    values = student.optimizer_state
    for kind, name, tensor in values.whole():
        yield f"{kind}/{name}", tensor
    # A rank may hold no part of some weights, or of any.
    shards = strategy.shards()
    for kind in dict.fromkeys(kind for kinds in gather([*shards]) for kind in kinds):
        parts = shards.get(kind, {})
        for name in sorted({name for names in gather(list(parts)) for name in names}):
            part = parts.get(name, torch.empty(0))
            yield f"{kind}/{LEARNER}{name}", values.put_together(LEARNER + name, part)


def _cut(
    tensors: Iterator[tuple[str, Tensor]], axes: Mapping[str, Axes], cut: Cut
) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in tensors:
        of_weight = axes.get(key.partition("/")[2])
        yield from cut_state(
            [(key, tensor)], {} if of_weight is None else {key: of_weight}, cut.view, cut.order
        )


def continue_window(
    folder: Path, student: StudentEngine, strategy: Strategy, batches: BatchSource, ranks: Ranks
) -> None:
    """Load the state that the previous window of a run wrote into `folder`; a collective.

    The random numbers continue if the number of ranks is the same, else the stage's seed counts.
    """
    if not on_main((folder / FOLDER / REST).is_file):
        raise CheckpointError(
            f"{folder} has no {FOLDER}/, with which the next window of the run continues; remove "
            f"{folder} to train its stage again"
        )
    where = f"{folder.name}/{FOLDER}"
    on_main(lambda: check_given(folder, where, wanted=lambda name: name.startswith(FOLDER)))
    stored, reader = check_weight_files(folder / FOLDER, where), WeightReader(where)
    rest = torch.load(folder / FOLDER / REST, weights_only=True)
    values = student.optimizer_state

    def read(kind: str, name: str, wanted: slice) -> Tensor:
        return reader.read(stored[f"{kind}/{name}"]).flatten()[wanted]

    values.load(read, steps=rest["steps"])
    shards: dict[str, dict[str, Tensor]] = {}
    for key in sorted(stored):
        kind, _, name = key.partition("/")
        if kind not in values.kinds:
            part = read(kind, name, values.part_of(name)).clone()
            shards.setdefault(kind, {})[name.removeprefix(LEARNER)] = part.to(ranks.device)
    strategy.load_shards(shards)
    batches.load_state_dict(rest["batches"])
    if len(rest["random"]) == ranks.world_size:
        set_random_state(rest["random"][ranks.rank])
