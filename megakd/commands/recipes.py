"""Configs from a few names: of a model to shrink, and of a teacher and a student.

`megakd shrink` and the functions `shrink` and `distil` of Python run the same configs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megakd.contract.tasks import AUTO, FROM_TEACHER
from megakd.process.terminal import in_home


def shrink_tree(
    model: str,
    *,
    size: Mapping[str, str],
    data: str | None,
    words: Sequence[str] = (),
    output_dir: Path | None = None,
) -> dict[str, Any]:
    """Return the sections of a run that cuts a model to a size and repairs it.

    Args:
        model: a folder or a Hub id.
        size: `parameters`, `flops` or `speedup`, as the method `shrink` reads them.
        data: a file, a folder or a Hub data set; None: an override names it.
        words: the overrides of the run, on which some defaults depend.
        output_dir: default: `runs/<model>-<size>`.
    """
    tree = _recipe(_keys_of(model), words)
    if data is not None:
        tree["task"]["dataset"] = data
    teacher = {"model": model, **tree.pop("teacher", {})}
    if any(word.startswith("objective=") for word in words):
        teacher.pop("cache", None)  # which holds outputs alone
    out = str(output_dir or _folder(model, next(iter(size.values()), "smaller")))
    return {"output_dir": out, "teacher": teacher, **tree, "method": {"name": "shrink", **size}}


def distil_tree(
    teacher: str,
    student: str | Mapping[str, Any],
    *,
    words: Sequence[str] = (),
    output_dir: Path | None = None,
) -> dict[str, Any]:
    """Return the sections of a run in which a student learns from a teacher, without its data.

    Args:
        student: a folder or a Hub id, or a mapping for `student.model`, such as `{"config": …}`.
    """
    tree = _recipe(_keys_of(teacher), words)
    tree["teacher"] = {"model": teacher, **tree.get("teacher", {})}
    tree["student"] = {**tree["student"], "model": student}
    name = Path(student).name if isinstance(student, str) else "student"
    out = str(output_dir or _folder(teacher, name))
    return {"output_dir": out, **tree, "method": {"name": "single"}}


def _folder(model: str, what: str) -> Path:
    name = f"{Path(model).name or 'model'}-{what}"
    return Path("runs") / re.sub(r"[^\w.-]+", "-", name).rstrip("-")


def _recipe(keys: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """Return the sections for a model with these keys of its config.json."""
    name = str((keys.get("architectures") or [""])[0])
    widths = (keys.get(key) for key in ("hidden_size", "dim", "d_model", "n_embd"))
    width = next((width for width in widths if isinstance(width, int) and width > 0), None)
    if "task.type=causal_lm" in words or not _is_encoder(name, keys):
        rate = round(3e-4 * 576 / (width or 1728), 7)
        return {
            "task": {"type": "causal_lm", "max_eval_examples": 200},
            "student": {"model": FROM_TEACHER},
            "train": {"learning_rate": rate, "lr_scheduler_type": "cosine", "warmup_ratio": 0.03},
        }
    narrow = 384 / (width or 768)
    # A masked language model has no classes, and new masks every epoch.
    masks, has_classes = "task.type=mlm" in words, name.endswith("ForSequenceClassification")
    teacher: dict[str, Any] = {} if masks else {"cache": AUTO}
    is_tuned = any(word.startswith("teacher.finetune") for word in words)
    if is_tuned or not (masks or has_classes):
        teacher["finetune"] = {"learning_rate": round(3e-4 * narrow**2, 7)}
    rows = {"per_device_train_batch_size": 32, "num_train_epochs": 10}
    schedule = {"lr_scheduler_type": "cosine", "warmup_ratio": 0.1}
    return {
        "task": {"type": "classification"},
        "teacher": teacher,
        "student": {"model": FROM_TEACHER, "dropout": 0.0},
        "train": {**rows, "learning_rate": round(5e-4 * narrow, 7), **schedule},
    }


def _keys_of(model: str) -> Mapping[str, Any]:
    """Return the keys of a model's config.json; none if the file cannot be read here."""
    from huggingface_hub import hf_hub_download

    try:
        folder = in_home(model)
        path = folder / "config.json" if folder.exists() else hf_hub_download(model, "config.json")
        keys = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the run reports it
        return {}
    return keys if isinstance(keys, dict) else {}


# Types whose class without a head, as in many checkpoints of sentence encoders, is an encoder.
_ENCODERS = """
    albert bert bigbird camembert canine convbert data2vectext deberta debertav2 distilbert electra
    ernie esm eurobert flaubert fnet funnel ibert longformer luke megatronbert mobilebert modernbert
    mpnet mra mt5 new nomicbert nystromformer rembert roberta robertaprelayernorm rocbert roformer
    squeezebert t5 t5encoder xlm xlmroberta xlmrobertaxl xlnet xmod yoso
"""


def _is_encoder(name: str, keys: Mapping[str, Any]) -> bool:
    if "For" in name or "LMHead" in name:
        return not name.endswith(("ForCausalLM", "LMHeadModel"))
    kind = str(keys.get("model_type") or name.removesuffix("Model"))
    return re.sub(r"[-_]", "", kind).lower() in _ENCODERS.split()
