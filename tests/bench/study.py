"""`make verify-study`: the decision rule tested as an instrument, on synthetic experiments whose truth is known.

Every experiment goes through claims.rule, which judges the real runs. The table of docs/verdicts.md is written by this.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.judge.claims import Claim, load_claims, published_ratio, rule
from analysis.judge.stats import LEVELS, MOST_REPLICATES, Array, Sample, holm, replicates_needed
from experiments.records.provenance import ROOT
from experiments.records.store import write_whole
from experiments.records.terminal import arguments, command, console, parse, result, written

DOCS = ROOT / "docs" / "verdicts.md"
BEGIN, END = "<!-- make verify-study writes what follows -->\n", "<!-- make verify-study wrote what precedes -->\n"
EXPERIMENTS = 10_000
REPLICATES = (3, 4, 5, 6, 8, 10)
NOISE = (0.01, 0.05, 0.1, 0.2)  # standard deviation of the paired log ratio
DRIFT, POSITIONS = 0.2, 8  # a session ends a fifth slower than it began; trials in it, in random order
OUTAGE, SLOWED = 0.1, 2.0  # chance that a neighbour slows one of a replicate's two settings, and how much
LIMITS = {"ordering": 0.025, "bound": 0.025, "equivalence": 0.05}
POWER = 0.9  # wanted of one claim at a 10 % effect, 5 % noise, 6 replicates
EFFECTS = {  # true ratio over the ratio at which the claim turns false; 0 stands for the center of an equivalence
    "ordering": {"5 % the other way": 1 / 1.05, "none": 1.0, "5 %": 1.05, "10 %": 1.1, "25 %": 1.25},
    "bound": {"within by 20 %": 0.8, "at the bound": 1.0, "beyond by 5 %": 1.05, "beyond by 25 %": 1.25},
    "equivalence": {"none": 0.0, "at the margin": 1.0, "beyond by 5 %": 1.05, "beyond by 25 %": 1.25},
}


SHOWN = ("5 %", "10 %", "25 %")  # effects of orderings, in the tables


def noise(law: str, sigma: float, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Error of the log ratio of two settings of a session, by law; both settings meet the same machine, so it is symmetric.

    drift: the machine slows steadily, trials run in random order, backwards in every second session, as expand.py has them.
    outages: one setting, either one, is slowed now and then.
    """
    error = sigma * rng.standard_normal(shape)
    if law == "heavy tails":  # t with 3 degrees of freedom, scaled to the same standard deviation
        error = sigma / math.sqrt(3) * rng.standard_t(3, shape)
    elif law.startswith("drift, "):
        first = rng.integers(0, POSITIONS, shape)
        apart = (first + rng.integers(1, POSITIONS, shape)) % POSITIONS - first
        if law == "drift, order mirrored":
            apart[..., 1::2] = -apart[..., 0::2]
        elif law == "drift, order fixed":
            apart = np.ones_like(apart)
        error += math.log1p(DRIFT) * apart / (POSITIONS - 1)
    elif law.startswith("outages"):
        hit = rng.random(shape) < OUTAGE
        which = rng.choice([-1.0, 1.0], shape) if law == "outages" else 1.0
        error += math.log(SLOWED) * (hit * which)
    return np.asarray(error)


LAWS = ("normal", "heavy tails", "drift, order mirrored", "outages")
UNPROTECTED = ("drift, order drawn afresh", "drift, order fixed", "outages of one setting")


@dataclass(frozen=True)
class Experiment:
    """A family of claims that share a truth: the claims, the true ratio of each, the verdict that is right of each."""

    name: str
    effect: str
    claims: tuple[Claim, ...]
    ratios: tuple[float, ...]
    right: tuple[str, ...]  # PASS, FAIL, or neither: ''


def experiments() -> Iterator[Experiment]:
    """The experiments of one claim, then families of eight as Figure 9b has them; real claims of claims.yaml."""
    by_id = {claim.id: claim for claim in load_claims()}
    for claim in (by_id["C3"], by_id["C5"], by_id["C6"]):
        turn = {"ordering": 1.0, "bound": claim.bound}.get(claim.rule) or (published_ratio(claim) or 1.0) * (1 + claim.margin)
        for effect, factor in EFFECTS[claim.rule].items():
            holds = factor > 1 if claim.rule == "ordering" else factor < 1
            ratio = turn * (factor or 1 / (1 + claim.margin))
            yield Experiment(claim.rule, effect, (claim,), (ratio,), ("" if factor == 1.0 else "PASS" if holds else "FAIL",))
    eight = tuple(claim for claim in by_id.values() if claim.figure == "fig9b")
    for real, ratio in ((0, 1.25), (4, 1.25), (8, 1.1)):
        rest = len(eight) - real
        truth = (ratio,) * real + (1.0,) * rest, ("PASS",) * real + ("",) * rest
        effect = f"{100 * (ratio - 1):.0f} % in {real}" + (f", none in {rest}" if rest else "")
        yield Experiment(f"{len(eight)} orderings", effect, eight, *truth)


