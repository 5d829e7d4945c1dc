"""How the kernels are compiled."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit

#: Packages whose functions call each other, and so are compiled into each other.
_TOGETHER = (("features", "simulator"), ("sharedmemory",))


@cache
def _sources(package: str) -> str:
    """A digest of every file that compiled functions of a package come from."""
    root = Path(__file__).parents[1]
    packages = next(group for group in _TOGETHER if package in group)
    files = sorted(file for name in packages for file in (root / name).glob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in [Path(__file__), *files])).hexdigest()


def compiled(*, allocates: bool = False, inline: bool = False, **options: Any) -> Any:
    """Decorator: cached on disk, without the interpreter lock, division as in NumPy.

    A function that creates no array is compiled without reference counts: counting the references to every view of
    every array took nine tenths of the time of a flow.
    """
    # _nrt is said either way, because a callee inherits what is left unsaid from its caller.
    options |= {"cache": True, "nogil": True, "error_model": "numpy", "forceinline": inline, "_nrt": allocates}

    def decorator(function: Any) -> Any:
        dispatcher: Any = njit(**options)(function)
        # Numba's cache looks for changes in the function's own file only; what it calls is compiled into it.
        index: Any = getattr(dispatcher._cache, "_cache_file", None)
        if hasattr(index, "_source_stamp"):
            index._source_stamp = _sources(function.__module__.split(".")[1])
        return dispatcher

    return decorator
