"""The smoke figure as a user runs it, without a network: killed, resumed, sealed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import bagit
import pytest

pytest.importorskip("vllm")

from torture import left_after

from experiments.records.provenance import ROOT
from experiments.records.store import read_trial

pytestmark = pytest.mark.engine
AGENTS_S = 60.0  # Ray's agents take half a minute to notice that their node is gone

# No network but the loopback, where the system allows such a namespace: what is run needs none.
OFFLINE = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
if not shutil.which("ip") or subprocess.run([*OFFLINE, "true"], capture_output=True, check=False).returncode:
    OFFLINE = []


def test_end_to_end_killed_resumed_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Path(tempfile.mkdtemp(prefix="t-"))  # short: Ray's sockets lie in it
    monkeypatch.setenv("TMPDIR", str(home))
    command = [*OFFLINE, sys.executable, "-m", "experiments.run", "smoke", "--testbed", "cpu", "--out", str(tmp_path)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert first.stdout is not None
    ran = []
    for line in first.stdout:
        if line.startswith("[1/"):
            ran.append(line.split("] ")[1].split(",")[0])
            first.kill()
    first.wait()
    first.stdout.close()
    assert ran, "the first run ended before its first trial"
    assert left_after(home, AGENTS_S) == []
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    ran += [line.split("] ")[1].split(",")[0] for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(ran) == len(set(ran)) <= 3
    bag = next(tmp_path.glob("smoke-cpu/bag-*"))
    bagit.Bag(str(bag)).validate()
    trials = sorted(bag.glob("data/trials/*/*"))
    assert [path.name for path in trials] == ["pass-0", "pass-0-repeat", "pass-1"]
    for path in trials:
        facts, record = read_trial(path)
        assert facts["engine"]["prefix_caching"] is False
        assert facts["engine"]["threads"] == 1
        assert facts["engine"]["executor_backend"] == "uni"
        assert (record.requests["cached_tokens"] == 0).all()
        assert (record.requests["generated_tokens"] == 1).all()
        assert (record.steps["prefill_tokens"] + record.steps["decode_tokens"] <= record.steps["budget"]).all()
        assert record.steps["prefill_tokens"].sum() == record.requests["prompt_tokens"].sum()
        assert len(record.tokens) == len(record.requests)
        assert record.steps["start_s"].is_monotonic_increasing
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert "nothing to do" in again.stdout
    assert left_after(home, AGENTS_S) == []
    shutil.rmtree(home)
