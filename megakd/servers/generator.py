"""Generation of text by inference servers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from megakd.contract.rollouts import Completion, Sampling
from megakd.engine.collectives import together
from megakd.errors import ServerError
from megakd.servers.checks import Wanted
from megakd.servers.http import Running
from megakd.servers.protocol import TextServer, checked_completion
from megakd.servers.push import AdapterPush, FullPush, Pushed


class AskedTexts:
    """The texts that a rank has asked for; see `RequestedTexts`."""

    def __init__(self, running: Running[Completion]) -> None:
        self._running = running

    def completions(self) -> list[Completion]:
        """Wait for the texts and return them in the order of the prompts; a collective."""
        return together(self._running.results)


class ServerGenerator:
    """A `RemoteGenerator` whose texts come from the replicas of an inference server.

    Each prompt is a request of its own. The prompts of a rank go to all replicas in turn, and rank
    r begins with replica r.

    Args:
        models: the name of the model at each replica.
        push: how the replicas get the weights of the student; None: they keep their weights.
        place: rank of this process, and the number of requests that it makes at the same time.
    """

    def __init__(
        self,
        servers: Sequence[TextServer],
        *,
        models: Sequence[str],
        push: FullPush | AdapterPush | None,
        wanted: Wanted,
        place: tuple[int, int],
    ) -> None:
        self._servers, self._models, self._push = servers, models, push
        self._wanted = wanted
        self._rank, self._at_once = place
        self._version: int | None = None
        self._pushed = Pushed()

    def update(self, version: int) -> None:
        """Push the weights that the student has now, once per version; a collective.

        Raises:
            MegakdError: the weights cannot be pushed; raised on every rank.
        """
        if self._push is not None and version != self._version:
            self._pushed = self._push.push(version)
            self._version = version

    def begin(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
    ) -> AskedTexts:
        """Ask for the continuations of this rank's prompts, and return at once; no collective."""
        calls = [
            partial(self._complete, number, (tuple(prompt), seed, sampling), self._pushed)
            for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        return AskedTexts(Running(calls, at_once=self._at_once))

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], sampling: Sampling
    ) -> list[Completion]:
        """Continue this rank's prompts with the weights of the last update; a collective."""
        return self.begin(prompts, seeds, sampling).completions()

    def _complete(
        self, number: int, asked: tuple[tuple[int, ...], int, Sampling], pushed: Pushed
    ) -> Completion:
        replica = (self._rank + number) % len(self._servers)
        server = self._servers[replica]
        request = self._wanted.request(*asked, pushed.adapter or self._models[replica])
        text = server.complete(request)
        if pushed.weights is not None and text.weights not in {None, pushed.weights}:
            raise ServerError(
                f"{server.url}: the text was generated with the weights {text.weights}, and "
                f"{pushed.weights} were pushed; the server was restarted, or another run uses it"
            )
        return checked_completion(text, request, vocabulary=self._wanted.vocabulary, url=server.url)
