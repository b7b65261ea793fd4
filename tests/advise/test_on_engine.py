"""Advice for any model on this machine's engine: on made-up GPUs where it is placed, on the CPU the whole path."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fake_smi import NVSWITCH, Links, card, cards_here, matrix
from known_engine import KNOWN
from test_recommend import simulated_loads

from analysis.advise import case as case_module
from analysis.advise import recommend
from analysis.advise.on_engine import dtype_of, is_own, own, weights_of
from experiments.calibrate import here
from experiments.records.errors import SpecError
from experiments.simulator import estimate
from experiments.simulator.calibration import Profile, ValidRange
from experiments.simulator.simulator import SimulatedEngine
from experiments.spec.expand import Session
from experiments.spec.spec import EngineSettings, load_model, load_testbed
from experiments.spec.workload import synthetic_trace

H100, L40S, A10 = ("NVIDIA H100 80GB HBM3", 81559), ("NVIDIA L40S", 46068), ("NVIDIA A10", 23028)
PAIRS: Links = {(0, 2): 12, (1, 3): 12}
BIG = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}  # 70B
TINY = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 64}


def model(folder: Path, **others: Any) -> str:
    """A folder with the config.json of a model that no YAML file of ours names."""
    folder.mkdir(exist_ok=True)
    others = {"num_key_value_heads": min(8, others["num_attention_heads"]), "vocab_size": 32000, **others}
    (folder / "config.json").write_text(json.dumps(load_model("qwen3-14b") | others))
    return str(folder)


def asked(model: str, tp: str = "", max_len: str = "", dtype: str = "") -> argparse.Namespace:
    return argparse.Namespace(model=model, tp=tp, max_len=max_len, dtype=dtype)


@pytest.mark.parametrize(
    ("cards", "links", "tp", "size", "words"),
    [
        ([H100] * 8, NVSWITCH, "4", 4, "tensor parallel on GPUs 0,1,2,3, joined by NVLink"),
        ([H100] * 8, NVSWITCH, "8", 8, "tensor parallel on GPUs 0,1,2,3,4,5,6,7, joined by NVLink"),
        ([H100] * 4, PAIRS, "4", 4, "tensor parallel on GPUs 0,2,1,3, not joined by NVLink: what they exchange goes over PCIe"),
        ([L40S] * 4, {}, "", 4, "tensor parallel on GPUs 0,1,2,3, not joined by NVLink"),  # the fewest that hold it
    ],
)
def test_a_large_model_is_placed_by_the_topology(
    cards: list[Any], links: Links, tp: str, size: int, words: str,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    listed = [card(*one, 4, number, "9.0") for number, one in enumerate(cards)]
    with cards_here(tmp_path, listed, matrix(len(cards), links), monkeypatch):
        found = own(asked(model(tmp_path / "big", **BIG), tp), load_testbed("gpu"), [])
    assert found.settings.tensor_parallel == size
    assert (found.settings.dtype, found.settings.weights, found.settings.max_model_len) == ("bfloat16", "dummy", 8192)
    said = " ".join(capsys.readouterr().out.split())
    assert f"model {tmp_path}/big: bfloat16, weights dummy (no safetensors beside its config.json); {words}" in said
    assert " GiB per GPU for the KV cache" in said


def test_links_and_lengths_are_a_part_of_what_a_calibration_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is the machine; the path of the model is not, but for its last part."""
    paths = [
        model(tmp_path / name / "big", **BIG) for name in ("", "elsewhere") if (tmp_path / name).mkdir(exist_ok=True) is None
    ]
    called = []
    for links in (NVSWITCH, {}):
        listed = [card(*H100, 4, number, "9.0") for number in range(8)]
        with cards_here(tmp_path, listed, matrix(8, links), monkeypatch):
            wanted = [asked(path, "4", length) for path in paths for length in ("", "32768")]
            called += [own(one, load_testbed("gpu"), []).called[-12:] for one in wanted]
    assert called[:2] == called[2:4]
    assert called[4:6] == called[6:]
    assert len(set(called)) == 4


