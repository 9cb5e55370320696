"""Inference servers in a thread, which replay the JSON that vLLM publishes."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Tree = Any
END, VOCABULARY = 1, 40


class Counting:
    """A model whose next token is the last plus three; it ends before it would begin again."""

    def continue_(self, prompt: list[int], rules: dict[str, Any]) -> list[int]:
        ids = [prompt[-1]]
        while len(ids) <= rules["most"] and ids[-1] not in rules["ends"]:
            following = ids[-1] + 3
            ids.append(following if following < VOCABULARY else END)
        return ids[1:]

    def load(self, folder: Path) -> None:
        """Any folder will do."""

    def scores(self, prompt: list[int]) -> list[list[float]]:
        """Log-probabilities of all next tokens after each token: the greedy token has 1/2."""
        rest = math.log(0.5 / (VOCABULARY - 1))
        result = [[rest - 0.001 * other for other in range(VOCABULARY)] for _ in prompt]
        for values, token in zip(result, prompt, strict=True):
            values[(token + 3) % VOCABULARY] = math.log(0.5)
        return result


class Stub:
    """A vLLM server; the attributes may change while it runs.

    busy: how many requests for texts are answered with `busy_status` before the next answer.
    lost: paths whose next request is followed, and whose answer is lost with the connection.
    delay_s: how long every text takes.
    development: whether the server knows the paths of VLLM_SERVER_DEV_MODE=1.
    paused: whether the server answers requests for texts with 503.
    cached: the texts that the server gives from its cache of prefixes.
    ends: the end tokens in the folder of the model.
    owner: the program, as the server states it.
    spoil: function from the path and the answer to the answer that is sent.
    """

    def __init__(self, *, name: str = "tiny", model: Any = None) -> None:
        self.name, self.model = name, model or Counting()
        self.owner, self.context = "vllm", 64
        self.path, self.weights = f"/models/{name}", "default"
        self.loaded: dict[str, str] = {}
        self.busy, self.busy_status, self.delay_s = 0, 503, 0.0
        self.lost: list[str] = []
        self.development = self.paused = False
        self.cached: dict[str, list[int]] = {}
        self.ends: list[int] = []
        self.most_logprobs = 10**6
        self.spoil: Callable[[str, Tree], Tree] = lambda _, tree: tree
        self.asked: list[tuple[str, Tree]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.url = ""

    def of(self, path: str) -> list[Tree]:
        return [body for asked, body in self.asked if asked == path]

    def answer(self, path: str, body: Tree) -> tuple[int, Tree]:
        with self.lock:
            self.asked.append((path, body))
            if path == "/v1/completions" and (self.busy or self.paused):
                self.busy = max(0, self.busy - 1)
                return self.busy_status, {"message": "loading"}
        routes = ROUTES | DEVELOPMENT if self.development else ROUTES
        if path not in routes:
            return 404, {"detail": "Not Found"}
        return routes[path](self, body)

    def restart(self) -> None:
        self.model = type(self.model)()
        self.weights, self.paused, self.cached = "default", False, {}

    def continued(self, prompt: list[int], rules: dict[str, Any]) -> list[int]:
        with self.lock:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self.delay_s)
        try:
            return self.model.continue_(prompt, rules)
        finally:
            with self.lock:
                self.at_once -= 1


def _models(stub: Stub, _: Tree) -> tuple[int, Tree]:
    card = {"object": "model", "created": 1763800000, "owned_by": stub.owner, "parent": None}
    served = card | {"id": stub.name, "root": stub.path, "max_model_len": stub.context}
    adapters = [
        card | {"id": name, "root": path, "parent": stub.name, "max_model_len": None}
        for name, path in stub.loaded.items()
    ]
    return 200, {"object": "list", "data": [served, *adapters]}


def _completion(stub: Stub, body: Tree) -> tuple[int, Tree]:
    if body["model"] not in {stub.name, *stub.loaded}:
        message = f"The model `{body['model']}` does not exist."
        error = {"message": message, "type": "NotFoundError", "param": "model", "code": 404}
        return 404, {"error": error}
    if "prompt_logprobs" in body:
        return _scored(stub, body)
    if body["temperature"] > 2:
        message = f"temperature must be in [0, 2], got {body['temperature']}."
        return 400, {"error": {"message": message, "type": "BadRequestError", "code": 400}}
    ends = body.get("stop_token_ids", []) + ([] if body.get("ignore_eos") else stub.ends)
    rules = {"most": body["max_tokens"], "ends": ends, "seed": body["seed"]}
    rules |= {"temperature": body["temperature"], "adapter": stub.loaded.get(body["model"])}
    weights = stub.weights
    ids = stub.cached.setdefault(json.dumps(body), stub.continued(body["prompt"], rules))
    choice = {
        "index": 0,
        "text": "",
        "logprobs": None,
        "finish_reason": "stop" if ids[-1] in ends else "length",
        "stop_reason": None,
        "token_ids": ids,
        "prompt_logprobs": None,
        "prompt_token_ids": body["prompt"],
        "weight_versions": None,
    }
    if body.get("return_weight_versions"):
        choice["weight_versions"] = [{"version": weights, "start": 0, "end": len(ids)}]
    counts = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(ids)}
    return 200, {
        "id": "cmpl-0b2f",
        "object": "text_completion",
        "created": 1763800000,
        "model": body["model"],
        "choices": [choice],
        "usage": counts | {"total_tokens": sum(counts.values())},
    }


def _scored(stub: Stub, body: Tree) -> tuple[int, Tree]:
    """The best tokens of every position, and always the prompt's own token."""
    prompt, count = body["prompt"], body["prompt_logprobs"]
    if count > stub.most_logprobs:
        message = f"Requested prompt logprobs of {count}, which is greater than max allowed"
        return 400, {"error": {"message": message, "type": "BadRequestError", "code": 400}}
    time.sleep(stub.delay_s)
    entries: list[Tree] = [None]
    for values, token in zip(stub.model.scores(prompt), prompt[1:], strict=False):
        order = sorted(range(len(values)), key=lambda other: -values[other])
        wanted = dict.fromkeys([*order[:count], token])
        entries.append(
            {
                str(other): {
                    "logprob": values[other],
                    "rank": order.index(other) + 1,
                    "decoded_token": "",
                }
                for other in wanted
            }
        )
    choice = {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}
    choice |= {"stop_reason": None, "token_ids": [0], "prompt_token_ids": prompt}
    choice |= {"prompt_logprobs": entries}
    return 200, {"id": "cmpl-1", "object": "text_completion", "choices": [choice], "usage": {}}


