"""How every command speaks: to people through `console`, to scripts through `result`, of bad input in one line.

`--quiet` keeps all but errors and the exit status back; `--json` also, but for one line with the result as JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ParamSpec

from rich.console import Console

from experiments.provenance import ROOT
from experiments.spec import SpecError

P = ParamSpec("P")
console = Console(highlight=False, soft_wrap=True)  # colour only where standard output is a terminal
_wanted = argparse.Namespace(json=False)

OPTIONS = {
    "testbed": {"default": "auto", "help": "a testbed's name or YAML file; auto: the best that this machine can run"},
    "trace": {"help": "CSV of request lengths, or a .json of vllm bench serve --save-detailed"},
    "out": {"type": Path, "default": ROOT / "artifacts" / "runs", "help": "where runs are written"},
    "runs": {"type": Path, "default": ROOT / "artifacts" / "runs", "help": "where runs are"},
    "report": {"type": Path, "default": ROOT / "artifacts" / "report", "help": "where results are written"},
}


def arguments(module: str, about: str | None, *options: str) -> argparse.ArgumentParser:
    """The parser of `python -m module`, with these of OPTIONS, --quiet and --json; about: the module's docstring."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=(about or "").split("\n")[0])
    for name in options:
        parser.add_argument(f"--{name}", **OPTIONS[name])  # type: ignore[arg-type]
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    parser.add_argument("--json", action="store_true", help="print nothing but the result, one line of JSON")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options given, --quiet and --json obeyed from here on."""
    options = parser.parse_args(argv)
    console.quiet, _wanted.json = options.quiet or options.json, options.json
    return options


def result(**facts: object) -> None:
    """What the command found or made, printed if --json asks for it."""
    if _wanted.json:
        print(json.dumps(facts, sort_keys=True, default=str))


def command(main: Callable[P, int]) -> Callable[P, int]:
    """A command's main in which a SpecError, or a file that cannot be read or written, is one line on standard error and
    exit status 2."""

    @functools.wraps(main)
    def checked(*values: P.args, **keywords: P.kwargs) -> int:
        try:
            return main(*values, **keywords)
        except (SpecError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return checked
