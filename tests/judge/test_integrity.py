"""Bags by their own tools and beyond them: every flip found, an interrupted copy called incomplete."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from analysis.judge import integrity
from analysis.judge.verify import verify
from experiments.records.provenance import ROOT
from experiments.records.store import to_json

FLIPS = int(os.environ.get("FLIPS", "60"))
CONTEXT = "https://w3id.org/ro/crate/1.1/context"


def bag_of(runs: Path) -> Path:
    return next(runs.glob("*/bag-*"))


def test_random_bit_flips_anywhere_in_a_bag_are_found_and_named(runs_copy: Path) -> None:
    """make flips: 1,000 of them. Half go into tag files, which are small and where bagit itself is blind to some."""
    bag, order = bag_of(runs_copy), random.Random(11)
    files = sorted(path for path in bag.rglob("*") if path.is_file() and path.stat().st_size)
    tags = [path for path in files if path.parent == bag]
    weights = [path.stat().st_size for path in files]
    for number in range(FLIPS):
        path = order.choice(tags) if number % 2 else order.choices(files, weights)[0]
        whole = bytearray(path.read_bytes())
        bit = order.randrange(8 * len(whole))
        whole[bit // 8] ^= 1 << bit % 8
        before = path.read_bytes()
        path.write_bytes(whole)
        found = integrity.problems(bag)
        assert any(path.relative_to(bag).as_posix() in line for line in found), (path, bit, found)
        assert not integrity.incomplete(bag, found) or path.parent == bag, (path, bit)
        path.write_bytes(before)
    assert integrity.problems(bag) == []


def statuses(runs: Path) -> set[tuple[str, int, str]]:
    result = verify(runs)
    verdicts = {entry["verdict"] for entry in result["claims"] if entry["run"]}
    return {(result["overall"], result["status"], verdict) for verdict in verdicts}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_an_interrupted_copy_is_incomplete_never_pass_or_fail(runs_copy: Path, tmp_path: Path, share: float) -> None:
    """cp -r, killed: some files whole, one cut short, the rest not there; whatever the order in which it took them."""
    whole = bag_of(runs_copy)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    for seed, count in enumerate({1, round(share * len(files)), len(files) - 1}):
        random.Random(seed).shuffle(files)
        target = tmp_path / f"copy-{seed}" / whole.parent.name / whole.name
        for path in files[: max(1, count)]:
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(whole / path, target / path)
        last = target / files[max(1, count) - 1]
        if last.relative_to(target).parts[0] == "data":
            last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
        assert statuses(target.parent.parent) == {("INCONCLUSIVE", 2, "INCONCLUSIVE")}
        result = verify(target.parent.parent)
        assert all("incomplete" in entry["reason"] for entry in result["claims"] if entry["run"])


def test_a_changed_file_is_no_interrupted_copy(runs_copy: Path) -> None:
    plan = bag_of(runs_copy) / "data" / "plan.json"
    plan.write_bytes(plan.read_bytes().replace(b"a100", b"h100"))
    assert statuses(runs_copy) == {("FAIL", 1, "FAIL")}
    (bag_of(runs_copy) / "data" / "added").write_text("x")  # nor is one in which something is too much
    (bag_of(runs_copy) / "data" / "figure.yaml").unlink()
    assert statuses(runs_copy) == {("FAIL", 1, "FAIL")}


def test_a_run_in_progress_is_named_incomplete_and_its_claims_not_run(
    runs_copy: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bag = bag_of(runs_copy)
    shutil.copytree(bag / "data", bag.parent / "open-0123abcd")
    (bag / "data").rename(bag.parent / f"open-{bag.name.split('-')[1]}")
    shutil.rmtree(bag)
    command = [sys.executable, "-m", "analysis.judge.verify", "--runs", str(runs_copy), "--report", str(runs_copy / "report")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "fig9a-a100-sim: incomplete; make fig9a TESTBED=a100-sim resumes it" in done.stdout
    assert "fig9a-a100-sim: incomplete; open-0123abcd is of other code, " in done.stdout  # not announced as resumable
    assert done.stdout.splitlines()[-1] == "NOT-RUN"


def test_bagit_itself_finds_the_bag_valid(simulated_runs: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "bagit", "--validate", str(bag_of(simulated_runs))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_sha256sum_alone_finds_the_bag_whole(simulated_runs: Path) -> None:
    for manifest in ("manifest-sha256.txt", "tagmanifest-sha256.txt"):
        command = ["sha256sum", "--quiet", "--strict", "-c", manifest]
        assert subprocess.run(command, cwd=bag_of(simulated_runs), check=False).returncode == 0


def context_cache(path: Path) -> None:
    """The validator asks the web for the JSON-LD context; the rocrate package carries the terms, of which ours are some."""
    import importlib.resources

    import requests
    import urllib3
    from requests_cache import CachedSession

    terms = json.loads(importlib.resources.files("rocrate").joinpath("data/ro-crate.jsonld").read_text("utf8"))
    body = json.dumps({"@context": terms["@context"]}).encode()
    with CachedSession(cache_name=str(path), backend="sqlite", expire_after=-1) as session:
        answer = requests.Response()
        answer.status_code, answer.url, answer._content = 200, CONTEXT, body
        answer.headers["Content-Type"] = "application/ld+json"
        answer.request = requests.Request("GET", CONTEXT).prepare()
        answer.raw = urllib3.HTTPResponse(body=b"", status=200, preload_content=False, request_url=CONTEXT)
        session.cache.save_response(answer, session.cache.create_key(answer.request))


def validate_crate(crate: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    cache = tmp_path / "cache"
    context_cache(cache)
    tool = Path(sys.executable).with_name("rocrate-validator")
    options = ["--profile-identifier", "process-run-crate", "--offline", "--cache-path", str(cache), "--no-paging"]
    command = [str(tool), "-y", "--disable-color", "validate", *options, str(crate)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_crate_is_a_valid_process_run_crate(simulated_runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("rocrate_validator")
    data = bag_of(simulated_runs) / "data"
    good = validate_crate(data, tmp_path)
    assert good.returncode == 0, good.stdout + good.stderr
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    metadata = json.loads((broken / "ro-crate-metadata.json").read_text())
    for entry in metadata["@graph"]:
        entry.pop("instrument", None)
    (broken / "ro-crate-metadata.json").write_text(to_json(metadata))
    assert validate_crate(broken, tmp_path).returncode != 0


def test_the_bill_of_materials_is_valid_cyclonedx_and_names_the_environment(simulated_runs: Path) -> None:
    validation = pytest.importorskip("cyclonedx.validation.json")
    from cyclonedx.schema import SchemaVersion

    text = (bag_of(simulated_runs) / "data" / "sbom.cdx.json").read_text()
    validator = validation.JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(text) is None
    assert validator.validate_str(text.replace('"library"', '"librarian"')) is not None
    named = {(part["name"], part["version"]) for part in json.loads(text)["components"]}
    from importlib import metadata

    for name in ("numpy", "pydantic", "bagit", "pyyaml"):
        assert (name, metadata.version(name)) in named


@pytest.mark.parametrize("gone", [*integrity.TAG_FILES, integrity.TAGS, "data/figure.yaml"])
@pytest.mark.parametrize("name", ["plan.json", "steps.parquet"])
def test_what_is_missing_hides_no_change(runs_copy: Path, gone: str, name: str) -> None:
    bag = bag_of(runs_copy)
    path = next(bag.glob(f"data/**/{name}"))
    (bag / gone).unlink()
    assert statuses(runs_copy) == {("INCONCLUSIVE", 2, "INCONCLUSIVE")}
    path.write_bytes(path.read_bytes().replace(b"a100", b"h100").replace(b"waiting", b"wasting"))
    if (gone, name) == ("manifest-sha256.txt", "plan.json"):
        assert statuses(runs_copy) == {("INCONCLUSIVE", 2, "INCONCLUSIVE")}  # nothing is left that speaks of it
    else:
        assert statuses(runs_copy) == {("FAIL", 1, "FAIL")}
        assert any(path.relative_to(bag).as_posix() in line for line in integrity.problems(bag))
