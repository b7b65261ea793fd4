"""The image, built and run for real on a stand-in base: `make test-image`. Slow, so not part of `make test`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import bagit
import pytest
from rig import HEAVY, UID, Rig, command, make, wait_for

from experiments.records.provenance import ROOT
from experiments.records.store import read_trial

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="session")
def cpu_image(engine: Rig, checkout: Path) -> str:
    make(engine, checkout, "image")
    return "chunked-prefill:cpu"


@pytest.fixture(scope="session")
def cuda_image(engine: Rig, checkout: Path) -> str:
    make(engine, checkout, "image", target="cuda")
    return "chunked-prefill:cuda"


def test_a_wrong_digest_is_refused(engine: Rig, checkout: Path) -> None:
    wrong = f"debian:bookworm-slim@sha256:{'0' * 64}"
    build = [
        "build",
        "--target",
        "cpu",
        "--build-arg",
        f"CPU_BASE={wrong}",
        "-f",
        f"{checkout}/docker/Dockerfile",
        str(checkout),
    ]
    done = engine(*build, check=False)
    assert done.returncode != 0
    assert wrong in done.stderr


def test_the_default_is_the_pinned_digest_not_what_the_registry_holds_under_that_name(engine: Rig, checkout: Path) -> None:
    pin = re.search(
        r"^ARG CPU_BASE=debian:bookworm-slim@(sha256:[0-9a-f]{64})$", (checkout / "docker/Dockerfile").read_text(), re.M
    )
    assert pin
    assert pin[1] != engine.digests["debian"]
    build = ["build", "--target", "cpu", "-f", f"{checkout}/docker/Dockerfile", str(checkout)]
    with pytest.raises((AssertionError, subprocess.TimeoutExpired)):
        engine(*build, timeout=5)
    asked = (engine.folder / "registry.log").read_text()
    assert pin[1] in asked


def test_labels_user_and_init(engine: Rig, checkout: Path, cpu_image: str) -> None:
    config = json.loads(engine("image", "inspect", cpu_image).stdout)[0]["Config"]
    head = subprocess.run(
        ["git", "-c", "safe.directory=*", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True
    )
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    assert labels["revision"].removesuffix("-dirty") == head.stdout.strip()
    assert labels["licenses"] == "Apache-2.0"
    assert labels["version"] == re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]  # type: ignore[index]
    assert labels["source"]
    assert engine.digests["debian"] in labels["base.name"]
    assert labels["artifact.left-out"] == ""
    assert config["User"] not in ("", "root", "0")
    assert config["Entrypoint"][0] == "/usr/bin/tini"


NO_CACHE = r"""
nothing() { ! grep .; }
{ find ~/.cache /tmp /var/cache/apt /var/lib/apt/lists -type f 2>/dev/null || true; } | nothing
"""
STRUCTURE = r"""
set -eu
nothing() { ! grep .; }
find /artifact -name __pycache__ -o -name .git -o -name runs | nothing
python -c 'import sys; assert (3, 11) <= sys.version_info[:2] <= (3, 12)'
python - <<'END' # as Triton does for its launcher
import pathlib, subprocess, sysconfig, tempfile
with tempfile.TemporaryDirectory() as folder:
    source = pathlib.Path(folder, "made.c")
    source.write_text('#include <Python.h>\nstatic struct PyModuleDef d = {PyModuleDef_HEAD_INIT, "made", 0, -1, 0};\n'
                      'PyMODINIT_FUNC PyInit_made(void) { return PyModule_Create(&d); }\n')
    command = ["gcc", "-O2", "-shared", "-fPIC", "-I" + sysconfig.get_paths()["include"], str(source)]
    subprocess.run([*command, "-o", folder + "/made.so"], check=True)
    subprocess.run(["python", "-c", "import made"], cwd=folder, check=True)
