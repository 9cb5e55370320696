"""One entrant of the race: some steps of one shape, timed; see `race.py`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gpu_day import cases
from gpu_day.llama import waits_told
from gpu_day.process import part_parser, say, skip
from lib.launching import write_config
from lib.stages import measured_stage
from megakd.config.file import load_config
from megakd.engine.memory import peak_memory_bytes, reset_peak_memory
from megakd.run.main import started

WARM_UP, TIMED = 4, 4
STEPS = WARM_UP + TIMED + 1  # in the last, the host's waits are counted
SHORTEST = 0.25
"""Tokens of the shortest row of a padded batch, as a share of the longest."""


class Shape(NamedTuple):
    """Rows of a batch and their longest length; `padded`: rows of evenly spaced lengths."""

    tree: Callable[..., dict[str, Any]]
    rows: int
    length: int
    padded: bool = False

    def lengths(self, *, rehearse: bool) -> list[int]:
        length = min(self.length, 32) if rehearse else self.length
        shortest = int(length * SHORTEST) if self.padded else length
        return torch.linspace(shortest, length, self.rows).long().tolist()


SHAPES = {
    "llama-padded": Shape(cases.llama_tree, 32, 1024, padded=True),
    "llama-packed": Shape(cases.llama_tree, 4, 4096),
    "smollm2": Shape(cases.smollm2_tree, 16, 2048),
}


class Watch:
    """Called after every step: seconds and peak of the timed ones, waits of the last one."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.step = device, 0
        self.seconds = self.peak_gb = 0.0
        self.waits: int | None = None
        self._counting = ExitStack()
        self._told: list[warnings.WarningMessage] = []

    def __call__(self) -> None:
        self.step += 1
        on_gpu = self.device.type == "cuda"
        if on_gpu and self.step in {WARM_UP, WARM_UP + TIMED}:
            torch.cuda.synchronize(self.device)
        if self.step == WARM_UP:
            reset_peak_memory(self.device)
            self._since = time.perf_counter()
        elif self.step == WARM_UP + TIMED:
            self.seconds = (time.perf_counter() - self._since) / TIMED
            self.peak_gb = peak_memory_bytes(self.device) / 1e9
            if on_gpu:
                self._told = self._counting.enter_context(waits_told())
        elif self.step == STEPS and on_gpu:
            self._counting.close()
            self.waits = len(self._told)


class Race(NamedTuple):
    """What every entrant gets."""

    tree: dict[str, Any]
    lengths: list[int]
    folder: Path
    watch: Watch

    def models(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        """Return the student and the frozen teacher, in bf16 on a GPU."""
        on_gpu = self.watch.device.type == "cuda"
        dtype = torch.bfloat16 if on_gpu else torch.float32
        student, teacher = (
            AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**self.tree[role]["model"]["config"]), dtype=dtype
            ).to(self.watch.device)
            for role in ("student", "teacher")
        )
        return student.train(), teacher.eval().requires_grad_(requires_grad=False)

    def batch(self) -> dict[str, Tensor]:
        """Return random tokens [rows, length], padded on the right."""
        vocabulary = self.tree["student"]["model"]["config"]["vocab_size"]
        lengths = torch.tensor(self.lengths)
        ids = torch.randint(3, vocabulary, (len(lengths), max(self.lengths)))
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        labels = ids.masked_fill(~mask, -100)
        rows = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
        return {name: value.to(self.watch.device) for name, value in rows.items()}


def megakd(race: Race) -> None:
    config = load_config(write_config(race.folder / "run.yaml", race.tree))
    with started(config) as ranks, measured_stage(config, ranks) as (stage, _):
        steps = stage.steps_one_by_one()
        for _ in range(STEPS):
            next(steps)
            race.watch()


