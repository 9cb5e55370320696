"""Settings of every test run: CPU ranks, no network, and caches of its own."""

from __future__ import annotations

import gc
import hashlib
import os
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from one_rank import OneRank
    from whole_run import WholeRun

ROOT = Path(__file__).resolve().parents[1]
# Kept between runs and built once; compiled against one environment's torch, so each has its own.
BUILD = f"{sys.implementation.cache_tag}-{hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]}"
EXTENSIONS = ROOT / ".cache" / "torch_extensions" / BUILD
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_EXTENSIONS_DIR": str(EXTENSIONS),
}
# Set while this file is imported: the libraries read these when they are imported.
os.environ.update(ENVIRONMENT)
# No machine dies in a test, and an fsync takes milliseconds.
os.fsync = lambda _: None
# Families whose layers are built like those of BERT, Llama, Gemma 2 or an encoder of T5, which the
# same tests take.
ALIKE = """
roberta electra camembert ernie xlm-roberta xmod mistral qwen2 phi granite apertus arcee aria_text
cohere cohere2 cwm ernie4_5 exaone4 flint gemma glm glm4 granite_swa granitemoe helium
hunyuan_v1_dense hyperclovax internlm3 jais2 ministral ministral3 nanochat nemotron olmo olmo3
seed_oss smollm3 stablelm starcoder2 vaultgemma gemma3_text t5_encoder
"""
# What several test files share; worker processes import it from there too.
sys.path.insert(0, str(ROOT / "tests" / "support"))
# How long an example takes says more of the machine than of the code.
settings.register_profile("megakd", deadline=None)
settings.load_profile("megakd")


def pytest_configure(config: pytest.Config) -> None:
    """Give the run caches that start empty and go away with it."""
    # The interpreter's own scripts: torch starts ninja by name.
    scripts = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    EXTENSIONS.mkdir(parents=True, exist_ok=True)
    cache = tempfile.TemporaryDirectory(prefix="megakd-tests-", ignore_cleanup_errors=True)
    config.add_cleanup(cache.cleanup)
    os.environ["MEGAKD_CACHE"] = str(Path(cache.name) / "megakd")
    os.environ["HF_HOME"] = str(Path(cache.name) / "huggingface")
    # Modules that tests write; processes that are started inherit the path.
    packages = Path(cache.name) / "packages"
    packages.mkdir()
    sys.path.insert(0, str(packages))
    os.environ["MEGAKD_TEST_PACKAGES"] = str(packages)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `slow_tests.txt`, which took longest on two cores, and `ALIKE` as slow.

    Others of their file check the same behaviour at another ZeRO stage or with another model.
    """
    listed = set((ROOT / "tests" / "slow_tests.txt").read_text(encoding="utf-8").splitlines())
    alike = {*ALIKE.split()}
    for item in items:
        values = getattr(getattr(item, "callspec", None), "params", {})
        is_alike = any(values.get(name) in alike for name in ("family", "model_type"))
        if item.nodeid in listed or is_alike:
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Import the libraries without collections, and leave them out of all that come later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """The smallest run config as a file."""
    # Imported here: a test folder that needs no config need not import megakd.
    from run_files import RUN

    path = tmp_path / "run.yaml"
    path.write_text(RUN, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def packages() -> Path:
    """A folder whose modules can be imported, here and by `one_rank`."""
    return Path(os.environ["MEGAKD_TEST_PACKAGES"])


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; skips where there is none."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the real data in ../shared/data, which is not part of the repository")
    return folder


@pytest.fixture(scope="session")
def one_rank() -> Iterator[OneRank]:
    """Runs whole commands in one long-lived process."""
    from one_rank import OneRank

    rank = OneRank()
    yield rank
    rank.stop()


@pytest.fixture(scope="session")
def whole_run(one_rank: OneRank, tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    """A run with everything in it, finished."""
    from whole_run import start_whole_run

    return start_whole_run(one_rank, tmp_path_factory.mktemp("whole-run"))


@pytest.fixture
def process_group() -> Iterator[None]:
    """The group of one rank, in the process of the test."""
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()
