"""One GPU, no network, no Ray: does the engine path hold, and what does it measure? Run in the project's root.

Stages, each in a process of its own with a time limit, each leaving OUT/STAGE.json or its error; the others go on after an
error. `python tests/gpu/check.py STAGE` runs one. OUT is the folder for results; PLATFORM=cpu tries the script itself on a CPU,
with fewer requests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path.cwd()))
# FlashInfer's sampler would be compiled while the engine warms up; greedy requests never use it.
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")

import yaml

from experiments.calibrate.fit import fit_records, observed, with_loop
from experiments.calibrate.here import calibration_phases, settings_of
from experiments.calibrate.published import write
from experiments.engine.session import TrialResult, run_session
from experiments.engine.vllm_engine import VllmEngine
from experiments.machine.gpus import gpu_memory_gib
from experiments.records.metrics import of_phase, point_phase, prefill_seconds, serving_metrics
from experiments.records.record import Phase, Request
from experiments.records.store import Run
from experiments.spec.expand import Session, expand
from experiments.spec.spec import TESTBEDS, EngineSettings, Testbed, load_figure, load_testbed, read_spec
from experiments.spec.workload import synthetic_trace

MODEL = "mistral-7b"
CPU = os.environ.get("PLATFORM") == "cpu"
OUT = Path(os.environ.get("OUT", ".gpu/out"))
LIMITS = {"facts": 60, "prefill": 240, "fresh": 120, "calibrate": 150, "serve": 240}  # seconds of each stage
PASSES, WAITS, AGAIN = (1 if CPU else 3), 200, 5  # over Figure 9a's points; for an idle device; of a point built fresh
FASTER, REQUESTS = (1.0, 16) if CPU else (4.0, 96)  # than the paper's QPS, which hardly load an H100; of a trial of 9b
BUDGETS = (64,) if CPU else (512, 2048)  # chunk sizes built fresh and switched, tokens


def testbed() -> Testbed:
    """One GPU of 80 GB at the paper's scale; this machine's CPU with PLATFORM=cpu."""
    if CPU:
        return load_testbed("cpu")
    data = yaml.safe_load((TESTBEDS / "gpu-24g.yaml").read_text())
    data |= {"testbed": "one-gpu", "title": "one GPU of 80 GB", "switch_chunk_size": True}
    data.pop("max_prompt_length")
    data["requires"] |= {"gpu_memory_gib": 75.0, "cores": 2}
    path = OUT / "one-gpu.yaml"
    path.write_text(yaml.safe_dump(data))
    return read_spec(path, Testbed)


def sessions(figure: str) -> list[Session]:
    rates = {MODEL: 10.0} if CPU else None
    return [session for session in expand(load_figure(figure), testbed(), 1, rates) if session.model == MODEL]


def memory_mib() -> int | None:
    if CPU:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])


def keep(name: str, found: Iterable[TrialResult]) -> list[TrialResult]:
    """Store the records as a run does, and pack them as OUT/NAME.tar.gz."""
    run, results = Run(OUT / name, {"check": name}), []
    for result in found:
        run.write_trial(result.session, result.trial, result.facts, result.record)
        results.append(result)
    with tarfile.open(OUT / f"{name}.tar.gz", "w:gz") as archive:
        archive.add(OUT / name, name)
    return results


def facts() -> dict[str, Any]:
    """Versions and device, as torch and vLLM report them."""
    import torch
    import vllm
    from vllm.platforms import current_platform

    device = None if CPU else torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "vllm": vllm.__version__}
    return {**versions, "gpu": device, "platform": type(current_platform).__name__}


def prefill() -> dict[str, Any]:
    """Figure 9a's panel of one model, one seed: ms of each pass by length and chunk size; load time, memory, an idle wait."""
    session, seen = sessions("fig9a")[0], dict[str, Any]()
    session = replace(session, trials=session.trials[:PASSES])

    def make(settings: EngineSettings) -> VllmEngine:
        started = time.perf_counter()
        engine = VllmEngine(settings)
        seen["load_s"], seen["engine"] = time.perf_counter() - started, dict(engine.facts)
        seen["memory_mib"], seen["estimate_gib"] = memory_mib(), gpu_memory_gib(settings)
        waits = []
        for _ in range(WAITS):
            started = time.perf_counter()
            engine._engine.collective_rpc("wait_for_device")
            waits.append(time.perf_counter() - started)
        seen["idle_wait_us"] = 1e6 * sorted(waits)[WAITS // 2]
        return engine

    times: dict[str, list[float]] = {}
    for result in keep("prefill", run_session(session, [trial.name for trial in session.trials], make)):
        seconds = prefill_seconds(result.record)
        for number, role in enumerate(result.facts["phases"]):
            if role["role"] == "point":
                point = f"{role['prompt_length']}/{role['chunk_size']}"
                times.setdefault(point, []).append(round(1e3 * float(seconds[number]), 3))
    return seen | {"prefill_ms": times}


def one_budget() -> dict[str, Any]:
    """A prompt of a quarter of the context at BUDGET tokens a step, on an engine of KIND: built for it, or switched to it."""
    base, budget = sessions("fig9a")[0].engine, int(os.environ["BUDGET"])
    fresh = os.environ["KIND"] == "fresh"
    engine = VllmEngine(replace(base, max_budget=max(budget, base.max_batch)) if fresh else base)
    phase, found = Phase(budget, (Request(0.0, base.max_model_len // 4 - 1, 1),)), dict(engine.facts)
    engine.run([phase] * 2, 600.0)
    times = sorted(float(engine.run([phase], 600.0).steps["seconds"].sum()) for _ in range(AGAIN))
    engine.close()
    return {"ms": 1e3 * times[AGAIN // 2], "facts": found}


def fresh() -> dict[str, Any]:
    """Engines built for one chunk size against the switched one, medians in ms; a second engine needs a second process."""
    found: dict[str, Any] = {}
    for budget in BUDGETS:
        for kind in ("fresh", "switched"):
            done = start("one_budget", LIMITS["fresh"], KIND=kind, BUDGET=str(budget))
            found[f"{budget}/{kind}"] = done.get("ms", done)
    return found


def calibrate() -> dict[str, Any]:
    """What make calibrate does, in this process."""
    settings, decoding = settings_of(testbed())[testbed().models[MODEL]]
    engine, started = VllmEngine(settings), time.perf_counter()
    record = engine.run(calibration_phases(settings, decoding), 600.0)
    took, block_size = time.perf_counter() - started, int(engine.facts["block_size"])
    engine.close()
    record.steps.to_parquet(OUT / "calibration-steps.parquet")
    steps, paused, loop = observed(record)
    fitted = fit_records(steps, settings, f"one-gpu-{MODEL}", f"{MODEL} on one GPU", "tests/gpu/check.py", block_size)
    fitted = with_loop(fitted, paused, loop)
    write(fitted, OUT / f"one-gpu-{MODEL}.yaml")
    return {"steps": len(steps), "seconds": took, "fit_error": asdict(fitted.error), "loop": asdict(fitted.loop)}


def serve() -> dict[str, Any]:
    """Figure 9b's points of one model with fewer requests: ms of the metrics of each trial."""
    own = sessions("fig9b")
    trials = [trial for session in own for trial in session.trials if not trial.name.endswith("-repeat")]

    def fewer(trial: Any) -> Any:
        points = (replace(p, rate=p.rate * FASTER, requests=min(p.requests, REQUESTS)) for p in trial.points)
        return replace(trial, points=tuple(points))

    session = replace(own[0], trials=tuple(map(fewer, trials)))
    found = {}
    for result in keep("serve", run_session(session, [trial.name for trial in trials], VllmEngine, synthetic_trace())):
        metrics = serving_metrics(of_phase(result.record, point_phase(result.facts["phases"])))
        names = ("ttft_p50", "tbt_p99", "scheduling_delay_p50")
        found[result.trial] = {name: round(1e3 * metrics[name], 3) for name in names}
    return found


STAGES: dict[str, Callable[[], dict[str, Any]]] = {
    "facts": facts, "prefill": prefill, "fresh": fresh, "calibrate": calibrate, "serve": serve, "one_budget": one_budget
}  # fmt: skip


def start(stage: str, limit_s: float, **variables: str) -> dict[str, Any]:
    """Run a stage in a process of its own; what it found, or `error`: what it said last."""
    command = [sys.executable, __file__, stage]
    try:
        done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired as error:
        return {"error": f"over {limit_s:g} s", "said": str(error.stderr or b"")[-1500:]}
    if done.returncode:
        return {"error": (done.stderr or done.stdout)[-3000:]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> int:
    """All stages; 0 if none ended in an error, else 1."""
    OUT.mkdir(parents=True, exist_ok=True)
    failed = []
    for stage in [name for name in LIMITS if name in os.environ.get("STAGES", " ".join(LIMITS)).split()]:
        began = time.monotonic()
        found = start(stage, LIMITS[stage])
        (OUT / f"{stage}.json").write_text(json.dumps(found, default=str) + "\n")
        print(f"{stage} {time.monotonic() - began:.0f} s {json.dumps(found, default=str)[:1500]}", flush=True)
        failed += [stage] if "error" in found else []
    print(f"failed: {', '.join(failed)}" if failed else "all stages ran")
    return 1 if failed else 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        OUT.mkdir(parents=True, exist_ok=True)
        print(json.dumps(STAGES[sys.argv[1]](), default=str))
    else:
        sys.exit(main())
