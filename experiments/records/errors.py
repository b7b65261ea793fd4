"""The one kind of error that a user can mend, in one line: what is wrong, where, what was given, what is allowed."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import ValidationError


class SpecError(ValueError):
    """Bad input."""


def first_problem(error: ValidationError, keys: Iterable[str] = ()) -> str:
    """The first thing that pydantic found wrong: key, what was given, what is allowed. keys: those of the top level."""
    first = error.errors(include_url=False)[0]
    key, given = ".".join(map(str, first["loc"]))[:200] or "(top level)", repr(first["input"])
    if first["type"] in ("missing", "missing_argument"):
        return f"{key}: missing; it must be given"
    if first["type"] == "unexpected_keyword_argument":
        return f"{key}: unknown key" + (f"; allowed: {', '.join(keys)}" if len(first["loc"]) == 1 else "")
    allowed = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("allowed: ")
    return f"{key}: got {given if len(given) <= 80 else given[:77] + '...'}; allowed: {allowed}"
