"""Products and row kernels on two streams: the same loss, and no access without an order."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import megakd_kernels as mk
from megakd_kernels import linear_chunks, ops
from megakd_kernels.chunking import ChunkPlan
from megakd_kernels.streams import OneLane, TwoLanes, lanes_on

DIVERGENCE = {"forward_kl": 1.0, "jsd": 0.5}


class Stream:
    """A stream that knows which launches of each stream it has waited for."""

    def __init__(self, name):
        self.name, self.seen = name, {"products": 0, "rows": 0}

    def record_event(self):
        return dict(self.seen)

    def wait_event(self, event):
        self.seen = {name: max(self.seen[name], event[name]) for name in self.seen}


class Races(TorchDispatchMode):
    """Lists accesses of two streams to one storage that nothing puts in order."""

    def __init__(self):
        super().__init__()
        self.streams = {name: Stream(name) for name in ("products", "rows")}
        self.now = self.streams["products"]
        self.accesses, self.found, self.launches = {}, [], {"products": 0, "rows": 0}

    @contextmanager
    def use(self, stream):
        before, self.now = self.now, stream
        yield
        self.now = before

    def lanes(self, *_):
        return TwoLanes(self.streams["products"], self.streams["rows"], self.use)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.is_view or "new_" in str(func) or "_like" in str(func):
            return out  # the values of the arguments are not read
        self.now.seen[self.now.name] += 1
        self.launches[self.now.name] += 1
        written = {
            key(leaf)
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.is_write
            for leaf in tensors(value)
        } | {key(leaf) for leaf in tensors((kwargs or {}).get("out"))}
        for storage in {key(leaf) for leaf in tensors((args, kwargs, out))}:
            self._access(func, storage, is_write=storage in written)
        return out

    def _access(self, func, storage, *, is_write):
        for name, (launch, wrote) in self.accesses.get(storage, {}).items():
            if name != self.now.name and (is_write or wrote) and self.now.seen[name] < launch:
                self.found.append((str(func), name, self.now.name))
        wrote = is_write or self.accesses.get(storage, {}).get(self.now.name, (0, False))[1]
        self.accesses.setdefault(storage, {})[self.now.name] = (
            self.now.seen[self.now.name], wrote,
        )  # fmt: skip


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


KEPT = []


def key(tensor):
    storage = tensor.untyped_storage()
    KEPT.append(storage)  # an address that is used again would look like an access
    return storage._cdata


def solve(dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(0)
    sizes = ((23, 16), (120, 16), (23, 24), (130, 24))
    tensors = [torch.randn(*size, generator=generator, dtype=dtype) for size in sizes]
    leaves = [tensors[0].requires_grad_(), tensors[1].requires_grad_()]
    labels = torch.randint(0, 120, (23,), generator=generator)
    output = mk.linear_kd_loss(
        *leaves, *tensors[2:], labels, t_squared=False, divergence=DIVERGENCE, ce_weight=1.0,
        impl="chunked", chunk_mb=0.008, **options,
    )  # fmt: skip
    return output, torch.autograd.grad(output.loss, leaves)


@pytest.fixture
def races(monkeypatch):
    monkeypatch.setattr(ops, "linear_kd", ops.linear_kd._init_fn)
    # As on a GPU: several chunks per product of the gradient, which is in another dtype.
    monkeypatch.setattr(ops, "_sizes", lambda *_: ChunkPlan(group=8, chunk=2, block=2))
    monkeypatch.setattr(linear_chunks, "gradient_dtype", lambda *_: torch.bfloat16)
    result = Races()
    monkeypatch.setattr(ops, "lanes_on", result.lanes)
    return result


def loss_under(races, *, with_ce=False, round_logits=False):
    with torch.no_grad(), races:
        generator = torch.Generator().manual_seed(0)
        heads = [torch.randn(*size, generator=generator) for size in ((23, 16), (120, 16)) * 2]
        needed, factor = [True, True, False], torch.ones(23)
        return ops.linear_kd(
            *heads[:2], None, *heads[2:], None, torch.ones(23, dtype=torch.bool), None, factor,
            factor, needed, "forward_kl,jsd", [1.0, 0.5],
            [0.5, 0.1, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0], 120, with_ce, 0, "", "chunked",
            round_logits, 0.008,
        )  # fmt: skip


@pytest.mark.parametrize("round_logits", [False, True])
def test_every_access_to_a_buffer_waits_for_the_other_stream(races, round_logits):
    loss_under(races, round_logits=round_logits)

    assert min(races.launches.values()) > 20
    assert races.found == []


@pytest.mark.parametrize("left_out", ["begin", "rows", "join"])
def test_the_check_finds_an_order_that_is_left_out(races, monkeypatch, left_out):
    class Careless(TwoLanes):
        def begin(self):
            if left_out != "begin":
                return super().begin()
            self.turn = 1 - self.turn
            return self.turn

        @contextmanager
        def rows(self):
            if left_out != "rows":
                with super().rows():
                    yield
                return
            with self._use(self._rows):
                yield
            self._done[self.turn] = self._rows.record_event()

        def join(self):
            if left_out != "join":
                super().join()

    careless = Careless(*races.streams.values(), races.use)
    monkeypatch.setattr(ops, "lanes_on", lambda *_: careless)

    loss_under(races)

    assert races.found


def test_two_streams_give_the_same_loss_and_gradients(monkeypatch):
    expected = solve()
    monkeypatch.setattr(
        ops, "lanes_on", lambda *_: TwoLanes(Stream("products"), Stream("rows"), Races().use)
    )

    output, gradients = solve()

    torch.testing.assert_close(output, expected[0])
    torch.testing.assert_close(gradients, expected[1])


def test_a_cpu_and_the_default_have_one_stream(monkeypatch):
    assert isinstance(lanes_on(torch.device("cuda"), "triton"), OneLane)
    monkeypatch.setenv("MEGAKD_ROW_STREAMS", "2")
    assert isinstance(lanes_on(torch.device("cpu"), "triton"), OneLane)
    assert isinstance(lanes_on(torch.device("cuda"), "chunked"), OneLane)
