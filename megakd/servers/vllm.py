"""vLLM servers: `/v1/completions` with token numbers, and weights or adapters loaded at run time.

Protocol: https://docs.vllm.ai, "OpenAI-Compatible Server" and "LoRA Adapters"; the fields are those
of `CompletionRequest` and `CompletionResponseChoice` in vllm/entrypoints/openai.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megakd.contract.completions import Sampling
from megakd.errors import ServerError
from megakd.servers.http import JsonServer, Reply, field_of, numbers_of, reads_answers


class ServedModel(NamedTuple):
    """The statements of a server about its model.

    names: all names and paths by which the server states the model.
    version: version of the server's program.
    context: largest number of tokens of prompt and completion.
    weights: version of the weights that the model has now; None: not stated.
    paused: whether the server answers no text until it gets weights; a run was killed while the
        server loaded weights, or the server has failed to load weights.
    """

    name: str
    names: tuple[str, ...]
    version: str
    context: int
    weights: str | None = None
    paused: bool = False


class TextRequest(NamedTuple):
    """A prompt to continue.

    model: name of the model, or of the adapter, that continues the prompt.
    end_tokens: the tokens that end a text.
    padding: tokens of the model that are never generated, because no tokenizer knows them.
    """

    prompt: tuple[int, ...]
    seed: int
    sampling: Sampling
    model: str
    end_tokens: tuple[int, ...]
    padding: range = range(0)


class ServedText(NamedTuple):
    """The answer of a server to a `TextRequest`, not yet checked.

    ids: the generated tokens, with the token that ended the text.
    reason: why the text ends: `stop`, `length`, or another word of the server.
    prompt: the tokens that the server has continued.
    weights: version of the weights that generated the text; None: not stated.
    """

    ids: tuple[int, ...]
    reason: str
    prompt: tuple[int, ...]
    weights: str | None = None


class BestTokens(NamedTuple):
    """The most likely tokens at the positions of a text, most likely first, in arrays [T, k].

    logprobs: natural logarithms of the softmax over the whole vocabulary.
    """

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]


class VllmServer:
    """One replica of a server; its methods may run in several threads, and raise `ServerError`."""

    def __init__(self, http: JsonServer) -> None:
        self._http, self.url = http, http.url

    @reads_answers
    def describe(self) -> list[ServedModel]:
        """Return the base models that the server serves; without adapters."""
        version = field_of(self._http.get("/version").tree(), "version", str, self.url)
        return [
            ServedModel(
                name=card["id"],
                names=(card["id"], card.get("root") or card["id"]),
                version=version,
                context=field_of(card, "max_model_len", int, self.url),
            )
            for card in self._cards()
            if card.get("parent") is None
        ]

    @reads_answers
    def complete(self, request: TextRequest) -> ServedText:
        reply = self._http.post("/v1/completions", _body_of(request)).tree()
        choices = field_of(reply, "choices", list, self.url)
        if len(choices) != 1:
            raise ServerError(f"{self.url}: {len(choices)} texts came back for one prompt")
        choice = choices[0]
        if choice.get("token_ids") is None or choice.get("prompt_token_ids") is None:
            raise ServerError(
                f"{self.url}: the answer has no token_ids and prompt_token_ids, which vLLM returns "
                "with return_token_ids; use a newer version of vLLM"
            )
        return ServedText(
            ids=numbers_of(choice, "token_ids", self.url),
            reason=field_of(choice, "finish_reason", str, self.url),
            prompt=numbers_of(choice, "prompt_token_ids", self.url),
            weights=_weights(choice, self.url),
        )

    @reads_answers
    def top_k(self, ids: tuple[int, ...], count: int, model: str) -> BestTokens:
        """Return the most likely next tokens after each token of a text but the last."""
        body = {"model": model, "prompt": list(ids), "max_tokens": 1, "n": 1}
        reply = self._http.post(
            "/v1/completions",
            body | {"temperature": 0.0, "prompt_logprobs": count, "return_token_ids": True},
        )
        if reply.status == 400:
            raise ServerError(
                f"{reply.where} answered 400: {reply.text}; start vLLM with --max-logprobs {count} "
                f"and --max-model-len of at least {len(ids) + 1}"
            )
        choices = field_of(reply.tree(), "choices", list, self.url)
        if len(choices) != 1 or choices[0].get("prompt_token_ids") != list(ids):
            raise ServerError(f"{self.url}: the answer is not about the text that was sent")
        first, *others = field_of(choices[0], "prompt_logprobs", list, self.url)
        if first is not None or len(others) != len(ids) - 1:
            raise ServerError(
                f"{self.url}: {len(others) + 1} positions came back for a text of {len(ids)} tokens"
            )
        return _best(others, count, self.url)

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load the adapters of a folder in the format of peft under a name that is new."""
        reply = self._http.post(
            "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}
        )
        if reply.status == 400 and name in self.adapters():
            return  # the request has arrived before, and its answer was lost
        if reply.status == 404:
            raise ServerError(
                f"{reply.where} answered 404: {reply.text}; start vLLM with --enable-lora and "
                f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and let the server read {folder}"
            )
        reply.check()

    def unload_adapter(self, name: str) -> None:
        reply = self._http.post("/v1/unload_lora_adapter", {"lora_name": name})
        if reply.status != 404 or name in self.adapters():
            reply.check()

    def adapters(self) -> list[str]:
        return [card["id"] for card in self._cards() if card.get("parent") is not None]

    def _cards(self) -> list[dict[str, Any]]:
        cards = field_of(self._http.get("/v1/models").tree(), "data", list, self.url)
        for card in cards:
            field_of(card, "id", str, f"{self.url}/v1/models")
        return cards


