"""How the kernels are compiled."""

from __future__ import annotations

from typing import Any

from numba import njit


def compiled(*, allocates: bool = False, inline: bool = False, **options: Any) -> Any:
    """Decorator: cached on disk, without the interpreter lock, division as in NumPy.

    A function that creates no array is compiled without reference counts: counting the references to every view of
    every array took nine tenths of the time of a flow.
    """
    # Said either way, because a callee inherits what is left unsaid from its caller.
    return njit(cache=True, nogil=True, error_model="numpy", forceinline=inline, _nrt=allocates, **options)
