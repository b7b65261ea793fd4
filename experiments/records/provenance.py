"""Where a record comes from: code, environment, machine. No user or host names: reviews are double-blind."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from importlib import metadata
from itertools import chain, takewhile
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "experiments"
CAPABILITY = 8.0  # the first that the kernels of vLLM and FlashAttention are made for
TAKEN_MIB = 1024  # a GPU with more in use belongs to someone else; an idle one uses less than half of this


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tree_digest(paths: list[Path]) -> str:
    lines = [f"{sha256(path)}  {path.relative_to(ROOT).as_posix()}\n" for path in sorted(paths)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def identity(figure: Path, testbed: Path, inputs: Mapping[str, str]) -> dict[str, str]:
    """What must be equal for two runs to be joined: hashes of code, locks, figure, testbed and of further inputs.

    Not the commit: a change of documentation does not make old measurements unlike.
    """
    return {
        "experiments": _tree_digest([*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.json")]),
        "locks": _tree_digest(list((ROOT / "docker").glob("*.lock"))),
        "figure": sha256(figure),
        "testbed": sha256(testbed),
        **inputs,
    }


def short(identity: Mapping[str, str]) -> str:
    """Eight hex digits that name an identity."""
    return hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()[:8]


def commit() -> dict[str, Any]:
    """The commit and whether the tree differs from it; in an image, where there is no history, what was passed in."""
    if value := os.environ.get("ARTIFACT_COMMIT"):
        return {"commit": value.removesuffix("-dirty"), "modified": value.endswith("-dirty")}
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        return {"commit": None, "modified": None}

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False).stdout.strip()

    return {"commit": git("rev-parse", "HEAD") or None, "modified": bool(git("status", "--porcelain"))}


def sbom() -> dict[str, Any]:
    """The Python environment as a bill of materials, CycloneDX 1.6: every distribution by its package URL."""
    python = {"type": "platform", "name": platform.python_implementation(), "version": platform.python_version()}
    components = {"": python}
    for dist in metadata.distributions():  # twice those in a folder that is on the path twice
        name = re.sub(r"[-_.]+", "-", dist.metadata["Name"]).lower()
        purl = f"pkg:pypi/{name}@{quote(dist.version, safe='')}"
        components[purl] = {"type": "library", "name": name, "version": dist.version, "purl": purl, "bom-ref": purl}
    subject = {"component": {"type": "application", "name": "chunked-prefill-artifact", "bom-ref": "artifact"}}
    found = [components[purl] for purl in sorted(components)]
    return {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "metadata": subject, "components": found}


def gpus() -> list[dict[str, Any]]:
    """GPUs as nvidia-smi numbers and lists them: name, memory in MiB, driver, UUID, compute capability; empty without it.

    0 MiB and None where it prints [N/A], as for GPUs that share the machine's memory, or does not know what it is asked.
    """
    asked = ["name", "memory.total", "memory.used", "driver_version", "uuid", "compute_cap"]
    for fields in (asked, asked[:-1]):  # drivers before 510 do not know the last
        query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        try:
            printed = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        except subprocess.CalledProcessError:
            continue
        except (OSError, subprocess.SubprocessError):
            break
        rows = [[cell.strip() for cell in line.split(",")] + ["", ""] for line in printed.splitlines() if line.count(",") >= 3]
        return [
            {
                "number": number,
                "name": name,
                "memory_mib": int(size) if size.isdecimal() else 0,
                "used_mib": int(used) if used.isdecimal() else 0,
                "driver": driver,
                "uuid": uuid,
                "capability": float(capability) if re.fullmatch(r"\d+\.\d+", capability) else None,
            }
            for number, (name, size, used, driver, uuid, capability, *_) in enumerate(rows)
        ]
    return []


def visible(cards: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that CUDA_VISIBLE_DEVICES leaves: numbers of nvidia-smi or UUIDs, as in CUDA up to the first that is none."""
    found, given = list(cards), os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return found
    words = given.replace(" ", "").split(",")
    named = ([c for c in found if w == str(c["number"]) or (w and c["uuid"].startswith(w))] for w in words)
    return list(chain.from_iterable(takewhile(bool, named)))


