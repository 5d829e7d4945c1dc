"""Questions to servers, asked in the background: what health checks and polls of agents share."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Hashable, Mapping

from .background import BackgroundLoop
from .base import DriverError

#: Bytes of an HTTP answer that are read.
_LONGEST = 1 << 16


class Probes:
    """Asks one question per target again and again, all targets at the same time, in a thread of its own.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        # Of its own: a thread has no business in the random numbers of the process.
        self._random = random.Random()
        self._tasks: dict[Hashable, asyncio.Task[None]] = {}
        self._loop = BackgroundLoop(name)

    def set_targets(self, targets: Mapping[Hashable, tuple[Callable[[], Awaitable[None]], float]]) -> None:
        """Ask these targets, by key: a question that raises nothing, and the seconds between an answer and the next.

        A key that was there before goes on as it was.
        """
        self._loop.run(self._set_targets(dict(targets)))

    async def _set_targets(self, targets: dict[Hashable, tuple[Callable[[], Awaitable[None]], float]]) -> None:
        for key in [key for key in self._tasks if key not in targets]:
            self._tasks.pop(key).cancel()
        for key, (ask, interval) in targets.items():
            if key not in self._tasks:
                self._tasks[key] = asyncio.ensure_future(self._repeat(ask, interval))

    async def _repeat(self, ask: Callable[[], Awaitable[None]], interval: float) -> None:
        while True:
            await ask()
            # A tenth more or less, so that many targets are not asked at the same instant for ever.
            await asyncio.sleep(interval * self._random.uniform(0.9, 1.1))

    def close(self) -> None:
        """End all questions and the thread. Idempotent."""
        self._loop.close()


async def connect(address: str, port: int, timeout: float) -> None:
    """Open a TCP connection and close it.

    Raises:
        DriverError: if it is not accepted in time.
    """
    async with _asking(f"{address}:{port}", timeout):
        _, writer = await asyncio.open_connection(address, port)
        await _shut(writer)


async def http_get(address: str, port: int, path: str, timeout: float) -> tuple[int, bytes]:
    """Status and body of a GET by HTTP/1.0, of at most 64 KiB.

    Raises:
        DriverError: if there is no whole answer in time.
    """
    host = f"[{address}]" if ":" in address else address
    async with _asking(f"http://{host}:{port}{path}", timeout):
        reader, writer = await asyncio.open_connection(address, port, limit=_LONGEST)
        try:
            writer.write(
                f"GET {path} HTTP/1.0\r\nHost: {host}:{port}\r\nUser-Agent: lbgym\r\nConnection: close\r\n\r\n".encode()
            )
            await writer.drain()
            head = await reader.readuntil(b"\r\n\r\n")
            protocol, _, rest = head.partition(b" ")
            if not protocol.startswith(b"HTTP/") or not rest[:3].isdigit():
                raise ValueError("no HTTP answer")
            body = bytearray()
            while part := await reader.read(_LONGEST):
                body += part
                if len(body) > _LONGEST:
                    raise ValueError(f"an answer of more than {_LONGEST} bytes")
        finally:
            await _shut(writer)
    return int(rest[:3]), bytes(body)


@contextlib.asynccontextmanager
async def _asking(what: str, timeout: float):  # type: ignore[no-untyped-def]
    try:
        async with asyncio.timeout(timeout):
            yield
    except TimeoutError:
        raise DriverError(f"{what}: no answer within {timeout:g} s") from None
    except (OSError, ValueError, EOFError, asyncio.LimitOverrunError) as error:
        raise DriverError(f"{what}: {getattr(error, 'strerror', None) or error or type(error).__name__}") from error


async def _shut(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
