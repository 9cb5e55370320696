"""Stages without training: sorted and cut models, the importance of layers, times of shapes.

Each is made once; every function is a collective.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedModel

from megakd.data.arrow import recalled, remember, rows_key
from megakd.data.loader import lengths_of_rows
from megakd.engine.collectives import activity, broadcast, gather, on_main, progress
from megakd.engine.memory import forget_models, peak_memory_bytes, reset_peak_memory
from megakd.errors import ModelError, TeacherError
from megakd.models.cutting import cut_config, reshape_folder
from megakd.models.fitting import ModelSource, ReadyTeacher, build_empty
from megakd.models.layers import check_depth, left_out
from megakd.models.timing import batches_of, by_turns, calls_of, sample_lengths
from megakd.models.views import View
from megakd.process.record import RESULT
from megakd.stage import StageResult
from megakd.teachers.frozen import FrozenTeacher
from megakd.training.allocation import BATCH_ROWS, UnitScores, unit_order
from megakd.training.assembly import Assembly
from megakd.training.evaluation import few, scorer_for
from megakd.training.importance import measure_importance
from megakd.training.precision import TORCH_DTYPE, scoring_dtype
from megakd.training.served_teachers import model_identity
from megakd.training.stage_folder import cached_metrics, result_text, stage_once

logger = logging.getLogger(__name__)

FEW_ROWS = 16
"""Fewest held-out rows that rank layers without a warning."""

UNITS = "units.json"


def sort_units(assembly: Assembly, ready: ReadyTeacher) -> tuple[StageResult, UnitScores]:
    """Write a model with the units of each layer in the order of their importance."""

    def order() -> dict[str, Any]:
        rows = assembly.prepared.encoded.validation
        scores = measure_importance(assembly, ready, rows, batch_size=BATCH_ROWS)
        return {"order": unit_order(scores), "extra": {UNITS: json.dumps(scores._asdict())}}

    result = write_reshaped(assembly, "sorted-teacher", ready.source, order)
    # The folder's checksums were compared.
    tree = json.loads(on_main(lambda: (result.folder / UNITS).read_text(encoding="utf-8")))
    heads, neurons = (tuple(map(tuple, tree[kind])) for kind in UnitScores._fields)
    meaning = "the teacher with the heads and neurons of every layer in the order of importance"
    return replace(result, meaning=meaning), UnitScores(heads, neurons)


def score_layers(assembly: Assembly, ready: ReadyTeacher) -> tuple[StageResult, tuple[float, ...]]:
    """Measure the importance of each layer of a model."""
    rows = few(assembly.prepared.encoded.validation, assembly.config.task.type)

    def measure() -> Mapping[str, float]:
        scores = rises_without_layers(assembly, ready, rows)
        return {f"layer_{number}": score for number, score in enumerate(scores, start=1)}

    result = cached_metrics(assembly.stage_folder("layers"), measure)
    layers = range(1, len(result.metrics) + 1)
    scores = [result.metrics[f"layer_{number}"] for number in layers]
    try:
        check_depth(ready.source, layers[1:] or layers, where="student.layers")
    except ModelError:  # the first layer of ModernBERT has no norm, and must stay the first
        scores[0] = math.inf
    meaning = "how much the loss of the teacher rises without each of its layers"
    return replace(result, meaning=meaning), tuple(scores)


@activity("measuring the importance of layers")
def rises_without_layers(
    assembly: Assembly, ready: ReadyTeacher, rows: Dataset
) -> tuple[float, ...]:
    """Return the rise of the loss without each layer, in nats per target; a collective.

    Each layer is left out alone, from the whole model, as in Shortened LLaMA (Kim et al. 2024,
    https://arxiv.org/abs/2402.02834, section 3.2, criterion PPL, which ranks layers in the same
    order). A loss is measured once for a model, rows and ranks: a stopped measurement goes on, and
    another size of the student needs none.
    """
    config, ranks, scorer = assembly.config, assembly.ranks, scorer_for(assembly)
    source, place, dtype = ready.source, ready.spec.deepspeed, assembly.teacher_dtype(ready)
    of_model = on_main(lambda: model_identity(source, seed=config.seed))
    of_rows = (on_main(lambda: rows_key(rows)), scorer.batch_size, repr(scorer.masking))
    parts = ("loss", config.task.type, of_model, dtype, of_rows)
    parts += (ranks.world_size, ranks.device.type, str(place))
    if len(rows) < FEW_ROWS:
        logger.warning(
            "layers are ranked on %d held-out rows, of which chance decides; add rows of "
            "validation, at least %d",
            *(len(rows), FEW_ROWS),
        )
    losses: list[float] = []
    count = source.architecture.number_of_layers(source.config) + 1
    with ExitStack() as opened:
        model: FrozenTeacher | None = None
        for layer in progress(range(count), total=count, unit="passes, the first with all layers"):
            loss = on_main(partial(recalled, *parts, layer))
            if loss is None:
                model = model or opened.enter_context(assembly.loaded(ready))
                with left_out(model.model, layer) if layer else nullcontext():
                    loss = scorer.loss(model.predict, rows)
                on_main(partial(remember, loss, *parts, layer))
            losses.append(loss)
    bad = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad:
        where = f"without layer {bad[0]}" if bad[0] else "with all layers"
        raise TeacherError(
            f"the loss of the teacher on the held-out rows {where} is {losses[bad[0]]}, so that "
            "layers cannot be ranked; set teacher.dtype to fp32, or use another teacher"
        )
    # Processors may round differently, but the order of layers must be equal on all ranks.
    scores = broadcast(tuple(loss - losses[0] for loss in losses[1:]))
    text = "layers: the loss on %d held-out rows is %.3f; without layer 1, 2, … it rises by %s"
    logger.info(text, len(rows), losses[0], " ".join(f"{score:.3f}" for score in scores))
    return scores


def time_views(
    assembly: Assembly, source: ModelSource, views: Mapping[str, View], name: str
) -> StageResult:
    """Measure the median ratios of paired forwards of each view and the whole model."""
    task = assembly.config.task
    dtype = TORCH_DTYPE[scoring_dtype(assembly.config.train, assembly.ranks.device.type)]
    rows, batch = assembly.prepared.encoded.validation, batches_of(task.type)[-1]
    texts = sample_lengths(lengths_of_rows(rows).tolist(), batch)
    build = partial(_random_model, assembly, source, dtype)

    def ratios() -> Mapping[str, float]:
        whole, times = calls_of(build(source.config), texts), dict[str, float]()
        for known, view in views.items():  # two models are in memory at a time
            rounds = by_turns([calls_of(build(cut_config(source.config, view)), texts), whole])
            times[known] = statistics.median(cut / other for cut, other in rounds)
            logger.info("%s: %.1f times as fast as the whole model", known, 1 / times[known])
        return times

    with activity("timing shapes"):
        result = cached_metrics(assembly.stage_folder(name), lambda: on_main(ratios))
    return replace(result, meaning="the time of a forward of shapes that the student may have")


def keeps_all(source: ModelSource, view: View) -> bool:
    """Return whether a view leaves out nothing of a model."""
    whole, every = source.whole, tuple(range(1, source.depth + 1))
    if not view.heads and view.layers == every and view.experts is None:
        return True
    return view._replace(width=view.width or whole.width) == whole


def write_reshaped(
    assembly: Assembly, name: str, source: ModelSource, change: Callable[[], Mapping[str, Any]]
) -> StageResult:
    """Write a changed model once; `change` is a collective, see `reshape_folder`."""
    config, prepared, device = assembly.config, assembly.prepared, assembly.ranks.device

    def make(folder: Path) -> None:
        began = time.perf_counter()
        reset_peak_memory(device)
        options = dict(change())
        others = max(gather(peak_memory_bytes(device)))

        def text() -> str:  # of result.json, once the weights are written
            result = StageResult(
                name=name,
                folder=folder,
                seconds=time.perf_counter() - began,
                peak_memory_bytes=max(others, peak_memory_bytes(device)),
            )
            return result_text(result, {})

        forget_models()
        options["extra"] = {**options.get("extra", {}), RESULT: text}
        on_main(
            lambda: reshape_folder(
                source,
                folder,
                task=config.task,
                label_names=prepared.splits.label_names,
                tokenizer=prepared.tokenizer,
                **options,
            )
        )

    return stage_once(assembly.stage_folder(name), make)


def _random_model(
    assembly: Assembly, source: ModelSource, dtype: torch.dtype, config: PretrainedConfig
) -> PreTrainedModel:
    device = assembly.ranks.device
    model = build_empty(source, assembly.config.task, config, dtype).eval()
    torch.nn.Module.to(model, device)  # transformers' own `to` is typed wrongly
    generator = torch.Generator(device).manual_seed(0)  # not the run's random state
    for parameter in model.parameters():
        parameter.data.uniform_(-0.05, 0.05, generator=generator)
    return model
