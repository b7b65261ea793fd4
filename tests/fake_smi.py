"""An nvidia-smi that prints made-up cards and links, first on PATH."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import pytest

from experiments.machine import doctor
from experiments.records import provenance

Links = dict[tuple[int, int], int]
NVSWITCH: Links = dict.fromkeys(combinations(range(8), 2), 18)  # as on eight H100: each joined to each


def matrix(count: int, links: Links) -> str:
    """As nvidia-smi topo -m prints it."""
    cells = [["X" if a == b else f"NV{n}" if (n := links.get((min(a, b), max(a, b)))) else "SYS" for b in range(count)]
             for a in range(count)]  # fmt: skip
    header = "\t" + "\t".join(f"GPU{n}" for n in range(count)) + "\tCPU Affinity"
    return "\n".join([header, *(f"GPU{n}\t" + "\t".join(row) + "\t0-7" for n, row in enumerate(cells))])


def card(name: str, mib: int, used: int, number: int, capability: str = "8.0") -> str:
    """As nvidia-smi prints what it is asked for."""
    return f"{name}, {mib}, {used}, 580.95.05, GPU-{number}{number}, {capability}"


@contextmanager
def cards_here(folder: Path, cards: Sequence[str], topology: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine with these cards, whose files `cards` and `matrix` in the folder may be changed."""
    (folder / "matrix").write_text(topology)
    (folder / "cards").write_text("\n".join(cards))
    fake = folder / "nvidia-smi"
    fake.write_text(f'#!/bin/sh\ncase "$1" in topo) cat {folder}/matrix ;; *) cat {folder}/cards ;; esac\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(doctor, "_compiler_problems", list)
    provenance.machine.cache_clear()
    yield folder
    provenance.machine.cache_clear()
