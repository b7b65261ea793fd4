from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine, ScriptedEngine, StepCost, serving_run, synthetic_run

from analysis.judge import gates, integrity
from analysis.judge.claims import load_claims, published_verdict
from analysis.judge.load import Run, TrialRecord, differing
from analysis.judge.verify import decide, overall, verify
from experiments.engine.session import run_session
from experiments.records.provenance import ROOT
from experiments.records.record import Record
from experiments.records.store import Run as Store
from experiments.records.store import to_json
from experiments.run import main
from experiments.spec.expand import expand
from experiments.spec.spec import load_figure, load_testbed

CLAIMS = load_claims()


def published(tokens: int, budget: int) -> float:
    """The published relative times at the paper's scale, 512 / 1024 / 2048 / unchunked."""
    table = {
        2048: (1.152, 1.175, 1.0, 1.0),
        4096: (1.189, 1.202, 1.024, 1.0),
        8192: (1.117, 1.109, 0.937, 1.0),
        16384: (0.995, 0.961, 0.805, 1.0),
    }
    column = {512: 0, 1024: 1, 2048: 2}.get(budget, 3)
    return table[tokens + 1][column] if tokens + 1 in table else 1.0


def by_chunk(testbed: str, small: float, middle: float, large: float) -> Callable[[int, int], float]:
    """Relative cost of the paper's 512, 1024 and 2048 at the testbed's scale; 1 for unchunked."""
    unit = 512 // load_testbed(testbed).scale
    return lambda _tokens, budget: {unit: small, 2 * unit: middle, 4 * unit: large}.get(budget, 1.0)


def verdicts(run: Run) -> dict[str, str]:
    return {entry["id"]: entry["verdict"] for entry in entries(run)}


def entries(run: Run) -> list[dict[str, Any]]:
    part = {
        "name": f"{run.figure}-{run.testbed}",
        "figure": run.figure,
        "title": run.title,
        "simulated": False,
        "gates": [dataclasses.asdict(gate) for gate in gates.check(run)],
    }
    return decide(CLAIMS, part, run)


GOOD = by_chunk("cpu", 2.2, 1.4, 1.1)


def test_a_good_cpu_run_passes_its_claims_and_the_papers_do_not_apply() -> None:
    found = verdicts(synthetic_run(GOOD))
    of_9a = [claim for claim in CLAIMS if claim.figure == "fig9a"]
    assert found == {claim.id: "PASS" if "cpu" in claim.scope.platform else "NOT-APPLICABLE" for claim in of_9a}
    assert overall([{"verdict": v} for v in found.values()], False) == ("PASS", 0)


def test_a_run_like_the_published_one_agrees_and_refutes_the_simple_story() -> None:
    found = verdicts(synthetic_run(published, testbed="a100"))
    assert {name for name, verdict in found.items() if verdict == "FAIL"} == {"C8"}
    assert {found[name] for name in ("C1", "C2", "C3", "C6", "C7")} == {"PASS"}


@pytest.mark.parametrize(
    ("claim", "testbed", "factors"),
    [
        ("C1", "a100", (1.4, 1.2, 1.0)),
        ("C2", "a100", (1.2, 1.2, 1.15)),
        ("C3", "a100", (1.0, 1.1, 1.2)),
        ("C3", "cpu", (1.0, 1.1, 1.2)),
        ("C4", "cpu", (1.0, 1.1, 1.2)),
        ("C5", "cpu", (2.0, 1.9, 1.6)),
        ("C6", "a100", (1.6, 1.2, 1.0)),
        ("C6", "a100", (0.8, 0.9, 0.9)),
        ("C7", "a100", (1.6, 1.4, 1.3)),
        ("C8", "a100", (1.1, 1.3, 1.0)),
    ],
)
def test_each_claim_can_fail(claim: str, testbed: str, factors: tuple[float, float, float]) -> None:
    found = {entry["id"]: entry for entry in entries(synthetic_run(by_chunk(testbed, *factors), testbed=testbed))}
    assert found[claim]["verdict"] == "FAIL", found[claim]["reason"]
    assert overall([{"verdict": "PASS"}, found[claim]], False) == ("FAIL", 1)


