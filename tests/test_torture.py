"""Ten random kills of real processes of a real run; make torture does 200."""

from __future__ import annotations

import pytest
from torture import torture

pytest.importorskip("vllm")
pytestmark = pytest.mark.engine


@pytest.mark.timeout(600)
def test_ten_random_kills_lose_nothing_and_leave_nothing() -> None:
    assert torture(10, seed=2).total() >= 10
