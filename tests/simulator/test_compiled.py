"""Where compiled code lies: with the user alone, nowhere if there is no such place, and never stale."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.records.provenance import ROOT
from experiments.simulator.compiled import cache_folder, say_if_not_kept

SIMULATE = (
    "from experiments.simulator.calibration import load_calibration; "
    "from experiments.simulator.simulator import SimulatedEngine; "
    "from experiments.spec.expand import expand; from experiments.spec.spec import load_figure, load_testbed; "
    "from experiments.engine.session import warm_up; "
    "s = expand(load_figure('fig9b'), load_testbed('a100-sim'), 1)[0]; "
    "e = SimulatedEngine(s.engine, load_calibration(s.engine.calibration), 1); "
    "print(e.run(warm_up(s)[:1], 1e9).steps['seconds'].sum())"
)


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Home and the folder for temporary files are new."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cache_folder.cache_clear()
    say_if_not_kept.cache_clear()
    yield
    cache_folder.cache_clear()
    say_if_not_kept.cache_clear()


def test_it_lies_in_the_users_cache_and_is_closed_to_others(tmp_path: Path) -> None:
    folder = cache_folder()
    assert folder is not None
    assert folder.parent == tmp_path / "home" / "chunked-prefill"
    assert folder.stat().st_mode & 0o077 == 0


def test_where_others_can_write_it_does_not_lie(tmp_path: Path) -> None:
    first = cache_folder()
    assert first is not None
    first.chmod(0o777)
    cache_folder.cache_clear()
    second = cache_folder()
    assert second is not None
    assert second.parent == tmp_path
    assert str(os.getuid()) in second.name


def test_what_belongs_to_another_user_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compiled all the same, and said once."""
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    assert cache_folder() is None
    for _ in range(2):
        say_if_not_kept()
    assert capsys.readouterr().out.count("compiled anew") == 1


def test_no_place_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    assert cache_folder() is None
    script, environment = f"import tempfile; tempfile.tempdir = '/proc'; {SIMULATE}", os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count("simulator: compiled anew") == 1


def test_a_change_of_what_the_loop_calls_is_seen(tmp_path: Path) -> None:
    """The loop lies in another file, which does not change."""
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "artifacts" / "calibration", tmp_path / "artifacts" / "calibration")
    cost, told = tmp_path / "experiments" / "simulator" / "cost_model.py", list[float]()
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", SIMULATE], env=environment, cwd=tmp_path, capture_output=True, check=True)
        told.append(float(done.stdout))
        cost.write_text(cost.read_text().replace("return float(", "return 2.0 * float("))
    assert told[1] > 1.9 * told[0]
