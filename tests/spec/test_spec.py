from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from experiments.records.errors import SpecError
from experiments.records.provenance import ROOT
from experiments.spec.expand import expand
from experiments.spec.spec import FIGURES, MODELS, TESTBEDS, load_figure, load_model, load_testbed

GOOD = yaml.safe_load((FIGURES / "fig9a.yaml").read_text())
SERVING = yaml.safe_load((FIGURES / "fig9b.yaml").read_text())
GOOD_TESTBED = yaml.safe_load((TESTBEDS / "cpu.yaml").read_text())


def changed(data: dict[str, Any], path: str, value: Any) -> str:
    data = copy.deepcopy(data)
    *keys, last = path.split(".")
    node: Any = data
    for key in keys:
        node = node[int(key)] if key.isdigit() else node[key]
    if value is KeyError:
        del node[last]
    else:
        node[int(last) if last.isdigit() else last] = value
    return yaml.safe_dump(data)


MALFORMED = {
    "unknown key": (changed(GOOD, "chunksize", 512), "chunksize: unknown key"),
    "unknown nested key": (changed(GOOD, "panels.0.color", "red"), "panels.0.color: unknown key"),
    "missing key": (changed(GOOD, "seeds", KeyError), "seeds: missing"),
    "text for a number": (changed(GOOD, "max_batch", "128"), "max_batch: got '128'"),
    "number for text": (changed(GOOD, "title", 9), "title: got 9"),
    "fraction": (changed(GOOD, "max_batch", 1.5), "max_batch: got 1.5"),
    "true for a number": (changed(GOOD, "max_batch", True), "max_batch: got True"),
    "zero chunk size": (changed(GOOD, "panels.0.chunk_sizes", [0]), "panels.0.chunk_sizes.0: got 0"),
    "negative chunk size": (changed(GOOD, "panels.1.chunk_sizes.1", -512), "panels.1.chunk_sizes.1: got -512"),
    "huge chunk size": (changed(GOOD, "panels.0.chunk_sizes.0", 10**12), "got 1000000000000"),
    "wrong word for a chunk size": (changed(GOOD, "panels.0.chunk_sizes.0", "whole"), "'whole'; allowed: a number of tokens"),
    "chunk size below the batch": (changed(GOOD, "panels.0.chunk_sizes.0", 64), "at least max_batch (128)"),
    "chunk size not divisible": (changed(GOOD, "panels.0.chunk_sizes.0", 513), "does not divide"),
    "prompt longer than the model": (changed(GOOD, "panels.0.prompt_lengths.3", 32768), "max_model_len (16384)"),
    "a list for a map": ("- 1\n- 2\n", "a list where a mapping"),
    "a map for a list": (changed(GOOD, "panels", {"a": 1}), "panels: got"),
    "empty list": (changed(GOOD, "seeds", []), "seeds: got []"),
    "empty file": ("", "an empty file"),
    "a tab": ("figure:\tfig9a\n\tkind: prefill\n", "line 1: not valid YAML"),
    "not YAML": ("figure: [fig9a\n", "not valid YAML"),
    "a key twice": ("figure: a\nfigure: b\n", "given twice"),
    "a seed twice": (changed(GOOD, "seeds", [42, 42]), "seeds: got [42, 42]; allowed: each once; 42 is there twice"),
    "a chunk size twice": (
        changed(GOOD, "panels.0.chunk_sizes", [512, 512]),
        "panels.0.chunk_sizes: got [512, 512]",
    ),
    "unchunked twice": (changed(GOOD, "panels.0.chunk_sizes", ["unchunked"] * 2), "each once; unchunked is there twice"),
    "a length twice": (changed(GOOD, "panels.1.prompt_lengths", [4096, 4096]), "panels.1.prompt_lengths: got [4096, 4096]"),
    "a model twice": (changed(GOOD, "panels", [GOOD["panels"][0]] * 2), "allowed: each once; yi-34b-200k is there twice"),
    "a QPS twice": (changed(SERVING, "panels.0.qps", [1.0, 1]), "panels.0.qps: got [1.0, 1]; allowed: each once; 1 is there"),
    "a QPS twice by name": (changed(SERVING, "panels.0.qps", [1.0, 1.0000001]), "allowed: each once; 1 is there twice"),
    "a serving chunk size twice": (changed(SERVING, "panels.1.chunk_sizes", [512, 512]), "panels.1.chunk_sizes: got [512"),
    "wrong kind": (changed(GOOD, "kind", "train"), "kind: got 'train'"),
    "a date": ("figure: 2024-01-01\n", "missing"),
    "itself": ("&a\nfigure: *a\n", "not a plain mapping"),
}


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_figure_is_one_line(case: str, tmp_path: Path) -> None:
    text, expected = MALFORMED[case]
    path = tmp_path / "figure.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as error:
        expand(load_figure(str(path)), load_testbed("cpu"), 1)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("figure", "expected"),
    [
        (b"\x00\xff\xfe\x80binary", "not text in UTF-8"),
        (b"figure: fig9a\n\tkind: x\n", "not valid YAML"),
        (b"- a\n", "a list where a mapping"),
        (MALFORMED["unknown key"][0].encode(), "unknown key"),
        (None, "no such file"),
    ],
)
def test_command_line_exits_2_and_writes_nothing(figure: bytes | None, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "figure.yaml"
    if figure is not None:
        path.write_bytes(figure)
    done = run(str(path), "--testbed", "cpu", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("platform", "tpu", "platform: got 'tpu'"),
        ("scale", 0, "scale: got 0"),
        ("scale", 7, "does not divide"),
        ("models", {"yi-34b-200k": "gpt-17"}, "unknown model 'gpt-17'"),
        ("models", {"other": "mistral-7b"}, "none of fig9a's models"),
        ("dtype", "int3", "dtype: got 'int3'"),
        ("replicates", 21, "replicates: got 21; allowed: 1 to 20"),
        ("max_prompt_length", 100, "no prompt length is within"),
        ("kv_cache_gib", float("inf"), "kv_cache_gib"),
    ],
)
def test_malformed_testbed_is_one_line(key: str, value: Any, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "testbed.yaml"
    path.write_text(yaml.safe_dump({**GOOD_TESTBED, key: value}))
    with pytest.raises(SpecError, match=r".") as error:
        expand(load_figure("fig9a"), load_testbed(str(path)))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text() | st.integers(),
        lambda s: st.lists(s) | st.dictionaries(st.text(), s),
    )
)
def test_any_yaml_is_a_spec_or_a_spec_error(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    path = tmp_path_factory.mktemp("spec") / "any.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(SpecError) as error:
        load_figure(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("testbed", sorted(path.stem for path in TESTBEDS.glob("*.yaml") if load_testbed(path.stem).models))
@pytest.mark.parametrize("figure", sorted(path.stem for path in FIGURES.glob("*.yaml")))
def test_every_figure_expands_on_every_testbed(figure: str, testbed: str) -> None:
    sessions = expand(load_figure(figure), load_testbed(testbed))
    assert [s.estimate_s for s in sessions] == sorted((s.estimate_s for s in sessions), reverse=True)
    assert len({s.name for s in sessions}) == len(sessions)


def test_fig9a_is_the_papers_grid_divided_by_eight() -> None:
    session = next(s for s in expand(load_figure("fig9a"), load_testbed("cpu")) if s.model == "yi-34b-200k" and s.seed == 42)
    assert [trial.name for trial in session.trials] == ["pass-0", "pass-1", "pass-2", "pass-3", "pass-4", "pass-0-repeat"]
    assert session.trials[0].points == session.trials[-1].points
    assert session.trials[0].points != session.trials[1].points  # another random order
    ran = {(point.prompt_tokens, point.budget) for point in session.trials[0].points}
    assert ran == {(tokens, budget) for tokens in (255, 511, 1023, 2047) for budget in (64, 128, 256, 2048)}
    assert session.engine.max_batch == 16


def test_the_order_of_points_depends_on_seed_and_model_only() -> None:
    one, two = (expand(load_figure("fig9a"), load_testbed("cpu")) for _ in range(2))
    assert one == two
    assert len({session.trials[0].points for session in one}) == len(one)


def test_models_keep_the_ratios_of_their_originals() -> None:
    for small in MODELS.glob("*-w8.json"):
        ours, theirs = load_model(small.stem), load_model(small.stem.removesuffix("-w8"))
        for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"):
            assert ours[key] * 8 == theirs[key], (small.stem, key)
        assert ours["head_dim"] == theirs["head_dim"]


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"hidden_size": None}, "hidden_size: got none"),
        ({"num_key_value_heads": "8"}, "num_key_value_heads: got '8'"),
        ({"num_experts": 8}, "num_experts_per_tok: got none"),
    ],
)
def test_a_config_without_what_is_needed_is_one_line(others: dict[str, Any], words: str, tmp_path: Path) -> None:
    (path := tmp_path / "config.json").write_text(json.dumps(load_model("mistral-7b") | others))
    with pytest.raises(SpecError) as error:
        load_model(str(path))
    assert str(error.value) == f"{path}: {words}; allowed: a whole number, as in the config.json of a text model"


