"""Calibrations of the paper's scale: `make tables` writes them anew, those of a recent engine from measured kernel tables.

The tables come with the package aiconfigurator-core, which only this command needs. It adds up kernel times to a step; what it
says of single steps is kept in artifacts/calibration/published, and our cost model is fitted to that.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.optimize import nnls

from experiments.calibrate.published import (
    DATA,
    LONGEST_PROFILE,
    fit_error,
    published_calibrations,
    published_jitter,
    rounded_profile,
    with_errors,
    write,
)
from experiments.records.errors import SpecError
from experiments.records.store import write_whole
from experiments.records.terminal import arguments, command, console, parse, result
from experiments.simulator.calibration import CALIBRATIONS, Calibration, FitError, Floats, Profile, ValidRange, attention_of
from experiments.simulator.cost_model import CostModel, composition
from experiments.simulator.memory import BLOCK, GIB, REPORTED
from experiments.spec.spec import load_model, read_yaml

PACKAGE, VERSION = "aiconfigurator-core", "0.12.0"
SYSTEM, ENGINE, ENGINE_VERSION = "a100_sxm", "vllm", "0.14.0"
ROWS = DATA.with_name("a100-sxm.yaml")
FITTED = {"yi-34b": (2, ("yi-34b", "yi-34b-200k"), "Yi-34B"), "mistral-7b": (1, ("mistral-7b",), "Mistral-7B")}


@dataclass(frozen=True)
class Grid:
    """Steps that are asked for: tokens of steps; (tokens, tokens before them) of a prompt; (requests, context of each) that
    decode; and, held out, (tokens of a prompt, requests that decode at that context)."""

    operators: Sequence[int]
    prefill: Sequence[tuple[int, int]]
    decode: Sequence[tuple[int, int]]
    held_out: Sequence[tuple[int, int]]


# Where the operators were measured; 16,384 is the package's extrapolation.
MEASURED = (1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 128, 160, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
PAPER = Grid(
    operators=(*MEASURED, LONGEST_PROFILE),
    prefill=[
        *((n, 0) for n in (128, 256, 512, 1024, 2048, 4096, 8192, 16384)),
        *((n, total - n) for n in (512, 1024, 2048) for total in (4096, 8192, 16384)),
    ],
    decode=[(n, context) for n in (1, 2, 4, 8, 16, 32, 64, 128) for context in (256, 1024, 4096)],
    held_out=[
        *((n, decodes) for n in (256, 512, 1024, 2048) for decodes in (4, 16, 32, 64, 128)),
        *((n, 0) for n in (640, 1536, 3072, 6144, 12288)),  # sizes between the knots
    ],
)

FIXED_BY = {
    "overhead_s": "least squares on the tables' prefill and decode steps: what attention kernels cost beside their work",
    "linear": "the tables' operators but attention, all-reduce included; beyond 8,192 tokens extrapolated by the package",
    "decode": "0: the tables know no cost of a decoding request but its tokens and its context",
    "host": "none: the tables hold kernels, not what the host does between them",
    "attention": "least squares on the same steps",
    "attention.masked_share": "0: these kernels skip masked tiles; counting them, prefill is off by 13 % at worst, not by 1.5",
    "jitter": "assumed to be that of the paper's machine, one step published twice",
    "valid": "the steps that were fitted; 128 requests at 4,096 tokens of context",
    "block_size": "vLLM's default on GPUs",
    "device_memory_bytes": "what CUDA reports, see experiments/simulator/memory.py",
}
NOTICE = f"""# Written by experiments/calibrate/tables.py: milliseconds of single steps as {PACKAGE} {VERSION}
# adds them up from its measured kernel tables. Copyright NVIDIA Corporation and affiliates, Apache-2.0; see
# artifacts/reference/SOURCES.md. operators: tokens, ms of all but attention. prefill: tokens, tokens before them, ms.
# decode: requests, context of each, ms. held_out: tokens of a prompt, requests that decode at that context, ms.
"""


def engine_handle() -> Any:
    """The package's class for a model on a GPU. Raises SpecError without the package, or with another version of it."""
    try:
        came = version(PACKAGE)
        from aiconfigurator_core.sdk.engine import EngineHandle
    except (PackageNotFoundError, ModuleNotFoundError):
        came = "none"
    if came != VERSION:
        raise SpecError(f"package {PACKAGE}: got {came}; allowed: {VERSION}, in an environment that make tables sets up")
    logging.getLogger("aiconfigurator_core").setLevel(logging.ERROR)  # of attention back ends that GPUs have no choice of
    return EngineHandle


def source_of(system: str, engine_version: str) -> str:
    """What a calibration names as its source."""
    return f"{PACKAGE} {VERSION} (Apache-2.0), systems/data/{system}: {ENGINE} {engine_version}"


def read_tables(shape: Mapping[str, Any], system: str, engine_version: str, grid: Grid, **how: Any) -> dict[str, Any]:
    """What the package says of the grid's steps of a model on a GPU, milliseconds: rows of (what the step holds ..., ms).

    `how`: tensor parallel sizes and quantization, as the package names them. Raises SpecError as above.
    """
    handle = engine_handle()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape))
        engine = handle.compile(folder, system, ENGINE, backend_version=engine_version, **how)
        prefill = [[n, before, engine.predict_prefill_latency(1, n + before, before)] for n, before in grid.prefill]
        decode = [[n, at, engine.mixed_step_breakdown(0, n, at, 2)[0]] for n, at in grid.decode]
        mixed = [[n, decodes, engine.mixed_step_breakdown(n, decodes, n, 2)[0]] for n, decodes in grid.held_out]
        operators = [[n, engine.mixed_step_breakdown(n, 0, n, 2)[1]] for n in grid.operators]
    rows = {"operators": operators, "prefill": prefill, "decode": decode, "held_out": mixed}
    return {name: [[*row[:-1], round(row[-1], 4)] for row in table] for name, table in rows.items()}


