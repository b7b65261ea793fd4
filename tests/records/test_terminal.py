"""How every command ends: nobody reads, Ctrl-C, a full disk, bad arguments; and outputs that are whole or not there."""

from __future__ import annotations

import ast
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.records.errors import SpecError
from experiments.records.provenance import ROOT
from experiments.records.store import write_whole
from experiments.records.terminal import command, console, tell

SOURCES = [path for folder in ("experiments", "analysis", "tests/bench") for path in sorted((ROOT / folder).rglob("*.py"))]
SOURCES += [ROOT / "tests" / "torture.py", ROOT / "tests" / "screenshots.py"]
COMMANDS = [path for path in SOURCES if '__name__ == "__main__"' in path.read_text()]
RUN = [sys.executable, "-m", "experiments.run"]
SIM = ["fig9a", "--testbed", "a100-sim", "--replicates", "1", "--out"]


def run(words: list[str], **how: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=ROOT, text=True, stderr=subprocess.PIPE, check=False, **how)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_every_command_ends_in_the_same_way(path: Path) -> None:
    (main,) = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert [ast.unparse(decorator) for decorator in main.decorator_list] == ["command"]


# -- nobody reads --------------------------------------------------------------------------------------------------------


def unread(words: list[str], shown: int) -> tuple[int, str]:
    """Exit status and errors of a command whose output is read for so many lines, then no more."""
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    for _ in range(shown):
        process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    return process.wait(), errors


@pytest.mark.parametrize("shown", [0, 12])
def test_a_run_goes_on_when_nobody_reads_and_is_sealed(tmp_path: Path, shown: int) -> None:
    assert unread([*RUN, *SIM, str(tmp_path)], shown) == (0, "")
    assert len(list(tmp_path.glob("fig9a-a100-sim/bag-*/data/trials/*/*"))) == 12


@pytest.mark.parametrize("more", [[], ["--json"]])
@pytest.mark.parametrize("module", ["analysis.judge.verify", "analysis.show.summary", "analysis.judge.archive"])
def test_an_unread_command_has_the_exit_status_of_what_it_found(
    simulated_runs: Path, tmp_path: Path, module: str, more: list[str]
) -> None:
    words = [sys.executable, "-m", module, "--runs", str(simulated_runs), "--report", str(tmp_path), *more]
    words += {"analysis.show.summary": ["fig9a"], "analysis.judge.archive": ["--target", str(tmp_path / "x.zip")]}.get(
        module, []
    )
    read = run(words, stdout=subprocess.DEVNULL)
    assert read.returncode == (2 if module.endswith("verify") else 0)  # one replicate is INCONCLUSIVE
    assert unread(words, 0) == (read.returncode, read.stderr)
    assert run(["bash", "-c", '"$@" >&-', "bash", *words]).returncode == read.returncode


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_full_standard_output_is_one_line(simulated_runs: Path, tmp_path: Path, more: list[str]) -> None:
    words = [sys.executable, "-m", "analysis.judge.verify", "--runs", str(simulated_runs), "--report", str(tmp_path), *more]
    with Path("/dev/full").open("w") as full:
        done = run(words, stdout=full)
    assert (done.returncode, done.stderr) == (2, "error: standard output: No space left on device\n")


# -- interrupted ---------------------------------------------------------------------------------------------------------


