"""The gradient of a step is that of the step alone, at every ZeRO stage and in every precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from equal_runs import difference
from slow_cases import slow
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from megakd.config.deepspeed import load_ds_config
from megakd.config.sections import TrainConfig
from megakd.data.batch import Losses, Pass
from megakd.engine.initialize import training_engine
from megakd.engine.optimizer_state import WEIGHT
from megakd.engine.sharding import gathered, sharded_construction, writes_here
from megakd.process.seals import write_files
from megakd.training.student import StudentEngine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RATE, EPSILON, WIDTH, CLIP = 0.01, 1e-4, 6, 0.0


class Rows(NamedTuple):
    """Rows of one rank, and the names of the matrices that their loss reads."""

    labels: Tensor
    names: str


class Matrices(nn.Module):
    """Matrices by name; the losses of the named ones are added up."""

    def __init__(self, names: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrices = nn.ModuleDict({name: nn.Linear(WIDTH, 3, dtype=dtype) for name in names})
        for number, linear in enumerate(self.matrices.values()):
            _fill(linear, number)

    def forward(self, batch: Rows, knowledge=None, plan=None, counts=None) -> Losses:
        """Return the sum of the squared outputs of the named matrices."""
        self.linear = functional.linear
        dtype = next(self.parameters()).dtype
        outputs = [self.matrices[name](batch.labels.to(dtype)).float() for name in batch.names]
        return Losses(torch.stack([output.square().mean() for output in outputs]).sum(), {})


def _fill(linear: nn.Linear, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in linear.parameters():
        with gathered([parameter], modify=True), torch.no_grad():
            if writes_here(parameter):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)


def rows(step: int, backward: int, rank: int, names: str, factor: float = 1.0) -> Rows:
    generator = torch.Generator().manual_seed(1000 * step + 10 * backward + rank)
    return Rows(factor * 0.3 * torch.randn(4, WIDTH, generator=generator), names)


def train(
    preset,
    dtype: str,
    steps: list[list[str]],
    factors: dict[int, float],
    before: str | None = None,
    after: str | None = None,
) -> dict:
    """Take steps, each a list of backwards that name matrices; return what is seen of them.

    factors: factor of the inputs by step; with 1000, gradients overflow in fp16.
    before, after: folders of the state that is read first and written last.
    """
    ds = load_ds_config(preset, where="student.deepspeed")
    settings = TrainConfig(learning_rate=RATE, adam_epsilon=EPSILON, max_grad_norm=CLIP)
    with _any_precision():
        with sharded_construction(ds, DTYPES[dtype]):
            model = Matrices("abc", DTYPES[dtype])
        engine = training_engine(model, ds=ds, train=settings, dtype=dtype)
        student = StudentEngine(engine)
        if before is not None:
            student.load(Path(before))
        facts: dict = {"weights": [_masters(student)], "norms": [], "scaling": [student.scaling()]}
        for step, backwards in enumerate(steps):
            if not backwards:  # taken before the run went on
                continue
            for number, names in enumerate(backwards):
                batch = rows(step, number, dist.get_rank(), names, factors.get(step, 1.0))
                boundary = number == len(backwards) - 1
                student.forward_backward(batch, {}, [Pass()], {}, boundary=boundary)
            facts["norms"].append(float(student.step(RATE)))
            facts["weights"].append(_masters(student))
        facts["scaling"].append(student.scaling())
        facts["linear"] = [getattr(model, "linear", functional.linear) is zero3_linear_wrap]
        facts["linear"].append(functional.linear is zero3_linear_wrap)
        if after is not None:
            write_files(Path(after), student.files())
        student.destroy()
    return facts


def overlap(*given) -> dict:
    """Train as `train` with what megakd refuses."""
    refused = {"zero_optimization": {"stage": 1, "overlap_comm": True}}
    with patch(f"{__name__}.load_ds_config", lambda *_, **__: refused):
        return train(*given)


class Waits(TorchDispatchMode):
    """Counts values of a device that become numbers of Python."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))

    def counted(self, method):
        def run(*args, **keys):
            with self:
                return method(*args, **keys)

        return run


def clipped(stage: int, *given, clip: float, on_device: bool = True) -> dict:
    """Train as `train` with clipping, by megakd or by DeepSpeed's step, and count the waits."""
    ds = {"megakd": {"clip_on_device": on_device}, "zero_optimization": {"stage": stage}}
    waits, counted = Waits(), ("forward_backward", "step")
    methods = {name: waits.counted(getattr(StudentEngine, name)) for name in counted}
    with patch.multiple(StudentEngine, **methods), patch(f"{__name__}.CLIP", clip):
        return {**train(ds, *given), "waits": waits.count}


