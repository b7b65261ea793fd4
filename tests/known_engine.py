"""A calibration like that of the real engine on the CPU, for tests that need a known one."""

from __future__ import annotations

from experiments.calibrate.here import settings_of
from experiments.simulator.calibration import Calibration, Jitter, Loop, Profile, ValidRange, attention_of, load_calibration
from experiments.spec.spec import load_testbed

SETTINGS, DECODING = settings_of(load_testbed("cpu"))["mistral-7b-w8"]
KNOWN = Calibration(  # an engine like the real one on the CPU
    calibration="known",
    title="made up",
    models=(SETTINGS.model,),
    tensor_parallel=1,
    sources=("made up",),
    overhead_s=8e-3,
    linear=Profile((1, 2048), (0.0, 0.36)),
    decode=Profile((0, 16), (0.0, 2e-3)),
    attention=attention_of(SETTINGS.model, 1, SETTINGS.dtype, 9e10, 0.0, 4e9),
    jitter=Jitter(0.04, 0.01, 0.3, decode_sigma=0.08),
    loop=Loop(between_s=4e-5, request_s=5e-4, wake_s=5e-3),
    valid=ValidRange(2048, 16, 3_000_000, 40_000),
    error=load_calibration("a100-mistral-7b").error,
    block_size=128,
    fixed_by={},
)
