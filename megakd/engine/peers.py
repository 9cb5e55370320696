"""The end of any rank, which all ranks notice within seconds, whatever they are waiting for.

Every rank keeps a connection to rank 0. The system closes the connection of a process that ends,
however it ends, and rank 0 tells the others which rank it was. A process that is stopped sends
nothing any more. A thread watches, because the main thread may wait in a collective for ever.
"""

from __future__ import annotations

import logging
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

import torch.distributed as dist

from megakd.engine.collectives import agree, gather, node_name
from megakd.errors import CollectiveTimeoutError, MegakdError, PeerLostError
from megakd.process.signals import Stopped

logger = logging.getLogger(__name__)
LOOK_EVERY_S = 1.0
CONNECT_S = 20.0
LEAST_SILENCE_S = 10.0
MEETINGS = 2.5
"""Limit of a meeting of all ranks, in timeouts of a collective: torch may wait two of them."""
GRACE_S = 5.0
"""Seconds in which a rank may end by itself once another rank is lost."""
_BYE, _END = b"bye", b"\n"
# Parts of error messages of gloo, of its sockets, and of NCCL.
_PEER_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "remote process exited",
)
_TIMED_OUT = ("Timed out waiting", "collective operation timeout")
_NOT_CONNECTED = ("connectFullMesh failed", "Unable to find address for")
_current: list[_PeerWatch] = []


class _PeerWatch:
    """A thread that watches the connections of this rank; `names` are those of the ranks."""

    def __init__(
        self, peers: Mapping[int, socket.socket], names: list[str], *, silence_s: float
    ) -> None:
        self.peers, self._names, self._silence_s = dict(peers), names, silence_s
        self._told = 0.0
        self.lost = threading.Event()
        self.what = ""
        self._heard = dict.fromkeys(peers, time.monotonic())
        self._begun = dict.fromkeys(peers, b"")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)
        self._thread.start()

    def close(self, last: bytes) -> None:
        """Stop watching, and tell the others how this rank ends."""
        self._ended.set()
        self._tell(last)
        for peer in self.peers.values():
            with suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)  # which wakes the thread
        self._thread.join()
        self.release()

    def release(self) -> None:
        for peer in self.peers.values():
            peer.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, peer in self.peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while self._waits():
                for key, _ in selector.select(LOOK_EVERY_S):
                    if not self._hears(key.data):
                        selector.unregister(key.fileobj)
                        self._heard.pop(key.data)

    def _waits(self) -> bool:
        """Send a sign of life now and then; return False once there is nothing left to watch."""
        now = time.monotonic()
        if now - self._told >= LOOK_EVERY_S:
            self._told = now
            self._tell(b"")
        for rank, heard in self._heard.items():
            silent_s = now - heard
            if silent_s > self._silence_s:
                self._lose(f"{self._names[rank]} has not answered for {int(silent_s)} s")
        if self.lost.is_set() and not self._ended.wait(GRACE_S):
            _end(self.what)
        return bool(self._heard) and not self._ended.is_set()

    def _hears(self, rank: int) -> bool:
        """Read what a rank has sent; return False if it will send no more."""
        try:
            received = self.peers[rank].recv(4096)
        except OSError:
            received = b""
        if not received:
            if not self._ended.is_set():
                self._lose(f"{self._names[rank]} has ended")
            return False
        self._heard[rank] = time.monotonic()
        *lines, self._begun[rank] = (self._begun[rank] + received).split(_END)
        for line in lines:
            if line == _BYE:
                return False
            if line:
                self._lose(line.decode())
        return True

    def _lose(self, what: str) -> None:
        if not self.lost.is_set():
            self.what = what
            self._tell(what.encode())
            self.lost.set()

    def _tell(self, line: bytes) -> None:
        for peer in self.peers.values():
            with suppress(OSError):  # it has ended
                peer.sendall(line + _END)


@contextmanager
def watched(limit_s: float) -> Iterator[None]:
    """Notice in the body that a rank has ended or is stopped; a collective.

    If the body does not end within seconds by itself, this process ends with the exit code 1.
    `limit_s` is the limit of the collectives of a step.
    """
    if dist.get_world_size() == 1:
        yield
        return
    with reports_lost_peer(), meeting(limit_s):
        # A process that is stopped is named before the limit of the collective that waits for it.
        watch = _connect(max(0.8 * limit_s, LEAST_SILENCE_S))
    last = b""
    try:
        yield
        last = _BYE
    except BaseException as error:
        last = f"{_name()} has ended with {type(error).__name__}".encode()
        if isinstance(error, Stopped) and error.saved:  # all ranks stop together
            last = _BYE
        elif isinstance(error, MegakdError):  # which the first rank of a node alone prints
            last += f": {' '.join(str(error).split())}".encode()
        raise
    finally:
        if watch is not None:
            _current.remove(watch)
            watch.close(last)


