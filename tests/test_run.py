"""The command line on the simulated testbed: plan, run, resume, refuse."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import bagit
import pytest

from experiments import run
from experiments.engine.session import TrialResult
from experiments.records.provenance import ROOT
from experiments.records.store import Run, read_trial
from experiments.run import main
from experiments.simulator.simulator import simulated_engine
from experiments.spec.expand import expand
from experiments.spec.spec import load_figure, load_testbed

SIM = ("--testbed", "a100-sim")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_run_is_sealed_and_the_same_command_then_does_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fig9a", *SIM, "--replicates", "1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "sealed" in printed
    told = [line for line in printed.splitlines() if line.startswith("[")]
    assert len(told) == 2  # a session is a model and a seed
    assert all(line.endswith(", under a minute left") for line in told)
    assert "estimate  under a minute (to simulate), " in printed
    bag = next(tmp_path.glob("fig9a-a100-sim/bag-*"))
    bagit.Bag(str(bag)).validate()
    before = files(tmp_path)
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "nothing to do" in printed
    assert "estimate" not in printed
    assert files(tmp_path) == before
    facts, _ = read_trial(next(bag.glob("data/trials/*/pass-0")))
    assert facts["engine"]["simulated"] is True
    crate = json.loads((bag / "data" / "ro-crate-metadata.json").read_text())
    named = {entry["@id"] for entry in crate["@graph"]}
    assert {f"trials/{path.parent.name}/{path.name}/trial.json" for path in bag.glob("data/trials/*/*")} <= named


def test_more_replicates_make_a_second_bag_with_only_the_new_ones(tmp_path: Path) -> None:
    for replicates in ("1", "3"):
        assert main(["smoke", *SIM, "--replicates", "1", "--out", str(tmp_path)]) == 0
        assert main(["fig9a", *SIM, "--replicates", replicates, "--out", str(tmp_path)]) == 0
    bags = sorted(tmp_path.glob("fig9a-a100-sim/bag-*"))
    assert [bag.name.rsplit("-", 1)[1] for bag in bags] == ["1", "2"]
    assert {path.name.rsplit("seed", 1)[1] for path in bags[1].glob("data/trials/*")} == {"43", "44"}


def interrupted_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver is interrupted when it has stored so many trials."""
    whole, written = Run.write_trial, list[str]()

    def interrupted(self: Run, session: str, trial: str, *rest: object) -> Path:
        if len(written) == count:
            raise KeyboardInterrupt
        written.append(trial)
        return whole(self, session, trial, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Run, "write_trial", interrupted)


def seeds(bag: Path) -> set[str]:
    return {path.name.rsplit("seed", 1)[1] for path in bag.glob("data/trials/*")}


def test_half_done_replicates_are_not_sealed_with_the_planned_ones_and_complete_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path)]
    with monkeypatch.context() as patched:
        interrupted_after(20, patched)  # of 24; a session is a model and a seed, 6 trials
        assert main(["fig9a", *SIM, "--replicates", "2", *out]) == 130
    capsys.readouterr()
    assert main(["fig9a", *SIM, "--replicates", "1", *out]) == 0
    (bag,) = tmp_path.glob("fig9a-a100-sim/bag-*")
    assert seeds(bag) == {"42"}
    assert set(json.loads((bag / "data" / "plan.json").read_text())["sessions"]) == {p.name for p in bag.glob("data/trials/*")}
    named = json.loads((bag / "data" / "ro-crate-metadata.json").read_text())["@graph"]
    assert not [entry for entry in named if "seed43" in entry["@id"]]
    printed = capsys.readouterr().out
    assert "make fig9a TESTBED=a100-sim REPLICATES=2 adds them as a second bag" in printed
    left = {path.parent.name: path for path in tmp_path.glob("fig9a-a100-sim/open-*/trials/*/*")}
    assert left
    assert all(name.endswith("seed43") for name in left)
    assert main(["fig9a", *SIM, "--replicates", "1", *out]) == 0  # again: nothing changes
    assert "not sealed: " in capsys.readouterr().out
    assert main(["fig9a", *SIM, "--replicates", "2", *out]) == 0
    assert seeds(max(tmp_path.glob("fig9a-a100-sim/bag-*"))) == {"43"}
    assert not list(tmp_path.glob("fig9a-a100-sim/open-*"))


