"""A TCP proxy on loopback that takes what goes to the server at a rate, so that an upload can be caught in the act."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

_CHUNK = 64 * 1024


class SlowProxy:
    """Before a server; what comes back is not slowed."""

    def __init__(self, target: int) -> None:
        """To a port of loopback."""
        self._target = target
        self.bytes_per_second: float | None = None
        """Of all connections together; None = as fast as it goes."""
        self.sent = 0
        """Bytes that went to the server."""
        self._turn = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]

    @contextlib.contextmanager
    def running(self) -> Iterator["SlowProxy"]:
        """While the block runs."""
        threading.Thread(target=self._accept, daemon=True).start()
        try:
            yield self
        finally:
            self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target), timeout=10)
            except OSError:  # it is away: so is this connection
                client.close()
                continue
            server.settimeout(None)
            threading.Thread(target=self._pump, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK):
                if up:
                    self._wait(len(data))
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        sink.close()

    def _wait(self, count: int) -> None:
        with self._turn:
            self.sent += count
            if self.bytes_per_second is not None:
                time.sleep(count / self.bytes_per_second)
