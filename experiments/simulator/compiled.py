"""The simulator's inner functions, compiled by numba once for each user and version of this room.

Without numba, which has no wheel for macOS on Intel, and with NUMBA_DISABLE_JIT=1 the same code runs in plain Python.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from experiments.records.provenance import own_folder
from experiments.records.terminal import console

Function = TypeVar("Function", bound=Callable[..., Any])


@cache
def cache_folder() -> Path | None:
    """Where compiled code is kept, see own_folder, as it is run.

    One for each version of the room: numba sees changes of the function that is called, not of those that this one calls.
    """
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return own_folder(f"numba-{hashlib.sha256(sources).hexdigest()[:16]}")


@cache
def say_if_not_kept() -> None:
    """Once, why every command compiles anew."""
    if cache_folder() is None:
        console.print("simulator: compiled anew, some 5 s: no folder of this user's to keep that in; XDG_CACHE_HOME names one")


def compiled(function: Function) -> Function:
    """The function, compiled or read from the cache when it is first called."""
    try:
        import numba
    except ModuleNotFoundError:
        return function
    folder, others = cache_folder(), numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder or "")
    made: Function = numba.njit(cache=folder is not None, error_model="numpy")(function)  # no test for a zero before a division
    numba.config.CACHE_DIR = others
    return made