def test_a_copy_of_a_figure_elsewhere_can_be_run_by_path(tmp_path: Path) -> None:
    shutil.copy(FIGURES / "smoke.yaml", tmp_path / "mine.yaml")
    done = run(str(tmp_path / "mine.yaml"), "--testbed", "cpu", "--plan", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "smoke: Smoke test" in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("figure", ["fig9a", "fig9b"])
def test_every_second_session_runs_the_order_of_the_one_before_backwards(figure: str) -> None:
    """So a steady drift puts each point as late in one session of a pair as it is early in the other."""
    sessions = {(s.model, s.seed): s for s in expand(load_figure(figure), load_testbed("cpu"), 6)}
    for model in {model for model, _ in sessions}:
        orders = [
            [(point, trial.name if figure == "fig9b" else "") for trial in session.trials[:-1] for point in trial.points]
            for (name, _), session in sorted(sessions.items())
            if name == model
        ]
        for first, second in zip(orders[0::2], orders[1::2], strict=True):
            assert second == first[::-1]
        assert orders[0] != orders[2]


@pytest.mark.parametrize(
    ("testbed", "limits"), [("cpu", {"serving": 120.0}), ("gpu-80g", {"serving": 7200.0}), ("a100", {"serving": 10800.0})]
)
def test_each_kind_of_figure_has_its_own_time_limit(testbed: str, limits: dict[str, float]) -> None:
    """A pass of 9a on a slow machine is not cut by what a serving trial may take."""
    found = {s.kind: s.time_limit_s for name in ("fig9a", "fig9b") for s in expand(load_figure(name), load_testbed(testbed), 1)}
    assert found == {"prefill": 1800.0} | limits
