"""Of what machine a claim is made, and what a run was made on: by what engine and records say, never by a testbed's name."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import Field
from pydantic.dataclasses import dataclass

from analysis.judge.known import load_known
from analysis.judge.load import Run
from analysis.judge.trial import TrialRecord
from experiments.records.provenance import sha256
from experiments.spec.spec import STRICT, Count

Platform = Literal["cpu", "cuda", "simulated"]


@dataclass(frozen=True, config=STRICT)
class Scope:
    """What a machine must be for a claim to be judged on it. What is not given does not matter."""

    platform: Annotated[tuple[Platform, ...], Field(min_length=1)] = get_args(Platform)
    scale: Count | None = None
    gpu: str | None = None  # part of the names of the GPUs used, or simulated
    tensor_parallel: Count | None = None
    ours: bool = False  # claims of the paper's machine: figure and testbed must be files of ours, past or present

    def words(self) -> list[str]:
        """For people, one for each condition."""
        named = {"scale": self.scale, "GPU": self.gpu, "tensor parallel": self.tensor_parallel}
        found = [f"{name} {value}" for name, value in named.items() if value is not None]
        platforms = [] if self.platform == get_args(Platform) else [" or ".join(self.platform)]
        return [*platforms, *found, *(["figure and testbed of this artifact"] if self.ours else [])] or ["every machine"]


class Place(NamedTuple):
    """What a trial ran on. gpus: names of those that it used; of a simulation, what its calibration is of; empty: not known."""

    platform: str
    scale: int
    tensor_parallel: int
    gpus: tuple[str, ...] = ()

    def __str__(self) -> str:
        named = (self.platform, f"scale {self.scale}", f"tensor parallel {self.tensor_parallel}")
        return ", ".join([*named, *sorted(set(self.gpus))])


def place_of(run: Run, trial: TrialRecord) -> Place:
    """By the facts of its engine. An engine names its own GPU only, so where several work together all of the node count."""
    engine, scale = trial.facts["engine"], trial.facts["scale"]
    together = trial.facts["settings"]["tensor_parallel"]
    if trial.simulated:
        calibration = run.calibration(trial)
        return Place("simulated", scale, together, (calibration["title"],) if calibration else ())
    device = str(engine.get("device") or "")
    if device in ("cpu", ""):
        return Place(device or "unknown device", scale, together)
    others = trial.facts["machine"].get("gpus", []) if together > 1 else []
    return Place("cuda", scale, together, (device, *map(str, others)))


def within(place: Place, scope: Scope) -> bool:
    """Whether a claim of this scope is made of such a machine."""
    return (
        place.platform in scope.platform
        and scope.scale in (None, place.scale)
        and scope.tensor_parallel in (None, place.tensor_parallel)
        and (scope.gpu is None or all(scope.gpu in name for name in place.gpus))
    )


def outside(run: Run, model: str, scope: Scope) -> str:
    """Why a claim of this model is not made of the machine that ran it; empty if it is."""
    trials = [trial for trial in run.trials if trial.facts["model"] == model] or run.trials
    for place in dict.fromkeys(place_of(run, trial) for trial in trials):
        if not within(place, scope):
            return f"claimed of {', '.join(scope.words())}; this is {place}"
    return ""


def not_ours(run: Run) -> str:
    """Why a run's figure or testbed is not one of this artifact; empty if both are."""
    identity, ours = run.plan["identity"], dict[str, Any]()
    for name in ("figure", "testbed"):
        known, copies = load_known()[f"{name}s"], [bag / "data" / f"{name}.yaml" for bag in run.bags]
        for digest in [str(identity.get(name)), *(sha256(copy) for copy in copies if copy.is_file())]:
            if digest not in known:
                return f"its {name}.yaml (sha256 {digest[:12]}) is none of this artifact's, past or present"
        ours |= known[identity[name]]
    said = {key: run.plan[key] for key in ours}
    return "" if said == ours else f"its plan says {said}, its figure and testbed {ours}"
