"""Fits cost-model coefficients to published A100 measurements, and writes calibrations.

Figure 9a's own data are not among them; docs/simulator.md says for each parameter what fixed it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.optimize import nnls

from experiments.records.store import write_whole
from experiments.simulator.calibration import (
    CALIBRATIONS,
    Attention,
    Calibration,
    FitError,
    Floats,
    Ints,
    Jitter,
    Profile,
    ValidRange,
    attention_of,
    linear_flop_per_token,
)
from experiments.simulator.cost_model import CostModel, composition
from experiments.spec.spec import load_model, read_yaml

DATA = CALIBRATIONS / "published" / "a100-2024.yaml"
END_TO_END = CALIBRATIONS.parent / "reference" / "end_to_end.yaml"
LONGEST_PROFILE = 16384  # tokens; the longest step of Figure 9


def _affine(work: Floats, seconds: Floats) -> tuple[float, float]:
    """Constant and slope of seconds over work, both >= 0, by least squares on relative errors."""
    fit, _ = nnls(np.stack([1.0 / seconds, work / seconds], axis=1), np.ones_like(seconds))
    return float(fit[0]), float(fit[1])


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _column(data: Mapping[str, Any], name: str) -> Floats:
    return np.array(data[name], dtype=np.float64)


def _attention(published: Mapping[str, Any], model: str, tensor_parallel: int, dtype: str) -> Attention:
    """Rates of the attention kernels. The constant part, a launch per layer, belongs to the overhead and is left out.

    The kernel takes as long for the triangle of a prompt's first piece as for the whole square: counting masked pairs, relative
    residuals average 7 %; not counting them, 18 %. So masked_share is 1.
    """
    prefill, decode = published["attention_prefill"], published["attention_decode"]
    square = _column(prefill, "tokens") * (_column(prefill, "context") + _column(prefill, "tokens"))
    flop = square * 4.0 * prefill["head_dim"] * prefill["query_heads"]
    read = _column(decode, "requests") * _column(decode, "context") * 2 * decode["kv_heads"] * decode["head_dim"] * 2
    flop_per_s = _rounded(1.0 / _affine(flop, _column(prefill, "ms_per_layer") / 1e3)[1])
    kv_bytes_per_s = _rounded(1.0 / _affine(read, _column(decode, "ms_per_layer") / 1e3)[1])
    return attention_of(model, tensor_parallel, dtype, flop_per_s, 1.0, kv_bytes_per_s)


def published_jitter(published: Mapping[str, Any]) -> Jitter:
    """Sigma of the log from the one step that was published twice: |log ratio| / sqrt(2), the difference of two draws."""
    steps, again = published["yi_prefill_steps"], published["yi_repeated_step"]
    first = steps["ms"][steps["tokens"].index(again["tokens"])]
    return Jitter(sigma=_rounded(abs(np.log(again["ms"] / first)) / np.sqrt(2)))


def _operators(published: Mapping[str, Any]) -> tuple[Ints, Floats]:
    """Yi-34B's operators by CodeLlama-34B's profile: per layer x layers x ratio of the models' FLOPs; tokens and seconds.

    Beyond the profile's end, cost per token stays as there (Llama-3-8B's, which goes on, varies by 1 % from 4,096 to 16,384).
    """
    profile, yi = published["codellama_34b_tp2_linear"], load_model("yi-34b")
    layers = profile["shape"]["num_hidden_layers"] * linear_flop_per_token(yi) / linear_flop_per_token(profile["shape"])
    tokens, seconds = np.array(profile["tokens"]), _column(profile, "ms_per_layer") / 1e3 * layers
    beyond = np.array([8192, LONGEST_PROFILE])
    return np.concatenate([tokens, beyond]), np.concatenate([seconds, seconds[-1] * beyond / tokens[-1]])


def _yi_linear(measured: Ints, seconds: Floats, operators: tuple[Ints, Floats]) -> Profile:
    """The profile bent to go through the measured steps: their ratio to it (1 at one token), interpolated over log tokens."""
    tokens, shape = operators
    ratio = seconds / np.interp(measured, tokens, shape)
    bent = shape * np.interp(np.log(tokens), np.log([1, *measured]), [1.0, *ratio])
    return rounded_profile(tokens, bent)


def _header(published: Mapping[str, Any], model: str) -> dict[str, Any]:
    header: dict[str, Any] = published["headers"][model]
    lists = {key: tuple(header[key]) for key in ("models", "sources")}
    return header | lists | {"valid": ValidRange(**header["valid"])}


def rounded_profile(at: Ints, seconds: Floats) -> Profile:
    return Profile(tuple(int(n) for n in at), tuple(round(float(s), 8) for s in seconds))


def _errors(model: CostModel, published: Mapping[str, Any], kind: str) -> list[float]:
    """Relative, of Yi-34B's published steps that only prefill, or only decode."""
    steps = published[f"yi_{kind}_steps"]
    if kind == "prefill":
        asked = [composition(n, 0, 0, 0) for n in steps["tokens"]]
    else:
        asked = [composition(0, 0, n, steps["context"]) for n in steps["requests"]]
    return [model.step(*step) * 1e3 / ms - 1 for step, ms in zip(asked, steps["ms"], strict=True)]