def _body_of(request: TextRequest) -> dict[str, Any]:
    # All sampling rules: a server takes others from the generation config of its model.
    sampling = request.sampling
    return {
        "n": 1,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": -1 if sampling.top_k is None else sampling.top_k,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(request.end_tokens),
        # The smallest number that vLLM adds to a logit; the token is never drawn in practice.
        "logit_bias": {str(token): -100.0 for token in request.padding} or None,
        "model": request.model,
        "prompt": list(request.prompt),
        "max_tokens": sampling.max_new_tokens,
        "seed": request.seed,
        # Otherwise vLLM adds the end tokens of the served folder.
        "ignore_eos": True,
        "return_token_ids": True,
        "return_weight_versions": True,
    }


def _weights(choice: dict[str, Any], url: str) -> str | None:
    # Versions before 0.33 state none. A text that several weights have sampled has all versions.
    if choice.get("weight_versions") is None:
        return None
    spans = field_of(choice, "weight_versions", list, url)
    return ", ".join(dict.fromkeys(field_of(span, "version", str, url) for span in spans)) or None


def _best(entries: Sequence[dict[str, Any]], count: int, url: str) -> BestTokens:
    sizes = [len(entry) for entry in entries]
    least = min(sizes, default=count)
    if least < count:
        raise ServerError(f"{url}: {least} tokens came back at a position instead of {count}")
    ids = np.zeros((len(entries), max(sizes, default=count)), dtype=np.int32)
    logprobs = np.full(ids.shape, -np.inf, dtype=np.float32)
    for place, entry in enumerate(entries):
        ids[place, : len(entry)] = numbers_of({"tokens": [*map(int, entry)]}, "tokens", url)
        logprobs[place, : len(entry)] = [about["logprob"] for about in entry.values()]
    order = np.lexsort((ids, -logprobs))[:, :count]
    best = BestTokens(np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1))
    sums = np.exp(best.logprobs).sum(axis=1)
    # The sum of the probabilities of a position has room for rounding in 16 bits.
    wrong = ~(np.isfinite(best.logprobs).all(axis=1) & (sums < 1.01))
    if wrong.any():
        shown = best.logprobs[wrong.argmax(), :4].tolist()
        raise ServerError(f"{url}: {shown} … are no log-probabilities of one softmax")
    return best


class VllmWeightServer(VllmServer):
    """A vLLM server whose weights a run replaces."""

    @reads_answers
    def describe(self) -> list[ServedModel]:
        models = super().describe()
        info = _in_development(self._http.get("/weight_info")).tree()
        weights = field_of(info, "weight_version", str, self.url)
        paused = field_of(self._http.get("/is_paused").tree(), "is_paused", bool, self.url)
        return [model._replace(weights=weights, paused=paused) for model in models]

    @reads_answers
    def complete(self, request: TextRequest) -> ServedText:
        """Continue one prompt, and require the version of the weights."""
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
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        reply = self._control("/collective_rpc", call)
        if reply.status != 200:
            raise ServerError(
                f"{reply.where} answered {reply.status} and did not load {version} from {folder}: "
                f"{reply.text}; the server must be able to read the folder, and must have been "
                "started with a model of the same config; the server is paused now, until a run "
                "pushes weights that the server can load, or the server is restarted"
            )
        emptied = self._control("/reset_prefix_cache?reset_external=true")
        if field_of(emptied.tree(), "success", bool, self.url) is not True:
            raise ServerError(
                f"{emptied.where} did not empty the cache of prefixes, which belong to earlier "
                "weights; restart the server, without a connector for its cache if it has one"
            )
        self._control("/update_weight_version", {"new_version": version}).check()
        self._control("/resume").check()

    def _control(self, path: str, body: dict[str, Any] | None = None) -> Reply:
        return _in_development(self._http.post(path, body or {}))


def _in_development(reply: Reply) -> Reply:
    if reply.status == 404:
        raise ServerError(
            f"{reply.where} answered 404; push: full needs vLLM 0.33 or later, started with the "
            "environment variable VLLM_SERVER_DEV_MODE=1"
        )
    return reply
