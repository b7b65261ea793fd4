"""Calibrations of any model on any GPU: what is refused, how a model is named, how wide an answer gets."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.calibrate import end_to_end, gpu, tables
from experiments.calibrate.gpu import check, grid_of, model_of, with_known_error
from experiments.calibrate.tables import calibrated
from experiments.records.errors import SpecError
from experiments.simulator.cost_model import CostModel
from experiments.simulator.memory import GIB
from experiments.spec.spec import MODELS, load_model, read_yaml

KNOWN = {"a100_sxm": ("0.14.0", 79.25 * GIB), "h100_sxm": ("0.24.0", 79.19 * GIB)}
ROWS = read_yaml(tables.CALIBRATIONS / tables.ROWS)["models"]["mistral-7b"]
needs_tables = pytest.mark.skipif(find_spec("aiconfigurator_core") is None, reason="the kernel tables are not installed")


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "tables", lambda: KNOWN)


def config(folder: Path, **others: Any) -> str:
    (path := folder / "config.json").write_text(json.dumps(load_model("mistral-7b") | others))
    return str(path)


def test_a_model_is_ours_an_id_a_folder_or_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    path, own = config(tmp_path), "mistralai/Mistral-7B-Instruct-v0.2"
    assert model_of("mistral-7b") == model_of(own) == ("mistral-7b", own)
    assert model_of(path) == model_of(str(tmp_path)) == (path, str(tmp_path))
    line = (
        r"^MODEL: got .*; allowed: .*; a folder with its config.json does for any model, and so does an id after: hf download "
    )
    for text in ("no/model", ""):
        with pytest.raises(SpecError, match=line):
            model_of(text)
    Path(path).write_text('{"hidden_size": 8}')
    with pytest.raises(SpecError, match=rf"^MODEL: {path}: intermediate_size: got none"):
        model_of(str(tmp_path))


def test_what_is_allowed_is_not_refused_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in (("some--Plain", "LlamaForCausalLM"), ("some--Mamba", "MambaForCausalLM")):
        (tmp_path / f"{name}_config.json").write_text(json.dumps({"architectures": [kind]}))
    monkeypatch.setattr(gpu, "_configs", lambda: sorted(tmp_path.iterdir()))
    with pytest.raises(SpecError, match="some/Plain") as raised:
        model_of("")
    assert "Mamba" not in str(raised.value)


@pytest.mark.parametrize(
    ("variable", "inside"), [("HF_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")]
)
def test_an_id_that_was_downloaded_is_known_by_what_was_downloaded(
    variable: str, inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its weights, where the id of one of ours would have dummy ones."""
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    for text in ("some/Model-1.5B", "mistralai/Mistral-7B-Instruct-v0.2"):
        folder = tmp_path / inside / f"models--{text.replace('/', '--')}"
        for name in ("refs", "snapshots/12ab"):
            (folder / name).mkdir(parents=True)
        (folder / "refs" / "main").write_text("12ab")
        assert model_of("mistral-7b")[0] == "mistral-7b"
        path = config(folder / "snapshots" / "12ab")
        assert model_of(text) == (path, text)


@pytest.mark.parametrize(
    ("shape", "asked", "words"),
    [
        ({}, ("v100", 1, "bfloat16"), "GPU: got 'v100'; allowed: a100_sxm (79 GiB), h100_sxm (79 GiB)"),
        ({}, ("h100_sxm", 3, "bfloat16"), "TP: got 3; allowed: 1, 2, 4, 8, which divide the 32 heads"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 4},
            ("h100_sxm", 8, "bfloat16"),
            "TP: got 8; allowed: 1, 2, 4, which",
        ),
        ({}, ("h100_sxm", 1, "int4"), "DTYPE: got int4; allowed: bfloat16, float16, fp8, as the tables have them"),
        ({"quantization_config": {"quant_method": "awq"}}, ("h100_sxm", 1, "bfloat16"), "MODEL: got weights in awq; allowed:"),
        ({"architectures": ["MambaForCausalLM"]}, ("h100_sxm", 1, "bfloat16"), "MODEL: MambaForCausalLM: got layers that"),
        ({"architectures": None}, ("h100_sxm", 1, "bfloat16"), "MODEL: none: got layers that"),
    ],
)
@pytest.mark.usefixtures("known")
def test_what_the_tables_have_not_is_one_line(
    shape: dict[str, Any], asked: tuple[str, int, str], words: str, tmp_path: Path
) -> None:
    with pytest.raises(SpecError) as raised:
        check(config(tmp_path, **shape), *asked)
    assert str(raised.value).startswith(words)
    assert "\n" not in str(raised.value)


