"""Models as ONNX graphs, in fp32 and int8.

    model.onnx    inputs as the tokenizer names them, int64 [B, T]; output `logits`, fp32

B and T are free. The folder also holds the config and the tokenizer, as optimum and transformers.js
expect them. A decoder's graph has no cache of keys and values: it scores texts.

onnxruntime's dynamic quantisation has one scale for all numbers of a product's input, of all rows
of the batch: beside an outlier, the steps of all other numbers are coarse.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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

logger = logging.getLogger(__name__)

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
    graph, names = to or folder / MODEL, _input_names(model, folder)
    # The exporter splits fused attention into operators whose strides T5's views refuse.
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            wanted = [model(**_example(model, names, one)).logits.numpy() for one in _SHAPES]
    except Exception as error:  # a family may refuse short texts in its own way
        reason = f"it fails for texts of {_SHAPES[1][1]} to {_SHAPES[-1][1]} tokens"
        raise _inexpressible(model, f"{reason}: {first_line(error)}") from error
    _export(model, names, graph)
    try:
        worst, largest = _differences(model, graph, wanted)
    except ModelError:
        raise
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


def _inexpressible(model: PreTrainedModel, reason: str) -> ModelError:
    return ModelError(
        f"a {model.config.model_type} model cannot be expressed as ONNX ({reason}); export the "
        "model without --format"
    )


def _export(model: PreTrainedModel, names: Sequence[str], graph: Path) -> None:
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
        raise _inexpressible(model, " ".join(str(error.__cause__ or error).split())) from error


def _differences(
    model: PreTrainedModel, graph: Path, logits: Sequence[NDArray[np.float32]]
) -> tuple[float, float]:
    """Return the largest difference from torch and the largest logit, over all shapes."""
    onnx, worst, largest = OnnxModel(graph), 0.0, 0.0
    sizes = [one.shape for one in onnx.session.get_inputs()]
    if any(isinstance(size, int) for shape in sizes for size in shape):
        raise _inexpressible(model, f"its graph takes inputs of the size {sizes[0]} alone")
    for shape, whole in zip(_SHAPES, logits, strict=True):
        inputs = _example(model, onnx.inputs, shape)
        got = onnx.logits(inputs)
        # The logits at padding are computed for nobody.
        real = inputs["attention_mask"].bool().numpy() if whole.ndim > 2 else ...
        wanted, got = whole[real], got[real]
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
    # CANINE's characters are no rows of a table.
    ids = torch.randint(getattr(config, "vocab_size", 128), (rows, tokens), generator=generator)
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


SHARES = (0.0, 0.125, 0.25, 0.5, 0.75)
"""Shares of the products that stay in fp32, tried in this order."""

Logits = Callable[[Mapping[str, Tensor]], NDArray[np.float32]]


Scores = Callable[[Logits], Tensor]
"""Returns [2, N] the scores of held-out rows, one by one and in batches, from a function of logits.

A score is 1 for a right label and 0 for another, or minus a loss; NaN without a label."""


def quantize_graph(whole: Path, graph: Path, scores: Scores | None) -> list[str]:
    """Write the graph `whole` as an int8 `graph`; return lines with the scores of both.

    If they differ by more than two standard errors, the products whose inputs have the largest
    outliers stay in fp32, as few as cure it. If none do, a warning says so.
    """
    if scores is None:
        _quantize(whole, graph, ())
        return []
    result = wanted = scores(OnnxModel(whole).logits)
    products, kept, is_worse = list[str](), 0, False
    for share in (*SHARES, 0.0):
        products = products or (_by_outliers(whole, scores) if share else [])
        kept = round(share * len(products))
        _quantize(whole, graph, products[:kept])
        result = scores(OnnxModel(graph).logits)
        is_worse = _is_worse(wanted, result)
        if not is_worse:
            break
    count, name = int(wanted[1].isfinite().sum()), "loss" if wanted.nansum() < 0 else "accuracy"
    means = [f"{abs(float(one.nanmean())):.4f}" for one in (wanted[1], *result)]
    line = (
        f"{name} on {count} held-out rows: {means[0]} in fp32, {means[1]} in int8 one by one, "
        f"{means[2]} in batches"
    )
    if is_worse:
        logger.warning("the int8 graph is worse by more than two standard errors: %s", line)
    if kept:
        line += f"; {kept} of {len(products)} products stay in fp32, because of outliers"
    return [line]


def _is_worse(wanted: Tensor, result: Tensor) -> bool:
    for before, after in zip(wanted, result, strict=True):
        labelled = before.isfinite()
        pair = torch.stack([before[labelled], after[labelled]])
        lost = float(pair[0].mean() - pair[1].mean())
        if not lost <= 2 * float(pair.std()) / pair.shape[1] ** 0.5:  # NaN is worse too
            return True
    return False


def _by_outliers(whole: Path, scores: Scores) -> list[str]:
    """Return the products and tables that are quantised, those with the largest outliers first."""
    import onnx

    model = onnx.load(str(whole), load_external_data=False)
    weights = {one.name for one in model.graph.initializer}
    numbers: dict[str, str] = {}  # by the node, the tensor whose numbers share a scale
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights:
            numbers[node.name] = node.input[0]
        elif node.op_type == "Gather" and node.input[0] in weights:
            numbers[node.name] = node.output[0]
    names = list(dict.fromkeys(numbers.values()))
    model.graph.output.extend(map(onnx.helper.make_empty_tensor_value_info, names))
    watched = whole.with_name(f"{whole.name}.watched")  # beside a file of weights
    onnx.save(model, str(watched))
    onnx_model, outliers = OnnxModel(watched), dict.fromkeys(names, 0.0)

    def logits(inputs: Mapping[str, Tensor]) -> NDArray[np.float32]:
        first, *rest = onnx_model.outputs(inputs, ["logits", *names])
        for name, one in zip(names, rest, strict=True):
            sizes = np.abs(one)
            outliers[name] = max(outliers[name], float(sizes.max() / max(sizes.mean(), 1e-30)))
        return first

    scores(logits)
    watched.unlink()
    return sorted(numbers, key=lambda node: -outliers[numbers[node]])


def _quantize(whole: Path, graph: Path, kept: Sequence[str]) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    files = whole.parent.glob(f"{whole.name}*")
    with silent(logging.getLogger()):
        quantize_dynamic(
            whole,
            graph,
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(kept),
            use_external_data_format=sum(one.stat().st_size for one in files) > MOST_IN_ONE_FILE,
        )
