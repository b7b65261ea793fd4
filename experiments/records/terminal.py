"""How every command speaks: to people through `console`, to scripts through `result`, of bad input in one line.

`--quiet` keeps all but errors and the exit status back; `--json` also, but for one line with the result as JSON.
"""

from __future__ import annotations

import argparse
import errno
import functools
import json
import os
import re
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, ParamSpec

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.records.errors import SpecError
from experiments.records.provenance import ROOT

P = ParamSpec("P")
RUNS = ROOT / "artifacts" / "runs"


class _Console(Console):
    def print(self, *objects: Any, **how: Any) -> None:
        with _aloud():
            super().print(*objects, **how)

    def on_broken_pipe(self) -> None:
        """Go on in silence: what a command does is not undone by a reader who has gone."""
        _unheard()


# Colour only where standard output is a terminal; what is printed may come from anywhere, so nothing in it is markup.
console = _Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
_wanted = argparse.Namespace(json=False)
BEGAN = time.monotonic() - time.process_time()  # until here it has done nothing but import


def _given(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("got nothing")
    return text


def _path(text: str) -> Path:
    return Path(_given(text)).expanduser()


OPTIONS = {
    "testbed": {"type": _given, "default": "auto", "help": "a testbed's name or YAML file; auto: the best that can run here"},
    "trace": {"help": "requests: a trace, a result of a benchmark, or 512/128 for all alike"},
    "out": {"type": _path, "default": RUNS, "help": "where runs are written"},
    "runs": {"type": _path, "default": RUNS, "help": "where runs are"},
    "report": {"type": _path, "default": ROOT / "artifacts" / "report", "help": "where results are written"},
}
VARIABLES = {"runs": "OUT"}  # of make, where it is not the option in capitals


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raises SpecError, which names the variable of make."""
        named = re.compile(r"^argument (?:--)?(\w+)")
        raise SpecError(named.sub(lambda found: VARIABLES.get(found[1], found[1].upper()), message))


def arguments(module: str, about: str | None, *options: str) -> argparse.ArgumentParser:
    """The parser of `python -m module`, with these of OPTIONS, --quiet and --json; about: the module's docstring."""
    parser = _Parser(prog=f"python -m {module}", description=(about or "").split("\n")[0])
    for name in options:
        parser.add_argument(f"--{name}", **OPTIONS[name])  # type: ignore[arg-type]
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    parser.add_argument("--json", action="store_true", help="print nothing but the result, one line of JSON")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options given, --quiet and --json obeyed from here on. Raises SpecError, also for a missing folder of runs."""
    options = parser.parse_args(argv)
    runs = getattr(options, "runs", None)
    if runs and runs.absolute() != RUNS and not runs.is_dir():  # a fresh checkout has none, and nothing was mistyped
        raise SpecError(f"OUT: got {runs}; no such folder; make fig9a makes a first run in it")
    console.quiet, _wanted.json = options.quiet or options.json, options.json
    return options


def result(**facts: object) -> None:
    """What the command found or made, printed if --json asks for it."""
    if _wanted.json:
        with _aloud():
            print(json.dumps(facts, sort_keys=True, default=str))


def table(columns: Sequence[str], parts: Mapping[str, Sequence[Sequence[str]]]) -> None:
    """Print one table of at most 80 columns, with one heading for all parts: each its name, if it has one, and its rows.

    An empty row sets apart those that follow.
    """
    view = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for column in columns:
        view.add_column(column, justify="right", overflow="fold")
    for name, rows in parts.items():
        view.add_section()
        if name:
            view.add_row(Text(name, "bold", justify="left"))
        for row in rows:
            view.add_row(*row) if row else view.add_section()
    console.print(view, soft_wrap=False, width=min(80, console.width))
    console.print()


def _wrapped(text: str, **how: Any) -> str:
    """In lines of at most 80 columns, by words; a word that is longer, such as a path, stays whole."""
    return textwrap.fill(text, min(80, console.width), break_long_words=False, break_on_hyphens=False, **how)


def paragraph(text: str, indent: str = "", hang: str = "", style: str | None = None) -> None:
    """Print wrapped.

    hang: begins all lines but the first, after the indent.
    """
    console.print(_wrapped(text, initial_indent=indent, subsequent_indent=indent + hang), style=style)


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


def tell(line: str) -> None:
    """One line on standard error, heard or not; wrapped where that is a terminal."""
    with suppress(OSError):
        print(_wrapped(line) if sys.stderr and sys.stderr.isatty() else line, file=sys.stderr)


def _unheard() -> None:
    """Nobody reads standard output, or it takes no more: what is said from here on goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


@contextmanager
def _aloud() -> Iterator[None]:
    """Raises OSError that names standard output if that takes no more, as on a full disk; a reader who has gone is no error."""
    try:
        yield
    except OSError as error:
        _unheard()
        if error.errno != errno.EPIPE:
            raise OSError(error.errno, error.strerror, "standard output") from None


def _flush() -> None:
    """Have everything said now: at the end of the process Python would tell of a failure in its own way."""
    with _aloud():
        if sys.stdout:  # None where it was closed from the beginning
            sys.stdout.flush()


def reason(error: BaseException) -> str:
    """What went wrong, the file first, without the number that the system gives to it."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _interrupted(_signal: int, _frame: object) -> None:
    """The first SIGINT or SIGTERM; a further one must not disturb what cleans up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: tell("stopping already, a few seconds more"))
    raise KeyboardInterrupt


def command(main: Callable[P, int]) -> Callable[P, int]:
    """A command's main, whose last words are one line on standard error, notes of the exception included.

    Exit status 2 for a SpecError, or a file that cannot be read or written; 130 for SIGINT and SIGTERM; 3, with a traceback,
    for a defect of ours. A closed standard output changes neither what is done nor the exit status.
    """

    @functools.wraps(main)
    def checked(*values: P.args, **keywords: P.kwargs) -> int:
        before = {number: signal.signal(number, _interrupted) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            status = main(*values, **keywords)
            _flush()
            return status
        except (KeyboardInterrupt, SpecError, OSError) as error:
            words = "interrupted" if isinstance(error, KeyboardInterrupt) else f"error: {reason(error)}"
            tell("; ".join((words, *getattr(error, "__notes__", ()))))
            return 130 if isinstance(error, KeyboardInterrupt) else 2
        except Exception:
            traceback.print_exc()
            return 3
        finally:
            with suppress(OSError):
                _flush()
            for number, handler in before.items():
                signal.signal(number, handler)

    return checked