def test_nothing_is_asked_beyond_what_was_measured() -> None:
    grid = grid_of(131072, 8192)
    assert max(grid.operators) == max(n for n, _ in grid.prefill) == 8192
    assert max(n + before for n, before in grid.prefill) == max(at for _, at in grid.decode) == 131072
    assert max(grid_of(8192, 16384).operators) == 16384


def test_a_calibration_is_widened_by_what_is_known_of_such() -> None:
    rows = ROWS | {"operators": [row for row in ROWS["operators"] if row[0] <= 8192], "prefill": ROWS["prefill"][:7]}
    rows["held_out"] = [row for row in ROWS["held_out"] if row[0] <= 8192]
    asked = {"models": ("mistral-7b",), "tensor_parallel": 1, "sources": ("made up",), "gpu": "a100_sxm", "fixed_by": {}}
    made = calibrated(rows, "bfloat16", calibration="made-up", title="", **asked)
    assert (made.valid.tokens, made.gpu) == (8192, "a100_sxm")
    assert made.error.held_out < 0.03
    with pytest.raises(SpecError, match="tokens in a step: got 8193; allowed: at most 8192"):
        CostModel(made).step(8193, 0, 1, 0, 0)
    errors = read_yaml(gpu.PUBLIC)["errors"].values()
    mixture = {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 8}
    dense, experts = (with_known_error(made, shape).error for shape in (load_model("mistral-7b"), mixture))
    assert dense.end_to_end == pytest.approx(max(0.157, *errors), abs=0.01)
    assert (dense.small_steps, experts.small_steps) == (None, 1.0)


def test_the_public_measurements_are_those_of_the_file() -> None:
    stored = read_yaml(gpu.PUBLIC)
    assert len({value["source"] for value in stored["values"]}) >= 3
    for name, error in stored["errors"].items():
        own = [abs(value["off"]) for value in stored["values"] if value["quantity"] == name]
        assert error == pytest.approx(sum(own) / len(own), abs=1e-4)
    for value in stored["values"]:
        assert value["off"] == pytest.approx(value["predicted"] / value["measured"] - 1, abs=1e-3)


@needs_tables
def test_a_calibration_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "FOLDER", tmp_path)
    first = gpu.calibration_of("mistral-7b", "h100_sxm", 2, "bfloat16")
    (path,), (rows,) = tmp_path.glob("*.yaml"), tmp_path.glob("*.rows")
    assert set(yaml.safe_load(rows.read_text())) == {"operators", "prefill", "decode", "held_out"}
    monkeypatch.setattr(gpu, "rows_of", None)
    assert gpu.calibration_of("mistral-7b", "h100_sxm", 2, "bfloat16") == first
    assert first.calibration == path.stem
    assert first.error.held_out < 0.1


@needs_tables
def test_a_quantization_that_a_gpu_has_not_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "FOLDER", tmp_path)
    with pytest.raises(
        SpecError, match=r"^GPU=a100_sxm TP=1 DTYPE=fp8: got a shape of which there is no table \(.*\); allowed: another"
    ):
        gpu.calibration_of("mistral-7b", "a100_sxm", 1, "fp8")


@needs_tables
def test_a_public_measurement_is_predicted_as_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "FOLDER", tmp_path)
    row = next(value for value in read_yaml(gpu.PUBLIC)["values"] if value["clients"] == 4)
    assert end_to_end.predicted(row) == pytest.approx(row["predicted"], rel=1e-3)


def test_ids_of_our_models_are_unique() -> None:
    sources = [read_yaml(path)["_source"] for path in MODELS.glob("*.json")]
    assert len({*sources}) == len(sources)
