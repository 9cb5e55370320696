"""Servers with the API of OpenAI, over HTTP; of vLLM also token numbers and new weights.

Proxies of the environment are not used: inference servers are inside the cluster.

Protocol: https://docs.vllm.ai, "OpenAI-Compatible Server" and "LoRA Adapters"; the fields are those
of `CompletionRequest` and `CompletionResponseChoice` in vllm/entrypoints/openai.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import httpx2
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, NonNegativeInt, ValidationError, create_model
from transformers import PreTrainedTokenizerBase
from typing_extensions import TypedDict

from megakd.config.sections import Sampling
from megakd.errors import ServerError
from megakd.models.generation import Completion

BUSY = (429, 502, 503, 504)
"""Status codes of a server, or of a gateway before the server, that may answer later."""

PATIENCE_S = 60.0
"""Seconds in which a server may be gone during a run, such as behind a switch that fails over."""

FIRST_PATIENCE_S = 0.5
"""Seconds in which a server must accept a connection before the run."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 5.0

_SHOWN = 400  # characters of an answer in a message

T = TypeVar("T")


class Reply(NamedTuple):
    """The answer to a request; `where` is its method and address, for messages."""

    status: int
    text: str
    where: str

    def check(self) -> None:
        if self.status != 200:
            raise ServerError(f"{self.where} answered {self.status}: {self.text[:_SHOWN]}")

    def read(self, key: str, kind: type[T]) -> T:
        """Return the value of a key in the JSON of an answer with status 200."""
        self.check()
        try:
            return getattr(_answer_with(key, kind).model_validate_json(self.text), key)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ServerError(
                f"{self.where}: the answer cannot be read ({place}: {first['msg']}): "
                f"{self.text[:_SHOWN]}; check the address, and the version of the server"
            ) from error


@functools.cache
def _answer_with(key: str, kind: Any) -> type[BaseModel]:
    fields: Any = {key: (kind, ...)}
    return create_model("Answer", **fields)


class JsonServer:
    """A server that is asked by JSON over HTTP; calls from several threads are independent.

    Args:
        time_limit_s: seconds for the answer to one request, including all retries.
        key: of an API that asks for one.
        patience_s: seconds in which a server that gives no whole answer is asked again: the name is
            not resolved, or the connection is refused or lost, also in the middle of an answer.
    """

    def __init__(
        self,
        url: str,
        *,
        time_limit_s: float,
        patience_s: float = PATIENCE_S,
        key: str | None = None,
    ) -> None:
        self.url = url
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._limit, self._patience = time_limit_s, min(patience_s, time_limit_s)
        # A connection per request: servers close those that idle between two steps.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        self._client = httpx2.Client(trust_env=False, limits=limits, headers=headers)

    def ask(self, path: str, tree: Any = None) -> Reply:
        """Return the answer to GET, or to POST with a JSON body, whatever its status.

        A busy server and lost connections are asked again with pauses that double. A request may
        therefore arrive twice, and must have the same effect twice.
        """
        method = "GET" if tree is None else "POST"
        where, pause = f"{method} {self.url}{path}", _FIRST_PAUSE_S
        began, lost = time.monotonic(), math.inf
        while True:
            left = max(self._limit - (time.monotonic() - began), 0.001)
            # A host that drops packets must not take the time of an answer.
            timeout = httpx2.Timeout(left, connect=min(left, self._patience + 5))
            try:
                answer = self._client.request(method, self.url + path, json=tree, timeout=timeout)
                if answer.status_code not in BUSY:
                    return Reply(answer.status_code, answer.text, where)
                reason = f"it is busy: {answer.status_code}: {answer.text[:_SHOWN]}; try later"
                lost = math.inf
            except (httpx2.ReadTimeout, httpx2.WriteTimeout) as error:
                raise ServerError(
                    f"{where} got no answer within {self._limit:g} s; see the log of the server"
                ) from error
            except httpx2.TransportError as error:
                # A connection may be lost after a long wait for an answer: the patience begins
                # there.
                reason = f"{type(error).__name__}: {error}; start it, or correct the address"
                lost = min(lost, time.monotonic())
            now = time.monotonic()
            if now + pause >= min(began + self._limit, lost + self._patience):
                raise ServerError(f"{where}: no answer in {now - began:.1f} s: {reason}")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)


