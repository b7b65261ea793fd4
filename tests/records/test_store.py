from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import bagit
import pandas as pd
import pytest
from fakes import FakeEngine

from experiments.engine.session import run_session
from experiments.records.errors import SpecError
from experiments.records.provenance import ROOT
from experiments.records.store import FILES, MANIFEST, Run, read_trial, trial_is_whole
from experiments.spec.expand import Session

IDENTITY = {"experiments": "a", "figure": "b"}


def fill(run: Run, session: Session) -> list[Path]:
    owed = [trial.name for trial in session.trials]
    return [run.write_trial(r.session, r.trial, r.facts, r.record) for r in run_session(session, owed, FakeEngine)]


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_trial_comes_back_as_it_was_written(tmp_path: Path, smoke_session: Session) -> None:
    run = Run(tmp_path / "run", IDENTITY)
    results = list(run_session(smoke_session, [smoke_session.trials[0].name], FakeEngine))
    path = run.write_trial("s", "t", results[0].facts, results[0].record)
    facts, record = read_trial(path)
    pd.testing.assert_frame_equal(record.requests, results[0].record.requests, check_exact=True)
    pd.testing.assert_frame_equal(record.steps, results[0].record.steps, check_exact=True)
    pd.testing.assert_frame_equal(record.tokens, results[0].record.tokens, check_exact=True)
    assert facts["seed"] == smoke_session.seed
    assert {*FILES, MANIFEST} == {entry.name for entry in path.iterdir()}
    assert subprocess.run(["sha256sum", "-c", MANIFEST], cwd=path, capture_output=True, check=False).returncode == 0


def test_a_sealed_run_is_a_valid_bag_and_never_changes(tmp_path: Path, smoke_session: Session) -> None:
    run = Run(tmp_path / "run", IDENTITY)
    fill(run, smoke_session)
    bag = run.seal(run.open_trials(), {"plan.json": "{}\n"}, {"External-Identifier": "x"})
    assert bag is not None
    bagit.Bag(str(bag)).validate()
    assert subprocess.run(["sha256sum", "--quiet", "-c", "manifest-sha256.txt"], cwd=bag, check=False).returncode == 0
    assert not run.open.exists()
    assert run.complete() == {(smoke_session.name, trial.name) for trial in smoke_session.trials}
    before = files(tmp_path)
    assert run.seal(run.open_trials(), {}, {}) is None
    assert files(tmp_path) == before


def test_more_replicates_make_a_second_bag(tmp_path: Path, smoke_session: Session) -> None:
    run = Run(tmp_path / "run", IDENTITY)
    fill(run, smoke_session)
    run.seal(run.open_trials(), {}, {})
    result = next(run_session(smoke_session, ["pass-0"], FakeEngine))
    run.write_trial("another", "pass-0", result.facts, result.record)
    run.seal(run.open_trials(), {}, {})
    assert [bag.name for bag in run.bags()] == [f"bag-{run.id}-1", f"bag-{run.id}-2"]


def test_only_what_is_asked_for_is_sealed_and_the_rest_stays_open(tmp_path: Path, smoke_session: Session) -> None:
    run = Run(tmp_path / "run", IDENTITY)
    fill(run, smoke_session)
    result = next(run_session(smoke_session, ["pass-0"], FakeEngine))
    rest = run.write_trial("another", "pass-0", result.facts, result.record)
    run.note_schedule({"planned": "now"})
    before = {path: path.read_bytes() for path in rest.iterdir()}
    bag = run.seal([path for path in run.open_trials() if path != rest], {}, {})
    assert bag is not None
    assert {path.name for path in bag.glob("data/trials/*")} == {smoke_session.name}
    assert run.open_trials() == [rest]
    assert {path: path.read_bytes() for path in rest.iterdir()} == before
    assert run.schedules() == []  # they are in the bag
    assert ("another", "pass-0") in run.complete()


