"""A record that could not have happened is refused where it is read, in one line that names bag, trial and what is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fakes import serving_run, tiny_record
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.records.documents import FACTS, PLAN, SCHEDULES, Settings, read_document
from experiments.records.errors import SpecError
from experiments.records.record import Record
from experiments.records.store import Run, read_trial
from experiments.records.tables import contradiction
from experiments.spec.spec import EngineSettings

PHASES = [{"role": "probe"}, {"role": "point", "budget": 8, "requests": 3}, {"role": "probe"}]


def edited(table: str, column: str, row: int, value: Any) -> Callable[[Record], Record]:
    def edit(record: Record) -> Record:
        changed = getattr(record, table).copy()
        changed.loc[row, column] = value
        return dataclasses.replace(record, **{table: changed})

    return edit


def without(table: str, row: int) -> Callable[[Record], Record]:
    return lambda record: dataclasses.replace(record, **{table: getattr(record, table).drop(row).reset_index(drop=True)})


def as_type(table: str, column: str, kind: str) -> Callable[[Record], Record]:
    return lambda record: dataclasses.replace(record, **{table: getattr(record, table).astype({column: kind})})


def swapped(table: str, column: str) -> Callable[[Record], Record]:
    """The columns in another order."""
    return lambda record: dataclasses.replace(record, **{table: getattr(record, table).set_index(column).reset_index()})


BROKEN: list[tuple[Callable[[Record], Record], str]] = [
    (lambda record: dataclasses.replace(record, tokens=record.tokens.iloc[::2].reset_index(drop=True)), "number of its tokens"),
    (without("tokens", 3), "generated_tokens is not the number of its tokens"),
    (without("steps", 0), "last_step|last token|beyond"),
    (without("steps", 6), "a step beyond the 6 there are"),
    (without("requests", 4), "of a request beyond the 4"),
    (without("requests", 0), "not numbered in their order"),
    (edited("requests", "first_step", 1, 7), "a step beyond"),
    (edited("requests", "first_step", 1, -2), "first_step: got -2"),
    (edited("requests", "first_step", 1, -1), "finished before it was scheduled"),
    (edited("requests", "last_step", 1, 0), "finished before it was scheduled"),
    (edited("requests", "last_step", 1, 3), "last token not at the end"),
    (edited("requests", "generated_tokens", 1, 4), "more tokens than asked for"),
    (edited("requests", "phase", 3, 3), "a phase beyond the 3|phases out of order"),
    (edited("requests", "phase", 3, 2), "in the phases; trial.json says"),
    (edited("requests", "budget", 1, 16), "another budget"),
    (edited("requests", "arrival_s", 1, 5.5), "out of order"),
    (edited("requests", "arrival_s", 1, float("nan")), "arrival_s: got nan"),
    (edited("requests", "injected_s", 1, 0.5), "injected before its arrival"),
    (edited("requests", "injected_s", 2, 1.9), "scheduled before it was injected"),
    (edited("requests", "prompt_tokens", 1, 0), "prompt_tokens: got 0"),
    (edited("requests", "prompt_tokens", 1, 11), "prefill_tokens in all"),
    (edited("steps", "seconds", 1, float("inf")), "seconds: got"),
    (edited("steps", "seconds", 1, -1.0), "seconds: got"),
    (edited("steps", "start_s", 2, 0.5), "starts out of order"),
    (edited("steps", "decode_tokens", 3, 1), "decode_tokens in all"),
    (edited("steps", "budget", 1, 10**15), "budget: got"),
    (edited("tokens", "time_s", 2, 0.1), "times out of order"),
    (edited("tokens", "time_s", 7, 7.0), "last token not at the end"),
    (edited("tokens", "request", 7, 9), "of a request beyond"),
    (as_type("requests", "phase", "float64"), "columns: got"),
    (as_type("tokens", "request", "int32"), "columns: got"),
    (swapped("steps", "seconds"), "columns: got"),
]


@pytest.mark.parametrize(("spoil", "said"), BROKEN)
def test_what_cannot_be_is_named(spoil: Callable[[Record], Record], said: str) -> None:
    assert contradiction(tiny_record(), PHASES) is None
    found = contradiction(spoil(tiny_record()), PHASES)
    assert found is not None
    assert any(words in found for words in said.split("|")), found


def test_a_truncated_record_and_one_without_rows_can_be() -> None:
    record = tiny_record()
    requests = record.requests.iloc[:2].copy()
    requests.loc[1, ["generated_tokens", "last_step"]] = [2, -1]
    cut = Record(requests, record.steps.iloc[:4], record.tokens.iloc[[0, 1, 3]].reset_index(drop=True), truncated=True)
    assert contradiction(cut, PHASES) is None
    assert contradiction(dataclasses.replace(cut, truncated=False), PHASES) is not None
    empty = Record(record.requests.iloc[:0], record.steps.iloc[:0], record.tokens.iloc[:0], truncated=True)
    assert contradiction(empty, PHASES) is None


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    trial = serving_run(replicates=1).trials[0]
    store = Run(tmp_path / "fig9b-cpu", {"figure": "fig9b"})
    return store.write_trial(trial.facts["session"], trial.facts["trial"], trial.facts, trial.record)


def rewrite(path: Path, name: str, column: str, value: Any) -> None:
    table = pd.read_parquet(path / name)
    table[column] = value
    table.to_parquet(path / name, index=False)


SPOILT: list[Callable[[Path], object]] = [
    lambda path: (path / "requests.csv").write_text("request\n0\n"),
    lambda path: (path / "requests.csv").write_text((path / "requests.csv").read_text().replace("\n0,", "\n0,7,", 1)),
    lambda path: (path / "requests.csv").write_bytes((path / "requests.csv").read_bytes() + b"9" * 400),
    lambda path: (path / "steps.parquet").write_bytes((path / "steps.parquet").read_bytes() + b"x"),
    lambda path: (path / "steps.parquet").write_bytes((path / "steps.parquet").read_bytes()[:-9]),
    lambda path: rewrite(path, "tokens.parquet", "request", "a text"),
    lambda path: rewrite(path, "tokens.parquet", "request", None),
    lambda path: pd.read_parquet(path / "tokens.parquet").to_parquet(path / "tokens.parquet", index=False, compression="gzip"),
    lambda path: pd.read_parquet(path / "tokens.parquet").set_index("request").to_parquet(path / "tokens.parquet"),
    lambda path: (path / "tokens.parquet").unlink(),
    lambda path: (path / "trial.json").unlink(),
]


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_file_that_is_not_as_written_is_one_line_with_bag_and_trial(stored: Path, spoil: Callable[[Path], object]) -> None:
    read_trial(stored)
    spoil(stored)
    with pytest.raises(SpecError) as caught:
        read_trial(stored)
    assert str(Path(*stored.parts[-5:])) in str(caught.value)
    assert "\n" not in str(caught.value)


FACT_EDITS: list[tuple[str, Any]] = [
    ("figure", "../../x"), ("session", "a/b"), ("trial", "\x1b]0;x\x07"), ("seed", "42"), ("seed", -1), ("seed", 1.5),
    ("scale", True), ("started", "yesterday"), ("started", "2026-01-01T00:00:00"), ("phases", []), ("phases", {}),
    ("phases", [{"role": "probe"}]), ("engine", {"engine": "x", "calibration": "y"}), ("truncated", 0), ("trace", []),
    ("engine", {"engine": "x", "calibration": "y", "calibration_error": {"held_out": -0.1}}),
    ("engine", {"engine": "x", "calibration": "y", "calibration_error": {"held_out": float("nan")}}),
    ("machine", {"type": "x", "gpus": "A100"}), ("format", 2), ("note", "x" * 5000), ("note", 10**40), ("note", float("inf")),
    ("note", json.loads("[" * 50 + "]" * 50)),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), FACT_EDITS)
def test_facts_are_bounded(stored: Path, key: str, value: Any) -> None:
    facts = json.loads((stored / "trial.json").read_text())
    (stored / "trial.json").write_text(json.dumps(facts | {key: value}))
    with pytest.raises(SpecError) as caught:
        read_trial(stored)
    assert "trial.json: " in str(caught.value)
    assert str(caught.value).isprintable()


def test_settings_are_those_of_an_engine(stored: Path) -> None:
    assert set(Settings.__annotations__) == {field.name for field in dataclasses.fields(EngineSettings)}
    facts = json.loads((stored / "trial.json").read_text())
    facts["settings"]["more"] = 1
    (stored / "trial.json").write_text(json.dumps(facts))
    with pytest.raises(SpecError, match="not more"):
        read_trial(stored)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 900 + "]" * 900, "[" * 100_000, '{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}', '{"a": 1, "a": 2}',
     '{"a": ' + "9" * 5000 + "}", '"\\ud800"', "\xff", " " * 2_000_000, "7", "null"],
)  # fmt: skip
def test_no_text_is_a_traceback(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text, encoding="latin-1")
    for shape in (FACTS, PLAN, SCHEDULES):
        with pytest.raises(SpecError, match=r"plan\.json: ") as caught:
            read_document(tmp_path / "plan.json", shape)
        assert str(caught.value).isprintable()


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150, deadline=None)
@given(data=st.data())
def test_any_value_in_place_of_any_other_is_read_or_refused(data: st.DataObject, stored: Path) -> None:
    facts = json.loads((stored / "trial.json").read_text())
    before = json.dumps(facts)
    key = data.draw(st.sampled_from(sorted(facts)))
    place = facts[key] if isinstance(facts[key], dict) and data.draw(st.booleans()) else facts
    place[data.draw(st.sampled_from(sorted(place)))] = data.draw(PLAIN)
    try:
        (stored / "trial.json").write_text(json.dumps(facts))
        with contextlib.suppress(SpecError):
            read_trial(stored)
    finally:
        (stored / "trial.json").write_text(before)