def cells(count: int, seed: int, laws: Sequence[str] = LAWS, rules: Sequence[str] = ()) -> pd.DataFrame:
    """One row per cell and number of looks: rates of wrong PASS, wrong FAIL and of the right verdict, over `count` experiments.

    rules: names of experiments, all if empty.
    A second look is taken by whoever finds a first one INCONCLUSIVE: at the replicates that it advises, at twice as many if it
    advises none. advised, settled: the median advice, and how often a second look that followed advice gave the right verdict.
    taken_back: of second looks after a PASS of any claim, how many would take one back if they judged every claim anew.
    """
    rows = []
    for number, (law, sigma, n) in enumerate(itertools.product(laws, NOISE, REPLICATES)):
        rng = np.random.Generator(np.random.PCG64([seed, number]))
        for experiment in (e for e in experiments() if not rules or e.name in rules):
            errors = noise(law, sigma, (len(experiment.claims), count, MOST_REPLICATES), rng)
            key = {"rule": experiment.name, "effect": experiment.effect, "law": law, "noise": sigma, "replicates": n}
            rows += [key | found for found in _looks(experiment, errors, n)]
    return pd.DataFrame(rows)


def _looks(experiment: Experiment, errors: Array, n: int) -> Iterator[dict[str, float]]:
    def seen(which: slice | npt.NDArray[np.bool_], total: int) -> list[Sample]:
        return [Sample(math.log(ratio) + error[which, :total]) for ratio, error in zip(experiment.ratios, errors, strict=True)]

    first = rule(experiment.claims, seen(slice(None), n))
    yield {"looks": 1, **_rates(experiment, first.verdict)}
    verdict, unsettled = first.verdict.copy(), (first.verdict == "INCONCLUSIVE").any(axis=-1)
    passed, anew = first.verdict == "PASS", first.verdict == "PASS"
    advice = first.needed.max(axis=-1)
    wanted = np.where(advice > 0, advice, min(2 * n, MOST_REPLICATES))
    for total in np.unique(wanted[unsettled]):
        here = unsettled & (wanted == total)
        second = rule(experiment.claims, seen(here, total), first.verdict[here])
        verdict[here], anew[here] = second.verdict, holm(second.p_pass) <= LEVELS[-1]
    followed = unsettled & passed.any(axis=-1)
    back = float((passed & ~anew)[followed].any(axis=-1).mean()) if followed.sum() > 100 else math.nan
    advised = unsettled & (advice > 0)
    settled = verdict[advised][:, 0] == experiment.right[0]
    extra = {"advised": float(np.median(advice[advised])), "settled": float(settled.mean())} if advised.sum() > 100 else {}
    yield {
        "looks": 2,
        **_rates(experiment, verdict, first.verdict),
        **extra,
        "follow": float(advised.mean()),
        "taken_back": back,
    }


def _rates(experiment: Experiment, *looks: npt.NDArray[np.str_]) -> dict[str, float]:
    """Rates over experiments. Wrong is a wrong verdict of any claim at any look: whoever likes it may stop there."""
    right = np.array(experiment.right)
    wrong = {v: np.any([((look == v) & (right != v)).any(axis=-1) for look in looks], axis=0) for v in ("PASS", "FAIL")}
    power = (looks[0] == right)[:, right != ""]
    rates = {f"wrong_{verdict.lower()}": float(found.mean()) for verdict, found in wrong.items()}
    return rates | {"power": float(power.all(axis=-1).mean()) if power.size else math.nan}


def limit(rule_name: str, count: int) -> float:
    """The most that a rate of wrong verdicts may be: the nominal rate and three standard errors of the simulation."""
    rate = LIMITS.get(rule_name, 0.025)
    return rate + 3 * math.sqrt(rate * (1 - rate) / count)


def broken(table: pd.DataFrame, count: int) -> list[str]:
    """What the rule does not keep, in sentences; empty if it keeps everything."""
    found = []
    for row, what in itertools.product(table.to_dict("records"), ("wrong_pass", "wrong_fail")):
        most = limit(row["rule"], count)
        if row[what] > most:
            cell = ", ".join(f"{key} {row[key]}" for key in ("rule", "effect", "law", "noise", "replicates", "looks"))
            found.append(f"{what.replace('_', ' ')} {row[what]:.2%}, limit {most:.2%}: {cell}")
    if (power := required_power(table)) < POWER:
        found.append(f"power {power:.1%} at a 10 % effect, 5 % noise, 6 replicates; wanted {POWER:.0%}")
    return found


