"""The Makefile and its scripts for real, in a folder where Python, docker and the other tools are stand-ins."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from experiments.records.provenance import ROOT

STUB = """#!/bin/bash
{ printf '%s\\0' "${0##*/}" "$@"; printf '\\n'; } >>"$CALLS"
echo "$0 $*" >>"$CALLS.paths"
case "$*" in "info --format"*) echo /;; "image inspect"*) echo sha256:1234;; version*) echo 20.10;;
    *"doctor --choose"*) echo "CHOSEN := $CHOSEN";; esac
"""
NVIDIA_SMI = """#!/bin/bash
case "$*" in -L) echo "GPU 0: NVIDIA A10 (UUID: GPU-0)";; *driver_version*) echo 580.95.05;; esac
"""


class Checkout:
    """A checkout in which nothing is real but make, its shell and the scripts of docker/."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls_file, self.paths_file = folder / "checkout", folder / "calls", folder / "calls.paths"
        shutil.copytree(ROOT / "docker", self.folder / "docker")
        shutil.copytree(ROOT / "experiments" / "spec" / "testbeds", self.folder / "experiments" / "spec" / "testbeds")
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, self.folder)
        (self.folder / "artifacts" / "reference").mkdir(parents=True)
        stubs = [self.folder / ".venv" / "bin" / name for name in ("python", "mbake", "shellcheck", "hadolint", "uv")]
        stubs += [self.folder / name / "bin" / "python" for name in (".venv-tables", ".venv-cuda")]
        self.bin = folder / "bin"
        for stub in (*stubs, self.bin / "docker", self.bin / "git"):
            stub.parent.mkdir(parents=True, exist_ok=True)
            stub.write_text(STUB)
            stub.chmod(0o755)
        self.smi = self.bin / "nvidia-smi"  # no GPU, whatever this machine has
        self.smi.write_text("#!/bin/bash\nexit 9\n")
        self.smi.chmod(0o755)
        self.home = folder / "home"
        self.home.mkdir()

    def make(self, *words: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        self.calls_file.unlink(missing_ok=True)
        self.paths_file.unlink(missing_ok=True)
        path = f"{self.bin}:{os.environ['PATH']}"
        env = {"PATH": path, "HOME": str(self.home), "CALLS": str(self.calls_file), **(environment or {})}
        return subprocess.run(["make", *words], cwd=self.folder, env=env, capture_output=True, text=True, check=False)

    def calls(self) -> list[list[str]]:
        """Name and arguments of every stand-in that was called."""
        lines = self.calls_file.read_text().split("\0\n") if self.calls_file.exists() else []
        return [line.split("\0") for line in lines[:-1]]

    def files(self) -> set[str]:
        return {path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*")}

    def arrived(self, start: str, value: str) -> int:
        """How many commands got this argument."""
        return sum(f"{start}{value}" in call for call in self.calls())

    def stamps(self) -> set[str]:
        """What was installed, and where."""
        return {path.relative_to(self.folder).as_posix() for path in self.folder.glob(".venv*/*.stamp")}

    def ran(self, what: str) -> set[str]:
        """Which programs ran it."""
        lines = self.paths_file.read_text().splitlines()
        return {line.split()[0].removeprefix(f"{self.bin}/") for line in lines if what in line}
