"""`make gpu-check`: the first quarter of an hour on a GPU, in one file that can be sent back.

Every stage is a process of its own within a time limit, and an error in one leaves the others. Most are commands of this
artifact, on figures and a testbed that are cut down for them: Mistral-7B, one seed. With TESTBED=cpu the same in small, which
shows that the check itself works.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import yaml

from analysis.judge import archive, integrity
from experiments.engine.engine_process import engines
from experiments.machine.doctor import choose_testbed
from experiments.machine.gpus import environment_here
from experiments.records.errors import SpecError
from experiments.records.provenance import ROOT, commit, gpus, machine, sha256
from experiments.records.record import Phase, Request
from experiments.records.store import to_json, write_whole
from experiments.records.terminal import arguments, command, console, parse, result, written
from experiments.simulator.memory import GIB, gpu_memory
from experiments.spec.expand import expand
from experiments.spec.spec import FIGURES, TESTBEDS, EngineSettings, Testbed, load_figure, load_testbed, path_of, read_yaml

MODEL = "mistral-7b"
TOTAL_S, LAST_S, END_S = 900.0, 30.0, 20.0  # of all stages; what is kept for the last one; for a stage to end in when told to
LIMITS = {"engine": 240.0, "fresh": 240.0, "fig9a": 240.0, "calibrate": 300.0, "fig9b": 400.0, "validate": 60.0}  # seconds
NEEDS = {"validate": ("fig9a", "calibrate", "fig9b")}
WAITS, AGAIN = 200, 5  # for an idle device; of a prompt on one engine
LOADS = [0.7, 1.04]  # of saturation: near enough to it to be over soon
SAID = 3000  # characters of what a failed stage said last


class Size(NamedTuple):
    """Passes over Figure 9a's points; chunk sizes built fresh and switched (the paper's tokens); of a trial of Figure 9b the
    most requests, and the seconds in which they arrive."""

    passes: int
    chunk_sizes: tuple[int, ...]
    requests: int
    seconds: float


SIZES = {"cuda": Size(3, (512, 2048), 64, 20.0), "cpu": Size(1, (512,), 16, 1.0)}


def prepare(folder: Path, testbed: Testbed, path: Path) -> None:
    """Write the cut figures, and the cut testbed, which lies at `path`, to FOLDER/runs."""
    size, runs = SIZES[testbed.platform], folder / "runs"
    for name, changes in (("fig9a", {"requests_per_point": size.passes}), ("fig9b", {"requests": size.requests})):
        figure = read_yaml(FIGURES / f"{name}.yaml") | changes
        figure["panels"] = [panel for panel in figure["panels"] if panel["model"] == MODEL]
        write_whole(runs / f"{name}.yaml", yaml.safe_dump(figure))
    serving = {"load_fractions": {MODEL: LOADS}, "trial_seconds": size.seconds, "time_limit_s": 120.0}
    own = {"testbed": "gpu-check", "title": f"{testbed.title}, cut down for a check", "models": {MODEL: testbed.models[MODEL]}}
    data = read_yaml(path) | own | {"serving": serving, "replicates": 1, "switch_chunk_size": True, "may_preempt": True}
    write_whole(runs / "gpu-check.yaml", yaml.safe_dump(data))


def asked(folder: Path) -> tuple[EngineSettings, list[tuple[int, int]]]:
    """The engine of Figure 9a's panel, which has the longest prompts and the largest chunk size; chunk sizes and prompts, in
    tokens, by which it is compared with fresh ones."""
    testbed = load_testbed(str(folder / "runs" / "gpu-check.yaml"))
    settings = expand(load_figure(str(folder / "runs" / "fig9a.yaml")), testbed)[0].engine
    return settings, [(size // testbed.scale, settings.max_model_len // 4 - 1) for size in SIZES[testbed.platform].chunk_sizes]


def _prompt_ms(engine: Any, budget: int, tokens: int) -> float:
    """In the engine's process: median of the prefill of a prompt at a chunk size."""
    phase = Phase(budget, (Request(0.0, tokens, 1),))
    engine.run([phase] * 2, 60.0)
    return 1e3 * median(float(engine.run([phase], 60.0).steps["seconds"].sum()) for _ in range(AGAIN))


def _waiting_us(engine: Any) -> float:
    """In the engine's process: median of waiting for a device that has nothing to do, which every step on a GPU pays."""
    times = []
    for _ in range(WAITS):
        began = time.perf_counter()
        engine._engine.collective_rpc("wait_for_device")
        times.append(time.perf_counter() - began)
    return 1e6 * median(times)


