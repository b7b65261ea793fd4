"""A folder for what can be made again, closed to other users."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def own_folder(name: str) -> Path | None:
    """A folder of this user's in which nobody else can write, in the user's cache, else beside temporary files; None if there
    is no such place."""
    user = os.getuid()

    def own() -> Path:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "chunked-prefill" / name

    def shared() -> Path:
        return Path(tempfile.gettempdir()) / f"chunked-prefill-{user}-{name}"

    for place in (own, shared):
        with suppress(OSError, RuntimeError):  # RuntimeError: a user without a home
            (folder := place()).mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.lstat().st_uid == user and not folder.lstat().st_mode & 0o022 and os.access(folder, os.W_OK):
                return folder
    return None
