"""A finished model as an ONNX graph: written, compared with torch, and opened by onnxruntime.

    model.onnx    inputs as the tokenizer names them, int64 [B, T]; output `logits`, fp32

B and T are free. The folder also holds the config and the tokenizer, as optimum and transformers.js
expect them. A decoder's graph has no cache of keys and values: it scores texts.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from megakd.data.tokenizers import from_folder, has_tokenizer_files
from megakd.errors import ConfigError, ModelError, first_line
from megakd.models.architectures import context_length, has_token_types
from megakd.models.loading import load_finished

MODEL = "model.onnx"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_TOLERANCE = 1e-4
"""Largest difference of a logit from torch, relative to the largest logit if that is above 1."""
_SHAPES = ((2, 7), (1, 1), (1, 19), (3, 32))
"""Rows and tokens of the inputs that are compared; the first is the one that is traced."""
_INPUTS = ("input_ids", "attention_mask")
MOST_IN_ONE_FILE = 1_500_000_000
"""Bytes of weights beyond which they go into a file beside the graph: protobuf ends at 2 GiB."""


def missing_packages() -> list[str]:
    """Return the packages that write and run graphs and are not installed."""
    return [name for name in _PACKAGES if importlib.util.find_spec(name) is None]


def check_packages(where: str) -> None:
    """Raise ConfigError if a package that writes or runs a graph is missing."""
    missing = missing_packages()
    if missing:
        raise ConfigError(
            f"{where} needs {', '.join(missing)}, not installed; pip install 'megakd[onnx]'"
        )


def write_onnx(
    folder: Path, *, to: Path | None = None, stored_as: torch.dtype | None = None
) -> float:
    """Write the graph of a finished model, by default `model.onnx` beside its weights.

    Args:
        stored_as: the dtype to which the weights are rounded first; None: they are not.

    Returns:
        The largest difference of a logit from torch, over batches of several shapes with padding.

    Raises:
        ModelError: the model cannot be expressed as ONNX, or the graph computes other logits.
    """
    model = load_finished(folder, "--format onnx", dtype=torch.float32).eval()
    if stored_as is not None:
        for one in model.state_dict().values():
            one.copy_(one.to(stored_as) if one.is_floating_point() else one)
    graph = to or folder / MODEL
    _export(model, _input_names(model, folder), graph)
    try:
        worst, largest = _differences(model, graph)
    except Exception as error:  # the errors of onnxruntime have no class of their own
        raise ModelError(
            f"onnxruntime cannot run the graph of this {model.config.model_type} model "
            f"({first_line(error)}); install an onnxruntime that fits the exporter, or export the "
            "model without --format"
        ) from error
    if not worst <= _TOLERANCE * max(1.0, largest):
        raise ModelError(
            f"the ONNX graph of this {model.config.model_type} model computes other logits than "
            f"torch: they differ by {worst:.1e}, and at most {_TOLERANCE:.0e} is allowed; export "
            "the model without --format"
        )
    return worst


class OnnxModel:
    """A graph on the CPU that answers like the model, by default on as many threads as torch."""

    def __init__(self, graph: Path, threads: int | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(
            str(graph), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = tuple(one.name for one in self.session.get_inputs())

    def logits(self, inputs: Mapping[str, Tensor]) -> NDArray[np.float32]:
        """Return the logits [B, C] or [B, T, V] of token numbers and masks [B, T]."""
        return self.outputs(inputs, ["logits"])[0]

    def outputs(
        self, inputs: Mapping[str, Tensor], names: Sequence[str]
    ) -> list[NDArray[np.float32]]:
        """Return the tensors of these names; see `logits`."""
        numbers = {name: inputs[name].numpy() for name in self.inputs}
        return [*map(np.asarray, self.session.run(list(names), numbers))]


class _Logits(nn.Module):
    """The model with positional inputs and nothing but logits as output."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, inputs, strict=True))).logits


def _input_names(model: PreTrainedModel, folder: Path) -> tuple[str, ...]:
    known = signature(model.forward).parameters
    named = ()
    if has_tokenizer_files(folder):  # its token_type_ids tell the texts of a pair apart
        named = from_folder(folder).model_input_names
    if not has_token_types(model.config):
        known = known.keys() - {"token_type_ids"}
    return (*_INPUTS, *(name for name in named if name not in _INPUTS and name in known))


def _export(model: PreTrainedModel, names: Sequence[str], graph: Path) -> None:
    # The exporter splits fused attention into operators whose strides T5's views refuse.
    model.set_attn_implementation("eager")
    model.config.use_cache = False
    inputs = _example(model, names, _SHAPES[0])
    free = {0: torch.export.Dim("batch", min=1), 1: torch.export.Dim("tokens", min=1)}
    try:
        with warnings.catch_warnings(), silent(logging.getLogger("torch.onnx")):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _Logits(model, names),
                tuple(inputs.values()),
                graph,
                input_names=list(inputs),
                output_names=["logits"],
                dynamic_shapes=((free,) * len(inputs),),
                opset_version=18,
                external_data=model.get_memory_footprint(return_buffers=False) > MOST_IN_ONE_FILE,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ModelError(
            f"a {model.config.model_type} model cannot be expressed as ONNX ({reason}); export the "
            "model without --format"
        ) from error


def _differences(model: PreTrainedModel, graph: Path) -> tuple[float, float]:
    """Return the largest difference from torch and the largest logit, over all shapes."""
    onnx, worst, largest = OnnxModel(graph), 0.0, 0.0
    for shape in _SHAPES:
        inputs = _example(model, onnx.inputs, shape)
        with torch.inference_mode():
            wanted = model(**inputs).logits.numpy()
        got = onnx.logits(inputs)
        if wanted.ndim > 2:  # the logits at padding are computed for nobody
            real = inputs["attention_mask"].bool().numpy()
            wanted, got = wanted[real], got[real]
        # Unlike max(), a maximum with a number that is NaN is NaN.
        worst = float(np.maximum(worst, np.abs(got - wanted).max()))
        largest = float(np.maximum(largest, np.abs(wanted).max()))
    return worst, largest


def _example(
    model: PreTrainedModel, names: Sequence[str], shape: tuple[int, int]
) -> dict[str, Tensor]:
    """Return random tokens [B, T]; the second half of the last row is padding."""
    config = model.config.get_text_config()
    rows, tokens = shape[0], min(shape[1], context_length(config) or shape[1])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, (tokens + 1) // 2 :] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    return {name: given.get(name, torch.zeros_like(ids)) for name in names}


@contextmanager
def silent(logger: logging.Logger) -> Iterator[None]:
    """Let a logger tell nothing but errors in the body."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