END
id -u
"""


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_structure(engine: Rig, target: str, request: pytest.FixtureRequest) -> None:
    image = request.getfixturevalue(f"{target}_image")
    engine("run", "--rm", "--network=none", "--user=0", "--entrypoint=bash", image, "-c", NO_CACHE)
    done = engine("run", "--rm", "--network=none", "--user", f"{UID}:{UID}", image, "bash", "-c", STRUCTURE)
    assert done.stdout.strip().splitlines()[-1] == str(UID)


def test_torch_compiles_in_the_image(engine: Rig, cpu_image: str) -> None:
    program = "import torch; f = torch.compile(lambda x: torch.sin(x) + 1); print(float(f(torch.zeros(64)).sum()))"
    assert (
        "64.0" in engine("run", "--rm", "--network=none", "--user", f"{UID}:{UID}", cpu_image, "python", "-c", program).stdout
    )


def test_the_image_stands_alone(engine: Rig, cpu_image: str) -> None:
    plan = ["python", "-m", "experiments.run", "--plan", "fig9b", "--testbed", "a100-sim"]
    assert "trials" in engine("run", "--rm", "--network=none", "--user", f"{UID}:{UID}", cpu_image, *plan).stdout


@pytest.mark.parametrize("status", [0, 7])
def test_the_exit_status_passes_through(engine: Rig, cpu_image: str, status: int) -> None:
    assert engine("run", "--rm", "--network=none", cpu_image, "sh", "-c", f"exit {status}", check=False).returncode == status


def test_smoke_without_network_under_any_uid(engine: Rig, checkout: Path, cpu_image: str) -> None:
    printed = make(engine, checkout, "smoke", "NETWORK=none")
    bag = next(checkout.glob("artifacts/runs/smoke-cpu/bag-*"))
    bagit.Bag(str(bag)).validate()
    files = list((checkout / "artifacts" / "runs").rglob("*"))
    assert files
    assert {(path.stat().st_uid, path.stat().st_gid) for path in files} == {(UID, UID)}
    facts, _ = read_trial(next(bag.glob("data/trials/*/*")))
    image = engine("image", "inspect", "--format", "{{.Id}}", cpu_image).stdout.strip()
    assert facts["machine"]["image"] == image
    assert engine.digests["debian"] in facts["machine"]["base"]
    assert facts["machine"]["devices"] == []
    plan = json.loads((bag / "data" / "plan.json").read_text())
    assert re.fullmatch(r"[0-9a-f]{40}", plan["commit"]["commit"])
    assert "smoke" in printed
    assert engine("ps", "-q").stdout == ""


def test_a_run_joins_the_node_that_make_node_started(engine: Rig, checkout: Path, cpu_image: str) -> None:
    """Two containers that share the network and nothing else: a Ray head by make node, and a driver."""
    own = [*command(engine), "RAY_AUTH_TOKEN=" + "5" * 64]
    said = engine.folder / "node.log"
    with said.open("wb") as log:
        node = subprocess.Popen(
            [*own, "node", "NODE_IP=127.0.0.1"], cwd=checkout, env=engine.env, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for("the node", lambda: "Ray runtime started" in said.read_text() or node.poll() is not None, 60)
        assert node.poll() is None, said.read_text()
        joined = [*own, "smoke", "RAY_ADDRESS=127.0.0.1:6379", "OUT=artifacts/joined"]
        done = subprocess.run(joined, cwd=checkout, env=engine.env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        bag = next(checkout.glob("artifacts/joined/smoke-cpu/bag-*"))
        bagit.Bag(str(bag)).validate()
        facts, _ = read_trial(next(bag.glob("data/trials/*/*")))
        assert facts["node"] == "node-1"
        assert facts["machine"]["image"] == engine("image", "inspect", "--format", "{{.Id}}", cpu_image).stdout.strip()
    finally:
        os.killpg(node.pid, signal.SIGINT)
        node.wait(60)
    wait_for("the node's end", lambda: engine("ps", "-q").stdout == "", 20)


def test_an_interrupted_fig9a_keeps_its_trials_and_leaves_nothing_running(engine: Rig, checkout: Path, cpu_image: str) -> None:
    full = command(engine, "fig9a", "REPLICATES=1")
    with (engine.folder / "fig9a.log").open("wb") as log:
        running = subprocess.Popen(full, cwd=checkout, env=engine.env, stdout=log, stderr=log, start_new_session=True)
    trials = checkout / "artifacts" / "runs" / "fig9a-cpu"
    wait_for("a trial", lambda: any(trials.glob("open-*/trials/*/*/trial.json")) or running.poll() is not None, 120)
    assert engine("ps", "-q").stdout != ""
    os.killpg(running.pid, signal.SIGINT)  # as Ctrl-C does
    running.wait(60)
    printed = (engine.folder / "fig9a.log").read_text()
    assert "interrupted; finished trials are kept" in printed, printed
    wait_for("the container's end", lambda: engine("ps", "-q").stdout == "", 5)
    assert not subprocess.run(["pgrep", "-u", str(UID)], capture_output=True, text=True, check=False).stdout
    kept = list(trials.glob("open-*/trials/*/*/trial.json"))
    assert kept
    plan = make(engine, checkout, "plan", "FIGURE=fig9a", "REPLICATES=1")
    whole, owed = map(int, re.search(r"trials +(\d+) in all, (\d+) to run", plan).groups())  # type: ignore[union-attr]
    assert whole - owed == len(kept)


def test_a_changed_python_file_rebuilds_in_seconds(engine: Rig, checkout: Path, cpu_image: str) -> None:
    with (checkout / "experiments" / "records" / "metrics.py").open("a") as file:
        file.write("# changed\n")
    began = time.monotonic()
    make(engine, checkout, "image")
    assert time.monotonic() - began <= 15
    assert (
        "# changed"
        in engine("run", "--rm", "--network=none", cpu_image, "tail", "-n1", "/artifact/experiments/records/metrics.py").stdout
    )


def test_preflight_messages_of_a_real_engine(engine: Rig, checkout: Path, cuda_image: str) -> None:
    hook = f"{engine.folder}/hook"  # a driver on the host, no toolkit in the engine
    assert "knows no NVIDIA toolkit: sudo apt-get install nvidia-container-toolkit" in make(
        engine, checkout, "smoke", target="cuda", check=False, path=hook
    )
    assert "/dev/shm has 0.00 GiB; 1 is needed" in make(engine, checkout, "smoke", "SHM=--shm-size=1m", check=False)
    engine("tag", "chunked-prefill:cpu", "kept:cpu")
    engine("rmi", "chunked-prefill:cpu")
    assert "no image chunked-prefill:cpu: make image TARGET=cpu" in make(engine, checkout, "smoke", check=False)
    engine("tag", "kept:cpu", "chunked-prefill:cpu")
    gone = {"DOCKER_HOST": "unix:///nonexistent.sock"}
    done = subprocess.run(
        command(engine, "smoke"), cwd=checkout, env=engine.env | gone, capture_output=True, text=True, check=False
    )
    assert "does not answer: sudo systemctl start docker" in done.stderr


def test_with_the_toolkit_the_container_has_the_gpus_and_ray_knows_the_pair(
    engine: Rig, checkout: Path, cuda_image: str
) -> None:
    engine.start(toolkit=True)  # it looks for the toolkit only when it starts
    label = json.loads(engine("image", "inspect", cuda_image).stdout)[0]["Config"]["Labels"]["artifact.left-out"]
    assert label == HEAVY
    run = ["run", "--rm", "--network=none", "--shm-size=1g", "--gpus", "all"]
    assert engine(*run, "--entrypoint", "nvidia-smi", cuda_image, "-L").stdout.count("GPU ") == 2
    asks = "import ray; ray.init(logging_level='error'); print('declared', sorted(ray.cluster_resources()))"
    looks = ["python", "-c", asks, "-m experiments.run", "smoke"]  # like a measuring run, to the entrypoint
    printed = engine(*run, cuda_image, *looks).stdout
    assert all(f"'{name}'" in printed for name in ("gpu-0", "gpu-1", "nvlink-0-1")), printed
    printed = make(engine, checkout, "smoke", "TESTBED=a100", target="cuda", check=False, path=f"{engine.folder}/hook")
    assert "testbed a100 (as asked for) needs vllm, which this image lacks" in printed  # all that comes before is there
