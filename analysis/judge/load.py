"""Sealed runs -> tidy tables. Complete bags only; unlike runs are never mixed, and the error names what differs."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.judge.integrity import tagmanifest_digest
from analysis.judge.known import calibration_of, error_of
from analysis.judge.trial import TrialRecord, load_trial
from experiments.cluster.plan import identity_of
from experiments.records.documents import FACTS, PLAN, read_document
from experiments.records.errors import SpecError
from experiments.records.provenance import ROOT, short
from experiments.spec.expand import REPEAT
from experiments.spec.spec import FIGURES, TESTBEDS, load_testbed, path_of

REFERENCE = ROOT / "artifacts" / "reference"
AT = {"prefill": ("prompt_length", "prompt_tokens", "budget"), "serving": ("qps", "rate", "budget")}  # where a point lies
MOST_FACTS = 32 * 2**20  # bytes of trial.json in a run, which stay in memory
WAYS = ("engine.cudagraph_mode", "engine.attention_backend", "engine.model_runner")  # not told by older bags
ENGINE = ("engine.engine", "engine.vllm", "engine.torch", "engine.dtype", "engine.threads", *WAYS)
MUST_MATCH = (*ENGINE, "machine.type", "machine.image")


@dataclass(frozen=True)
class Run:
    """One figure on one testbed: the bags that were joined, their plan, all their trials."""

    figure: str
    testbed: str
    bags: tuple[Path, ...]
    plan: dict[str, Any]
    trials: tuple[TrialRecord, ...] = field(repr=False)
    aside: tuple[str, ...] = ()  # other bags of the same figure and testbed, set aside, and why
    earlier: Run | None = None  # what a first look saw, its bag alone, where replicates were added after it

    @property
    def title(self) -> str:
        """How tables and pictures are labelled; a simulated run names its calibrations and their held-out errors."""
        scale = f"scale 1:{self.plan['scale']}" if self.plan["scale"] > 1 else "the paper's scale"
        trace = f"; trace {self.trace['name']}" if self.trace else ""
        cards = {str(trial.facts["engine"].get("device")) for trial in self.trials if self.plan["platform"] == "cuda"}
        on = "".join(f"; {card}" for card in sorted(cards))  # a testbed's title may name another GPU
        where = f"{self.figure} on testbed {self.testbed} ({self.plan['testbed_title']}{on}; {scale}{trace})"
        used = ((trial.facts["engine"].get("calibration"), self.calibration(trial)) for trial in self.trials if trial.simulated)
        errors = {(name, f"held-out error {error_of(own, 'step'):.1%}" if own else "of unknown error") for name, own in used}
        told = "; ".join(sorted(f"{name}, {error}" for name, error in errors))
        return f"SIMULATED ({told}) {where}" if self.simulated else where

    @property
    def simulated(self) -> bool:
        """Whether any of the run was simulated; every table and picture of it says so."""
        return self.plan["platform"] == "simulated" or any(trial.simulated for trial in self.trials)

    def calibration(self, trial: TrialRecord) -> dict[str, Any] | None:
        """What a simulated trial was timed by; None if it is not one of ours, past or present."""
        return calibration_of(trial.facts["engine"], self.plan["identity"])

    def model_error(self, model: str, quantity: str) -> float | None:
        """Relative error of a quantity of a model, as we know it of its calibrations: 0 where it was measured, None where it
        was simulated with a calibration that is not ours."""
        used = [self.calibration(trial) for trial in self.trials if trial.simulated and trial.facts["model"] == model]
        errors = [error_of(known, quantity) for known in used if known]
        return max(errors, default=0.0) if len(errors) == len(used) else None

    @property
    def kind(self) -> str:
        """prefill (Figure 9a) or serving (Figure 9b)."""
        return str(self.trials[0].facts["kind"])

    @property
    def trace(self) -> dict[str, Any] | None:
        """Name, kind and sha256 of the request lengths of a serving run; None for prefill runs."""
        return next((t.facts["trace"] for t in self.trials if t.facts.get("trace")), None)

    @property
    def replicates(self) -> int:
        """Independent repetitions per model: different seeds, each in its own session."""
        return min(len({t.facts["seed"] for t in self.trials if t.facts["model"] == model}) for model in self.models)

    @property
    def models(self) -> list[str]:
        """Models in the order of the plan."""
        return list(dict.fromkeys(t.facts["model"] for t in self.trials))


def find_runs(folder: Path) -> dict[str, list[Path]]:
    """Run directory name -> its bags, in order of name."""
    found: dict[str, list[Path]] = {}
    for bag in sorted(folder.glob("*/bag-*/")):
        found.setdefault(bag.parent.name, []).append(bag)
    return found


def stated(bags: list[Path], key: str) -> str | None:
    """The figure or testbed that a run's plan names, else one of its trials; if nothing of it can be read, that of our own
    figures and testbeds by which its folder is called as a whole; None if it is called otherwise."""
    for path in [file for bag in bags for file in (bag / "data/plan.json", *bag.glob("data/trials/*/*/trial.json"))]:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            return str(json.loads(path.read_bytes())[key])
    ours = product(*([path.stem for path in folder.glob("*.yaml")] for folder in (FIGURES, TESTBEDS)))
    named = {f"{figure}-{testbed}": {"figure": figure, "testbed": testbed} for figure, testbed in ours}
    return named.get(bags[0].parent.name, {}).get(key)


def unfinished(folder: Path) -> list[str]:
    """Folders of trials that are in no bag, as sentences: what each is, and the command that resumes it, if one does."""
    found = {path.parents[3]: path for path in sorted(folder.glob("*/open-*/trials/*/*/trial.json"))}
    return [f"{path.parent.name}: incomplete; {_resumed(path.name, trial)}" for path, trial in sorted(found.items())]


def _resumed(name: str, trial: Path) -> str:
    """What becomes of an open folder of that name, by what one of its trials says."""
    try:
        facts = read_document(trial, FACTS)
    except SpecError:  # a half copied one
        return "the command that began it resumes it"
    try:
        figure, testbed = facts["figure"], load_testbed(facts["testbed"])
        trace = (facts.get("trace") or {}).get("sha256")
        now = short(identity_of(path_of(figure, FIGURES), path_of(testbed.testbed, TESTBEDS), testbed, trace))
    except (SpecError, OSError):
        return f"{name} is of a figure or testbed that is not of this tree"
    if name == f"open-{now}":
        return f"make {figure} TESTBED={testbed.testbed} resumes it"
    return f"{name} is of other code, figure, testbed or inputs than these, so nothing here resumes it; make clean removes it"


def _ended(bag: Path) -> str:
    """When the last trial of a bag ended, as its records say: a copy's files are as new as the copy."""
    documents = bag.glob("data/trials/*/*/trial.json")
    return max((read_document(path, FACTS, f"{bag.name}: {path.name}")["ended"] for path in documents), default="")


