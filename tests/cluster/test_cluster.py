"""Sessions on a real Ray cluster of several nodes, all on this machine: declared GPUs, engines simulated in real time."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from fakes import FakeEngine

from analysis.judge.integrity import problems
from analysis.judge.load import find_runs, load_run
from analysis.show.plots_schedule import compared
from experiments.cluster import cluster, local_ray
from experiments.cluster.plan import Plan
from experiments.engine import worker
from experiments.engine.session import TrialResult, run_trials, start_engine
from experiments.records.provenance import ROOT
from experiments.records.record import Phase, Record
from experiments.run import main
from experiments.simulator.simulator import simulated_engine
from experiments.spec.expand import Session
from experiments.spec.spec import EngineSettings
from experiments.spec.traces import Trace

pytest.importorskip("vllm")
ray = pytest.importorskip("ray")
NODE_KILLS = int(os.environ.get("NODE_KILLS", "1"))
pytestmark = [pytest.mark.timeout(600 + 120 * NODE_KILLS), pytest.mark.cluster]
NODES = 4
GPUS = {"gpu-0": 1.0, "gpu-1": 1.0, "nvlink-0-1": 1.0}
SMALL = {"num_cpus": 4, "object_store_memory": 80 * 2**20, "include_dashboard": False}
QUICK = {"prestart_worker_first_driver": False, "enable_worker_prestart": False}
QUICK |= {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
QUICK |= {"worker_maximum_startup_concurrency": 4}  # of a node: else as many as this machine has cores, and others wait
FIGURE: dict[str, Any] = {
    "figure": "fig9a",
    "title": "for tests",
    "source": "none",
    "kind": "prefill",
    "requests_per_point": 5,
    "max_batch": 128,
    "max_model_len": 16384,
    "seeds": [1, 2, 3, 4],
    "panels": [
        {"model": "mistral-7b", "tensor_parallel": 1, "in_paper": False},
        {"model": "yi-34b-200k", "tensor_parallel": 2, "in_paper": True},
    ],
}


def real_time(
    pace: float, load_s: float, session: Session, owed: Sequence[str], trace: Trace | None
) -> Iterator[TrialResult | None]:
    """experiments.engine.worker.work on an engine that simulates, then sleeps as long as it simulated, times `pace`.

    It is loaded `load_s` after its process was created.
    """
    inner = partial(simulated_engine, seed=session.seed)

    class RealTime:
        def __init__(self, settings: EngineSettings) -> None:
            self.engine = inner(settings)
            own = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")}
            self.facts = {**self.engine.facts, **own, "load_s": load_s}

        def run(self, phases: Sequence[Phase], time_limit_s: float) -> Record:
            began = time.monotonic()
            record = self.engine.run(phases, time_limit_s)
            last = record.steps.iloc[-1]
            time.sleep(max(0.0, pace * (last["start_s"] + last["seconds"]) - (time.monotonic() - began)))
            return record

        def close(self) -> None:
            """Nothing to free."""

    engine = start_engine(session, RealTime)  # type: ignore[arg-type]
    time.sleep(max(0.0, psutil.Process().create_time() + load_s - time.time()))
    yield None
    yield from run_trials(session, owed, engine, trace)  # type: ignore[arg-type]


class Rig:
    """A cluster whose head runs nothing, and nodes of two GPUs that can be killed."""

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        self.folder = folder
        self.cluster = Cluster(initialize_head=True, head_node_args={**SMALL, "num_cpus": 0, "_system_config": QUICK})
        self.nodes: list[Any] = []
        for _ in range(NODES):
            self.add()

    def add(self) -> None:
        self.nodes.append(self.cluster.add_node(resources=GPUS, **SMALL))

    def kill(self, order: random.Random) -> None:
        node = self.nodes.pop(order.randrange(len(self.nodes)))
        self.cluster.remove_node(node, allow_graceful=False)

    def specs(self, name: str, lengths: list[int], chunk_sizes: list[int | str], load_s: float, models: int) -> tuple[str, str]:
        """A figure of the last `models` models, and a testbed with two GPUs a node."""
        panels = [{**panel, "prompt_lengths": lengths, "chunk_sizes": chunk_sizes} for panel in FIGURE["panels"][-models:]]
        figure, testbed = self.folder / f"{name}-figure.yaml", self.folder / f"{name}-testbed.yaml"
        figure.write_text(yaml.safe_dump({**FIGURE, "panels": panels}))
        a100 = yaml.safe_load((ROOT / "experiments/spec/testbeds/a100.yaml").read_text())
        a100 |= {"replicates": 4, "session_memory_gib": 0.01, "estimate": {**a100["estimate"], "load_s": load_s}}
        testbed.write_text(yaml.safe_dump(a100))
        return str(figure), str(testbed)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    ours = [sys.modules[name] for name in (__name__, FakeEngine.__module__)]  # the workers do not have the tests' folder
    for module in ours:
        ray.cloudpickle.register_pickle_by_value(module)
    made = Rig(tmp_path_factory.mktemp("cluster"))
    yield made
    made.cluster.shutdown()
    for module in ours:
        ray.cloudpickle.unregister_pickle_by_value(module)


@pytest.fixture(scope="module")
def load_s() -> float:
    """How long engines pretend to load, seconds: well over what it takes to start a process on each node at once, and the
    spare one that Ray starts beside each."""
    began = time.monotonic()
    imports = [sys.executable, "-c", "import ray, experiments.engine.worker, experiments.simulator.simulator"]
    for started in [subprocess.Popen(imports, cwd=ROOT) for _ in range(2 * NODES)]:
        assert started.wait() == 0
    return max(15.0, 3.0 * (time.monotonic() - began))


@pytest.fixture
def on(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Rig:
    monkeypatch.setenv("RAY_ADDRESS", rig.cluster.address)
    return rig


def engines(monkeypatch: pytest.MonkeyPatch, pace: float, load_s: float) -> None:
    def paced(session: Session, owed: Sequence[str], trace: Trace | None) -> Iterator[TrialResult | None]:
        yield from real_time(pace, load_s, session, owed, trace)

    monkeypatch.setattr(worker, "work", paced)


def stored(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in out.glob("*/bag-*/data/trials/*/*/trial.json")]
    return sorted(found, key=lambda facts: str(facts["started"]))


def gpu_seconds(facts: Sequence[dict[str, Any]], until: datetime) -> float:
    """GPU seconds in which sessions held their GPUs, up to a moment; loading included."""
    total = 0.0
    for name in {f["session"] for f in facts}:
        own = [f for f in facts if f["session"] == name]
        begin = datetime.fromisoformat(own[0]["started"]).timestamp() - own[0]["engine"]["load_s"]
        end = min(datetime.fromisoformat(own[-1]["ended"]).timestamp(), until.timestamp())
        total += max(0.0, end - begin) * own[0]["settings"]["tensor_parallel"]
    return total


def test_four_nodes_run_every_trial_once_as_planned(
    on: Rig, load_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure, testbed = on.specs("whole", [2048], [512, "unchunked"], load_s, 2)
    engines(monkeypatch, 1.0, load_s)
    assert main([figure, "--testbed", testbed, "--out", str(tmp_path)]) == 0
    facts = stored(tmp_path)
    assert Counter((f["session"], f["trial"]) for f in facts).most_common(1)[0][1] == 1
    assert len(facts) == 8 * 6
    assert {f["node"] for f in facts} <= {f"node-{n + 1}" for n in range(NODES)}
    for size, wanted in ((1, {"0", "1"}), (2, {"0,1"})):  # a session sees the GPU, or the pair, that it took
        seen = {f["engine"]["CUDA_VISIBLE_DEVICES"] for f in facts if f["settings"]["tensor_parallel"] == size}
        assert set() < seen <= wanted
    assert {f["engine"]["CUDA_DEVICE_ORDER"] for f in facts} == {"PCI_BUS_ID"}
    run = load_run(next(iter(find_runs(tmp_path).values())))
    (times,) = compared(run)
    times = times.round(1)
    print(times.to_string())
    planned, taken = times["planned_end"].max(), times["end"].max()
    assert taken == pytest.approx(planned, rel=0.1), times
    last = times["start"].max()
    first = min(datetime.fromisoformat(f["started"]).timestamp() - load_s for f in facts)
    until = datetime.fromtimestamp(first + last - times["start"].min())
    assert gpu_seconds(facts, until) >= 0.9 * 2 * NODES * (last - times["start"].min()), times
    assert problems(run.bags[0]) == []


def test_a_plan_shows_the_schedule_of_the_cluster(on: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure, testbed = on.specs("shown", [2048, 4096], [512, "unchunked"], 15.0, 2)
    assert main([figure, "--testbed", testbed, "--out", str(tmp_path), "--plan"]) == 0
    printed = capsys.readouterr().out
    assert f" on {NODES} nodes, " in printed
    assert " GPU hours (" in printed
    assert printed.count("yi-34b-200k-seed") == 4
    assert not list(tmp_path.glob("*/*"))


def test_nodes_killed_at_random_lose_and_double_nothing(on: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure, testbed = on.specs("killed", [2048, 4096], [512], 1.0, 1)
    engines(monkeypatch, 0.5, 1.0)
    order = random.Random(int(os.environ.get("NODE_SEED", "7")))
    for number in range(NODE_KILLS):
        out = tmp_path / str(number)
        killer = threading.Timer(order.uniform(1.0, 15.0), on.kill, [order])
        killer.start()
        try:
            assert main([figure, "--testbed", testbed, "--out", str(out)]) == 0
        finally:
            killer.join()
        on.add()
        plan = Plan(figure, testbed, None, out)
        assert plan.owed() == {}
        facts = stored(out)
        assert len(facts) == len({(f["session"], f["trial"]) for f in facts}) == 4 * 6
        (bag,) = out.glob("*/bag-*")
        assert problems(bag) == []


def test_two_nodes_without_a_common_folder(on: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node in a mount namespace of its own, where the output folder is another, empty one."""
    apart = ["unshare", "--user", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("unshare --user --mount is not allowed here, so no node can be given a file system of its own")
    out = tmp_path / "runs"
    out.mkdir()
    resources = json.dumps({"apart": 1})
    ray_start = f"{Path(sys.executable).parent}/ray start --address={on.cluster.address} --block --num-cpus=2"
    script = f"mount -t tmpfs none {out} && exec {ray_start} --object-store-memory={80 * 2**20} --resources='{resources}'"
    with (tmp_path / "node.log").open("wb") as log:
        node = subprocess.Popen([*apart, "bash", "-c", script], stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        with cluster.ray_cluster() as connected:
            while not any("apart" in n["Resources"] and n["Alive"] for n in connected.nodes()):
                assert time.monotonic() < deadline, (tmp_path / "node.log").read_text()
                time.sleep(0.5)
        # A real-time engine on CPUs: the smoke figure's sessions fit any node with cores, so only the one apart may stay.
        monkeypatch.setattr(local_ray, "_node_here", lambda _address: False)  # as in a container: it brings a node of its own
        monkeypatch.setattr(cluster.Fleet, "refresh", only_apart(cluster.Fleet.refresh))
        monkeypatch.setattr(worker, "work", hidden(str(out)))
        assert main(["smoke", "--testbed", "cpu", "--out", str(out)]) == 0
    finally:
        node.terminate()
        node.wait(30)
    facts = stored(out)
    assert [f["trial"] for f in facts] == ["pass-0", "pass-1", "pass-0-repeat"]
    (bag,) = out.glob("*/bag-*")
    assert problems(bag) == []


def only_apart(refresh: Any) -> Any:
    def wrapped(fleet: Any) -> None:
        refresh(fleet)
        fleet.nodes = [node for node in fleet.nodes if "apart" in node.total]

    return wrapped


def hidden(out: str) -> cluster.Work:
    def work(session: Session, owed: Sequence[str], trace: Trace | None) -> Iterator[TrialResult | None]:
        if list(Path(out).iterdir()):
            raise RuntimeError("the driver's output folder is seen here")
        engine = start_engine(session, FakeEngine)
        yield None
        yield from run_trials(session, owed, engine, trace)

    return work
