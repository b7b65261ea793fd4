"""What simulated machines predict of what is published of whole requests, and how far off that is.

`python -m experiments.calibrate.end_to_end` is the end of `make tables`. Of the paper's machines it writes
artifacts/reference/end_to_end.yaml anew, and the errors into the calibrations; Table 4 needs the original's trace. Of GPUs
that are not here it writes public.yaml from public.csv; answers for these are widened by its errors. No coefficient was
fitted to any of these values; Tables 2 and 4 have chosen the form of the cost.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import yaml

from experiments.calibrate.gpu import PUBLIC, calibration_of, model_of
from experiments.calibrate.published import END_TO_END, with_errors, write
from experiments.records.errors import SpecError
from experiments.records.metrics import serving_metrics
from experiments.records.record import Phase, Request
from experiments.records.store import write_whole
from experiments.records.terminal import arguments, command, console, parse, result
from experiments.simulator.calibration import CALIBRATIONS, Calibration, Jitter, load_calibration
from experiments.simulator.cost_model import CostModel, composition
from experiments.simulator.memory import GIB, GRAPHS, gpu_memory
from experiments.simulator.simulator import SimulatedEngine
from experiments.spec.expand import Session, expand
from experiments.spec.spec import EngineSettings, load_figure, load_testbed, read_spec
from experiments.spec.traces import Trace
from experiments.spec.workload import SOURCE, TraceSource, choose_trace, serving_requests

MACHINES = ("a100-sim", "a100-2024-sim")  # testbeds; the model that is published of is PUBLISHED
PUBLISHED = "yi-34b"
CONTEXT = 1024  # of the decodes in Table 2, as in Figure 2
REQUESTS, QPS, SEED, LONGEST = 128, 1.0, 42, 8192  # of Table 4
SAID = 1024  # chunk size of Table 4's run that was made, by the authors' script, with 512
NOTICE = """# Written by experiments/calibrate/end_to_end.py: what each calibration predicts of what is published.
# errors: mean relative error of a quantity over its values; a simulated interval is widened by that of its quantity.
# prefill: Figure 9a, relative to unchunked; ttft_p50, tbt_p99: Table 4, seconds; step: Table 2, ms.
# A value without `published` stands beside the others only.
"""
PUBLIC_NOTICE = """# Written by experiments/calibrate/end_to_end.py: predictions of what public.csv holds, from kernel tables.
# errors: mean relative error of a quantity over its measurements.
"""
GRAPHS_FROM = (0, 21)  # the version of vLLM from which on it takes CUDA graphs off the KV cache


def read_reference(name: str) -> pd.DataFrame:
    """A table of artifacts/reference."""
    return pd.read_csv(END_TO_END.parent / f"{name}.csv", comment="#")


def _value(quantity: str, source: str, at: str, predicted: float, published: float | None) -> dict[str, Any]:
    found = {"quantity": quantity, "source": source, "at": at, "predicted": round(float(predicted), 4)}
    return found if published is None else found | {"published": round(float(published), 4)}


def quiet(name: str) -> Calibration:
    """A calibration without jitter: what is published are means and single runs."""
    return replace(load_calibration(name), jitter=Jitter(0.0))


def step_values(calibration: Calibration) -> list[dict[str, Any]]:
    """Table 2's single steps, and the other publication of 4 decodes; ms."""
    cost, found = CostModel(calibration), []
    for row in read_reference("table2").to_dict("records"):
        prefill, decodes = row["prefill_tokens"], row["decode_requests"]
        seconds = cost.step(*composition(prefill, 0, decodes, CONTEXT))
        parts = [f"{prefill:,} tokens of prefill"] * (prefill > 0) + [f"{decodes} decodes"] * (decodes > 0)
        found.append(_value("step", row["source"], " and ".join(parts), 1e3 * seconds, row["ms"]))
    return found


def prefill_values(session: Session, calibration: Calibration) -> list[dict[str, Any]]:
    """Figure 9a's chunked prefill times relative to unchunked."""
    engine = SimulatedEngine(session.engine, calibration, seed=0)
    table = read_reference("fig9a")
    sizes = table["chunk_size"].replace("unchunked", session.engine.max_budget).astype(int)
    phases = [Phase(n, (Request(0.0, length - 1, 1),)) for length, n in zip(table["prompt_length"], sizes, strict=True)]
    table["seconds"] = [engine.run([phase], np.inf).steps["seconds"].sum() for phase in phases]
    columns = ["seconds", "prefill_ms"]
    whole = table[table["chunk_size"] == "unchunked"].set_index("prompt_length")[columns]
    chunked = table[table["chunk_size"] != "unchunked"]
    ratios = chunked[columns].to_numpy() / whole.loc[chunked["prompt_length"]].to_numpy()
    where = chunked["prompt_length"].astype(str) + " in chunks of " + chunked["chunk_size"]
    return [_value("prefill", "Figure 9a", at, *ratio) for at, ratio in zip(where, ratios.tolist(), strict=True)]


def serving_values(session: Session, calibration: Calibration, trace: Trace) -> list[dict[str, Any]]:
    """Table 4: P50 TTFT and P99 TBT, seconds."""
    engine = SimulatedEngine(replace(session.engine, max_budget=LONGEST), calibration, seed=0)
    requests, found = serving_requests(trace, QPS, REQUESTS, SEED, LONGEST), list[dict[str, Any]]()
    table = read_reference("table4").set_index("chunk_size")
    for size in sorted({*table.index.tolist(), SAID}):
        seen = serving_metrics(engine.run([Phase(size, requests)], np.inf))
        for name in ("ttft_p50", "tbt_p99"):
            found.append(_value(name, "Table 4", f"chunk size {size}", seen[name], table[f"{name}_s"].get(size)))
    return found


