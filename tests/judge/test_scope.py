"""A name does not stand for a fact, nor a bag's word for what we know; over all claims."""

from __future__ import annotations

import dataclasses
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fakes import A100, serving_run, synthetic_run
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.judge import gates, known
from analysis.judge.claims import load_claims, observe
from analysis.judge.load import Run, TrialRecord
from analysis.judge.stats import Sample
from analysis.judge.verify import decide
from experiments.records.errors import SpecError
from experiments.spec.spec import FIGURES, TESTBEDS

CLAIMS = load_claims()
OF_THE_PAPERS_MACHINE = {"C1", "C2", "C6", "C7", "C8"}
ORDERINGS = {"C3", "C4", *(f"C{number}" for number in range(9, 17))}


def overhead(_tokens: int, budget: int) -> float:
    return 1.0 + 40 / budget


def verdicts(run: Run) -> dict[str, tuple[str, str]]:
    """Claim -> verdict and reason."""
    part = {"name": "name", "figure": run.figure, "title": run.title, "simulated": run.simulated}
    part["gates"] = [dataclasses.asdict(gate) for gate in gates.check(run)]
    return {entry["id"]: (entry["verdict"], entry["reason"]) for entry in decide(CLAIMS, part, run)}


def edited(name: str, folder: Path, target: Path, **changes: Any) -> str:
    """A copy of a figure or testbed of ours with these changes, of the same name where they leave that; its path."""
    target.write_text(yaml.safe_dump(yaml.safe_load((folder / f"{name}.yaml").read_text()) | changes))
    return str(target)


def on(run: Run, card: str) -> Run:
    """The same run on GPUs of this name."""

    def moved(trial: TrialRecord) -> TrialRecord:
        engine = {**trial.facts["engine"], "device": card}
        machine = {**trial.facts["machine"], "gpus": [card] * 2, "type": card}
        return dataclasses.replace(trial, facts={**trial.facts, "engine": engine, "machine": machine})

    return dataclasses.replace(run, trials=tuple(map(moved, run.trials)))


def on_a_cpu(bed: Path, figure: Path) -> Run:
    return synthetic_run(overhead, 0.002, testbed=edited("a100", TESTBEDS, bed, platform="cpu"), replicates=3)


def on_an_own_gpu(bed: Path, figure: Path) -> Run:
    return on(
        synthetic_run(overhead, 0.002, testbed=edited("a100", TESTBEDS, bed, testbed="h100"), replicates=3),
        "NVIDIA H100 80GB HBM3",
    )


def ours_elsewhere(bed: Path, figure: Path) -> Run:
    return on(synthetic_run(overhead, 0.002, testbed="a100", replicates=3), "NVIDIA H100 80GB HBM3")


def beside_another_gpu(bed: Path, figure: Path) -> Run:
    run = on(synthetic_run(overhead, 0.002, testbed="a100", replicates=3), A100[0])
    for trial in run.trials:
        trial.facts["machine"]["gpus"] = [A100[0], "NVIDIA H100 80GB HBM3"]
    return run


def of_another_dtype(bed: Path, figure: Path) -> Run:
    return synthetic_run(overhead, 0.002, testbed=edited("a100", TESTBEDS, bed, dtype="bfloat16"), replicates=3)


def of_another_figure(bed: Path, figure: Path) -> Run:
    return synthetic_run(
        overhead, 0.002, testbed="a100", replicates=3, figure=edited("fig9a", FIGURES, figure, requests_per_point=1)
    )


def of_another_calibration(bed: Path, figure: Path) -> Run:
    run = synthetic_run(overhead, 0.002, testbed="a100-sim", replicates=3)
    return dataclasses.replace(run, plan={**run.plan, "identity": {**run.plan["identity"], "a100-yi-34b-tp2": "0" * 64}})


def ours(bed: Path, figure: Path) -> Run:
    return synthetic_run(overhead, 0.002, testbed="a100", replicates=3)


