"""The one place that imports numba, so that `import calibrators` stays light and every kernel is compiled alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

from pipeline.notices import notice

_F = TypeVar("_F", bound=Callable[..., Any])


def kernel(function: _F) -> _F:
    """Compile ``function`` at its first call, without the GIL, and remember the machine code on disk.

    The cache is beside the module, else in the user's cache folder (``NUMBA_CACHE_DIR`` overrides both).
    """
    return _compiled(function, "python")


def dividing_kernel(function: _F) -> _F:
    """Compile like :func:`kernel`, but a division by zero gives IEEE 754's infinity or NaN and raises nothing.

    Only then are loops that divide computed several values at a time.
    """
    return _compiled(function, "numpy")


def _compiled(function: _F, error_model: str) -> _F:
    try:
        compiled: _F = numba.njit(nogil=True, cache=True, error_model=error_model)(function)
    except RuntimeError:  # numba's "no locator available": nothing is writable
        notice(
            "kernel-not-cached",
            "Compiled calibration kernels cannot be kept on disk, so each process compiles them again (seconds).",
            where="NUMBA_CACHE_DIR",
        )
        compiled = numba.njit(nogil=True, error_model=error_model)(function)
    return compiled
