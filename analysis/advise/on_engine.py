"""A case on this machine's engine of any model, which no YAML file names: calibrated when it is first asked about."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from analysis.advise.case import Case, case_for
from analysis.advise.on_gpu import MOST_BATCH, whole
from experiments.calibrate.gpu import LARGEST, LONGEST, check_split, model_of, splits
from experiments.machine.gpus import NVLINK, devices, places, resources
from experiments.records.errors import SpecError
from experiments.records.provenance import gpus, machine, usable
from experiments.records.terminal import paragraph
from experiments.simulator import estimate
from experiments.simulator.calibration import load_calibration, weight_bytes
from experiments.simulator.memory import SHARE, gpu_memory
from experiments.spec.expand import Session
from experiments.spec.spec import EngineSettings, ServingFigure, Testbed, load_figure, load_model, model_path, slug
from experiments.spec.traces import Trace

LEAST = 64  # tokens of the shortest context that is calibrated
HOST_GIB = 10.0  # of the host's memory, for each GPU: a process with vLLM
DTYPES = {"cpu": ("float32", "bfloat16", "float16"), "cuda": ("bfloat16", "float16", "fp8")}


@dataclass(frozen=True)
class Own:
    """A model as it is asked about: its name for `vllm serve`, and what is to be started where; `place`: see gpus.places.

    `max_len`: prompt + output in the trace's tokens, before the testbed's scale.
    """

    name: str
    settings: EngineSettings
    max_len: int
    place: tuple[str, ...]
    testbed: Testbed

    @property
    def called(self) -> str:
        """What its calibration is called, with the testbed: by content, as a path says little. GPUs without NVLink have their
        own."""
        settings, loose = self.settings, len(self.place) > 1 and not self.place[0].startswith(NVLINK)
        lengths = settings.max_model_len, settings.max_budget, settings.max_batch
        asked = json.dumps([estimate.made_on(settings), lengths, loose], sort_keys=True)
        return f"{slug(Path(self.name).name).lower()[-24:]}-{hashlib.sha256(asked.encode()).hexdigest()[:12]}"

    def case(self, trace: Trace, make: bool) -> Case:
        """Simulated with this machine's calibration; `make` one where there is none. Raises SpecError."""
        settings, testbed, figure = self.settings, self.testbed, load_figure("fig9b")
        assert isinstance(figure, ServingFigure)
        if (path := estimate.calibration_here(testbed.testbed, settings, self.called)) is None:
            if not make:
                raise SpecError(f"{self.name}: got no calibration of its engine here; make recommend without BENCH= makes one")
            from experiments.calibrate.here import calibrate  # not before: what fits takes long to import

            paragraph(f"{self.name} is new here: first a calibration of its engine, a minute and more")
            longest = settings.max_model_len
            path = calibrate(settings, longest, testbed.testbed, estimate.HERE, self.called, testbed.nvlink)
        session = Session(
            name=f"{self.name}-{testbed.testbed}",
            figure=figure.figure,
            kind=figure.kind,
            testbed=testbed.testbed,
            model=self.name,
            in_paper=False,
            scale=testbed.scale,
            seed=figure.seeds[0],
            engine=settings,
            trials=(),
            time_limit_s=(testbed.serving or figure).time_limit_s,
            memory_gib=_host_gib(settings, testbed),
            nvlink=testbed.nvlink,
        )
        calibration = replace(load_calibration(str(path)), models=(settings.model,))  # wherever the same config.json lay then
        return case_for(session, calibration, trace, self.max_len)


def is_own(options: argparse.Namespace, testbed: Testbed) -> bool:
    """Whether what is asked is not of Figure 9's engines on the testbed."""
    return options.model not in testbed.models or bool(options.tp or options.max_len or options.dtype)


