"""Connections that a listening socket of this process has not yet accepted: requests that no deadline knows of.

How many they are, and a way to take them in at once: the event loop accepts one a turn (libuv, since its 1.45), so that
where a turn takes 10 ms, the last of 200 that come together would wait two seconds.
"""

import asyncio
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_UNACKED = 24
"""Where `struct tcp_info` of Linux has tcpi_unacked: for a listening socket, the length of its accept queue
(net/ipv4/tcp.c, tcp_get_info)."""


class Backlog:
    """Of the socket that listens on a port; 0 where there is none, or the system does not tell."""

    def __init__(self, port: int | None) -> None:
        self._port = port
        self._descriptor = None if port is None else _listener(port)

    def __len__(self) -> int:
        """Connections."""
        if self._descriptor is None:
            return 0
        with suppress(OSError), _borrowed(self._descriptor) as socket_:  # closed once the server ends
            if _listens(socket_, self._port):
                info = socket_.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _UNACKED + 4)
                found: int = struct.unpack_from("I", info, _UNACKED)[0]
                return found
        return 0

    def accept(self, most: int, protocol: Callable[[], asyncio.BaseProtocol]) -> list[asyncio.Task[object]]:
        """Take in what waits, at most so many connections; to be called on the event loop that listens.

        Args:
            most: connections.
            protocol: makes one for each, as for the server.

        Returns:
            What becomes of each, to be kept until it is done.
        """
        loop, taken = asyncio.get_running_loop(), list[asyncio.Task[object]]()
        if self._descriptor is None:
            return taken
        with suppress(OSError), _borrowed(self._descriptor) as socket_:
            if _listens(socket_, self._port):
                socket_.setblocking(False)  # as it is
                while len(taken) < most:
                    connection, _ = socket_.accept()  # BlockingIOError: no more
                    connection.setblocking(False)
                    taken.append(loop.create_task(loop.connect_accepted_socket(protocol, connection)))
        return taken


@contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    """Not a duplicate, which would keep the port open after its server."""
    borrowed = socket.socket(fileno=descriptor)
    try:
        yield borrowed
    finally:
        borrowed.detach()


def _listens(socket_: socket.socket, port: int | None) -> bool:
    internet = socket_.family in (socket.AF_INET, socket.AF_INET6)
    listens = internet and socket_.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    return bool(listens and socket_.getsockname()[1] == port)


def _listener(port: int) -> int | None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir() or not hasattr(socket, "TCP_INFO"):
        return None
    for name in os.listdir(descriptors):
        with suppress(OSError), _borrowed(int(name)) as socket_:  # no socket, or closed meanwhile
            if _listens(socket_, port):
                return int(name)
    return None