def running_calls(calls: Sequence[Callable[[], T]], *, at_once: int) -> Callable[[], list[T]]:
    """Start calls in threads of their own, which do not keep the process from ending.

    They start in order, `at_once` at a time, and contain no collectives. After the first error no
    further call is started.

    Returns:
        What waits for all calls, and returns their results in the order of the calls.
    """
    waiting = deque(enumerate(calls))
    results: dict[int, T] = {}
    errors: dict[int, Exception] = {}

    def work() -> None:
        while not errors:
            try:
                number, call = waiting.popleft()
            except IndexError:  # no call is left
                return
            try:
                results[number] = call()
            except Exception as error:  # noqa: BLE001 - raised again in the caller's thread
                errors[number] = error

    def finished() -> list[T]:
        for thread in threads:
            thread.join()
        if errors:
            raise errors[min(errors)]
        return [results[number] for number in sorted(results)]

    # The threads of concurrent.futures would be joined at the exit of a run that has failed.
    threads = [
        threading.Thread(target=work, name=f"megakd-request-{number}", daemon=True)
        for number in range(min(at_once, len(calls)))
    ]
    for thread in threads:
        thread.start()
    return finished


class Requirements(NamedTuple):
    """The requirements of a run on its servers.

    name: the name or the path of the model.
    longest: tokens of the longest prompt and its text.
    vocabulary: number of tokens that the models and the tokenizer have.
    end_tokens: the tokens that end a text.
    padding: further tokens of the served model, which are never generated.
    takes_weights: the run replaces the weights of the model.
    tokenizer: encodes the texts of servers that return no token numbers.
    """

    name: str
    longest: int
    vocabulary: int
    end_tokens: tuple[int, ...] = ()
    padding: range = range(0)
    takes_weights: bool = False
    tokenizer: PreTrainedTokenizerBase | None = None


class ServedModel(NamedTuple):
    """The statements of a server about its model.

    is_vllm: False: another program with the API of OpenAI, which gets and returns no token numbers.
    weights: version of the weights that the model has now; None: not stated.
    paused: whether the server answers no text until it gets weights; a run was killed while the
        server loaded weights, or the server has failed to load weights.
    """

    name: str
    is_vllm: bool = True
    weights: str | None = None
    paused: bool = False


class BestTokens(NamedTuple):
    """The most likely tokens at the positions of a text, most likely first, in arrays [T, k].

    logprobs: natural logarithms of the softmax over the whole vocabulary.
    """

    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]


class _Card(BaseModel):
    id: str
    root: str | None = None
    parent: str | None = None  # of adapters
    owned_by: str | None = None
    max_model_len: int | None = None


class _Span(BaseModel):
    version: str


class _Logprob(TypedDict):  # a tenth of the time of a model
    logprob: float


class _Choice(BaseModel):
    text: str = ""
    finish_reason: str
    token_ids: list[NonNegativeInt] | None = None
    prompt_token_ids: list[NonNegativeInt] | None = None
    weight_versions: list[_Span] | None = None
    prompt_logprobs: list[dict[NonNegativeInt, _Logprob] | None] | None = None


