"""The machines of a run: versions, compilers, folders and space, compared over the ranks."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from megakd.config.run import RunConfig
from megakd.engine import nodes
from megakd.engine.collectives import gather, node_name, together
from megakd.engine.distributed import use_own_extensions_folder
from megakd.engine.memory import free_memory_bytes
from megakd.errors import MegakdError
from megakd.inputs.run_data import cache_folder
from megakd.planning.cluster import GIGA
from megakd.storage.folders import check_writable

PACKAGES = ("megakd", "torch", "deepspeed", "transformers", "datasets")
PROGRAMS = ("g++", "ninja")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - the system's name for it, no file of ours
logger = logging.getLogger(__name__)


def machine_facts(config: RunConfig) -> Iterator[str]:
    """Yield what is fine with the machines of all ranks; a collective.

    Raises:
        MegakdError: versions differ, or a folder is not writable.
    """
    yield _versions()
    yield together(_compiler)
    yield together(lambda: _folders(config))
    yield "; ".join(dict.fromkeys(gather(_space(config))))


def hosts_of(hostfile: Path) -> str:
    """Return the nodes of a hostfile, read as DeepSpeed's launcher reads it.

    Raises:
        MegakdError: a node is there twice or without slots, or no node is there.
    """
    if not hostfile.is_file():
        raise MegakdError(f"{hostfile} does not exist")
    try:
        hosts = nodes.hosts_of(hostfile)
    except ValueError as error:
        raise MegakdError(
            f"{hostfile}: {error}; write each node once, as: node-1 slots=8"
        ) from error
    return ", ".join(f"{host} with {slots} ranks" for host, slots in hosts.items())


def _versions() -> str:
    here = {name: importlib.metadata.version(name) for name in PACKAGES}
    here = {"python": platform.python_version(), **here}
    by_node = dict(gather((node_name(), here)))
    (first, wanted), *others = by_node.items()
    for node, versions in others:
        for name, version in versions.items():
            if version != wanted[name]:
                raise MegakdError(
                    f"{first} has {name} {wanted[name]}, and {node} has {version}; install the "
                    "same on all nodes"
                )
    return ", ".join(f"{name} {version}" for name, version in wanted.items())


def _compiler() -> str:
    folder = use_own_extensions_folder()
    built = sorted(path.stem for path in folder.glob("**/*.so"))
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing and not built:
        logger.warning(
            "%s lacks %s, with which DeepSpeed compiles an offloaded optimizer, and Triton its "
            "kernels, at the first start; install them for these",
            *(node_name(), " and ".join(missing)),
        )
    for lock in folder.glob("**/lock"):
        logger.warning("another process compiles or loads extensions (%s); starts wait", lock)
    done = f"extensions in {folder}: {', '.join(built)}" if built else "no extension is built"
    return done if missing else f"{done}; {' and '.join(PROGRAMS)} are there"


def _folders(config: RunConfig) -> str:
    folders = {"output_dir": config.output_dir, "MEGAKD_CACHE": cache_folder()}
    folders["TORCH_EXTENSIONS_DIR"] = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    for name, folder in folders.items():
        check_writable(folder, where=f"{name} on {node_name()}")
    return f"{', '.join(folders)} are writable on every node"


def _space(config: RunConfig) -> str:
    out = next(path for path in config.output_dir.absolute().parents if path.exists())
    free = {
        "output_dir": shutil.disk_usage(out).free,
        "memory": free_memory_bytes(torch.device("cpu")),
    }
    if SHARED_MEMORY.is_dir():
        free[str(SHARED_MEMORY)] = shutil.disk_usage(SHARED_MEMORY).free
    told = ", ".join(f"{size / GIGA:.1f} GB of {name}" for name, size in free.items())
    return f"free on {node_name()}: {told}"