def errors_of(values: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean relative error of each quantity that whole requests have."""
    table = pd.DataFrame(values).query("quantity != 'step'")
    off = (table["predicted"] / table["published"] - 1).abs()  # NaN, which no mean counts, where nothing is published
    return {str(name): round(error, 4) for name, error in off.groupby(table["quantity"], sort=False).mean().items()}


def end_to_end(testbed_name: str, trace: Trace) -> dict[str, dict[str, Any]]:
    """Each calibration of a simulated testbed -> its entry. Models of which nothing is published have the errors of
    the one of which there is, on the same machine by the same recipe; where its own steps are off by more, that."""
    testbed = load_testbed(testbed_name)
    names = testbed.calibrations or {}
    first = {session.kind: session for name in ("fig9a", "fig9b") for session in expand(load_figure(name), testbed, 1)
             if session.engine.calibration == names[PUBLISHED]}  # fmt: skip
    calibration = quiet(names[PUBLISHED])
    values = [*step_values(calibration), *prefill_values(first["prefill"], calibration)]
    values += serving_values(first["serving"], calibration, trace)
    found = {names[PUBLISHED]: {"errors": errors_of(values), "values": values}}
    for name in sorted(set(names.values()) - set(found)):
        least = load_calibration(name).error.held_out
        errors = {quantity: max(least, error) for quantity, error in errors_of(values).items()}
        found[name] = {"errors": errors, "errors_of": names[PUBLISHED]}
    return found


def predicted(row: Mapping[str, Any]) -> float:
    """The quantity of a public measurement, from kernel tables: the clients' next request enters when one of theirs is served,
    as a full batch lets it."""
    config, split = model_of(row["model"])[0], row["tensor_parallel"]
    calibration = replace(calibration_of(config, row["gpu"], split, "bfloat16"), jitter=Jitter(0.0))
    settings = EngineSettings(
        "simulated", config, split, "bfloat16", "dummy", row["chunk_size"], row["max_batch"], row["prompt"] + row["output"],
        None, None, row["utilization"],
    )  # fmt: skip
    version = tuple(int(part) for part in row["vllm"].split(".")[:2])
    memory = gpu_memory(settings, calibration.device_memory_bytes or 0.0)
    memory = memory if version >= GRAPHS_FROM else replace(memory, kept=memory.kept - GRAPHS * GIB)
    engine = SimulatedEngine(replace(settings, max_batch=row["clients"] or row["max_batch"]), calibration, 0, memory.blocks)
    requests = (Request(0.0, row["prompt"], row["output"]),) * row["requests"]
    times = engine.run([Phase(row["chunk_size"], requests)], np.inf).tokens.groupby("request")["time_s"].agg(["min", "max"])
    found = {
        "requests_per_s": row["requests"] / times["max"].max(),
        "ttft": 1e3 * times["min"].iloc[0],
        "tpot": 1e3 * (times["max"] - times["min"]).mean() / (row["output"] - 1),
    }
    return float(found.get(row["quantity"], found["tpot"]))


def public_errors() -> dict[str, float]:
    """Predict the measurements of public.csv, tell of each, write public.yaml anew; mean relative error of each quantity."""
    table = read_reference("public")
    table["predicted"] = [round(predicted(dict(row)), 3) for _, row in table.iterrows()]
    table["off"] = (table["predicted"] / table["measured"] - 1).round(3)
    off = table["off"].abs().groupby(table["quantity"]).mean()
    errors, values = {str(name): round(float(error), 4) for name, error in off.items()}, table.to_dict("records")
    text = yaml.safe_dump({"errors": errors, "values": values}, sort_keys=False, width=250, default_flow_style=None)
    write_whole(PUBLIC, PUBLIC_NOTICE + text)
    for row in values:
        at = f"{row['prompt']} + {row['output']} tokens, {row['clients'] or 'all'} at once"
        what = f"{row['quantity']} {row['measured']:g}, predicted {row['predicted']:g} ({row['off']:+.0%})"
        where = f"{row['model']}, {row['tensor_parallel']} {row['gpu']}, vLLM {row['vllm']}"
        console.print(f"{row['source']}: {where}, {at}: {what}")
    return errors


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Predict what is published anew; 0, or 2 with one line of reason, such as another trace."""
    trace = choose_trace(parse(arguments("experiments.calibrate.end_to_end", __doc__, "trace"), argv).trace)
    if trace.sha256 != read_spec(SOURCE, TraceSource).sha256:
        raise SpecError(
            f"trace: got {trace.name}; allowed: the original's, with which Table 4 was measured; make trace fetches it"
        )
    found = {name: entry for machine in MACHINES for name, entry in end_to_end(machine, trace).items()}
    text = yaml.safe_dump(found, sort_keys=False, width=150, default_flow_style=None)
    write_whole(END_TO_END, NOTICE + text)
    for name, entry in found.items():
        write(with_errors(load_calibration(name)), CALIBRATIONS / f"{name}.yaml")
        console.print(f"{name}: off by {', '.join(f'{what} {error:.1%}' for what, error in entry['errors'].items())}")
    result(errors={name: entry["errors"] for name, entry in found.items()} | {"public": public_errors()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