def load_run(bags: list[Path]) -> Run:
    """Join bags of one figure and testbed, in the order of their trials' times. Of several identities the newest is taken, and
    a bag is taken once, however often it was copied; the others are named.

    Raises SpecError if there is no bag, for what is no record of ours, and if trials were made under conditions that must not
    be mixed.
    """
    if not bags:
        raise SpecError("no finished run here; make fig9a makes one")
    plans = {bag: read_document(bag / "data" / "plan.json", PLAN, f"{bag.name}: plan.json") for bag in bags}
    ended = {bag: _ended(bag) for bag in bags} if len(bags) > 1 else {}
    newest = max(bags, key=lambda bag: (ended[bag], bag.stat().st_mtime_ns, bag.name)) if ended else bags[0]
    identity, aside, seals = plans[newest]["identity"], list[str](), dict[str, Path]()  # seals: alike only in copies
    for bag in sorted(bags, key=lambda bag: (ended.get(bag, ""), bag.name)):
        if unlike := [key for key, value in identity.items() if plans[bag]["identity"].get(key) != value]:
            aside.append(f"{bag.name} differs in {', '.join(unlike)}")
        elif (first := seals.setdefault(tagmanifest_digest(bag) or bag.name, bag)) != bag:
            aside.append(f"{bag.name} is a copy of {first.name}")
    chosen = list(seals.values())
    paths = {bag: sorted(bag.glob("data/trials/*/*")) for bag in chosen}
    size = sum(file.stat().st_size for own in paths.values() for path in own if (file := path / "trial.json").is_file())
    if not any(paths.values()) or size > MOST_FACTS:
        came = f"{sum(map(len, paths.values()))} trials, {size} bytes of trial.json"
        raise SpecError(f"{chosen[-1].name}: {came}; allowed: at least one trial, at most {MOST_FACTS} bytes")
    by_bag = [tuple(load_trial(path, plans[bag]) for path in own) for bag, own in paths.items()]
    trials, plan = tuple(trial for own in by_bag for trial in own), plans[chosen[-1]]
    run = Run(plan["figure"], plan["testbed"], tuple(chosen), plan, trials, tuple(aside))
    if len(chosen) == 1:
        return run
    return replace(run, earlier=replace(run, bags=run.bags[:1], plan=plans[chosen[0]], trials=by_bag[0], aside=()))


