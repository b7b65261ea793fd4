"""Is a bag what was sealed? bagit's own validation, and what it does not see."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import bagit

BAGIT_TXT = b"BagIt-Version: 0.97\nTag-File-Character-Encoding: UTF-8\n"  # as bagit 1.8.1 writes it
MANIFEST, TAGS = "manifest-sha256.txt", "tagmanifest-sha256.txt"
TAG_FILES = ("bag-info.txt", "bagit.txt", MANIFEST)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _walk_order(name: str) -> list[tuple[bool, str]]:
    """bagit lists the files of a folder before its subfolders, both by name."""
    *folders, file = name.split("/")
    return [(True, folder) for folder in folders] + [(False, file)]


def _listed(path: Path) -> dict[str, str]:
    """name -> digest as a manifest lists them; lines that are no such pair are left to the comparison by bytes."""
    pairs = (line.split(maxsplit=1) for line in path.read_bytes().decode("utf-8", "replace").splitlines())
    return {pair[1]: pair[0] for pair in pairs if len(pair) == 2}


def incomplete(bag: Path, found: Sequence[str]) -> bool:
    """Whether the problems found are those of an interrupted copy or seal: files missing, at most one cut short.

    A file cut short cannot be told from a changed one by its digest, so the payload's size in bag-info.txt decides.
    """
    kinds = [line.split(":")[0] for line in found]
    if not found or "unlisted" in kinds or kinds.count("changed") > 1:
        return False
    if "changed" not in kinds:
        return True
    size = sum(path.stat().st_size for path in bag.glob("data/**/*") if path.is_file())
    stated = re.search(rb"^Payload-Oxum: (\d{1,18})\.", (bag / "bag-info.txt").read_bytes(), re.M)
    return found[kinds.index("changed")].startswith("changed: data/") and stated is not None and size < int(stated[1])


def problems(bag: Path) -> list[str]:
    """`changed: PATH`, `missing: PATH`, `unlisted: PATH`, relative to the bag; empty if the bag is as sealed.

    bagit misses flips in the letter case of the tag manifest, some in bagit.txt, and added top-level files; so every tag
    file is also compared byte for byte with what bagit would write for the files that are there.
    """
    entries = sorted(path for path in bag.rglob("*") if path.is_symlink() or not path.is_dir())
    odd = [f"unlisted: {path.relative_to(bag).as_posix()}" for path in entries if path.is_symlink() or not path.is_file()]
    if odd:
        return odd
    found = {path.relative_to(bag).as_posix() for path in entries}
    missing = [f"missing: {name}" for name in (*TAG_FILES, TAGS) if name not in found]
    if missing:
        return missing
    payload = {name: _digest(bag / name) for name in found if name.startswith("data/")}
    listed, tags = _listed(bag / MANIFEST), _listed(bag / TAGS)
    lines = _compare(payload, listed)
    lines += [f"unlisted: {name}" for name in sorted(found - set(payload) - {*TAG_FILES, TAGS})]
    actual = {name: _digest(bag / name) for name in TAG_FILES}
    for name in TAG_FILES:
        if tags.get(name, "").lower() != actual[name]:
            lines.append(f"changed: {name} (or its line in {TAGS})")
    if not lines:
        lines += [f"changed: {name}" for name in _tag_files_not_as_written(bag, payload, actual)]
    if not lines:
        lines += _bagit_problems(bag)
    return lines


def _compare(payload: Mapping[str, str], listed: Mapping[str, str]) -> list[str]:
    lines = [f"changed: {name}" for name, digest in payload.items() if name in listed and listed[name].lower() != digest]
    lines += [f"missing: {name}" for name in listed if name not in payload]
    lines += [f"unlisted: {name}" for name in payload if name not in listed]
    return sorted(lines)


def _tag_files_not_as_written(bag: Path, payload: Mapping[str, str], actual: Mapping[str, str]) -> list[str]:
    names = []
    if (bag / "bagit.txt").read_bytes() != BAGIT_TXT:
        names.append("bagit.txt")
    manifest = "".join(f"{payload[name]}  {name}\n" for name in sorted(payload, key=_walk_order))
    if (bag / MANIFEST).read_bytes() != manifest.encode():
        names.append(MANIFEST)
    tags = sorted(f"{digest} {name}\n".encode() for name, digest in actual.items())
    if sorted((bag / TAGS).read_bytes().splitlines(keepends=True)) != tags:  # bagit lists them as the file system does
        names.append(TAGS)
    return names


def _bagit_problems(bag: Path) -> list[str]:
    """bagit's own word, in case it sees what the above does not (the payload's total size in bag-info.txt)."""
    try:
        bagit.Bag(str(bag)).validate(processes=1)
    except bagit.BagValidationError as error:
        return [f"changed: {detail}" for detail in error.details] or [f"changed: bag-info.txt ({error})"]
    except (bagit.BagError, ValueError) as error:
        return [f"changed: bagit.txt ({error})"]
    return []


def tagmanifest_digest(bag: Path) -> str:
    """SHA-256 of the tag manifest: this one number fixes every byte of the bag."""
    return _digest(bag / TAGS)
