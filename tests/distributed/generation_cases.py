"""What the gloo ranks run of generation: completions, and training with and without them."""

from __future__ import annotations

import random
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from engine_cases import _started

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


def generator_of(engine: Any) -> LocalGenerator:
    return LocalGenerator(engine, tokens=TextTokens(ENDS), rows_at_once=2)


def mine(prompts: list) -> range:
    """The numbers of this rank's prompts; some ranks may have none."""
    ranks = distributed.ranks()
    return range(ranks.rank, len(prompts), ranks.world_size)


def joined(engine: Any, sampling: Sampling = SAMPLING) -> list:
    """The completions of all ranks, in the order of the prompts."""
    rows = mine(PROMPTS)
    said = generator_of(engine).generate([PROMPTS[row] for row in rows], [*rows], sampling)
    found = {
        k: v
        for part in collectives.gather(dict(zip(rows, said, strict=True)))
        for k, v in part.items()
    }
    return [(found[row].ids, found[row].finished) for row in range(len(PROMPTS))]


def completions(config_path: str, overrides: list[str]) -> dict:
    """The completions of the student before training, of one prompt, of none, and the teacher's."""
    run, teacher = _started(config_path, overrides)
    answer = {
        "student": joined(run.student),
        "greedy": joined(run.student, Sampling(6, temperature=0)),
        "teacher": joined(teacher),
    }
    is_main = distributed.ranks().is_main
    prompts = PROMPTS[:1] if is_main else []
    answer["one"] = generator_of(run.student).generate(prompts, [0] * len(prompts), SAMPLING)
    answer["none"] = generator_of(run.student).generate([], [], SAMPLING)
    run.close()
    teacher.destroy()
    return answer


def training(config_path: str, overrides: list[str], calls_per_step: int) -> dict:
    """Two steps with `calls_per_step` generations before each; the weights, rank 0's."""
    run, teacher = _started(config_path, overrides)
    changed: set[str] = set()
    said = []
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
    run.close()
    teacher.destroy()
    return {"weights": weights, "changed": sorted(changed), "said": said}


def state_of(engine: Any) -> dict[str, Any]:
    """What generation could disturb, as this rank has it."""
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
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def copy_facts(config_path: str, overrides: list[str]) -> dict:
    """How the copy of a sharded model is made, and what is left of it."""
    run, teacher = _started(config_path, overrides)
    student = run.student.student
    open_before = opened(student)
    with patch("megakd.engine.whole_model.GROUP_ELEMENTS", 1000), whole_model(student) as whole:
        facts = {
            "sharded": (is_sharded(student), is_sharded(whole)),
            "open": (open_before, opened(student)),
            "dtypes": {parameter.dtype for parameter in whole.parameters()},
            "tied": whole.get_input_embeddings().weight is whole.get_output_embeddings().weight,
            "whole": {name: p.detach().clone() for name, p in whole.named_parameters()},
        }
    facts["left"] = sum(parameter.numel() for parameter in whole.parameters())
    facts["state"] = dict(gathered_state(student))
    run.close()
    teacher.destroy()
    return facts


def opened(module: torch.nn.Module) -> int:
    """Elements that are gathered at the moment."""
    return sum(parameter.numel() for parameter in module.parameters())


def calls(config_path: str, overrides: list[str]) -> list[int]:
    """The numbers of forwards of the ranks, of which only rank 0 has a prompt."""
    run, teacher = _started(config_path, overrides)
    counted = [0]
    real = generation.continued

    def counting(model: Any, *arguments: Any) -> Any:
        model.register_forward_pre_hook(lambda *_: counted.__setitem__(0, counted[0] + 1))
        return real(model, *arguments)

    prompts = PROMPTS[:1] if distributed.ranks().is_main else []
    with patch.object(generation, "continued", counting):
        generator_of(run.student).generate(prompts, [1] * len(prompts), Sampling(5, temperature=0))
    run.close()
    teacher.destroy()
    return collectives.gather(counted[0])


def refused(config_path: str, overrides: list[str]) -> str:
    """The error of every rank if the prompt of one rank is too long, and generation after it."""
    run, teacher = _started(config_path, overrides)
    long = [[3] * 1000] if distributed.ranks().is_main else [[3]]
    try:
        generator_of(run.student).generate(long, [0], SAMPLING)
        said = ""
    except MegakdError as error:
        said = str(error)
    assert len(joined(run.student)) == len(PROMPTS)
    run.close()
    teacher.destroy()
    return said
