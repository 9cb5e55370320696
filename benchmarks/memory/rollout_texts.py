"""The cost of texts: bytes on disk, replay, `rollout.files`, and a served teacher's best tokens.

python benchmarks memory.rollout_texts [--steps 64] [--rows 64] [--tokens 1024]

No model is loaded. All costs are CPU time or bytes, for each row or token. With another version of
megakd first in PYTHONPATH, the costs are those of that version.
"""

from __future__ import annotations

import json
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lib.options import parser_of
from megakd.contract.batch import Batch
from megakd.contract.completions import Completion, Rollout
from megakd.rollouts.generators import FileGenerator
from megakd.rollouts.store import RolloutStore, rollout_files
from megakd.servers.http import Reply
from megakd.servers.teachers import TopKTeacher
from megakd.servers.vllm import VllmServer

VOCABULARY, PROMPT, BEST, SCORED, TIMES = 150_000, 64, 64, 512, 5


def main(arguments: Sequence[str]) -> int:
    parser = parser_of(__doc__)
    for name, default in (("steps", 64), ("rows", 64), ("tokens", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args(arguments)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        store = RolloutStore(Path(place))
        write(store, given.steps, given.rows, given.tokens)
        tokens = given.steps * given.rows * (given.tokens + PROMPT)
        size = sum(path.stat().st_size for path in rollout_files(store.folder))
        print(f"disk: {size / tokens:.2f} bytes a token")
        seconds = best_of(lambda: replay(store, given.steps, given.rows))
        print(f"replay of a step of {given.rows} rows: {1e3 * seconds / given.rows:.2f} ms a row")
        seconds, held, _ = measured(lambda: FileGenerator(rollout_files(store.folder)))
        held, micros = held / tokens, 1e6 * seconds / tokens
        print(f"rollout.files: {held:.3f} bytes and {micros:.2f} us a token")
    text = answer()
    batch, teacher = batch_of(), teacher_of(text)
    seconds = best_of(lambda: list(teacher.answers([batch])))
    server = VllmServer(Server(text))  # type: ignore[arg-type]
    _, held, _ = measured(lambda: server.top_k(tuple(range(SCORED + 1)), BEST, "m"))
    print(
        f"top_k: {len(text) / SCORED:.0f} bytes a token on the wire, {held / SCORED:.0f} in "
        f"memory, {1e6 * seconds / SCORED:.0f} us a token"
    )
    dist.destroy_process_group()
    return 0


def write(store: RolloutStore, steps: int, rows: int, tokens: int) -> None:
    random = np.random.default_rng(0)
    for step in range(steps):
        ids = random.integers(VOCABULARY, size=(rows, PROMPT + tokens)).tolist()
        texts = [(tuple(row[:PROMPT]), tuple(row[PROMPT:])) for row in ids]
        rollouts = (
            Rollout(0, prompt, Completion(text, finished=True), step, number)
            for number, (prompt, text) in enumerate(texts)
        )
        store.write(step, list(rollouts))


def replay(store: RolloutStore, steps: int, rows: int) -> None:
    """Read a random text of a random step for each row."""
    random = np.random.default_rng(1)
    for _ in range(rows):
        store.read_one(int(random.integers(steps)), float(random.random()))


def answer() -> str:
    random = np.random.default_rng(2)

    def entries() -> Iterator[dict[str, Any] | None]:
        yield None
        for _ in range(SCORED):
            ids = random.choice(VOCABULARY, BEST, replace=False).tolist()
            values = np.log(np.sort(random.dirichlet(np.full(BEST, 0.1)) + 1e-9)[::-1] / 1.1)
            values = values.astype(np.float32).tolist()
            yield {
                str(token): {"logprob": value, "rank": rank + 1, "decoded_token": " word"}
                for rank, (token, value) in enumerate(zip(ids, values, strict=True))
            }

    return json.dumps({"choices": [{"index": 0, "text": "", "prompt_logprobs": list(entries())}]})


class Server:
    """A connection that gives one answer."""

    url = "http://server"

    def __init__(self, text: str) -> None:
        self.text = text

    def post(self, path: str, tree: object) -> Reply:
        del tree
        return Reply(200, self.text, path)


def teacher_of(text: str) -> TopKTeacher:
    """Return a teacher whose server gives one answer."""
    ranks: Any = SimpleNamespace(rank=0, device=torch.device("cpu"))
    servers: Any = [VllmServer(Server(text))]  # type: ignore[arg-type]
    return TopKTeacher(servers, ["m"], top_k=BEST, vocabulary=VOCABULARY, ranks=ranks)


def batch_of() -> Batch:
    """Return a micro-batch with one document, which has a prediction at `SCORED` positions."""
    ids = torch.arange(SCORED + 1)[None]
    inputs = {"input_ids": ids, "position_ids": ids}
    return Batch(inputs, torch.full_like(ids, -100), torch.ones_like(ids, dtype=torch.bool))


def best_of(action: Callable[[], object]) -> float:
    return min(measured(action, traced=False)[0] for _ in range(TIMES))


def measured(action: Callable[[], object], *, traced: bool = True) -> tuple[float, int, object]:
    """Return CPU time, bytes that the result holds, and the result."""
    began = time.process_time()
    made = action()
    seconds = time.process_time() - began
    if not traced:
        return seconds, 0, made
    del made
    tracemalloc.start()
    made = action()
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return seconds, held, made
