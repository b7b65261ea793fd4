"""Which GPUs a session gets.

Ray's own GPU count would hand out any. So each GPU is a Ray resource of its own, and so is each set joined by NVLink.
`python -m experiments.machine.gpus` prints a node's resources as JSON for `ray start`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import chain, combinations, product

from experiments.records.errors import SpecError
from experiments.records.provenance import gpus, usable
from experiments.records.terminal import arguments, command, console, parse, result
from experiments.spec.spec import EngineSettings

GPU, NVLINK = "gpu-", "nvlink-"  # gpu-0, nvlink-0-1, nvlink-0-1-2-3: numbers as nvidia-smi counts


def nvlink_sets(topology: str, among: Container[int]) -> list[tuple[int, ...]]:
    """Sets of 2, 4, 8 and so on of these GPUs, in each every one joined to every other by NVLink; no GPU in two of a size.

    From what `nvidia-smi topo -m` prints. Each is made of two of half its size, those with the most links first: bridges give
    pairs, an NVSwitch pairs, fours and the whole.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", topology)
    header, *rows = [line.split() for line in plain.splitlines() if re.match(r"\s*GPU\d", line)] or [[]]
    numbers = [int(cell[3:]) for cell in header if re.fullmatch(r"GPU\d+", cell)]
    cells = {(a, b): cell for a, row in zip(numbers, rows, strict=False) for b, cell in zip(numbers, row[1:], strict=False)}
    links = {pair: int(cell[2:]) for pair, cell in cells.items() if re.fullmatch(r"NV\d+", cell)}
    found: list[tuple[int, ...]] = []
    parts: list[tuple[int, ...]] = [(number,) for number in numbers if number in among]
    while parts:
        both = [(one, other, [links.get(pair, 0) for pair in product(one, other)]) for one, other in combinations(parts, 2)]
        ranked = sorted((-sum(counts), one, other) for one, other, counts in both if all(counts))
        parts = []
        for _, one, other in ranked:
            if not {*one, *other} & {*chain(*parts)}:
                parts.append(tuple(sorted(one + other)))
        found += parts
    return found


def resources() -> dict[str, float]:
    """Ray resources of this machine: the GPUs that sessions may get, and sets of them; empty without GPUs."""
    numbers = {card["number"] for card in usable(gpus())}
    if not numbers:
        return {}
    printed = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, check=False).stdout
    joined = [NVLINK + "-".join(map(str, members)) for members in nvlink_sets(printed, numbers)]
    return dict.fromkeys([*(f"{GPU}{number}" for number in sorted(numbers)), *joined], 1.0)


def in_order(total: Iterable[str]) -> list[str]:
    """The GPUs among a node's Ray resources, by number."""
    return sorted((name for name in total if name.startswith(GPU)), key=lambda name: (len(name), name))


def places(tensor_parallel: int, total: Mapping[str, float], nvlink: bool = True) -> list[tuple[str, ...]]:
    """The sets of a node's Ray resources that a session of this tensor-parallel size may take; empty if there is none.

    One GPU, those in no pair first; or a set joined by NVLink, with its GPUs. Where there is no such set, and `nvlink` is not
    asked for, GPUs in their order, pairs side by side.
    """
    sets = {name: [GPU + n for n in name.removeprefix(NVLINK).split("-")] for name in sorted(total) if name.startswith(NVLINK)}
    paired = [*chain(*(members for members in sets.values() if len(members) == 2))]
    alone = [name for name in in_order(total) if name not in paired]
    if tensor_parallel == 1:
        return [(name,) for name in [*alone, *paired]]
    joined = [(name, *members) for name, members in sets.items() if len(members) == tensor_parallel]
    if joined or nvlink:
        return joined
    cards = [*paired, *alone]
    return [tuple(cards[n : n + tensor_parallel]) for n in range(0, len(cards) - tensor_parallel + 1, tensor_parallel)]


def kind_of_place(tensor_parallel: int, nvlink: bool = True) -> str:
    """What a session of this tensor-parallel size needs, in words."""
    count = {1: "a GPU", 2: "a pair of GPUs"}.get(tensor_parallel, f"{tensor_parallel} GPUs")
    return count + " joined by NVLink" * (nvlink and tensor_parallel > 1)


def devices(names: Iterable[str]) -> str:
    """CUDA_VISIBLE_DEVICES of a session that took these resources."""
    return ",".join(name.removeprefix(GPU) for name in names if name.startswith(GPU))


def environment(names: Iterable[str]) -> dict[str, str]:
    """Environment variables of a process that took these resources; none without a GPU among them.

    nvidia-smi counts by PCI bus, CUDA by speed unless told.
    """
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": numbers} if (numbers := devices(names)) else {}


def environment_here(settings: EngineSettings, nvlink: bool = True) -> dict[str, str]:
    """The same for an engine that is started here without Ray: it gets what a session would get first. Raises SpecError."""
    if settings.platform != "cuda":
        return {}
    if not (found := places(settings.tensor_parallel, here := resources(), nvlink)):
        wanted = f"{kind_of_place(settings.tensor_parallel, nvlink)}, not in use"
        raise SpecError(f"{settings.model}: got {', '.join(here) or 'no GPU'}; allowed: {wanted}; make doctor lists them all")
    return environment(found[0])


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print the resources, with or without --json."""
    parse(arguments("experiments.machine.gpus", "A node's resources as JSON for `ray start`."), argv)
    found = resources()
    console.print(json.dumps(found))
    result(**found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
