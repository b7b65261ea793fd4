"""What a machine may use, and which testbeds it can run, on systems unlike this one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.machine import doctor
from experiments.records import provenance
from experiments.spec.spec import load_testbed

V2, HYBRID = "0::/job/step\n", "9:name=systemd:/\n4:memory:/box\n3:cpu,cpuacct:/box\n0::/\n"
INF = math.inf


@pytest.mark.parametrize(
    ("groups", "files", "limits"),
    [
        (None, {}, (INF, INF)),
        (V2, {}, (INF, INF)),
        (V2, {"cpu.max": "max 100000\n", "memory.max": "max\n"}, (INF, INF)),
        (V2, {"cpu.max": "150000 100000\n", "memory.max": "4294967296\n"}, (1.5, 2.0**32)),  # all that a container sees
        (V2, {"job/cpu.max": "200000 100000", "job/step/cpu.max": "max 100000", "job/step/memory.max": "1024"}, (2.0, 1024.0)),
        (V2, {"memory.max": "nonsense"}, (INF, INF)),
        (HYBRID, {"memory/box/memory.limit_in_bytes": "2048\n"}, (INF, 2048.0)),
        (HYBRID, {"cpu,cpuacct/box/cpu.cfs_quota_us": "50000", "cpu,cpuacct/box/cpu.cfs_period_us": "100000"}, (0.5, INF)),
        (HYBRID, {"cpu,cpuacct/box/cpu.cfs_quota_us": "-1", "cpu,cpuacct/box/cpu.cfs_period_us": "100000"}, (INF, INF)),
        (HYBRID, {"memory/memory.limit_in_bytes": "4096", "cpu.max": "100000 100000"}, (1.0, 4096.0)),
    ],
)
def test_limits_of_a_container(groups: str | None, files: dict[str, str], limits: tuple[float, float], tmp_path: Path) -> None:
    if groups:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert provenance.limits(tmp_path) == limits


@pytest.fixture
def fresh() -> Iterator[None]:
    """The machine, looked at again before and after."""
    provenance.machine.cache_clear()
    yield
    provenance.machine.cache_clear()


@pytest.mark.usefixtures("fresh")
def test_doctor_heeds_a_containers_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "limits", lambda: (1.5, 2.0 * 2**30))
    found = doctor.problems(load_testbed("cpu"), tmp_path, [])
    assert [line.split(":")[0] for line in found[:2]] == ["1 CPU cores; 2 are needed", "2.0 GiB of memory; 6 are needed"]


def test_a_simulation_needs_neither_linux_nor_the_engines_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.sys, "platform", "darwin")
    monkeypatch.setattr(doctor.sys, "version_info", (3, 14, 0))
    assert doctor.problems(load_testbed("a100-sim"), tmp_path, []) == []
    found = " ".join(doctor.problems(load_testbed("cpu"), tmp_path, []))
    assert "Python 3.14; vLLM 0.32 is locked for 3.11 and 3.12" in found
    assert "darwin; vLLM's wheels are for Linux" in found
