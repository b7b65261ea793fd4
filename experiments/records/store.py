"""Trial and run directories. A trial appears whole or not at all; a finished run is sealed as a BagIt bag.

RUNS/fig9a-cpu/open-<identity>/trials/<session>/<trial>/   trials of a run in progress
RUNS/fig9a-cpu/bag-<identity>-1/                           a sealed run; more replicates make bag-...-2
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.records.documents import FACTS, read_document
from experiments.records.errors import SpecError
from experiments.records.provenance import sha256, short
from experiments.records.record import RECORD_FORMAT, Record
from experiments.records.tables import bag_and_trial, contradiction, read_table

MANIFEST = "manifest-sha256.txt"
LOOKS = 2  # bags that may be joined: what is judged at more looks than a rule allows for is right too rarely
Key = tuple[str, str]  # of a trial: session, trial
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
        self.folder, self.identity, self.id = folder, dict(identity), short(identity)
        self.open = folder / f"open-{self.id}"

    def bags(self) -> list[Path]:
        """Sealed bags of this identity, oldest first; a copy by another name is none of them."""
        found = [path for path in self.folder.glob(f"bag-{self.id}-*") if path.name.rsplit("-", 1)[1].isdecimal()]
        return sorted(found, key=_number)

    def sealed(self) -> set[Key]:
        """(session, trial) of every trial in a bag."""
        return {_key(path) for bag in self.bags() for path in bag.glob("data/trials/*/*")}

    def open_trials(self) -> list[Path]:
        """Trials that are in no bag yet."""
        sealed = self.sealed()
        return [path for path in sorted(self.open.glob("trials/*/*")) if _key(path) not in sealed]

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

    def complete(self) -> set[Key]:
        """(session, trial) of every trial already there, sealed or not; what is damaged is set aside and does not count."""
        done = self.sealed()
        for path in self.open_trials():
            if trial_is_whole(path):
                done.add(_key(path))
            else:
                path.rename(Path(tempfile.mkdtemp(prefix="damaged-", dir=self.open)) / path.name)
        return done

    def _stored(self, pattern: str) -> list[Path]:
        """The trials of that session/trial, sealed or not; both names may be patterns."""
        places = [*(bag / "data" for bag in self.bags()), self.open]
        return [path for place in places for path in sorted(place.glob(f"trials/{pattern}"))]

    def find(self, session: str, trial: str) -> Path | None:
        """Where a trial lies, sealed or not; None if it is not there, or damaged."""
        return next(filter(trial_is_whole, self._stored(f"{session}/{trial}")), None)

    def finished(self, model: str) -> list[Path]:
        """The trials of a model that are there, sealed or not, but for what measured its saturation."""
        return self._stored(f"{model}-seed*/*")

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
            for name, data in contents.items():
                _write(whole / name, data)
            _write(whole / MANIFEST, _manifest(whole))
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

    def seal(self, trials: Sequence[Path], documents: Mapping[str, str], info: Mapping[str, str]) -> Path | None:
        """Seal these open trials as a bag and return it; None if there are none. Others stay open.

        documents: further payload, name -> text.
        """
        if trials:
            import bagit

            number = max(map(_number, self.bags()), default=0) + 1
            temporary = self.folder / f".seal-{self.id}"
            shutil.rmtree(temporary, ignore_errors=True)
            logging.getLogger("bagit").setLevel(logging.CRITICAL)  # it prints the stack of an error that it raises
            try:
                for path in trials:
                    shutil.copytree(path, temporary / "trials" / path.parent.name / path.name, copy_function=_link_or_copy)
                for name, text in documents.items():
                    _write(temporary / name, text.encode())
                bagit.make_bag(str(temporary), dict(info), checksums=["sha256"])
                temporary.rename(self.folder / f"bag-{self.id}-{number}")
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            _sync(self.folder)
        sealed, left = self.sealed(), self.open_trials()
        done = [path for path in self.open.glob("trials/*/*") if _key(path) in sealed] if left else [self.open]
        for path in done:
            shutil.rmtree(path, ignore_errors=True)
        for path in self.open.glob("schedule-*.json") if trials else ():  # they are in the bag
            path.unlink()
        return self.bags()[-1] if trials else None


def _key(trial: Path) -> Key:
    return trial.parent.name, trial.name


def _number(bag: Path) -> int:
    return int(bag.name.rsplit("-", 1)[1])


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _manifest(trial: Path) -> bytes:
    return "".join(f"{sha256(trial / name)}  {name}\n" for name in FILES).encode()


def trial_is_whole(path: Path) -> bool:
    """Whether a trial directory holds exactly the files of its manifest, unchanged to the byte."""
    try:
        return (path / MANIFEST).read_bytes() == _manifest(path) and len(list(path.iterdir())) == len(FILES) + 1
    except OSError:
        return False


class StoredRecord(Record):
    """The record of a trial directory, its tables read anew at each look, so that a run takes the memory of one trial."""

    def __init__(self, path: Path, truncated: bool) -> None:
        object.__setattr__(self, "path", path)
        object.__setattr__(self, "truncated", truncated)

    path: Path

    @property
    def requests(self) -> pd.DataFrame:
        return read_table(self.path / "requests.csv")

    @property
    def steps(self) -> pd.DataFrame:
        return read_table(self.path / "steps.parquet")

    @property
    def tokens(self) -> pd.DataFrame:
        return read_table(self.path / "tokens.parquet")


def read_trial(path: Path) -> tuple[dict[str, Any], Record]:
    """Facts and record of a trial directory, checked as a whole. Raises SpecError, which names bag, trial and what is wrong."""
    facts = read_document(path / "trial.json", FACTS, f"{bag_and_trial(path)}: trial.json")
    requests, steps, tokens = (read_table(path / name) for name in FILES[:3])
    record = Record(requests, steps, tokens, facts["truncated"])
    if found := contradiction(record, facts["phases"]):
        raise SpecError(f"{bag_and_trial(path)}: {found}")
    return facts, record
