"""Keeps the teachers' answers: `deepspeed launch/cache_teacher.py --config F [key=value ...]`.

The same config trains from them afterwards. Also starts under torchrun, srun and plain python.
"""

import sys

try:
    from megakd.cli import main
except ModuleNotFoundError as error:
    if error.name != "megakd":
        raise
    sys.exit("megakd is not installed in this Python: run `make install`, or `pip install -e .`")

if __name__ == "__main__":
    sys.exit(main(["cache", *sys.argv[1:]]))