@pytest.mark.parametrize("more", [[], ["--plan"]])
def test_a_third_look_is_refused_before_anything_is_measured(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path)]
    for replicates in ("1", "2"):
        assert main(["fig9a", *SIM, "--replicates", replicates, *out]) == 0
    before = files(tmp_path)
    capsys.readouterr()
    assert main(["fig9a", *SIM, "--replicates", "3", *out, *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: REPLICATES: got 3: ")
    assert "its last look" in error
    assert error.count("\n") == 1
    assert files(tmp_path) == before
    assert main(["fig9a", *SIM, "--replicates", "2", *out, *more]) == 0


def test_plan_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fig9b", "--testbed", "a100", "--plan", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "trials    90 in all, 90 to run" in printed
    assert "trace     " in printed
    assert not (tmp_path / "out").exists()


def test_the_chosen_testbed_and_its_reason_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["smoke", "--plan", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "testbed   " in printed
    assert "fits" in printed or "not " in printed


def test_doctor_names_every_testbed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("a100", "a100-sim", "cpu", "gpu-24g"))


@pytest.mark.parametrize("arguments", [["doctor"], ["smoke", "--testbed", "cpu", "--plan"], ["smoke", *SIM]])
def test_json_is_one_line_and_quiet_none(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--out", str(tmp_path), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert set(json.loads(line)) > ({"testbeds"} if arguments == ["doctor"] else {"figure", "testbed"})
    assert main([*arguments, "--out", str(tmp_path), "--quiet"]) == 0
    assert capsys.readouterr().out == ""


NODE = "import os; os.execv = lambda *_: None; from experiments.cluster import local_ray; local_ray.main({!r})"


@pytest.mark.parametrize(
    "command",
    [
        "from experiments.machine import doctor; doctor.main({!r})",
        "from experiments.machine import gpus; gpus.main({!r})",
        NODE,
    ],
)
def test_json_and_quiet_of_the_commands_for_a_machine(command: str) -> None:
    for option, lines in (("--json", 1), ("--quiet", 0)):
        words = [sys.executable, "-c", command.format([option])]
        printed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
        assert len(printed) == lines
        assert all(isinstance(json.loads(line), dict) for line in printed)


def test_a_plan_as_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["smoke", "--testbed", "cpu", "--plan", "--json", "--out", str(tmp_path)]) == 0
    plan = json.loads(capsys.readouterr().out)
    (session,) = plan["sessions"]
    assert {"pass-0", "pass-1", "pass-0-repeat"} <= set(session["seconds"])
    assert plan["trials"] == plan["trials_to_run"] == 3
    assert session["node"] is None or session["end_s"] == plan["makespan_s"] == pytest.approx(sum(session["seconds"].values()))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fig9z"], "no such file; there are: fig9a, fig9b, smoke"),
        (
            ["fig9a", "--testbed", "h100"],
            "no such file; there are: a100, a100-2024-sim, a100-sim, cpu, gpu, gpu-24g, gpu-80g, gpu-80g-pair",
        ),
        (["missing.yaml"], "error: FIGURE: missing.yaml: no such file"),
        (["fig9a", "--testbed", "missing.yaml"], "error: TESTBED: missing.yaml: no such file"),
        (["fig9a", "--testbed", "cpu", "--replicates", "0"], "error: REPLICATES: got 0; allowed: 1 to 20"),
        (["fig9b", "--testbed", "a100-sim", "--trace", "none.csv"], "TRACE: none.csv: cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_users_trace_longer_than_the_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "my trace.csv"
    trace.write_text("num_prefill_tokens,num_decode_tokens\n100,10\n8000,193\n8000,194\n")
    assert main(["fig9b", *SIM, "--trace", str(trace), "--out", str(tmp_path / "out")]) == 2
    assert "my trace.csv: got 3 requests, of which 2 (66.7 %) of more than 8,192 tokens, first" in capsys.readouterr().err


def test_a_trace_without_time_between_tokens_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "mine.csv"
    trace.write_text("num_prefill_tokens,num_decode_tokens\n" + "100,1\n" * 1024)
    assert main(["fig9b", *SIM, "--trace", str(trace), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: TRACE: mine.csv: got at most 1 output token of a request, 1 on this testbed; allowed: ")
    assert error.count("\n") == 1


def test_killed_at_random_moments_the_same_command_completes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.run", "fig9a", *SIM, "--replicates", "2", "--out"]
    started = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], cwd=ROOT, capture_output=True, check=True)
    duration, order = time.monotonic() - started, random.Random(3)
    expected = files(next((tmp_path / "whole").glob("*/bag-*")))
    for attempt in range(4):
        out, ran = tmp_path / f"killed-{attempt}", []
        for _ in range(2):
            process = subprocess.Popen([*command, str(out)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            time.sleep(order.uniform(0.5, 1.0) * duration)
            process.kill()
            ran += [line.split("] ")[1].split(",")[0] for line in process.communicate()[0].splitlines() if line.startswith("[")]
        last = subprocess.run([*command, str(out)], cwd=ROOT, capture_output=True, text=True, check=True)
        ran += [line.split("] ")[1].split(",")[0] for line in last.stdout.splitlines() if line.startswith("[")]
        assert len(ran) == len(set(ran)), "a finished trial was run twice"
        bags = list(out.glob("*/bag-*"))
        assert len(bags) == 1
        assert files(bags[0]) == expected
        bagit.Bag(str(bags[0])).validate()


def test_an_interruption_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Run.write_trial
    written: list[str] = []

    def interrupted(self: Run, session: str, trial: str, *rest: object) -> Path:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(trial)
        return whole(self, session, trial, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Run, "write_trial", interrupted)
    assert main(["fig9a", *SIM, "--replicates", "1", "--out", str(tmp_path)]) == 130
    assert "the same command resumes" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["fig9a", *SIM, "--replicates", "1", "--out", str(tmp_path)]) == 0
    assert "trials    12 in all, 9 to run" in capsys.readouterr().out


def test_every_simulated_testbed_names_its_calibrations() -> None:
    testbed = load_testbed("a100-sim")
    assert testbed.calibrations is not None
    assert set(testbed.calibrations) == set(testbed.models)


def test_a_simulated_step_beyond_the_calibration_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = tmp_path / "longer.yaml"
    text = (ROOT / "experiments" / "spec" / "figures" / "smoke.yaml").read_text().replace("4096", "32768")
    figure.write_text(text.replace("figure: smoke", "figure: longer"))
    assert main([str(figure), *SIM, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error == "error: calibration a100-mistral-7b: tokens in a step: got 32767; allowed: at most 16384\n"
    assert not list((tmp_path / "out").glob("*/*"))


def test_without_ray_each_trial_is_stored_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an interrupted session the trials that were done are kept."""
    session = expand(load_figure("fig9a"), load_testbed("a100-sim"), 1)[0]
    engine, stored = simulated_engine(session.engine, session.seed), list[str]()
    runs, serve = list[int](), engine.run
    monkeypatch.setattr(engine, "run", lambda phases, limit: runs.append(len(phases)) or serve(phases, limit))

    def store(found: TrialResult) -> None:
        stored.append(found.trial)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "engines", lambda *_: nullcontext([lambda function, *values: function(engine, *values)]))
    session = replace(session, engine=replace(session.engine, platform="cpu"))
    with pytest.raises(KeyboardInterrupt):
        run._one_by_one([session], {session.name: [trial.name for trial in session.trials]}, None, store)
    assert stored == [session.trials[0].name]
    assert len(runs) == 2, "the warm-up and the first trial"
