"""A folder is checked before anything is computed for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megakd.errors import ConfigError
from megakd.storage.folders import check_writable


def test_a_file_in_the_place_of_a_folder_is_refused_with_the_option(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(ConfigError, match=r"--to: .*file is not a writable folder"):
        check_writable(tmp_path / "file" / "deep", where="--to")
    check_writable(tmp_path / "deep" / "deeper", where="--to")
