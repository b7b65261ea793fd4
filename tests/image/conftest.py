"""A Docker engine with the stand-in bases, and a checkout to build from: once for all tests of the image."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig import UID, Rig, bootstrap, install, pip_configuration, push_stand_ins, registry, write_hook

from experiments.records.provenance import ROOT


@pytest.fixture(scope="session")
def pip_log() -> str:
    """Where pip is to note what it fetches; empty: nowhere."""
    return ""


@pytest.fixture(scope="session")
def engine(pip_log: str) -> Iterator[Rig]:
    if os.geteuid() != 0:
        pytest.fail("make test-image starts a Docker engine and a registry of its own: run it as root")
    install()
    folder = Path(tempfile.mkdtemp(prefix="image-"))  # not pytest's own folder, which is closed to other users
    folder.chmod(0o755)
    write_hook(folder)
    with registry(folder) as port, pip_configuration(folder, pip_log) as pip_conf:
        rig = Rig(folder, port)
        tar = bootstrap(folder, pip_conf)
        try:
            rig.start(toolkit=False)
            push_stand_ins(rig, tar)
            tar.unlink()
            yield rig
        finally:
            rig.stop()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def checkout(engine: Rig) -> Path:
    """A clone with the working tree's changes, owned by an ordinary user, to call make in."""
    folder = engine.folder / "checkout"
    git = ["git", "-c", "safe.directory=*", "-C", str(ROOT)]
    subprocess.run(["git", "-c", "safe.directory=*", "clone", "-q", "--no-local", str(ROOT), str(folder)], check=True)
    listed = subprocess.run([*git, "ls-files", "-com", "--exclude-standard", "-z"], capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copy2(ROOT / name, folder / name)
    subprocess.run(["chown", "-R", f"{UID}:{UID}", str(folder)], check=True)
    return folder
