"""Low-rank adapters of a student (LoRA), made by peft inside the plain Hugging Face model.

A linear layer W becomes W + alpha / r * B A, where W is frozen and only A [r, in] and B [out, r]
learn (Hu et al. 2021, https://arxiv.org/abs/2106.09685, section 4.1). The model keeps its class and
its config, so the losses, the head and the export see a model of its family.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from megakd.config.sections import LoraConfig
from megakd.config.task import LANGUAGE_TASKS, TaskConfig
from megakd.engine.collectives import on_main
from megakd.engine.sharding import gathered, gathered_state, is_first_rank
from megakd.errors import ConfigError
from megakd.models.architectures import Architecture
from megakd.models.fitting import ModelSource, match_names, random_head, valueless_model
from megakd.models.model_folder import Extra
from megakd.models.weights import stored_tensors
from megakd.process.seals import check_given
from megakd.process.seeding import cpu_seeded

if TYPE_CHECKING:
    from peft import LoraConfig as PeftConfig

ADAPTER = "adapter"
"""Folder beside a merged model that holds the adapters in the format of peft."""
WEIGHTS, CONFIG = f"{ADAPTER}/adapter_model.safetensors", f"{ADAPTER}/adapter_config.json"
WHERE = "student.lora.target_modules"
_NAME = "default"  # peft's name of a model's first adapter
_PART = re.compile(rf"(.+)\.(base_layer\.weight|base_layer\.bias|lora_[AB])(?:\.{_NAME}\.weight)?")
"""The name of a tensor of an adapted layer: the layer's, and the role of the tensor."""
_PEFT_TASKS = {
    "classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "causal_lm": "CAUSAL_LM",
    "mlm": None,
}


def check_adapters(source: ModelSource, task: TaskConfig, lora: LoraConfig) -> None:
    """Check the targets of the adapters on a model without memory, before any weight is loaded."""
    model = valueless_model(source, task, source.config)
    adapted_modules(model, source.architecture, lora)
    drawn = random_head(match_names(model, source.stored), source)
    if drawn and task.type in LANGUAGE_TASKS:
        raise ConfigError(
            f"student.lora: {source.folder} lacks {drawn}, and adapters would leave a "
            f"new head for {task.type} random and frozen; give a folder with this head, or remove "
            "the section"
        )


def adapted_modules(
    model: nn.Module, architecture: Architecture, lora: LoraConfig
) -> tuple[str, ...]:
    """Return the paths of the linear layers that get adapters, in the order of the model.

    Without `target_modules`, these are all linear layers of attention and MLP.
    """
    blocks = [f"{block}." for block in architecture.layer_paths(model.config)]  # type: ignore[arg-type]
    inside = tuple(
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and path.startswith(tuple(blocks))
        # Some routers of experts are linear layers with outputs of their own.
        and type(module).forward in (nn.Linear.forward, Conv1D.forward)
    )
    if lora.target_modules is None:
        return inside
    for name in lora.target_modules:
        if not any(_is_named(path, name) for path in inside):
            raise ConfigError(_no_target(model, inside, name))
    return tuple(p for p in inside if any(_is_named(p, name) for name in lora.target_modules))


def _is_named(path: str, name: str) -> bool:
    # As in peft: the path, or the end of it.
    return path == name or path.endswith(f".{name}")


def _no_target(model: nn.Module, inside: Sequence[str], name: str) -> str:
    known = list(dict.fromkeys(path.rpartition(".")[2] for path in inside))
    if any(_is_named(path, name) for path, _ in model.named_modules() if path):
        return (
            f'{WHERE}: "{name}" is not a linear layer of attention or MLP; adapters are supported '
            f"only there, not in embeddings, norms or the head (known: {', '.join(known)})"
        )
    near = difflib.get_close_matches(name, [*known, *inside], n=2)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f'{WHERE}: the student has no module "{name}"{hint} (known: {", ".join(known)})'


