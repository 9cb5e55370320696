"""Script that caches the teachers' outputs, so that the same config then trains from the cache.

Usage: `deepspeed launch/cache_teacher.py --config F [key=value ...]`. The script also runs under
torchrun, srun and plain python.
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
