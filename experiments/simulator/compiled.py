"""The simulator's inner functions, compiled by numba once for each user and version of this room.

Without numba, which has no wheel for macOS on Intel, and with NUMBA_DISABLE_JIT=1 the same code runs in plain Python.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from experiments.records.terminal import console

Function = TypeVar("Function", bound=Callable[..., Any])


@cache
def cache_folder() -> Path | None:
    """Where compiled code is kept: a folder of this user's in which nobody else can write, as it is run; None if there is none.

    One for each version of the room: numba sees changes of the function that is called, not of those that this one calls.
    """
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    user, version = os.getuid(), hashlib.sha256(sources).hexdigest()[:16]

    def own() -> Path:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "chunked-prefill" / f"numba-{version}"

    def shared() -> Path:
        return Path(tempfile.gettempdir()) / f"chunked-prefill-{user}-{version}"

    for place in (own, shared):
        with suppress(OSError, RuntimeError):  # RuntimeError: a user without a home
            (folder := place()).mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.lstat().st_uid == user and not folder.lstat().st_mode & 0o022 and os.access(folder, os.W_OK):
                return folder
    return None


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
