"""`make package` and what `make verify BAG=file` takes: one archive of runs, report and reference.

An archive made elsewhere is hostile until shown otherwise: it is unpacked into an empty folder, regular files only, names that
stay inside, sizes that are bounded whatever the archive says of itself.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import re
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
from analysis.judge.load import REFERENCE, find_runs
from experiments.records.errors import SpecError
from experiments.records.provenance import ROOT, sha256
from experiments.records.store import MANIFEST, write_whole
from experiments.records.terminal import arguments, command, console, parse, result

MOST_BYTES = 2 * 2**30  # of all files together; a finished fig9a and fig9b are 4 MB, simulated ones 75 MB
MOST_FILE = 256 * 2**20
MOST_FILES = 50_000
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


def _zip_members(path: Path) -> Iterator[Member]:
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
        for name, size, data in _zip_members(path) if zipfile.is_zipfile(path) else _tar_members(path):
            _check(path.name, name, size, seen)
            if data is None:
                continue
            seen.add(name)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            got = 0
            with (folder / name).open("xb") as file:
                while block := data.read(2**20):
                    got, total = got + len(block), total + len(block)
                    if got > size or total > MOST_BYTES:
                        reason = f"{name!r} holds more than it says, or all files over {MOST_BYTES}"
                        raise SpecError(f"{path.name}: refused: {reason}")
                    file.write(block)
            if got != size:
                raise SpecError(f"{path.name}: cut short: {name!r} holds {got} of {size} bytes")
    except SpecError:
        raise
    except UNREADABLE as error:
        raise SpecError(f"{path}: cannot be unpacked ({error}); a zip or tar archive is needed") from None
    if not seen:
        raise SpecError(f"{path}: holds no file; an archive of make package, or of a bag, is needed")


def problems(folder: Path) -> list[str]:
    """`changed: PATH` and so on: an unpacked package against its own manifest; empty for the archive of a bare bag."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return []
    there = [path for path in folder.rglob("*") if path.is_file() and path != manifest]
    return integrity.compare({path.relative_to(folder).as_posix(): sha256(path) for path in there}, integrity.listed(manifest))


def runs_in(folder: Path) -> Path:
    """The folder of runs in an unpacked archive: that of a package, or one made for the bare bags in it. Raises SpecError."""
    for candidate in (folder / "runs", *folder.glob("*/runs"), folder, *folder.glob("*")):
        if find_runs(candidate):
            return candidate
    bags = [path for path in (folder, *sorted(folder.glob("*"))) if (path / "bagit.txt").is_file() or (path / "data").is_dir()]
    if not bags:
        raise SpecError("no bag in this archive; an archive of make package, or of a bag, is needed")
    runs = Path(tempfile.mkdtemp(dir=folder.parent))
    for number, bag in enumerate(bags, start=1):
        info = bag / "bag-info.txt"
        said = info.read_text("utf-8", "replace") if info.is_file() else ""
        match = re.search(r"^External-Identifier: ([a-z0-9-]{1,60})-[0-9a-f]{8}$", said, re.M)
        target = runs / (match[1] if match else "run") / f"bag-elsewhere-{number}"
        target.parent.mkdir(exist_ok=True)
        bag.rename(target)
    return runs


def package(runs: Path, report: Path, target: Path) -> list[str]:
    """Write the archive, the same bytes for the same content; returns the names in it. Raises SpecError without a bag."""
    bags = [bag for found in find_runs(runs).values() for bag in found]
    if not bags:
        raise SpecError(f"{runs}: no finished run; make fig9a makes one")
    files = {f"runs/{path.relative_to(runs).as_posix()}": path for bag in bags for path in bag.rglob("*")}
    for folder, kept in ((report, "report"), (REFERENCE, "reference")):
        files |= {f"{kept}/{path.name}": path for path in folder.glob("*") if not path.name.startswith(".")}
    files |= {name: ROOT / name for name in ("README.md", "LICENSE", "CITATION.cff")}
    whole = {name: path.read_bytes() for name, path in sorted(files.items()) if path.is_file() and not path.is_symlink()}
    manifest = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in whole.items())
    contents = {MANIFEST: manifest.encode(), **whole}
    write_whole(target, partial(_zip, contents))
    return list(contents)


def _zip(contents: Mapping[str, bytes], target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:  # compressors differ by version; Parquet is compressed
        for name, data in contents.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            archive.writestr(entry, data)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 if there is nothing to pack or it cannot be written."""
    parser = arguments("analysis.judge.archive", __doc__, "runs", "report")
    parser.add_argument("--target", type=Path, default=ROOT / "artifacts" / "package.zip", help="the archive to write")
    options = parse(parser, argv)
    names = package(options.runs, options.report, options.target)
    if not (options.report / "verdict.json").is_file():
        console.print("no verdict and no report in it: make -k verify report makes them")
    size, digest = options.target.stat().st_size, sha256(options.target)
    console.print(f"{options.target}: {len(names)} files, {size:,} bytes, sha256 {digest}")
    result(archive=options.target, files=len(names), bytes=size, sha256=digest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