def test_any_command_that_is_interrupted_says_so_in_a_line(tmp_path: Path) -> None:
    code = (
        "import sys, time; from experiments.spec import workload;"
        "workload.fetch_trace = lambda *_: (print('there', flush=True), time.sleep(60)); sys.exit(workload.main([]))"
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        time.sleep(0.1)
        process.send_signal(number)
        assert process.communicate()[1] == "interrupted\n"
        assert process.returncode == 130


@pytest.mark.parametrize("module", ["experiments.run", "analysis.judge.verify"])
def test_while_it_still_imports_it_is_interrupted_in_a_line_too(tmp_path: Path, module: str) -> None:
    (tmp_path / "rich.py").write_text("import time; print('there', flush=True); time.sleep(60)")
    process = subprocess.Popen(
        [sys.executable, "-m", module], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "interrupted\n")
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (SpecError("QPS: got 0; allowed: more"), 2, "error: QPS: got 0; allowed: more\n"),
        (OSError(28, "No space left on device", "here.csv"), 2, "error: here.csv: No space left on device\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_last_words(error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main() -> int:
        raise error

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert main() == status
    assert capsys.readouterr().err == said
    error.add_note("all is kept")
    assert main() == status
    assert capsys.readouterr().err == f"{said.strip()}; all is kept\n"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_long_error_is_one_line_in_a_file_and_wraps_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for terminal, lines in ((False, 1), (True, 3)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        tell("error: " + "a word " * 30)
        assert len(capsys.readouterr().err.splitlines()) == lines


def test_a_defect_of_ours_is_no_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main() -> int:
        console.print("begun")
        tell("told")
        return {}["nothing"]  # type: ignore[no-any-return]

    assert main() == 3
    assert "KeyError: 'nothing'" in capsys.readouterr().err


# -- arguments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "words", "said"),
    [
        ("experiments.run", ["fig9a", "--replicates", "x"], "REPLICATES: invalid int value: 'x'"),
        ("experiments.run", ["fig9a", "--testbed="], "TESTBED: got nothing"),
        ("experiments.run", ["fig9a", "--out= "], "OUT: got nothing"),
        ("analysis.judge.verify", ["--runs="], "OUT: got nothing"),
        *(
            (module, ["--runs", "nowhere", *more], "OUT: got nowhere; no such folder; make fig9a makes a first run in it")
            for module, more in (
                ("analysis.judge.verify", []),
                ("analysis.judge.archive", []),
                ("analysis.show.report", []),
                ("analysis.show.summary", ["fig9a"]),
                ("analysis.advise.validate", []),
            )
        ),
        (
            "analysis.advise.recommend",
            ["--model", "yi-34b", "QPS=1e9"],
            "QPS: got '1e9'; allowed: a number above 0.001, at most 1e+06",
        ),
        (
            "analysis.advise.recommend",
            ["--model", "yi-34b", "TBT_P99=1e308"],
            "TBT_P99: got '1e308'; allowed: seconds, or milliseconds as 300ms: a number above 0, at most 1e+06",
        ),
        (
            "analysis.advise.recommend",
            ["TBT_P99=nan"],
            "TBT_P99: got 'nan'; allowed: seconds, or milliseconds as 300ms: a number above 0, at most 1e+06",
        ),
        ("analysis.advise.recommend", ["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_bad_arguments_are_one_line_that_names_the_variable(
    module: str,
    words: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert importlib.import_module(module).main(words) == 2
    assert capsys.readouterr().err == f"error: {said}\n"
    assert not list(tmp_path.iterdir())


# -- outputs -------------------------------------------------------------------------------------------------------------


def fails_half_way(path: Path) -> None:
    with path.open("w") as file:
        file.write("half")
        raise OSError(28, "No space left on device")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "täble.csv"
    for content in ("text\n", b"text\n", lambda path: path.write_text("text\n")):
        target.unlink(missing_ok=True)
        write_whole(target, content)
        assert target.read_bytes() == b"text\n"
    with pytest.raises(OSError, match="No space left on device") as error:
        write_whole(target, fails_half_way)
    assert error.value.filename == str(target)
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert target.read_bytes() == b"text\n"


def limited(kilobytes: int) -> Callable[[], None]:
    """A process that can write no file of more, as if the disk were full."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1000, kilobytes * 1000))

    return limit


@pytest.mark.parametrize(
    ("module", "words", "kilobytes", "target"),
    [
        ("analysis.show.summary", ["fig9a"], 1, "fig9a-a100-sim.csv"),
        ("analysis.judge.verify", [], 1, "verdict.json"),
        ("analysis.show.report", [], 20, "fig9a-a100-sim"),
        ("analysis.judge.archive", ["--target", "REPORT/package.zip"], 50, "package.zip"),
        ("analysis.advise.paper_capacity", [], 1, "capacity-a100"),
        ("analysis.advise.recommend", ["--testbed=a100-sim", "--model=yi-34b", "TBT_P99=0.5"], 1, "recommend-a100-sim-yi-34b"),
    ],
)
def test_a_full_disk_leaves_no_half_output_and_is_named(
    simulated_runs: Path, tmp_path: Path, module: str, words: list[str], kilobytes: int, target: str
) -> None:
    where = ["--report", str(tmp_path)]
    if module.startswith(("analysis.show", "analysis.judge")):
        where += ["--runs", str(simulated_runs)]
    if module == "analysis.show.report":
        run([sys.executable, "-m", "analysis.judge.verify", *where], stdout=subprocess.DEVNULL)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    words = [sys.executable, "-m", module, *where, *(word.replace("REPORT", str(tmp_path)) for word in words)]
    done = run(words, stdout=subprocess.DEVNULL, preexec_fn=limited(kilobytes))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {tmp_path / target}"), done.stderr
    assert done.stderr.endswith(": File too large\n")
    assert done.stderr.count("\n") == 1
    whole = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.items() <= whole.items()
    assert all(path.stat().st_size < 1000 * kilobytes for path in whole.keys() - before.keys())


WRITES = {"write_text", "write_bytes", "to_csv", "savefig", "to_parquet", "ZipFile", "copyfile"}
ELSEWHERE = {  # writes into a place of its own that is renamed or removed as a whole
    "store.py": "trials and bags",
    "archive.py": "_zip, which write_whole calls",
    "vllm_engine.py": "a temporary folder",
    "bench_serve.py": "a temporary folder",
    "check_server.py": "a temporary folder",
    "screenshots.py": "a temporary folder",
    "tables.py": "a temporary folder",
    "worker.py": "the null device",
    "torture.py": "a temporary folder",
}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_is_written_in_place(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    found = set()
    for call in calls:
        name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        to_a_file = name in WRITES and not (name == "to_csv" and not call.args)
        if to_a_file or (name == "open" and any(isinstance(a, ast.Constant) and str(a.value)[:1] in "wax" for a in call.args)):
            found.add(ast.unparse(call)[:80])
    assert not found or path.name in ELSEWHERE, found


# -- the table of the run ------------------------------------------------------------------------------------------------


def test_the_table_is_of_the_bags_that_the_run_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from analysis.show import summary
    from experiments.run import main

    runs, bags = tmp_path / "runs", tmp_path / "bags"
    mine = tmp_path / "my testbed.yaml"
    text = (ROOT / "experiments" / "spec" / "testbeds" / "a100-sim.yaml").read_text()
    mine.write_text(text.replace("testbed: a100-sim", "testbed: mine"))
    options = ["fig9a", "--replicates", "1", "--out", str(runs), "--bags", str(bags)]
    assert main([*options, "--testbed", str(mine)]) == 0
    assert main([*options, "--testbed", "a100-sim"]) == 0
    assert main([*options, "--testbed", str(mine)]) == 0  # complete already; a100-sim's run is newer
    (bag,) = runs.glob("fig9a-mine/bag-*")
    assert json.loads(bags.read_text()) == [str(bag)]
    capsys.readouterr()
    where = ["--runs", str(runs), "--report", str(tmp_path), "--json", "fig9a"]
    for more, testbed in (
        (["--bags", str(bags)], "mine"),
        (["--testbed", str(mine)], "mine"),
        (["--testbed", "a100-sim"], "a100-sim"),
    ):
        assert summary.main([*more, *where]) == 0
        assert json.loads(capsys.readouterr().out)["testbed"] == testbed
    shutil.rmtree(bag)
    assert summary.main(["--testbed", str(mine), *where]) == 2
    assert "no finished fig9a on testbed mine; make fig9a TESTBED=" in capsys.readouterr().err
    assert os.access(bags, os.R_OK)
