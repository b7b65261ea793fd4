"""`make calibrate`: a short set of steps on this machine's engine, fitted to the cost model, with its held-out error."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.calibrate.fit import fit_records, observed, sizes_of, with_loop
from experiments.calibrate.published import write
from experiments.engine.engine_process import engines
from experiments.machine.doctor import choose_testbed
from experiments.machine.gpus import environment_here
from experiments.records.errors import SpecError
from experiments.records.provenance import machine
from experiments.records.record import Engine, Phase, Record, Request
from experiments.records.terminal import arguments, command, console, parse, result
from experiments.simulator.calibration import Calibration, Loop, load_calibration
from experiments.simulator.estimate import HERE, made_on
from experiments.spec.expand import expand
from experiments.spec.spec import EngineSettings, Testbed, load_figure

WHOLE, LONG = 4, 8  # times that a prompt of each length is computed in one step, of the two longest; see observed for the first
UNCERTAIN = 0.03  # relative error of the median time of steps of a size from which on they are measured again
AGAIN, MOST_OF = 2, 2  # how often that is done at most; phases that run again for a size
LIMIT_S = 1800.0  # of all steps; a model of 70B on four PCIe cards would take some 750
DECODES = 16  # output tokens per request of a calibration run


def settings_of(testbed: Testbed) -> dict[str, tuple[EngineSettings, int]]:
    """Engine model -> the settings of the testbed that ask most of it (longest prompts, largest chunk size), and the longest
    context, in tokens, at which it is to decode; 0 where Figure 9 has no load for it."""
    found: dict[str, tuple[EngineSettings, int]] = {}
    for figure in ("fig9a", "fig9b"):
        for session in expand(load_figure(figure), testbed, 1):
            engine = session.engine
            known, decoding = found.get(engine.model, (engine, 0))
            decoding = max(decoding, engine.max_model_len if session.kind == "serving" else 0)
            found[engine.model] = max(known, engine, key=lambda asked: (asked.max_model_len, asked.max_budget)), decoding
    return found


def calibration_phases(settings: EngineSettings, decoding: int, kv_blocks: int, block_size: int) -> list[Phase]:
    """Work whose steps cover what the engine can be asked, in random order, so that drift of the machine hits all alike.

    Prompts of the greatest length, and its halves, in one step each (such a step is slower alone than after others of its size:
    memory is mapped anew); the longest in chunks of at most an eighth, or what the engine allows; full and smaller batches that
    decode together at short contexts, and at the longest (`decoding`, tokens) a full one or as many as fill the KV cache, which
    has `kv_blocks` of `block_size` tokens; at every chunk size random requests that come while others run; and some one by one,
    so that the engine pauses in between.
    """
    longest, largest, batch = settings.max_model_len, settings.max_budget, settings.max_batch
    usable = kv_blocks - 1  # vLLM keeps one
    draw, phases = np.random.default_rng(1), []

    def load(budget: int, count: int, gap_s: float, most: int) -> Phase:
        prompts = np.exp(draw.uniform(np.log(8), np.log(max(9, longest // 4)), count)).astype(np.int64).tolist()
        outputs, arrivals = draw.integers(2, most, count).tolist(), np.cumsum(draw.exponential(gap_s, count)).tolist()
        return Phase(budget, tuple(map(Request, arrivals, prompts, outputs, range(count))))

    for part in range(6):
        whole = min(longest, largest + 1) >> part
        phases += [Phase(largest, (Request(0.0, whole - 1, 1, seed=part),))] * (LONG if part < 2 else WHOLE)
    chunk = budget = min(largest, max(longest // 8, 2 * batch)) if largest >= longest else largest
    while budget >= max(batch, 8):
        again = 2 if budget == chunk else 1  # so that its last piece, the costliest, is not the first of its shape
        phases += [Phase(budget, (Request(0.0, longest - 1, 1, seed=budget),))] * again
        phases += [load(budget, 3 * batch // 4, gap_s=0.03, most=2 * DECODES) for _ in range(2) if budget > batch]
        budget //= 2
    filling = max(1, min(batch, -(-usable * block_size // max(1, decoding))))
    for count, most in [(filling, decoding), *((batch >> n, longest // 8) for n in range(batch.bit_length()))]:
        total = min(most, usable // count * block_size)  # else some would wait for the blocks of others
        # each goes on for DECODES steps after the last prompt is done, so that all decode at once
        output = min(DECODES + -(-count * total // chunk), total - 1)
        if output > 0:
            phases.append(Phase(chunk, tuple(Request(0.0, total - output, output, seed=n) for n in range(count))))
    phases += [load(chunk, 8, gap_s=0.2, most=8)] * 3
    return [phases[place] for place in draw.permutation(len(phases))]


def _kv_cache(engine: Engine) -> tuple[int, int]:
    """Its blocks, and the tokens of each."""
    return engine.facts["kv_blocks"], engine.facts["block_size"]


def _served(engine: Engine, phases: Sequence[Phase]) -> Record:
    return engine.run(phases, time_limit_s=LIMIT_S)


def uncertain(calibration: Calibration) -> list[int]:
    """Sizes, see sizes_of, of whose steps the time is not known well enough."""
    pieces = (piece for piece in calibration.pieces if piece.known_to > UNCERTAIN)
    return [int(sizes_of(np.array(piece.tokens[1]), np.array(int(not piece.only_decodes)))) for piece in pieces]


def phases_with(phases: Sequence[Phase], record: Record, sizes: Sequence[int]) -> list[Phase]:
    """For each of these sizes the phases that had most of its steps in the record of all phases."""
    tokens = (record.steps["prefill_tokens"] + record.steps["decode_tokens"]).to_numpy()
    size = sizes_of(tokens, record.steps["prefill_tokens"].to_numpy())
    spans = record.requests.groupby("phase").agg(first=("first_step", "min"), last=("last_step", "max"))
    count = np.array([np.bincount(size[first : last + 1], minlength=64) for first, last in spans.to_numpy().tolist()])
    chosen = {number for one in sizes for number in np.argsort(-count[:, one], kind="stable")[:MOST_OF].tolist()}
    return [phases[number] for number in sorted(chosen)]


def _measured(settings: EngineSettings, decoding: int, name: str, nvlink: bool) -> Calibration:
    """Run the calibration's steps on a fresh engine and fit them; sizes of whose steps too little is known run again."""
    here = machine()["type"]
    with engines([settings], environment_here(settings, nvlink)) as (run,):
        kv_blocks, block_size = run(_kv_cache)
        phases = calibration_phases(settings, decoding, kv_blocks, block_size)
        record = first = run(_served, phases)
        parts = list[tuple[pd.DataFrame, pd.DataFrame, Loop]]()
        while True:
            if record.truncated:
                came = f"{record.requests['phase'].nunique()} of {len(phases)} loads"
                took = f"{settings.model}: its calibration took over {LIMIT_S:g} s, for {came}, so nothing is stored"
                raise SpecError(f"{took}; end what else runs here, or use a faster machine")
            parts.append(observed(record))
            steps, paused = (pd.concat(frames, ignore_index=True) for frames in list(zip(*parts, strict=True))[:2])
            source = f"{len(steps)} steps of vLLM on this machine ({here})"
            fitted = fit_records(steps, settings, name, f"{settings.model} on {here}", source, block_size)
            if len(parts) > AGAIN or not (sizes := uncertain(fitted)):
                return replace(with_loop(fitted, paused, parts[0][2]), made_on=made_on(settings), kv_blocks=kv_blocks)
            record = run(_served, phases_with(phases, first, sizes))