def test_a_copy_of_a_bag_by_another_name_is_no_bag_of_the_run(tmp_path: Path, smoke_session: Session) -> None:
    run = Run(tmp_path / "run", IDENTITY)
    fill(run, smoke_session)
    bag = run.seal(run.open_trials(), {}, {})
    assert bag is not None
    for name in (f"{bag.name}.orig", f"bag-{run.id}-old", f"{bag.name}-copy"):
        shutil.copytree(bag, run.folder / name)
    assert run.bags() == [bag]
    assert run.complete() == {(smoke_session.name, trial.name) for trial in smoke_session.trials}


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("damage", ["change", "remove", "truncate"])
def test_a_damaged_trial_does_not_count(tmp_path: Path, smoke_session: Session, name: str, damage: str) -> None:
    run = Run(tmp_path / "run", IDENTITY)
    path = fill(run, smoke_session)[0]
    data = (path / name).read_bytes()
    if damage == "remove":
        (path / name).unlink()
    else:
        (path / name).write_bytes(data[:-1] if damage == "truncate" else bytes([data[0] ^ 1]) + data[1:])
    assert not trial_is_whole(path)
    assert (smoke_session.name, path.name) not in run.complete()
    assert not path.exists()
    assert any(run.open.glob("damaged-*/*"))  # kept for whoever wants to know why
    result = next(run_session(smoke_session, [path.name], FakeEngine))
    assert run.write_trial(smoke_session.name, path.name, result.facts, result.record) == path


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", IDENTITY)
    with run.locked(), pytest.raises(SpecError, match="another run is writing here"), Run(run.folder, IDENTITY).locked():
        pass
    with run.locked():
        pass


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpecError, match=r"OUT: .*file/run"), Run(tmp_path / "file" / "run", IDENTITY).locked():
        pass


def test_another_format_is_refused(tmp_path: Path, smoke_session: Session) -> None:
    path = fill(Run(tmp_path / "run", IDENTITY), smoke_session)[0]
    text = (path / "trial.json").read_text().replace('"format": 1', '"format": 0')
    (path / "trial.json").write_text(text)
    with pytest.raises(SpecError, match="format: got 0; allowed: record format 1, which this version reads"):
        read_trial(path)


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from fakes import FakeEngine
from experiments.spec.expand import expand
from experiments.spec.spec import load_figure, load_testbed
from experiments.engine.session import run_session
from experiments.records.store import Run
session = expand(load_figure("smoke"), load_testbed("cpu"))[0]
run = Run(Path(sys.argv[1]), {identity!r})
with run.locked():
    done = run.complete()
    owed = [trial.name for trial in session.trials if (session.name, trial.name) not in done]
    for result in run_session(session, owed, FakeEngine):
        run.write_trial(result.session, result.trial, result.facts, result.record)
        print("ran", result.trial, flush=True)
    run.seal(run.open_trials(), {{"plan.json": "{{}}"}}, {{}})
"""


def test_killed_at_any_moment_the_same_command_completes(tmp_path: Path, smoke_session: Session) -> None:
    script = WRITER.format(tests=str(Path(__file__).parents[1]), identity=IDENTITY)
    whole = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "whole")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    expected = {name.split("/", 1)[1] for name in files(tmp_path / "whole")}
    order, started = random.Random(1), time.monotonic()
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "timed")], cwd=ROOT, capture_output=True, check=True)
    duration = time.monotonic() - started
    for attempt in range(6):
        folder = tmp_path / f"killed-{attempt}"
        process = subprocess.Popen([sys.executable, "-c", script, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        time.sleep(order.uniform(0.4, 1.0) * duration)
        os.kill(process.pid, signal.SIGKILL)
        first = process.communicate()[0].split("\n")
        second = subprocess.run(
            [sys.executable, "-c", script, str(folder)], cwd=ROOT, capture_output=True, text=True, check=True
        )
        ran = [line for line in (*first, *second.stdout.split("\n")) if line]
        assert len(ran) == len(set(ran)), "a finished trial was run twice"
        assert {name.split("/", 1)[1] for name in files(folder)} == expected
        bagit.Bag(str(next(folder.glob("bag-*")))).validate()
    assert whole.stdout.count("ran") == len(smoke_session.trials)
