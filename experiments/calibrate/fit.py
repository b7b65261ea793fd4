"""Fits the cost model to the steps of a real engine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import nnls

from experiments.calibrate.published import fit_error, rounded_profile
from experiments.records.errors import SpecError
from experiments.records.record import Record
from experiments.simulator.calibration import Calibration, Floats, Ints, Jitter, Loop, Piece, Profile, ValidRange, attention_of
from experiments.simulator.cost_model import PAUSE_S, CostModel
from experiments.spec.spec import EngineSettings

COMPOSITION = ["prefill_pairs", "decode_tokens", "decode_context"]  # of a step, beside its tokens
MIN_STEPS = 60  # fewer cannot fix about ten coefficients and leave some to test them
MIN_PIECE = 3  # steps that fix a piece of the profile, those held out not counted
HELD_OUT = 4  # every fourth step of a size is held out
OUTLIER = 4.0  # scaled median absolute deviations beyond which a step is a tail, not jitter
BEYOND = 1.05  # how far past the most pairs and context seen the straight lines hold: a full last chunk has 0.3 % more
Chosen = npt.NDArray[np.bool_]


def sizes_of(tokens: Ints, prefill: Ints) -> Ints:
    """Which steps are alike: the power of 2 at or above their tokens, twice; one more if they only decode."""
    return np.asarray(2 * np.ceil(np.log2(tokens)).astype(np.int64) + (prefill == 0))


def _sized(steps: pd.DataFrame, source: str) -> pd.DataFrame:
    """The steps with their `tokens` and `size`, see sizes_of. Raises SpecError for too few, or none with prefill or decodes."""
    prefill, decodes = steps["prefill_tokens"].to_numpy(), steps["decode_tokens"].to_numpy()
    if len(steps) < MIN_STEPS or not (prefill.any() and decodes.any() and (steps["seconds"] > 0).all()):
        came = f"{len(steps)} steps, {np.sum(prefill > 0)} with prefill, {np.sum(decodes > 0)} with decodes"
        raise SpecError(f"fit_records: {source}: got {came}; allowed: at least {MIN_STEPS}, some of each, all longer than 0 s")
    return steps.assign(tokens=prefill + decodes, size=sizes_of(prefill + decodes, prefill))


def _held_out(size: pd.Series) -> Chosen:
    """Every fourth step of each size, at least one of each that has two steps or more, shape (steps,)."""
    alike = size.groupby(size)
    place, count = alike.cumcount().to_numpy(), alike.transform("size").to_numpy()
    return np.asarray((place % HELD_OUT == np.minimum(HELD_OUT, count) - 1) & (count > 1))


def _knots(tokens: Ints) -> Ints:
    """Where the profile bends: 1, the most tokens, and the powers of 2 between, but those that leave a piece without data."""
    most = int(tokens.max())
    knots = [1]
    for knot in [*(2 ** np.arange(1, most.bit_length())).tolist(), most]:
        if np.sum((tokens > knots[-1]) & (tokens <= knot)) >= MIN_PIECE:
            knots.append(int(knot))
    if knots[-1] != most:  # too few steps beyond the last bend: its piece goes on to them
        knots = [*(knots[:-1] if len(knots) > 1 else knots), most]
    return np.array(knots)


def fit_records(
    steps: pd.DataFrame, settings: EngineSettings, name: str, title: str, source: str, block_size: int
) -> Calibration:
    """Fit the cost model to the steps of a real engine: STEP_COLUMNS, one row per step, warm-up left out.

    The profile, rising from 0, has knots at powers of 2 between which there are steps. `masked_share` is 0: vLLM's kernels skip
    masked tiles. Every fourth step of each size is held out; jitter comes from the residuals of the others. Raises SpecError.
    """
    data = _sized(steps, source)
    seconds, size, tokens = (data[name].to_numpy() for name in ("seconds", "size", "tokens"))
    train, most = ~_held_out(data["size"]), data.max()
    knots = _knots(tokens[train])
    knots[-1] = most["tokens"]
    width = np.diff(knots)
    rise = np.clip(tokens[:, None] - knots[:-1], 0, width) / width  # how much of each piece's rise a step has climbed
    design = np.column_stack([np.ones(len(steps)), rise, data[COMPOSITION].to_numpy()])
    solution, off, usable = _solved(design, seconds, train, size)
    unit = attention_of(settings.model, settings.tensor_parallel, settings.dtype, 1.0, 0.0, 1.0)
    pair_s, context_s = np.maximum(solution[[-3, -1]], 1e-18).tolist()  # where the data show no cost, next to none is charged
    errors = seconds / (design @ solution) - 1
    decodes, farthest = int(most["decode_tokens"]), [int(BEYOND * most[name]) for name in ("prefill_pairs", "decode_context")]
    return Calibration(
        calibration=name,
        title=title,
        models=(settings.model,),
        tensor_parallel=settings.tensor_parallel,
        sources=(source,),
        overhead_s=float(solution[0]),
        linear=rounded_profile(knots, np.cumsum([0.0, *solution[1 : len(knots)]])),
        decode=Profile((0, decodes), (0.0, float(solution[-2] * decodes))),
        attention=replace(unit, flop_per_s=unit.flop_per_pair / pair_s, kv_bytes_per_s=unit.kv_bytes_per_token / context_s),
        jitter=_fitted_jitter(off[train], size[train] % 2 == 1),
        valid=ValidRange(int(most["tokens"]), decodes, *farthest),
        error=fit_error(list(errors[usable]), list(errors[~train]), f"every {HELD_OUT}th of {len(steps)} steps, of each size"),
        block_size=block_size,
        fixed_by=dict.fromkeys(("overhead_s", "linear", "decode", "attention", "jitter", "loop", "valid"), source),
        pieces=_pieces(data.assign(off=off, error=errors, train=train, usable=usable)),
    )


def _solved(design: Floats, seconds: Floats, train: Chosen, size: Ints) -> tuple[Floats, Floats, Chosen]:
    """Coefficients >= 0 by least squares on errors relative to the predicted time, of the steps in `train` but outliers.

    Relative to the measured time, as in the first of three rounds, the prediction would come out too short: by 2 sigma^2, 6 %
    at a sigma of 0.17. An outlier is far from the other steps of its size, not from the line: steps of a size that all disagree
    with the line bend it. With the coefficients, of each step: the log of its time over the predicted one, and whether it is in
    `train` and no outlier.
    """
    usable, weights = train, 1.0 / seconds
    for _ in range(3):
        weighted = design[usable] * weights[usable, None]
        scale = np.abs(weighted).max(axis=0)
        scale[scale == 0] = 1.0  # a column without data gets the coefficient 0
        solution: Floats = nnls(weighted / scale, seconds[usable] * weights[usable])[0] / scale
        predicted = design @ solution
        off, weights = np.log(seconds / predicted), 1.0 / predicted
        usable = train & ~_outliers(off, train, size)
    return solution, off, usable


def _outliers(off: Floats, train: Chosen, size: Ints) -> Chosen:
    """Which log residuals are far from the median of their size, by the spread of their size or of all, if that is larger."""

    def of_size(values: Floats) -> Floats:
        return np.asarray(pd.Series(values[train]).groupby(size[train]).median().reindex(size).fillna(0.0), dtype=np.float64)

    far = np.abs(off - of_size(off))
    return np.asarray(far >= OUTLIER * np.maximum(1.4826 * of_size(far), _median_spread(off[train])[1]))


def _pieces(data: pd.DataFrame) -> tuple[Piece, ...]:
    """What is known of the steps of each size, smallest first."""
    found = []
    for _, own in data.groupby("size"):
        out = own.loc[~own["train"], "error"].abs()
        found.append(
            Piece(
                tokens=(int(own["tokens"].min()), int(own["tokens"].max())),
                only_decodes=bool(own["size"].iloc[0] % 2),
                steps=len(own),
                dropped=int((own["train"] & ~own["usable"]).sum()),
                held_out=round(float(out.mean()), 4) if len(out) else None,
                known_to=round(1.25 * _median_spread(own["off"].to_numpy())[1] / len(own) ** 0.5, 4),
            )
        )
    return tuple(found)


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
    paused[place] = first - before[place] > PAUSE_S
    outside = np.delete(starts - before, place), (starts[place] - first) / count
    loop = Loop(*(float(np.median(parts)) if len(parts) else 0.0 for parts in outside))
    again = steps.groupby(steps["prefill_tokens"] + steps["decode_tokens"]).cumcount() > 0
    return steps[again & ~paused], steps[again & paused], loop


def with_loop(calibration: Calibration, paused: pd.DataFrame, loop: Loop) -> Calibration:
    """The calibration with what passes outside the steps; `wake_s` is the median excess of the first steps after a pause.

    An excess in seconds: on one machine it was 3 to 6 ms for steps of 10 as of 50 ms.
    """
    excess = paused["seconds"] - CostModel(calibration).seconds(paused)
    wake_s = max(0.0, float(excess.median())) if len(excess) else 0.0
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
