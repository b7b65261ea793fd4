from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from commands import copy_of

from experiments.records.provenance import ROOT
from experiments.records.terminal import arguments, parse
from experiments.run import main
from experiments.spec.expand import Session, expand
from experiments.spec.spec import load_figure, load_testbed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Engines first: they wait more than they compute, and others fill the gaps."""
    items.sort(key=lambda item: item.get_closest_marker("engine") is None)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(autouse=True)
def told() -> None:
    """Commands say what they do, whatever the test before asked of them."""
    parse(arguments("tests", None), [])


@pytest.fixture(scope="module")
def docs_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project again, for commands that README and docs name."""
    return copy_of(tmp_path_factory.mktemp("docs") / "checkout")


@pytest.fixture
def smoke_session() -> Session:
    return expand(load_figure("smoke"), load_testbed("cpu"))[0]


@pytest.fixture(scope="session")
def simulated_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with one sealed run, fig9a-a100-sim, of one replicate. Not to be changed."""
    runs = tmp_path_factory.mktemp("simulated") / "runs"
    assert main(["fig9a", "--testbed", "a100-sim", "--replicates", "1", "--out", str(runs)]) == 0
    return runs


@pytest.fixture
def runs_copy(simulated_runs: Path, tmp_path: Path) -> Path:
    """A copy of them, to be changed at will."""
    return Path(shutil.copytree(simulated_runs, tmp_path / "runs"))