@contextmanager
def _any_precision() -> Iterator[None]:
    """Let DeepSpeed use fp16, which it refuses on CPUs without instructions for it."""
    accelerator, known = get_accelerator(), [*DTYPES.values()]
    with (
        patch.object(accelerator, "is_fp16_supported", lambda: True),
        patch.object(accelerator, "supported_dtypes", lambda: known),
    ):
        yield


def _masters(student: StudentEngine) -> dict[str, Tensor]:
    """Return the fp32 weights by name, on rank 0."""
    values = student.optimizer_state.whole()
    return {name: value.clone() for kind, name, value in values if kind == WEIGHT}


RANKS = 2
# A backward reaches the matrices among a, b and c that it names. One of them is missed by a whole
# step, by the first backward of a step, by the last one, and by the only one.
WHOLE = ["abc", "abc"]
STEPS = [WHOLE, ["ab", "ab"], WHOLE, ["ab", "abc"], WHOLE, ["abc", "ab"], WHOLE]
STEPS += [["abc"], ["ab"], ["c"], ["abc"]]
SHARDED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
OFFLOADED = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
# The first use of DeepSpeed's CPU Adam compiles it, which takes a minute.
SLOW = ["zero1", "zero2", "zero3", OFFLOADED, "zero2_offload", "zero3_offload"]
PRESETS = ["zero0", SHARDED, *slow(*SLOW)]


def plain(steps, skipped=()) -> dict:
    """Run the steps in one process and plain PyTorch, on the rows of all ranks."""
    model = Matrices("abc", torch.float32)
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(named.values(), lr=RATE, eps=EPSILON, weight_decay=0.0)
    weights, norms = [{n: p.detach().clone() for n, p in named.items()}], []
    for step, backwards in enumerate(steps):
        # A weight that a step does not reach has a gradient of 0, not none.
        for parameter in named.values():
            parameter.grad = torch.zeros_like(parameter)
        for number, names in enumerate(backwards):
            for rank in range(RANKS):
                (model(rows(step, number, rank, names)).total / RANKS).backward()
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in named.values()])))
        if step not in skipped:
            optimizer.step()
        weights.append({n: p.detach().clone() for n, p in named.items()})
    return {"weights": weights, "norms": norms}


@pytest.fixture
def learn(workers):
    def learned(
        preset, dtype, steps, factors=None, *folders, case="train", ranks=RANKS, **options
    ) -> dict:
        given = (preset, dtype, steps, factors or {}, *folders)
        return workers(ranks).run(f"test_gradients.{case}", *given, timeout_s=400, **options)[0]

    return learned


@pytest.mark.parametrize("preset", PRESETS, ids=str)
def test_a_weight_that_is_missed_gets_no_gradient_of_another_step(learn, preset):
    actual = learn(preset, "fp32", STEPS)

    expected = plain(STEPS)
    for mine, other in zip(actual["weights"], expected["weights"], strict=True):
        assert difference(mine, other) <= 1e-6
    assert actual["norms"] == pytest.approx(expected["norms"], rel=1e-4)


# The reason to refuse `overlap_comm` at stage 1: once this fails, the refusal can go.
def test_deepspeed_loses_gradients_of_missed_weights_where_zero_1_overlaps(learn):
    actual = learn("zero1", "fp32", [["abc", "ab"]], case="overlap")

    wanted = plain([["abc", "ab"]])
    assert difference(actual["weights"][-1], wanted["weights"][-1]) > 1e-4


def moved(result, first) -> torch.Tensor:
    """All changes of the weights in one vector."""
    return torch.cat([(result[name] - first[name]).flatten() for name in sorted(first)])


def assert_moved_alike(actual, expected) -> None:
    """The changes are equal to the rounding of 16 bits."""
    for mine, other in zip(actual["weights"][1:], expected["weights"][1:], strict=True):
        change = moved(other, expected["weights"][0])
        assert (moved(mine, actual["weights"][0]) - change).norm() <= 0.05 * change.norm()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("preset", PRESETS, ids=str)
def test_updates_in_16_bits_are_as_large_as_in_32(learn, preset, dtype):
    """The first, whose bias Adam corrects most, and one of two backwards."""
    steps = [["abc"], ["abc"], ["abc", "abc"], ["ab"]]

    actual = learn(preset, dtype, steps)

    expected = plain(steps)
    assert_moved_alike(actual, expected)
    assert actual["norms"] == pytest.approx(expected["norms"], rel=0.02)


