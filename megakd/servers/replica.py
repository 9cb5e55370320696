"""The connection to one replica, which the servers of all kinds share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megakd.servers.http import JsonServer


class Replica:
    """One replica of an inference server; its methods may be called from several threads.

    Args:
        http: the connection to the server.
    """

    def __init__(self, http: JsonServer) -> None:
        self._http = http

    @property
    def url(self) -> str:
        """The address of the server."""
        return self._http.url
