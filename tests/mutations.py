"""Break the package in forty places, one at a time, and run the tests that must notice.

    python tests/mutations.py [NUMBER ...]

Every line of the table changes one text of one file. The file is restored after its tests, also
after Ctrl+C. The exit status is 1 if the tests of a mutation pass.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutation(NamedTuple):
    """A text of a file, what replaces it, and the tests that must fail."""

    file: str
    text: str
    instead: str
    tests: str


MUTATIONS = (
    # Losses: signs, masks, divisions.
    Mutation(
        "megakd/data/batch.py",
        "isnan() if labels.is_floating_point() else labels != IGNORE",
        "isnan() if labels.is_floating_point() else labels == labels",
        "tests/losses/test_unit_counts.py",
    ),
    Mutation(
        "megakd/losses/bundle.py",
        "world_size / divisors",
        "world_size / divisors**0",
        "tests/losses",
    ),
    Mutation(
        "megakd/losses/targets.py",
        "**divergence_options(soft, inputs.weights)",
        '**divergence_options(soft, inputs.weights) | {"t_squared": False}',
        "tests/losses",
    ),
    Mutation(
        "megakd/losses/targets.py",
        "valid=valid if soft else None",
        "valid=None",
        "tests/losses",
    ),
    Mutation(
        "megakd/losses/targets.py",
        "error = (scores - target).where(counts, torch.zeros_like(scores))",
        "error = (scores - target).nan_to_num()",
        "tests/losses",
    ),
    Mutation(
        "megakd/losses/targets.py",
        "sums[self.hard_name] = out.row_ce[rows].sum() / scale",
        "sums[self.hard_name] = out.row_ce[rows].sum()",
        "tests/losses",
    ),
    Mutation(
        "megakd/losses/targets.py",
        "(p if p is None else p.detach() for p in head.read())",
        "(*head.read(),)",
        "tests/losses tests/training/test_trainer.py",
    ),
    Mutation(
        "megakd/losses/bundle.py",
        "share = 1 / trained.count(forward)",
        "share = 1.0",
        "tests/losses/test_bundle.py",
    ),
    Mutation(
        "megakd/losses/layer_terms.py",
        "/ seen.sum(-1).clamp(min=1)",
        "/ seen.shape[-1]",
        "tests/losses",
    ),
    Mutation(
        "megakd/losses/layer_terms.py", ".where(seen, torch.zeros_like(ours))", "", "tests/losses"
    ),
    Mutation(
        "kernels/megakd_kernels/row_mixtures.py",
        "out.sub_(torch.mul(self.p_exp,",
        "out.add_(torch.mul(self.p_exp,",
        "kernels tests/losses",
    ),
    # Steps, seeds and schedules.
    Mutation(
        "megakd/training/stage_run.py",
        "learning_rate=lambda step: rate(step % steps)",
        "learning_rate=lambda step: rate((step + 1) % steps)",
        "tests/training/test_stage_run.py tests/golden/test_recorded_runs.py",
    ),
    Mutation("megakd/process/seeding.py", "seed * 10007 + rank", "seed * 10007", "tests/training"),
    Mutation(
        "megakd/data/collation.py",
        "parts[1, : len(rows)] = draw",
        "parts[1, : len(rows)] = 0",
        "tests/data/test_masking.py tests/data/test_loader.py",
    ),
    Mutation(
        "megakd/data/loader.py",
        "index // self.steps_per_epoch",
        "index",
        "tests/data/test_masking.py",
    ),
    Mutation(
        "megakd/models/generation.py",
        "torch.manual_seed(seeds[rows[0]])",
        "torch.manual_seed(0)",
        "tests/models/test_generation.py",
    ),
    Mutation(
        "megakd/models/generation.py",
        "sampling.top_k or 0",
        "0",
        "tests/models/test_generation.py",
    ),
    Mutation(
        "megakd/training/best.py",
        "self._score, self.misses = score, 0",
        "self._score = score",
        "tests/training/test_early_stopping.py",
    ),
    Mutation(
        "megakd/training/best.py",
        'not score > best["score"]',
        'score > best["score"]',
        "tests/training/test_best_checkpoint.py",
    ),
    Mutation(
        "megakd/training/student.py",
        "loss if engine.zero_optimization() else loss * self.scale",
        "loss",
        "tests/distributed/test_gradients.py",
    ),
    # Files.
    Mutation(
        "megakd/process/files.py",
        "flush()\n                os.fsync(file.fileno())",
        "flush()",
        "tests/process",
    ),
    Mutation("megakd/process/files.py", "            sync_tree(temporary)\n", "", "tests/process"),
    Mutation(
        "megakd/process/files.py",
        "if aside.exists() and not path.exists():",
        "if False:",
        "tests/process",
    ),
    Mutation(
        "megakd/run/finished_run.py",
        "    if differing:",
        "    if False:",
        "tests/run/test_run_identity.py",
    ),
    Mutation(
        "megakd/training/checkpoint.py",
        "        if damage is not None:\n            raise",
        "        if False:\n            raise",
        "tests/training/test_checkpoint.py",
    ),
    # Data.
    Mutation(
        "megakd/data/rows.py",
        "np.where(answers[numbers] > 1, prompts, keys)",
        "keys",
        "tests/data",
    ),
    Mutation(
        "megakd/data/rows.py",
        "alike = np.isin(keys, keys[held])\n    if not",
        "alike = held\n    if not",
        "tests/data/test_splits.py tests/data",
    ),
    Mutation(
        "megakd/data/token_tables.py",
        "labels = np.append(ids[1:], np.int32(IGNORE))\n        start = 0",
        "labels = np.append(ids[:-1], np.int32(IGNORE))\n        start = 0",
        "tests/data",
    ),
    Mutation(
        "megakd/data/files.py",
        "            _refuse_missing(matches, key, pattern=path.name)\n",
        "",
        "tests/data",
    ),
    Mutation(
        "megakd/data/chat_tokens.py",
        "prompts = [n for n in tokens.prompts if n <= most - (not is_prompt)]",
        "prompts = tokens.prompts",
        "tests/data",
    ),
    Mutation(
        "megakd/data/collation.py",
        "np.where(chosen, ids, IGNORE)",
        "np.where(chosen | ~chosen, ids, IGNORE)",
        "tests/data/test_masking.py",
    ),
    # Models and pruning.
    Mutation(
        "megakd/config/terms.py",
        "round(s * ratio)",
        "int(s * ratio)",
        "tests/losses",
    ),
    Mutation(
        "megakd/models/lora.py",
        "(config.lora_alpha / config.r)",
        "config.lora_alpha",
        "tests/models/test_lora.py",
    ),
    Mutation(
        "megakd/training/importance.py",
        "(gradients / count.clamp(min=1)).abs()",
        "(gradients / count.clamp(min=1))",
        "tests/distributed/test_importance.py",
    ),
    Mutation(
        "megakd/training/allocation.py",
        "removed = min(self.step * round(removed / self.step), count)",
        "removed = min(self.step * int(removed / self.step), count)",
        "tests/training/test_allocation.py",
    ),
    Mutation(
        "megakd/methods/homodistil/strategy.py",
        "average.lerp_(value, 1 - BETA)",
        "average.lerp_(value, BETA)",
        "tests/methods/test_pruning_scores.py",
    ),
    Mutation(
        "megakd/methods/homodistil/__init__.py",
        "return (1 - Fraction(step // self.every * self.every, self.end)) ** 3",
        "return 1 - Fraction(step // self.every * self.every, self.end)",
        "tests/methods/test_pruning_schedule.py",
    ),
    Mutation(
        "megakd/methods/assistants.py",
        "return metric + weight * sparsity",
        "return metric - weight * sparsity",
        "tests/methods/test_tradeoff.py",
    ),
    Mutation(
        "megakd/methods/skdbert.py",
        "(scores.count(score) + 1) / 2",
        "scores.count(score)",
        "tests/methods/test_skdbert.py",
    ),
    # Servers and generated texts.
    Mutation(
        "megakd/teachers/servers.py",
        '"temperature": sampling.temperature',
        '"temperature": 1.0',
        "tests/teachers tests/training/test_servers.py",
    ),
)


def main(numbers: list[int]) -> int:
    """Run some mutations, or all; return the number that no test notices."""
    missed = 0
    for number, mutation in enumerate(MUTATIONS, 1):
        if not numbers or number in numbers:
            caught = is_caught(mutation)
            missed += not caught
            word = "caught" if caught else "MISSED"
            sys.stdout.write(f"{number:2} {word}  {mutation.file}: {mutation.instead.strip()}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{missed} missed\n")
    return int(missed > 0)


def is_caught(mutation: Mutation) -> bool:
    """Return whether the tests fail on the mutated file."""
    file = ROOT / mutation.file
    before = file.read_text(encoding="utf-8")
    if before.count(mutation.text) != 1:
        raise SystemExit(
            f"{mutation.file} has {mutation.text!r} {before.count(mutation.text)} times"
        )
    file.write_text(before.replace(mutation.text, mutation.instead), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, *mutation.tests.split()], check=False, cwd=ROOT, capture_output=True
        )
    finally:
        file.write_text(before, encoding="utf-8")
    return done.returncode == 1


if __name__ == "__main__":
    sys.exit(main([int(number) for number in sys.argv[1:]]))