def differing(run: Run) -> list[str]:
    """Conditions in which a model's trials differ although they must not, as 'model: key: value, value'."""
    found = []
    for model, key in product(run.models, MUST_MATCH):
        section, name = key.split(".")
        values = {str(trial.facts[section].get(name)) for trial in run.trials if trial.facts["model"] == model}
        if len(values) > 1:
            found.append(f"{model}: {key}: {', '.join(sorted(values))}")
    return found


def chunk_label(chunk_size: float | None) -> str:
    """A chunk size in the paper's units as text; None or NaN is unchunked."""
    return "unchunked" if chunk_size is None or pd.isna(chunk_size) else str(int(chunk_size))


def chunk_order(chunk_size: str) -> float:
    """By which chunk sizes as text are sorted: their number, unchunked last."""
    return float(chunk_size.replace("unchunked", "inf"))


def by_chunk_size(table: pd.DataFrame, *before: str) -> pd.DataFrame:
    """Rows in the order of these columns, then of chunk_size (text)."""
    numbers = table["chunk_size"].map(chunk_order)
    return table.assign(order=numbers).sort_values([*before, "order"], ignore_index=True).drop(columns="order")


def measurements(run: Run) -> pd.DataFrame:
    """One row for each time that a point of the figure was measured; what measured the saturation is left out.

    Columns: model, in_paper, seed, trial, repeat, truncated (by the time limit), budget (tokens), chunk_size (text). Of 9a also
    prompt_length, prompt_tokens, seconds; of 9b qps (the paper's), rate (requests/s) and metrics.serving_metrics, in a
    truncated trial of the requests that were served.
    """
    rows = []
    for trial in run.trials:
        own = {key: trial.facts[key] for key in ("model", "in_paper", "seed", "trial")}
        own |= {"repeat": trial.repeat, "truncated": trial.record.truncated}
        for phase, role in enumerate(trial.facts["phases"]):
            if role["role"] == "point":
                at = {key: role[key] for key in AT[run.kind]} | {"chunk_size": chunk_label(role["chunk_size"])}
                rows.append(own | at | trial.seen.metrics.get(phase, {}))
    return pd.DataFrame(rows)


def repeat_ratios(run: Run) -> pd.Series:
    """How a session's first trial and its repetition at the end compare: time again / time before, one per point and session.

    Time: of the prefill in 9a, the median gap between tokens in 9b.
    """
    at, value = ("qps", "tbt_p50") if run.kind == "serving" else ("prompt_length", "seconds")
    times, keys = measurements(run), ["model", "seed", at, "chunk_size"]
    again = times[times["repeat"]]
    first = times.assign(trial=times["trial"] + REPEAT).merge(again, on=[*keys, "trial"], suffixes=("", "_again"))
    return first[f"{value}_again"] / first[value]


def _relative(table: pd.DataFrame, keys: list[str], value: str) -> pd.DataFrame:
    """The table with `relative`: the value over that of the unchunked row with the same keys."""
    whole = table[table["chunk_size"] == "unchunked"].set_index(keys)[value].rename("whole")
    return table.assign(relative=table[value] / table.join(whole, on=keys)["whole"])


def prefill_replicates(times: pd.DataFrame) -> pd.DataFrame:
    """Measurements of 9a -> one row per model, seed and point. `seconds`: the median over the session's passes, repeats left
    out, NaN if one of them lacks the point. `relative`: to the same session's unchunked prefill of the same length.
    """
    keys = ["model", "in_paper", "seed", "prompt_length"]
    passes = times[~times["repeat"]].groupby([*keys, "chunk_size", "trial"], sort=False)["seconds"].max().unstack("trial")
    return _relative(passes.median(axis=1, skipna=False).rename("seconds").reset_index(), keys, "seconds")


def published_prefill() -> pd.DataFrame:
    """Figure 9a as published: prompt_length, chunk_size (text), prefill_ms, relative (to unchunked)."""
    table = pd.read_csv(REFERENCE / "fig9a.csv", comment="#", dtype={"chunk_size": str})
    return _relative(table, ["prompt_length"], "prefill_ms")
