"""Wheels for `carry.py`: what a machine with a GPU, torch and no network still needs.

`python benchmarks/gpu_day/pack.py [--to .whl] [--python 3.12]`, in the root of the checkout, on a
machine with a package index. The wheels (22 MiB) are those of `constraints.txt`, of megakd itself,
and of the losses that `python -m bench` compares with. torch, Triton, numpy, tokenizers and
huggingface_hub are expected on the machine with the GPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
NEEDED = (
    "transformers", "datasets", "dill", "multiprocess", "hjson", "pydantic", "pydantic_core",
    "annotated-types", "typing-inspection", "typing_extensions", "pytest", "pytest-xdist",
)  # fmt: skip
PEERS = ("liger-kernel==0.8.5", "trl==1.16.0", "cut-cross-entropy==25.1.1")
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=Path(".whl"))
    parser.add_argument("--python", default="3.12", help="version on the machine with the GPU")
    given = parser.parse_args()
    given.to.mkdir(exist_ok=True)
    platforms = [word for name in PLATFORMS for word in ("--platform", f"{name}_x86_64")]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    foreign = ["--python-version", given.python, "--implementation", "cp", *platforms]
    download = [*pip, "download", "--no-deps", "--only-binary=:all:", *foreign]
    subprocess.run([*download, "--dest", given.to, *pinned(), *PEERS], check=True)
    # DeepSpeed has no wheel for Linux; what pip builds serves every Python.
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", given.to]
    subprocess.run([*wheel, *pinned(("deepspeed",)), str(ROOT)], check=True)
    size = sum(file.stat().st_size for file in given.to.iterdir())
    print(f"{given.to}: {size / 2**20:.0f} MiB; next, beside the checkout on the machine with the")
    print(f"GPU: python3 benchmarks/gpu_day/carry.py --wheels {given.to} --to FOLDER")
    return 0


def pinned(names: tuple[str, ...] = NEEDED) -> list[str]:
    """Return the requirements of these packages, as `constraints.txt` pins them."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(line.partition("==")[0]): line for line in lines if "==" in line}
    return [pins[canonicalize_name(name)] for name in names]


if __name__ == "__main__":
    sys.exit(main())