@pytest.mark.parametrize(
    ("cards", "options", "line"),
    [
        ([(L40S, 4)] * 4, {"tp": "8"}, "TP: got 8; allowed: 1, 2, 4, by the GPUs that are free here"),
        ([(H100, 4)] * 3 + [(H100, 60000)] * 5, {"tp": "4"}, "TP: got 4; allowed: 1, 2, by the GPUs that are free here"),
        ([(H100, 4)] * 4, {"tp": "3"}, "TP: got 3; allowed: 1, 2, 4, 8, which divide the 64 heads"),
        ([(A10, 4)] * 2, {}, r"\S*: GPU memory: got .* use shorter prompts, or more or larger GPUs"),
        ([(H100, 4)] * 4, {"max_len": "1000000"}, "MAX_LEN: got '1000000'; allowed: a whole number from 64 to 40,960"),
        ([(H100, 4)] * 4, {"dtype": "float32"}, "DTYPE: got float32; allowed: bfloat16, float16, fp8 on testbed gpu"),
    ],
)
def test_what_cannot_be_placed_is_one_line(
    cards: list[Any], options: dict[str, str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = [card(*one, used, number, "9.0") for number, (one, used) in enumerate(cards)]
    big = model(tmp_path / "big", **BIG)
    with (
        cards_here(tmp_path, listed, matrix(len(cards), {}), monkeypatch),
        pytest.raises(SpecError, match=f"^{line}") as raised,
    ):
        own(asked(big, **options), load_testbed("gpu"), [])
    assert "\n" not in str(raised.value)


def test_a_testbed_that_lets_only_nvlink_pass_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed, bed = [card(*H100, 4, number, "9.0") for number in range(4)], load_testbed("gpu-80g-pair")
    with cards_here(tmp_path, listed, matrix(4, PAIRS), monkeypatch):
        assert own(asked("mistral-7b", "2"), bed, []).place == ("nvlink-0-2", "gpu-0", "gpu-2")
        with pytest.raises(SpecError, match=r"^TP: got 4; allowed: 1, 2, by the GPUs that are free here, joined by NVLink$"):
            own(asked("mistral-7b", "4"), bed, [])


def test_without_its_machine_a_model_is_refused_with_the_way_on(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"^MODEL: got .*: no NVIDIA GPU; GPU= answers without one, see GPU=help$"):
        own(asked(model(tmp_path, **TINY)), load_testbed("gpu"), ["no NVIDIA GPU"])


def test_what_is_a_figures_own_stays_so() -> None:
    bed = load_testbed("a100")
    assert not is_own(asked("mistral-7b"), bed)
    assert all(is_own(one, bed) for one in (asked("mistral-7b", tp="2"), asked("mistral-7b", max_len="16384"), asked("x")))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["model.safetensors"], None),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], None),
        ([], "dummy (no safetensors beside its config.json)"),
        (["model-00002-of-00002.safetensors"], "dummy (1 of 2 safetensors are there)"),
    ],
)
def test_real_weights_are_taken_where_all_of_them_are_there(files: list[str], words: str | None, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "gone.safetensors").symlink_to("nowhere")  # as a download that was broken off leaves it
    found = weights_of(tmp_path / "config.json")
    assert found == (("dummy", words) if words else (str(tmp_path), f"real, of {tmp_path}"))


def test_weights_in_fp8_stay_so() -> None:
    fp8 = {"quantization_config": {"quant_method": "fp8"}}
    assert dtype_of(fp8, load_testbed("gpu"), "") == "fp8"
    for bed, dtype in (("gpu", "bfloat16"), ("cpu", "")):
        with pytest.raises(SpecError, match=r"^DTYPE: got \w+ of a model whose weights are fp8; allowed: "):
            dtype_of(fp8, load_testbed(bed), dtype)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[EngineSettings, str]]:
    """A known engine in the place of the real one; what it was started with to be calibrated, and on which GPUs."""
    started: list[tuple[EngineSettings, str]] = []

    @contextmanager
    def engines(settings: list[EngineSettings], environment: dict[str, str]) -> Iterator[list[Any]]:
        (one,) = settings
        started.append((one, environment.get("CUDA_VISIBLE_DEVICES", "")))
        wide = {"decode": Profile((0, 512), (0.0, 6e-2)), "linear": Profile((1, 16384), (0.0, 2.9))}
        asked = {"models": (one.model,), "tensor_parallel": one.tensor_parallel}
        covered = ValidRange(16384, 512, 10**9, 10**8)
        known = SimulatedEngine(one, replace(KNOWN, **wide, **asked, valid=covered), 5, 4000 if environment else None)
        yield [partial(lambda engine, function, *words: function(engine, *words), known)]

    def known(session: Session) -> Session:
        path = max((tmp_path / "here").iterdir(), key=lambda path: path.stat().st_mtime)
        return replace(session, engine=replace(session.engine, calibration=str(path)))

    monkeypatch.setattr(here, "engines", engines)
    monkeypatch.setattr(estimate, "HERE", tmp_path / "here")
    monkeypatch.setattr(recommend, "problems", lambda *_: [])
    monkeypatch.setattr(recommend, "serve_loads", lambda sessions, trace: simulated_loads([*map(known, sessions)], trace))
    monkeypatch.setattr(case_module, "LEAST", 128)
    return started


