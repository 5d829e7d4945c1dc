"""What is compiled on this machine at first use and kept: :func:`kept_file`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from ..atomic import write_whole
from ..errors import LbgymError


def cache_folder() -> Path:
    """Where compiled files are kept: ``lbgym`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    home = os.environ.get("XDG_CACHE_HOME")
    return Path(home if home else Path.home() / ".cache") / "lbgym"


def kept_file(name: str, make: Callable[[], bytes]) -> tuple[bytes, Path | None]:
    """A compiled file from the cache, or made now and kept there.

    Args:
        name: of the file, with a digest of all that it depends on.
        make: compiles it.

    Returns:
        Its content, and where it is kept; None: the cache cannot be written to.
    """
    kept = None
    with contextlib.suppress(OSError, RuntimeError):
        kept = cache_folder() / name
        # What another user could have put there is not run.
        if kept.stat().st_uid == os.geteuid():
            return kept.read_bytes(), kept
    content = make()
    if kept is None:
        return content, None
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, lambda stream: stream.write(content))
    except (OSError, LbgymError):
        return content, None
    return content, kept