def test_every_claim_passes_on_some_run() -> None:
    passed: set[str] = set()
    for factor, testbed in ((GOOD, "cpu"), (published, "a100"), (by_chunk("a100", 1.2, 1.1, 1.0), "a100")):
        passed |= {name for name, verdict in verdicts(synthetic_run(factor, testbed=testbed)).items() if verdict == "PASS"}
    passed |= {name for name, verdict in verdicts(serving_run(replicates=5)).items() if verdict == "PASS"}
    assert passed == {claim.id for claim in CLAIMS}


def larger_is_faster(_prefill: int, _decodes: int, budget: int) -> float:
    """A machine on which a step with a larger chunk size takes less time: tokens come late where chunks are small."""
    return 0.4 / budget


def larger_is_far_slower(prefill: int, decodes: int, _budget: int) -> float:
    """A machine on which prefill grows with the square of the chunk: with large chunks the first token comes late."""
    return 2e-3 + 5e-6 * prefill**2 + 1e-4 * decodes


@pytest.mark.parametrize(("metric", "cost"), [("tbt_p99", larger_is_faster), ("ttft_p50", larger_is_far_slower)])
def test_each_claim_of_9b_passes_on_one_machine_and_fails_on_another(metric: str, cost: StepCost) -> None:
    of_9b = {claim.id for claim in CLAIMS if claim.figure == "fig9b"}
    about = {claim.id for claim in CLAIMS if claim.figure == "fig9b" and claim.statistic.name == metric}
    assert of_9b == {f"C{number}" for number in range(9, 17)}
    assert len(about) == 4
    found = {entry["id"]: entry for entry in entries(serving_run(cost, replicates=5))}
    assert set(found) == of_9b
    assert {name for name, entry in found.items() if entry["verdict"] == "FAIL"} == about
    assert {entry["verdict"] for name, entry in found.items() if name not in about} == {"PASS"}
    assert {entry["published"]["verdict"] for entry in found.values()} == {"not published"}


def test_noise_is_inconclusive_and_says_how_many_replicates_would_settle_it() -> None:
    noisy = {entry["id"]: entry for entry in entries(synthetic_run(by_chunk("cpu", 1.12, 1.05, 1.0), bias=0.2))}
    assert noisy["C3"]["verdict"] == "INCONCLUSIVE"
    assert "replicates in all would settle it" in noisy["C3"]["reason"] or "hardly settle it" in noisy["C3"]["reason"]
    assert noisy["C3"]["numbers"]["replicates"] == 5


def test_one_replicate_is_inconclusive() -> None:
    assert verdicts(synthetic_run(GOOD, replicates=1))["C3"] == "INCONCLUSIVE"


def change(run: Run, edit: Callable[[TrialRecord], TrialRecord], every: bool = False) -> Run:
    head, *tail = run.trials
    return dataclasses.replace(run, trials=(edit(head), *(edit(t) if every else t for t in tail)))


def edit_table(table: str, column: str, value: Any) -> Callable[[TrialRecord], TrialRecord]:
    def edit(trial: TrialRecord) -> TrialRecord:
        changed = getattr(trial.record, table).copy()
        changed.loc[changed.index[-1], column] = value
        return dataclasses.replace(trial, record=dataclasses.replace(trial.record, **{table: changed}))

    return edit


def edit_facts(**facts: Any) -> Callable[[TrialRecord], TrialRecord]:
    return lambda trial: dataclasses.replace(trial, facts={**trial.facts, **facts})


def slow_repeat(trial: TrialRecord) -> TrialRecord:
    if not trial.repeat:
        return trial
    steps = trial.record.steps.assign(seconds=trial.record.steps["seconds"] * 1.3)
    steps["start_s"] = steps["seconds"].cumsum().shift(1, fill_value=0.0)
    return dataclasses.replace(trial, record=dataclasses.replace(trial.record, steps=steps))


def noisy_probe(trial: TrialRecord) -> TrialRecord:
    steps = trial.record.steps.copy()
    steps.loc[[1, 2], "seconds"] *= [0.3, 3.0]
    steps["start_s"] = steps["seconds"].cumsum().shift(1, fill_value=0.0)
    return dataclasses.replace(trial, record=dataclasses.replace(trial.record, steps=steps))


def late(trial: TrialRecord) -> TrialRecord:
    """Every request enters a second after the longest step that could have kept it waiting."""
    after = 1.0 + trial.record.steps["seconds"].max()
    requests = trial.record.requests.assign(injected_s=trial.record.requests["arrival_s"] + after)
    return dataclasses.replace(trial, record=dataclasses.replace(trial.record, requests=requests))


