"""Imports between rooms and inside them run downwards; some libraries stay in their room. The floors are in rooms.py."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from rooms import FLOORS, PICTURE, ROOM, ROOT, draw, imports, modules, name_of, purpose

ORDER = [*ROOM]
ONLY_IN = {
    "vllm": {"experiments.engine.vllm_engine"},
    "torch": {"experiments.engine.vllm_engine"},
    "ray": {"experiments.cluster.cluster", "experiments.cluster.local_ray"},
    "numba": {"experiments.simulator.compiled"},
    "matplotlib": {f"analysis.show.plots{part}" for part in ("", "_serving", "_schedule", "_advice")},
}
MAY_START_RUNS = {"analysis.advise.recommend", "analysis.advise.validate"}
STARTS_RUNS = {"experiments.run", *(f"experiments.cluster.{name}" for name in ("cluster", "trials"))}


def test_every_module_has_its_floor() -> None:
    assert sorted(ORDER) == sorted(map(name_of, modules()))


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_run_downwards(path: Path) -> None:
    name, found = name_of(path), imports(path)
    upwards = {module for module in found if module in ORDER and ORDER.index(module) >= ORDER.index(name)}
    assert not upwards, f"{name} imports {', '.join(sorted(upwards))}, which is above it"
    roots = {module.split(".")[0] for module in found}
    for library, allowed in ONLY_IN.items():
        assert library not in roots or name in allowed, f"{name} imports {library}"
    if name.startswith("analysis.") and name not in MAY_START_RUNS:
        assert not found & STARTS_RUNS


@pytest.mark.parametrize("room", [room for room in FLOORS if "." in room])
def test_a_room_says_what_it_is_for_and_hands_nothing_on(room: str) -> None:
    assert "In: " in purpose(room)
    assert "Out: " in purpose(room)
    assert len(ast.parse((ROOT / room.replace(".", "/") / "__init__.py").read_text()).body) == 1


def test_the_picture_is_drawn_from_this_source() -> None:
    assert PICTURE.read_text() == draw(), "docs/rooms.svg is stale: python tests/rooms.py"
