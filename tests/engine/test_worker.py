"""An engine's process: what it started ends with it, and it keeps to its share of the cores."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.engine.worker import cores_of
from experiments.records.provenance import ROOT

# A session whose engine hangs, with a worker that ignores what asks it to end, as one would that hangs in a kernel.
PROCESS = """
import ctypes, subprocess, sys
from pathlib import Path
from experiments.engine import vllm_engine, worker
from experiments.spec.expand import expand
from experiments.spec.spec import load_figure, load_testbed

class Hung:
    def __init__(self, settings):
        child = subprocess.Popen([sys.executable, "-c", "import signal; signal.signal(15, signal.SIG_IGN); signal.pause()"])
        Path(sys.argv[1]).write_text(str(child.pid))
        ctypes.PyDLL(None).pause()  # inside C, with Python's lock held

vllm_engine.VllmEngine = Hung
worker.LOAD_S = float(sys.argv[2])
list(worker.work(expand(load_figure("smoke"), load_testbed("cpu"))[0], ["pass-0"], None))
"""


def gone(process: psutil.Process) -> bool:
    """It has ended, whether or not anybody took note."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("end", ["hang", "kill"])
def test_an_engine_takes_its_workers_with_it_however_it_ends(end: str, tmp_path: Path) -> None:
    """By its own watchdog, or killed."""
    told, variables = tmp_path / "pid", os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROCESS, str(told), "1.0" if end == "hang" else "600"]
    with subprocess.Popen(command, cwd=ROOT, env=variables) as engine:
        try:
            deadline = time.monotonic() + 60
            while not (told.exists() and told.read_text()) and time.monotonic() < deadline:
                time.sleep(0.05)
            child = psutil.Process(int(told.read_text()))
            if end == "kill":
                engine.kill()
            assert engine.wait(30) == (1 if end == "hang" else -signal.SIGKILL)
            while not gone(child):
                assert time.monotonic() < deadline, "its worker lives on"
                time.sleep(0.05)
        finally:
            engine.kill()
            with contextlib.suppress(psutil.NoSuchProcess, ValueError, FileNotFoundError):
                psutil.Process(int(told.read_text())).kill()


@given(st.integers(1, 256), st.integers(1, 16))
def test_shares_of_cores_are_disjoint_and_leave_none_over(cores: int, count: int) -> None:
    numbers = [*range(7, 7 + cores)]
    shares = [cores_of(f"{part}/{count}", numbers) for part in range(count)]
    assert sorted(core for share in shares for core in share) == numbers
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert cores_of(",".join(map(str, range(count))) + f"/{count}", numbers) == set(numbers)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_session_keeps_to_its_share_of_the_cores(tmp_path: Path) -> None:
    """What it starts, too."""
    code = PROCESS.replace("ctypes.PyDLL(None).pause()", "raise SystemExit(str(sorted(os.sched_getaffinity(child.pid))))")
    seen = []
    for share in ("0/2", "1/2", "0/1000"):
        variables = os.environ | {"PYTHONPATH": str(ROOT), "ENGINE_CORES": share}
        command = [sys.executable, "-c", f"import os\n{code}", str(tmp_path / "pid"), "600"]
        done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60, check=False)
        seen.append({int(core) for core in done.stderr.strip().strip("[]").split(",")})
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == seen[2] == os.sched_getaffinity(0)  # all of them, where they are too few to be shared out