def relabelled(trial: TrialRecord) -> TrialRecord:
    """Its last point under another chunk size's name."""
    *others, last = trial.facts["phases"]
    other = {512: 1024}.get(last["chunk_size"], 512)
    return dataclasses.replace(trial, facts={**trial.facts, "phases": [*others, last | {"chunk_size": other}]})


def without_a_pass(run: Run) -> Run:
    return dataclasses.replace(run, trials=tuple(trial for trial in run.trials if trial is not run.trials[1]))


BROKEN: dict[str, Callable[[Run], Run]] = {
    "trials as planned": without_a_pass,
    "platform of the testbed": lambda run: dataclasses.replace(run, plan={**run.plan, "platform": "simulated"}),
    "points as named": lambda run: change(run, relabelled),
    "requests finished": lambda run: change(run, edit_table("requests", "generated_tokens", 0)),
    "arrivals kept": lambda run: change(run, late),
    "budget obeyed": lambda run: change(run, edit_table("steps", "prefill_tokens", 10**6)),
    "no cache hit": lambda run: change(run, edit_table("requests", "cached_tokens", 16)),
    "no undeclared preemption": lambda run: change(run, edit_table("steps", "preempted", 1)),
    "clock monotonic": lambda run: change(run, edit_table("steps", "start_s", 0.0)),
    "machine noise": lambda run: change(run, noisy_probe, every=True),
    "first trial repeated": lambda run: change(run, slow_repeat, every=True),
    "independent replicates": lambda run: change(run, edit_facts(process="one"), every=True),
    "one version, one machine type": lambda run: change(run, edit_facts(machine={"type": "another", "image": None})),
    "at most two looks": lambda run: dataclasses.replace(run, bags=run.bags * 3),
}


@pytest.mark.parametrize("name", [gate.gate for gate in gates.check(synthetic_run(GOOD, replicates=1))])
def test_each_gate_alone_makes_its_claims_inconclusive(name: str) -> None:
    serving = name == "arrivals kept"  # in Figure 9a there are none to keep
    run = BROKEN[name](serving_run(replicates=2) if serving else synthetic_run(GOOD, replicates=2))
    assert [gate.gate for gate in gates.check(run) if not gate.ok] == [name]
    found = {entry["id"]: entry for entry in entries(run) if entry["verdict"] != "NOT-APPLICABLE"}
    assert {claim.id for claim in CLAIMS if claim.figure == run.figure and "cpu" in claim.scope.platform} == set(found)
    assert {entry["verdict"] for entry in found.values()} == {"INCONCLUSIVE"}
    assert all(f"gate broken: {name}" in entry["reason"] for entry in found.values())


@pytest.mark.parametrize("how", ["twice", "more than planned"])
def test_a_trial_that_was_not_planned_or_is_there_twice_is_no_replicate(how: str) -> None:
    run = synthetic_run(GOOD, replicates=3)
    if how == "twice":
        more = dataclasses.replace(run, trials=(*run.trials, run.trials[3]))
        said = f"1 there twice: {run.trials[3].facts['session']}/{run.trials[3].facts['trial']}"
    else:
        more = dataclasses.replace(run, plan=synthetic_run(GOOD, replicates=2).plan)
        said = "12 not planned: mistral-7b-seed44/pass-0, mistral-7b-seed44/pass-0-repeat, mistral-7b-seed44/pass-1"
    (broken,) = [gate for gate in gates.check(more) if not gate.ok]
    assert (broken.gate, broken.detail) == ("trials as planned", said)


def test_a_token_before_its_predecessor_breaks_the_clock() -> None:
    run = change(serving_run(replicates=2), edit_table("tokens", "time_s", 0.0))
    assert [gate.gate for gate in gates.check(run) if not gate.ok] == ["clock monotonic"]


def test_a_session_without_its_repetition_is_not_trusted() -> None:
    whole = synthetic_run(GOOD, replicates=2)
    first_only = {name: [t for t in trials if not t.endswith("-repeat")] for name, trials in whole.plan["sessions"].items()}
    plan = {**whole.plan, "sessions": first_only}
    run = dataclasses.replace(whole, plan=plan, trials=tuple(trial for trial in whole.trials if not trial.repeat))
    assert [gate.gate for gate in gates.check(run) if not gate.ok] == ["first trial repeated"]


