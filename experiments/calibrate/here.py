"""`make calibrate`: a short set of steps on this machine's engine, fitted to the cost model, with its held-out error."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import nnls

from experiments.calibrate.published import fit_error, rounded_profile, write
from experiments.engine.engine_process import engines
from experiments.machine.doctor import choose_testbed
from experiments.records.errors import SpecError
from experiments.records.provenance import machine
from experiments.records.record import STEP_COLUMNS, Engine, Phase, Record, Request
from experiments.records.terminal import arguments, command, console, parse, result
from experiments.simulator import cost_model
from experiments.simulator.cost_model import Calibration, CostModel, Floats, Jitter, Loop, Profile
from experiments.simulator.estimate import HERE, made_on
from experiments.spec.expand import expand
from experiments.spec.spec import EngineSettings, Testbed, load_figure

COMPOSITION = ("prefill_tokens", "decode_tokens", "prefill_pairs", "decode_context")
MIN_STEPS = 60  # fewer cannot fix about ten coefficients and leave some to test them
HELD_OUT = 4  # every fourth step is held out
OUTLIER = 4.0  # scaled median absolute deviations beyond which a step is a tail, not jitter
BEYOND = 1.05  # how far past the most pairs and context seen the straight lines hold: a full last chunk has 0.3 % more
WHOLE = 4  # times that a prompt of each length is computed in one step; the first is left out, see observed
DECODES = 16  # output tokens per request of a calibration run
Chosen = npt.NDArray[np.bool_]


def settings_of(testbed: Testbed) -> dict[str, tuple[EngineSettings, int]]:
    """Engine model -> the settings of the testbed that ask most of it (longest prompts, largest chunk size), and the longest
    context, in tokens, at which it is to decode; 0 where Figure 9 has no load for it."""
    found: dict[str, tuple[EngineSettings, int]] = {}
    for figure in ("fig9a", "fig9b"):
        for session in expand(load_figure(figure), testbed, 1):
            engine = session.engine
            known, decoding = found.get(engine.model, (engine, 0))
            decoding = max(decoding, engine.max_model_len if session.kind == "serving" else 0)
            found[engine.model] = max(known, engine, key=lambda settings: settings.max_model_len), decoding
    return found


def fit_records(
    steps: pd.DataFrame, settings: EngineSettings, name: str, title: str, source: str, block_size: int
) -> Calibration:
    """Fit the same model to the steps of a real engine: STEP_COLUMNS, one row per step, warm-up left out.

    The profile, rising from 0, has knots at powers of 2. `masked_share` is 0: vLLM's kernels skip masked tiles. Every fourth
    step is held out; jitter comes from the residuals of the others. Raises SpecError for missing columns, too few steps, or
    none with prefill or decode.
    """
    if missing := [column for column in STEP_COLUMNS if column not in steps]:
        raise SpecError(f"fit_records: {source}: columns: got none named {', '.join(missing)}; allowed: all of STEP_COLUMNS")
    seconds = steps["seconds"].to_numpy(dtype=np.float64)
    prefill, decodes, pairs, context = (steps[column].to_numpy(dtype=np.int64) for column in COMPOSITION)
    if len(steps) < MIN_STEPS or not (prefill.any() and decodes.any() and (seconds > 0).all()):
        came = f"{len(steps)} steps, {np.sum(prefill > 0)} with prefill, {np.sum(decodes > 0)} with decodes"
        raise SpecError(f"fit_records: {source}: got {came}; allowed: at least {MIN_STEPS}, some of each, all longer than 0 s")
    tokens = prefill + decodes
    most, most_decodes = int(tokens.max()), int(decodes.max())
    knots = np.unique([*(2 ** np.arange(most.bit_length())), most])
    width = np.diff(knots)
    rise = np.clip(tokens[:, None] - knots[:-1], 0, width) / width  # how much of each piece's rise a step has climbed
    design = np.column_stack([np.ones(len(steps)), rise, pairs, decodes, context])
    train = np.arange(len(steps)) % HELD_OUT != HELD_OUT - 1
    solution, off, usable = _solved(design, seconds, train)
    unit = cost_model.attention_of(settings.model, settings.tensor_parallel, settings.dtype, 1.0, 0.0, 1.0)
    pair_s, context_s = np.maximum(solution[[-3, -1]], 1e-18).tolist()  # where the data show no cost, next to none is charged
    errors = seconds / (design @ solution) - 1
    return Calibration(
        calibration=name,
        title=title,
        models=(settings.model,),
        tensor_parallel=settings.tensor_parallel,
        sources=(source,),
        overhead_s=float(solution[0]),
        linear=rounded_profile(knots, np.cumsum([0.0, *solution[1 : len(knots)]])),
        decode=Profile((0, most_decodes), (0.0, float(solution[-2] * most_decodes))),
        attention=replace(unit, flop_per_s=unit.flop_per_pair / pair_s, kv_bytes_per_s=unit.kv_bytes_per_token / context_s),
        jitter=_fitted_jitter(off[train], prefill[train] == 0),
        valid=cost_model.ValidRange(most, most_decodes, *(int(BEYOND * column.max()) for column in (pairs, context))),
        error=fit_error(list(errors[usable]), list(errors[~train]), f"every {HELD_OUT}th of {len(steps)} steps"),
        block_size=block_size,
        fixed_by=dict.fromkeys(("overhead_s", "linear", "decode", "attention", "jitter", "loop", "valid"), source),
    )


def _solved(design: Floats, seconds: Floats, train: Chosen) -> tuple[Floats, Floats, Chosen]:
    """Coefficients >= 0 by least squares on the relative errors of the steps in `train`, once more without outliers.

    With them, of each step: the log of its time over the predicted one, and whether it is in `train` and no outlier.
    """
    usable = train
    for _ in range(2):
        relative = design[usable] / seconds[usable, None]
        scale = np.abs(relative).max(axis=0)
        scale[scale == 0] = 1.0  # a column without data gets the coefficient 0
        solution: Floats = nnls(relative / scale, np.ones(len(relative)))[0] / scale
        off = np.log(seconds / (design @ solution))
        middle, spread = _median_spread(off[train])
        usable = train & (np.abs(off - middle) < OUTLIER * spread)
    return solution, off, usable


def observed(record: Record) -> tuple[pd.DataFrame, pd.DataFrame, Loop]:
    """From the record of an engine process: warm steps, the first steps after a pause, and what passed outside the steps.

    Left out is the first step with a number of tokens: the kernels of a new shape are made then, an eighth more of its time.
    """
    steps, entered = record.steps, record.requests["injected_s"].to_numpy()
    starts, ends = steps["start_s"].to_numpy(), (steps["start_s"] + steps["seconds"]).to_numpy()
    before = np.concatenate([[0.0], ends[:-1]])  # each step: when the last one ended
    place, earliest, count = np.unique(np.searchsorted(starts, entered), return_index=True, return_counts=True)
    first = entered[earliest]  # of those that entered before a step
    paused = np.zeros(len(starts), dtype=bool)
    paused[place] = first - before[place] > cost_model.PAUSE_S
    loop = Loop(*(float(np.median(parts)) for parts in (np.delete(starts - before, place), (starts[place] - first) / count)))
    again = steps.groupby(steps["prefill_tokens"] + steps["decode_tokens"]).cumcount() > 0
    return steps[again & ~paused], steps[again & paused], loop


def with_loop(calibration: Calibration, paused: pd.DataFrame, loop: Loop) -> Calibration:
    """The calibration with what passes outside the steps; `wake_s` is the median excess of the first steps after a pause.

    An excess in seconds: on one machine it was 3 to 6 ms for steps of 10 as of 50 ms.
    """
    model, columns = CostModel(calibration), list(STEP_COLUMNS)[3:8]
    excess = [row[0] - model.step(*map(int, row[1:])) for row in paused[["seconds", *columns]].itertuples(index=False)]
    wake_s = max(0.0, float(np.median(excess))) if excess else 0.0
    return replace(calibration, loop=replace(loop, wake_s=wake_s))


def _median_spread(values: Floats) -> tuple[float, float]:
    """Median and scaled median absolute deviation, an estimate of sigma that outliers do not move."""
    return float(np.median(values)), 1.4826 * float(np.median(np.abs(values - np.median(values)))) + 1e-12


def _fitted_jitter(off: Floats, only_decodes: Chosen) -> Jitter:
    """Sigmas of the core of the log residuals; what lies beyond OUTLIER sigmas above is tail: its share and mean excess."""
    sigmas, excess = list[float](), list[float]()
    for kind in (~only_decodes, only_decodes):
        middle, spread = _median_spread(off[kind])
        core = np.abs(off[kind] - middle) <= OUTLIER * spread
        sigmas.append(float(off[kind][core].std()))
        excess += np.expm1(off[kind] - middle)[~core & (off[kind] > middle)].tolist()
    return Jitter(sigmas[0], len(excess) / len(off), float(np.mean(excess)) if excess else 0.0, sigmas[1])


def calibration_phases(settings: EngineSettings, decoding: int) -> list[Phase]:
    """Work whose steps cover what the engine can be asked, in random order, so that drift of the machine hits all alike.

    Prompts of the greatest length, and its halves, in one step each (such a step is slower alone than after others of its size:
    memory is mapped anew); the longest in chunks of at most an eighth, or what the engine allows; full and smaller batches that
    decode together at short contexts, a full one at the longest (`decoding`, tokens); at every chunk size random requests that
    come while others run; and some one by one, so that the engine pauses in between.
    """
    longest, largest, batch = settings.max_model_len, settings.max_budget, settings.max_batch
    draw, phases = np.random.default_rng(1), []

    def load(budget: int, count: int, gap_s: float, most: int) -> Phase:
        prompts = np.exp(draw.uniform(np.log(8), np.log(max(9, longest // 4)), count)).astype(np.int64).tolist()
        outputs, arrivals = draw.integers(2, most, count).tolist(), np.cumsum(draw.exponential(gap_s, count)).tolist()
        return Phase(budget, tuple(map(Request, arrivals, prompts, outputs, range(count))))

    for part in range(6):
        whole = min(longest, largest + 1) >> part
        phases += [Phase(largest, (Request(0.0, whole - 1, 1, seed=part),))] * WHOLE
    chunk = budget = min(largest, max(longest // 8, 2 * batch)) if largest >= longest else largest
    while budget >= max(batch, 8):
        again = 2 if budget == chunk else 1  # so that its last piece, the costliest, is not the first of its shape
        phases += [Phase(budget, (Request(0.0, longest - 1, 1, seed=budget),))] * again
        phases += [load(budget, 3 * batch // 4, gap_s=0.03, most=2 * DECODES) for _ in range(2) if budget > batch]
        budget //= 2
    for count, total in [(batch, decoding), *((batch >> n, longest // 8) for n in range(batch.bit_length()))]:
        # each goes on for DECODES steps after the last prompt is done, so that all decode at once
        output = min(DECODES + count * -(-total // chunk), total - 1)
        if output > 0:
            phases.append(Phase(chunk, tuple(Request(0.0, total - output, output, seed=n) for n in range(count))))
    phases += [load(chunk, 8, gap_s=0.2, most=8)] * 3
    return [phases[place] for place in draw.permutation(len(phases))]


def _facts_and_record(engine: Engine, phases: Sequence[Phase]) -> tuple[int, Record]:
    return engine.facts["block_size"], engine.run(phases, time_limit_s=600.0)


def calibrate(settings: EngineSettings, decoding: int, testbed: str, folder: Path = HERE) -> Path:
    """Run the calibration's steps on a fresh engine, fit them, store the calibration; where it lies."""
    with engines([settings]) as (run,):
        block_size, record = run(_facts_and_record, calibration_phases(settings, decoding))
        steps, paused, loop = observed(record)
    name, here = f"{testbed}-{settings.model}", machine()["type"]
    source = f"{len(steps)} steps of vLLM on this machine ({here})"
    fitted = fit_records(steps, settings, name, f"{settings.model} on {here}", source, block_size)
    fitted = replace(with_loop(fitted, paused, loop), made_on=made_on(settings))
    folder.mkdir(parents=True, exist_ok=True)
    write(fitted, path := folder / f"{name}.yaml")
    return path


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 for bad input or an engine that did not start."""
    options = parse(arguments("experiments.calibrate.here", __doc__, "testbed", "out"), argv)
    testbed, reason = choose_testbed(options.testbed, options.out)
    if testbed.platform == "simulated":
        raise SpecError(f"--testbed: got {testbed.testbed}, which has no engine; allowed: a testbed with one")
    console.print(f"testbed {testbed.testbed} ({reason}); less than a minute for each model on the CPU")
    found = {}
    for model, (settings, decoding) in settings_of(testbed).items():
        began = time.monotonic()
        path = calibrate(settings, decoding, testbed.testbed)
        error, seconds = cost_model.load_calibration(str(path)).error, time.monotonic() - began
        console.print(f"{model}: held-out error {error.held_out:.1%} ({error.held_out_on}), {seconds:.0f} s; {path}")
        found[model] = {"held_out": error.held_out, "path": path}
    result(testbed=testbed.testbed, calibrations=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