def steps_of(rows: Mapping[str, Any], name: str) -> tuple[list[tuple[int, int, int, int, int]], Floats]:
    """Steps of a table of read_tables, as CostModel.step takes them, and their seconds."""
    steps = []
    for first, second, _ in rows[name]:
        alone = {"prefill": (first, second, 0, 0), "decode": (0, 0, first, second)}
        steps.append(composition(*alone.get(name, (first, 0, second, first))))
    return steps, np.array([row[-1] for row in rows[name]]) / 1e3


def calibrated(rows: Mapping[str, Any], dtype: str, **header: Any) -> Calibration:
    """A calibration that says what `header` does, of the cost model fitted to the rows and valid as far as they go.

    The operators are as in the rows. A fixed time, a query-key pair of prefill and a token of decode context come by least
    squares on relative errors; steps that mix, and sizes between the knots, are held out.
    """
    tokens, ms = np.array(rows["operators"]).T
    parts = [steps_of(rows, name) for name in ("prefill", "decode")]
    steps, total = np.array([step for part, _ in parts for step in part]), np.concatenate([part for _, part in parts])
    unit = attention_of(header["models"][0], header["tensor_parallel"], dtype, 1.0, 0.0, 1.0)
    _, decodes, _, pairs, context = steps.max(axis=0).tolist()
    draft = Calibration(
        **header,
        overhead_s=0.0,
        linear=rounded_profile(tokens.astype(np.int64), ms / 1e3),
        decode=Profile((0, decodes), (0.0, 0.0)),
        attention=unit,
        jitter=published_jitter(read_yaml(DATA)),
        valid=ValidRange(int(tokens.max()), decodes, pairs, context),
        error=FitError(0.0, 0.0, 0.0, ""),
        block_size=BLOCK,
    )
    work = np.stack([np.ones(len(total)), steps[:, 3], steps[:, 4]], axis=1)
    scale = work.max(axis=0)
    rest = total - draft.linear.table()[steps[:, 0] + steps[:, 1]]
    fixed, pair_s, context_s = (nnls(work / scale / total[:, None], rest / total)[0] / scale).tolist()
    rates = {"flop_per_s": unit.flop_per_pair / pair_s, "kv_bytes_per_s": unit.kv_bytes_per_token / context_s}
    attention = replace(unit, **{key: float(f"{rate:.4g}") for key, rate in rates.items()})
    draft = replace(draft, overhead_s=round(fixed, 8), attention=attention)
    cost = CostModel(draft)

    def errors(name: str) -> list[float]:
        return [cost.step(*step) / measured - 1 for step, measured in zip(*steps_of(rows, name), strict=True)]

    held_out = f"{len(rows['held_out'])} steps of the tables that mix, or lie between the knots"
    return replace(draft, error=fit_error(errors("prefill") + errors("decode"), errors("held_out"), held_out))


def calibrate(model: str, rows: Mapping[str, Any], source: str) -> Calibration:
    """The calibration of one of the paper's models from its rows."""
    tensor_parallel, models, name = FITTED[model]
    return calibrated(
        rows,
        "float16",
        calibration=f"a100-{model}" + (f"-tp{tensor_parallel}" if tensor_parallel > 1 else ""),
        title=f"{name} on {tensor_parallel} A100 80 GB SXM, kernels of vLLM {ENGINE_VERSION}",
        models=models,
        tensor_parallel=tensor_parallel,
        sources=(source,),
        fixed_by=FIXED_BY,
        device_memory_bytes=REPORTED[SYSTEM] * GIB,
    )


def read_paper(model: str) -> dict[str, Any]:
    """The rows of one of the paper's models."""
    shape = load_model(model) | {"architectures": ["LlamaForCausalLM"]}  # Mistral's layers are Llama's, but not known by name
    return read_tables(shape, SYSTEM, ENGINE_VERSION, PAPER, tp_size=FITTED[model][0])


def paper_calibrations() -> list[Calibration]:
    """All of the paper's scale, of the old engine and of a recent one, from what artifacts/calibration/published holds."""
    rows = read_yaml(ROWS)
    recent = [calibrate(model, own, rows["source"]) for model, own in rows["models"].items()]
    return [with_errors(calibration) for calibration in (*published_calibrations(), *recent)]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Read the tables, write their rows and the calibrations anew; 0, or 2 with one line of reason."""
    parse(arguments("experiments.calibrate.tables", main.__doc__), argv)
    found = {"source": source_of(SYSTEM, ENGINE_VERSION), "models": {model: read_paper(model) for model in FITTED}}
    write_whole(ROWS, NOTICE + yaml.safe_dump(found, sort_keys=False, width=124, default_flow_style=None))
    errors = {}
    for calibration in paper_calibrations():
        write(calibration, CALIBRATIONS / f"{calibration.calibration}.yaml")
        error = calibration.error
        console.print(f"{calibration.calibration}: held-out error {error.held_out:.1%} ({error.held_out_on})")
        errors[calibration.calibration] = error.held_out
    result(held_out=errors)
    return 0


if __name__ == "__main__":
    sys.exit(main())