def usable(cards: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that sessions may get: visible, of a compute capability that the engine's kernels have, free, and of these the
    largest that are alike. A display's small card is none, nor one that someone else uses."""
    able = [c for c in visible(cards) if (c["capability"] or CAPABILITY) >= CAPABILITY]
    free = [c for c in able if c["used_mib"] <= TAKEN_MIB]
    kinds = Counter((c["memory_mib"], c["name"]) for c in free)
    most = max(kinds, key=lambda kind: (kind[0], kinds[kind]), default=None)
    return [c for c in free if (c["memory_mib"], c["name"]) == most]


def own_folder(name: str) -> Path | None:
    """A folder in which nobody but this user can write, for what can be made again: in the user's cache, else beside temporary
    files; None if there is no such place."""
    user = os.getuid()

    def in_cache() -> Path:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "chunked-prefill" / name

    def beside_others() -> Path:
        return Path(tempfile.gettempdir()) / f"chunked-prefill-{user}-{name}"

    for place in (in_cache, beside_others):
        with suppress(OSError, RuntimeError):  # RuntimeError: a user without a home
            (folder := place()).mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.lstat().st_uid == user and not folder.lstat().st_mode & 0o022 and os.access(folder, os.W_OK):
                return folder
    return None


def limits(root: Path = Path("/")) -> tuple[float, float]:
    """What the process may use of the machine: cores and bytes of memory, infinity where its cgroup (a container's, a batch
    job's; version 1 or 2) or one above it sets no limit."""
    cores, memory = math.inf, math.inf

    def numbers(*paths: Path) -> list[float]:
        words = [word for path in paths if path.is_file() for word in path.read_text().split()]
        return [math.inf if word == "max" else float(word) for word in words]

    listed = root / "proc/self/cgroup"
    for line in listed.read_text().splitlines() if listed.is_file() else ():
        _, controllers, inside = line.split(":", 2)
        above, parts = root / "sys/fs/cgroup" / controllers, Path(inside).parts[1:]  # version 2 has no list of controllers
        for folder in (above.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)):
            with suppress(OSError, ValueError):
                memory = min([memory, *numbers(folder / "memory.max", folder / "memory.limit_in_bytes")])
                quota, period = numbers(folder / "cpu.max", folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")
                cores = min(cores, quota / period if quota > 0 else math.inf)  # -1 is no limit, nor is a file that is not there
    return cores, memory


@cache
def machine() -> dict[str, Any]:
    """The hardware and system a session runs on, in a container also its image; cores and memory (GiB) that it may use.

    Its `type` is what replicates of a point must share; its GPUs are those alike to the ones that sessions get.
    """
    cards, listed = gpus(), Path("/proc/cpuinfo")
    first = (usable(cards) or visible(cards) or cards)[:1]  # a session sees its own only, which it has in use
    cards = [card for card in cards if [card["name"], card["memory_mib"]] == [first[0]["name"], first[0]["memory_mib"]]]
    named = re.search(r"^model name\s*:\s*(\S.*)", listed.read_text() if listed.exists() else "", re.M)
    cpu = named[1].strip() if named else platform.processor() or platform.machine()
    most_cores, most_memory = limits()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    cores = max(1, math.floor(min(cores, most_cores)))
    return {
        "type": f"{cards[0]['name']} x {len(cards)}" if cards else f"{cpu} x {cores}",
        "cpu": cpu,
        "cores": cores,
        "memory_gib": round(min(psutil.virtual_memory().total, most_memory) / 2**30, 1),
        "gpus": [card["name"] for card in cards],
        "driver": cards[0]["driver"] if cards else None,
        "system": f"{platform.system()} {platform.release()}",
        "image": os.environ.get("ARTIFACT_IMAGE") or None,
        "base": os.environ.get("ARTIFACT_BASE") or None,
        "devices": sorted(path.as_posix() for path in Path("/dev").glob("nvidia[0-9]*")),
    }
