"""Upload of the finished student to the Hugging Face Hub."""

from __future__ import annotations

import logging
from pathlib import Path
from shlex import quote
from typing import cast

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from megakd.config.run import SaveConfig
from megakd.errors import ConfigError, first_line

logger = logging.getLogger(__name__)
# The bases of the Hub's error are OSError and the error of its HTTP client, which has two names.
_FAILURES = cast("tuple[type[Exception], ...]", (ValueError, *HfHubHTTPError.__bases__))


def check_hub(config: SaveConfig) -> None:
    """Check, before a run starts, that the Hub knows the token of `save.push_to_hub`."""
    try:
        HfApi().whoami()
    except _FAILURES as error:
        raise ConfigError(
            f"save.push_to_hub: {config.push_to_hub} needs a token that the Hub accepts, and the "
            f"check failed ({first_line(error)}); run `hf auth login` or set HF_TOKEN, or remove "
            "the key and upload the student later"
        ) from error


def push_to_hub(config: SaveConfig, final: Path) -> str:
    """Upload the student to `save.push_to_hub`, and return a status line.

    A finished run does not fail here: after an error, the line says how to repeat the upload.
    """
    repository = cast("str", config.push_to_hub)
    try:
        api = HfApi()
        api.create_repo(repository, private=config.hub_private, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=final, commit_message="Upload a student of megakd"
        )
    except _FAILURES as error:
        private = " --private" if config.hub_private else ""
        return (
            f"the student was not uploaded to {repository} ({first_line(error)}); upload it with: "
            f"hf upload {repository} {quote(str(final))}{private}"
        )
    return f"the student was uploaded to https://huggingface.co/{repository}"