def test_every_gate_holds_on_a_good_serving_run() -> None:
    assert [gate for gate in gates.check(serving_run(replicates=2)) if not gate.ok] == []


def test_a_truncated_trial_is_not_complete() -> None:
    def truncate(trial: TrialRecord) -> TrialRecord:
        return dataclasses.replace(trial, record=dataclasses.replace(trial.record, truncated=True))

    assert verdicts(change(synthetic_run(GOOD), truncate))["C3"] == "INCONCLUSIVE"


def test_a_run_that_was_cut_short_before_its_first_point_is_not_complete() -> None:
    def cut(trial: TrialRecord) -> TrialRecord:
        first = next(number for number, role in enumerate(trial.facts["phases"]) if role["role"] == "point")
        requests = trial.record.requests[trial.record.requests["phase"] < first]
        return dataclasses.replace(trial, record=dataclasses.replace(trial.record, requests=requests, truncated=True))

    assert verdicts(change(synthetic_run(GOOD, replicates=2), cut, every=True))["C3"] == "INCONCLUSIVE"


def test_a_first_look_leaves_some_of_the_level_for_a_last_one() -> None:
    first, both = synthetic_run(GOOD, replicates=1), synthetic_run(GOOD)
    assert {entry["numbers"]["level"] for entry in entries(both) if entry["verdict"] == "PASS"} == {0.02}
    second = [entry for entry in entries(two_looks(first, both)) if entry["verdict"] == "PASS"]
    assert {(entry["numbers"]["level"], entry["numbers"]["replicates"]) for entry in second} == {(0.005, 5)}


def two_looks(first: Run, both: Run) -> Run:
    """The run of both, of which `first` was there at a first look."""
    return dataclasses.replace(both, bags=(*first.bags, Path("bag-00000000-2")), earlier=first)


def test_a_second_look_takes_nothing_back_that_the_first_settled() -> None:
    """Two replicates more that say the opposite: over all five nothing would pass."""
    passed, failed = synthetic_run(GOOD, replicates=3), synthetic_run(by_chunk("cpu", 1.0, 1.4, 1.6), replicates=3)
    for first, verdict in ((passed, "PASS"), (failed, "FAIL")):
        added = [t for t in synthetic_run(by_chunk("cpu", 0.2, 1, 5), replicates=5).trials if t.facts["seed"] > 44]
        both = dataclasses.replace(synthetic_run(GOOD), trials=(*first.trials, *added))
        assert {e["verdict"] for e in entries(both) if e["scope"].count("cpu")} == {"INCONCLUSIVE"}
        found = [entry for entry in entries(two_looks(first, both)) if entry["verdict"] != "NOT-APPLICABLE"]
        assert {entry["verdict"] for entry in found} == {verdict}
        for entry in found:
            assert "so the first look settled it; the ratio over all 5 replicates is" in entry["reason"]
            assert (entry["numbers"]["looks"], entry["numbers"]["level"], entry["numbers"]["replicates"]) == (1, 0.02, 3)
            assert len(entry["numbers"]["all_replicates"]["ratios"]) == 5


def test_a_first_look_whose_gates_broke_settled_nothing() -> None:
    first = change(synthetic_run(GOOD, replicates=3), noisy_probe, every=True)
    found = entries(two_looks(first, synthetic_run(GOOD)))
    assert {(e["verdict"], e["numbers"]["level"]) for e in found if e["verdict"] != "NOT-APPLICABLE"} == {("PASS", 0.005)}


def test_a_model_that_was_not_run() -> None:
    run = synthetic_run(GOOD)
    only = dataclasses.replace(run, trials=tuple(t for t in run.trials if t.facts["model"] == "yi-34b-200k"))
    assert verdicts(only)["C4"] == "NOT-RUN"


def test_the_published_data_go_through_the_claims() -> None:
    found = {claim.id: published_verdict(claim)["verdict"] for claim in CLAIMS}
    assert found["C8"] == "contradicts"
    assert found["C4"] == "not published"
    assert {found[name] for name in ("C1", "C2", "C3")} == {"agrees"}