def _load_adapter(stub: Stub, body: Tree) -> tuple[int, Tree]:
    name = body["lora_name"]
    if name in stub.loaded:
        message = f"The lora adapter '{name}' has already been loaded."
        return 400, {"error": {"message": message, "type": "InvalidUserInput", "code": 400}}
    stub.loaded[name] = body["lora_path"]
    return 200, f"Success: LoRA adapter '{name}' added successfully."


def _unload_adapter(stub: Stub, body: Tree) -> tuple[int, Tree]:
    if stub.loaded.pop(body["lora_name"], None) is None:
        return 404, {"error": {"message": "cannot be found", "type": "NotFoundError", "code": 404}}
    return 200, f"Success: LoRA adapter '{body['lora_name']}' removed successfully."


ROUTES = {
    "/v1/models": _models,
    "/version": lambda *_: (200, {"version": "0.33.0"}),
    "/v1/completions": _completion,
    "/v1/load_lora_adapter": _load_adapter,
    "/v1/unload_lora_adapter": _unload_adapter,
}


def _pause(stub: Stub, _: Tree) -> tuple[int, Tree]:
    """The mode `wait`: the caches are empty when the texts in work are finished."""
    stub.paused = True
    while stub.at_once:
        time.sleep(0.005)
    stub.cached = {}
    return 200, {"status": "paused"}


def _resume(stub: Stub, _: Tree) -> tuple[int, Tree]:
    stub.paused = False
    return 200, {"status": "resumed"}


def _reload(stub: Stub, body: Tree) -> tuple[int, Tree]:
    """`reload_weights` of the only worker; all values are strings."""
    folder = Path(body["kwargs"]["weights_path"])
    if body["method"] != "reload_weights" or not folder.is_dir():
        message = f"Call to collective_rpc method failed: Repo id must be in the form of {folder}"
        return 500, {"error": {"message": message, "type": "InternalServerError", "code": 500}}
    stub.model.load(folder)
    return 200, {"results": [None]}


def _reset_prefix_cache(stub: Stub, _: Tree) -> tuple[int, Tree]:
    stub.cached = {}
    return 200, {"success": True}


def _update_version(stub: Stub, body: Tree) -> tuple[int, Tree]:
    stub.weights = body["new_version"]
    return 200, {"success": True, "new_version": stub.weights}


DEVELOPMENT = {
    "/pause?mode=wait": _pause,
    "/resume": _resume,
    "/is_paused": lambda stub, _: (200, {"is_paused": stub.paused}),
    "/collective_rpc": _reload,
    "/reset_prefix_cache?reset_external=true": _reset_prefix_cache,
    "/update_weight_version": _update_version,
    "/weight_info": lambda stub, _: (200, {"weight_version": stub.weights}),
}


@contextmanager
def serving(*stubs: Stub) -> Iterator[list[str]]:
    servers = [_server(stub) for stub in stubs]
    try:
        yield [stub.url for stub in stubs]
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def _server(stub: Stub) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections stay open, as vLLM's do

        def do_GET(self) -> None:
            self._reply(None)

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            self._reply(json.loads(self.rfile.read(length)))

        def _reply(self, body: Tree) -> None:
            status, tree = stub.answer(self.path, body)
            if self.path in stub.lost:
                stub.lost.remove(self.path)
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            tree = stub.spoil(self.path, tree)
            text = tree if isinstance(tree, str) else json.dumps(tree)
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            with suppress(BrokenPipeError):  # the client has waited long enough
                self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:  # the tests' output stays readable
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server
