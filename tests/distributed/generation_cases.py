"""Generation on gloo ranks: completions, and training with and without them."""

from __future__ import annotations

import random
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from cases import started

from megakd.contract.completions import Sampling, TextTokens
from megakd.engine import collectives, distributed
from megakd.engine.sharding import gathered_state, is_sharded
from megakd.engine.whole_model import whole_model
from megakd.errors import MegakdError
from megakd.models import generation
from megakd.rollouts.generators import LocalGenerator

PROMPTS = [[5, 6, 7], [8], [12, 3, 14, 5, 6], [9, 9], [60, 50, 40, 30]]
SAMPLING = Sampling(10)
ENDS = frozenset(range(20, 120))  # so many that completions end at different positions


def generated(engine: Any, prompts: list, numbers: Any, sampling: Sampling = SAMPLING) -> list:
    generator = LocalGenerator(engine, tokens=TextTokens(ENDS), rows_at_once=2)
    return generator.generate(prompts, [*numbers], sampling)


def joined(engine: Any, sampling: Sampling = SAMPLING) -> list:
    """The completions of all ranks, in the order of the prompts; some ranks may have none."""
    ranks = distributed.ranks()
    rows = range(ranks.rank, len(PROMPTS), ranks.world_size)
    said = generated(engine, [PROMPTS[row] for row in rows], rows, sampling)
    texts: dict = {}
    for part in collectives.gather(dict(zip(rows, said, strict=True))):
        texts |= part
    return [(texts[row].ids, texts[row].finished) for row in range(len(PROMPTS))]


def completions(config_path: str, overrides: list[str]) -> dict:
    """The completions of the student before training, of one prompt, of none, and the teacher's."""
    prompts = PROMPTS[:1] if distributed.ranks().is_main else []
    with started(config_path, overrides) as (run, teacher):
        return {
            "student": joined(run.student),
            "greedy": joined(run.student, Sampling(6, temperature=0)),
            "teacher": joined(teacher),
            "one": generated(run.student, prompts, range(len(prompts))),
            "none": generated(run.student, [], []),
        }


def training(config_path: str, overrides: list[str], calls_per_step: int) -> dict:
    """Two steps with `calls_per_step` generations before each; the weights, rank 0's."""
    changed: set[str] = set()
    said = []
    with started(config_path, overrides) as (run, teacher):
        for step in range(2):
            batches = run.source.step(step)
            run.student.predict(batches[0])  # leaves some weights gathered at ZeRO 3
            run.student.bundle.train()
            for _ in range(calls_per_step):
                before = state_of(run.student)
                said.append(joined(run.student))
                joined(teacher)
                after = state_of(run.student)
                changed |= {name for name in before if not same(before[name], after[name])}
            run.trainer.train_step(batches)
        weights = dict(gathered_state(run.student.bundle))
    return {"weights": weights, "changed": sorted(changed), "said": said}


def state_of(engine: Any) -> dict[str, Any]:
    """Return the state of this rank that generation could disturb."""
    module = engine.bundle
    parameters = [*module.parameters()]
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # noqa: NPY002
        "torch": torch.get_rng_state().tolist(),
        "modes": [part.training for part in module.modules()],
        "hooks": [
            [(kind, [*getattr(part, kind)]) for kind in vars(part) if kind.endswith("_hooks")]
            for part in module.modules()
        ],
        "status": [str(getattr(parameter, "ds_status", "")) for parameter in parameters],
        "local": [getattr(p, "ds_tensor", p).detach().clone() for p in parameters],
        "elements": [parameter.numel() for parameter in parameters],
        "requires_grad": [parameter.requires_grad for parameter in parameters],
        "gradients": [parameter.grad is not None for parameter in parameters],
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, list) and one and isinstance(one[0], torch.Tensor):
        return all(map(torch.equal, one, other))
    return one == other


def copy_facts(config_path: str, overrides: list[str]) -> dict:
    """Copies of a sharded model: how they are made and freed."""
    with started(config_path, overrides) as (run, _):
        student = run.student.student
        before = gathered_elements(student)
        with patch("megakd.engine.whole_model.GROUP_ELEMENTS", 1000), whole_model(student) as whole:
            facts = {
                "sharded": (is_sharded(student), is_sharded(whole)),
                "gathered": (before, gathered_elements(student)),
                "dtypes": {parameter.dtype for parameter in whole.parameters()},
                "tied": whole.get_input_embeddings().weight is whole.get_output_embeddings().weight,
                "whole": {name: p.detach().clone() for name, p in whole.named_parameters()},
            }
        facts["left"] = gathered_elements(whole)
        facts["state"] = dict(gathered_state(student))
    return facts


def gathered_elements(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def calls(config_path: str, overrides: list[str]) -> list[int]:
    """The numbers of forwards of the ranks, of which only rank 0 has a prompt."""
    counted = [0]
    real = generation.continued

    def counting(model: Any, *arguments: Any) -> Any:
        model.register_forward_pre_hook(lambda *_: counted.__setitem__(0, counted[0] + 1))
        return real(model, *arguments)

    prompts = PROMPTS[:1] if distributed.ranks().is_main else []
    with (
        started(config_path, overrides) as (run, _),
        patch.object(generation, "continued", counting),
    ):
        generated(run.student, prompts, [1] * len(prompts), Sampling(5, temperature=0))
    return collectives.gather(counted[0])


def refused(config_path: str, overrides: list[str]) -> str:
    """The error of every rank if the prompt of one rank is too long, and generation after it."""
    said = ""
    with started(config_path, overrides) as (run, _):
        try:
            generated(run.student, [[3] * (1000 if distributed.ranks().is_main else 1)], [0])
        except MegakdError as error:
            said = str(error)
        assert len(joined(run.student)) == len(PROMPTS)
    return said
