"""The commands of README and docs, and who runs them: make test, make test-docs, or what docs/testing.md lists with its reason.

A command is a line of a block marked `sh`, or `make ...` and `.venv/bin/python ...` in a text; what has a placeholder is none.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from fnmatch import fnmatchcase
from pathlib import Path

from experiments.records.provenance import ROOT

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
LIST = ROOT / "docs" / "testing.md"
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.M | re.S)
INLINE = re.compile(r"`((?:make|\.venv/bin/python)(?:\s[^`]+)?)`")
PLACEHOLDER = re.compile(r"\.\.\.|[= ](?:N|NAME|STAGE|name|file)\b|\*$|^make recommend$")  # or a target that asks for more
QUICK = ["make", "make help-all", "make doctor"]
# What make test-docs runs, in this order: what a command needs is left by those before it. `*` stands for any end.
SLOW = [
    "make setup",
    "make smoke",
    "make fig9a",
    "make fig9b",
    "make fig9a fig9b*",
    "make fig9a | head",
    "make calibrate",
    "make calibrate validate",
    "make validate",
    "make plan*",
    "make power",
    "make capacity*",
    "make recommend*",
    "make fig9a REPLICATES=8 verify",
    "make verify*",
    "make -k verify report",
    "make package",
    "make verify BAG=*",
    "(cd artifacts/runs/*",
    "make bench*",
    ".venv/bin/python -m analysis.judge.known",
]


def commands(page: Path) -> list[str]:
    """Those of a page, in its order; comments are cut off, a line that ends in a backslash goes on."""
    text = page.read_text()
    lines = [line for block in BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    found = [re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines]
    spans = INLINE.findall(BLOCK.sub("", text))
    found += [" ".join(span.replace("\\|", "|").split()) for span in spans]
    return [command for command in dict.fromkeys(found) if command]


def listed() -> list[str]:
    """The commands that no test runs, by the table at the end of docs/testing.md."""
    return re.findall(r"^\| `([^`]+)` \|", LIST.read_text().partition("Run by neither")[2], re.M)


def place(command: str, patterns: list[str]) -> int | None:
    """The last of the patterns that it matches, if any: what is said later is said more exactly."""
    return max((number for number, pattern in enumerate(patterns) if fnmatchcase(command, pattern)), default=None)


def kind(command: str) -> str:
    """quick, slow, listed or placeholder; nothing where it is in no class."""
    if place(command, listed()) is not None:
        return "listed"
    if PLACEHOLDER.search(command):
        return "placeholder"
    if command in QUICK:
        return "quick"
    return "slow" if place(command, SLOW) is not None else ""


def all_of(wanted: str) -> list[str]:
    """All commands of a kind, each once; slow ones in the order in which they need each other."""
    found = dict.fromkeys(command for page in PAGES for command in commands(page) if kind(command) == wanted)
    return sorted(found, key=lambda command: place(command, SLOW) or 0) if wanted == "slow" else list(found)


def copy_of(folder: Path) -> Path:
    """The project without its outputs; its environments are those of this one."""
    out = {ROOT / "artifacts" / name for name in ("runs", "report", "gpu-check", "calibration/here", "calibration/tables")}
    kept = [".venv*", ".image", ".*cache", ".hypothesis", "__pycache__"]

    def left_out(where: str, names: list[str]) -> set[str]:
        return {name for name in names if Path(where, name) in out or any(fnmatchcase(name, each) for each in kept)}

    shutil.copytree(ROOT, folder, ignore=left_out)
    for environment in ROOT.glob(".venv*"):
        (folder / environment.name).symlink_to(environment.resolve())
    return folder


def paste(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """As a reader's shell runs it, in the folder. Nothing of an outer make or pytest is passed on."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "PYTEST", "MFLAGS"))}
    env["PYTHONPATH"] = "."
    return subprocess.run(["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, check=False)
