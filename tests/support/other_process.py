"""A function of a test file, called in a process with another seed of hashes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from {module} import {name}
print({name}(Path({argument!r})))
"""


def said_elsewhere(test_file: str, name: str, argument: Path) -> str:
    """Return what the function `name` of a test file returns for a path in another process."""
    file = Path(test_file)
    code = CODE.format(folder=str(file.parent), module=file.stem, name=name, argument=str(argument))
    return subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONHASHSEED": "1", "PYTHONPATH": ":".join(sys.path), "HF_HUB_OFFLINE": "1"},
    ).stdout.strip()
