"""make's variables: whatever they hold, nothing is run or removed that should not be, and what is wrong is one line.

The Makefile and its scripts are run for real in a folder of their own, where Python, docker and the other tools are stand-ins
that note how they were called.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from checkout import STUB, Checkout

from analysis.advise.question import VARIABLES
from experiments.records.provenance import ROOT

MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = re.findall(r"^([a-z0-9-]+):.*## ", MAKEFILE, re.M)
KNOWN = list(dict.fromkeys([*re.findall(r"^([A-Z0-9_]+) \?=", MAKEFILE, re.M), *VARIABLES]))
READS = {target: set(names.split()) for target, names in re.findall(r"^([a-z0-9-]+):.*## .*\{(.*)\}$", MAKEFILE, re.M)}
READS = {target: READS.get(target, set()) for target in TARGETS}
GENERAL = {"QUIET", "JSON"} | READS["setup"] | READS["image"]  # no target names these but they
FIXED = {"TARGET", "DOCKER", "IN", "QUIET", "JSON", "ALL", "FULL"}
FREE = [name for name in KNOWN if name not in {*FIXED, "PYTHON"}]  # PYTHON is a command, as it should be
ON_THE_HOST = re.findall(r"[a-z-]+", re.search(r"^ifneq \(\$\(filter ([a-z -]+),\$\(MAKECMDGOALS", MAKEFILE, re.M)[1])  # type: ignore[index]
ON_TABLES = ("GPU", "TP", "MAX_LEN", "DTYPE")
OPTIONS = {  # what must reach Python as it was given: variable -> target -> how the argument begins
    "OUT": {"fig9a": "--out=", "report": "--runs=", "recommend": "--out=", "package": "--runs="},
    "TESTBED": dict.fromkeys(("fig9b", "calibrate", "recommend", "capacity", "validate"), "--testbed="),
    "TRACE": {"fig9b": "--trace=", "capacity": "--trace=", "recommend": "--trace=", "bench": "--trace="},
    "REPLICATES": {"fig9a": "--replicates="},
    "MODEL": {"recommend": "--model=", "capacity": "--model=", "check-advice": "--model="},
    **{name: {"recommend": f"{name}="} for name in VARIABLES},
    **{name: dict.fromkeys(("recommend", "capacity"), f"--{name.lower().replace('_', '-')}=") for name in ON_TABLES},
    "FIGURE": {"plan": ""},
    "TRIAL": {"export": ""},
    "BAG": {"verify": "--bag="},
    "KILLS": {"torture": "--kills="},
}
HOSTILE = [
    "'; touch pwned; '",
    '"; touch pwned; "',
    "$(touch pwned)",
    "$(shell touch pwned)",
    "${TESTBED}$x$$",
    "`touch pwned`",
    "x; touch pwned # &",
    "my runs",
    "ein öde Läufe 雪",
    "-rf",
    "--help",
    "* ? [a-z]* {a,b}",
    "a\\ b\\",
    "~",
    'a,b="c"',
]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def given(value: str) -> list[str]:
    """All variables that may hold any text, at once."""
    return [f"{name}={value}" for name in FREE]


def assert_unharmed(checkout: Checkout, before: set[str], value: str) -> None:
    """No command ran but those of the recipes, and nothing was made or removed but stamps and outputs."""
    known = {"python", "mbake", "shellcheck", "hadolint", "uv", "docker", "git"}
    assert {call[0] for call in checkout.calls()} <= known
    after = checkout.files()
    assert "pwned" not in after
    allowed = ("artifacts", ".image", ".venv", ".setup.lock", "docker/", value)
    assert {name for name in after - before if not name.startswith(allowed)} == set()
    assert before <= after | {name for name in before if name.startswith((".venv", ".image"))}
    assert not list(checkout.home.iterdir())


@pytest.mark.parametrize("value", HOSTILE)
def test_no_value_is_ever_a_part_of_a_command(checkout: Checkout, value: str) -> None:
    before = checkout.files()
    for targets in (ON_THE_HOST, [target for target in TARGETS if target not in ON_THE_HOST]):
        listed = checkout.make("-n", *targets, *given(value)).stdout
        assert "pwned" not in listed
        said = checkout.make("-k", *targets, *given(value)).stderr
        assert_unharmed(checkout, before, value)
        wanted = [(start, name) for name, of in OPTIONS.items() for target, start in of.items() if target in targets]
        for start, name in wanted:
            assert checkout.arrived(start, value) >= wanted.count((start, name)), f"{name}: {said}"


@pytest.mark.parametrize("value", HOSTILE)
def test_the_same_from_the_environment_is_said(checkout: Checkout, value: str) -> None:
    before = checkout.files()
    done = checkout.make("recommend", environment=dict.fromkeys(FREE, value))
    assert_unharmed(checkout, before, value)
    assert all(checkout.arrived(wanted["recommend"], value) for wanted in OPTIONS.values() if "recommend" in wanted)
    said = [line for line in done.stderr.splitlines() if "taken from the environment" in line]
    assert {line.split(": ")[1] for line in said} == set(FREE)
    assert [line for line in said if not line.endswith(value)] == [line for line in said if "RAY_AUTH_TOKEN" in line]


@pytest.mark.parametrize("value", HOSTILE)
def test_in_the_image_too_and_paths_are_mounted(checkout: Checkout, value: str) -> None:
    names = ("TRACE", "BAG", "OUT", "TRIAL", "MODEL")
    for name in ("TRACE", "BAG", "TRIAL", "MODEL"):
        (checkout.folder / f"{name}{value}").write_text("")
    before = checkout.files()
    for target in ("image", "fig9b", "verify", "plan", "recommend", "export"):
        paths = [f"{name}={name}{value}" for name in names]
        done = checkout.make(target, "IN=docker", "TARGET=cpu", "TESTBED=cpu", "NETWORK=none", "USER_FLAGS=", *paths)
        assert done.returncode == 0, done.stderr
        assert_unharmed(checkout, before, f"OUT{value}")
        for call in (call for call in checkout.calls() if call[:2] == ["docker", "run"]):
            for name in names:
                path = str(checkout.folder / f"{name}{value}").replace('"', '""')
                mount = f'type=bind,"source={path}","target={path}"'
                assert (mount if name == "OUT" else f"{mount},readonly") in call
    assert checkout.make("-n", "clean").returncode == 0


@pytest.mark.parametrize("target", ["fig9a", "clean", "lint"])
@pytest.mark.parametrize(
    ("word", "said"),
    [
        *((f"{name}=a\nb", f"{name}: got more than one line; allowed: one") for name in ("OUT", "TRACE", "PYTEST")),
        *((f"{name}=", f"{name}: got nothing; without it the default holds") for name in ("OUT", "TESTBED", "FIGURE")),
        ("OUT= ", "OUT: got nothing; without it the default holds"),
        *(
            (f"{name}={value}", f"{name}: got '{value}'; allowed: 1 yes")
            for name in ("QUIET", "JSON", "ALL", "FULL")
            for value in ("2", "O")
        ),
        *((f"IN={value}", f"IN: got '{value}'; allowed: docker host") for value in ("dokcer", "", "docker host")),
        *((f"TARGET={value}", f"TARGET: got '{value}'; allowed: cuda cpu") for value in ("gpu", "", "cpu; touch pwned")),
        *((f"DOCKER={value}", f"DOCKER: got '{value}'; allowed: docker podman") for value in ("", "dokcer", "docker podman")),
        ("TTFT_P98=1", "TTFT_P98: no variable of this Makefile; near it: TTFT_P99 TTFT_P50 TTFT_P90; make help-all lists all"),
        ("TESBED=cpu", "TESBED: no variable of this Makefile; near it: TESTBED; "),
        ("BATCH=8", "BATCH: no variable of this Makefile; near it: BAG BENCH BUILD_FLAGS; "),
        ("zz=8", "zz: no variable of this Makefile; near it: none; "),
        ("a'b=$(shell touch pwned)", "a'b: no variable of this Makefile"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_run(checkout: Checkout, target: str, word: str, said: str) -> None:
    before = checkout.files()
    done = checkout.make(target, word)
    assert done.returncode == 2
    assert re.fullmatch(rf"Makefile:\d+: \*\*\* {re.escape(said)}.*\.  Stop\.\n", done.stderr), done.stderr
    assert done.stdout == ""
    assert checkout.calls() == []
    assert checkout.files() == before


@pytest.mark.parametrize(
    ("word", "options"),
    [
        *((f"{name}={value}", set()) for name in ("QUIET", "JSON", "ALL") for value in ("0", "no", "false", "off", "")),
        *((f"QUIET={value}", {"--quiet"}) for value in ("1", "yes", "true", "on")),
        ("JSON=1", {"--json"}),
        ("ALL=1", {"--all"}),
    ],
)
def test_switches(checkout: Checkout, word: str, options: set[str]) -> None:
    assert checkout.make("verify", word).returncode == 0
    (call,) = (call for call in checkout.calls() if "analysis.judge.verify" in call)
    assert set(call) & {"--quiet", "--json", "--all"} == options


@pytest.mark.parametrize(
    ("model", "mounted"), [("mine/config.json", "mine"), ("some/Model", "hub/models--some--Model"), ("mistral-7b", "")]
)
def test_a_model_is_mounted_with_the_weights_that_belong_to_it(checkout: Checkout, model: str, mounted: str) -> None:
    hub = checkout.folder / "hub"
    for name in ("mine", "hub/models--some--Model/snapshots/12ab"):
        (checkout.folder / name).mkdir(parents=True)
        (checkout.folder / name / "config.json").write_text("{}")
    words = ("IN=docker", "TARGET=cpu", "TESTBED=cpu", f"MODEL={model}")
    assert checkout.make("recommend", *words, environment={"HF_HUB_CACHE": str(hub)}).returncode == 0
    (call,) = (call for call in checkout.calls() if "analysis.advise.recommend" in call)
    inputs = [word for word in call if word.endswith(",readonly") and ("mine" in word or "hub" in word)]
    path = checkout.folder / mounted
    assert inputs == [f'type=bind,"source={path}","target={path}",readonly'] * bool(mounted)
    assert (f"HF_HUB_CACHE={hub}" in call) == (model == "some/Model")


def test_what_only_recommend_reads_is_said_elsewhere(checkout: Checkout) -> None:
    told = {target: checkout.make(target, "TTFT_P99=1", "QPS=").stderr for target in ("fig9b", "recommend")}
    assert [target for target, said in told.items() if "TTFT_P99: read by make recommend alone" in said] == ["fig9b"]
    assert "QPS" not in told["fig9b"]
    told = {target: checkout.make(target, "TP=2").stderr for target in ("fig9b", "capacity")}
    assert [target for target, said in told.items() if "TP: read by make recommend or capacity alone" in said] == ["fig9b"]


def test_every_variable_stands_beside_a_target_that_reads_it(checkout: Checkout) -> None:
    named = GENERAL.union(*READS.values())
    assert {re.sub(r"_P\d\d$", "_P99", name) for name in KNOWN} == named
    for target in TARGETS:
        listed = checkout.make("-n", target, *given("x")).stdout
        used = {re.sub(r"_P\d\d$", "_P99", name) for name in re.findall(r"\$\{?([A-Z][A-Z0-9_]*)", listed) if name in KNOWN}
        assert used <= READS[target] | GENERAL, target


def test_help_is_ten_targets_in_80_columns_and_help_all_the_rest(checkout: Checkout) -> None:
    ten, everything = checkout.make().stdout, checkout.make("help-all").stdout
    assert len(re.findall(r"^  make ", ten, re.M)) == 10
    assert set(re.findall(r"^  make (\S+)", everything, re.M)) == set(TARGETS)
    assert {name for name in KNOWN if name not in VARIABLES} <= set(re.findall(r"^  ([A-Z0-9_]+) ", everything, re.M))
    assert max(map(len, (ten + everything).splitlines())) <= 80
    for target, names in READS.items():
        (shown,) = re.findall(rf"^  make {target} (.*?)(?=^  make |^variables)", everything, re.M | re.S)
        assert not names or set(re.findall(r"[A-Z0-9_]+", re.findall(r"\{(.*)\}", shown, re.S)[-1])) == names


def test_the_bags_of_the_run_are_handed_to_its_table(checkout: Checkout) -> None:
    for figure in ("smoke", "fig9a", "fig9b"):
        assert checkout.make(figure).returncode == 0
        run, table = (call for call in checkout.calls() if figure in call)
        (ran,), (shown,) = ([word for word in call if word.startswith("--bags=")] for call in (run, table))
        assert ran == shown
        assert not list((checkout.folder / "artifacts" / "report").iterdir())


@pytest.mark.parametrize(
    ("words", "starts"),
    [
        (["--testbed=cpu", "--out=my-sim-runs", "--", "fig9a"], True),
        (["--testbed=auto", "--", "smoke"], True),
        (["--testbed", "cpu", "mine.yaml"], True),
        (["--testbed=a100-sim", "--", "fig9a"], False),
        (["--testbed=here/mine.yaml", "--", "fig9b"], False),
        (["--testbed=cpu", "--plan", "--", "fig9a"], False),
        (["--testbed=here/mine.yaml", "doctor"], False),
    ],
)
def test_the_image_starts_ray_for_a_measuring_run_only(checkout: Checkout, words: list[str], starts: bool) -> None:
    mine = checkout.folder / "here" / "mine.yaml"
    mine.parent.mkdir()
    mine.write_text("testbed: mine\nplatform: simulated\n")
    for name in ("ray", "python"):
        shutil.copy(checkout.bin / "docker", checkout.bin / name)
    command = [checkout.folder / "docker" / "entrypoint.sh", "python", "-m", "experiments.run", *words]
    env = {"PATH": f"{checkout.bin}:{os.environ['PATH']}", "CALLS": str(checkout.calls_file)}
    subprocess.run(command, cwd=checkout.folder, env=env, check=True)
    assert any(call[0] == "ray" for call in checkout.calls()) == starts
    assert ["python", "-m", "experiments.run", *words] in checkout.calls()


def test_what_was_compiled_is_there_for_the_next_command_in_the_same_image(checkout: Checkout) -> None:
    def cache(image: str) -> str:
        (checkout.bin / "docker").write_text(STUB.replace("sha256:1234", image))
        checkout.make("verify", "IN=docker", "TARGET=cpu", "USER_FLAGS=")
        (call,) = [call for call in checkout.calls() if call[:2] == ["docker", "run"]]
        (mounted,) = [word for word in call if word.endswith('"target=/tmp/cache"')]
        return mounted

    one, other = "sha256:" + 64 * "1", "sha256:" + 64 * "2"
    assert cache(one) == cache(one) != cache(other)
    assert f"{checkout.folder}/.image/cache-111111111111" in cache(one)
    command = [checkout.folder / "docker" / "entrypoint.sh", "bash", "-c", "echo $XDG_CACHE_HOME; env"]
    first, *variables = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    kept = {name for name, _, value in (line.partition("=") for line in variables) if value.startswith(first)}
    assert first == "/tmp/cache"
    assert {"VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH"} <= kept


RUNS = {
    "fig9a-cpu/open-0123abcd/trials/s/t/steps": False,
    "fig9a-cpu/.seal-0123abcd/x": False,
    "fig9a-cpu/bag-0123abcd-1/x": True,
}
OTHERS = {"my/fig9a-cpu/open-0123abcd/x": True, "runs/a/open-0123abcd/x": True, "home/open-source/x": True}


@pytest.mark.parametrize("out", ["my runs", "öde 雪", "-rf", "-", "a'b", "*", "$(touch pwned)"])
def test_clean_removes_unfinished_trials_of_its_folder_only(checkout: Checkout, out: str) -> None:
    more = {"fig9a-cpu/open-source/x": True, "fig9a-cpu/deeper/open-0123abcd/x": True}
    there = {f"{out}/{name}": stays for name, stays in (RUNS | more).items()} | OTHERS
    for name in there:
        (checkout.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout.folder / name).write_text("")
    done = checkout.make("clean", f"OUT={out}")
    assert done.returncode == 0, done.stderr
    assert {name: (checkout.folder / name).exists() for name in there} == there
    assert not (checkout.folder / ".venv").exists()


@pytest.mark.parametrize("out", ["/", ".", "..", "", "~", "~/..", "x/../..", "link"])
def test_clean_refuses_a_folder_that_holds_more_than_runs(checkout: Checkout, out: str) -> None:
    (checkout.folder / "x").mkdir()
    (checkout.folder / "link").symlink_to(checkout.home)
    before = checkout.files()
    done = checkout.make("clean", f"OUT={out.replace('~', str(checkout.home))}")
    assert done.returncode == 2
    first, *rest = done.stderr.splitlines()
    assert first.startswith(("error: OUT: got ", "Makefile:")), first
    assert all(line.startswith("make: *** [") for line in rest)
    assert checkout.files() == before


def test_only_in_its_own_folder(checkout: Checkout) -> None:
    (checkout.home / ".venv").mkdir()
    done = subprocess.run(
        ["make", "-f", checkout.folder / "Makefile", "clean"], cwd=checkout.home, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "make -C FOLDER" in done.stderr
    assert (checkout.home / ".venv").exists()