class VllmServer(JsonServer):
    """One replica of a server; its methods may run in several threads, and raise `ServerError`."""

    def model(self, requirements: Requirements) -> ServedModel:
        """Return the served model, after checking that it is the right one with enough context."""
        cards = [card for card in self._cards() if card.parent is None]
        card = next((card for card in cards if _has_name(card, requirements.name)), None)
        if card is None:
            names = ", ".join(card.id for card in cards) or "no model"
            raise ServerError(
                f"{self.url} serves {names}, and the run needs {requirements.name}; start the "
                "server with that model, or set server.model to the name of the served model"
            )
        if card.max_model_len is not None and card.max_model_len < requirements.longest:
            raise ServerError(
                f"{self.url} has a context of {card.max_model_len} tokens, and the longest prompt "
                f"and its text have {requirements.longest}; start the server with a larger "
                "context, or shorten the texts"
            )
        model = ServedModel(card.id, is_vllm=card.owned_by == "vllm")
        if not requirements.takes_weights:
            return model
        weights = self._control("/weight_info").read("weight_version", str)
        paused = self._control("/is_paused").read("is_paused", bool)
        return model._replace(weights=weights, paused=paused)

    def complete(
        self,
        prompt: tuple[int, ...],
        seed: int,
        sampling: Sampling,
        requirements: Requirements,
        *,
        model: ServedModel,
    ) -> Completion:
        """Continue a prompt by a model, whose answers state its `weights` if it has any."""
        body: dict[str, Any] = {
            "model": model.name,
            "prompt": list(prompt),
            "max_tokens": sampling.max_new_tokens,
            "n": 1,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if not model.is_vllm:
            body |= {"seed": seed % 2**31}
            body |= {} if sampling.top_k is None else {"top_k": sampling.top_k}
            (choice,) = self.ask("/v1/completions", body).read("choices", tuple[_Choice])
            ids = _encoded(choice, sampling.max_new_tokens, requirements)
            return _completion(ids, sampling.max_new_tokens, requirements, self.url)
        body |= {
            "seed": seed,
            # All sampling rules: vLLM takes others from the generation config of its model.
            "top_k": -1 if sampling.top_k is None else sampling.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(requirements.end_tokens),
            # The smallest number that vLLM adds to a logit; the token is never drawn in practice.
            "logit_bias": {str(token): -100.0 for token in requirements.padding} or None,
            # Otherwise vLLM adds the end tokens of the served folder.
            "ignore_eos": True,
            "return_token_ids": True,
            "return_weight_versions": True,
        }
        (choice,) = self.ask("/v1/completions", body).read("choices", tuple[_Choice])
        if choice.token_ids is None or choice.prompt_token_ids != body["prompt"]:
            raise ServerError(
                f"{self.url}: the answer has no token_ids, or is about another prompt than the one "
                f"of {len(prompt)} tokens that was sent; use a newer version of vLLM"
            )
        text = _completion(choice.token_ids, sampling.max_new_tokens, requirements, self.url)
        if not text.finished and len(text.ids) < sampling.max_new_tokens:
            raise ServerError(
                f"{self.url}: the text was broken off after {len(text.ids)} tokens (finish_reason "
                f"{choice.finish_reason}), and {sampling.max_new_tokens} were asked for; see the "
                "log of the server, or start vLLM with a larger --max-model-len"
            )
        if model.weights is not None:
            # A text that several weights have sampled has all versions.
            stated = ", ".join({span.version: None for span in choice.weight_versions or ()})
            if not stated:
                raise ServerError(
                    f"{self.url}: the answer has no weight_versions, which vLLM states from 0.33 "
                    "on; use a newer version of vLLM, or push: adapter"
                )
            if stated != model.weights:
                raise ServerError(
                    f"{self.url}: the text was generated with the weights {stated}, and "
                    f"{model.weights} were pushed; the server was restarted, or another run uses it"
                )
        return text

    def top_k(self, ids: tuple[int, ...], count: int, model: str) -> BestTokens:
        """Return the most likely next tokens after each token of a text but the last."""
        body = {"model": model, "prompt": list(ids), "max_tokens": 1, "n": 1, "temperature": 0.0}
        body |= {"prompt_logprobs": count, "return_token_ids": True}
        reply = self.ask("/v1/completions", body)
        if reply.status == 400:
            raise ServerError(
                f"{reply.where} answered 400: {reply.text}; start vLLM with --max-logprobs {count} "
                f"and --max-model-len of at least {len(ids) + 1}"
            )
        (choice,) = reply.read("choices", tuple[_Choice])
        entries = [entry for entry in choice.prompt_logprobs or () if entry is not None]
        # The first token has no prediction.
        if choice.prompt_token_ids != list(ids) or len(entries) != len(ids) - 1:
            raise ServerError(f"{self.url}: the answer is not about the text that was sent")
        sizes = [len(entry) for entry in entries]
        if min(sizes, default=count) < count:
            raise ServerError(
                f"{self.url}: {min(sizes)} tokens came back at a position instead of {count}"
            )
        # vLLM adds the token of the text to the best tokens.
        tokens = np.zeros((len(entries), max(sizes, default=count)), dtype=np.int32)
        logprobs = np.full(tokens.shape, -np.inf, dtype=np.float32)
        for place, entry in enumerate(entries):
            tokens[place, : len(entry)] = list(entry)
            logprobs[place, : len(entry)] = [about["logprob"] for about in entry.values()]
        order = np.lexsort((tokens, -logprobs))[:, :count]
        best = BestTokens(
            np.take_along_axis(tokens, order, 1), np.take_along_axis(logprobs, order, 1)
        )
        # The sum of the probabilities of a position has room for rounding in 16 bits.
        sums = np.exp(best.logprobs).sum(axis=1)
        if not (np.isfinite(best.logprobs).all() and (sums < 1.01).all()):
            raise ServerError(f"{self.url}: the answers are no log-probabilities of one softmax")
        return best

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load the adapters of a folder in the format of peft under a name that is new."""
        body = {"lora_name": name, "lora_path": str(folder)}
        reply = self.ask("/v1/load_lora_adapter", body)
        if reply.status == 400 and name in self.adapters():
            return  # the request has arrived before, and its answer was lost
        if reply.status == 404:
            raise ServerError(
                f"{reply.where} answered 404: {reply.text}; start vLLM with --enable-lora and "
                f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and let the server read {folder}"
            )
        reply.check()

    def unload_adapter(self, name: str) -> None:
        reply = self.ask("/v1/unload_lora_adapter", {"lora_name": name})
        if reply.status != 404 or name in self.adapters():
            reply.check()

    def adapters(self) -> list[str]:
        return [card.id for card in self._cards() if card.parent is not None]

    def _cards(self) -> list[_Card]:
        return self.ask("/v1/models").read("data", list[_Card])

    def load_weights(self, folder: Path, version: str) -> None:
        """Replace the weights of the model by those of a folder that the server can read.

        The server finishes its texts, answers 503 while it reads the folder, and forgets all
        cached prefixes. A server that fails stays paused, because its weights are incomplete. Later
        answers state `version`.
        """
        self._control("/pause?mode=wait", {}).check()
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        reply = self._control("/collective_rpc", call)
        if reply.status != 200:
            raise ServerError(
                f"{reply.where} answered {reply.status} and did not load {version} from {folder}: "
                f"{reply.text}; the server must be able to read the folder, and must have been "
                "started with a model of the same config; the server is paused now, until a run "
                "pushes weights that the server can load, or the server is restarted"
            )
        emptied = self._control("/reset_prefix_cache?reset_external=true", {})
        if not emptied.read("success", bool):
            raise ServerError(
                f"{emptied.where} did not empty the cache of prefixes, which belong to earlier "
                "weights; restart the server, without a connector for its cache if it has one"
            )
        self._control("/update_weight_version", {"new_version": version}).check()
        self._control("/resume", {}).check()

    def _control(self, path: str, body: dict[str, Any] | None = None) -> Reply:
        reply = self.ask(path, body)
        if reply.status == 404:
            raise ServerError(
                f"{reply.where} answered 404; push: full needs vLLM 0.33 or later, started with "
                "the environment variable VLLM_SERVER_DEV_MODE=1"
            )
        return reply


def _has_name(card: _Card, name: str) -> bool:
    stated = [text for text in (card.id, card.root) if text]
    is_place = any(Path(s).exists() and Path(s).resolve() == Path(name).resolve() for s in stated)
    return name in stated or is_place


def _encoded(choice: _Choice, most: int, requirements: Requirements) -> list[int]:
    """Return the tokens of a text without token numbers, and its end token if that has room."""
    tokenizer, ends = requirements.tokenizer, requirements.end_tokens
    if tokenizer is None:
        raise TypeError("a text without token numbers needs a tokenizer")
    ids = tokenizer(choice.text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]
    return [*ids, *([end] if choice.finish_reason == "stop" else [])][:most]


def _completion(ids: Sequence[int], most: int, requirements: Requirements, url: str) -> Completion:
    """Return a text up to its first end token."""
    if not 0 < len(ids) <= most:
        raise ServerError(
            f"{url}: a text of {len(ids)} tokens came back, and 1 to {most} were asked for"
        )
    if max(ids) >= requirements.vocabulary:
        raise ServerError(
            f"{url}: the text holds token {max(ids)}, and the student and its tokenizer have "
            f"{requirements.vocabulary} tokens; the server serves a model with another vocabulary"
        )
    for place, token in enumerate(ids):
        if token in requirements.end_tokens:
            return Completion(tuple(ids[: place + 1]), finished=True)
    return Completion(tuple(ids), finished=False)