def calibrate_yi(published: Mapping[str, Any]) -> Calibration:
    """Yi-34B at tensor parallel size 2 from its own prefill and decode steps; see docs/simulator.md for every parameter."""
    attention, operators = _attention(published, "yi-34b", 2, "float16"), _operators(published)
    prefill, decode = published["yi_prefill_steps"], published["yi_decode_steps"]
    tokens, total = np.array(prefill["tokens"]), _column(prefill, "ms") / 1e3
    requests, decoding = np.array(decode["requests"]), _column(decode, "ms") / 1e3
    read = requests * decode["context"] * attention.kv_bytes_per_token / attention.kv_bytes_per_s
    overhead = float(decoding[0] - operators[1][0] - read[0])  # one request: next to nothing but overhead and weights
    own = total - overhead - attention.flop_per_pair / attention.flop_per_s * tokens.astype(np.float64) ** 2
    linear, most = _yi_linear(tokens, own, operators), int(requests[-1])

    def host_profile(keep: Ints) -> Profile:  # nothing decodes: nothing is known of the host, and prefill steps hold it
        return rounded_profile(np.array([0, *requests[keep]]), np.array([0.0, *decoding[keep]]))

    draft = Calibration(
        **_header(published, "yi-34b"),
        overhead_s=round(overhead, 8),
        linear=linear,
        decode=Profile((0, most), (0.0, 0.0)),
        attention=attention,
        jitter=published_jitter(published),
        error=FitError(0.0, 0.0, 0.0, ""),
        host=host_profile(np.arange(len(requests))),
    )
    fitted = [off for kind in ("prefill", "decode") for off in _errors(CostModel(draft), published, kind)]
    out = []
    for i in range(1, len(tokens) - 1):  # each step but the first and last, left out of the profile in turn
        model = CostModel(replace(draft, linear=_yi_linear(np.delete(tokens, i), np.delete(own, i), operators)))
        out.append(_errors(model, published, "prefill")[i])
    for i in range(1, len(requests) - 1):
        model = CostModel(replace(draft, host=host_profile(np.delete(np.arange(len(requests)), i))))
        out.append(_errors(model, published, "decode")[i])
    return replace(draft, error=fit_error(fitted, out, "each published step but the first and last, left out in turn"))


def calibrate_mistral(published: Mapping[str, Any], yi: Calibration) -> Calibration:
    """Mistral-7B by recipe: operators x layers + attention + host overhead; no step of it is published.

    Its held-out error is the recipe's error on Yi-34B's prefill steps, where it can be checked.
    """
    profile, host = published["llama3_8b_tp1_linear"], published["host_overhead"]
    requests, host_ms = _column(host, "requests"), _column(host, "ms")
    fixed, per_request = _affine(requests, host_ms / 1e3)
    tokens = np.array(profile["tokens"])
    keep, layers = tokens <= LONGEST_PROFILE, load_model("mistral-7b")["num_hidden_layers"]
    recipe = CostModel(replace(yi, linear=rounded_profile(*_operators(published))))
    errors = list((fixed + per_request * requests) * 1e3 / host_ms - 1), _errors(recipe, published, "prefill")
    return Calibration(
        **_header(published, "mistral-7b"),
        overhead_s=round(fixed, 8),
        linear=rounded_profile(tokens[keep], _column(profile, "ms_per_layer")[keep] / 1e3 * layers),
        decode=Profile((0, 128), (0.0, round(128 * per_request, 8))),
        attention=_attention(published, "mistral-7b", 1, "float16"),
        jitter=yi.jitter,
        error=fit_error(*errors, "the same recipe on Yi-34B's published prefill steps"),
    )


def published_calibrations() -> list[Calibration]:
    """Those of the paper's engine."""
    yi = calibrate_yi(published := read_yaml(DATA))
    return [yi, calibrate_mistral(published, yi)]


def fit_error(fitted: Sequence[float], held_out: Sequence[float], on: str) -> FitError:
    figures = np.mean(np.abs(fitted)), np.max(np.abs(fitted)), np.mean(np.abs(held_out))
    mean, worst, out = (round(float(figure), 4) for figure in figures)
    return FitError(mean, worst, out, on)


def with_errors(calibration: Calibration) -> Calibration:
    """The calibration with its errors on whole requests, which experiments/calibrate/end_to_end.py has found."""
    errors = read_yaml(END_TO_END).get(calibration.calibration, {}).get("errors", {})
    return replace(calibration, error=replace(calibration.error, **errors))


def write(calibration: Calibration, path: Path) -> None:
    """Write a calibration as YAML that load_calibration reads back unchanged."""
    data = asdict(calibration)
    texts = {key: data.pop(key) for key in ("sources", "fixed_by")}
    parts = [yaml.safe_dump(data, sort_keys=False, width=120, default_flow_style=None)]  # short lists on one line
    parts.append(yaml.safe_dump(texts, sort_keys=False, width=120, default_flow_style=False))  # sentences one by one
    write_whole(path, "# Written by experiments/calibrate; see docs/simulator.md.\n" + "".join(parts))
