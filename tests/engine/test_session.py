from __future__ import annotations

import pytest
from fakes import FakeEngine

from experiments.engine.session import PROBES, phases_of, run_session, warm_up
from experiments.records.metrics import prefill_seconds
from experiments.spec.expand import Session, expand
from experiments.spec.spec import EngineSettings, load_figure, load_testbed


def test_a_session_loads_once_warms_up_and_runs_what_is_owed(smoke_session: Session) -> None:
    made: list[FakeEngine] = []

    def make(settings: EngineSettings) -> FakeEngine:
        made.append(FakeEngine(settings))
        return made[-1]

    results = list(run_session(smoke_session, {"pass-1", "pass-0-repeat"}, make))
    assert [r.trial for r in results] == ["pass-1", "pass-0-repeat"]
    assert len(made) == 1
    assert made[0].closed
    assert len(made[0].ran) == 3  # warm-up and two trials
    assert len({r.facts["process"] for r in results}) == 1


def test_the_engine_is_closed_when_a_trial_fails(smoke_session: Session) -> None:
    class Broken(FakeEngine):
        def run(self, phases, time_limit_s):  # type: ignore[no-untyped-def]
            raise RuntimeError("the step failed")

    broken = Broken(smoke_session.engine)
    with pytest.raises(RuntimeError, match="the step failed"):
        list(run_session(smoke_session, {"pass-0"}, lambda _: broken))
    assert broken.closed


def test_prefill_seconds_are_the_steps_of_the_request(smoke_session: Session) -> None:
    trial = smoke_session.trials[0]
    result = next(run_session(smoke_session, {trial.name}, FakeEngine))
    seconds = prefill_seconds(result.record)
    phases, roles = phases_of(smoke_session, trial, None)
    assert len(seconds) == len(phases) == 1 + PROBES + len(trial.points)
    for number, role in enumerate(roles):
        if role["role"] == "point":
            steps = -(-role["prompt_tokens"] // role["budget"])
            assert seconds[number] == pytest.approx(0.01 * steps + 1e-4 * role["prompt_tokens"])


def test_every_prompt_of_a_prefill_figure_warms_up_with_its_last_piece() -> None:
    """That of 2,047 tokens in steps of 512 ends with a step of 511, a shape of its own."""
    for session in expand(load_figure("fig9a"), load_testbed("a100"), 1):
        points = {(point.budget, point.prompt_tokens) for trial in session.trials for point in trial.points}
        warm = [(phase.budget, request.prompt_tokens) for phase in warm_up(session) for request in phase.requests]
        assert sorted(points) == warm
        assert (512, 2047) in points


def test_facts_name_no_user_and_no_host(smoke_session: Session) -> None:
    import getpass
    import socket

    result = next(run_session(smoke_session, {"pass-0"}, FakeEngine))
    text = str(result.facts)
    assert socket.gethostname() not in text
    assert getpass.getuser() not in text.replace("root_", "")
