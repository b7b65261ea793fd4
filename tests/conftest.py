from __future__ import annotations

from pathlib import Path

import pytest

from experiments.expand import Session, expand
from experiments.provenance import ROOT
from experiments.spec import load_figure, load_testbed


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture
def smoke_session() -> Session:
    return expand(load_figure("smoke"), load_testbed("cpu"))[0]
