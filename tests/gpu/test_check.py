"""The check of one GPU, tried on the CPU: every stage runs and leaves what it is for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_every_stage_runs_on_the_cpu(tmp_path: Path) -> None:
    environment = os.environ | {"PLATFORM": "cpu", "OUT": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "tests/gpu/check.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(found) == {"facts", "prefill", "fresh", "calibrate", "serve"}
    assert all(time > 0 for times in found["prefill"]["prefill_ms"].values() for time in times)
    assert found["fresh"]["64/fresh"] > 0
    assert found["fresh"]["64/switched"] > 0
    assert 0 < found["calibrate"]["fit_error"]["held_out"] < 1
    assert len(found["serve"]) == 6
    for name in ("prefill", "serve"):
        with tarfile.open(tmp_path / f"{name}.tar.gz") as archive:
            assert any(member.endswith("tokens.parquet") for member in archive.getnames())


def test_a_stage_that_fails_leaves_its_error(tmp_path: Path) -> None:
    environment = os.environ | {"PLATFORM": "cuda", "OUT": str(tmp_path), "PYTHONPATH": str(ROOT), "STAGES": "facts"}
    command = [sys.executable, "tests/gpu/check.py"]  # no GPU is here
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "failed: facts"
    assert "error" in json.loads((tmp_path / "facts.json").read_text())
