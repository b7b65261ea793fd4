"""Faults: what the user reads, what is kept (to the byte), what the next call does. docs/faults.md says the same in words."""

from __future__ import annotations

import ast
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import fake_ray
import pytest

from analysis.judge import gates
from analysis.judge.load import find_runs, load_run
from experiments.cluster import cluster
from experiments.engine import session
from experiments.records.provenance import ROOT, sha256
from experiments.run import main

SMOKE = ["smoke", "--testbed", "cpu", "--out"]
SIM = ["fig9a", "--testbed", "a100-sim", "--replicates", "1", "--out"]


def trials(out: Path) -> dict[str, str]:
    """session/trial/file -> digest of every finished trial's files, sealed or not."""
    found = {}
    for folder in (*out.glob("*/open-*/trials"), *out.glob("*/bag-*/data/trials")):
        found |= {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    return found


def names(found: dict[str, str]) -> set[str]:
    return {name.split("/")[1] for name in found}


def leftovers(out: Path) -> list[Path]:
    return [*out.glob("*/.seal-*"), *out.glob("*/open-*/.trial-*")]


# -- faults of the engine's process: fake Ray, real processes ------------------------------------------------------------


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cluster, "ray_cluster", fake_ray.ray_cluster)
    monkeypatch.setenv("ONCE", str(tmp_path / "once"))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    return tmp_path / "runs"


