"""The one kind of error that a user can mend."""

from __future__ import annotations


class SpecError(ValueError):
    """Bad input, in one line: what is wrong, where, the value that was given, what is allowed."""