@pytest.mark.parametrize("preset", PRESETS, ids=str)
def test_only_the_step_that_overflows_is_skipped(learn, preset):
    steps = [["abc", "abc"]] * 4

    result = learn(preset, "fp16", steps, {1: 1000.0})

    assert_moved_alike(result, plain(steps, skipped={1}))
    assert result["norms"][1] == float("inf")


@pytest.mark.parametrize("preset", [*slow("zero1"), "zero3"])
def test_gradients_that_overflow_at_every_scale_end_with_a_remedy(learn, preset):
    """DeepSpeed gives up at ZeRO 1 to 3; at ZeRO 0 the meter does."""
    with pytest.raises(Exception, match=r"fp16 cannot hold it .* use train\.bf16 or fp32"):
        learn(preset, "fp16", [["abc"]] * 40, dict.fromkeys(range(40), 30000.0))


@pytest.mark.parametrize(("preset", "is_used"), [("zero3", True), ("zero2", False)])
def test_deepspeeds_linear_computes_the_steps_at_zero_3_and_nothing_else(learn, preset, is_used):
    assert learn(preset, "fp32", [["abc"]])["linear"] == [is_used, False]


@pytest.mark.parametrize(("preset", "other"), [*slow(("zero2", "zero3")), ("zero0", "zero1")])
def test_the_scale_of_fp16_goes_on_at_another_stage_with_other_ranks(
    learn, tmp_path, preset, other
):
    folder = str(tmp_path / "state")

    result = learn(preset, "fp16", [["abc"]] * 2, {1: 1000.0}, None, folder)
    later = learn(other, "fp16", [], {}, folder, ranks=1)

    first, last = result["scaling"]
    assert later["scaling"][0] == last
    assert last["train/loss_scale"] < first["train/loss_scale"] or preset != "zero0"
    assert last["train/skipped_steps"] == 1


@pytest.mark.parametrize("preset", PRESETS, ids=str)
def test_a_gradient_that_is_not_finite_shows_in_the_norm_of_its_step(learn, preset):
    result = learn(preset, "fp32", [["abc", "abc"]] * 2, {1: float("inf")})

    first, second = result["norms"]
    assert 0 < first < float("inf")
    assert not 0 <= second < float("inf")


# Gradients of 0.4 to 60, of which one is not finite: clipped, not clipped, or skipped.
CLIPPED = [["abc", "abc"], ["ab"], ["abc"], ["abc"], ["abc", "c"]]
FACTORS = {1: 5.0, 2: float("inf"), 3: 30.0}


@pytest.mark.parametrize(
    ("stage", "clip", "ranks"), [(2, 0.3, 2), (1, 0.3, 2), *slow((2, 0.0, 2), (2, 0.3, 1))]
)
def test_a_step_that_clips_on_the_device_waits_for_no_number_and_is_that_of_deepspeed(
    learn, stage, clip, ranks
):
    settings = {"case": "clipped", "clip": clip, "ranks": ranks}
    ours = learn(stage, "bf16", CLIPPED, FACTORS, **settings)
    theirs = learn(stage, "bf16", CLIPPED, FACTORS, **settings, on_device=False)

    assert (ours["waits"], theirs["waits"] > 0) == (0, True)
    for mine, other in zip(ours["weights"], theirs["weights"], strict=True):
        assert difference(mine, other) <= 1e-6
    assert difference(*ours["weights"][2:4]) == 0 < difference(*ours["weights"][1:3])
    finite = [0, 1, 3, 4]
    norms = [ours["norms"][step] for step in finite]
    assert norms == pytest.approx([theirs["norms"][step] for step in finite], rel=1e-5)
    assert min(norms) < max(clip, 1) < max(norms)
    assert not 0 <= ours["norms"][2] < float("inf")


def test_a_run_goes_on_behind_a_skipped_step_as_if_it_had_not_ended(learn, tmp_path):
    folder, settings = str(tmp_path / "state"), {"case": "clipped", "clip": 0.3}
    whole = learn(2, "bf16", CLIPPED[:4], FACTORS, **settings)

    learn(2, "bf16", CLIPPED[:3], FACTORS, None, folder, **settings)
    later = learn(2, "bf16", [[], [], [], CLIPPED[3]], FACTORS, folder, **settings)

    first, last = later["weights"]
    assert difference(first, whole["weights"][3]) == 0
    assert difference(last, whole["weights"][4]) == 0 < difference(last, first)
