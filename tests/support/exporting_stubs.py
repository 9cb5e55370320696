"""A vLLM server that exports hidden states as `ExampleHiddenStatesConnector` publishes them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from served_models import Transformer, loaded
from server_stubs import Counting, Stub, Tree

Tensors = dict[str, torch.Tensor]
WIDTH = 6


class Exporting(Stub):
    """A server that writes one file per request, under a lock, after it has answered.

    folder: where the files are; the answers name another path of the same folder.
    write_s: how long every file takes to be written.
    change: function from the tensors of a file to the tensors that are written; None: no file.
    last_bytes: how many bytes at the end of every file are missing.
    locks: whether the server writes lock files.
    """

    def __init__(self, folder: Path, *, name: str = "tiny", model: Any = None) -> None:
        super().__init__("vllm", name=name, model=model or Widths())
        self.folder = folder
        self.write_s, self.last_bytes, self.locks = 0.0, 0, True
        self.change: Callable[[Tensors], Tensors | None] = lambda tensors: tensors
        self.written: list[str] = []

    def answer(self, path: str, body: Tree) -> tuple[int, Tree]:
        status, tree = super().answer(path, body)
        if path == "/v1/completions" and status == 200:
            name = f"cmpl-{body['request_id']}-0-{os.urandom(4).hex()}.safetensors"
            self._publish(self.folder / name, body["prompt"])
            tree["kv_transfer_params"] = {"hidden_states_path": f"/server/sees/{name}"}
        return status, tree

    def _publish(self, file: Path, prompt: list[int]) -> None:
        tensors = {
            "hidden_states": self.model.last_layer(prompt),
            "token_ids": torch.tensor(prompt),
        }
        held = None
        if self.locks:
            held = os.open(f"{file}.lock", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
            fcntl.flock(held, fcntl.LOCK_EX)
        self.written.append(file.name)
        threading.Thread(target=self._write, args=(file, tensors, held), daemon=True).start()

    def _write(self, file: Path, tensors: Tensors, held: int | None) -> None:
        time.sleep(self.write_s)
        changed = self.change(tensors)
        if changed is not None:
            # Whole at once: a test may end, and its client may delete the file, at any time.
            whole = save(changed)
            with contextlib.suppress(FileNotFoundError):
                file.write_bytes(whole[: len(whole) - self.last_bytes])
        if held is not None:
            os.close(held)


class Widths(Counting):
    """A model whose hidden states repeat the tokens."""

    def last_layer(self, prompt: list[int]) -> torch.Tensor:
        """[T, 1, D]"""
        return torch.tensor(prompt).float()[:, None, None].repeat(1, 1, WIDTH)


class ExportingTransformer(Transformer):
    """A Llama of transformers, and a second one without the final norm and the head.

    layers: the second model, whose output is that of its last layer.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        # No hooks on the first model: other threads generate with it at the same time.
        self.layers: Any = loaded(folder).model
        self.layers.norm = torch.nn.Identity()

    def last_layer(self, prompt: list[int]) -> torch.Tensor:
        """[T, 1, D]"""
        with torch.no_grad():
            return self.layers(torch.tensor([prompt])).last_hidden_state[0][:, None]
