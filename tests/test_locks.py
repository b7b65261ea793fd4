"""The locks hold what pyproject.toml asks for, each with hashes, the same version everywhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.version import Version

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
NOT_LOCKED = {"torchvision", "torchaudio", "torchcodec"}  # vllm names them; text models need none of them

OWN_NUMBERS = {"cuda-core", "cuda-pathfinder", "cuda-tile"}  # not numbered as CUDA is


def locked(name: str) -> dict[str, set[str]]:
    text = (Path(__file__).parents[1] / "docker" / f"{name}.lock").read_text()
    entries = re.findall(r"^([a-z0-9._-]+)==(\S+)(.*?)(?=^[a-z]|\Z)", text, re.M | re.S)
    versions: dict[str, set[str]] = {}
    for package, version, rest in entries:
        assert "--hash=sha256:" in rest, f"{name}: {package} has no hash"
        versions.setdefault(package, set()).add(version)
    return versions


@pytest.mark.parametrize(
    ("lock", "extras"), [("core", []), ("cpu", ["cpu"]), ("cuda", ["cuda"]), ("dev", ["cpu", "dev"]), ("tables", ["tables"])]
)
def test_lock_satisfies_pyproject(lock: str, extras: list[str]) -> None:
    wanted = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    versions = locked(lock) | (locked("torch-cpu") if "cpu" in extras else {})
    for requirement in map(Requirement, wanted):
        name = requirement.name.lower().replace("_", "-")
        assert name in versions, f"{lock}.lock lacks {name}: make lock"
        assert all(requirement.specifier.contains(Version(v)) for v in versions[name]), f"{lock}.lock: {name}: make lock"


def test_the_same_version_in_every_lock() -> None:
    dev = locked("dev")
    for lock in ("core", "cpu"):
        for package, versions in locked(lock).items():
            assert versions == dev[package], f"{package} differs between {lock}.lock and dev.lock: make lock"
            assert package not in NOT_LOCKED


def test_kernel_tables_are_all_that_core_lacks_for_them() -> None:
    core, tables = locked("core"), locked("tables")
    assert {package: versions for package, versions in tables.items() if package in core} == core
    assert tables.keys() - core.keys() == {"aiconfigurator-core"}


def test_cuda_shares_core_and_all_cuda_parts_are_13_0() -> None:
    core, cuda = locked("core"), locked("cuda")
    assert {package: versions for package, versions in cuda.items() if package in core} == core
    text = (Path(__file__).parents[1] / "docker" / "cuda.lock").read_text()
    parts = re.findall(r"^((?:nvidia-)?cuda-[a-z]+|nvidia-nv[a-z]+)==(\d+\.\d+)\S*(?: ; (.*?))? \\$", text, re.M)
    for machine in ("x86_64", "aarch64"):
        here = {"sys_platform": "linux", "platform_machine": machine, "python_full_version": "3.12.3", "python_version": "3.12"}
        found = {name: version for name, version, marker in parts if not marker or Marker(marker).evaluate(here)}
        assert {name for name, version in found.items() if version != "13.0"} <= OWN_NUMBERS
        assert found["nvidia-cuda-nvcc"] == found["nvidia-cuda-runtime"] == found["cuda-toolkit"] == "13.0"
