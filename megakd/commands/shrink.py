"""Cut a model to a budget, and repair it."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megakd.commands.arguments import Parser, named_folder, say
from megakd.commands.plan import print_plan
from megakd.commands.train import train
from megakd.config.file import (
    config_of,
    dump_config,
    dump_yaml,
    load_config,
    with_overrides,
)
from megakd.config.paths import expand_path
from megakd.config.run import RunConfig
from megakd.config.task import AUTO, FROM_TEACHER
from megakd.errors import ConfigError
from megakd.process.files import check_writable, write_text
from megakd.process.record import REPORT


def recipe(
    model: str,
    *,
    words: Sequence[str] = (),
    output_dir: Path | None = None,
    size: Mapping[str, str] | None = None,
    student: str | Mapping[str, Any] = "",
) -> dict[str, Any]:
    """Return the sections of a run in which a student learns from a model, without its data.

    Args:
        model: a folder or a Hub id.
        words: the overrides of the run, on which some defaults depend.
        output_dir: default: `runs/<model>-<size>`, or `runs/<model>-<student>`.
        size: `parameters`, `flops` or `speedup`, as the method `shrink` reads them; it cuts the
            model.
        student: without `size`, a folder or a Hub id, or a mapping for `student.model`.
    """
    tree = _sections(_keys_of(model), words)
    teacher = {"model": model, **tree.pop("teacher", {})}
    if any(word.startswith("objective=") for word in words):
        teacher.pop("cache", None)  # which holds outputs alone
    if size is not None:
        method, what = {"name": "shrink", **size}, next(iter(size.values()), "smaller")
    else:
        method, what = {"name": "single"}, Path(student).name if isinstance(student, str) else ""
        tree["student"]["model"] = student
    name = re.sub(r"[^\w.-]+", "-", f"{Path(model).name or 'model'}-{what or 'student'}")
    out = str(output_dir or Path("runs") / name.rstrip("-"))
    return {"output_dir": out, "teacher": teacher, **tree, "method": method}


def _sections(keys: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
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
    try:
        path = expand_path(model) / "config.json"
        if not path.parent.exists():
            from huggingface_hub import hf_hub_download

            from megakd.data.hub import silent_hub

            silent_hub()  # which may end at once what is asked next
            path = Path(hf_hub_download(model, "config.json"))
        keys = json.loads(path.read_text(encoding="utf-8"))
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


FILE = "shrink.yaml"

EXAMPLES = {"parameters": "0.6B", "flops": "12%", "speedup": "8x"}
"""Options of the size, which are options of the method too, with an example of each."""

SOURCE = "the config of megakd shrink"


def add_options(parser: Parser) -> None:
    """Add the model, the size, the text and the place of the result."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="the model to shrink: a folder or a Hub id"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="further settings of the run, such as train.learning_rate=3e-5",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--parameters", metavar="N", help="weights of the student: 0.6B, 600M or 600000000"
    )
    size.add_argument("--flops", metavar="S", help="share of the layers' operations: 12%% or 0.12")
    size.add_argument("--speedup", metavar="X", help="how much faster than the model: 8x")
    parser.add_argument(
        "--data", metavar="F", help="the rows to learn from; the same as task.dataset=F"
    )
    parser.add_argument(
        "--output_dir",
        "--output-dir",
        metavar="D",
        type=named_folder,
        help=f"the folder of the run and of {FILE}; default: runs/<model>-<size>",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        metavar="R",
        help=f"for R above 1, write {FILE} and print the command that starts R ranks on this node",
    )
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--plan", action="store_true", help="print memory and time of the run and stop"
    )
    either.add_argument(
        "--print-config", action="store_true", help="print the resolved config and stop"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the config of the options and run it, or print the config, the plan or the launch."""
    config, text = _config(arguments)
    if arguments.print_config:
        say(dump_config(config))
        return
    if arguments.plan:
        print_plan(config, arguments)
        return
    out, path = config.output_dir, config.output_dir / FILE
    check_writable(out, where="--output_dir")
    if not (out / REPORT).exists():
        write_text(path, text)
    # One rank is told by the run itself.
    elif arguments.ranks > 1 and not (path.exists() and load_config(path) == config):
        raise ConfigError(
            f"{out} holds a finished run of other settings; give another --output_dir"
        )
    if arguments.ranks == 1:
        train(config, arguments.command)
    else:
        launcher = ("deepspeed", "--num_gpus", str(arguments.ranks), "launch/train.py")
        say(shlex.join([*launcher, "--config", str(path)]))


def _config(arguments: argparse.Namespace) -> tuple[RunConfig, str]:
    _check(arguments)
    size = {key: getattr(arguments, key) for key in EXAMPLES}
    ours = recipe(
        arguments.model,
        size={key: value for key, value in size.items() if value is not None},
        words=arguments.overrides,
        output_dir=arguments.output_dir,
    )
    if arguments.data is not None:
        ours["task"]["dataset"] = arguments.data
    # The recipe of a fine-tuning is in the tree.
    words = [word for word in arguments.overrides if word != "teacher.finetune={}"]
    # The overrides are given again, so that a message names the override that is wrong.
    config = config_of(ours, words, source=SOURCE)
    comment = "\n".join(f"# {line}" for line in f"Written by: {arguments.command}".splitlines())
    return config, f"{comment}\n{dump_yaml(with_overrides(ours, words, source=SOURCE))}"


def _check(arguments: argparse.Namespace) -> None:
    if arguments.model is None or ("=" in arguments.model and not Path(arguments.model).exists()):
        sizes = " | ".join(f"--{key} {example}" for key, example in EXAMPLES.items())
        usage = f"megakd shrink MODEL {sizes} --data FILE"
        raise ConfigError(f"the model to shrink is missing; write: {usage}")
    if arguments.ranks < 1:
        raise ConfigError(f"--ranks must be at least 1 (got {arguments.ranks})")
    started = os.environ.get("WORLD_SIZE", "1")
    if started != "1":
        raise ConfigError(
            f"megakd shrink runs on one rank, and a launcher has started {started}; write the "
            f"config with --ranks {started}, and start the command that is printed"
        )