def add_adapters(
    model: Any, source: ModelSource, task: TaskConfig, lora: LoraConfig, *, seed: int
) -> None:
    """Give a loaded model adapters that do not change its outputs yet, and freeze the rest.

    A is random and B is 0. The adapters have the dtype of the weights. They are drawn alike on all
    ranks and are not sharded: the engine shards them with the other modules. The head of a
    classifier, which is usually new, learns as a whole.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    architecture = source.architecture
    paths = adapted_modules(model, architecture, lora)
    # Other readers of adapter_config.json expect a whole number where alpha is one.
    alpha: Any = int(lora.scale) if lora.scale.is_integer() else lora.scale
    config = PeftConfig(
        r=lora.r,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        target_modules=_short_names(model, paths),
        fan_in_fan_out=isinstance(model.get_submodule(paths[0]), Conv1D),
        base_model_name_or_path=source.name,
        task_type=_PEFT_TASKS[task.type],
    )
    with cpu_seeded(seed):
        inject_adapter_in_model(config, model, adapter_name=_NAME)
    if task.type in LANGUAGE_TASKS:
        return
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or architecture.of_the_task(name))
    config.modules_to_save = [architecture.head, *architecture.renewed]


def _short_names(model: nn.Module, paths: Sequence[str]) -> list[str]:
    every = [path for path, _ in model.named_modules()]
    for parts in (1, 2, 3):
        names = sorted({".".join(path.split(".")[-parts:]) for path in paths})
        if {p for p in every if any(_is_named(p, name) for name in names)} == {*paths}:
            return names
    return list(paths)


def adapter_config(model: Any) -> PeftConfig | None:
    """Return the config of a model's adapters; None for a model without adapters."""
    return getattr(model, "peft_config", {}).get(_NAME)


@contextmanager
def base_model(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the model without its adapters, without dropout and without gradients.

    Call this inside the engine's forward if the model is sharded.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise TypeError("a teacher gave no outputs, and the student has no adapters to leave out")
    was_training = model.training
    model.eval()
    for layer in layers:  # peft's public method would also change which weights learn
        layer._disable_adapters = True  # noqa: SLF001
    try:
        with torch.no_grad():
            yield model
    finally:
        for layer in layers:
            layer._disable_adapters = False  # noqa: SLF001
        model.train(was_training)


def merged_state(model: Any) -> tuple[Iterator[tuple[str, Tensor]], Extra]:
    """Return the state of the plain model with merged adapters, and the files of the adapters.

    A collective. The weights are gathered one at a time and merged in fp32 on rank 0; every rank
    must iterate to the end.
    """
    files = {f"{ADAPTER}/{name}": content for name, content in adapter_files(model).items()}
    return _merged_tensors(model, adapter_config(model)), files


def _merged_tensors(model: Any, config: Any) -> Iterator[tuple[str, Tensor]]:
    parts: dict[str, Tensor] = {}
    for name, tensor in gathered_state(model):
        part = _PART.fullmatch(name)
        if part is None:
            yield name, tensor
            continue
        layer, role = part.groups()
        parts[role] = tensor
        if role == "base_layer.bias":
            yield f"{layer}.bias", tensor
        elif role == "lora_B":  # the last part of a layer
            weight, a, b = (parts[one] for one in ("base_layer.weight", "lora_A", "lora_B"))
            if is_first_rank():  # the other ranks hold no values
                change = (b.float() @ a.float()) * (config.lora_alpha / config.r)
                change = change.T if config.fan_in_fan_out else change
                weight = (weight.float() + change).to(weight.dtype)
            yield f"{layer}.weight", weight


def adapter_files(model: Any) -> dict[str, str | bytes]:
    """Return the files of a model's adapters by name, in the format of peft; a collective.

    The weights are missing on ranks other than 0.
    """
    config = adapter_config(model)
    if config is None:
        raise TypeError("the model has no adapters")
    kept: dict[str, Tensor] = {}
    for name, parameter in _learned(model):
        with gathered([parameter]):
            if is_first_rank():
                kept[_peft_name(name)] = parameter.detach().to("cpu", copy=True)
    tree = {**config.to_dict(), "inference_mode": True}
    lists = {key: sorted(value) for key, value in tree.items() if isinstance(value, set)}
    text = json.dumps({**tree, **lists}, indent=2, sort_keys=True) + "\n"
    return {Path(WEIGHTS).name: save(kept, {"format": "pt"}), Path(CONFIG).name: text}


def load_adapters(model: Any, folder: Path) -> None:
    """Set the adapters to the weights of a folder with `adapter_files`; a collective.

    Rank 0 reads. Below ZeRO 3 the other ranks keep their weights, so the model may only be written
    afterwards, which rank 0 does.
    """
    on_main(lambda: check_given(folder, "best checkpoint"))
    file = folder / Path(WEIGHTS).name
    stored = load_file(file) if is_first_rank() else {}
    for name, parameter in _learned(model):
        with gathered([parameter], modify=True), torch.no_grad():
            if is_first_rank():
                parameter.copy_(stored[_peft_name(name)])


def _learned(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]


def _peft_name(name: str) -> str:
    # The files of peft leave out the adapter's own name.
    return f"base_model.model.{name}".replace(f".{_NAME}.weight", ".weight")


def adapter_parameters(folder: Path) -> int:
    """Return how many weights the adapters beside a model have."""
    stored = stored_tensors(folder / WEIGHTS, str(folder)).values()
    return sum(torch.Size(tensor.shape).numel() for tensor in stored)
