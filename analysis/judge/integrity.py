"""Is a bag what was sealed? bagit's own validation, and what it does not see."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bagit

from experiments.records.provenance import sha256
from experiments.records.store import MANIFEST

BAGIT_TXT = b"BagIt-Version: 0.97\nTag-File-Character-Encoding: UTF-8\n"  # as bagit 1.8.1 writes it
TAGS = "tagmanifest-sha256.txt"
MOST_MANIFEST = 2**24  # bytes; one of 50,000 files takes half of it
TAG_FILES = ("bag-info.txt", "bagit.txt", MANIFEST)


def listed(path: Path) -> dict[str, str]:
    """name -> digest as a manifest lists them; lines that are no such pair are left to the comparison by bytes. Nothing of one
    that is longer than MOST_MANIFEST."""
    if path.stat().st_size > MOST_MANIFEST:
        return {}
    pairs = (line.split(maxsplit=1) for line in path.read_bytes().decode("utf-8", "replace").splitlines())
    return {pair[1]: pair[0] for pair in pairs if len(pair) == 2}


def incomplete(bag: Path, found: Sequence[str]) -> bool:
    """Whether the problems found are those of an interrupted copy or seal: files missing, at most one cut short.

    A file cut short cannot be told from a changed one by its digest; but it does not end as we end files, and a payload with
    one is smaller than bag-info.txt says.
    """
    kinds = [line.split(":")[0] for line in found]
    if not found or "unlisted" in kinds or kinds.count("changed") > 1:
        return False
    if "changed" not in kinds:
        return True
    name, info = found[kinds.index("changed")].removeprefix("changed: ").split(" (or its")[0], bag / "bag-info.txt"
    if not (bag / name).is_file() or not _cut_short(bag / name):
        return False
    size = sum(path.stat().st_size for path in bag.glob("data/**/*") if path.is_file())
    stated = re.search(rb"^Payload-Oxum: (\d{1,18})\.", info.read_bytes(), re.M) if info.is_file() else None
    return not name.startswith("data/") or stated is None or size < int(stated[1])


def _cut_short(path: Path) -> bool:
    """Whether a file does not end as ours do: Parquet with its mark, JSON with its outermost bracket, others with a line."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4))
        end = file.read()
    ends = {".parquet": (b"PAR1",), ".json": (b"\n}\n", b"\n]\n", b"{}\n", b"[]\n")}
    return not end.endswith(ends.get(path.suffix, (b"\n",)))


def problems(bag: Path) -> list[str]:
    """`changed: PATH`, `missing: PATH`, `unlisted: PATH`, relative to the bag; empty if the bag is as sealed.

    bagit misses flips in the letter case of the tag manifest, some in bagit.txt, and added top-level files; so every tag
    file is also compared byte for byte with what bagit would write for the files that are there.
    """
    entries = sorted(path for path in bag.rglob("*") if path.is_symlink() or not path.is_dir())
    if odd := [path for path in entries if path.is_symlink() or not path.is_file()]:
        return [f"unlisted: {path.relative_to(bag).as_posix()}" for path in odd]
    found = {path.relative_to(bag).as_posix() for path in entries}
    payload = {name: sha256(bag / name) for name in found if name.startswith("data/")}
    lines = compare(payload, listed(bag / MANIFEST)) if MANIFEST in found else _trials_changed(bag, payload)
    lines += [f"missing: {name}" for name in (*TAG_FILES, TAGS) if name not in found]
    lines += [f"unlisted: {name}" for name in sorted(found - set(payload) - {*TAG_FILES, TAGS})]
    actual = {name: sha256(bag / name) for name in TAG_FILES if name in found}
    tags = listed(bag / TAGS) if TAGS in found else actual
    lines += [f"changed: {n} (or its line in {TAGS})" for n, digest in actual.items() if tags.get(n, "").lower() != digest]
    return lines or _tag_files_not_as_written(bag, payload, actual) or _bagit_problems(bag)


def _trials_changed(bag: Path, payload: Mapping[str, str]) -> list[str]:
    """What the manifest of each trial says where the bag's own is missing, which must not hide a change."""
    lines = []
    for name in (name for name in payload if name.startswith("data/trials/") and name.endswith(f"/{MANIFEST}")):
        folder = name.removesuffix(MANIFEST)
        wanted = {folder + file: digest for file, digest in listed(bag / name).items()}
        lines += compare({file: payload[file] for file in wanted if file in payload}, wanted)
    return lines


def compare(payload: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """name -> digest of the files that are there, and as listed -> problems."""
    lines = [f"changed: {name}" for name, digest in payload.items() if wanted.get(name, digest).lower() != digest]
    lines += [f"missing: {name}" for name in wanted if name not in payload]
    return sorted(lines + [f"unlisted: {name}" for name in payload if name not in wanted])


def _tag_files_not_as_written(bag: Path, payload: Mapping[str, str], actual: Mapping[str, str]) -> list[str]:
    as_written = {
        "bagit.txt": BAGIT_TXT.splitlines(keepends=True),
        MANIFEST: [f"{digest}  {name}\n".encode() for name, digest in payload.items()],
        TAGS: [f"{digest} {name}\n".encode() for name, digest in actual.items()],
    }
    there = {name: (bag / name).read_bytes().splitlines(keepends=True) for name in as_written}
    # The order of the lines says nothing: bagit writes that in which the file system lists the files.
    return [f"changed: {name}" for name, lines in as_written.items() if sorted(there[name]) != sorted(lines)]


def _bagit_problems(bag: Path) -> list[str]:
    """bagit's own word, in case it sees what the above does not (the payload's total size in bag-info.txt)."""
    try:
        bagit.Bag(str(bag)).validate(processes=1)
    except bagit.BagValidationError as error:
        return [f"changed: {detail}" for detail in error.details] or [f"changed: bag-info.txt ({error})"]
    except (bagit.BagError, ValueError) as error:
        return [f"changed: bagit.txt ({error})"]
    return []


def outdated(judged: Mapping[str, Any], bags: Sequence[Path]) -> str | None:
    """Why a run's part of verdict.json is not of these bags; None if it is."""
    name, then = judged["name"], {bag["name"]: bag.get("tagmanifest_sha256") for bag in judged.get("bags", [])}
    if not bags:
        return f"{name}: judged, but its bags are gone"
    now = {bag.name: tagmanifest_digest(bag) for bag in bags}
    if gone := sorted(then.keys() - now.keys()):
        return f"{name}: {gone[0]} was judged and is gone"
    broken = bool(judged.get("integrity"))  # then no digest is known of the bag
    for bag, digest in now.items():
        if bag not in then or (then[bag] != digest and not (broken and then[bag] is None)):
            return f"{name}: {bag} is not what was judged"
    return f"{name}: its bags are whole again" if broken and not any(map(problems, bags)) else None


def tagmanifest_digest(bag: Path) -> str | None:
    """SHA-256 of the tag manifest: this one number fixes every byte of the bag. None if it is not there."""
    return sha256(bag / TAGS) if (bag / TAGS).is_file() else None
