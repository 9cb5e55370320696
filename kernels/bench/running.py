"""Runs the cases: every implementation of each, twice in turn, then its memory and its errors."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from bench import machine
from bench.accuracy import NO_ERRORS, Errors, Truth
from bench.cases import ACCEPTANCE, Case, Device
from bench.catalogue import Implementation, computes, find, reason_to_skip
from bench.memory import Peak, peak_in_own_process, peak_on_cuda
from bench.peers import load
from bench.problem import Loss, Problem, drop_gradients, make_problem, run
from bench.results import FAILED, SKIPPED, Ledger
from bench.timing import Effort, sample_ms, summarise

_ROUNDS = 2
NOTHING_TO_CHECK = ("gemms",)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Options of a run; with --quick, nothing starts after `deadline`, in time.monotonic."""

    device: torch.device
    effort: Effort
    deadline: float | None = None

    @property
    def kind(self) -> Device:
        """Name of the table of cases."""
        return "cuda" if self.device.type == "cuda" else "cpu"

    def reason_to_hurry(self, case: Case, implementation: Implementation) -> str | None:
        """Cases that --quick leaves out."""
        if self.deadline is None:
            return None
        if self.kind == "cpu" and implementation.compiles and case.name != ACCEPTANCE:
            return "--quick compiles one case alone on a CPU"
        return "the time of --quick was up" if time.monotonic() > self.deadline else None


class CaseRun:
    """One case: who still takes part, and what is known of them."""

    def __init__(self, case: Case, plan: Plan, ledger: Ledger) -> None:
        self.case = case
        self._plan = plan
        self._ledger = ledger
        self._losses: dict[str, Loss] = {}
        self._errors: dict[str, Errors] = {}
        self._rounds: dict[str, list[tuple[float, ...]]] = {}
        self._clocks: dict[str, float | None] = {}

    def measure(self, implementations: Iterable[Implementation]) -> None:
        """Adds a row to the ledger for each implementation that knows the loss."""
        known = [each for each in implementations if computes(each, self.case)]
        able = [each.name for each in known if self._is_able(each)]
        if not able:
            return
        try:
            problem = make_problem(self.case, self._plan.device)
            truth = None if self.case.kind in NOTHING_TO_CHECK else Truth(problem)
        except torch.OutOfMemoryError:
            for name in able:
                self._ledger.add_missing(self.case, name, SKIPPED, "its inputs do not fit")
            return
        for name in able:
            self._try(name, partial(self._check, name, problem, truth))
        # Its fp64 gradients would take the memory of eager losses.
        del truth
        for _ in range(_ROUNDS):
            for name in list(self._losses):
                self._try(name, partial(self._time, name, problem))
        for name in list(self._losses):
            self._try(name, partial(self._finish, name, problem))

    def _is_able(self, implementation: Implementation) -> bool:
        reason = reason_to_skip(implementation, self.case, self._plan.kind)
        if reason is None:
            reason = self._plan.reason_to_hurry(self.case, implementation)
        if reason is not None:
            self._ledger.add_missing(self.case, implementation.name, SKIPPED, reason)
        return reason is None

    def _check(self, name: str, problem: Problem, truth: Truth | None) -> None:
        """Runs it for the first time, which also compiles and warms up."""
        loss = load(name, self.case)
        if truth is None:
            run(loss, problem)
            self._errors[name] = NO_ERRORS
        else:
            self._errors[name] = truth.errors(loss, whole_only=find(name).compiles)
        self._losses[name] = loss
        self._rounds[name] = []

    def _time(self, name: str, problem: Problem) -> None:
        drop = partial(drop_gradients, problem)
        step = partial(run, self._losses[name], problem)
        self._free()
        times = sample_ms(
            step,
            self._plan.device,
            self._plan.effort,
            before=drop,
            during=partial(self._read_clock, name),
        )
        drop()
        self._rounds[name].append(times)

    def _read_clock(self, name: str) -> None:
        self._clocks[name] = machine.clock_mhz(self._plan.device)

    def _finish(self, name: str, problem: Problem) -> None:
        """Memory comes last: it needs the allocator, or a process, to itself."""
        errors = {f"{of}_relerr": error for of, error in self._errors[name]._asdict().items()}
        times, peak = summarise(self._rounds[name]), self._peak(name, problem)
        self._ledger.add(self.case, name, times, peak=peak, clock=self._clocks.get(name), **errors)

    def _peak(self, name: str, problem: Problem) -> Peak:
        if self._plan.kind == "cpu":
            return peak_in_own_process(self.case, name)
        drop_gradients(problem)
        peak = peak_on_cuda(partial(run, self._losses[name], problem), self._plan.device)
        drop_gradients(problem)
        return peak

    def _try(self, name: str, step: Callable[[], None]) -> None:
        """One implementation that fails must not keep the others from being measured."""
        try:
            step()
        except ImportError as error:
            self._drop(name, SKIPPED, error)
        except Exception as error:  # noqa: BLE001, whatever a peer raises goes into its row
            self._drop(name, FAILED, error)

    def _drop(self, name: str, status: str, error: Exception) -> None:
        self._losses.pop(name, None)
        words = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {words[0]}"
        self._ledger.add_missing(self.case, name, status, reason)
        self._free()

    def _free(self) -> None:
        gc.collect()
        if self._plan.kind == "cuda":
            torch.cuda.empty_cache()


def run_cases(
    cases: Iterable[Case],
    implementations: tuple[Implementation, ...],
    plan: Plan,
    ledger: Ledger,
    *,
    announce: Callable[[str], None],
) -> None:
    """All cases in order; compiled code of one case is forgotten before the next."""
    for case in cases:
        announce(case.name)
        CaseRun(case, plan, ledger).measure(implementations)
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
