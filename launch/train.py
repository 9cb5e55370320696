"""Script that trains according to a run config.

Usage: `deepspeed launch/train.py --config F [key=value ...]`. The script also runs under torchrun,
srun and plain python; `--print-config` shows the resolved config.
"""

import atexit
import gc
import sys

try:
    from megakd.cli import train_main
except ModuleNotFoundError as error:
    if error.name != "megakd":
        raise
    sys.exit("megakd is not installed in this Python: run `make install`, or `pip install -e .`")

if __name__ == "__main__":
    # Skip the last garbage collections, which traverse all modules for more than a second.
    atexit.register(gc.freeze)
    sys.exit(train_main())
