"""Weight files of a Hugging Face folder, and initial values of weights that it does not hold."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.core_model_loading import WeightConverter, build_glob_alternation
from transformers.modeling_utils import str_to_torch_dtype

from megakd.engine.sharding import full_shape, in_fp32, set_values
from megakd.errors import ModelError
from megakd.process.seeding import cpu_seeded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAFETENSORS = "model.safetensors"

SAFETENSORS_INDEX = "model.safetensors.index.json"

SAMPLED_TENSORS, SAMPLED_ELEMENTS = 64, 1024


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Location of one tensor: file, key in the file, and first byte.

    read_as: the dtype to which its values are rounded; None: the stored dtype.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    read_as: torch.dtype | None = None

    def rounded(self, dtype: torch.dtype | None) -> StoredTensor:
        """Return the tensor with values rounded to a dtype, if they are floating-point numbers."""
        return replace(self, read_as=dtype if self.dtype.is_floating_point else None)

    def chosen(self, dimension: int, places: Sequence[int]) -> StoredPart:
        """Return the tensor with some rows (dimension 0) or columns (1), in the given order."""
        shape = (*self.shape[:dimension], len(places), *self.shape[dimension + 1 :])
        inherited = {one.name: getattr(self, one.name) for one in fields(StoredTensor)}
        return StoredPart(
            **{**inherited, "shape": shape}, whole=self, dimension=dimension, places=(*places,)
        )


@dataclass
class Conversion:
    """Stored tensors that transformers converts to others of a model, such as those of experts.

    name: of the first tensor that results.
    parts: key, pattern of the converter, and place of each stored tensor.
    """

    name: str
    converter: WeightConverter
    config: PretrainedConfig
    parts: list[tuple[str, str, StoredTensor]] = field(default_factory=list)

    def tensors(self) -> dict[str, StoredTensor]:
        """Return the tensors that result by name; shapes alone are computed."""
        first = self.parts[0][2]
        results = self.run(lambda part: torch.empty(part.shape, dtype=part.dtype, device="meta"))
        return {
            name: StoredConverted(
                file=first.file,
                key=first.key,
                shape=tuple(tensor.shape),
                dtype=tensor.dtype,
                offset=first.offset,
                name=name,
                conversion=self,
            )
            for name, tensor in results.items()
        }

    def run(self, read: Callable[[StoredTensor], Tensor]) -> dict[str, Tensor]:
        """Return the converted tensors by name; `read` returns a stored one."""
        converter = copy.deepcopy(self.converter)
        for key, pattern, part in self.parts:
            converter.add_tensor(self.name, key, pattern, cast("Any", read(part)))
        results = cast("dict[str, Any]", converter.convert(self.name, config=self.config))
        return {n: t[0] if isinstance(t, list) else t for n, t in results.items()}


@dataclass(frozen=True, kw_only=True)
class StoredConverted(StoredTensor):
    """A tensor `name` that a conversion makes; the file is that of its first part."""

    name: str
    conversion: Conversion = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class StoredPart(StoredTensor):
    """Places along one of the first two dimensions of a stored tensor."""

    whole: StoredTensor = field(repr=False)
    dimension: int
    places: tuple[int, ...] = field(repr=False)


def check_weight_files(folder: Path, where: str) -> dict[str, StoredTensor]:
    """Return the tensors of a model folder by name, after checking that its files are complete.

    Headers and lengths are compared; no tensor is read.
    """
    if not folder.is_dir():
        raise ModelError(f"{where}: {folder} does not exist or is not a folder")
    if (folder / SAFETENSORS).is_file():
        return stored_tensors(folder / SAFETENSORS, where)
    index = folder / SAFETENSORS_INDEX
    if not index.is_file():
        pickles = sorted(file.name for file in folder.glob("pytorch_model*.bin"))
        hint = f"; convert {pickles[0]} to safetensors" if pickles else ""
        raise ModelError(
            f"{where}: {folder} has no weights: neither {SAFETENSORS} nor {SAFETENSORS_INDEX} "
            f"exists{hint}"
        )
    try:
        files: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{where}: {index} is not a weight index: {error!r}") from error
    names = sorted({*files.values()})
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{where}: {index} lists {len(names)} weight files and {len(missing)} of them"
            f" do not exist ({', '.join(missing[:3])}); fetch the model again"
        )
    return {k: one for name in names for k, one in stored_tensors(folder / name, where).items()}


def stored_tensors(file: Path, where: str) -> dict[str, StoredTensor]:
    """Return the tensors of a weight file, whose length must agree with its header."""
    with file.open("rb") as stream:
        start = stream.read(8)
        if start[:7] == b"version":
            raise ModelError(f"{where}: {file} is a Git LFS pointer, not weights: run git lfs pull")
        try:
            with safe_open(file, "np"):  # compares header and length, and reads no tensor
                header = json.loads(stream.read(int.from_bytes(start, "little")))
        except SafetensorError as error:
            raise ModelError(
                f"{where}: {file} ({file.stat().st_size} bytes) is cut short or damaged, or holds "
                f"numbers of another kind ({error}); fetch the file again, or store it as F32, "
                "BF16 or F16"
            ) from error
        data = stream.tell()
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in header.items():
        dtype = str_to_torch_dtype.get(entry["dtype"])
        if dtype is None:
            raise ModelError(
                f"{where}: {file} holds {key} as {entry['dtype']}, which cannot be loaded; store "
                "it as F32, BF16 or F16"
            )
        shape, offset = tuple(entry["shape"]), data + entry["data_offsets"][0]
        tensors[key] = StoredTensor(file=file, key=key, shape=shape, dtype=dtype, offset=offset)
    return tensors


@dataclass
class WeightReader:
    """Reader of single tensors, each into its own memory.

    A safetensors file is read, not mapped: pages of a mapped file stay resident, and the rank that
    reads a model would finally hold all of it. The last conversion stays in memory.
    """

    where: str
    _converted: tuple[Conversion | None, dict[str, Tensor]] = field(
        default_factory=lambda: (None, {}), init=False
    )

    def read(self, stored: StoredTensor) -> Tensor:
        """Return the tensor as stored, on the CPU."""
        return self.part(stored, 0, math.prod(stored.shape)).reshape(stored.shape)

    def part(self, stored: StoredTensor, start: int, stop: int) -> Tensor:
        """Return some elements of the flattened tensor as stored, on the CPU, [stop - start]."""
        if isinstance(stored, StoredPart) and start < stop:
            # Rows alone are read that have any of the elements: a table may fill the memory.
            width = math.prod(stored.shape[1:])
            first = start // width
            values = self._rows(stored, first, -(-stop // width)).flatten()[start - first * width :]
            return values[: stop - start].to(stored.read_as or stored.dtype)
        if isinstance(stored, StoredConverted):
            if self._converted[0] is not stored.conversion:  # the tensors of one follow each other
                self._converted = stored.conversion, stored.conversion.run(self.read)
            values = self._converted[1][stored.name].flatten()[start:stop]
            return values.to(stored.read_as or stored.dtype)
        data = torch.empty((stop - start) * stored.dtype.itemsize, dtype=torch.uint8)
        with stored.file.open("rb", buffering=0) as stream:
            stream.seek(stored.offset + start * stored.dtype.itemsize)
            buffer, done = data.numpy().data, 0
            while done < len(buffer):
                count = stream.readinto(buffer[done:])
                if not count:
                    raise ModelError(
                        f"{self.where}: {stored.file} ended after {done} of the {len(buffer)} "
                        f"bytes of {stored.key}; the file may have changed during reading"
                    )
                done += count
        return data.view(stored.dtype).to(stored.read_as or stored.dtype)

    def _rows(self, stored: StoredPart, first: int, last: int) -> Tensor:
        whole, width = stored.whole, math.prod(stored.whole.shape[1:])
        if stored.dimension == 1:
            values = self.part(whole, first * width, last * width).unflatten(
                0, (-1, *whole.shape[1:])
            )
            return values[:, list(stored.places)]
        rows = stored.places[first:last]
        return torch.stack([self.part(whole, row * width, (row + 1) * width) for row in rows])

    def sample(self, stored: Iterable[StoredTensor]) -> str:
        """Return a digest of some elements of some tensors, to tell other weights of one shape."""
        every, digest = list(stored), hashlib.sha256()
        for tensor in every[:: max(1, len(every) // SAMPLED_TENSORS)]:
            middle = math.prod(tensor.shape) // 2
            values = self.part(tensor, middle - min(middle, SAMPLED_ELEMENTS), middle)
            digest.update(repr((tensor.shape, tensor.dtype)).encode())
            digest.update(values.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def names_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], object]:
    """Return a function that tells, by its name, a weight that transformers keeps in fp32."""
    patterns = (*model._get_dtype_plan(dtype), "$^")  # noqa: SLF001  (nothing public has it)
    return build_glob_alternation([*patterns])[0].search


def keep_in_fp32(model: PreTrainedModel, dtype: torch.dtype, *, is_frozen: bool) -> None:
    """Give fp32 to what transformers keeps so, before the model is filled.

    Parameters that learn are left: DeepSpeed computes with one dtype, its optimizer in fp32.
    """
    is_kept = names_in_fp32(model, dtype)
    for name, tensor in (*model.named_buffers(), *(model.named_parameters() if is_frozen else ())):
        if is_kept(name) and tensor.is_floating_point():
            in_fp32(tensor)


Parameters = Mapping[str, Mapping[str, nn.Parameter]]
"""Parameters by the path of their module, and by their own name."""


def initialize_parameters(
    model: PreTrainedModel, parameters: Iterable[nn.Parameter], *, seed: int
) -> None:
    """Set parameters to the initial values that the model's own class draws for them.

    Each module draws from its own generator, seeded by (seed, module name), in fp32 on the CPU. The
    values do not depend on other modules, the device, the dtype or the ranks. Only one module is
    whole at a time, unless a constructor alone knows values, as those of an activation that learns
    (Apertus): then the model is built once more. This is a collective for a sharded model.
    """
    whole: PreTrainedModel | None = None
    waiting = {id(parameter) for parameter in parameters}
    # The rule of a whole attention must not change the weights that the attention already has.
    with _replaced(dict(model.named_modules()), "meta") as (parts, _):
        for name, held in parts.items():
            fresh = {key: held[key] for key in held if id(held[key]) in waiting}
            if not fresh:
                continue
            waiting.difference_update(id(parameter) for parameter in fresh.values())
            values = _draw(model, name, seed)
            for key, parameter in fresh.items():
                if values[key].isnan().any():
                    with cpu_seeded(seed), torch.device("cpu"):
                        whole = whole or type(model)(copy.deepcopy(model.config))
                    values[key] = whole.get_parameter(f"{name}.{key}").detach()
                drawn = values[key].flatten()
                set_values(parameter, lambda start, stop, drawn=drawn: drawn[start:stop])


def _draw(model: PreTrainedModel, name: str, seed: int) -> dict[str, Tensor]:
    """Return the values that `_init_weights` gives a module's own parameters, in fp32 on the CPU.

    After the module itself, the modules around it may change the values, from the inside out, as in
    transformers: an attention may know the scale of its weights better than the Linear (GPT-2, T5).
    """
    module_seed = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
    path = name.split(".") if name else []
    owners = [model.get_submodule(".".join(path[:end])) for end in range(len(path), -1, -1)]
    with (
        _replaced({name: owners[0]}, "cpu") as (_, values),
        cpu_seeded(module_seed),
        torch.no_grad(),
    ):
        for owner in owners:
            model._init_weights(owner)  # noqa: SLF001  (the class's rule; nothing public has it)
    return {key: parameter.data for key, parameter in values[name].items()}


@contextmanager
def _replaced(
    modules: Mapping[str, nn.Module], device: str
) -> Iterator[tuple[Parameters, Parameters]]:
    """Put NaN in place of modules' parameters in the body; yield the originals and the new ones."""
    named = {name: dict(part.named_parameters(recurse=False)) for name, part in modules.items()}
    like = partial(torch.full, fill_value=float("nan"), dtype=torch.float32, device=device)
    new = {
        name: {key: nn.Parameter(like(full_shape(p))) for key, p in held.items()}
        for name, held in named.items()
    }
    try:
        _put(modules, new)
        yield named, new
    finally:
        _put(modules, named)


def _put(modules: Mapping[str, nn.Module], parameters: Parameters) -> None:
    for name, held in parameters.items():
        for key, parameter in held.items():
            setattr(modules[name], key, parameter)
