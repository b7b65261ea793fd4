"""Trial and run directories. A trial appears whole or not at all; a finished run is sealed as a BagIt bag.

RUNS/fig9a-cpu/open-<identity>/trials/<session>/<trial>/   trials of a run in progress
RUNS/fig9a-cpu/bag-<identity>-1/                           a sealed run; more replicates make bag-...-2
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from experiments.records.errors import SpecError
from experiments.records.provenance import sha256, short
from experiments.records.record import RECORD_FORMAT, STEP_COLUMNS, TOKEN_COLUMNS, Record

MANIFEST = "manifest-sha256.txt"
MOST_ROWS = 50_000_000  # of a table; the longest simulated trial has half a million
FILES = ("requests.csv", "steps.parquet", "tokens.parquet", "trial.json")  # in the manifest's order


def to_json(data: object) -> str:
    """The project's one way to write JSON: sorted, indented, a newline at the end, no NaN."""
    return json.dumps(data, indent=2, sort_keys=True, allow_nan=False) + "\n"


def write_whole(path: Path, content: str | bytes | Callable[[Path], object]) -> None:
    """Write a file whole or not at all, its folder too: text, bytes, or what a function writes to the path that it is given.

    Raises OSError that names the file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name[:100]}-", dir=path.parent) as folder:
            whole = Path(folder) / path.name
            if callable(content):
                content(whole)
            else:
                whole.write_bytes(content.encode() if isinstance(content, str) else content)
            whole.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    _sync(path)


class Run:
    """The directory of one figure on one testbed, for one identity of code and inputs."""

    def __init__(self, folder: Path, identity: Mapping[str, str]) -> None:
        self.folder = folder
        self.identity = dict(identity)
        self.id = short(identity)
        self.open = folder / f"open-{self.id}"

    def bags(self) -> list[Path]:
        """Sealed bags of this identity, oldest first."""
        return sorted(self.folder.glob(f"bag-{self.id}-*"), key=_number)

    def _sealed(self) -> set[tuple[str, str]]:
        return {(path.parent.name, path.name) for bag in self.bags() for path in bag.glob("data/trials/*/*")}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; the lock goes with the process, however that ends. Raises SpecError if it is held."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):  # said now, not after the first trial
                handle = os.open(self.folder, os.O_RDONLY)
        except OSError as error:
            raise SpecError(f"OUT: {self.folder}: {error.strerror}; a folder that can be written is needed") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise SpecError(f"{self.folder}: another run is writing here; wait for it, or choose another OUT") from None
        try:
            yield
        finally:
            os.close(handle)

    def complete(self) -> set[tuple[str, str]]:
        """(session, trial) of every trial already there, sealed or not; what is damaged is set aside and does not count."""
        done = self._sealed()
        for path in sorted(self.open.glob("trials/*/*")):
            if trial_is_whole(path):
                done.add((path.parent.name, path.name))
            else:
                path.rename(Path(tempfile.mkdtemp(prefix="damaged-", dir=self.open)) / path.name)
        return done

    def find(self, session: str, trial: str) -> Path | None:
        """Where a trial lies, sealed or not; None if it is not there."""
        places = [*(bag / "data" for bag in self.bags()), self.open]
        return next((path for place in places if trial_is_whole(path := place / "trials" / session / trial)), None)

    def finished(self, model: str) -> list[Path]:
        """The trials of a model that are there, sealed or not, but for what measured its saturation."""
        places = [*(bag / "data" for bag in self.bags()), self.open]
        return [path for place in places for path in sorted(place.glob(f"trials/{model}-seed*/*"))]

    def write_trial(self, session: str, trial: str, facts: Mapping[str, Any], record: Record) -> Path:
        """Store a trial atomically: files, then manifest, then the rename that makes it count."""
        self.open.mkdir(parents=True, exist_ok=True)
        for stale in self.open.glob(".trial-*"):  # of a driver that was killed while writing; we hold the lock
            shutil.rmtree(stale)
        target = self.open / "trials" / session / trial
        target.parent.mkdir(parents=True, exist_ok=True)
        contents = {
            "requests.csv": record.requests.to_csv(index=False).encode(),
            "steps.parquet": record.steps.to_parquet(index=False),
            "tokens.parquet": record.tokens.to_parquet(index=False),
            "trial.json": to_json({"format": RECORD_FORMAT, "session": session, "trial": trial, **facts}).encode(),
        }
        with tempfile.TemporaryDirectory(prefix=".trial-", dir=self.open) as folder:
            whole = Path(folder) / trial
            whole.mkdir()
            digests = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
            for name, data in {**contents, MANIFEST: _manifest(digests)}.items():
                _write(whole / name, data)
            _sync(whole)
            whole.rename(target)
        _sync(target.parent)
        return target

    def schedules(self) -> list[dict[str, Any]]:
        """What note_schedule noted of the open run, oldest first."""
        return [json.loads(path.read_text()) for path in sorted(self.open.glob("schedule-*.json"))]

    def note_schedule(self, schedule: Mapping[str, Any]) -> None:
        """Keep the plan that a driver starts with; the run that it resumes has others before it."""
        self.open.mkdir(parents=True, exist_ok=True)
        write_whole(self.open / f"schedule-{len(self.schedules()) + 1:03}.json", to_json(schedule))

    def write_log(self, session: str, text: str) -> None:
        """Keep what a session said when it died, beside the trials; no part of the bag."""
        with (self.folder / f"died-{session}.log").open("a", encoding="utf-8") as file:
            file.write(f"{text.rstrip()}\n\n")

    def seal(self, documents: Mapping[str, str], info: Mapping[str, str]) -> Path | None:
        """Seal the open trials as a bag and return it; None if there are none. `documents`: further payload, name -> text."""
        import bagit

        sealed, bags = self._sealed(), self.bags()
        trials = [path for path in self.open.glob("trials/*/*") if (path.parent.name, path.name) not in sealed]
        if trials:
            temporary = self.folder / f".seal-{self.id}"
            shutil.rmtree(temporary, ignore_errors=True)
            logging.getLogger("bagit").setLevel(logging.CRITICAL)  # it prints the stack of an error that it raises
            try:
                for path in trials:
                    shutil.copytree(path, temporary / "trials" / path.parent.name / path.name, copy_function=_link_or_copy)
                for name, text in documents.items():
                    _write(temporary / name, text.encode())
                bagit.make_bag(str(temporary), dict(info), checksums=["sha256"])
                temporary.rename(self.folder / f"bag-{self.id}-{_number(bags[-1]) + 1 if bags else 1}")
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            _sync(self.folder)
        shutil.rmtree(self.open, ignore_errors=True)
        return self.bags()[-1] if trials else None


def _number(bag: Path) -> int:
    return int(bag.name.rsplit("-", 1)[1])


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _manifest(digests: Mapping[str, str]) -> bytes:
    return "".join(f"{digests[name]}  {name}\n" for name in FILES).encode()


def trial_is_whole(path: Path) -> bool:
    """Whether a trial directory holds exactly the files of its manifest, unchanged to the byte."""
    try:
        found = _manifest({name: sha256(path / name) for name in FILES})
        return (path / MANIFEST).read_bytes() == found and len(list(path.iterdir())) == len(FILES) + 1
    except OSError:
        return False


def read_trial(path: Path) -> tuple[dict[str, Any], Record]:
    """Facts and record of a trial directory. Raises SpecError if it was written in another format."""
    facts = json.loads((path / "trial.json").read_text())
    if facts.get("format") != RECORD_FORMAT:
        raise SpecError(f"{path}: record format {facts.get('format')!r}; this version reads format {RECORD_FORMAT}")
    requests = pd.read_csv(path / "requests.csv")
    steps = _read_parquet(path / "steps.parquet", STEP_COLUMNS)
    tokens = _read_parquet(path / "tokens.parquet", TOKEN_COLUMNS)
    return facts, Record(requests=requests, steps=steps, tokens=tokens, truncated=bool(facts["truncated"]))


def _read_parquet(path: Path, columns: Mapping[str, str]) -> pd.DataFrame:
    """A table of a record. Raises SpecError for other columns, or for too many rows: a few bytes can stand for billions."""
    with pq.ParquetFile(path) as file:
        rows, names = file.metadata.num_rows, file.metadata.schema.names
        if rows > MOST_ROWS or sorted(names) != sorted(columns):
            raise SpecError(f"{path}: got {rows} rows of {names}; allowed: {MOST_ROWS} of {list(columns)}")
        # Starting threads takes longer than reading a trial's table.
        table: pd.DataFrame = file.read(use_threads=False).to_pandas(use_threads=False)
        return table
