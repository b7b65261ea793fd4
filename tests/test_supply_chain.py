"""YAML only by the safe loader, nothing unpickled or evaluated, no network at run time."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.records.provenance import ROOT

SOURCES = sorted(path for folder in ("experiments", "analysis", "tests") for path in (ROOT / folder).rglob("*.py"))
UNSAFE = {
    "yaml.full_load",
    "yaml.unsafe_load",
    "yaml.load_all",
    "pickle.load",
    "pickle.loads",
    "pd.read_pickle",
    "eval",
    "exec",
}


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_unsafe_is_loaded(path: Path) -> None:
    for call in calls(path):
        name = ast.unparse(call.func)
        assert name not in UNSAFE, f"{path.name}:{call.lineno}: {name}"
        if name == "yaml.load":
            loaders = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "Loader"]
            assert loaders == ["_UniqueKeys"], f"{path.name}:{call.lineno}: yaml.load with {loaders}"


def test_our_loader_is_the_safe_one() -> None:
    import yaml

    from experiments.spec.spec import _UniqueKeys

    assert issubclass(_UniqueKeys, yaml.SafeLoader)
    with pytest.raises(yaml.YAMLError):
        yaml.load("!!python/object/apply:os.system [true]", Loader=_UniqueKeys)


def test_no_network_is_needed_to_simulate_verify_report_and_pack(tmp_path: Path) -> None:
    """In a network namespace of its own, in which not even the loopback is up. The real engine: test_vllm_engine.py."""
    apart = ["unshare", "--user", "--map-root-user", "--net"]
    if not shutil.which("unshare") or subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("unshare --user --net is not allowed here")
    out, report = str(tmp_path / "runs"), str(tmp_path / "report")
    for module, *arguments in (
        ("experiments.run", "fig9a", "--testbed", "a100-sim", "--replicates", "2", "--out", out),
        ("analysis.judge.verify", "--runs", out, "--report", report),
        ("analysis.show.report", "--runs", out, "--report", report),
        ("analysis.judge.archive", "--runs", out, "--report", report, "--target", str(tmp_path / "package.zip")),
    ):
        command = [*apart, sys.executable, "-m", module, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode in ((0, 1, 2) if module == "analysis.judge.verify" else (0,)), done.stderr
        assert done.stderr == ""