@pytest.mark.parametrize(
    ("found", "everything", "expected"),
    [
        (["PASS", "NOT-APPLICABLE"], False, ("PASS", 0)),
        (["PASS", "FAIL", "INCONCLUSIVE"], False, ("FAIL", 1)),
        (["PASS", "INCONCLUSIVE"], False, ("INCONCLUSIVE", 2)),
        (["PASS", "NOT-RUN"], False, ("PASS", 0)),
        (["PASS", "NOT-RUN"], True, ("INCONCLUSIVE", 2)),
        (["NOT-RUN"], False, ("NOT-RUN", 2)),
    ],
)
def test_overall(found: list[str], everything: bool, expected: tuple[str, int]) -> None:
    assert overall([{"verdict": verdict} for verdict in found], everything) == expected


# -- bags on disk ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with one sealed Figure 9a run of two replicates."""
    runs = tmp_path_factory.mktemp("runs")
    figure, testbed = load_figure("fig9a"), load_testbed("cpu")
    store = Store(runs / "fig9a-cpu", {"experiments": "x"})
    for session in expand(figure, testbed, 2):
        for result in run_session(
            session,
            [trial.name for trial in session.trials],
            lambda settings, seed=session.seed: ScriptedEngine(settings, GOOD, 0.01, seed),
        ):
            store.write_trial(result.session, result.trial, result.facts, result.record)
    plan = {**synthetic_run(GOOD, replicates=2).plan, "identity": store.identity}
    store.seal(store.open_trials(), {"plan.json": to_json(plan)}, {"External-Identifier": "test"})
    return runs


@pytest.fixture
def copied(sealed: Path, tmp_path: Path) -> Path:
    shutil.copytree(sealed, tmp_path / "runs")
    return tmp_path / "runs"


def bag_of(runs: Path) -> Path:
    return next(runs.glob("fig9a-cpu/bag-*"))