@pytest.mark.parametrize(
    ("made", "papers", "reason"),
    [
        (ours, "", ""),
        (on_a_cpu, "NOT-APPLICABLE", "this is cpu, scale 1, tensor parallel 2"),
        (on_an_own_gpu, "NOT-APPLICABLE", "NVIDIA H100"),
        (ours_elsewhere, "NOT-APPLICABLE", "NVIDIA H100"),
        (beside_another_gpu, "NOT-APPLICABLE", "NVIDIA H100"),
        (of_another_dtype, "INCONCLUSIVE", "testbed.yaml (sha256 "),
        (of_another_figure, "INCONCLUSIVE", "figure.yaml (sha256 "),
    ],
)
def test_claims_of_the_papers_machine_are_tied_to_what_a_machine_is_and_orderings_are_judged_anywhere(
    made: Callable[[Path, Path], Run], papers: str, reason: str, tmp_path: Path
) -> None:
    run = made(tmp_path / "a100.yaml", tmp_path / "fig9a.yaml")
    assert [gate for gate in gates.check(run) if not gate.ok] == []
    assert run.plan["platform"] == "cpu" or run.trials[0].facts["engine"]["device"] in run.title
    found = verdicts(run)
    for claim in (claim for claim in CLAIMS if claim.figure == "fig9a"):
        verdict, said = found[claim.id]
        if claim.id in ORDERINGS:
            assert verdict == "PASS", said
        elif papers and claim.id in OF_THE_PAPERS_MACHINE:
            assert (verdict, reason in said) == (papers, True), said
        elif claim.id in OF_THE_PAPERS_MACHINE:
            assert "95 % interval" in said  # judged
        else:
            assert verdict == "NOT-APPLICABLE", said


def test_figure_9b_is_judged_on_a_testbed_of_ones_own(tmp_path: Path) -> None:
    run = serving_run(testbed=edited("cpu", TESTBEDS, tmp_path / "mine.yaml", testbed="mine"), replicates=5)
    assert {verdict for verdict, _ in verdicts(run).values()} == {"PASS"}


def test_a_run_on_another_platform_than_its_testbed_says_is_not_judged() -> None:
    run = synthetic_run(overhead, 0.002, testbed="a100", replicates=3)
    pretended = dataclasses.replace(run, plan={**run.plan, "platform": "cpu", "scale": 8})
    (broken,) = [gate for gate in gates.check(pretended) if not gate.ok]
    assert (broken.gate, broken.detail) == ("platform of the testbed", "cuda, scale 1; not cpu, scale 8, as testbed a100 says")
    assert {verdict for verdict, _ in verdicts(pretended).values()} <= {"NOT-APPLICABLE", "INCONCLUSIVE"}


@pytest.mark.parametrize(
    ("figure", "changes"),
    [
        ("fig9a", {"chunk_size": 512, "budget": 256}),
        ("fig9a", {"chunk_size": None, "budget": 64}),
        ("fig9a", {"prompt_length": 32768}),
        ("fig9b", {"chunk_size": 2048, "budget": 64}),
        ("fig9b", {"chunk_size": None, "budget": 64}),
        ("fig9b", {"rate": 0.5}),
        ("fig9b", {"requests": 1}),
    ],
)
def test_a_point_that_is_not_what_it_is_named_makes_every_claim_inconclusive(figure: str, changes: dict[str, Any]) -> None:
    run = serving_run(replicates=1) if figure == "fig9b" else synthetic_run(overhead, replicates=1)
    assert [gate for gate in gates.check(run) if not gate.ok] == []
    *others, last = run.trials[1].facts["phases"]
    odd = dataclasses.replace(run.trials[1], facts={**run.trials[1].facts, "phases": [*others, last | changes]})
    run = dataclasses.replace(run, trials=(run.trials[0], odd, *run.trials[2:]))
    assert "points as named" in [gate.gate for gate in gates.check(run) if not gate.ok]


# -- a simulation's error --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated() -> Run:
    """Its overhead is beyond the calibrations' error."""
    return synthetic_run(lambda _tokens, budget: 1.0 + 160 / budget, 0.002, testbed="a100-sim", replicates=3)


def test_gates_of_real_machines_do_not_apply_to_a_simulation(simulated: Run) -> None:
    details = {gate.gate: gate.detail for gate in gates.check(simulated)}
    assert details["machine noise"] == details["first trial repeated"] == "not applicable: simulated"


def saying(run: Run, **facts: Any) -> Run:
    """The same run whose engines say this."""
    engines = ({**trial.facts["engine"], **facts} for trial in run.trials)
    trials = (dataclasses.replace(t, facts={**t.facts, "engine": e}) for t, e in zip(run.trials, engines, strict=True))
    return dataclasses.replace(run, trials=tuple(trials))


anything = st.none() | st.floats() | st.integers() | st.text(max_size=5) | st.lists(st.floats(), max_size=2)


@settings(max_examples=15, deadline=None)
@given(error=anything | st.fixed_dictionaries({"held_out": anything}))
def test_what_a_bag_says_of_its_error_changes_nothing(simulated: Run, error: Any) -> None:
    run = saying(simulated, calibration_error=error)
    claims = [claim for claim in CLAIMS if claim.figure == "fig9a" and claim.id not in ("C5", "C6", "C7")]
    for claim in claims:
        seen = observe(run, claim)
        assert isinstance(seen, Sample)
        assert seen.systematic == math.log1p(0.126)  # of Figure 9a's relative times, see artifacts/reference/end_to_end.yaml