def loop(race: Race, *, compiled: bool = False) -> None:
    student, teacher = race.models()
    on_gpu = race.watch.device.type == "cuda"
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, fused=on_gpu)
    run: Any = [torch.compile(model) if compiled else model for model in (student, teacher)]
    for _ in range(STEPS):
        batch = race.batch()
        counts = batch["labels"][:, 1:] != -100
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            taught = run[1](**inputs).logits[:, :-1][counts].log_softmax(-1, dtype=torch.float32)
        learned = run[0](**inputs).logits[:, :-1][counts].log_softmax(-1, dtype=torch.float32)
        F.kl_div(learned, taught, reduction="batchmean", log_target=True).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        race.watch()


def trl(race: Race, *, liger: bool = False) -> None:
    for package in ("trl", *(["liger_kernel"] if liger else [])):
        if find_spec(package) is None:
            skip(f"{package} is not installed")
    if liger and race.watch.device.type == "cpu":
        skip("Liger's kernels need a GPU")
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, TrainerCallback

    gkd = import_module("trl.experimental.gkd")

    class Ended(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            race.watch()

    student, teacher = race.models()
    on_gpu = race.watch.device.type == "cuda"
    options = gkd.GKDConfig(
        output_dir=str(race.folder),
        per_device_train_batch_size=len(race.lengths),
        max_steps=STEPS,
        learning_rate=1e-5,
        lmbda=0.0,  # the rows alone
        beta=0.0,  # forward KL
        bf16=on_gpu,
        use_cpu=not on_gpu,
        use_liger_kernel=liger,
        gradient_checkpointing=False,
        optim="adamw_torch_fused" if on_gpu else "adamw_torch",
        report_to="none",
        save_strategy="no",
        logging_steps=cases.NEVER,
        dataloader_pin_memory=False,
    )
    batch = race.batch()
    gkd.GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=options,
        data_collator=lambda _: dict(batch),
        train_dataset=Dataset.from_dict({"row": list(range(STEPS * len(race.lengths)))}),
        processing_class=tokenizer_of(race, PreTrainedTokenizerFast),
        callbacks=[Ended()],
    ).train()


def tokenizer_of(race: Race, kind: Any) -> Any:
    """Return a tokenizer that the trainer asks for its pad and end tokens alone."""
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))  # noqa: S106
    return kind(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")  # noqa: S106


ENTRANTS: dict[str, Callable[[Race], None]] = {
    "megakd": megakd,
    "loop": loop,
    "compiled": partial(loop, compiled=True),
    "trl": trl,
    "trl-liger": partial(trl, liger=True),
}


def main(arguments: Sequence[str]) -> int:
    parser = part_parser(__doc__)
    parser.add_argument("entrant", choices=ENTRANTS)
    parser.add_argument("shape", choices=SHAPES)
    given = parser.parse_args(arguments)
    shape = SHAPES[given.shape]
    lengths = shape.lengths(rehearse=given.rehearse)
    longest, tokens = max(lengths), sum(lengths)
    packed = -(-tokens // longest)
    tree = shape.tree(given.folder, rehearse=given.rehearse)
    tree["task"]["max_length"] = longest
    tree["objective"] = [{"loss": "soft_target_kl"}]
    tree["train"]["per_device_train_batch_size"] = packed
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    race = Race(tree, lengths, given.folder, Watch(device))
    ENTRANTS[given.entrant](race)
    say(numbers_of_race(race, packed * longest if given.entrant == "megakd" else tokens))
    return 0


def numbers_of_race(race: Race, tokens: int) -> dict[str, Any]:
    """Return tokens and model-FLOP/s: 6 a weight of the student and token, 2 of the teacher."""
    with torch.device("meta"):
        weights = [
            AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**race.tree[role]["model"]["config"])
            ).num_parameters()
            for role in ("student", "teacher")
        ]
    seconds = race.watch.seconds
    return {
        "tokens per step": tokens,
        "seconds per step": seconds,
        "tokens/s": tokens / seconds,
        "model TFLOP/s": (6 * weights[0] + 2 * weights[1]) * tokens / seconds / 1e12,
        "peak GB": race.watch.peak_gb,
        "waits of the host per step": race.watch.waits,
    }
