"""Claims and their verdicts: statistic -> sample over replicates -> rule -> PASS, FAIL or INCONCLUSIVE."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from analysis.judge.load import REFERENCE, Run, measurements, prefill_replicates, published_prefill
from analysis.judge.scope import Scope, not_ours, outside
from analysis.judge.stats import LEVELS, Array, Sample, holm, replicates_needed, sample
from experiments.spec.spec import STRICT, read_spec

Chunk = int | Literal["unchunked"]


@dataclass(frozen=True, config=STRICT)
class Statistic:
    """Which ratio a claim is about; see claims.yaml."""

    name: Literal["prefill_overhead", "prefill_monotone", "tbt_p99", "ttft_p50"]
    chunk_size: Chunk | None = None
    against: Chunk | None = None
    over: Literal["worst", "geomean"] = "geomean"
    qps: float | None = None

    @model_validator(mode="after")
    def _check(self) -> Statistic:
        ends, monotone = (self.chunk_size, self.against), self.name == "prefill_monotone"
        if any((end is None) != monotone for end in ends) or (self.qps is None) != self.name.startswith("prefill"):
            two = "prefill_overhead with chunk_size and against"
            raise ValueError(f"allowed: prefill_monotone alone; {two}; ttft_p50 or tbt_p99 with these and qps")
        return self

    def words(self) -> str:
        """The points that it compares."""
        sizes = f"chunk size {self.chunk_size} and {self.against}" if self.chunk_size else "two neighbouring chunk sizes"
        return f"{sizes} at {'prompts longer than both' if self.qps is None else f'QPS {self.qps:g}'}"


@dataclass(frozen=True, config=STRICT)
class Claim:
    """A statement of the paper, its source and the rule that decides it."""

    id: str
    figure: str
    model: str
    statement: str
    source: str
    rule: Literal["ordering", "bound", "equivalence"]
    statistic: Statistic
    reason: str
    scope: Scope
    bound: Annotated[float, Field(gt=0)] = 1.0
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.1


@dataclass(frozen=True, config=STRICT)
class _ClaimsFile:
    claims: Annotated[tuple[Claim, ...], Field(min_length=1)]


def load_claims() -> tuple[Claim, ...]:
    """The claims of artifacts/reference/claims.yaml. Raises SpecError."""
    return read_spec(REFERENCE / "claims.yaml", _ClaimsFile).claims


def _ratios(table: pd.DataFrame, statistic: Statistic) -> pd.Series:
    """table: seed and prompt length or QPS x chunk size -> seconds. The aggregated ratio by seed, NaN where a time is missing;
    empty if the statistic has no points in the table."""
    pairs = [(str(statistic.chunk_size), str(statistic.against))]
    if statistic.name == "prefill_monotone":
        pairs = list(pairwise(sorted(set(table.columns) - {"unchunked"}, key=float)))
    at, logs = table.index.get_level_values(1), list[pd.Series]()
    for over, under in pairs if {size for pair in pairs for size in pair} <= set(table.columns) else []:
        longest = max((float(size) for size in (over, under) if size != "unchunked"), default=0.0)
        rows = table[at > longest if statistic.qps is None else at == statistic.qps]
        with np.errstate(all="ignore"):
            logs.append(pd.Series(np.log(rows[over] / rows[under])))
    if not logs or any(own.empty for own in logs):
        return pd.Series(dtype=np.float64)
    how = "min" if statistic.name == "prefill_monotone" else {"worst": "max", "geomean": "mean"}[statistic.over]
    of_seed = pd.concat(logs).replace([-np.inf, np.inf], np.nan).groupby(level=0)
    return pd.Series(np.exp(of_seed.agg(lambda own: getattr(own, how)(skipna=False))))


def ratios(run: Run, claim: Claim) -> pd.Series:
    """The claim's ratio by seed, one per replicate, NaN where a point is missing; empty if no replicate has its points."""
    serving, times = run.kind == "serving", measurements(run)
    if times.empty or serving != (claim.statistic.qps is not None):
        return pd.Series(dtype=np.float64)
    at, value = ("qps", claim.statistic.name) if serving else ("prompt_length", "seconds")
    times = times[~times["repeat"]] if serving else prefill_replicates(times)
    times = times[times["model"] == claim.model]
    table = times.groupby(["seed", at, "chunk_size"])[value].median(skipna=False).unstack()
    seeds = sorted({trial.facts["seed"] for trial in run.trials if trial.facts["model"] == claim.model})
    places = pd.MultiIndex.from_product([seeds, table.index.unique(at)])  # a replicate without one of them lacks a point
    return _ratios(table.reindex(places), claim.statistic)