def required_power(table: pd.DataFrame) -> float:
    """Power of one claim at a 10 % effect with 5 % noise and 6 replicates at a first look."""
    cell = table.query("rule == 'ordering' and effect == '10 %' and law == 'normal' and looks == 1")
    return float(cell.query("noise == 0.05 and replicates == 6")["power"].iloc[0])


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [
        f"| {' | '.join(headings)} |",
        f"|{' --- |' * len(headings)}",
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _errors(table: pd.DataFrame, count: int) -> str:
    rows = []
    for (name, law, looks), group in table.groupby(["rule", "law", "looks"], sort=False):
        worst = [f"{group[what].max():.2%}" for what in ("wrong_pass", "wrong_fail")]
        rows.append((name, law, looks, len(group), *worst, f"{limit(str(name), count):.2%}"))
    return _markdown(("rule", "noise", "looks", "cells", "worst wrong PASS", "worst wrong FAIL", "limit"), rows)


def _power(table: pd.DataFrame) -> str:
    rows = []
    chosen = table[(table["rule"] == "ordering") & (table["law"] == "normal")]
    for effect, sigma in itertools.product(SHOWN, NOISE):
        cell = chosen[(chosen["effect"] == effect) & (chosen["noise"] == sigma)].set_index(["replicates", "looks"])["power"]
        rows.append((effect, f"{sigma:.0%}", *(f"{cell[n, 1]:.0%} / {cell[n, 2]:.0%}" for n in REPLICATES)))
    return _markdown(("effect", "noise", *(f"{n} replicates" for n in REPLICATES)), rows)


def _advice(table: pd.DataFrame) -> str:
    rows = []
    two = table.query("looks == 2 and law == 'normal' and rule == 'ordering' and replicates == 5")
    for row in two[two["effect"].isin(SHOWN) & two["advised"].notna()].to_dict("records"):
        logs = math.log(EFFECTS["ordering"][row["effect"]]) + row["noise"] * np.array([-1.0, 0.0, 1.0])
        takes = int(replicates_needed(Sample(logs), np.array(logs.mean()), LEVELS[-1])) or f"over {MOST_REPLICATES}"
        shares = (f"{row['follow']:.0%}", f"{row['advised']:.0f}", takes, f"{row['settled']:.0%}")
        rows.append((row["effect"], f"{row['noise']:.0%}", *shares))
    headings = ("effect", "noise", "INCONCLUSIVE with advice", "median advice", "what 80 % power takes", "then settled rightly")
    return _markdown(headings, rows)


def _taken_back(table: pd.DataFrame) -> str:
    rows = []
    two = table[table["rule"].str.contains(" orderings") & (table["law"] == "normal") & (table["looks"] == 2)]
    for (effect, sigma), group in two[two["power"].notna()].groupby(["effect", "noise"]):
        cell = group.set_index("replicates")["taken_back"]
        rows.append((effect, f"{sigma:.0%}", *("-" if math.isnan(cell[n]) else f"{cell[n]:.0%}" for n in REPLICATES)))
    return _markdown(("effect", "noise", *(f"{n} replicates" for n in REPLICATES)), rows)


def _unprotected(table: pd.DataFrame) -> str:
    groups = table[table["rule"] == "ordering"].groupby(["law", "looks"], sort=False)[["wrong_pass", "wrong_fail"]].max()
    rows = [(*key, *(f"{worst:.1%}" for worst in row)) for key, row in zip(groups.index, groups.to_numpy(), strict=True)]
    return _markdown(("noise", "looks", "worst wrong PASS", "worst wrong FAIL"), rows)


def describe(table: pd.DataFrame, unprotected: pd.DataFrame, count: int, seed: int) -> str:
    """The tables as Markdown."""
    parts = (
        f"{count:,} synthetic experiments in each of {len(table):,} cells, seed {seed}.\n",
        "Wrong verdicts, worst over effects, noise of 1 to 20 % and 3 to 10 replicates:\n",
        _errors(table, count),
        "Power of one ordering, first look / with a second, normal noise:\n",
        _power(table),
        f"At 10 %, 5 % and 6 replicates, first look: {required_power(table):.1%}; at least {POWER:.0%} is wanted.\n",
        'The advice "about N replicates would settle it" of a first look at 5 replicates, and what following it gave:\n',
        _advice(table),
        "What the rule avoids: second looks at eight orderings that would take back a PASS of the first if they judged anew:\n",
        _taken_back(table),
        "What no test over replicates protects from, orderings; these are outside the limits:\n",
        _unprotected(unprotected),
    )
    return "\n".join(parts)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0 if every cell keeps its limit and the power is as wanted, else 1."""
    parser = arguments("tests.bench.study", __doc__)
    parser.add_argument("--experiments", type=int, default=EXPERIMENTS, help="of each cell")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--docs", type=Path, default=DOCS, help="Markdown file whose tables are renewed")
    parser.add_argument("--csv", type=Path, help="write every cell here")
    options = parse(parser, argv)
    count, seed = options.experiments, options.seed
    table = cells(count, seed)
    text = describe(table, cells(count, seed, UNPROTECTED, ["ordering"]), count, seed)
    console.print(text)
    before, _, rest = options.docs.read_text().partition(BEGIN)
    write_whole(options.docs, f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
    if options.csv:
        write_whole(options.csv, table.to_csv(index=False))
    failures = broken(table, count)
    console.print("\n".join(failures) or "every cell keeps its limit")
    console.print(f"tables written to {written(options.docs)}")
    result(broken=failures, docs=options.docs, experiments=count, seed=seed)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
