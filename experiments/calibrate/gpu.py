"""A calibration of any model on any GPU that the kernel tables have, made when it is first asked for and kept."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from experiments.calibrate.published import END_TO_END, write
from experiments.calibrate.tables import (
    ENGINE,
    FIXED_BY,
    MEASURED,
    VERSION,
    Grid,
    calibrated,
    engine_handle,
    read_tables,
    source_of,
)
from experiments.records.errors import SpecError
from experiments.records.store import write_whole
from experiments.simulator.calibration import CALIBRATIONS, Calibration, load_calibration, mlp_of
from experiments.simulator.memory import GIB, REPORTED, SHARE
from experiments.spec.spec import MODELS, load_model, read_yaml

FOLDER = CALIBRATIONS / "tables"  # never in git
# Models whose every layer is attention over all that came before, and an MLP or experts: the name that the tables know them by.
NAMES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM")
PLAIN = {name: name for name in NAMES} | {"MistralForCausalLM": "LlamaForCausalLM"}  # the same layers
DTYPES = {"bfloat16": {}, "float16": {}, "fp8": {"gemm_quant_mode": "fp8", "moe_quant_mode": "fp8"}}
SPLITS = (1, 2, 4, 8)
CHANGED = {
    "linear": "the tables' operators but attention, all-reduce included, at sizes that were measured",
    "attention": "least squares on the same steps; beyond prompts of 16,384 tokens the package adds up pairs, as we do",
    "valid": "the largest step that was measured; pairs and context to 131,072 tokens where the model has them",
}
PUBLIC = END_TO_END.with_name("public.yaml")
LONGEST, LARGEST = 131072, 16384  # tokens of context and of a step


def package() -> Path:
    """Where the tables lie. Raises SpecError without them."""
    engine_handle()
    found = find_spec("aiconfigurator_core")
    assert found
    assert found.origin
    return Path(found.origin).parent


@cache
def tables() -> dict[str, tuple[str, float]]:
    """GPUs of which there are tables: the version of vLLM that the package answers for, and the bytes that CUDA reports."""
    systems, found = package() / "systems", {}
    versions = yaml.safe_load((systems / "query_versions.yaml").read_text())
    for path in sorted((systems / "data").iterdir()):
        name, known = path.name, versions["overrides"].get(path.name, {}).get(ENGINE) or versions["defaults"][ENGINE]
        if (path / "gemm" / ENGINE / known["current"]).is_dir():
            nominal = yaml.safe_load((systems / f"{name}.yaml").read_text())["gpu"]["mem_capacity"]
            found[name] = known["current"], float(REPORTED.get(name, 0) * GIB or SHARE * nominal)
    return found


def _plain(name: str) -> str:
    """A name without what does not change the shape: owner, Meta-, -Instruct, case."""
    return re.sub("^meta-|-instruct|-chat", "", name.rpartition("/")[2].lower())


def downloaded(name: str) -> Path | None:
    """The config.json of a Hugging Face id where huggingface_hub keeps what was downloaded; None if it was not."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    hub = os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME") or Path(cache, "huggingface"), "hub")
    folder = Path(hub).expanduser() / f"models--{name.replace('/', '--')}"
    main = folder / "refs" / "main"
    path = folder / "snapshots" / (main.read_text().strip() if main.is_file() else "none") / "config.json"
    return path if path.is_file() else None


def model_of(text: str) -> tuple[str, str]:
    """What load_model takes, and what `vllm serve` takes: of one of our models, a folder with a config.json, or one itself, a
    Hugging Face id that was downloaded, or that the tables or we know. Raises SpecError."""
    ours = {path.stem: read_yaml(path)["_source"] for path in sorted(MODELS.glob("*.json"))}
    ids = {name: found[1] for name, source in ours.items() if (found := re.match(r"config\.json of (\S+)", source))}
    shipped = {path.name.removesuffix("_config.json").replace("--", "/"): path for path in _configs()}
    if text in ours:
        return text, ids.get(text, text)
    for path in (Path(text), Path(text) / "config.json"):
        if text and path.name.endswith(".json") and path.is_file():
            try:
                load_model(str(path))
            except SpecError as error:
                raise SpecError(f"MODEL: {error}") from None
            return str(path), str(path.parent) if path.name == "config.json" else text
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", text)
    if is_id and (config := downloaded(text)):
        return str(config), text
    for name, known in ids.items():
        if known == text:
            return name, text
    for known, path in shipped.items():
        if _plain(known) == _plain(text):
            return str(path), text
    near = [known for known in shipped if _plain(known)[:4] == _plain(text)[:4]] or list(shipped)
    near = [known for known in near if (json.loads(shipped[known].read_text()).get("architectures") or [""])[0] in PLAIN]
    allowed = f"{', '.join([*ids, *near][:12])} and others; a folder with its config.json does for any model"
    raise SpecError(f"MODEL: got {text!r}; allowed: {allowed}, and so does an id after: hf download {text if is_id else 'ID'}")


def _configs() -> list[Path]:
    return sorted((package() / "model_configs").glob("*_config.json")) if find_spec("aiconfigurator_core") else []


def splits(shape: Mapping[str, Any]) -> list[int]:
    """The tensor parallel sizes that divide a model's heads, and the width of its MLP or experts."""
    heads, values, width = shape["num_attention_heads"], shape["num_key_value_heads"], mlp_of(shape)[2]
    return [n for n in SPLITS if heads % n == 0 and (values % n == 0 or n % values == 0) and width % n == 0]


