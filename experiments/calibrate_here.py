"""`make calibrate`: a short set of steps on this machine's engine, fitted to the cost model, with its held-out error."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from experiments.bench import engines
from experiments.calibrate import calibration_phases, fit_records, write
from experiments.cost_model import Calibration
from experiments.doctor import choose_testbed
from experiments.engine import Phase
from experiments.expand import expand
from experiments.provenance import ROOT, machine
from experiments.spec import EngineSettings, SpecError, Testbed, load_figure

ROUNDS = 3  # other work on the machine disturbs one round, seldom the same steps of all


def calibration_path(folder: Path, testbed: str, model: str) -> Path:
    """Where the calibration of a testbed's model on this machine lies."""
    return folder / "calibration" / f"{testbed}-{model}.yaml"


def settings_of(testbed: Testbed) -> dict[str, EngineSettings]:
    """Engine model -> the settings of the testbed that ask most of it: longest prompts, largest chunk size."""
    found: dict[str, EngineSettings] = {}
    for figure in ("fig9a", "fig9b"):
        for session in expand(load_figure(figure), testbed, 1):
            known = found.get(session.engine.model)
            if known is None or session.engine.max_model_len > known.max_model_len:
                found[session.engine.model] = session.engine
    return found


def calibrate(settings: EngineSettings, testbed: str, rounds: int = ROUNDS) -> Calibration:
    """Run the calibration's steps on a fresh engine and fit them. The first round warms up and is dropped."""
    phases = calibration_phases(settings)
    with engines([settings]) as (run,):
        run(*(Phase(phase.budget, phase.requests[:1]) for phase in phases))
        steps = pd.concat([run(*phases).steps for _ in range(rounds)], ignore_index=True)
    name = f"{testbed}-{settings.model}"
    source = f"{len(steps)} steps of vLLM on this machine ({machine()['type']})"
    return fit_records(steps, settings, name, f"{settings.model} on {machine()['type']}", source, block_size=128)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m experiments.calibrate_here", description=__doc__)
    parser.add_argument("--testbed", default="auto")
    parser.add_argument("--out", type=Path, default=ROOT / "artifacts" / "runs")
    options = parser.parse_args(argv)
    try:
        testbed, reason = choose_testbed(options.testbed, options.out)
        if testbed.platform == "simulated":
            raise SpecError(f"--testbed: got {testbed.testbed}, which has no engine; allowed: a testbed with one")
        print(f"testbed {testbed.testbed} ({reason}); less than a minute for each model")
        for model, settings in settings_of(testbed).items():
            calibration = calibrate(settings, testbed.testbed)
            path = calibration_path(options.out, testbed.testbed, model)
            path.parent.mkdir(parents=True, exist_ok=True)
            write(calibration, path)
            error = calibration.error
            print(f"{model}: held-out error {error.held_out:.1%} ({error.held_out_on}); {path}")
    except SpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
