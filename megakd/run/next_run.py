"""finetune.yaml: the config that fine-tunes the student of a masked language model on a task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megakd.config.yaml12 import dump_yaml
from megakd.storage import atomic

if TYPE_CHECKING:
    from megakd.config.run import RunConfig

FINETUNE = "finetune.yaml"
HEADER = """\
# Fine-tunes the student of {out} on a task with labels. The task here is an example: give your own
# files, and type: regression for scores.
#   deepspeed launch/train.py --config {out}/finetune.yaml task.dataset=FILE task.label_column=NAME
"""


def write_next_config(config: RunConfig, final: Path) -> None:
    """Write finetune.yaml beside `final/` if the student is a masked language model.

    An existing file is left alone, because it belongs to the user.

    Args:
        config: the config of the run.
        final: the folder of the student.
    """
    path = config.output_dir / FINETUNE
    if config.task.type == "mlm" and not path.exists():
        atomic.write_text(path, finetune_config(config, final))


def finetune_config(config: RunConfig, final: Path) -> str:
    """Return the text of finetune.yaml: BERT's settings for GLUE (Devlin et al. 2019, A.3)."""
    tree = {
        "output_dir": str(config.output_dir / "finetuned"),
        "seed": config.seed,
        "task": {
            "type": "classification",
            "dataset": "glue/sst2",
            "max_length": config.task.max_length,
        },
        "student": {"model": str(final), "deepspeed": config.student.deepspeed},
        "method": {"name": "finetune"},
        "train": {
            "per_device_train_batch_size": 32,
            "num_train_epochs": 3,
            "learning_rate": 5e-5,
            "warmup_ratio": 0.1,
            "weight_decay": 0.01,
            "bf16": config.train.bf16,
        },
    }
    return HEADER.format(out=config.output_dir) + dump_yaml(tree)
