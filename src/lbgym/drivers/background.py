"""An event loop in a thread of its own: :class:`BackgroundLoop`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class BackgroundLoop:
    """Runs coroutines in a thread.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """The result of a coroutine.

        Raises:
            TimeoutError: if there is none within so many seconds.
        """
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout)

    def call(self, work: Callable[[], object]) -> None:
        """Call a function there, soon."""
        self._loop.call_soon_threadsafe(work)

    @property
    def closed(self) -> bool:
        """True after :meth:`close`."""
        return self._loop.is_closed()

    def close(self) -> None:
        """Cancel all tasks, and end the thread. Idempotent."""
        if self.closed:
            return
        self.run(_cancel_others())
        self.call(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_others() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


__all__ = ["BackgroundLoop"]
