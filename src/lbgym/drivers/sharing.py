"""What several sources of a driver use together: :class:`Shared`."""

from __future__ import annotations

from typing import Self


class Shared:
    """Something that ends with the last of its users."""

    _users = 0

    def share(self) -> Self:
        """For one more user, who closes it."""
        self._users += 1
        return self

    def close(self) -> None:
        """End when the last user closes it."""
        self._users -= 1
        if self._users <= 0:
            self._stop()

    def _stop(self) -> None:
        """End for good. Idempotent."""
        raise NotImplementedError


__all__ = ["Shared"]
