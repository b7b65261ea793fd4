"""Who may import whom, read off the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from experiments.provenance import ROOT

MODULES = sorted([*ROOT.glob("experiments/*.py"), *ROOT.glob("analysis/*.py")])
NOTHING_OF_OURS = {"experiments.spec", "experiments.engine", "experiments.provenance"}
ONLY_IN = {
    "vllm": {"experiments.vllm_engine"},
    "torch": {"experiments.vllm_engine"},
    "ray": {"experiments.cluster", "experiments.local_ray"},
    "matplotlib": {f"analysis.plots{part}" for part in ("", "_serving", "_validate", "_capacity", "_schedule")},
}
MAY_START_RUNS = {"analysis.recommend", "analysis.validate"}


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


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_import_rules(path: Path) -> None:
    name, found = name_of(path), imports(path)
    roots = {module.split(".")[0] for module in found}
    for library, allowed in ONLY_IN.items():
        assert library not in roots or name in allowed, f"{name} imports {library}"
    if name.startswith("experiments."):
        assert "analysis" not in roots
    if name in NOTHING_OF_OURS:
        assert not roots & {"experiments", "analysis"}
    if name.startswith("analysis.") and name not in MAY_START_RUNS:
        assert not found & {"experiments.run", "experiments.cluster", "experiments.trials", "experiments.vllm_engine"}


def test_no_cycles() -> None:
    ours = {name_of(path): {m for m in imports(path) if m.split(".")[0] in ("experiments", "analysis")} for path in MODULES}
    left = {name: {m for m in found if m in ours} - {name} for name, found in ours.items()}
    while left:
        free = {name for name, found in left.items() if not found}
        assert free, f"a cycle among {sorted(left)}"
        left = {name: found - free for name, found in left.items() if name not in free}
