"""The identity of a run: what its results depend on, written at its first start.

`run.json` holds the resolved config without the keys on which no result depends, the size and time
of every data file and of every file of a local model, and the revisions of models of the Hub. Later
starts compare it once: stages and checkpoints in the folder are this run's.
"""

from __future__ import annotations

import glob
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from shlex import quote
from typing import Any

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from megakd.config.file import config_tree, dump_config
from megakd.config.places import places
from megakd.config.run import RunConfig
from megakd.engine.distributed import Ranks
from megakd.errors import CheckpointError
from megakd.models.model_folder import hub_id
from megakd.process import atomic
from megakd.process.fingerprint import Fingerprint, differences, flatten
from megakd.process.folders import CARD
from megakd.process.run_folder import CONFIG, FORMAT, RUN, read_record
from megakd.process.terminal import in_home
from megakd.training.precision import training_dtype
from megakd.training.stage_folder import LENGTHS

_SPLIT = ("per_device_train_batch_size", "gradient_accumulation_steps", "tokens_per_rank")
"""Ends of keys that split a step; of their values, only the rows of all ranks count."""
_FREE = (
    *("per_device_eval_batch_size", "joins_micro_batches", "rows_per_call", *_SPLIT),
    *("kernels", "collective_timeout"),
)
"""Ends of config keys on which no result depends; all kernels compute the same."""
_FREE_SECTIONS = ("output_dir", "log.", "save.", "eval.latency")
_PLACES = ("url", "folder")
"""Keys of a `server`: where the servers are changes no text and no answer."""
_LENGTHS = tuple(f"{section}.{key}" for section in ("train", "alone") for key in LENGTHS)
"""Keys of the length of the last stages, which compare it themselves: they may get longer."""
_ROWS = "rows of a step of all ranks"
_FILE, _REVISION, _DEVICE = "file ", "revision ", "on this device "


def run_facts(config: RunConfig, ranks: Ranks) -> Fingerprint:
    """Return everything that the results of a run depend on; megakd's version does not count."""
    fields = {k: v for k, v in flatten(config_tree(config)).items() if not _is_free(k)}
    best = fields.get("eval.keep_best")
    chooses = best or (best is None and fields.get("eval.eval_steps") is not None)
    if not (chooses or any(fields[k] for k in fields if k.endswith("early_stopping_patience"))):
        fields["eval.eval_steps"] = None  # no evaluation decides which weights the run returns
    for section, train in config.trainings.items():
        rows = train.per_device_train_batch_size * train.gradient_accumulation_steps
        fields[f"{section}: {_ROWS}"] = rows * ranks.world_size
        fields.pop(f"{section}.bf16", None)
        fields[f"{_DEVICE}{section}"] = training_dtype(train, ranks.device.type)
    for name, spec in config.teacher_specs.items():
        if spec.dtype is None:
            fields[f"{_DEVICE}{config.key_of(name)}"] = ranks.device.type
    for key, place in places(config):
        if key != "output_dir" and not key.endswith(".cache"):
            fields |= _files(key, str(place))
    return json.loads(atomic.json_text(fields))


def asked_of(config: RunConfig) -> Fingerprint:
    """Return the keys that a finished run may change to do more: lengths, times, `final/`."""
    fields = flatten(config_tree(config)).items()
    keys = (*_LENGTHS, "save.onnx", "save.dtype")
    asked = {k: v for k, v in fields if k in keys or k.startswith("eval.latency")}
    return json.loads(atomic.json_text(asked))


def _is_free(key: str) -> bool:
    words = key.split(".")
    is_place = "server" in words and not {*words}.isdisjoint(_PLACES)
    free = "deepspeed" in words or is_place or key in _LENGTHS
    return free or key.startswith(_FREE_SECTIONS) or key.endswith(_FREE)


def _files(key: str, place: str) -> Iterator[tuple[str, str]]:
    """Yield the size and time of the files of a place, or the revision of a name of the Hub."""
    paths = [Path(path) for path in sorted(glob.glob(str(in_home(place)), recursive=True))]  # noqa: PTH207
    for path in paths:
        inside = path.glob("*") if key.endswith(".model") else path.rglob("*")
        for file in [path] if path.is_file() else sorted(inside):
            name = file.relative_to(path.parent)
            if file.is_file() and file.name != CARD and not any(p[0] == "." for p in name.parts):
                facts = file.stat()
                when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(facts.st_mtime))
                yield f"{_FILE}{key} {name}", f"{facts.st_size} bytes of {when}"
    if not paths and (name := hub_id(place)) is not None:
        kind = "model" if key.endswith((".model", ".tokenizer")) else "dataset"
        folder = repo_folder_name(repo_id=name, repo_type=kind)
        ref = Path(constants.HF_HUB_CACHE) / folder / "refs" / "main"
        if ref.is_file():
            yield f"{_REVISION}{key}", ref.read_text(encoding="utf-8").strip()


def check_identity(out: Path, facts: Fingerprint, *, is_finished: bool = False) -> None:
    """Refuse another run than that of the folder, once it has a result.

    What a Hub's name stands for is compared if both starts had it in the cache. Files that are gone
    and the device do not count for a finished run, which computes nothing.
    """
    record = read_record(out)
    if record is None or not _has_results(out):
        return
    before = record["facts"]

    def counts(key: str) -> bool:
        if is_finished and key.startswith(_DEVICE):
            return False
        optional = (_REVISION, _FILE) if is_finished else (_REVISION,)
        return not key.startswith(optional) or (key in before and key in facts)

    there, here = ({k: v for k, v in of.items() if counts(k)} for of in (before, facts))
    differing = differences(there, here)
    if differing:
        raise CheckpointError(
            f"{out} holds a run of another config ({differing}); use another output_dir, use that "
            f"config again{_same_rows(there, here)}, or start over with rm -r {quote(str(out))}; "
            f"a run with another output_dir may start from its models, such as {out / 'final'} and "
            f"{out / 'stages'}/NAME"
        )


def _same_rows(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    rows = there.get(f"train: {_ROWS}")
    if rows in (None, here.get(f"train: {_ROWS}")):
        return ""
    product = "per_device_train_batch_size x gradient_accumulation_steps x ranks"
    return f" ({product} must be {rows}, so the ranks must divide {rows})"


def begin_run(config: RunConfig, ranks: Ranks) -> None:
    """Write the identity of a run at its first start, and compare it at a later one.

    Call on rank 0 while the folder is held, when the inputs were read: models and data of the Hub
    are in the cache then.
    """
    out, facts = config.output_dir, run_facts(config, ranks)
    check_identity(out, facts)
    if read_record(out) is None or not _has_results(out):
        atomic.write_text(out / CONFIG, dump_config(config))
        atomic.write_json(out / RUN, {"format": FORMAT, "facts": facts})


def _has_results(out: Path) -> bool:
    # A start that was refused, by a cache or a server for example, leaves none.
    return any(any((out / folder).glob("*")) for folder in ("stages", "checkpoints"))
