"""Experts of a mixture that can go: found by shape, and decided by a small copy of the model.

Two models without values, of which one has fewer experts, tell by their shapes which weights have a
row for each expert: routers, their biases and the experts themselves. A small copy decides. Its
routers are changed so that they choose some of the experts only; without the other experts, and
with these in another order, it must compute what it computed before.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from megakd.config.task import TaskType
from megakd.errors import ModelError
from megakd.models.architectures import Architecture, Known, narrow_maps, stated
from megakd.models.proposed_units import cut_part
from megakd.models.small_copy import without_values
from megakd.models.structure import architecture_of
from megakd.models.units import in_copy, in_double, is_same, outputs_of
from megakd.models.views import Axes, Axis, Cut, UnitOrder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

COUNTS = (
    *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    *("num_routed_experts", "num_moe_experts"),
)
"""Config keys of the number of experts, as the families name them."""
GROUPS, CHOSEN_GROUPS = "n_group", "topk_group"
"""Config keys of groups of experts, one after the other, of which a router first chooses some."""
DENSE = "it is a dense model"
NEVER = 60.0
"""A router's score is minus this for an expert that it is never to choose."""


class FoundExperts(NamedTuple):
    """The experts that a mixture can lose, as many in each of its layers.

    total: experts of a layer; 0: the model is dense.
    chosen: experts that a token is routed to.
    groups: a layer keeps a multiple of this number.
    least: fewest experts of a layer.
    key: of the config, which states the total.
    axes: of the weights with rows of experts, by name on the model.
    blocks: by the number of its layer, from 0, the path of the module with the experts.
    why_fixed: reason why no experts can go; None: some can.
    """

    total: int = 0
    chosen: int = 0
    groups: int = 1
    least: int = 0
    key: str = ""
    axes: Mapping[str, Axes] = {}
    blocks: Mapping[int, str] = {}
    why_fixed: str | None = DENSE

    @property
    def why_kept(self) -> str | None:
        """Why a mixture keeps all its experts; None: some can go, or the model is dense."""
        return None if self.why_fixed == DENSE else self.why_fixed

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of experts that a layer can keep, in rising order."""
        return tuple(range(self.least, self.total + 1, self.groups))

    def order(self, scores: Mapping[int, Sequence[float]], count: int) -> UnitOrder:
        """Return the order by which layers keep the experts with the highest scores.

        Each group keeps as many, and its experts stay beside each other.

        Args:
            scores: of the experts of a layer, by its number from 0.
        """
        size, kept = self.total // self.groups, count // self.groups
        layers = dict[int, tuple[int, ...]]()
        for number, of_layer in scores.items():
            stay = list[int]()
            for first in range(0, self.total, size):
                group = range(first, first + size)
                stay += sorted(sorted(group, key=[-score for score in of_layer].__getitem__)[:kept])
            layers[number] = (*stay, *(n for n in range(self.total) if n not in stay))
        every = range(max(layers) + 1)
        return UnitOrder((), (), experts=tuple(layers.get(number, ()) for number in every))


def experts_of(config: PretrainedConfig) -> FoundExperts:
    """Return the experts of a model that can go."""
    architecture = architecture_of(config)
    if architecture.experts is None:
        return FoundExperts()
    return _FOUND.answer(config, architecture)


def with_fewer_experts(config: PretrainedConfig, count: int | None) -> PretrainedConfig:
    """Return the config of a model whose layers keep some of their experts; None: all.

    Raises:
        ModelError: the layers cannot keep this number.
    """
    if count is None:
        return config
    found = experts_of(config)
    if found.why_fixed is not None:
        raise ModelError(f"the experts of a {config.model_type} model cannot go: {found.why_fixed}")
    if count not in found.counts:
        raise ModelError(
            f"a layer of this {config.model_type} model cannot keep {count} of its {found.total} "
            f"experts: it keeps at least {found.least}, because a token is routed to "
            f"{found.chosen}, and a multiple of {found.groups}"
        )
    return _with_count(config, found.key, count)


def with_expert_axes(config: PretrainedConfig, table: Mapping[str, Axes]) -> Mapping[str, Axes]:
    """Return the axes of weights, by name, with those of the experts that can go."""
    found, joined = experts_of(config), dict(table)
    for name, axes in found.axes.items() if found.why_fixed is None else ():
        others = table.get(name, (None,) * len(axes))
        joined[name] = tuple(one or other for one, other in zip(axes, others, strict=True))
    return joined


def _with_count(config: PretrainedConfig, key: str, count: int) -> PretrainedConfig:
    fewer = copy.deepcopy(config)
    setattr(fewer, key, count)
    return fewer


def find_experts(config: PretrainedConfig, architecture: Architecture) -> FoundExperts:
    """Return the experts of a mixture; a small copy of it decides."""
    if narrow_maps(config) is not None:
        return FoundExperts(why_fixed="its heads or neurons were cut before; cut the experts first")
    if architecture.blocks is None or architecture.repeats or architecture.parts:
        return FoundExperts(why_fixed="its layers are not found")
    found = _by_shape(config, architecture)
    if found.why_fixed is not None:
        return found
    decided, failed = in_copy(config, architecture, partial(_by_copy, found, architecture))
    if decided is None:
        return found._replace(why_fixed=f"no small copy of it runs, which decides ({failed})")
    chosen, why_fixed = decided
    # A router may score a group by its two best experts, and chooses of `topk_group` groups.
    of_group = max(2, -(-chosen // (stated(config, CHOSEN_GROUPS) or 1)))
    least = found.groups * of_group if found.groups > 1 else chosen
    return found._replace(chosen=chosen, least=least, why_fixed=why_fixed)


_FOUND = Known(
    find_experts,
    without=("id2label", "label2id", "dtype", "_name_or_path", "architectures", "vocab_size"),
)


def _by_shape(config: PretrainedConfig, architecture: Architecture) -> FoundExperts:
    """Return the experts that the shapes of two models without values propose."""
    groups, stored = stated(config, GROUPS) or 1, config.to_dict()
    task, start = architecture.tasks[0], f"{architecture.backbone}.{architecture.blocks}."
    whole = without_values(config, task)
    sizes = _sizes(whole)
    for key in COUNTS:
        total = stored.get(config.attribute_map.get(key, key))
        if not isinstance(total, int) or total < 2 * groups:
            continue
        fewer = total - groups
        try:
            others = _sizes(without_values(_with_count(config, key, fewer), task))
            pairs = {n: [*zip(size, others[n], strict=True)] for n, size in sizes.items()}
        except Exception:  # noqa: BLE001, S112 - a family refuses a number in its own way
            continue
        changed = {n: each for n, each in pairs.items() if any(a != b for a, b in each)}
        is_even = all(a == b or a * fewer == b * total for each in pairs.values() for a, b in each)
        if not (changed and is_even and all(name.startswith(start) for name in changed)):
            continue
        axes = dict[str, Axes]()
        for name, each in changed.items():
            number = int(name.removeprefix(start).partition(".")[0])
            of_experts = (None if a == b else Axis("experts", number, a // total) for a, b in each)
            axes[name] = tuple(of_experts)
        return _with_routers(FoundExperts(total, 0, groups, 0, key, axes, why_fixed=None), whole)
    return FoundExperts(why_fixed="no key of its config states fewer experts alone")


def _sizes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: (*tensor.shape,) for name, tensor in model.state_dict().items()}


def _with_routers(found: FoundExperts, model: PreTrainedModel) -> FoundExperts:
    """Return the experts with the module that has them in each layer, which a router is beside."""
    owners = {name.rpartition(".")[0]: axes for name, axes in found.axes.items()}
    blocks = dict[int, str]()
    for path, axes in owners.items():
        forward = inspect.unwrap(type(model.get_submodule(path)).forward)
        # Of itself, hidden states, the chosen experts and their weights.
        if len(inspect.signature(forward).parameters) == 4:
            number = next(axis.number for axis in axes if axis is not None)
            if number in blocks:
                return found._replace(why_fixed="a layer has several modules of experts by shape")
            blocks[number] = path
    found = found._replace(blocks=blocks)
    routers = [number for number, _ in _routers(found)]
    layers = {axis.number for axes in found.axes.values() for axis in axes if axis is not None}
    if not set(routers) == {*blocks} == layers or len(routers) > len(layers):
        why_fixed = "not each layer has a module of experts and a router with one matrix by shape"
        return found._replace(why_fixed=why_fixed)
    return found


def _routers(found: FoundExperts) -> Iterator[tuple[int, str]]:
    """Yield for each matrix [E, D] beside the experts the number of its layer and its name."""
    inside = tuple(f"{path}." for path in found.blocks.values())
    for name, (axis, *others) in found.axes.items():
        if axis is not None and others == [None] and not name.startswith(inside):
            yield axis.number, name


@torch.no_grad()
def _by_copy(
    of_model: FoundExperts,
    architecture: Architecture,
    small: PretrainedConfig,
    task: TaskType,
    *_: object,
) -> tuple[int, str | None]:
    """Return the experts per token of a small copy, and why its experts cannot go; None: they can.

    It has 16 to 64 experts or more, of which a quarter goes.
    """
    key, unit = of_model.key, 4 * of_model.groups
    count = -(-max(16, min(of_model.total, 64)) // unit) * unit
    small = _with_count(small, key, count)
    model, found = in_double(small, task), _by_shape(small, architecture)
    if found.why_fixed is not None:
        return 0, found.why_fixed
    outputs, kept = outputs_of(model), count * 3 // 4
    with contributions_taken(model, found) as taken:
        by_parts = outputs_of(model)
    if not is_same(by_parts, outputs) or set(taken.sums) != set(found.blocks):
        return 0, "what its layers give is not the sum of what each expert gives alone"
    chosen = taken.chosen
    # Expert 0 goes, which tables of experts by token name before they are filled.
    draws = torch.rand(count - 1, generator=torch.Generator().manual_seed(0)).tolist()
    scores = {number: [-1.0, *draws[number:], *draws[:number]] for number in found.blocks}
    order = found.order(scores, kept)
    for number, name in _routers(found):  # a router reads what the layers before it give
        gone = [*(order.places("experts", number) or ())][kept:]
        _never_choose(model, found, name, gone)
    expected, cut = outputs_of(model), in_double(_with_count(small, key, kept), task)
    sizes, state = _sizes(cut), dict[str, Tensor]()
    for name, tensor in model.state_dict().items():
        whole = cut_part(tensor, found.axes.get(name, (None,) * tensor.dim()), Cut(order, None))
        state[name] = whole[tuple(map(slice, sizes[name]))]
    cut.load_state_dict(state)
    same = is_same(outputs_of(cut), expected)
    return chosen, None if same else "a model of its class with fewer experts computes other things"


def _never_choose(
    model: PreTrainedModel, found: FoundExperts, router: str, gone: Sequence[int]
) -> None:
    """Change a router so that the tokens of a small copy choose none of these experts."""
    path, inputs = router.rpartition(".")[0], list[Tensor]()
    part = model.get_submodule(path)
    width = model.get_parameter(router).shape[1]

    def note(_: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        inputs.append((*given, *named.values())[0].reshape(-1, width))

    with part.register_forward_pre_hook(note, with_kwargs=True):
        outputs_of(model)
    # A vector whose product with each input is 1.
    ones = torch.ones(len(inputs[0]), 1, dtype=inputs[0].dtype)
    along = torch.linalg.lstsq(inputs[0], ones).solution[:, 0]
    model.get_parameter(router)[gone] = -NEVER * along
    number, inside = found.axes[router][0], tuple(f"{one}." for one in found.blocks.values())
    for name, tensor in model.state_dict().items():  # biases of the choice
        axes = found.axes.get(name, ())
        if number in axes and name != router and not name.startswith(inside):
            places = torch.tensor(gone)
            tensor.index_fill_(axes.index(number), places, -NEVER)


@dataclass
class Contributions:
    """What experts give to hidden states, in forwards of a model.

    sums: by the number of a layer, [E] fp64: over tokens, the norm of what the expert gives, with
        its weight.
    chosen: experts that a token is routed to.
    valid: [N] bool, the tokens of the next forward that count; None: all.
    """

    sums: dict[int, Tensor] = field(default_factory=dict)
    chosen: int = 0
    valid: Tensor | None = None


@contextmanager
def contributions_taken(model: nn.Module, found: FoundExperts) -> Iterator[Contributions]:
    """Yield what the experts give in forwards in the body.

    There the experts of a token run in as many calls, so that the output of a call is of one.
    """
    taken = Contributions()

    def one_by_one(
        number: int, experts: Callable[..., Tensor], *inputs: Tensor, **named: Tensor
    ) -> Tensor:
        hidden, chosen, weights = (*inputs, *named.values())
        taken.chosen, parts = chosen.shape[-1], list[Tensor]()
        # A number beyond the last expert stands for none.
        sums = torch.zeros(found.total + 1, dtype=torch.float64, device=hidden.device)
        for one in chosen.split(1, dim=-1):
            place = slice(len(parts), len(parts) + 1)
            parts.append(experts(hidden, one, weights[..., place]))
            norms = parts[-1].flatten(0, -2).double().norm(dim=-1)
            norms = norms if taken.valid is None else norms.where(taken.valid, 0.0)
            sums.scatter_add_(0, one.flatten(), norms)
        taken.sums[number] = taken.sums.get(number, 0) + sums[:-1]
        return torch.stack(parts).sum(0)

    with ExitStack() as changes:
        for number, path in found.blocks.items():
            part = model.get_submodule(path)
            before = {key: value for key, value in vars(part).items() if key == "forward"}
            changes.callback(vars(part).update, before)
            changes.callback(vars(part).pop, "forward", None)
            part.forward = partial(one_by_one, number, part.forward)
        yield taken
