"""The decorator under which every kernel is compiled."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import config, njit

from ..errors import LbgymError
from .kernel_cache import cache_of


def compiled(*, allocates: bool = False, inline: bool = False, **options: Any) -> Any:
    """Decorator: cached on disk, without the interpreter lock, division as in NumPy.

    A function that creates no array is compiled without reference counts: counting the references to every view of
    every array took nine tenths of the time of a flow.

    Under ``NUMBA_DISABLE_JIT=1`` the function runs in Python, with the same arithmetic.
    """
    # _nrt is said either way, because a callee inherits what is left unsaid from its caller.
    options |= {"nogil": True, "error_model": "numpy", "forceinline": inline, "_nrt": allocates}

    def decorator(function: Any) -> Any:
        if config.DISABLE_JIT:
            # Hashes wrap around, and a division by 0 is infinite: as compiled, without a warning.
            return functools.wraps(function)(np.errstate(all="ignore")(function))
        dispatcher: Any = njit(**options)(function)
        dispatcher._cache = cache_of(function)
        return dispatcher

    return decorator


def compiled_only(**options: Any) -> Any:
    """Decorator: as :func:`compiled`, for functions on atomic instructions, which Python cannot execute.

    Under ``NUMBA_DISABLE_JIT=1`` a call raises :class:`LbgymError`.
    """

    def decorator(function: Any) -> Any:
        if not config.DISABLE_JIT:
            return compiled(**options)(function)

        @functools.wraps(function)
        def refuse(*_: Any) -> Any:
            raise LbgymError("shared memory needs compiled code: unset NUMBA_DISABLE_JIT")

        return refuse

    return decorator
