"""The first day on a GPU, in one command: `python benchmarks/gpu_day.py --out runs/gpu-day`."""

from __future__ import annotations

import importlib.util
import signal
import sys

if importlib.util.find_spec("megakd") is None:
    sys.exit(
        "gpu_day: error: this Python has no megakd; install the checkout first: "
        f"{sys.executable} -m pip install --no-deps ."
    )

# The package beside this file, which Python finds before the file.
from gpu_day.main import main

if __name__ == "__main__":
    # A part has a process group of its own, which must not outlive this program.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main(sys.argv[1:]))
