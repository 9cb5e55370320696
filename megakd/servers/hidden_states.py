"""vLLM servers that export hidden states: the output of the last layer for every token of a text.

Protocol: https://docs.vllm.ai, "Hidden State Extraction"; the answer to `/v1/completions` names a
file in `kv_transfer_params`.
"""

from __future__ import annotations

import fcntl
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megakd.contract.completions import Sampling
from megakd.errors import ServerError
from megakd.servers.http import JsonServer, field_of, numbers_of
from megakd.servers.protocol import TextRequest, first_difference
from megakd.servers.vllm import VllmServer, completion_request

SEEN_WITHIN_S = 30.0
"""Seconds until a file that a server has written on one node is visible on another node."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.002, 0.25


class ExportedStates(NamedTuple):
    """The hidden states of one text.

    states: [T, D] output of the last layer for every token, before the final norm.
    following: the most likely token after the text, as the server has generated it.
    """

    states: Tensor
    following: int


class StatesServer(VllmServer):
    """One replica of a vLLM server that exports hidden states.

    Args:
        folder: the folder of the files, as this rank sees it.
        layers: number of layers of the model, which is the number that vLLM gives the last output.
        time_limit_s: seconds for one file.
    """

    def __init__(
        self, http: JsonServer, folder: Path, *, width: int, layers: int, time_limit_s: float
    ) -> None:
        super().__init__(http)
        self._folder, self._time_limit_s = folder, time_limit_s
        self._width, self._layers = width, layers

    def states(self, ids: tuple[int, ...], model: str) -> ExportedStates:
        """Return the hidden states of a text, and delete their file."""
        name = f"megakd-{uuid.uuid4().hex}"
        try:
            # vLLM writes the file when it has generated one token. Tokens from the prefix cache
            # have no hidden states; the cache is kept apart by its salt.
            one_token = TextRequest(ids, 0, Sampling(1, temperature=0.0), model, ())
            body = {**completion_request(one_token), "request_id": name, "cache_salt": name}
            reply = self._http.post("/v1/completions", body)
            if reply.status == 400:
                raise ServerError(
                    f"{reply.where} answered 400: {reply.text}; start vLLM with --max-model-len of "
                    f"at least {len(ids) + 1}"
                )
            tree = reply.tree()
            file = self._file(tree)
            try:
                tensors = read_state_file(
                    file,
                    time_limit_s=self._time_limit_s,
                    check_server=lambda: self._check_engine(file),
                )
            finally:
                _remove_state_files([file, _lock_of(file)])
            return ExportedStates(self._checked(tensors, ids, file), self._following(tree))
        finally:
            # A request that was sent again after a lost connection may have left another file.
            _remove_state_files(self._folder.glob(f"*{name}*"))

    def _check_engine(self, file: Path) -> None:
        problem = self._http.problem("/health")
        if problem is not None:
            raise ServerError(
                f"{self.url} has ended before it has written {file.name}, which it has named: "
                f"{problem}; see the log of the server"
            )

    def _file(self, tree: Any) -> Path:
        # The server may see the folder under another path. Only the name counts, so that an answer
        # cannot name a file outside of the folder.
        given = tree.get("kv_transfer_params") if isinstance(tree, dict) else None
        if not isinstance(given, dict) or not isinstance(given.get("hidden_states_path"), str):
            raise ServerError(
                f"{self.url}: the answer names no file of hidden states (kv_transfer_params: "
                f"{given}); start vLLM with --speculative-config, method extract_hidden_states, "
                "and --kv-transfer-config, connector ExampleHiddenStatesConnector"
            )
        return self._folder / Path(given["hidden_states_path"]).name

    def _following(self, tree: Any) -> int:
        choices = field_of(tree, "choices", list, self.url)
        tokens = numbers_of(choices[0], "token_ids", self.url) if len(choices) == 1 else ()
        if len(tokens) != 1:
            raise ServerError(
                f"{self.url}: {len(choices)} texts of {len(tokens)} tokens came back, and one text "
                "of one token was asked for"
            )
        return tokens[0]

    def _checked(self, tensors: dict[str, Tensor], ids: tuple[int, ...], file: Path) -> Tensor:
        where = f"{self.url}: {file}"
        missing = {"hidden_states", "token_ids"} - set(tensors)
        if missing:
            raise ServerError(
                f"{where} has no {' and '.join(sorted(missing))} (found: {sorted(tensors)}); use "
                "ExampleHiddenStatesConnector"
            )
        tokens = [int(token) for token in tensors["token_ids"].flatten()]
        place = first_difference(tokens, ids)
        if place is not None:
            raise ServerError(
                f"{where} is about a text of {len(tokens)} tokens that differs at position {place} "
                f"from the text of {len(ids)} tokens that was sent; each server needs a folder "
                "that nobody else writes"
            )
        return self._last_layer(tensors["hidden_states"], len(ids), where)

    def _last_layer(self, states: Tensor, count: int, where: str) -> Tensor:
        expected = (count, 1, self._width)
        shape = tuple(states.shape)
        if len(shape) == len(expected) and shape[0] != count:
            raise ServerError(
                f"{where} has the hidden states of {shape[0]} tokens, and the text has {count}; "
                "start vLLM with --no-enable-prefix-caching and --no-enable-chunked-prefill"
            )
        if shape != expected:
            raise ServerError(
                f"{where} has hidden states of shape {list(shape)} (tokens, layers, width), and "
                f"{list(expected)} is expected; start vLLM with the model of the teacher and "
                f"eagle_aux_hidden_state_layer_ids: [{self._layers}]"
            )
        if states.dtype not in {torch.float32, torch.bfloat16, torch.float16}:
            raise ServerError(
                f"{where} has hidden states in {str(states.dtype).removeprefix('torch.')}; start "
                "vLLM with --kv-cache-dtype auto and --dtype bfloat16, float16 or float32"
            )
        return states[:, 0]


def read_state_file(
    file: Path, *, time_limit_s: float, check_server: Callable[[], None]
) -> dict[str, Tensor]:
    """Wait until the server has written a file, and return its tensors.

    The time limit counts while the server holds the lock. `check_server` raises if the server has
    ended; it is called while nobody writes.
    """
    began, pause, last_written = time.monotonic(), _FIRST_PAUSE_S, time.monotonic()
    while True:
        attempt = _attempt(file)
        if isinstance(attempt, dict):
            return attempt
        (reason, is_written), now = attempt, time.monotonic()
        last_written = now if is_written else last_written
        if now - began > time_limit_s or now - last_written > SEEN_WITHIN_S:
            raise ServerError(
                f"teacher.server.states: {reason}, {now - began:.0f} s after a server has "
                f"named {file.name}; check that teacher.server.states and shared_storage_path of "
                "the server are one folder with room for the files, and that the server has not "
                "set use_synchronization_lock to false"
            )
        if pause == _LONGEST_PAUSE_S and not is_written:
            check_server()
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def _attempt(file: Path) -> dict[str, Tensor] | tuple[str, bool]:
    # The tensors, or why there are none yet, and whether the server still writes the file.
    lock = _lock_of(file)
    try:
        with lock.open() as held:
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
            # A copy: the file is deleted, and a mapped file would stay in /dev/shm.
            return {name: tensor.clone() for name, tensor in load_file(file).items()}
    except BlockingIOError:
        return f"{file} is still being written", True
    except FileNotFoundError:
        missing = file if lock.exists() else lock
        return f"{missing} does not exist", False
    except SafetensorError as error:
        return f"{file} is damaged or cut short ({error})", False
    except OSError as error:
        raise ServerError(
            f"teacher.server.states: {file} cannot be read ({error}); use a folder of a file "
            "system with locks whose files every rank can read"
        ) from error


def _lock_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.lock")


def _remove_state_files(files: Iterable[Path]) -> None:
    try:
        for file in files:
            file.unlink(missing_ok=True)
    except OSError as error:
        raise ServerError(
            f"teacher.server.states: {error.filename} was read and cannot be deleted "
            f"({error.strerror}); start the server and the run as one user"
        ) from error


def check_folder(folder: Path, key: str, wanted: str, *, is_made: bool = False) -> None:
    """Check that this rank may write and delete files in a folder."""
    probe = folder / f"megakd-probe-{time.time_ns()}"
    try:
        if is_made:
            folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ServerError(
            f"{key}: {folder} cannot be written ({error.strerror}); name {wanted}"
        ) from error
