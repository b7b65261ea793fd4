"""Bags that are mutated at random: no command ends in a traceback, and none gives a PASS that the whole bag does not have.

make fuzz: 2,000 of them. Half are sealed again, as a hostile hand would, so that nothing but the check of what is read stands.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bagit
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import serving_run

from analysis.judge import archive, verify
from analysis.show import export, report, summary
from experiments.records.store import Run as Store
from experiments.records.store import to_json

MUTATIONS = int(os.environ.get("FUZZ", "40"))
INFO = {"External-Identifier": "fig9b-cpu-01234567"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sealed run of Figure 9b on the fake engine, two replicates of one model."""
    folder, made = tmp_path_factory.mktemp("fuzz"), serving_run(replicates=2)
    model = made.models[0]
    trials = [trial for trial in made.trials if trial.facts["model"] == model]
    names = {trial.facts["session"]: [] for trial in trials}
    store = Store(folder / "fig9b-cpu", {"experiments": "x"})
    for trial in trials:
        names[trial.facts["session"]].append(trial.facts["trial"])
        store.write_trial(trial.facts["session"], trial.facts["trial"], trial.facts, trial.record)
    slot = {"session": trials[0].facts["session"], "node": "node-1", "start_s": 0.0, "end_s": 9.0}
    schedule = {"planned": "2026-01-01T00:00:00+00:00", "slots": [slot], "machines": {}, "nodes": {}}
    plan = {**made.plan, "identity": store.identity, "sessions": names}
    store.seal(store.open_trials(), {"plan.json": to_json(plan), "schedules.json": to_json([schedule])}, INFO)
    return folder


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key and index in a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, own in inner for found in ((*path, key), *places(own, (*path, key)))]


def nested() -> Any:
    value: Any = 0
    for _ in range(900):
        value = [value]
    return value


VALUES: list[Callable[[], Any]] = [
    lambda: None, lambda: True, lambda: -1, lambda: 0, lambda: 1e300, lambda: 10**30, lambda: 10**400, lambda: float("nan"),
    lambda: float("-inf"), lambda: "", lambda: "42", lambda: "x" * 100_000, lambda: "\x1b]0;x\x07\n", lambda: "../../../x",
    lambda: "/etc/passwd", list, dict, lambda: [[]], lambda: {"a": {}}, nested, lambda: list(range(2000)),
]  # fmt: skip


def mutate_json(path: Path, order: random.Random) -> None:
    data = json.loads(path.read_text())
    where = order.choice(places(data))
    place = data
    for key in where[:-1]:
        place = place[key]
    if order.random() < 0.3:
        del place[where[-1]]
    else:
        place[where[-1]] = order.choice(VALUES)()
    path.write_text(json.dumps(data))


def mutate_table(path: Path, order: random.Random) -> None:
    csv = path.suffix == ".csv"
    table = pd.read_csv(path) if csv else pd.read_parquet(path)
    column, row = order.choice(list(table.columns)), order.randrange(len(table))
    kind = order.randrange(7)
    if kind == 0:
        table = table.drop(columns=column)
    elif kind == 1:
        table = table.drop(index=order.sample(range(len(table)), order.randint(1, len(table))))
    elif kind == 2:
        table[column] = table[column].astype(order.choice(["float32", "str", "object", "bool"]))
    elif kind == 3:
        table = pd.concat([table, table.iloc[[row]]])
    elif kind == 4:
        table = table.rename(columns={column: order.choice(["x", "", "request", "\x1b[31m"])})
    else:
        value = order.choice([-1, 10**9, 2**62, float("nan"), float("inf"), 1e300])
        table[column] = table[column].astype("float64") if isinstance(value, float) else table[column]
        table.loc[row, column] = table[column].dtype.type(value)
    if csv:
        table.to_csv(path, index=False)
    else:  # pandas writes no Parquet in which a column is there twice
        pq.write_table(pa.Table.from_arrays([pa.array(column) for _, column in table.items()], list(table.columns)), path)


def mutate_bytes(path: Path, order: random.Random) -> None:
    data = path.read_bytes()
    cut, more = order.randrange(len(data) + 1), order.randbytes(order.randint(1, 9))
    path.write_bytes(
        order.choice([data + more, data[:cut], data[:cut] + more + data[cut:], data[:cut] + more + data[cut + 9 :], b""])
    )


def mutate(bag: Path, order: random.Random) -> str:
    """Change one thing in one file, or drop it; whether it is sealed again, and how it was changed, in words."""
    seal = order.random() < 0.6
    files = sorted(path for path in (bag / "data" if seal else bag).rglob("*") if path.is_file())
    documents = [path for path in files if path.parent == bag / "data"]
    path = order.choice(documents if documents and order.random() < 0.3 else files)
    ways: list[Callable[[Path, random.Random], object]] = [mutate_bytes, lambda path, _: path.unlink()]
    ways += [mutate_json] * 6 if path.suffix == ".json" else [mutate_table] * 6 if path.suffix in (".csv", ".parquet") else []
    way = order.choice(ways)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        way(path, order)
    if seal:
        for own in bag.iterdir():
            if own.name != "data":
                own.unlink()
        for own in (bag / "data").iterdir():
            shutil.move(own, bag / own.name)
        (bag / "data").rmdir()
        bagit.make_bag(str(bag), INFO, checksums=["sha256"])
    return f"{way.__name__} of {path.relative_to(bag)}, {'sealed again' if seal else 'as it is'}"


def passes(folder: Path) -> set[str]:
    verdict = json.loads((folder / "verdict.json").read_text())
    return {entry["id"] for entry in verdict["claims"] if entry["verdict"] == "PASS"}


@pytest.mark.timeout(0)  # make fuzz takes 20 minutes
def test_no_mutated_bag_ends_in_a_traceback_or_passes_more(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify.main(["--runs", str(runs), "--report", str(tmp_path / "whole")]) in (0, 2)
    allowed = passes(tmp_path / "whole")
    assert allowed
    capsys.readouterr()
    for number in range(MUTATIONS):
        order, folder = random.Random(number), tmp_path / str(number)
        shutil.copytree(runs, folder / "runs")
        bag = next((folder / "runs").glob("*/bag-*"))
        what = f"{number}: {mutate(bag, order)}"
        trial = next((path for path in sorted(bag.glob("data/trials/*/*")) if path.is_dir()), bag)
        given, out = ["--runs", str(folder / "runs")], ["--report", str(folder / "report")]
        commands = [
            (verify.main, [*given, *out]), (summary.main, ["fig9b", *given, *out]),
            (archive.main, [*given, *out, "--target", str(folder / "package.zip")]),
            (export.main, [str(trial), "--out", str(folder / "export.json")]),
        ]  # fmt: skip
        if number % 8 == 0:  # drawing takes longer than all else
            commands.append((report.main, [*given, *out]))
        for main, options in commands:
            try:
                status = main(options)
            except BaseException as error:
                raise AssertionError(f"{what}: {main.__module__}: {error!r}") from error
            said = capsys.readouterr()
            assert status in (0, 1, 2), (what, main.__module__, said.err[-2000:])
            assert said.err.count("\n") <= 1, (what, said.err)
            assert "\x1b" not in said.out + said.err, what
            assert "although the bag is whole" not in said.err + said.out, (what, said)
        if (folder / "report" / "verdict.json").is_file():
            assert passes(folder / "report") <= allowed, what
        assert {path.name for path in folder.iterdir()} <= {"runs", "report", "package.zip", "export.json"}, what
        shutil.rmtree(folder)