def test_any_model_is_calibrated_once_and_confirmed(
    engine: list[tuple[EngineSettings, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = model(tmp_path / "tiny", **TINY), model(tmp_path / "copy", **TINY)
    ask = ["--testbed=cpu", f"--out={tmp_path}", f"--report={tmp_path}", "TBT_P99=0.2", "--max-len=4096"]
    assert recommend.main([*ask, f"--model={first}"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "float32, weights dummy" in said
    assert "is new here: first a calibration" in said
    assert said.count("measured here, ") == 3
    assert f"vllm serve {first} " in said
    assert "--max-model-len 512 " in said
    ((settings, _),) = engine
    assert (settings.max_model_len, settings.max_budget, settings.max_batch) == (512, 512, 32)
    (path,) = (tmp_path / "here").glob("cpu-*tiny-*.yaml")
    assert recommend.main([*ask, f"--model={first}/config.json"]) == 0
    assert len(engine) == 1  # kept
    (Path(second) / "config.json").write_text(json.dumps(load_model(f"{first}/config.json") | {"num_hidden_layers": 4}))
    assert recommend.main([*ask, f"--model={second}"]) == 0
    assert len(engine) == 2  # another model
    path.write_text("half")
    assert recommend.main([*ask, f"--model={first}"]) == 2
    assert capsys.readouterr().err.endswith("; delete it, and it is made anew\n")


def test_a_model_that_is_too_large_for_the_machine_is_refused_before_it_is_loaded(
    engine: list[tuple[EngineSettings, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = model(tmp_path / "big", **BIG | {"num_hidden_layers": 4000})
    for options, line in (
        ([], "error: MODEL: got "),
        (["--tp=2"], "error: TP: got 2; allowed: 1 on testbed cpu"),
        (["--dtype=fp8"], "error: DTYPE: got fp8; allowed: float32, bfloat16, float16 on testbed cpu"),
        (["--max-len=100"], "error: MAX_LEN: got '100'; allowed: a whole number from 512 to 131,072"),
    ):
        assert recommend.main(["--testbed=cpu", f"--report={tmp_path}", f"--model={huge}", *options, "--", "TBT_P99=1"]) == 2
        assert capsys.readouterr().err.startswith(line)
    assert not engine


def test_on_gpus_it_is_calibrated_where_it_is_placed(
    engine: list[tuple[EngineSettings, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The whole path on made-up cards that bridges join in pairs: engines for TP=2 get a pair, for TP=4 what is there."""
    tiny, listed = model(tmp_path / "tiny", **TINY), [card(*H100, 4, number, "9.0") for number in range(4)]
    ask = ["--testbed=gpu", f"--out={tmp_path}", f"--report={tmp_path}", f"--model={tiny}", "TBT_P99=0.5"]
    with cards_here(tmp_path, listed, matrix(4, PAIRS), monkeypatch):
        assert recommend.main([*ask, "--tp=2"]) == 0
        assert recommend.main([*ask, "--tp=4"]) == 0
    assert [(settings.tensor_parallel, numbers) for settings, numbers in engine] == [(2, "0,2"), (4, "0,2,1,3")]
    assert {settings.max_budget for settings, _ in engine} == {8192}
    said = capsys.readouterr().out
    assert said.count("measured here, ") == 6
    assert "--tensor-parallel-size 4 --dtype bfloat16 " in said
    answer = json.loads(next(tmp_path.glob("recommend-gpu-*tiny.json")).read_text())
    assert answer["settings"]["tensor_parallel"] == 4


def test_a_server_that_runs_is_no_reason_to_calibrate(engine: list[tuple[EngineSettings, str]], tmp_path: Path) -> None:
    mine = own(asked(model(tmp_path / "tiny", **TINY)), load_testbed("cpu"), [])
    with pytest.raises(
        SpecError, match=r"tiny: got no calibration of its engine here; make recommend without BENCH= makes one$"
    ):
        mine.case(synthetic_trace(), make=False)
    assert not engine
