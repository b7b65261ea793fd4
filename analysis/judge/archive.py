"""`make package` and what `make verify BAG=file` takes: one archive of runs, report and reference.

An archive made elsewhere is hostile until shown otherwise: it is unpacked into an empty folder, regular files only, names that
stay inside, sizes that are bounded whatever the archive says of itself.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import math
import re
import shutil
import stat
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from analysis.judge import integrity
from analysis.judge.load import REFERENCE, find_runs, stated
from experiments.records.documents import printable
from experiments.records.errors import SpecError
from experiments.records.provenance import ROOT, sha256
from experiments.records.store import MANIFEST, write_whole
from experiments.records.tables import rows_of
from experiments.records.terminal import arguments, command, console, parse, result

MOST_BYTES = 2 * 2**30  # of all files together; a finished fig9a and fig9b are 4 MB, simulated ones 75 MB
MOST_FILE = 256 * 2**20
MOST_FILES = 50_000
MOST_ENTRIES = 2 * MOST_FILES  # folders too
MOST_ROWS = 10**9  # of all tables; 20 seeds of fig9b at the paper's scale have a third of it
MOST_DIRECTORY = 2**24  # bytes of a zip's list of files
HEADER = 2**20  # what an archive may spend between two files
NAME = re.compile(r"[\w.+@=-]{1,120}(/[\w.+@=-]{1,120}){0,12}", re.ASCII)
OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}  # by how a file begins
UNREADABLE = (OSError, EOFError, ValueError, NotImplementedError,
              tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)  # fmt: skip
Member = tuple[str, int, IO[bytes] | None]  # name, size, and what reads it; None: a folder


class _Bounded:
    """A stream that gives no more than it is allowed at the time: a decompressor may hold any amount of zeros."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self._stream, self._name, self.allowed = stream, name, HEADER

    def read(self, size: int) -> bytes:
        data = self._stream.read(min(size, self.allowed + 1))
        self.allowed -= len(data)
        if self.allowed < 0:
            raise SpecError(f"{self._name}: refused: more bytes than its files need")
        return data


def _check(archive: str, name: str, size: int, seen: set[str]) -> None:
    """Raises SpecError for a file that this archive must not hold."""
    if not NAME.fullmatch(name) or any(set(part) == {"."} for part in name.split("/")):
        raise SpecError(f"{archive}: refused: name {name[:80]!r}; allowed: relative, letters, digits and . _ + @ = -")
    if name in seen or any(str(parent) in seen for parent in PurePosixPath(name).parents):
        raise SpecError(f"{archive}: refused: {name!r} is there twice, or is file and folder at once")
    if not 0 <= size <= MOST_FILE or len(seen) >= MOST_FILES:
        raise SpecError(f"{archive}: refused: {name!r}, {size} bytes; allowed: {MOST_FILES} files of {MOST_FILE} bytes")


