"""vLLM servers that read new weights from a folder while they run.

Protocol of vLLM 0.33 with VLLM_SERVER_DEV_MODE=1: `/collective_rpc` calls `reload_weights` of all
workers (vllm/entrypoints/serve/dev/rpc/api_router.py, v1/worker/gpu_worker.py) while the engine is
paused; `/pause`, `/resume`, `/is_paused`, `/update_weight_version` and `/weight_info` are those of
vllm/entrypoints/rl/online/api_router.py, and answers state `weight_versions` on request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megakd.errors import ServerError
from megakd.servers.fields import field_of
from megakd.servers.vllm import VllmServer

if TYPE_CHECKING:
    from pathlib import Path

    from megakd.servers.http import Reply
    from megakd.servers.protocol import ServedModel, ServedText, TextRequest


class VllmWeightServer(VllmServer):
    """A vLLM server whose weights a run replaces."""

    def describe(self) -> list[ServedModel]:
        """Return the base models, and which weights they have; see `TextServer`.

        Raises:
            ServerError: the server does not take weights.
        """
        models = super().describe()
        info = _in_development(self._http.get("/weight_info")).tree()
        weights = field_of(info, "weight_version", str, self.url)
        paused = field_of(self._http.get("/is_paused").tree(), "is_paused", bool, self.url)
        return [model._replace(weights=weights, paused=paused) for model in models]

    def complete(self, request: TextRequest) -> ServedText:
        """Continue one prompt, and require the version of the weights; see `TextServer`."""
        text = super().complete(request)
        if text.weights is None:
            raise ServerError(
                f"{self.url}: the answer has no weight_versions, which vLLM states from 0.33 on; "
                "use a newer version of vLLM, or push: adapter"
            )
        return text

    def load_weights(self, folder: Path, version: str) -> None:
        """Replace the weights of the model by those of a folder that the server can read.

        The server finishes its texts, answers 503 while it reads the folder, and forgets all
        cached prefixes. A server that fails stays paused, because its weights are incomplete. Later
        answers state `version`.
        """
        self._control("/pause?mode=wait").check()
        self._reload(folder, version)
        emptied = self._control("/reset_prefix_cache?reset_external=true")
        if field_of(emptied.tree(), "success", bool, self.url) is not True:
            raise ServerError(
                f"{emptied.where} did not empty the cache of prefixes, which belong to earlier "
                "weights; restart the server, without a connector for its cache if it has one"
            )
        self._control("/update_weight_version", {"new_version": version}).check()
        self._control("/resume").check()

    def _reload(self, folder: Path, version: str) -> None:
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        reply = self._control("/collective_rpc", call)
        if reply.status != 200:
            raise ServerError(
                f"{reply.where} answered {reply.status} and did not load {version} from {folder}: "
                f"{reply.text}; the server must be able to read the folder, and must have been "
                "started with a model of the same config; the server is paused now, until a run "
                "pushes weights that the server can load, or the server is restarted"
            )

    def _control(self, path: str, body: dict[str, Any] | None = None) -> Reply:
        return _in_development(self._http.post(path, body or {}))


def _in_development(reply: Reply) -> Reply:
    if reply.status == 404:
        raise ServerError(
            f"{reply.where} answered 404; push: full needs vLLM 0.33 or later, started with the "
            "environment variable VLLM_SERVER_DEV_MODE=1"
        )
    return reply
