"""The simulator's inner functions, compiled by numba once for each user and version of this room.

Without numba, which has no wheel for macOS on Intel, and with NUMBA_DISABLE_JIT=1 the same code runs in plain Python.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from experiments.records.terminal import console

Function = TypeVar("Function", bound=Callable[..., Any])


@cache
def cache_folder() -> Path | None:
    """A folder of this user's, in which nobody else can write: what lies there is run. None if there is no place for it.

    One for each version of the room: numba sees changes of the function that is called, not of those that this one calls.
    """
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    user, home = os.getuid(), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    for place in (f"{home}/chunked-prefill", f"{tempfile.gettempdir()}/chunked-prefill-{user}"):
        folder = Path(place).expanduser() / f"numba-{hashlib.sha256(sources).hexdigest()[:16]}"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = [path.lstat() for path in (folder, folder.parent)]
            if all(stat.st_uid == user and not stat.st_mode & 0o022 for stat in found) and os.access(folder, os.W_OK):
                return folder
        except OSError:
            continue
    return None


@cache
def say_if_not_kept() -> None:
    """Once, if every command must compile anew."""
    if cache_folder() is None:
        console.print(
            "simulator: compiled anew, some 5 s: no folder of this user's to keep it in, such as XDG_CACHE_HOME names"
        )


def compiled(function: Function) -> Function:
    """The function, compiled or read from the cache when it is first called."""
    try:
        import numba
    except ModuleNotFoundError:
        return function
    folder, others = cache_folder(), numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder or "")
    made: Function = numba.njit(cache=folder is not None)(function)
    numba.config.CACHE_DIR = others
    return made