def observe(run: Run, claim: Claim, broken: str = "") -> Sample | tuple[str, str]:
    """What the claim's rule is put to; or, where it must not be, verdict and reason. broken: gates that do not hold."""
    if reason := outside(run, claim.model, claim.scope):
        return "NOT-APPLICABLE", reason
    if claim.model not in run.models:
        return "NOT-RUN", f"{claim.model} was not run on {run.testbed}"
    if reason := broken or (not_ours(run) if claim.scope.ours else ""):
        return "INCONCLUSIVE", reason
    quantity = "prefill" if claim.statistic.qps is None else claim.statistic.name
    if (error := run.model_error(claim.model, quantity)) is None:
        unknown = "a calibration that is none of this artifact's, of unknown error"
        return "INCONCLUSIVE", f"{claim.model} was simulated with {unknown}"
    found, points = ratios(run, claim), claim.statistic.words()
    if found.empty:
        return "NOT-RUN", f"{run.figure} as it was run has no {points}"
    if missing := [str(seed) for seed in found.index[found.isna()]]:
        return "INCONCLUSIVE", f"seeds without a time for some of {points}: {', '.join(missing)}"
    if claim.rule == "equivalence" and published_ratio(claim) is None:
        return "INCONCLUSIVE", f"nothing is published of {points} for {claim.model}"
    return sample(found.tolist(), error)


@cache
def published_ratio(claim: Claim) -> float | None:
    """The claim's ratio in the published data; None where nothing is published."""
    if claim.figure != "fig9a" or claim.model != "yi-34b-200k":
        return None
    table = published_prefill().assign(seed=0).pivot(index=["seed", "prompt_length"], columns="chunk_size", values="prefill_ms")
    found = _ratios(table, claim.statistic)
    return None if found.empty else float(found.iloc[0])


def limits(claim: Claim) -> tuple[float, float]:
    """The ratios between which the claim holds. Raises ValueError for an equivalence without published data."""
    if claim.rule == "ordering":
        return 1.0, math.inf
    if claim.rule == "bound":
        return 0.0, claim.bound
    if (center := published_ratio(claim)) is None:
        raise ValueError(f"{claim.id}: equivalence needs published data")
    return center / (1 + claim.margin), center * (1 + claim.margin)


def claimed(claim: Claim) -> str:
    """What the claim says of its ratio."""
    if claim.rule == "equivalence":
        return f"published {published_ratio(claim):.3f}, margin {claim.margin:.0%}"
    return "claimed above 1" if claim.rule == "ordering" else f"claimed at most {claim.bound:g}"


def published_verdict(claim: Claim) -> dict[str, Any]:
    """The published run put through the claim: one run without variance, so 'agrees' or 'contradicts', never PASS."""
    if (ratio := published_ratio(claim)) is None:
        return {"verdict": "not published", "value": None, "detail": "no data published"}
    low, high = limits(claim)
    verdict = "agrees" if low < ratio <= high else "contradicts"
    said = f"{ratio:.3f} is the reference itself" if claim.rule == "equivalence" else f"{ratio:.3f}; {claimed(claim)}"
    return {"verdict": verdict, "value": ratio, "detail": said}


def p_values(claim: Claim, seen: Sample) -> tuple[Array, Array]:
    """One-sided p values of (the claim holds, the claim fails).

    To hold, the ratio is above one limit and below the other: of an equivalence two one-sided tests. To fail it is outside
    either; of an equivalence these are two tests, so the smaller p value is doubled.
    """
    (low, high), tests = limits(claim), 2 if claim.rule == "equivalence" else 1
    fails = np.minimum(1.0, tests * np.minimum(seen.p_below(low), seen.p_above(high)))
    return np.maximum(seen.p_above(low), seen.p_below(high)), fails


class Decision(NamedTuple):
    """What the rule says, arrays of (..., claims): p values of holding and failing, Holm-adjusted, and the verdict."""

    p_pass: Array
    p_fail: Array
    p_pass_adjusted: Array
    p_fail_adjusted: Array
    verdict: npt.NDArray[np.str_]
    needed: npt.NDArray[np.int64]  # replicates in all that would settle an INCONCLUSIVE at a last look, 0: not by repetition