def _directory_bytes(path: Path) -> float:
    """Bytes of a zip's directory, as its end record says, where zipfile looks for that; one of 64 bits is beyond any bound."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**16 - 42))
        tail = file.read()
    plain = tail[-22:-18] == b"PK\5\6" and tail[-2:] == b"\0\0"
    at = len(tail) - 22 if plain else tail.rfind(b"PK\5\6")
    return math.inf if tail[at - 20 : at - 16] == b"PK\6\7" else int.from_bytes(tail[at + 12 : at + 16], "little")


def _zip_members(path: Path) -> Iterator[Member]:
    if (size := _directory_bytes(path)) > MOST_DIRECTORY:  # zipfile reads it as a whole
        raise SpecError(f"{path.name}: refused: a directory of {size} bytes; allowed: {MOST_DIRECTORY}")
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            kind, folder = stat.S_IFMT(entry.external_attr >> 16), entry.is_dir()
            if kind not in (0, stat.S_IFDIR if folder else stat.S_IFREG) or entry.flag_bits & 1:
                raise SpecError(f"{path.name}: refused: {entry.filename[:80]!r} is no plain file")
            with archive.open(entry) as data:
                yield entry.filename.rstrip("/"), entry.file_size, None if folder else data


def _tar_members(path: Path) -> Iterator[Member]:
    with path.open("rb") as file:
        magic = file.read(6)
        file.seek(0)
        opener: Any = next((opener for start, opener in OPENERS.items() if magic.startswith(start)), None)
        bounded: Any = _Bounded(opener(file) if opener else file, path.name)
        with tarfile.open(fileobj=bounded, mode="r|") as archive:
            for member in archive:
                if not (member.isdir() or member.isreg()) or member.issparse():
                    raise SpecError(f"{path.name}: refused: {member.name[:80]!r} is no plain file")
                bounded.allowed = HEADER + max(0, member.size) if member.size <= MOST_FILE else HEADER
                archive.members.clear()  # type: ignore[attr-defined]  # it keeps every one, with all that its header says
                if member.name != ".":
                    yield member.name.removeprefix("./"), member.size, archive.extractfile(member)
                bounded.allowed = HEADER


def unpack(path: Path, folder: Path) -> None:
    """Unpack a zip or tar archive (gzip, bzip2, xz or plain) into an empty folder; folders without files are left out.

    Raises SpecError for what must not be in one, for what cannot be read, and for more than MOST_BYTES.
    """
    seen: set[str] = set()
    total = 0
    try:
        members = _zip_members(path) if zipfile.is_zipfile(path) else _tar_members(path)
        for number, (name, size, data) in enumerate(members):
            if number >= MOST_ENTRIES:
                raise SpecError(f"{path.name}: refused: more than {MOST_ENTRIES} entries")
            _check(path.name, name, size, seen)
            if data is None:
                continue
            seen.add(name)
            if (total := total + size) > MOST_BYTES:
                raise SpecError(f"{path.name}: refused: its files are over {MOST_BYTES} bytes together")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("xb") as file:
                shutil.copyfileobj(data, file)  # which gives no more than size
                if file.tell() != size:
                    raise SpecError(f"{path.name}: cut short: {name!r} holds {file.tell()} of {size} bytes")
    except SpecError:
        raise
    except UNREADABLE as error:
        raise SpecError(f"{path}: cannot be unpacked ({error}); a zip or tar archive is needed") from None
    if not seen:
        raise SpecError(f"{path}: holds no file; an archive of make package, or of a bag, is needed")
    if (rows := sum(map(rows_of, folder.rglob("*.parquet")))) > MOST_ROWS:
        raise SpecError(f"{path.name}: refused: {rows} rows in its tables; allowed: {MOST_ROWS}")


def problems(folder: Path) -> list[str]:
    """`changed: PATH` and so on: an unpacked package, wherever it lies in its archive, against its own manifest; empty for the
    archive of bare bags."""
    lines = []
    for manifest in sorted(path for path in folder.rglob(MANIFEST) if (path.parent / "runs").is_dir()):
        there = [path for path in manifest.parent.rglob("*") if path.is_file() and path != manifest]
        found = {path.relative_to(manifest.parent).as_posix(): sha256(path) for path in there}
        lines += integrity.compare(found, integrity.listed(manifest))
    return lines


def _bags(folder: Path) -> list[Path]:
    """The bags in a folder, half copied ones too."""
    if any((folder / mark).exists() for mark in (*integrity.TAG_FILES[:2], integrity.TAGS, "data/plan.json", "data/trials")):
        return [folder]
    return [bag for path in sorted(folder.iterdir()) if path.is_dir() for bag in _bags(path)]


def runs_in(folder: Path) -> Path:
    """The folder of runs in an unpacked archive: that of a package, or one made for the bare bags in it.

    Raises SpecError if there is no bag, or if there are bags in several folders of runs: names of runs may be the same in them.
    """
    bags = _bags(folder)
    if not bags:
        raise SpecError("no bag in this archive; an archive of make package, or of a bag, is needed")
    laid_out = all(bag.name.startswith("bag-") and folder not in (bag, bag.parent) for bag in bags)
    places = {bag.parent.parent if laid_out else bag.parent for bag in bags}
    if len(places) > 1:
        told = ", ".join(sorted(path.relative_to(folder).as_posix() for path in places))
        raise SpecError(f"bags in {len(places)} folders of runs: {told}; one is needed, verify them one at a time")
    if laid_out:
        return places.pop()
    runs = Path(tempfile.mkdtemp(dir=folder.parent))
    for number, bag in enumerate(bags, start=1):
        said = "-".join(stated([bag], key) or "" for key in ("figure", "testbed"))
        target = runs / (said if NAME.fullmatch(said) and "/" not in said else f"run-{number}") / f"bag-elsewhere-{number}"
        target.parent.mkdir(exist_ok=True)
        bag.rename(target)
    return runs


def no_report(runs: Path, report: Path) -> str | None:
    """Why the report is not packed: its verdict must be there, and of these runs; None if it is."""
    try:
        parts, found = json.loads((report / "verdict.json").read_bytes())["runs"], find_runs(runs)
        reasons = [integrity.outdated(part, found.get(part["name"], [])) for part in parts]
        reasons += [f"{name}: not judged" for name in sorted(found.keys() - {part["name"] for part in parts})]
    except FileNotFoundError:
        return "no verdict and no report in it"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return f"no report in it: {report / 'verdict.json'} cannot be read"
    return next((f"no report in it, as its verdict is of other runs ({reason})" for reason in reasons if reason), None)


def package(runs: Path, report: Path, target: Path) -> list[str]:
    """Write the archive, the same bytes for the same content; returns the names in it. Raises SpecError without a bag."""
    bags = [bag for found in find_runs(runs).values() for bag in found]
    if not bags:
        raise SpecError(f"{runs}: no finished run; make fig9a makes one")
    files = {f"runs/{path.relative_to(runs).as_posix()}": path for bag in bags for path in bag.rglob("*")}
    for folder, kept in ((REFERENCE, "reference"), *([] if no_report(runs, report) else [(report, "report")])):
        files |= {f"{kept}/{path.name}": path for path in folder.glob("*") if not path.name.startswith(".")}
    return pack(files | {name: ROOT / name for name in ("README.md", "LICENSE", "CITATION.cff")}, target)


def pack(files: Mapping[str, Path], target: Path) -> list[str]:
    """Write an archive of those that are plain files, under these names, with a manifest; returns the names in it."""
    whole = {name: path for name, path in sorted(files.items()) if path.is_file() and not path.is_symlink()}
    manifest = "".join(f"{sha256(path)}  {name}\n" for name, path in whole.items())
    write_whole(target, partial(_zip, manifest.encode(), whole))
    return [MANIFEST, *whole]


def _zip(manifest: bytes, files: Mapping[str, Path], target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:  # compressors differ by version; Parquet is compressed
        for name in (MANIFEST, *files):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            archive.writestr(entry, manifest if name == MANIFEST else files[name].read_bytes())


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 if there is nothing to pack or it cannot be written."""
    parser = arguments("analysis.judge.archive", __doc__, "runs", "report")
    parser.add_argument("--target", type=Path, default=ROOT / "artifacts" / "package.zip", help="the archive to write")
    options = parse(parser, argv)
    names = package(options.runs, options.report, options.target)
    if left_out := no_report(options.runs, options.report):
        console.print(f"{printable(left_out)}; make -k verify report makes one")
    size, digest = options.target.stat().st_size, sha256(options.target)
    console.print(f"{options.target}: {len(names)} files, {size:,} bytes, sha256 {digest}")
    result(archive=options.target, files=len(names), bytes=size, sha256=digest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
