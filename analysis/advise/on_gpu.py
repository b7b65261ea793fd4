"""A case on a GPU that is not here: any model that the kernel tables cover; what memory it has, what must be said of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from analysis.advise.advice import WIDEST, Advice
from analysis.advise.capacity import WORDS
from analysis.advise.case import Case, case_for, requests_asked
from analysis.advise.question import Question
from analysis.advise.tell import show_bench
from experiments.calibrate.gpu import LONGEST, calibration_of, model_of, tables
from experiments.records.errors import SpecError
from experiments.records.terminal import console, paragraph
from experiments.simulator.memory import BLOCK, GIB, UTILIZATION
from experiments.spec.expand import Session
from experiments.spec.spec import EngineSettings, ServingFigure, load_figure, load_model

MOST_BATCH = 256  # requests in a step that are looked at, but for vLLM's default
MISSING = "asynchronous scheduling, speculative decoding, pipeline parallelism, what the host does, CUDA graphs"
GPU_OPTIONS = {
    "gpu": "a GPU of the kernel tables, not here; help lists them",
    "tp": "tensor parallel size, 1, 2, 4 or 8; default: 1, or the fewest GPUs here that hold the model",
    "max-len": "tokens of prompt and output together",
    "dtype": "bfloat16, float16 or fp8",
}


def add_options(parser: argparse.ArgumentParser, ours: str) -> None:
    """--model, and what else names a GPU that is not here. ours: what the model may be besides."""
    for name, about in {"model": f"{ours} a Hugging Face id, a config.json or its folder", **GPU_OPTIONS}.items():
        parser.add_argument(f"--{name}", default="", help=about)


def check_options(options: argparse.Namespace, default: str, engine: bool = False) -> None:
    """Raises SpecError for options that the machine has no use for: a testbed other than the default beside a GPU that is not
    here, or without one, and without an engine, what only these have."""
    given = [name for name in GPU_OPTIONS if name != "gpu" and getattr(options, name.replace("-", "_"))]
    if options.gpu and options.testbed != default:
        raise SpecError(f"TESTBED: got {options.testbed} and GPU={options.gpu}; allowed: one of them")
    if given and not options.gpu and not engine:
        name = given[0].upper().replace("-", "_")
        raise SpecError(f"{name}: got it without GPU; allowed: with GPU, or where an engine is; this testbed states its own")


def whole(name: str, text: str, default: int, most: int, least: int = 1) -> int:
    """A variable of the Makefile as a whole number. Raises SpecError."""
    text = text.strip()
    if text.isdecimal() and least <= int(text) <= most:
        return int(text)
    if text:
        raise SpecError(f"{name}: got {text!r}; allowed: a whole number from {least:,} to {most:,}")
    return default


def show_gpus() -> dict[str, str]:
    """Print every GPU of which there are tables; names and versions of vLLM."""
    for name, (version, reported) in tables().items():
        console.print(f"{name:20} {reported / GIB:6.1f} GiB, kernels of vLLM {version}")
    return {name: version for name, (version, _) in tables().items()}


def longest(model: str, text: str) -> int:
    """Tokens of prompt and output: MAX_LEN, by default the paper's. Raises SpecError for more than model or tables have."""
    shape, figure = load_model(model_of(model)[0]), load_figure("fig9b")
    window = shape.get("sliding_window") if shape.get("use_sliding_window", True) else None
    most = min(shape["max_position_embeddings"], window or LONGEST, LONGEST)
    return whole("MAX_LEN", text, min(figure.max_model_len, most), most)


def case_asked(options: argparse.Namespace) -> Case:
    """What the options ask, simulated from the kernel tables. Raises SpecError for what they, memory or TRACE do not allow."""
    max_len, figure = longest(options.model, options.max_len), load_figure("fig9b")
    assert isinstance(figure, ServingFigure)
    config, name = model_of(options.model)
    quantized = load_model(config).get("quantization_config") or {}
    if quantized.get("quant_method") == "fp8" and options.dtype not in ("", "fp8"):
        raise SpecError(f"DTYPE: got {options.dtype} of a model whose weights are fp8; allowed: fp8")
    parts, dtype = whole("TP", options.tp, 1, 8), options.dtype or ("fp8" if quantized else "bfloat16")
    calibration = calibration_of(config, options.gpu, parts, dtype)
    trace = requests_asked(options.trace, max_len)
    settings = EngineSettings(
        "simulated", config, parts, dtype, "dummy", 2 * MOST_BATCH, MOST_BATCH, max_len, None, None, UTILIZATION
    )
    gpu, seed = options.gpu, figure.seeds[0]
    session = Session(f"{name}-{gpu}", figure.figure, figure.kind, gpu, name, False, 1, seed, settings, ())
    case = case_for(session, calibration, trace, max_len)
    case.memory(case.settings_to_try()[0])  # says so where it does not fit
    return case


def _default(advice: Advice) -> str:
    """What vLLM's default carries, or which target it misses."""
    best, own = advice.best, advice.default
    if own is None:
        return "steps that the tables or the memory do not cover"
    if not own.rate:
        return f"misses the target for {WORDS[own.bound_by]}"
    goal = advice.question.goal
    if advice.question.load:
        return f"{WORDS[goal]} {own.latency[goal]:.3g} s, here {advice.value:.3g}"
    much = f"{own.rate:.3g} requests/s ({own.rate / best.rate - 1:+.0%})"
    return f"{much}, {WORDS[own.bound_by]} forbids more, P99 TBT {1e3 * own.latency['tbt_p99']:.0f} ms there"


def say(case: Case, advice: Advice, question: Question, words: Sequence[str]) -> None:
    """Print the memory behind the answer, vLLM's default beside it, what is not modelled, and how to verify it there.

    `words` are what MODEL holds and the question, as they were given.
    """
    best, error = advice.best.setting, case.calibration.error
    memory = case.memory(best)
    parts = {"weights": memory.weights, "activations": memory.activations, "kept by vLLM": memory.kept}
    told = ", ".join(f"{what} {size / GIB:.1f}" for what, size in parts.items())
    left = memory.blocks * BLOCK * memory.per_token / GIB
    paragraph(f"memory per GPU: {memory.budget / GIB:.1f} GiB, {UTILIZATION:g} of what CUDA reports, of which {told}, "
                  f"KV cache {left:.1f} GiB or {memory.blocks * BLOCK:,} tokens")  # fmt: skip
    small = "; steps of experts below 512 tokens by a factor of 2" if error.small_steps else ""
    off = f"end to end off by {error.ttft_p50 or 0:.0%} where it could be checked (Table 4), "
    off += f"by {error.end_to_end or 0:.0%} in public measurements"
    paragraph(f"from published kernel tables ({case.calibration.sources[0]}), unverified on this GPU; {off}{small}: "
                  "the interval is that much wider")  # fmt: skip
    if advice.high > WIDEST * advice.low:
        paragraph(f"the interval is wider than a factor of {WIDEST:g}: measure there before relying on it")
    paragraph(f"not modelled: {MISSING}{'' if case.hit else ', prefix caching (HIT= says how much it finds)'}")
    if own := case.default:
        told = f"{own.budget} tokens and {own.max_batch} requests in a step"
        paragraph(f"vLLM's default on this GPU, {told}: {_default(advice)}")
    if any(panel.model == words[0] for panel in load_figure("fig9b").panels):
        paragraph(f"verify there: make recommend MODEL={' '.join(words)}")
    show_bench(case, advice, "run the command to paste and, in another shell, this")
