"""Who may import whom, read from the source: rooms on floors, imports only downwards."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from experiments.records.provenance import ROOT

# From the ground up. A room imports only from rooms before it, and a module of a room only from modules before it.
FLOORS = {
    "experiments.records": ["errors", "record", "provenance", "terminal", "metrics", "store", "crate"],
    "experiments.spec": ["spec", "expand", "workload"],
    "experiments.engine": ["session", "vllm_engine", "engine_process", "worker"],
    "experiments.simulator": ["cost_model", "scheduler", "simulator", "estimate"],
    "experiments.machine": ["gpus", "doctor"],
    "experiments.calibrate": ["published", "here"],
    "experiments.cluster": ["placement", "plan", "local_ray", "cluster", "trials"],
    "experiments": ["run"],
    "analysis.judge": ["load", "integrity", "archive", "stats", "gates", "claims", "verify"],
    "analysis.show": [
        "summary", "plots", "plots_serving", "plots_schedule", "plots_capacity", "plots_validate", "views", "report", "export"
    ],
    "analysis.advise": ["capacity", "advice", "recommend", "paper_capacity", "validate"],
}  # fmt: skip
ORDER = [f"{room}.{module}" for room, modules in FLOORS.items() for module in modules]
MODULES = sorted(path for folder in ("experiments", "analysis") for path in (ROOT / folder).rglob("*.py"))
MODULES = [path for path in MODULES if path.name != "__init__.py"]
ONLY_IN = {
    "vllm": {"experiments.engine.vllm_engine"},
    "torch": {"experiments.engine.vllm_engine"},
    "ray": {"experiments.cluster.cluster", "experiments.cluster.local_ray"},
    "matplotlib": {f"analysis.show.plots{part}" for part in ("", "_serving", "_validate", "_capacity", "_schedule")},
}
MAY_START_RUNS = {"analysis.advise.recommend", "analysis.advise.validate"}
STARTS_RUNS = {"experiments.run", *(f"experiments.cluster.{name}" for name in ("cluster", "trials"))}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_has_its_floor() -> None:
    assert sorted(ORDER) == sorted(map(name_of, MODULES))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
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
def test_a_room_says_what_it_is_for(room: str) -> None:
    tree = ast.parse((ROOT / room.replace(".", "/") / "__init__.py").read_text())
    said = ast.get_docstring(tree) or ""
    assert len(tree.body) == 1, f"{room}: its __init__.py hands something on"
    assert "In: " in said
    assert "Out: " in said