def check_split(shape: Mapping[str, Any], split: int) -> None:
    """Raises SpecError for a tensor parallel size that is none of these."""
    if split not in (allowed := splits(shape)):
        sizes = ", ".join(map(str, allowed))
        raise SpecError(f"TP: got {split}; allowed: {sizes}, which divide the {shape['num_attention_heads']} heads")


def check(model: str, gpu: str, split: int, dtype: str) -> dict[str, Any]:
    """The shape of a model that the tables can be asked about. Raises SpecError: what, what came, what is allowed."""
    shape, known = load_model(model), tables()
    kind, quant = (shape.get("architectures") or ["none"])[0], (shape.get("quantization_config") or {}).get("quant_method")
    if gpu not in known:
        listed = ", ".join(f"{name} ({memory / GIB:.0f} GiB)" for name, (_, memory) in known.items())
        raise SpecError(f"GPU: got {gpu!r}; allowed: {listed}")
    if kind not in PLAIN:
        raise SpecError(f"MODEL: {kind}: got layers that this cost model has not; allowed: {', '.join(PLAIN)}")
    if dtype not in DTYPES or quant not in (None, "fp8"):
        name, came = ("DTYPE", dtype) if dtype not in DTYPES else ("MODEL", f"weights in {quant}")
        raise SpecError(f"{name}: got {came}; allowed: {', '.join(DTYPES)}, as the tables have them")
    check_split(shape, split)
    return shape


def grid_of(longest: int, covered: int) -> Grid:
    """Steps up to the largest that was measured, pieces of prompts and requests up to the longest context."""
    sizes = [n for n in (*MEASURED, 12288, 16384) if n <= covered]
    contexts = [n for n in (256, 1024, 4096, 16384, 65536, LONGEST) if n <= max(longest, 4096)]
    pieces = [(n, 0) for n in sizes if n >= 128]
    pieces += [(n, total - n) for n in (512, 2048, 8192) for total in (16384, 32768, 65536, LONGEST) if n < total <= longest]
    decode = [(n, at) for n in (1, 4, 16, 64, 128, 256, 1024) for at in contexts if n * at <= 2**22]
    mixed = [(n, decodes) for n in (256, 512, 1024, 2048) for decodes in (4, 16, 64, 256)]
    return Grid(sizes, pieces, decode, [*mixed, *((n, 0) for n in (640, 1536, 3072, 6144))])


def calibration_of(model: str, gpu: str, split: int, dtype: str) -> Calibration:
    """From the tables, or as it was made before. `model` as load_model takes it. Raises SpecError for what they have not."""
    shape = check(model, gpu, split, dtype)
    engine_version, reported = tables()[gpu]
    longest = min(shape["max_position_embeddings"], LONGEST)
    asked = {"shape": shape, "gpu": gpu, "engine": engine_version, "split": split, "dtype": dtype, "package": VERSION}
    code = Path(__file__).read_bytes() + Path(__file__).with_name("tables.py").read_bytes()
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode() + code).hexdigest()[:12]
    path = FOLDER / f"{gpu.replace('_', '-')}-tp{split}-{dtype}-{key}.yaml"
    if not path.is_file():
        gemm = package() / "systems" / "data" / gpu / "gemm" / ENGINE / engine_version / "gemm_perf.parquet"
        covered = min(LARGEST, int(pd.read_parquet(gemm, columns=["m"])["m"].max()))
        rows = rows_of(shape, gpu, engine_version, split, dtype, grid_of(longest, covered))
        write_whole(path.with_suffix(".rows"), yaml.safe_dump(rows, sort_keys=False, width=124, default_flow_style=None))
        made = calibrated(
            rows,
            dtype,
            calibration=path.stem,
            title=f"{split} {gpu}, {dtype}, kernels of {ENGINE} {engine_version}",
            models=(model,),
            tensor_parallel=split,
            sources=(source_of(gpu, engine_version),),
            fixed_by=FIXED_BY | CHANGED,
            device_memory_bytes=reported,
            gpu=gpu,
        )
        write(made, path)
    return with_known_error(replace(load_calibration(str(path)), models=(model,)), shape)


def with_known_error(calibration: Calibration, shape: Mapping[str, Any]) -> Calibration:
    """With how far off such calibrations are where that could be checked: Table 4, on A100s, and public measurements."""
    table_4, public = read_yaml(END_TO_END)["a100-yi-34b-tp2"]["errors"], read_yaml(PUBLIC)["errors"]
    known = {name: table_4[name] for name in ("ttft_p50", "tbt_p99")}
    worst = max(*known.values(), *public.values())
    small = 1.0 if mlp_of(shape)[0] > 1 else None
    return replace(calibration, error=replace(calibration.error, **known, end_to_end=worst, small_steps=small))


def rows_of(shape: Mapping[str, Any], gpu: str, engine_version: str, split: int, dtype: str, grid: Grid) -> dict[str, Any]:
    """What the tables say. Raises SpecError for what they have not."""
    how = {"tp_size": split, **DTYPES[dtype]} | ({"moe_tp_size": split} if mlp_of(shape)[0] > 1 else {})
    try:
        return read_tables(
            dict(shape) | {"architectures": [PLAIN[shape["architectures"][0]]]}, gpu, engine_version, grid, **how
        )
    except SpecError:
        raise
    except Exception as error:  # whatever the package raises: it speaks of a shape that it has not
        reason = " ".join(str(error).split())[:160]
        asked = f"GPU={gpu} TP={split} DTYPE={dtype}"
        raise SpecError(
            f"{asked}: got a shape of which there is no table ({reason}); allowed: another TP, DTYPE or GPU"
        ) from None
