"""How the kernels are compiled."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit


@cache
def _sources() -> str:
    """A digest of every file that compiled functions come from."""
    package = Path(__file__).parents[1]
    files = sorted([*package.glob("features/*.py"), *package.glob("simulator/*.py")])
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


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
            index._source_stamp = _sources()
        return dispatcher

    return decorator
