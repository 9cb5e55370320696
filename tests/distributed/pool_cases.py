"""Runs with several teachers on gloo ranks."""

from __future__ import annotations

from unittest import mock

import torch
from cases import lab_of, local
from safetensors.torch import load_file

from megakd.engine import sharding
from megakd.engine.sharding import Prefetch
from megakd.methods import run_method
from megakd.teachers.cached import CachedTeacher


class Watched:
    """A teacher that notes its name whenever it is asked."""

    def __init__(self, name: str, teacher, asked: list[str]) -> None:
        self.name, self.teacher, self.asked = name, teacher, asked

    def __call__(self, batch):
        self.asked.append(self.name)
        return self.teacher(batch)

    def __getattr__(self, name: str):
        return getattr(self.teacher, name)

    def answers(self, batches):
        return map(self, batches)


def learn(config_path: str, overrides: list[str]) -> dict:
    """Runs the method: who was asked in which order, what each teacher held, and the student."""
    asked: list[str] = []
    held: dict[str, int] = {}
    with lab_of(config_path, overrides) as lab:
        frozen = lab.pool.open

        def watched(name, stage):
            teacher = frozen(name, stage)
            if not isinstance(teacher, CachedTeacher):
                held[name] = sum(local(weight).numel() for weight in teacher.model.parameters())
            return Watched(name, teacher, asked)

        lab.pool.open = watched
        result = run_method(lab.config.method, lab)
    weights = load_file(result.folder / "model.safetensors")
    return {"asked": asked, "held": held, "weights": weights, "record": lab.record.pool}


def cache(config_path: str, overrides: list[str]) -> list[str]:
    """Makes the caches of a config's teachers: what rank 0 wrote, and how each is listed."""
    with lab_of(config_path, overrides) as lab:
        folders = [lab.cache(lab.teacher(name)) for name in lab.config.teacher_specs]
    return [str(file) for folder in folders for file in sorted(folder.glob("*/*.npy"))]


class Emptied(Prefetch):
    """Tensors on the host are invalid while their copies are on the device."""

    started = 0

    def start(self) -> None:
        if not self._host:
            super().start()
            Emptied.started += 1
            self.kept = [host.clone() for host in self._host]
            for host in self._host:
                host.fill_(torch.nan)

    def drop(self) -> None:
        if self._host:
            for host, kept in zip(self._host, self.kept, strict=True):
                host.copy_(kept)
        super().drop()


def learn_ahead(config_path: str, overrides: list[str]) -> dict:
    """`learn`, as if the device were another place than the host's memory."""
    Emptied.started = 0
    away = mock.patch.object(sharding, "is_away", return_value=True)
    emptied = mock.patch("megakd.teachers.frozen.Prefetch", Emptied)
    with away, emptied:
        return learn(config_path, overrides) | {"fetched": Emptied.started}
