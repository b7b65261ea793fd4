"""What make installs and where it runs: by what the testbed is, and by whether there are a GPU and docker. All made up."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from checkout import NVIDIA_SMI, STUB, Checkout

from experiments.records.provenance import ROOT


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.fixture
def gpu(checkout: Checkout) -> Checkout:
    """With a GPU, a driver and docker with NVIDIA's toolkit, all made up."""
    checkout.smi.write_text(NVIDIA_SMI)
    shutil.copy(checkout.bin / "docker", checkout.bin / "nvidia-ctk")
    return checkout


@pytest.mark.parametrize(
    ("testbed", "engine"),
    [
        ("auto", "cpu"),
        ("cpu", "cpu"),
        ("a100-sim", "core"),
        ("here/a100-sim.yaml", "core"),
        ("my testbeds/mine.yaml", "core"),
        ("my testbeds/real-sim.yaml", "cpu"),
        ("gpu-24g", "cuda"),
        ("no-such", "core"),
    ],
)
def test_what_is_installed_goes_by_what_the_testbed_is(checkout: Checkout, testbed: str, engine: str) -> None:
    own = ROOT / "experiments" / "spec" / "testbeds"
    for path, text in (
        ("here/a100-sim.yaml", (own / "a100-sim.yaml").read_text()),
        ("my testbeds/mine.yaml", 'testbed: mine\nplatform: "simulated" # on a virtual clock\n'),
        ("my testbeds/real-sim.yaml", (own / "cpu.yaml").read_text()),
    ):
        (checkout.folder / path).parent.mkdir(exist_ok=True)
        (checkout.folder / path).write_text(text)
    assert checkout.make("setup", f"TESTBED={testbed}").returncode == 0
    assert checkout.stamps() == {".venv/core.stamp", f"{'.venv-cuda' if engine == 'cuda' else '.venv'}/{engine}.stamp"}


@pytest.mark.parametrize(
    ("testbed", "chosen", "environment"),
    [
        ("cpu", "", ".venv/cpu.stamp"),
        ("a100-sim", "", ".venv/core.stamp"),
        ("gpu-24g", "", ".venv-cuda/cuda.stamp"),
        ("auto", "cpu", ".venv/cpu.stamp"),  # as on a GPU that fits no testbed
        ("auto", "gpu-24g", ".venv-cuda/cuda.stamp"),
    ],
)
def test_with_a_gpu_too_the_environment_follows_the_testbed(gpu: Checkout, testbed: str, chosen: str, environment: str) -> None:
    done = gpu.make("smoke", "IN=host", f"TESTBED={testbed}", environment={"CHOSEN": chosen})
    assert done.returncode == 0, done.stderr
    assert gpu.stamps() == {".venv/core.stamp", environment}
    assert gpu.ran("experiments.run") == gpu.ran("analysis.show.summary") == {environment.split("/")[0] + "/bin/python"}
    assert gpu.arrived("--testbed=", chosen or testbed) == 1
    before = [call for call in gpu.calls() if "--before" in call]
    assert [call[-1] for call in before] == ["gpu-24g"] * ("cuda" in environment)  # what keeps CUDA from it, before 10 GB
    assert gpu.make("test", "IN=host").returncode == 0
    assert gpu.ran("pip install") == {".venv/bin/python"}  # never one engine over another
    assert gpu.stamps() == {".venv/core.stamp", ".venv/cpu.stamp", ".venv/dev.stamp", environment}


def test_no_engine_is_installed_for_a_python_that_it_is_not_locked_for(checkout: Checkout) -> None:
    """Simulation works there all the same."""
    python = checkout.folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(STUB + 'case "$*" in *"(3, 12)"*) echo "error: PYTHON: got 3.13" >&2; exit 1 ;; esac\n')
    python.chmod(0o755)
    assert checkout.make("fig9a", "TESTBED=a100-sim").returncode == 0
    done = checkout.make("smoke")
    assert done.returncode == 2
    assert "error: PYTHON: got 3.13" in done.stderr
    assert checkout.stamps() == {".venv/core.stamp"}


def test_cuda_is_not_installed_where_doctor_finds_something_missing(gpu: Checkout) -> None:
    refuses = 'case "$*" in *--before*) echo "preflight: NVIDIA driver 470" >&2; exit 1 ;; esac\n'
    (gpu.folder / ".venv" / "bin" / "python").write_text(STUB + refuses)
    done = gpu.make("fig9a", "IN=host", "TESTBED=gpu-24g")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-2].startswith("preflight: NVIDIA driver 470")
    assert gpu.stamps() == {".venv/core.stamp"}
    assert not gpu.ran("cuda.lock")


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        *(([target], "gpu-24g") for target in ("plan", "verify", "report", "power", "package")),
        (["fig9a", "TESTBED=a100-sim"], ""),
        (["fig9b", "TESTBED=cpu"], ""),
        (["recommend", "TESTBED=a100-sim"], ""),
        (["smoke"], "cpu"),
    ],
)
def test_what_needs_no_engine_on_a_gpu_runs_without_the_image(gpu: Checkout, words: list[str], chosen: str) -> None:
    done = gpu.make(*words, environment={"CHOSEN": chosen})
    assert done.returncode == 0, done.stderr
    assert not gpu.ran("build") | gpu.ran("run --rm")
    assert ".venv-cuda/cuda.stamp" not in gpu.stamps()


@pytest.mark.parametrize("words", [["smoke"], ["fig9a", "TESTBED=gpu-24g"], ["fig9a", "GPU=0"], ["verify", "PYTHON=false"]])
def test_an_engine_on_a_gpu_runs_in_the_image_and_all_does_without_python(gpu: Checkout, words: list[str]) -> None:
    done = gpu.make(*words, environment={"CHOSEN": "gpu-24g"})
    assert gpu.ran("build --target cuda") == {"docker"}
    assert gpu.ran("run --rm") == {"docker"}, done.stderr
    assert not gpu.ran("cuda.lock")


def test_locks_that_were_renewed_alike_install_nothing_anew(checkout: Checkout) -> None:
    asked = (["tables"], ["setup", "TESTBED=gpu-24g"])
    for words in asked:
        checkout.make(*words)
    for stamp in checkout.stamps():
        os.utime(checkout.folder / stamp, (0, 0))  # older than the locks, as make lock leaves them
    assert checkout.make("lock-check").returncode == 0
    for words in asked:
        assert checkout.make(*words).returncode == 0
        assert not checkout.calls_file.exists() or not [call for call in checkout.calls() if "install" in call]


def test_nothing_is_built_for_a_driver_that_is_too_old(gpu: Checkout) -> None:
    gpu.smi.write_text(NVIDIA_SMI.replace("580", "470"))
    done = gpu.make("smoke", environment={"CHOSEN": "gpu-24g"})
    assert "preflight: NVIDIA driver 470.95.05; 580 or newer is needed" in done.stderr
    assert not gpu.ran("build")


@pytest.mark.parametrize(("target", "asked"), [("recommend", ["--model=some/Model"]), ("fig9a", [])])
def test_doctor_chooses_for_the_model_on_which_advice_is_asked(gpu: Checkout, target: str, asked: list[str]) -> None:
    done = gpu.make(target, "IN=host", "MODEL=some/Model", environment={"CHOSEN": "gpu"})
    assert done.returncode == 0, done.stderr
    (call,) = [call for call in gpu.calls() if "--choose" in call]
    assert [word for word in call if word.startswith("--model")] == asked
    assert ".venv-cuda/cuda.stamp" in gpu.stamps()