@contextmanager
def meeting(limit_s: float) -> Iterator[None]:
    """End this process if the ranks do not meet in the body, which may wait without a limit.

    A store whose process is stopped never answers, and nobody watches the ranks yet. `limit_s` is
    the limit of a collective.
    """
    waiting = threading.Timer(MEETINGS * limit_s, _end_alone, (MEETINGS * limit_s,))
    waiting.daemon = True
    waiting.start()
    try:
        yield
    finally:
        waiting.cancel()


def _end_alone(waited_s: float) -> None:
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    _end(
        f"the ranks have not met within {waited_s:g} s at {place}: another rank, or the launcher "
        "of rank 0, does not answer; see their output"
    )


def _end(why: str) -> None:
    sys.stderr.write(f"megakd: rank {os.environ['RANK']} ends because {why}\n")
    sys.stderr.flush()
    os._exit(1)


def lost(wait_s: float) -> str | None:
    """Return which rank is lost and how; None if that is not known after `wait_s`."""
    watch = next(iter(_current), None)
    return watch.what if watch is not None and watch.lost.wait(wait_s) else None


@contextmanager
def reports_lost_peer() -> Iterator[None]:
    """Convert the error of a collective that another rank has left into a one-line error.

    Raises:
        PeerLostError: another rank has ended, or cannot be reached.
        CollectiveTimeoutError: another rank did not join within `train.collective_timeout`.
    """
    try:
        yield
    except RuntimeError as error:
        message, rank = str(error), f"rank {os.environ.get('RANK', '0')}"
        if any(words in message for words in _NOT_CONNECTED):
            reason = message.splitlines()[0].rpartition("] ")[2]
            interface = os.environ.get("GLOO_SOCKET_IFNAME", "not set")
            raise PeerLostError(
                f"{rank} on {node_name()} cannot connect to another rank over gloo ({reason}); set "
                f"GLOO_SOCKET_IFNAME ({interface}) on every node to the network interface that "
                "connects the nodes, such as eth0"
            ) from error
        if any(words in message for words in _TIMED_OUT) and lost(0.0) is None:
            doing = next(iter(getattr(error, "__notes__", ())), "starting")
            raise CollectiveTimeoutError(
                f"{rank} on {node_name()} has waited longer than train.collective_timeout for the "
                f"other ranks while {doing}; see their output, or raise train.collective_timeout "
                "if that work may take so long"
            ) from error
        reason = next((words for words in (*_PEER_LOST, *_TIMED_OUT) if words in message), None)
        if reason is None:
            raise
        which = lost(LOOK_EVERY_S) or f"another rank has ended ({reason})"
        raise PeerLostError(
            f"{rank} ends because {which}; see the output of that rank or of its launcher"
        ) from error


def _connect(silence_s: float) -> _PeerWatch | None:
    names, token = gather(_name()), agree(secrets.token_hex(16))
    rank, server = dist.get_rank(), None
    if rank == 0:
        server = socket.create_server(("", 0), backlog=len(names))
    port = agree(server.getsockname()[1] if server is not None else 0)
    try:
        peers = _accept(server, token, len(names)) if server else _reach(port, token)
        problem = None
    except OSError as error:
        peers, problem = {}, f"{names[rank]}: {error}"
    finally:
        if server is not None:
            server.close()
    problems = [one for one in gather(problem) if one is not None]
    if problems:
        logger.warning(
            "ranks cannot connect to rank 0 (%s): a rank that ends is noticed by its launcher, or "
            "after train.collective_timeout",
            problems[0],
        )
        for peer in peers.values():
            peer.close()
        return None
    watch = _PeerWatch(peers, names, silence_s=silence_s)
    _current.append(watch)
    return watch


def _accept(server: socket.socket, token: str, count: int) -> dict[int, socket.socket]:
    # Strangers are sent away.
    peers: dict[int, socket.socket] = {}
    deadline = time.monotonic() + CONNECT_S
    while len(peers) < count - 1:
        server.settimeout(max(0.1, deadline - time.monotonic()))
        peer, _ = server.accept()
        peer.settimeout(LOOK_EVERY_S)
        hello = b""
        with suppress(OSError):
            hello = peer.recv(256)
        given, _, rank = hello.decode("ascii", "replace").partition(" ")
        if given != token:
            peer.close()
            continue
        peers[int(rank)] = peer
    for peer in peers.values():
        peer.settimeout(None)
    return peers


def _reach(port: int, token: str) -> dict[int, socket.socket]:
    peer = socket.create_connection((os.environ["MASTER_ADDR"], port), CONNECT_S)
    peer.settimeout(None)
    peer.sendall(f"{token} {dist.get_rank()}".encode())
    return {0: peer}


def _name() -> str:
    return f"rank {dist.get_rank()} on {node_name()}"


def _release_in_child() -> None:
    # The connection of a process stays open while a child of it has a copy.
    for watch in _current:
        watch.release()
    _current.clear()


os.register_at_fork(after_in_child=_release_in_child)
