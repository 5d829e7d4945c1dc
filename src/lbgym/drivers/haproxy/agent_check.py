"""The agent that HAProxy's ``agent-check`` asks: :class:`AgentCheck`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Mapping

from ...errors import InvalidOptionError
from ..background import BackgroundLoop
from ..base import DriverError
from ..config import ServerConfig
from ..proxy import shown
from ..sharing import Shared
from .weights import percentage

logger = logging.getLogger("lbgym")

#: Seconds to wait for a question, and at the end for the servers to ask once more.
_TIMEOUT = 1.0
#: Longest question, bytes.
_LONGEST = 256
#: Servers of backends that are followed, and names that are refused with a word: anybody may ask.
_MOST, _MOST_REFUSED = 65_536, 100


class AgentCheck(Shared):
    """Answers HAProxy's agent-checks with weights, for every server of every process, in a thread of its own.

    A server says which one it is by ``agent-send``: a line BACKEND/SERVER. The answer is a line, too: ``NN%`` of its
    configured weight; ``drain`` while an operator drains it by the driver; ``ready NN%`` from when it is taken back,
    so that a drain that somebody else has asked HAProxy for is left alone. A server that is not known gets no answer,
    and HAProxy leaves it as it is.

    Args:
        place: host and TCP port to listen on.

    Raises:
        DriverError: if it cannot listen there.
    """

    def __init__(self, place: tuple[str, int]) -> None:
        self._lock = threading.Lock()
        self._answers: dict[tuple[str, str], str] = {}
        self._drained: set[tuple[str, str]] = set()
        self._ready: set[tuple[str, str]] = set()
        self._asked: dict[tuple[str, str], float] = {}
        self._intervals: dict[tuple[str, str], float] = {}
        self._followed: set[str] = set()
        self._refused: set[str] = set()
        self._changed_at = 0.0
        family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
        except OSError as error:
            listener.close()
            raise DriverError(f"cannot answer agent-checks at {shown(place)}: {error.strerror or error}") from error
        self.place: tuple[str, int] = listener.getsockname()[:2]
        self._loop = BackgroundLoop("lbgym-agent-check")
        self._server = self._loop.run(self._listen(listener))

    def answer(self, backend: str, weights: Mapping[str, tuple[int, int]]) -> None:
        """From now on, answer the servers of a backend by these weights.

        Args:
            backend: its name.
            weights: by server, the weight it is to have and the one in HAProxy's configuration.
        """
        answers = {
            (backend, server): f"{percentage(weight, configured) if configured else 0}%"
            for server, (weight, configured) in weights.items()
        }
        with self._lock:
            before = {key: answer for key, answer in self._answers.items() if key[0] == backend}
            if answers != before:
                for key in before:
                    del self._answers[key]
                self._answers |= answers
                self._changed_at = time.monotonic()

    def drain(self, backend: str, server: str) -> None:
        """Answer ``drain`` for a server."""
        with self._lock:
            self._drained.add((backend, server))
            self._ready.discard((backend, server))

    def undrain(self, backend: str, server: str) -> None:
        """Answer ``ready`` for a server, with its weight."""
        with self._lock:
            self._drained.discard((backend, server))
            self._ready.add((backend, server))

    def asked(self, backend: str) -> dict[str, tuple[float, float]]:
        """By server of a backend that has asked: when it last did (monotonic clock) and its usual interval, seconds.

        From the first call on, servers are followed that have no answer yet.
        """
        with self._lock:
            self._followed.add(backend)
            return {
                server: (at, self._intervals.get((name, server), 0.0))
                for (name, server), at in self._asked.items()
                if name == backend
            }

    def forget(self, backend: str, server: str) -> None:
        """As if a server had never asked; drains are kept."""
        with self._lock:
            self._asked.pop((backend, server), None)
            self._intervals.pop((backend, server), None)

    def _is_followed(self, key: tuple[str, str]) -> bool:
        backend, server = key
        if key in self._asked or key in self._answers:
            return True
        if backend not in self._followed or len(self._asked) >= _MOST:
            return False
        try:
            ServerConfig(name=server, address=backend)
        except InvalidOptionError as error:
            if server not in self._refused and len(self._refused) < _MOST_REFUSED:
                self._refused.add(server)
                logger.warning("somebody asks for a server of backend %r that cannot be: %s", backend, error)
            return False
        return True

    def _answer(self, question: bytes) -> str:
        backend, slash, server = question.decode("utf-8", "replace").strip().partition("/")
        if not slash:
            return ""
        key, now = (backend, server), time.monotonic()
        with self._lock:
            if not self._is_followed(key):
                return ""
            if key in self._asked:
                # The longest of late: several processes, and balancers, may ask for the same server.
                interval = now - self._asked[key]
                self._intervals[key] = max(interval, 0.9 * self._intervals.get(key, 0.0))
            self._asked[key] = now
            if key in self._drained:
                return "drain\n"
            answer = self._answers.get(key)
            if answer is None:
                return ""
            return f"ready {answer}\n" if key in self._ready else f"{answer}\n"

    async def _listen(self, listener: socket.socket) -> asyncio.Server:
        return await asyncio.start_server(self._serve, sock=listener, limit=_LONGEST, backlog=1024)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Whatever a client does is its own business: it gets its answer, or none.
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(_TIMEOUT):
                answer = self._answer(await reader.readuntil(b"\n"))
                writer.write(answer.encode())
                await writer.drain()
        writer.close()

    def _stop(self) -> None:
        """Wait until the servers have heard the last weights, and end."""
        if self._loop.closed:
            return
        self._linger()
        self._loop.call(self._server.close)
        self._loop.close()

    def _linger(self) -> None:
        now = time.monotonic()
        with self._lock:
            longest = max(self._intervals.values(), default=0.0)
        until = self._changed_at + min(1.2 * longest + 0.1, 5.0) if longest else now
        while time.monotonic() < until:
            with self._lock:
                if all(self._asked[key] > self._changed_at for key in self._asked if key in self._answers):
                    return
            time.sleep(0.02)
