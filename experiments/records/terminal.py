"""How every command speaks: to people through `console`, to scripts through `result`, of bad input in one line.

`--quiet` keeps all but errors and the exit status back; `--json` also, but for one line with the result as JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ParamSpec

from rich import box
from rich.console import Console
from rich.table import Column, Table

from experiments.records.errors import SpecError
from experiments.records.provenance import ROOT

P = ParamSpec("P")
# Colour only where standard output is a terminal; what is printed may come from anywhere, so nothing in it is markup.
console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
_wanted = argparse.Namespace(json=False)
BEGAN = time.monotonic() - time.process_time()  # until here it has done nothing but import

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


def table(*names: str) -> Table:
    """A table of numbers with these columns, to be filled and printed."""
    return Table(*(Column(name, justify="right") for name in names), box=box.SIMPLE_HEAD, pad_edge=False)


def took() -> str:
    """Since this process began."""
    seconds = time.monotonic() - BEGAN
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def written(*paths: Path) -> str:
    """What a command leaves, for its last words: files or folders, their size, and how long it took."""
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    size = sum(file.stat().st_size for file in files if file.is_file())
    told = f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
    return f"{', '.join(map(str, paths))}: {told}, in {took()}"


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