def run_verify(runs: Path, report: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "analysis.judge.verify", "--runs", str(runs), "--report", str(report), *more]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_command_ends_with_the_verdict_and_writes_every_number(sealed: Path, tmp_path: Path) -> None:
    done = run_verify(sealed, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "PASS"
    result = json.loads((tmp_path / "verdict.json").read_text())
    printed = " ".join(done.stdout.split())
    for entry in result["claims"]:  # each with its reason
        reason = f"{entry['reason'][0].upper()}{entry['reason'][1:]}."
        assert f"{entry['id']} {entry['verdict']} {entry['run'] or 'not run'} {entry['statement']} {reason}" in printed
    assert max(len(line) for line in done.stdout.splitlines() if line.startswith(" " * 5)) <= 80
    assert result["overall"] == "PASS"
    assert len(result["runs"][0]["bags"][0]["tagmanifest_sha256"]) == 64
    assert all(entry["numbers"]["ratios"] for entry in result["claims"] if entry["verdict"] == "PASS")


def all_files(bag: Path) -> list[str]:
    return sorted(path.relative_to(bag).as_posix() for path in bag.rglob("*") if path.is_file())


def test_one_byte_changed_anywhere_is_found_and_named(copied: Path) -> None:
    bag = bag_of(copied)
    assert integrity.problems(bag) == []
    names = [name for name in all_files(bag) if "data/trials" not in name]
    names += [name for name in all_files(bag) if "data/trials" in name][:5]
    for name in names:
        whole = (bag / name).read_bytes()
        for position in {0, len(whole) // 2, len(whole) - 1}:
            for bit in (1, 32):
                (bag / name).write_bytes(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
                assert any(name in line for line in integrity.problems(bag)), (name, position, bit)
        (bag / name).write_bytes(whole)
    assert integrity.problems(bag) == []


def test_a_file_added_removed_renamed_truncated_is_named(copied: Path) -> None:
    bag = bag_of(copied)
    name = all_files(bag)[-6]
    data = (bag / name).read_bytes()
    for where in ("data/new.csv", "new.csv", "data/trials/new"):
        (bag / where).write_text("x")
        assert integrity.problems(bag) == [f"unlisted: {where}"]
        (bag / where).unlink()
    (bag / name).unlink()
    assert integrity.problems(bag) == [f"missing: {name}"]
    (bag / "data/renamed").write_bytes(data)
    assert integrity.problems(bag) == [f"missing: {name}", "unlisted: data/renamed"]
    (bag / "data/renamed").unlink()
    (bag / name).write_bytes(data[:-1])
    assert integrity.problems(bag) == [f"changed: {name}"]
    (bag / name).unlink()
    (bag / name).symlink_to("/etc/hostname")
    assert integrity.problems(bag) == [f"unlisted: {name}"]


def test_a_broken_bag_fails_with_status_1(copied: Path, tmp_path: Path) -> None:
    target = bag_of(copied) / "data" / "plan.json"
    target.write_bytes(target.read_bytes() + b" ")
    done = run_verify(copied, tmp_path / "report")
    assert done.returncode == 1
    assert "changed: " in done.stdout
    assert "data/plan.json" in done.stdout.replace("\n", "")
    assert done.stdout.splitlines()[-1] == "FAIL"


def test_no_run_at_all_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    done = run_verify(tmp_path / "none", tmp_path / "report")
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1] == "NOT-RUN"
    assert {entry["verdict"] for entry in json.loads((tmp_path / "report" / "verdict.json").read_text())["claims"]} == {
        "NOT-RUN"
    }


def test_runs_of_different_code_are_not_mixed(copied: Path) -> None:
    bag = bag_of(copied)
    other = Store(copied / "fig9a-cpu", {"experiments": "y"})
    session = expand(load_figure("fig9a"), load_testbed("cpu"), 1)[0]
    result = next(run_session(session, ["pass-0"], FakeEngine))
    other.write_trial(result.session, result.trial, result.facts, result.record)
    plan = json.loads((bag / "data" / "plan.json").read_text()) | {"identity": other.identity}
    other.seal(other.open_trials(), {"plan.json": to_json(plan)}, {})
    result_json = verify(copied)
    assert result_json["runs"][0]["aside"] == [f"{bag.name} differs in experiments"]
    assert isinstance(result.record, Record)


@pytest.mark.parametrize("name", ["{}.orig", "{}-copy", "bag-00000000-2"])
def test_a_copy_beside_a_bag_is_no_second_look(copied: Path, name: str) -> None:
    bag, alone = bag_of(copied), verify(copied)
    copy = bag.with_name(name.format(bag.name))
    shutil.copytree(bag, copy)
    found = verify(copied)
    assert found["claims"] == alone["claims"]
    assert found["runs"][0]["gates"] == alone["runs"][0]["gates"]
    first, second = sorted((bag.name, copy.name))
    assert found["runs"][0]["aside"] == [f"{second} is a copy of {first}"]


def test_a_second_bag_is_a_second_look_whatever_the_bags_are_called(tmp_path: Path) -> None:
    """Of nine claims on the paper's scale the first look settles some; those it settled are judged by its bag alone."""
    out = ["--testbed", "a100-sim", "--out", str(tmp_path)]
    assert main(["fig9a", *out, "--replicates", "3"]) == 0
    first = verify(tmp_path)
    assert main(["fig9a", *out, "--replicates", "4"]) == 0
    one, two = sorted(tmp_path.glob("*/bag-*"))
    both = verify(tmp_path)
    one.rename(one.with_name("bag-z"))
    two.rename(two.with_name("bag-a"))
    assert verify(tmp_path)["claims"] == both["claims"]
    assert [gate for gate in both["runs"][0]["gates"] if not gate["ok"]] == []
    settled = {entry["id"]: entry for entry in first["claims"] if entry["verdict"] in ("PASS", "FAIL")}
    assert settled
    for entry in both["claims"]:
        if entry["id"] in settled:
            assert entry["verdict"] == settled[entry["id"]]["verdict"]
            assert entry["numbers"]["ratios"] == settled[entry["id"]]["numbers"]["ratios"]
            assert len(entry["numbers"]["all_replicates"]["ratios"]) == 4
        elif entry["verdict"] == "INCONCLUSIVE":
            assert entry["numbers"]["looks"] == 2
            assert entry["reason"].endswith("only a run on the real machine settles it")


def test_a_model_on_two_types_of_machine_is_named_and_two_models_on_one_each_are_not() -> None:
    run = synthetic_run(GOOD, replicates=2)
    first = run.models[0]

    def moved(trial: TrialRecord, where: str) -> TrialRecord:
        return dataclasses.replace(trial, facts={**trial.facts, "machine": {**trial.facts["machine"], "type": where}})

    apart = dataclasses.replace(run, trials=tuple(moved(t, "A" if t.facts["model"] == first else "B") for t in run.trials))
    assert len(run.models) == 2
    assert differing(apart) == []
    mixed = change(apart, lambda trial: moved(trial, "C"))
    (named,) = differing(mixed)
    assert named.endswith(("machine.type: A, C", "machine.type: B, C"))
