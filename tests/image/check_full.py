"""The cuda image with its real wheels, built and run on a stand-in base without a GPU: `make test-image FULL=1`. Not in CI.

What is measured is printed at the end, for docs/image.md: sizes of wheels and layers, and which compiled parts were loaded.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from rig import UID, Rig, make

pytestmark = pytest.mark.timeout(3600)
NEEDS_GIB = 16  # 13.2 were taken at most: 4.1 GB of wheels beside what they become, 9.4 GB, and the stand-in bases
LOG = "/var/log/pip.log"
LOADS = Path(__file__).with_name("loads.py").read_text()
LOCKED = """
import importlib.metadata, pathlib, re
from packaging.requirements import Requirement
text = pathlib.Path("/artifact/docker/cuda.lock").read_text()
here = [r for r in map(Requirement, re.findall(r"^([a-z].*?) *\\\\?$", text, re.M)) if not r.marker or r.marker.evaluate()]
assert all(importlib.metadata.version(r.name) in r.specifier for r in here)
print(len(here))
"""


@pytest.fixture(scope="session", autouse=True)
def room() -> None:
    """Before anything is fetched; once for all tests."""
    free = shutil.disk_usage(tempfile.gettempdir()).free / 2**30
    if free < NEEDS_GIB:
        where = tempfile.gettempdir()
        print(f"skipped: FULL: got {free:.0f} GiB free in {where}; allowed: {NEEDS_GIB} or more; set TMPDIR to another disk")
        pytest.skip("too little disk")


@pytest.fixture(scope="session")
def pip_log() -> str:
    return LOG


@pytest.fixture(scope="session")
def image(engine: Rig, checkout: Path) -> str:
    engine.start(toolkit=True)
    began = time.monotonic()
    make(engine, checkout, "image", f"IMAGE_DISK={NEEDS_GIB - 1}", target="cuda", left_out="", limit=3000)
    print(f"\nbuilt in {time.monotonic() - began:.0f} s")
    return "chunked-prefill:cuda"


def test_every_wheel_of_the_lock_is_there(engine: Rig, image: str) -> None:
    """Those of this platform, each by its hash, as pip takes no other."""
    run = ["run", "--rm", "--network=none", "--user=0", "--entrypoint"]
    wanted = int(engine(*run, "python", image, "-c", LOCKED).stdout)
    fetched = engine(*run, "grep", image, "-oE", r"Downloading \S+\.whl \([0-9.]+ .?B\)", LOG).stdout.splitlines()
    units = {"B": 1, "kB": 1e3, "MB": 1e6}
    sizes = {name.rsplit("/", 1)[-1]: float(size[1:]) * units[unit[:-1]] for _, name, size, unit in map(str.split, fetched)}
    print(f"\nwheels: {len(sizes)}, {sum(sizes.values()) / 1e9:.2f} GB; the largest:")
    for name, size in sorted(sizes.items(), key=lambda item: -item[1])[:8]:
        print(f"  {size / 1e6:7.1f} MB  {name}")
    history = engine("history", "--no-trunc", "--human=false", "--format", "{{.Size}} {{.CreatedBy}}", image).stdout
    for size, by in (line.split(" ", 1) for line in history.splitlines()):
        print(f"  {int(size) / 1e6:7.1f} MB  {by[:100]}")
    assert len(sizes) == wanted > 150


def test_vllm_and_its_compiled_parts_load(engine: Rig, image: str) -> None:
    """With a stand-in for the one library that only a driver brings, which says that there is no GPU."""
    run = ["run", "--rm", "--network=none", "--user", f"{UID}:{UID}", image, "python", "-c", LOADS]
    printed = engine(*run, timeout=900).stdout
    print("\n" + printed)
    assert "vllm/_C_stable_libtorch.abi3.so" in printed
    assert "flash_attn" in printed


def test_entrypoint_preflight_and_doctor(engine: Rig, checkout: Path, image: str) -> None:
    """On two fake A100: all is there but GPUs that torch could see."""
    run = ["run", "--rm", "--network=none", "--shm-size=1g", "--gpus", "all", image]
    assert "a100 " in engine(*run).stdout  # doctor, without a word more
    asks = "import ray; ray.init(logging_level='error'); print('declared', sorted(ray.cluster_resources()))"
    looks = ["python", "-c", asks, "-m experiments.run", "smoke"]  # like a measuring run, to the entrypoint
    printed = engine(*run, *looks).stdout
    assert "'gpu-0', 'gpu-1'" in printed
    told = make(engine, checkout, "preflight", "TESTBED=a100", target="cuda", check=False, path=f"{engine.folder}/hook")
    assert "preflight: torch sees 0 GPUs, nvidia-smi lists 2" in told
    assert "lacks" not in told
    config = json.loads(engine("image", "inspect", image).stdout)[0]["Config"]
    assert config["Labels"]["artifact.left-out"] == ""