def _facts(engine: Any) -> dict[str, Any]:
    return dict(engine.facts)


def engine_stage(folder: Path) -> dict[str, Any]:
    """Load time, cost of waiting, prompts (ms) at chunk sizes that the engine is switched to; on a GPU its memory (GiB), that
    beside the KV cache against our estimate."""
    settings, prompts = asked(folder)
    before = gpus()
    with engines([settings], environment_here(settings)) as (run,):
        facts, now = run(_facts), gpus()
        found = {"facts": facts, "load_s": facts["load_s"], "waiting_us": run(_waiting_us)}
        found["switched_ms"] = {str(budget): run(_prompt_ms, budget, tokens) for budget, tokens in prompts}
    if settings.platform == "cuda":
        pairs = zip(before, now, strict=True)  # of which it took one
        used, size = max((after["used_mib"] - then["used_mib"], after["memory_mib"]) for then, after in pairs)
        memory = gpu_memory(settings, size * 2**20)
        used, cache = used / 1024, facts["kv_blocks"] * facts["block_size"] * memory.per_token / GIB
        found["memory_gib"] = {"used": used, "kv_cache": cache, "beside": used - cache, "estimated": memory.beside / GIB}
    return found


def fresh_stage(folder: Path) -> dict[str, Any]:
    """The same prompts on engines that are built for one chunk size each."""
    settings, prompts = asked(folder)
    times = {}
    for budget, tokens in prompts:
        with engines([replace(settings, max_budget=budget)], environment_here(settings)) as (run,):
            times[str(budget)] = run(_prompt_ms, budget, tokens)
    return {"fresh_ms": times}


INSIDE: dict[str, Callable[[Path], dict[str, Any]]] = {"engine": engine_stage, "fresh": fresh_stage}


def command_of(stage: str, folder: Path, with_ray: bool) -> list[str]:
    """A stage's module and arguments."""
    runs = folder / "runs"
    testbed = ["--json", "--testbed", str(runs / "gpu-check.yaml")]
    if stage in INSIDE:
        return ["analysis.advise.gpu_check", "--json", "--folder", str(folder), "--inside", stage]
    if stage == "calibrate":
        return ["experiments.calibrate.here", *testbed]
    if stage == "validate":
        return ["analysis.advise.validate", *testbed, "--runs", str(runs), "--report", str(folder / "report")]
    return ["experiments.run", *testbed, "--out", str(runs), *([] if with_ray else ["--no-ray"]), str(runs / f"{stage}.yaml")]


def run_stage(words: Sequence[str], limit_s: float) -> dict[str, Any]:
    """Run a module with its arguments in a group of processes of its own: its result, or `error`, what it said last."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": said, "text": True, "start_new_session": True}
        printed = late = ""
        with subprocess.Popen([sys.executable, "-m", *words], **options) as process:
            try:
                printed, _ = process.communicate(timeout=limit_s)
            except subprocess.TimeoutExpired:
                late = f"over its limit of {limit_s:.0f} s; "
            finally:
                _end(process)
        said.seek(0)
        last = f"{printed}\n{said.read()}".strip()[-SAID:].replace(str(ROOT), ".").replace(str(Path.home()), "~")
    found = next((line for line in reversed(printed.splitlines()) if line.startswith("{")), "")
    missed = process.returncode == 1 and '"targets"' in found  # of make validate: a finding, no error
    if not found or (process.returncode and not missed):
        return {"error": f"{late}exit status {process.returncode}: {last}"}
    return dict(json.loads(found))


def _end(process: subprocess.Popen[str]) -> None:
    """Told to end, a run keeps its finished trials and ends its Ray; what is there of the group after that is killed."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def check(folder: Path, stages: Sequence[str], with_ray: bool) -> dict[str, dict[str, Any]]:
    """Stage -> what it found, with its seconds, or `error`."""
    found: dict[str, dict[str, Any]] = {}
    until = time.monotonic() + TOTAL_S
    for stage in stages:
        began = time.monotonic()
        left = until - began - (0 if stage == stages[-1] else LAST_S)
        lacking = [name for name in NEEDS.get(stage, ()) if "error" in found.get(name, {})]
        if lacking or left < 1:
            reason = f"{', '.join(lacking)} failed" if lacking else f"its {TOTAL_S:g} s were over"
            found[stage] = {"error": f"not run: {reason}"}
        else:
            found[stage] = run_stage(command_of(stage, folder, with_ray), min(LIMITS[stage], left))
        found[stage]["seconds"] = round(time.monotonic() - began, 1)
        error = found[stage].get("error", "ran")
        console.print(f"{stage:9} {found[stage]['seconds']:5.0f} s  {error.splitlines()[-1][:300]}")
    return found


