"""Can this machine run a testbed, and if not, what is missing and how to get it?"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from experiments.provenance import gpus, machine
from experiments.spec import TESTBEDS, Testbed, load_testbed

PREFERENCE = ("a100", "gpu-24g", "cpu")  # auto: the paper's machine, a smaller GPU's, any machine


def problems(testbed: Testbed, out: Path, cards: list[dict[str, Any]]) -> list[str]:
    """What keeps this machine from running the testbed, each in one line with its remedy; empty if nothing does."""
    needs, here = testbed.requires, machine()
    found = _gpu_problems(testbed, cards) if needs.gpus else []
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        version = ".".join(map(str, sys.version_info[:2]))
        found.append(f"Python {version}; vLLM 0.32 is locked for 3.11 and 3.12: make setup PYTHON=python3.12")
    if not sys.platform.startswith("linux"):
        found.append(f"{sys.platform}; vLLM's wheels are for Linux: use a Linux machine or container")
    if here["cores"] < needs.cores:
        found.append(f"{here['cores']} CPU cores; {needs.cores} are needed: use a larger machine")
    if here["memory_gib"] < needs.memory_gib:
        found.append(f"{here['memory_gib']} GiB of memory; {needs.memory_gib:g} are needed: use a larger machine")
    folder = next(path for path in (out, *out.resolve().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free / 2**30
    if free < needs.disk_gib:
        found.append(f"{free:.1f} GiB free in {folder}; {needs.disk_gib:g} are needed: free some, or set OUT to another disk")
    return found


def _gpu_problems(testbed: Testbed, cards: list[dict[str, Any]]) -> list[str]:
    needs = testbed.requires
    if not cards:
        return [f"no NVIDIA GPU (nvidia-smi lists none); {needs.gpus} are needed: install the NVIDIA driver, or TESTBED=cpu"]
    found = []
    large = [card for card in cards if card["memory_mib"] >= needs.gpu_memory_gib * 1024]
    if len(large) < needs.gpus:
        have = ", ".join(f"{card['name']} {card['memory_mib'] / 1024:.0f} GiB" for card in cards)
        found.append(f"GPUs: {have}; {needs.gpus} with {needs.gpu_memory_gib:g} GiB are needed: use a smaller testbed")
    if int(cards[0]["driver"].split(".")[0]) < needs.driver:
        found.append(f"NVIDIA driver {cards[0]['driver']}; {needs.driver} or newer is needed for CUDA 13: update the driver")
    return found


def choose_testbed(name: str, out: Path) -> tuple[Testbed, str]:
    """The testbed of that name, or for `auto` the first this machine can run, and the reason in a few words."""
    if name != "auto":
        return load_testbed(name), "as asked for"
    cards = gpus()
    reasons: list[str] = []
    for candidate in PREFERENCE:
        testbed = load_testbed(candidate)
        found = problems(testbed, out, cards)
        if not found or candidate == PREFERENCE[-1]:
            return testbed, "; ".join([*reasons, f"{candidate} fits"] if not found else reasons)
        reasons.append(f"not {candidate}: {found[0].split(':')[0]}")
    raise AssertionError("the last candidate is always taken")


def report(out: Path) -> str:
    """Every testbed with 'ready' or what is missing, as text."""
    cards, here = gpus(), machine()
    lines = [f"this machine: {here['cpu']}, {here['cores']} cores, {here['memory_gib']} GiB, {len(cards)} NVIDIA GPUs"]
    for path in sorted(TESTBEDS.glob("*.yaml")):
        testbed = load_testbed(path.stem)
        found = problems(testbed, out, cards)
        lines.append(f"{path.stem:10} {'ready' if not found else 'not here'}: {testbed.title}")
        lines += [f"{'':10} - {problem}" for problem in found]
    return "\n".join(lines)
