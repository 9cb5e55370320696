"""SGLang servers: `/generate` with token numbers, and weights that are read from a folder.

Protocol: https://docs.sglang.io, "SGLang Native APIs", "Sampling Parameters" and "SGLang for RL
Systems"; the fields are those of `GenerateReqInput` and `UpdateWeightFromDiskReqInput` in
sglang/srt/managers/io_struct.py.
"""

from __future__ import annotations

from pathlib import Path

from megakd.errors import ServerError
from megakd.servers.http import context_of, field_of, numbers_of, reads_answers
from megakd.servers.protocol import ServedModel, ServedText, TextRequest, TextServer


class SglangServer(TextServer):
    """One replica of an SGLang server."""

    @reads_answers
    def describe(self) -> list[ServedModel]:
        path = field_of(self._http.get("/get_model_info").tree(), "model_path", str, self.url)
        cards = field_of(self._http.get("/v1/models").tree(), "data", list, self.url)
        base = [card for card in cards if card.get("parent") is None]
        name = field_of(base[0], "id", str, self.url) if base else path
        context = context_of(base[0]) if base else None
        about = self._http.get("/server_info")
        if about.status == 404:  # the name until 2026
            about = self._http.get("/get_server_info")
        version = field_of(about.tree(), "version", str, self.url)
        return [ServedModel(name, (name, path), version, context)]

    @reads_answers
    def complete(self, request: TextRequest) -> ServedText:
        rules = {
            **request.rules(),
            "max_new_tokens": request.sampling.max_new_tokens,
            "sampling_seed": request.seed % 2**31,
        }
        body = {"input_ids": list(request.prompt), "return_prompt_token_ids": True}
        reply = self._http.post("/generate", body | {"sampling_params": rules}).tree()
        if isinstance(reply, list):
            raise ServerError(f"{self.url}: {len(reply)} texts came back for one prompt")
        about = field_of(reply, "meta_info", dict, self.url)
        ended = field_of(about, "finish_reason", dict, self.url)
        ids, reason = numbers_of(reply, "output_ids", self.url), str(ended.get("type"))
        matched = ended.get("matched")
        # The token that ended the text is left out of the numbers in some versions.
        if reason == "stop" and isinstance(matched, int) and ids[-1:] != (matched,):
            ids = (*ids, matched)
        prompt = reply.get("prompt_token_ids")
        return ServedText(
            ids=ids,
            reason=reason,
            prompt=None if prompt is None else numbers_of(reply, "prompt_token_ids", self.url),
            prompt_tokens=about.get("prompt_tokens"),
            weights=about.get("weight_version"),
        )

    def load_weights(self, folder: Path, version: str) -> None:
        """Replace the weights by those of a folder; later answers state `version`."""
        body = {"model_path": str(folder), "weight_version": version}
        reply = self._http.post("/update_weights_from_disk", body)
        if reply.status != 200 or reply.tree().get("success") is not True:
            raise ServerError(
                f"{reply.where} did not load {folder}: {reply.text}; the server must be able to "
                "read the folder, and must have been started with a model of the same config"
            )
