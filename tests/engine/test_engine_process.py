"""An engine that dies outside of a run: one line with its last words, from every command that starts one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import bench
import pytest
from known_engine import SETTINGS

from analysis.advise import recommend
from experiments.calibrate import here
from experiments.machine import gpus
from experiments.records.errors import SpecError
from experiments.simulator import estimate


@pytest.fixture(params=["raise", "kill"])
def dying(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A vLLM that dies as it is imported; its last words."""
    (tmp_path / "vllm").mkdir()
    code = {
        "raise": "import sys\nprint('a warning', file=sys.stderr)\nraise RuntimeError('no room on the device')",
        "kill": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
    }
    (tmp_path / "vllm" / "__init__.py").write_text(code[request.param])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(estimate, "HERE", tmp_path / "here")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return {"raise": ": RuntimeError: no room on the device", "kill": " of SIGKILL: it said nothing"}[request.param]


@pytest.mark.parametrize("command", ["calibrate", "recommend"])
def test_an_engine_that_dies_is_one_line(
    command: str, dying: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if command == "calibrate":
        status = here.main(["--testbed", "cpu", "--out", str(tmp_path)])
    else:
        monkeypatch.setattr(recommend, "problems", lambda *_: [])
        where = ["--out", str(tmp_path), "--report", str(tmp_path / "report")]
        status = recommend.main(["--testbed", "cpu", "--model", "yi-34b", "TBT_P99=0.1", *where])
    assert status == 2
    error = capfd.readouterr().err
    log = next(tmp_path.glob("engine-*.log"))
    model = "yi-34b-200k-w8" if command == "calibrate" else "yi-34b-w8"
    assert error == f"error: {model}: the engine died{dying}; all it said: {log}\n"
    assert ("a warning" in log.read_text()) == ("RuntimeError" in dying)


@pytest.mark.parametrize(
    ("command", "tensor_parallel", "seen"), [("calibrate", 1, "2"), ("calibrate", 2, "0,1"), ("bench", 1, "2")]
)
def test_calibrate_and_bench_take_the_gpus_that_a_session_would(
    command: str, tensor_parallel: int, seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is in no pair, or a pair joined by NVLink, as nvidia-smi counts them."""
    settings = replace(SETTINGS, platform="cuda", tensor_parallel=tensor_parallel)

    def start() -> None:
        if command == "bench":
            bench.loop_ratio(settings)
        else:
            here.calibrate(settings, 0, "a100", tmp_path)

    (tmp_path / "vllm").mkdir()
    code = "import os\nraise RuntimeError(os.environ['CUDA_DEVICE_ORDER'] + ' ' + os.environ['CUDA_VISIBLE_DEVICES'])"
    (tmp_path / "vllm" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(gpus, "resources", lambda: dict.fromkeys(["gpu-0", "gpu-1", "gpu-2", "nvlink-0-1"], 1.0))
    with pytest.raises(SpecError, match=f"RuntimeError: PCI_BUS_ID {seen};"):
        start()
    monkeypatch.setattr(gpus, "resources", dict)
    with pytest.raises(SpecError, match=r": got no GPU; allowed: a (GPU|pair of GPUs joined by NVLink), not in use; "):
        start()
