"""The cost model by hand and at its limits; calibrations against the data behind them; fits against a known model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from experiments.records.errors import SpecError
from experiments.simulator.calibration import (
    CALIBRATIONS,
    Attention,
    Calibration,
    FitError,
    Jitter,
    Profile,
    ValidRange,
    kv_bytes_per_token,
    linear_flop_per_token,
    load_calibration,
    weight_bytes,
)
from experiments.simulator.cost_model import CostModel, jitter_factors
from experiments.simulator.simulator import simulated_engine
from experiments.spec.spec import EngineSettings, load_model

YI = EngineSettings("cuda", "yi-34b", 2, "float16", "dummy", 2048, 128, 8192, None, None, 0.85)
MISTRAL = replace(YI, model="mistral-7b", tensor_parallel=1)
TOY = Calibration(
    calibration="toy",
    title="a toy",
    models=("mistral-7b",),
    tensor_parallel=1,
    sources=("made up",),
    overhead_s=1.0,
    linear=Profile((1, 100, 200), (0.0, 10.0, 40.0)),
    decode=Profile((0, 10), (0.0, 5.0)),
    attention=Attention(flop_per_pair=4.0, flop_per_s=2000.0, masked_share=0.0, kv_bytes_per_token=8.0, kv_bytes_per_s=4000.0),
    jitter=Jitter(0.0),
    valid=ValidRange(tokens=200, decode_tokens=10, prefill_pairs=50_000, decode_context=10_000),
    error=FitError(0.0, 0.0, 0.0, "nothing"),
    block_size=16,
    fixed_by={},
)


def test_step_by_hand() -> None:
    model = CostModel(TOY)
    # overhead 1 + linear half way between 10 and 40 + decode 2 of 10 requests + 1000 pairs x 2 ms + 300 tokens x 2 ms
    assert model.step(148, 2, 1, 1000, 300) == pytest.approx(1.0 + 25.0 + 1.0 + 2.0 + 0.6)
    assert model.step(0, 1, 0, 0, 50) == pytest.approx(1.0 + 0.0 + 0.5 + 0.1)


def test_the_host_is_hidden_where_the_device_takes_longer() -> None:
    """Alone, 5 decodes take what the host needs; beside a chunk that takes longer they take what the device needs for them."""
    model = CostModel(replace(TOY, host=Profile((0, 5, 10), (0.0, 7.0, 9.0))))
    assert model.step(0, 5, 0, 0, 50) == 7.0  # the device: 1 + 2.5 and a little
    assert model.step(0, 1, 0, 0, 50) == pytest.approx(1.0 + 0.0 + 0.5 + 0.1)  # the device, as the host needs 1.4
    assert model.step(145, 5, 1, 1000, 300) == CostModel(TOY).step(145, 5, 1, 1000, 300)
    with pytest.raises(SpecError, match=r"host\.at: got a profile to 5; allowed: at least to the end of the valid range, 10"):
        CostModel(replace(TOY, host=Profile((0, 5), (0.0, 7.0))))


def test_masked_pairs_cost_their_share() -> None:
    """A first piece of n tokens has n(n+1)/2 pairs below the diagonal, and n(n-1)/2 above it."""
    whole = CostModel(replace(TOY, attention=replace(TOY.attention, masked_share=1.0)))
    assert whole.step(100, 0, 1, 5050, 0) == pytest.approx(1.0 + 10.0 + 100 * 100 * 0.002)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ((201, 0, 1, 0, 0), "tokens in a step: got 201; allowed: at most 200"),
        ((0, 11, 0, 0, 11), "requests that decode in a step: got 11; allowed: at most 10"),
        ((10, 0, 1, 50_001, 0), "query-key pairs of prefill attention in a step: got 50001; allowed: at most 50000"),
        ((0, 1, 0, 0, 10_001), "tokens of decode context in a step: got 10001; allowed: at most 10000"),
    ],
)
def test_outside_the_valid_range(step: tuple[int, int, int, int, int], message: str) -> None:
    model = CostModel(TOY)
    with pytest.raises(SpecError, match=f"^calibration toy: {message}$"):
        model.step(*step)


def test_profile_must_reach_the_end_of_the_range() -> None:
    with pytest.raises(
        SpecError, match=r"linear\.at: got a profile to 200; allowed: at least to the end of the valid range, 201"
    ):
        CostModel(replace(TOY, valid=replace(TOY.valid, tokens=201)))


def test_missing_coefficient_and_malformed_profile(tmp_path: Path) -> None:
    data = yaml.safe_load((CALIBRATIONS / "a100-mistral-7b.yaml").read_text())
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in data.items() if key != "overhead_s"}))
    with pytest.raises(SpecError, match="overhead_s: missing; it must be given"):
        load_calibration(str(path))
    del data["attention"]["flop_per_s"]
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(SpecError, match=r"attention.flop_per_s: missing; it must be given"):
        load_calibration(str(path))
    path.write_text(yaml.safe_dump(data | {"decode": {"at": [0, 9, 9], "seconds": [0.0, 1.0, 2.0]}}))
    with pytest.raises(SpecError, match=r"decode: got .*; allowed: as many seconds as counts, counts rising from 0 or 1"):
        load_calibration(str(path))


def test_model_without_calibration() -> None:
    with pytest.raises(SpecError, match="calibrations: got none for mistral-7b; allowed: a testbed that names one"):
        simulated_engine(MISTRAL, seed=1)
    with pytest.raises(SpecError, match="got mistral-7b on 2 GPUs; allowed: mistral-7b on 1"):
        simulated_engine(replace(MISTRAL, tensor_parallel=2, calibration="a100-mistral-7b"), seed=1)
    with pytest.raises(
        SpecError, match="no such file; there are: a100-2024-mistral-7b, a100-2024-yi-34b-tp2, a100-mistral-7b, "
    ):
        load_calibration("h100")


def test_shapes_by_hand() -> None:
    yi, mistral = load_model("yi-34b"), load_model("mistral-7b")
    assert linear_flop_per_token(mistral) == 2 * 32 * (4096 * (32 + 8 + 8 + 32) * 128 + 3 * 4096 * 14336)
    assert weight_bytes(mistral, 1, "float16") == pytest.approx(7.24e9 * 2, rel=0.001)  # 7.24 billion weights
    assert weight_bytes(yi, 2, "float16") == pytest.approx(34.4e9, rel=0.001)  # 34.4 billion, half of them on each GPU
    assert kv_bytes_per_token(yi, 2, "float16") == 2 * 128 * 4 * 60 * 2


def test_jitter_does_not_depend_on_how_it_is_drawn() -> None:
    jitter = Jitter(sigma=0.1, tail_share=0.01, tail_excess=2.0)
    whole = jitter_factors(jitter, 7, 0, 1000)
    parts = [jitter_factors(jitter, 7, first, count) for first, count in ((0, 1), (1, 2), (3, 500), (503, 497))]
    assert np.concatenate(parts).tolist() == whole.tolist()
    assert jitter_factors(jitter, 8, 0, 3).tolist() != whole[:3].tolist()
    assert jitter_factors(Jitter(0.0), 7, 0, 5).tolist() == [1.0] * 5


def test_jitter_distribution() -> None:
    plain = jitter_factors(Jitter(0.1), 1, 0, 200_000)
    assert plain.mean() == pytest.approx(1.0, abs=0.001)
    assert np.log(plain).std() == pytest.approx(0.1, rel=0.01)
    late = jitter_factors(Jitter(0.0, 0.05, 2.0), 1, 0, 200_000)
    assert np.mean(late > 1) == pytest.approx(0.05, rel=0.03)
    assert late[late > 1].mean() == pytest.approx(3.0, rel=0.03)


def test_yi_goes_through_its_steps_and_not_through_the_outlier() -> None:
    model = CostModel(load_calibration("a100-2024-yi-34b-tp2"))
    assert model.step(512, 0, 1, 512 * 513 // 2, 0) == pytest.approx(0.10558, rel=1e-4)
    assert model.step(0, 64, 0, 0, 64 * 1024) == pytest.approx(0.12781, rel=1e-4)
    assert model.step(256, 0, 1, 256 * 257 // 2, 0) < 0.08  # published: 0.121, the first step of its run