def rule(claims: Sequence[Claim], samples: Sequence[Sample], first: npt.NDArray[np.str_] | None = None) -> Decision:
    """The rule: t tests, Holm-adjusted over the claims of a figure, at the level of the look. The one that judges every run.

    first: the verdicts of a first look, (..., claims), if replicates were added after it. What it settled stays settled, as its
    level is spent; Holm counts the others alone (Maurer and Bretz, Statistics in Biopharmaceutical Research 5, 2013).
    """
    pairs = [p_values(claim, seen) for claim, seen in zip(claims, samples, strict=True)]
    p_pass, p_fail = (np.stack([pair[side] for pair in pairs], axis=-1) for side in (0, 1))
    level, before = (LEVELS[0], np.full(p_pass.shape, "INCONCLUSIVE")) if first is None else (LEVELS[1], first)
    holds, fails = (holm(np.where(before == kept, 0.0, p)) for kept, p in (("PASS", p_pass), ("FAIL", p_fail)))
    new = np.select([holds <= level, fails <= level], ["PASS", "FAIL"], "INCONCLUSIVE")
    verdict = np.where(before == "INCONCLUSIVE", new, before)
    needed = _needed(claims, samples, (verdict == "INCONCLUSIVE") & (first is None))  # a second look is the last
    return Decision(p_pass, p_fail, holds, fails, verdict, needed)


def _needed(claims: Sequence[Claim], samples: Sequence[Sample], unsettled: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Holm tests the claims that are still unsettled at the level divided by their number."""
    left = unsettled.sum(axis=-1)
    needed = np.zeros(unsettled.shape, dtype=np.int64)
    for number, (claim, seen) in enumerate(zip(claims, samples, strict=True)):
        if seen.systematic:
            continue  # the error of a simulation: no replicate lessens it
        distance = np.min([np.abs(seen.mean - math.log(limit)) for limit in limits(claim) if limit], axis=0)
        for count in range(1, len(claims) + 1):
            here = unsettled[..., number] & (left == count)
            if here.any():
                needed[..., number] += here * replicates_needed(seen, distance, LEVELS[-1] / count)
    return needed


def judge(claims: Sequence[Claim], samples: Sequence[Sample], first: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Verdicts of the claims of one figure on one run, with every number behind them. first: see rule."""
    found = rule(claims, samples, None if first is None else np.array(first))
    looks = 1 if first is None else 2
    results = []
    for number, (claim, seen) in enumerate(zip(claims, samples, strict=True)):
        low, high = map(float, seen.interval())
        numbers = {
            **{name: float(values[number]) for name, values in found._asdict().items() if name.startswith("p_")},
            "ratio": float(seen.ratio),
            "low": low,
            "high": None if math.isinf(high) else high,
            "replicates": seen.n,
            "ratios": np.exp(seen.logs).tolist(),
            "level": LEVELS[looks - 1],
            "looks": looks,
            "replicates_needed": int(found.needed[number]) or None,
        }
        verdict = str(found.verdict[number])
        reason = _reason(claim, verdict, numbers, seen.systematic > 0)
        results.append({"verdict": verdict, "reason": reason, "numbers": numbers})
    return results


def _reason(claim: Claim, verdict: str, numbers: Mapping[str, Any], simulated: bool) -> str:
    against = f" to {claim.statistic.against}" if claim.statistic.against else ""
    sizes = claim.statistic.chunk_size
    name = f"ratio {sizes}{against}" if sizes else "the smallest ratio of neighbouring chunk sizes"
    high = "unknown" if numbers["high"] is None else f"{numbers['high']:.3f}"
    what = f"{name} is {numbers['ratio']:.3f} (95 % interval {numbers['low']:.3f} to {high}, n = {numbers['replicates']})"
    if needed := numbers["replicates_needed"]:
        advice = f"about {needed} replicates in all would settle it"
    elif simulated and numbers["replicates"] > 1:
        advice = "no replicate lessens the simulator's error: only a run on the real machine settles it"
    else:
        advice = "repetition alone will hardly settle it" if numbers["looks"] == 1 else "this was the last look"
    return f"{what}; {claimed(claim)}" + (f"; {advice}" if verdict == "INCONCLUSIVE" else "")
