from __future__ import annotations

import pytest

from experiments.estimate import load_fractions, simulated_trial_seconds
from experiments.expand import expand
from experiments.spec import load_figure, load_testbed
from experiments.workload import synthetic_trace


def test_the_cpu_testbed_meets_the_load_of_the_paper_in_simulation() -> None:
    serving = load_testbed("cpu").serving
    assert serving is not None
    found = load_fractions(synthetic_trace())
    assert set(found) == set(serving.load_fractions)
    for model, fractions in found.items():
        assert serving.load_fractions[model] == pytest.approx(fractions, abs=0.01)


def test_a_pass_of_figure_9a_takes_what_the_published_one_took() -> None:
    """Sixteen points and three probes on the paper's machine: the published times sum to 29.6 s, none of them calibrated on."""
    session = next(s for s in expand(load_figure("fig9a"), load_testbed("a100"), 1) if s.model == "yi-34b-200k")
    assert simulated_trial_seconds(session, session.trials[0], None) == pytest.approx(29.6, rel=0.1)
