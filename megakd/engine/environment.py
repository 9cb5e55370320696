"""Variables of the environment that a launcher has not passed on to all ranks."""

from __future__ import annotations

import logging
import os
import socket

from megakd.engine.collectives import gather

logger = logging.getLogger(__name__)
PREFIXES = ("MEGAKD_", "HF_", "GLOO_", "TRITON_", "TORCH_EXTENSIONS_DIR", "TOKENIZERS_")


def warn_of_missing_variables() -> None:
    """Warn of variables that rank 0 has and other ranks lack; a collective.

    DeepSpeed's launcher starts other nodes with a few variables only.
    """
    own = sorted(name for name in os.environ if name.startswith(PREFIXES))
    found = gather((socket.gethostname(), own))
    wanted = set(found[0][1])
    for host in dict.fromkeys(host for host, _ in found):
        lacking = [wanted - set(names) for other, names in found if other == host]
        missing = sorted(set[str]().union(*lacking))
        if missing:
            logger.warning(
                "%s lacks variables that rank 0 has: %s; add lines NAME=VALUE to the file "
                ".deepspeed_env in the folder of the launcher, which passes them on",
                host,
                ", ".join(missing),
            )
