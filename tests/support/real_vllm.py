"""A real vLLM server on the CPU, in an environment of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

from megakd.engine.distributed import free_port

HOW = "no vLLM: make an environment with vllm_cpu/make.sh, and set MEGAKD_VLLM as it says"
START_S = 900
VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",
}
FLAGS = ("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16", "--max-model-len", "128")


@contextmanager
def vllm_server(model: Path, log: Path, *flags: str) -> Iterator[str]:
    """Serve a model folder in the body; its address."""
    port = free_port()
    command = [os.environ["MEGAKD_VLLM"], "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--model", str(model)]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, *FLAGS, *flags],
            env=os.environ | VARIABLES,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, url, log)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urlopen(f"{url}/health", timeout=5):  # noqa: S310 - our own address
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"vLLM did not start: {log.read_text()[-3000:]}")
