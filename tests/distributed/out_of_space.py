"""`launch/train.py`, except that rank 1 may write no more than a few bytes from step 8 on."""

import os
import resource
import sys
from typing import Any

from megakd.cli import train_main
from megakd.training.checkpoint import Checkpoints

SPACE_BYTES = 1000


def main() -> int:
    save = Checkpoints.save

    def save_without_space(self: Checkpoints, step: int, *arguments: Any) -> Any:
        if step == 8 and os.environ["RANK"] == "1":
            resource.setrlimit(resource.RLIMIT_FSIZE, (SPACE_BYTES, resource.RLIM_INFINITY))
        return save(self, step, *arguments)

    Checkpoints.save = save_without_space  # pyright: ignore[reportAttributeAccessIssue]
    return train_main()


if __name__ == "__main__":
    sys.exit(main())