@pytest.mark.parametrize("digest", ["0" * 64, None, 7, ["x"], "of the other calibration"])
def test_a_calibration_that_is_not_ours_is_inconclusive_for_every_claim(simulated: Run, digest: Any) -> None:
    identity = dict(simulated.plan["identity"])
    here, other = "a100-yi-34b-tp2", "a100-mistral-7b"
    identity |= {here: identity[other] if digest == "of the other calibration" else digest}
    run = dataclasses.replace(simulated, plan={**simulated.plan, "identity": identity})
    assert f"{here}, of unknown error" in run.title
    found = verdicts(run)
    for claim in (claim for claim in CLAIMS if claim.figure == "fig9a"):
        verdict, reason = found[claim.id]
        if claim.model == "mistral-7b":
            assert verdict == "PASS"
        elif claim.scope.platform != ("cuda",) and claim.id != "C5":
            assert (verdict, "calibration that is none of this artifact's" in reason) == ("INCONCLUSIVE", True)
    assert {verdict for verdict, _ in verdicts(saying(simulated, calibration="mine")).values()} == {
        "INCONCLUSIVE",
        "NOT-APPLICABLE",
    }


def test_each_quantity_has_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {"step": 0.05, "ttft_p50": 0.4, "tbt_p99": 0.0}
    ours = known.load_known()["calibrations"]
    changed = {digest: calibration | {"error": errors} for digest, calibration in ours.items()}
    monkeypatch.setattr(known, "load_known", lambda: {"calibrations": changed})
    run = saying(serving_run(replicates=2), simulated=True, calibration="a100-mistral-7b")
    digest = next(digest for digest, own in ours.items() if own["calibration"] == "a100-mistral-7b")
    run.plan["identity"]["a100-mistral-7b"] = digest
    assert [known.error_of({"error": errors}, name) for name in ("tbt_p99", "ttft_p50", "prefill")] == [0.0, 0.4, 0.05]
    assert run.model_error("mistral-7b", "ttft_p50") == 0.4
    widths = {claim.statistic.name: seen.systematic for claim in CLAIMS if isinstance(seen := observe(run, claim), Sample)}
    assert widths == {"ttft_p50": math.log1p(0.4), "tbt_p99": 0.0}


# -- our own files, past and present ---------------------------------------------------------------------------------


def test_every_file_of_ours_is_known_and_what_is_known_of_it_is_right() -> None:
    ours = known.load_known()
    digests = dict.fromkeys(known.FOLDERS, 0)
    for kind, content in known.at_hand():
        ((digest, entry),) = known.collect({}, iter([(kind, content)]))[kind].items()
        digests[kind] += 1
        held = ours[kind].get(digest)
        assert held, f"{kind}: {entry} is not in known.yaml: python -m analysis.judge.known adds it"
        assert held | {"error": None} == entry | {"error": None}
        assert entry.get("error", {}).items() <= held.get("error", {}).items()
    assert min(digests.values()) > 0


def test_files_of_every_commit_are_found_and_what_was_known_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        names = ["-c", "user.name=x", "-c", "user.email=x@y.example", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *names, *words], check=True, capture_output=True)

    git("init", "-q")
    bed = tmp_path / "experiments" / "testbeds" / "mine.yaml"
    bed.parent.mkdir(parents=True)
    for scale in (1, 2):
        bed.write_text(f"{{testbed: mine, platform: cpu, scale: {scale}}}")
        git("add", "-A")
        git("commit", "-qm", "x")
    (tmp_path / "experiments" / "spec").mkdir()
    git("mv", "experiments/testbeds", "experiments/spec/testbeds")
    git("commit", "-qm", "x")
    monkeypatch.setattr(known, "ROOT", tmp_path)
    before = {"calibrations": {"0" * 64: {"calibration": "old", "title": "old", "error": {"step": 0.1, "ttft_p50": 0.4}}}}
    found = known.collect(before, known.in_history())
    assert [entry["scale"] for entry in found["testbeds"].values()] == [1, 2]
    assert found["calibrations"] == before["calibrations"]
    assert known.collect(found, known.in_history()) == found
    monkeypatch.setattr(known, "ROOT", tmp_path / "nowhere")
    with pytest.raises(SpecError, match="its history cannot be read"):
        list(known.in_history())
