"""What the kernel tables predict of public measurements of vLLM on GPUs, and how far off that is; no fit has seen one.

`python -m experiments.calibrate.public` reads artifacts/reference/public.csv and writes public.yaml anew; answers for a GPU
that is not here are widened by its errors. docs/simulator.md says what makes a measurement usable.
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
from experiments.records.record import Phase, Request
from experiments.records.store import write_whole
from experiments.records.terminal import arguments, command, console, parse, result
from experiments.simulator.calibration import Jitter
from experiments.simulator.memory import GIB, GRAPHS, gpu_memory
from experiments.simulator.simulator import SimulatedEngine
from experiments.spec.spec import EngineSettings

GRAPHS_FROM = (0, 21)  # the version of vLLM from which on it takes CUDA graphs off the KV cache
NOTICE = """# Written by experiments/calibrate/public.py: predictions of the measurements in public.csv, from kernel tables.
# errors: mean relative error of a quantity over its measurements.
"""


def predicted(row: Mapping[str, Any]) -> float:
    """The row's quantity: the clients' next request enters when one of theirs is served, as a full batch lets it."""
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


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Predict the public measurements anew; 0, or 2 with one line of reason."""
    parse(arguments("experiments.calibrate.public", __doc__), argv)
    table = pd.read_csv(PUBLIC.with_suffix(".csv"), comment="#")
    table["predicted"] = [round(predicted(dict(row)), 3) for _, row in table.iterrows()]
    table["off"] = (table["predicted"] / table["measured"] - 1).round(3)
    errors = table["off"].abs().groupby(table["quantity"]).mean().round(4).to_dict()
    text = yaml.safe_dump(
        {"errors": errors, "values": table.to_dict("records")}, sort_keys=False, width=250, default_flow_style=None
    )
    write_whole(PUBLIC, NOTICE + text)
    for row in table.to_dict("records"):
        at = f"{row['prompt']} + {row['output']} tokens, {row['clients'] or 'all'} at once"
        what = f"{row['quantity']} {row['measured']:g}, predicted {row['predicted']:g} ({row['off']:+.0%})"
        console.print(
            f"{row['source']}: {row['model']}, {row['tensor_parallel']} {row['gpu']}, vLLM {row['vllm']}, {at}: {what}"
        )
    result(errors=errors)
    return 0


if __name__ == "__main__":
    sys.exit(main())