def told(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the stages found, in a few words each."""
    words, first = list[str](), found.get("engine", {})
    if "facts" in first:
        loads = f"{first['facts']['device']} loads in {first['load_s']:.0f} s"
        words += [loads, f"waiting {first['waiting_us']:.0f} us a step"]
    if memory := first.get("memory_gib"):
        words += [f"{memory['beside']:.1f} GiB beside the KV cache, {memory['estimated']:.1f} estimated"]
    built = found.get("fresh", {}).get("fresh_ms", {})
    both = {size: time / built[size] for size, time in first.get("switched_ms", {}).items() if size in built}
    words += [f"chunk size {size} switched {ratio:.2f} of fresh" for size, ratio in both.items()]
    return words + [each["target"].split(" (target")[0] for each in found.get("validate", {}).get("targets", [])]


def packed(folder: Path) -> tuple[Path, list[str]]:
    """The file to send back, and what in it is not as it was packed, looked at as make verify BAG= does."""
    target = folder.with_suffix(".zip")
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    archive.pack(dict(sorted(files.items())), target)
    with tempfile.TemporaryDirectory() as place:
        try:
            archive.unpack(target, Path(place))
        except SpecError as error:
            return target, [str(error)]
        bags = sorted(Path(place).glob("runs/*/bag-*"))
        return target, archive.problems(Path(place)) + [line for bag in bags for line in integrity.problems(bag)]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 if every stage ran, 1 if one ended in an error, 2 for bad input."""
    parser = arguments("analysis.advise.gpu_check", __doc__, "testbed", "out")
    parser.add_argument("stages", nargs="*", help=f"those to run again, of {', '.join(LIMITS)}; default: all, from nothing")
    parser.add_argument("--no-ray", action="store_true", help="one session after the other, without Ray")
    parser.add_argument("--folder", type=Path, default=ROOT / "artifacts" / "gpu-check", help="where it all goes; FOLDER.zip")
    parser.add_argument("--inside", choices=INSIDE, help="this stage, in this process")
    options = parse(parser, argv)
    folder = options.folder.resolve()
    if options.inside:
        result(**INSIDE[options.inside](folder))
        return 0
    if unknown := [stage for stage in options.stages if stage not in LIMITS]:
        raise SpecError(f"stages: got {unknown[0]!r}; allowed: {', '.join(LIMITS)}")
    testbed, reason = choose_testbed(options.testbed, options.out)
    if testbed.platform not in SIZES or MODEL not in testbed.models or (options.testbed, testbed.platform) == ("auto", "cpu"):
        wanted = f"one with a GPU and {MODEL}; TESTBED=cpu tries the check itself"
        raise SpecError(f"TESTBED: got {testbed.testbed} ({reason}); allowed: {wanted}")
    console.print(f"testbed {testbed.testbed} ({reason}); at most {TOTAL_S / 60:g} minutes")
    report, earlier = folder / "report" / "gpu-check.json", dict[str, Any]()
    if options.stages and report.is_file():
        earlier = json.loads(report.read_text())["stages"]
    elif (folder / "runs" / "gpu-check.yaml").is_file():
        shutil.rmtree(folder)
    elif folder.exists():
        raise SpecError(f"--folder: got {folder}, which is no earlier check; allowed: one, or a folder that is not there yet")
    prepare(folder, testbed, path_of(testbed.testbed if options.testbed == "auto" else options.testbed, TESTBEDS))
    found = earlier | check(folder, options.stages or list(LIMITS), not options.no_ray)
    about = {"testbed": testbed.testbed, "commit": commit(), "machine": machine(), "cards": gpus(), "ray": not options.no_ray}
    write_whole(report, to_json({"format": 1, **about, "stages": found}))
    for calibration in found.get("calibrate", {}).get("calibrations", {}).values():
        shutil.copy(calibration["path"], report.parent)
    target, broken = packed(folder)
    failed = [stage for stage, one in found.items() if "error" in one] + ["archive"] * bool(broken)
    console.print("\n".join([*broken, f"send back: {written(target)}, sha256 {sha256(target)}"]))
    verdict = "; ".join([f"FAILED: {', '.join(failed)}" if failed else "every stage ran", *told(found)])
    console.print(f"gpu-check: {verdict}")
    result(verdict=verdict, failed=failed, archive=target, sha256=sha256(target), stages=found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
