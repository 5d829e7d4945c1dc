"""Whether the compiled kernel is on disk, so that a first run can say that it compiles."""

from __future__ import annotations


def is_compiled() -> bool:
    """True if Numba's cache has an entry for the kernel's step that matches its source."""
    from . import kernel

    cache = kernel.step_replicas._cache
    try:
        return bool(cache._cache_file._load_index())
    except Exception:  # a private interface of Numba; without it the message is lost, nothing else
        return True