@pytest.mark.parametrize(
    ("fault", "said"),
    [("crash", "RuntimeError: the step failed"), ("kill", "the worker died"), ("hang", "the worker died")],
)
def test_a_worker_that_dies_in_a_step_is_replaced_and_its_finished_trial_kept(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str, said: str
) -> None:
    monkeypatch.setenv("FAULT", fault)
    if fault == "hang":
        monkeypatch.setenv("GRACE", "-1799.0")  # so that the watchdog waits a second, not half an hour
    assert main([*SMOKE, str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"mistral-7b-seed42 died (RayError: {said}" in printed
    assert "attempt 2 of 3 for its 2 trials left" in printed
    assert printed.count("pass-0,") == 1, "a finished trial was run twice"
    assert names(trials(out)) == {"pass-0", "pass-1", "pass-0-repeat"}
    assert Path(os.environ["ONCE"]).exists()
    assert main([*SMOKE, str(out)]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_worker_that_always_dies_is_given_up_and_the_next_call_runs_what_is_missing(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAULT", "always")
    assert main([*SMOKE, str(out)]) == 1
    printed = capsys.readouterr().out
    assert (
        "missing: mistral-7b-seed42: 3 trials missing after 3 attempts to start: RayError: RuntimeError: the step failed"
        in printed
    )
    last = printed.splitlines()[-1]
    assert last.startswith("the run is incomplete; the same command runs what is missing; what they said: ")
    assert Path(last.rsplit(": ", 1)[1]).read_text().count("the step failed") == 3
    assert not find_runs(out)
    monkeypatch.setenv("FAULT", "none")
    assert main([*SMOKE, str(out)]) == 0


def test_what_was_finished_before_a_fault_survives_it_to_the_byte(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAULT", "kill")
    monkeypatch.setattr(cluster, "ATTEMPTS", 1)
    assert main([*SMOKE, str(out)]) == 1
    before = trials(out)
    assert names(before) == {"pass-0", "pass-0-repeat"}, "the trial that fails holds up the others"
    assert "missing: mistral-7b-seed42/pass-1: the session died in it 1 times: " in capsys.readouterr().out
    assert main([*SMOKE, str(out)]) == 0
    assert before.items() <= trials(out).items()
    assert "3 in all, 1 to run" in capsys.readouterr().out


# -- faults of the disk: a real file system of its own -------------------------------------------------------------------


def in_namespace(script: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run a shell script that may mount; skips where the system allows no user namespaces."""
    apart = ["unshare", "--user", "--map-root-user", "--mount"]
    probe = shutil.which("unshare") and subprocess.run([*apart, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True)
    if not probe or probe.returncode:
        pytest.skip("unshare --user --mount is not allowed here, so no small file system can be made")
    (tmp_path / "disk").mkdir()
    environment = {**os.environ, "DISK": str(tmp_path / "disk"), "COPY": str(tmp_path), "PY": sys.executable}
    command = [*apart, "bash", "-c", script]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)


RUN = '"$PY" -m experiments.run fig9a --testbed a100-sim --replicates 1 --out "$DISK/runs"'


@pytest.mark.parametrize("size", ["200k", "420k"])
def test_a_full_disk_is_one_line_and_keeps_every_finished_trial(tmp_path: Path, size: str) -> None:
    script = f"""
        mount -t tmpfs -o size={size} none "$DISK"
        {RUN}; echo "status $?"
        cp -r "$DISK/runs" "$COPY/before"
        mount -o remount,size=64m "$DISK"
        {RUN}; echo "status $?"
        cp -r "$DISK/runs" "$COPY/after"
    """
    done = in_namespace(script, tmp_path)
    assert "No space left on device; finished trials are kept, the same command resumes" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("status")] == ["status 1", "status 0"]
    before, after = trials(tmp_path / "before"), trials(tmp_path / "after")
    assert 0 < len(before) <= len(after) == 60  # of 420k, 12 trials leave too little for the seal
    assert before.items() <= after.items()
    assert leftovers(tmp_path / "before") == leftovers(tmp_path / "after") == []


def test_a_read_only_folder_is_one_line_before_anything_is_run(tmp_path: Path) -> None:
    script = f"""
        mount -t tmpfs none "$DISK"
        mkdir -p "$DISK/runs/fig9a-a100-sim"
        mount -o remount,ro "$DISK"
        {RUN}; echo "status $?"
    """
    done = in_namespace(script, tmp_path)
    assert done.stdout.splitlines()[-1] == "status 2"
    assert done.stderr.startswith("error: OUT: ")
    assert done.stderr.endswith("Read-only file system; a folder that can be written is needed\n")
    assert done.stderr.count("\n") == 1
    assert "[1/" not in done.stdout


# -- the clock ---------------------------------------------------------------------------------------------------------


def test_a_wall_clock_that_jumps_changes_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([*SIM, str(tmp_path / "steady")]) == 0
    readings: list[datetime] = []

    class Jumping(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            """An hour forward, two hours back, and so on."""
            readings.append(datetime(2026, 1, 1, tzinfo=UTC) + timedelta(hours=(1, -2)[len(readings) % 2]))
            return readings[-1]

    monkeypatch.setattr(session, "datetime", Jumping)
    assert main([*SIM, str(tmp_path / "jumping")]) == 0
    assert len(readings) == 24
    steady, jumping = (trials(tmp_path / name) for name in ("steady", "jumping"))
    raw = {name for name in steady if name.endswith((".csv", ".parquet"))}
    assert len(raw) == 36
    assert {name: steady[name] for name in raw} == {name: jumping[name] for name in raw}
    broken = [gate.gate for gate in gates.check(load_run(find_runs(tmp_path / "jumping")["fig9a-a100-sim"])) if not gate.ok]
    assert broken == [
        gate.gate for gate in gates.check(load_run(find_runs(tmp_path / "steady")["fig9a-a100-sim"])) if not gate.ok
    ]


@pytest.mark.parametrize("path", sorted(ROOT.glob("experiments/**/*.py")), ids=lambda path: path.stem)
def test_nothing_is_timed_with_the_wall_clock(path: Path) -> None:
    calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
    assert not calls & {"time.time", "time.time_ns", "datetime.utcnow"}


# -- interruptions -----------------------------------------------------------------------------------------------------

SLOW_TO_STOP = """
import contextlib, sys, time
from pathlib import Path
from types import SimpleNamespace
from experiments import run
from experiments.cluster import cluster
from experiments.cluster.plan import local_node

@contextlib.contextmanager
def ray_cluster():
    try:
        yield None
    finally:  # as Ray, which takes seconds to end its processes
        print("stopping", flush=True)
        time.sleep(1.5)
        Path(sys.argv[1], "stopped").write_text("")

def run_sessions(*_, **__):
    print("running", flush=True)
    time.sleep(60)

cluster.ray_cluster, cluster.run_sessions = ray_cluster, run_sessions
cluster.Fleet = lambda *_: SimpleNamespace(nodes=[local_node()])
sys.exit(run.main(["smoke", "--testbed", "cpu", "--out", sys.argv[1]]))
"""


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGINT] * 3, [signal.SIGTERM, signal.SIGINT]])
def test_a_signal_once_or_more_often_ends_the_run_in_order(tmp_path: Path, signals: list[signal.Signals]) -> None:
    command = [sys.executable, "-c", SLOW_TO_STOP, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for number, line in enumerate(process.stdout):
        if line == "running\n":
            process.send_signal(signals[0])
        elif line == "stopping\n":
            for more in signals[1:]:
                process.send_signal(more)
                time.sleep(0.2)
        assert number < 50
    errors = process.communicate()[1].splitlines()
    assert process.returncode == 130
    assert errors[-1] == "interrupted; finished trials are kept, the same command resumes"
    assert errors[:-1] == ["stopping already, a few seconds more"] * (len(signals) - 1)
    assert (tmp_path / "stopped").exists(), "what ends Ray's processes was interrupted"


def test_a_second_run_beside_the_first_is_refused_with_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "fig9a-a100-sim"
    folder.mkdir()
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        assert main([*SIM, str(tmp_path)]) == 2
    finally:
        os.close(handle)
    error = capsys.readouterr().err
    assert "another run is writing here; wait for it, or choose another OUT" in error
    assert error.count("\n") == 1
    assert main([*SIM, str(tmp_path)]) == 0


def test_a_second_make_waits_while_the_first_sets_up(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "core.lock").write_text("")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    with (tmp_path / ".setup.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = ["make", ".venv/core.stamp", f"PYTHON={python}"]
        own = {name: os.environ[name] for name in ("PATH", "HOME")}  # not what a make around this test exports
        second = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=own)
        assert second.stderr is not None
        assert second.stderr.readline() == "setup: another make is setting up here; waiting for it\n"
        assert second.poll() is None
    rest = second.communicate(timeout=20)[1]
    assert "setup: what simulation and analysis need" in rest
    assert second.returncode == 0


# -- what was kept is damaged ------------------------------------------------------------------------------------------


def test_a_damaged_trial_is_set_aside_and_only_it_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("experiments.run._seal", lambda plan: plan.run.folder)
    assert main([*SIM, str(tmp_path)]) == 0
    before = trials(tmp_path)
    victim = next(tmp_path.glob("*/open-*/trials/*/pass-1/steps.parquet"))
    victim.write_bytes(victim.read_bytes()[:-7])
    capsys.readouterr()
    monkeypatch.undo()
    assert main([*SIM, str(tmp_path)]) == 0
    assert "12 in all, 1 to run" in capsys.readouterr().out
    after = trials(tmp_path)
    again = victim.relative_to(victim.parents[2]).parent.as_posix()
    assert {name for name in before if before[name] != after[name]} == {f"{again}/trial.json", f"{again}/manifest-sha256.txt"}


def test_a_corrupt_fetched_trace_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corrupt = tmp_path / "trace.csv"
    corrupt.write_text("num_prefill_tokens,num_decode_tokens\n1,1\n")
    monkeypatch.setattr("experiments.spec.workload.choose_trace.__defaults__", (corrupt, None))
    assert main(["fig9b", "--testbed", "a100-sim", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "delete it, then fetch the trace again" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