def calibrate(
    settings: EngineSettings, decoding: int, testbed: str, folder: Path = HERE, called: str = "", nvlink: bool = True
) -> Path:
    """Calibrate a model on this machine's engine and store the calibration; where it lies. `called`: see calibration_here;
    `nvlink`: see gpus.places. Raises SpecError."""
    fitted = _measured(settings, decoding, name := f"{testbed}-{called or settings.model}", nvlink)
    write(fitted, path := folder / f"{name}.yaml")
    return path


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 for bad input or an engine that did not start."""
    options = parse(arguments("experiments.calibrate.here", __doc__, "testbed", "out"), argv)
    testbed, reason = choose_testbed(options.testbed, options.out)
    if testbed.platform == "simulated":
        raise SpecError(f"--testbed: got {testbed.testbed}, which has no engine; allowed: a testbed with one")
    console.print(f"testbed {testbed.testbed} ({reason}); about a minute for each model on the CPU")
    found = {}
    for model, (settings, decoding) in settings_of(testbed).items():
        began = time.monotonic()
        path = calibrate(settings, decoding, testbed.testbed)
        error, seconds = load_calibration(str(path)).error, time.monotonic() - began
        console.print(f"{model}: held-out error {error.held_out:.1%} ({error.held_out_on}), {seconds:.0f} s; {path}")
        found[model] = {"held_out": error.held_out, "path": path}
    result(testbed=testbed.testbed, calibrations=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
