"""Work of two ranks with sharded models; `test_sharding.py` starts it and reads the results."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partition_parameters
from safetensors.torch import load_file, save_file
from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from megakd.config.models import ScratchModel
from megakd.config.task import TaskConfig
from megakd.engine import distributed
from megakd.engine.sharding import gathered, gathered_state, is_sharded, set_values
from megakd.errors import ModelError
from megakd.models.loading import load_model, resolve_model

# A threshold of 0 shards the small tensors too; the default would leave this whole model alone.
ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "memory_efficient_linear": False,
    }
}
ZERO3_OFFLOAD = {
    "zero_optimization": {**ZERO3["zero_optimization"], "offload_param": {"device": "cpu"}}
}
INPUT_IDS = torch.arange(2, 26).reshape(2, 12)
NAMES = ("a", "b", "c")


def load(spec, kind, ds, **changes):
    task = TaskConfig(type=kind, dataset="d", max_length=32)
    source = resolve_model(spec, task, where="teacher.model")
    facts = {
        "label_names": NAMES if kind == "classification" else (),
        "tokenizer_size": 300,
        "dtype": torch.float32,
        "seed": 7,
        "need_head": source.folder is not None,
    }
    return load_model(source, task=task, ds=ds, **{**facts, **changes})


def shards(model):
    local = sum(parameter.ds_tensor.numel() for parameter in model.parameters())
    return local, sum(parameter.ds_numel for parameter in model.parameters())


def states(folder):
    """The state of sharded models, read out whole."""
    results = {}
    for name, ds in (("sharded", ZERO3), ("offloaded", ZERO3_OFFLOAD), ("plain", None)):
        loaded = load(folder, "causal_lm", ds)
        results[f"loaded/{name}"] = dict(gathered_state(loaded))
        results[f"is_sharded/{name}"] = is_sharded(loaded)
    model = load(folder, "causal_lm", ZERO3)
    results["tied"] = model.lm_head.weight is model.model.embed_tokens.weight
    results["shards"] = shards(model)
    half = load(folder, "causal_lm", ZERO3, dtype=torch.bfloat16)
    results["dtypes"] = {parameter.dtype for parameter in half.parameters()}
    results["rotary"] = half.model.rotary_emb.inv_freq
    return results


def independence(folder):
    """One model's sharding must not reach the next, in either order, switch set or not."""
    results = {}
    teacher = load(folder, "causal_lm", ZERO3)
    results["plain after sharded"] = is_sharded(load(folder, "causal_lm", None))
    switch = HfDeepSpeedConfig({**ZERO3, "train_micro_batch_size_per_gpu": 1})
    results["plain under the switch"] = is_sharded(load(folder, "causal_lm", None))
    results["switch still set"] = is_deepspeed_zero3_enabled()
    del switch
    gc.collect()
    results["sharded after plain"] = is_sharded(load(folder, "causal_lm", ZERO3))
    results["switch unset"] = not is_deepspeed_zero3_enabled()
    engine, *_ = deepspeed.initialize(
        model=teacher.eval().requires_grad_(requires_grad=False),
        config={**ZERO3, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0},
    )
    with torch.no_grad():
        results["logits"] = engine(INPUT_IDS).logits
    return results


def opening(folder):
    """Return the effect of `gathered` on tied, open, plain and modified parameters."""
    model = load(folder, "causal_lm", ZERO3)
    weight, norm = model.model.embed_tokens.weight, model.model.norm.weight
    plain = torch.nn.Parameter(torch.ones(3))
    results = {"closed": weight.numel()}
    with gathered([weight, model.lm_head.weight, plain]):
        results["open"] = tuple(weight.shape)
        with gathered([weight, norm]):
            results["inner"] = (weight.numel(), norm.numel())
        results["after inner"] = (tuple(weight.shape), norm.numel())
    with gathered([norm], modify=True), torch.no_grad():
        norm.fill_(10.0 + dist.get_rank())
    with gathered([norm]):
        results["modified"] = norm.detach().clone()
    set_values(norm, torch.arange)
    with gathered([norm]):
        results["set closed"] = norm.detach().clone()
    with gathered(iter([plain])):
        results["plain"] = plain.detach().clone()
    return results


def of_other_files(folder, output):
    """Return the error of ranks whose folders hold other weights of the same shapes."""
    copied = Path(output) / f"model-{dist.get_rank()}"
    shutil.copytree(folder, copied)
    if dist.get_rank():
        weights = load_file(copied / "model.safetensors")
        scaled = {name: 1.01 * value for name, value in weights.items()}
        save_file(scaled, copied / "model.safetensors", metadata={"format": "pt"})
    try:
        load(str(copied), "causal_lm", ZERO3)
    except ModelError as error:
        return {"other files": str(error)}
    return {"other files": ""}


def sent_to_load(folder, spec):
    """Return the number of collectives of tensors that it takes to load and to draw a model."""
    comm, count = partition_parameters.dist, []
    names = ("broadcast", "all_gather_into_tensor", "allgather_fn", "all_gather")
    with ExitStack() as patches:
        for name in names:
            patches.enter_context(
                patch.object(comm, name, lambda *_, **__: count.append(1), create=True)
            )
        for one in (folder, spec):
            load(one, "causal_lm" if one is folder else "classification", ZERO3)
    return {"sent": len(count)}


def main(folder, scratch, output):
    torch.set_num_threads(1)
    distributed.start()
    spec = ScratchModel(config=json.loads(scratch))
    results = {**states(folder), **independence(folder), **opening(folder)}
    results |= of_other_files(folder, output) | sent_to_load(folder, spec)
    torch.save(results, Path(output) / f"rank{dist.get_rank()}.pt")
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
