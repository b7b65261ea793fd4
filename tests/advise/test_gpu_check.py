"""The check of a GPU, tried on the CPU: every stage runs, an error in one leaves the others, what is sent back is whole."""

from __future__ import annotations

import json
import os
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from analysis.advise import gpu_check
from analysis.judge.verify import verify_archive
from experiments.machine import doctor
from experiments.simulator import estimate

IN_SMALL = ["--testbed", "cpu", "--json"]


@pytest.mark.engine
@pytest.mark.timeout(600)
def test_every_stage_runs_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "gpu-check"
    status = gpu_check.main([*IN_SMALL, "--no-ray", "--folder", str(folder)])
    (estimate.HERE / "gpu-check-mistral-7b-w8.yaml").unlink(missing_ok=True)
    found = json.loads(capsys.readouterr().out)
    assert (status, found["failed"]) == (0, []), found
    stages = found["stages"]
    assert list(stages) == sorted(gpu_check.LIMITS)
    assert stages["engine"]["load_s"] > 0
    assert 0.5 < stages["engine"]["switched_ms"]["64"] / stages["fresh"]["fresh_ms"]["64"] < 2
    assert 0 < next(iter(stages["calibrate"]["calibrations"].values()))["held_out"] < 1
    assert {"P50 TTFT", "P99 TBT"} <= {each["target"].split(":")[0] for each in stages["validate"]["targets"]}
    assert found["verdict"].startswith("every stage ran; cpu loads in ")
    with zipfile.ZipFile(folder.with_suffix(".zip")) as archive:
        names = archive.namelist()
    assert {"report/gpu-check.json", "report/gpu-check-mistral-7b-w8.yaml", "report/validate-gpu-check.csv"} <= set(names)
    points = [name.split("/")[-2] for name in names if "fig9b" in name and name.endswith("tokens.parquet")]
    assert len(points) == 6 + 2  # saturation, and the first trial again
    judged = verify_archive(folder.with_suffix(".zip"), False)
    assert judged["archive"]["integrity"] == [line for run in judged["runs"] for line in run["integrity"]] == []
    assert [run["name"] for run in judged["runs"]] == ["fig9a-gpu-check", "fig9b-gpu-check"]


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Stand-ins for the stages: what Python each runs."""
    told = dict.fromkeys(gpu_check.LIMITS, 'print("{}")')
    run_stage = gpu_check.run_stage
    monkeypatch.setattr(gpu_check, "command_of", lambda stage, folder, with_ray: [stage])

    def stand_in(words: list[str], limit_s: float) -> dict[str, Any]:
        path = tmp_path / f"{words[0]}_stage.py"
        path.write_text(told[words[0]])
        return run_stage([path.stem], limit_s)

    monkeypatch.setattr(gpu_check, "run_stage", stand_in)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return told


def checked(tmp_path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    gpu_check.main([*IN_SMALL, "--folder", str(tmp_path / "gpu-check"), *words])
    return dict(json.loads(capsys.readouterr().out))


def test_an_error_in_one_stage_leaves_the_others(
    stages: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages["calibrate"] = 'import sys; sys.exit("error: no kernel image is available")'
    found = checked(tmp_path, capsys)
    assert found["failed"] == ["calibrate", "validate"]
    assert "no kernel image is available" in found["stages"]["calibrate"]["error"]
    assert found["stages"]["validate"]["error"] == "not run: calibrate failed"
    assert "error" not in found["stages"]["fig9b"]
    assert found["verdict"] == "FAILED: calibrate, validate"
    kept = json.loads((tmp_path / "gpu-check" / "report" / "gpu-check.json").read_text())
    assert kept["stages"] == found["stages"]
    stages["calibrate"] = 'print("{}")'
    again = checked(tmp_path, capsys, "calibrate", "validate")
    assert again["failed"] == []
    assert again["stages"].keys() == found["stages"].keys()


def test_a_target_of_validate_that_is_missed_is_a_finding(
    stages: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = {"targets": [{"target": "P99 TBT: median error 40.0% (target: at most 10%)", "met": False}]}
    stages["validate"] = f"print('''{json.dumps(line)}'''); raise SystemExit(1)"
    assert checked(tmp_path, capsys)["verdict"] == "every stage ran; P99 TBT: median error 40.0%"


def test_a_stage_over_its_limit_is_ended_with_all_that_it_started(
    stages: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    child = "import time; time.sleep(600)"
    stages["engine"] = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(subprocess.Popen([sys.executable, "-c", {child!r}]).pid, file=open({str(tmp_path / "pid")!r}, "w"), flush=True)
time.sleep(600)
"""
    monkeypatch.setitem(gpu_check.LIMITS, "engine", 2.0)
    monkeypatch.setattr(gpu_check, "END_S", 0.2)
    found = checked(tmp_path, capsys)
    assert found["failed"] == ["engine"]
    assert found["stages"]["engine"]["error"].startswith("over its limit of 2 s; exit status -9")
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        if not Path(f"/proc/{pid}/stat").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text():
            break
        time.sleep(0.1)
    else:
        os.kill(pid, 9)
        pytest.fail("a process of the stage lives on")


def test_stages_have_no_more_time_than_is_left(
    stages: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "TOTAL_S", gpu_check.LAST_S + 0.5)
    found = checked(tmp_path, capsys)
    assert found["stages"]["fig9b"]["error"] == "not run: its 30.5 s were over"
    assert found["stages"]["validate"]["error"] == "not run: fig9a, calibrate, fig9b failed"


def test_a_changed_byte_is_found(
    stages: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = gpu_check.archive.pack

    def tampered(files: dict[str, Path], target: Path) -> list[str]:
        names = pack(files, target)
        target.write_bytes(target.read_bytes().replace(b"replicates: 1", b"replicates: 2"))
        return names

    monkeypatch.setattr(gpu_check.archive, "pack", tampered)
    found = checked(tmp_path, capsys)
    assert found["failed"] == ["archive"]


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "gpus", list)
    assert gpu_check.main(["--folder", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: TESTBED: got cpu (not a100")
    assert error.endswith("allowed: one with a GPU and mistral-7b; TESTBED=cpu tries the check itself\n")
    assert not (tmp_path / "x").exists()


def test_a_folder_of_others_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").mkdir()
    assert gpu_check.main([*IN_SMALL, "--folder", str(tmp_path)]) == 2
    assert f"--folder: got {tmp_path}, which is no earlier check" in capsys.readouterr().err
    assert gpu_check.main([*IN_SMALL, "--folder", str(tmp_path), "serve"]) == 2
    assert "stages: got 'serve'; allowed: engine, fresh, fig9a" in capsys.readouterr().err