def own(options: argparse.Namespace, testbed: Testbed, missing: Sequence[str]) -> Own:
    """What the options ask of the testbed's engine, and say it. `missing`: what keeps this machine from running that.

    Raises SpecError: what, what came, what is allowed.
    """
    config, name = model_of(testbed.models.get(options.model, options.model))
    if missing:
        came = f"MODEL: got {options.model!r}, of which testbed {testbed.testbed} measures its engine, and here there is none"
        raise SpecError(f"{came}: {missing[0]}; GPU= answers without one, see GPU=help")
    path, shape, figure = model_path(config), load_model(config), load_figure("fig9b")
    if not shape.get("architectures"):
        raise SpecError(f"{path}: architectures: got none; allowed: a list of one, as in the config.json of a text model")
    most = min(shape["max_position_embeddings"] * testbed.scale, LONGEST)
    max_len = whole("MAX_LEN", options.max_len, min(figure.max_model_len, most), most, LEAST * testbed.scale)
    length, batch, (weights, told) = max_len // testbed.scale, max(1, MOST_BATCH // testbed.scale), weights_of(path)
    settings = EngineSettings(
        platform=testbed.platform,
        model=config,
        tensor_parallel=1,
        dtype=dtype_of(shape, testbed, options.dtype),
        weights=weights,
        max_budget=max(min(length, LARGEST), 2 * batch),
        max_batch=batch,
        max_model_len=length,
        threads=testbed.threads,
        kv_cache_gib=testbed.kv_cache_gib,
        gpu_memory_utilization=testbed.gpu_memory_utilization,
    )
    settings, place, memory = _placed(settings, shape, testbed, whole("TP", options.tp, 0, 8))
    paragraph(f"model {name}: {settings.dtype}, weights {told}{_where(place)}{memory and f'; {memory}'}")
    return Own(name, settings, max_len, place, testbed)


def dtype_of(shape: Mapping[str, Any], testbed: Testbed, asked: str) -> str:
    """Raises SpecError for one that the platform or the model's weights have not."""
    fp8 = (shape.get("quantization_config") or {}).get("quant_method") == "fp8"
    allowed = [name for name in DTYPES[testbed.platform] if not fp8 or name == "fp8"]
    dtype = asked or ("fp8" if fp8 else testbed.dtype)
    if dtype not in allowed:
        of = " of a model whose weights are fp8" if fp8 else ""
        raise SpecError(f"DTYPE: got {dtype}{of}; allowed: {', '.join(allowed) or 'no fp8'} on testbed {testbed.testbed}")
    return dtype


def weights_of(config: Path) -> tuple[str, str]:
    """dummy, or the folder that holds the model's real weights, whole; and that in words."""
    folder = config.parent
    names = [path.name for path in folder.glob("*.safetensors") if path.exists()]  # a link that leads nowhere: not fetched
    parts = [int(found[1]) for name in names if (found := re.search(r"-of-(\d+)\.safetensors$", name))]
    if names and config.name == "config.json" and len(names) >= max(parts, default=1):
        return str(folder), f"real, of {folder}"
    why = f"{len(names)} of {max(parts)} safetensors are there" if parts else "no safetensors beside its config.json"
    return "dummy", f"dummy ({why})"


def _host_gib(settings: EngineSettings, testbed: Testbed) -> float:
    """Of the machine's memory that a session takes."""
    if settings.platform == "cuda":
        return HOST_GIB * settings.tensor_parallel
    return testbed.session_memory_gib + weight_bytes(load_model(settings.model), 1, settings.dtype) / 2**30


def _placed(
    settings: EngineSettings, shape: Mapping[str, Any], testbed: Testbed, asked: int
) -> tuple[EngineSettings, tuple[str, ...], str]:
    """On so many GPUs as are asked for, or 0: on the fewest that hold it. With its place and what it takes of their memory."""
    if testbed.platform == "cpu":
        if asked > 1:
            raise SpecError(f"TP: got {asked}; allowed: 1 on testbed {testbed.testbed}")
        if (needed := _host_gib(settings, testbed)) > (have := machine()["memory_gib"]):
            raise SpecError(f"MODEL: got {needed:.1f} GiB with its weights; allowed: {have} GiB, this machine's memory")
        return settings, (), ""
    here = resources()
    if asked:
        check_split(shape, asked)
    room = {size: found[0] for size in splits(shape) if (found := places(size, here, testbed.nvlink))}
    if asked and asked not in room:
        joined = ", joined by NVLink" * testbed.nvlink
        raise SpecError(f"TP: got {asked}; allowed: {', '.join(map(str, room))}, by the GPUs that are free here{joined}")
    mib, quant = usable(gpus())[0]["memory_mib"], (shape.get("quantization_config") or {}).get("quant_method")
    known = mib and quant in (None, "fp8")  # of others vLLM will tell
    for size in [asked] if asked else room:
        one = replace(settings, tensor_parallel=size)
        try:
            return one, room[size], gpu_memory(one, SHARE * 2**20 * mib).told if known else ""
        except SpecError as error:
            reason = error
    raise reason  # of the most GPUs


def _where(place: tuple[str, ...]) -> str:
    """On which GPUs, in words; nothing on the CPU."""
    if not (numbers := devices(place)):
        return ""
    if numbers.isdecimal():
        return f"; on GPU {numbers}"
    loose = "not joined by NVLink: what they exchange goes over PCIe, slower, and is measured so"
    joined = "joined by NVLink" if place[0].startswith(NVLINK) else loose
    return f"; tensor parallel on GPUs {numbers}, {joined}"
