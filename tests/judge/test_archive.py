"""Packages: the same bytes each time, verified without the engine; hostile archives refused, with nothing written outside."""

from __future__ import annotations

import gzip
import html.parser
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import bagit
import pandas as pd
import pytest

from analysis.judge import archive
from analysis.judge.verify import main, verify
from analysis.show import report, summary
from experiments.records.errors import SpecError
from experiments.records.provenance import ROOT, sha256
from experiments.records.store import to_json
from experiments.records.tables import MOST_ROWS


@pytest.fixture(scope="module")
def packed(simulated_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    assert main(["--runs", str(simulated_runs), "--report", str(folder / "report")]) in (0, 1, 2)
    assert report.main(["--runs", str(simulated_runs), "--report", str(folder / "report")]) == 0
    target = folder / "package.zip"
    options = ["--runs", str(simulated_runs), "--report", str(folder / "report"), "--target", str(target)]
    assert archive.main(options) == 0
    return target


def test_a_package_is_the_same_bytes_each_time(packed: Path, simulated_runs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(simulated_runs, copy)
    for path in copy.rglob("*"):
        os.utime(path, (0, 0))
    archive.package(copy, packed.parent / "report", tmp_path / "again.zip")
    assert sha256(tmp_path / "again.zip") == sha256(packed)


def test_a_package_holds_runs_report_reference_and_a_manifest_that_sha256sum_checks(packed: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(packed) as file:
        file.extractall(tmp_path)
    command = ["sha256sum", "--quiet", "--strict", "-c", "manifest-sha256.txt"]
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == 0
    for name in ("report/index.html", "report/verdict.json", "reference/claims.yaml", "README.md"):
        assert (tmp_path / name).is_file()
    bagit.Bag(str(next(tmp_path.glob("runs/*/bag-*")))).validate()


def test_a_package_gets_the_verdicts_elsewhere_that_it_got_here(packed: Path, simulated_runs: Path, tmp_path: Path) -> None:
    status = main(["--bag", str(packed), "--report", str(tmp_path)])
    there, here = json.loads((tmp_path / "verdict.json").read_text()), verify(simulated_runs)
    assert status == here["status"]
    assert there["claims"] == json.loads(to_json(here["claims"]))
    assert there["archive"] == {"name": "package.zip", "sha256": sha256(packed), "integrity": []}


def test_a_package_is_verified_without_the_engine(packed: Path, tmp_path: Path) -> None:
    """What the core lock does not hold cannot be imported."""
    finder = "class No:\n  def find_spec(self, name, *_):\n    if name in ('vllm', 'torch', 'ray'): raise ImportError(name)\n"
    blocked = f"import sys\n{finder}sys.meta_path.insert(0, No())\n"
    options = ["--bag", str(packed), "--report", str(tmp_path)]
    code = f"{blocked}from analysis.judge.verify import main; sys.exit(main({options!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 2), done.stderr
    assert done.stderr == ""


def test_a_package_that_was_changed_fails_and_says_what(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(packed) as old, zipfile.ZipFile(tmp_path / "new.zip", "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry, data.replace(b'"overall"', b'"0verall"') if entry.filename == "report/verdict.json" else data)
        new.writestr("report/added.html", "x")
    assert main(["--bag", str(tmp_path / "new.zip"), "--report", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "changed: report/verdict.json" in printed
    assert "unlisted: report/added.html" in printed
    assert printed.splitlines()[-1] == "FAIL"


@pytest.mark.parametrize(
    ("command", "more", "key"),
    [
        (main, [], "claims"),
        (summary.main, ["fig9a"], "points"),
        (report.main, [], "report"),
        (archive.main, ["--target"], "sha256"),
    ],
)
def test_json_is_one_line_and_quiet_is_none(
    command: Callable[[list[str]], int], more: list[str], key: str, packed: Path, simulated_runs: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    target = [str(tmp_path / "x.zip")] if more == ["--target"] else []
    options = ["--runs", str(simulated_runs), "--report", str(packed.parent / "report"), *more, *target]
    status = command([*options, "--json"])
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    assert json.loads(captured.out)[key]
    assert command([*options, "--quiet"]) == status
    assert capsys.readouterr() == ("", captured.err)


def bag_of(runs: Path) -> Path:
    return next(runs.glob("*/bag-*"))


@pytest.mark.parametrize("suffix", ["zip", "tar", "gztar", "bztar", "xztar"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_bare_bag_or_run_in_any_usual_archive_is_verified(
    simulated_runs: Path, tmp_path: Path, suffix: str, whole: bool
) -> None:
    root, base = (bag_of(simulated_runs).parent, "." if whole else bag_of(simulated_runs).name)
    made = shutil.make_archive(str(tmp_path / "bag"), suffix, root, base)
    main(["--bag", made, "--report", str(tmp_path)])
    result = json.loads((tmp_path / "verdict.json").read_text())
    assert [part["name"] for part in result["runs"]] == ["fig9a-a100-sim"]
    assert result["runs"][0]["figure"] == "fig9a"
    assert result["runs"][0]["integrity"] == []


# -- hostile archives ------------------------------------------------------------------------------------------------


def tar_of(*members: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as file:  # type: ignore[call-overload]
        for info, data in members:
            info.size = len(data) or info.size
            file.addfile(info, io.BytesIO(data) if data else None)
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, target, size
    return info


def zip_of(*entries: tuple[str, bytes], mode: int = 0o100644) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.create_system = mode << 16, 3
            info.filename = name  # as it was given
            file.writestr(info, data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def lying_zip() -> bytes:
    """Says 10 bytes, holds a megabyte."""
    data = bytearray(zip_of(("data/x", bytes(2**20))))
    real, said = (2**20).to_bytes(4, "little"), (10).to_bytes(4, "little")
    return bytes(data.replace(real, said))


def gzip_bomb() -> bytes:
    """A tar whose only header is followed by zeros without end, as far as it goes: 50 MB in 50 kB."""
    info = member("pax", tarfile.XHDTYPE, size=50 * 2**20)
    return gzip.compress(info.tobuf() + bytes(50 * 2**20), 1)


def sparse() -> bytes:
    info = member("data/x", tarfile.GNUTYPE_SPARSE)
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:398] = b"00000000000\0"  # first hole
    header[483:495] = b"77777777777\0"  # real size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(1024)


def zip64() -> bytes:
    """A list of files whose end says that it is of 64 bits."""
    data = zip_of(("data/x", b"x"))
    return data[:-22] + b"PK\6\7" + bytes(16) + data[-22:]


def long_list() -> bytes:
    data = bytearray(zip_of(("data/x", b"x")))
    data[-10:-6] = (2**25).to_bytes(4, "little")
    return bytes(data)


HOSTILE: dict[str, Callable[[], bytes]] = {
    "tar: parent folder": lambda: tar_of((member("../escaped"), b"x")),
    "tar: parent inside": lambda: tar_of((member("data/../../escaped"), b"x")),
    "tar: absolute": lambda: tar_of((member("/tmp/escaped"), b"x")),
    "tar: symlink": lambda: tar_of((member("data", tarfile.SYMTYPE, "/etc"), b"")),
    "tar: file through a symlink": lambda: tar_of((member("data", tarfile.SYMTYPE, ".."), b""), (member("data/escaped"), b"x")),
    "tar: hard link": lambda: tar_of((member("data/x", tarfile.LNKTYPE, "/etc/passwd"), b"")),
    "tar: character device": lambda: tar_of((member("data/x", tarfile.CHRTYPE), b"")),
    "tar: block device": lambda: tar_of((member("data/x", tarfile.BLKTYPE), b"")),
    "tar: fifo": lambda: tar_of((member("data/x", tarfile.FIFOTYPE), b"")),
    "tar: absurd size": lambda: member("data/x", size=2**50).tobuf(tarfile.GNU_FORMAT) + bytes(10240),
    "tar: negative size": lambda: member("data/x", size=-(2**40)).tobuf(tarfile.GNU_FORMAT) + bytes(10240),
    "tar: sparse": sparse,
    "tar: bomb in a header": gzip_bomb,
    "tar: the same file twice": lambda: tar_of((member("data/x"), b"x"), (member("data/x"), b"y")),
    "tar: a file as a folder": lambda: tar_of((member("data"), b"x"), (member("data/x"), b"y")),
    "tar: control characters": lambda: tar_of((member("data/\x1b]0;owned\x07"), b"x")),
    "tar: cut short": lambda: tar_of((member("data/x"), b"x" * 5000))[:3000],
    "tar.gz: cut short": lambda: tar_of((member("data/x"), os.urandom(50_000)), mode="w:gz")[:20_000],
    "zip: parent folder": lambda: zip_of(("../escaped", b"x")),
    "zip: absolute": lambda: zip_of(("/tmp/escaped", b"x")),
    "zip: backslashes": lambda: zip_of(("..\\escaped", b"x")),
    "zip: drive": lambda: zip_of(("C:escaped", b"x")),
    "zip: symlink": lambda: zip_of(("data", b"/etc/passwd"), mode=stat.S_IFLNK | 0o777),
    "zip: device": lambda: zip_of(("data/x", b""), mode=stat.S_IFCHR | 0o666),
    "zip: holds more than it says": lying_zip,
    "zip: bomb": lambda: zip_of(("data/x", bytes(2**21 + 1))),
    "zip: bombs together": lambda: zip_of(*((f"data/{n}", bytes(2**20)) for n in range(8))),
    "zip: a dot as a name": lambda: zip_of(("data/./x", b"x")),
    "nothing": lambda: b"",
    "no archive": lambda: b"hello\n" * 100,
    "zip: a list of 64 bits": zip64,
    "zip: a list of 32 MB": long_list,
    "tar: folders without end": lambda: tar_of(*((member(f"f{n}", tarfile.DIRTYPE), b"") for n in range(3000)), mode="w:gz"),
    "an empty zip": lambda: zip_of(),
    "no bag": lambda: zip_of(("readme.txt", b"x")),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_is_refused_and_nothing_is_written_outside(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(archive, "MOST_FILE", 2**21)
    monkeypatch.setattr(archive, "MOST_ENTRIES", 1000)
    monkeypatch.setattr(archive, "MOST_BYTES", 2**22)
    where = tmp_path / "a" / "b"
    (where / "tmp").mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(where / "tmp"))
    (where / "hostile").write_bytes(HOSTILE[name]())
    before = sorted(path for path in tmp_path.rglob("*"))
    assert main(["--bag", str(where / "hostile"), "--report", str(tmp_path / "report")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "\x1b" not in captured.err
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert not Path("/tmp/escaped").exists()


# -- hostile content, in bags that are whole ----------------------------------------------------------------------------

SCRIPT = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>\x1b]0;owned\x07[bold][/nothing][link=x]$\\frac{$"


def resealed(bag: Path) -> None:
    """The bag as a hostile hand would seal it: valid, whatever is in it."""
    data = bag / "data"
    for path in bag.iterdir():
        if path != data:
            path.unlink()
    for path in data.iterdir():
        shutil.move(path, bag / path.name)
    data.rmdir()
    bagit.make_bag(str(bag), {"External-Identifier": "fig9a-a100-sim-01234567"}, checksums=["sha256"])


def edit_json(path: Path, edit: Callable[[dict[str, object]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_scripts_and_control_characters_in_a_bag_stay_text(
    runs_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bag = bag_of(runs_copy)
    edit_json(bag / "data" / "plan.json", lambda plan: plan.update(testbed_title=SCRIPT, not_run=[SCRIPT]))
    for path in bag.glob("data/trials/*/*/trial.json"):
        edit_json(path, lambda facts: facts["machine"].update(cpu=SCRIPT, note=SCRIPT))  # type: ignore[attr-defined]
    resealed(bag)
    assert main(["--runs", str(runs_copy), "--report", str(tmp_path / "report")]) in (0, 1, 2)
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    assert "[bold]" in printed.out  # shown, not obeyed
    assert report.main(["--runs", str(runs_copy), "--report", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "alert(1)" in page

    class Tags(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag != "script"
            assert not [name for name, _ in attrs if name.startswith("on")]

    Tags().feed(page)
    for picture in (tmp_path / "report").glob("*.svg"):
        assert "<script" not in picture.read_text()


def deep(bag: Path) -> None:
    (bag / "data" / "plan.json").write_text("[" * 100_000)


def wrong_types(bag: Path) -> None:
    edit_json(bag / "data" / "plan.json", lambda plan: plan.update(sessions=7, scale="x"))


def no_trials(bag: Path) -> None:
    shutil.rmtree(bag / "data" / "trials")


def other_columns(bag: Path) -> None:
    pd.DataFrame({"a": [1]}).to_parquet(next(bag.glob("data/trials/*/*/steps.parquet")))


def no_parquet(bag: Path) -> None:
    next(bag.glob("data/trials/*/*/tokens.parquet")).write_bytes(b"PAR1 or not")


def no_numbers(bag: Path) -> None:
    path = next(bag.glob("data/trials/*/*/requests.csv"))
    path.write_text(path.read_text().replace("0", "zero"))


def a_name_that_climbs(bag: Path) -> None:
    edit_json(next(bag.glob("data/trials/*/pass-1/trial.json")), lambda facts: facts.update(session="../../escaped"))


@pytest.mark.parametrize("spoil", [a_name_that_climbs, deep, wrong_types, no_trials, other_columns, no_parquet, no_numbers])
def test_a_whole_bag_of_nonsense_is_inconclusive_and_does_not_keep_others_from_their_verdicts(
    spoil: Callable[[Path], None], runs_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = verify(runs_copy)
    shutil.copytree(bag_of(runs_copy).parent, runs_copy / "another")
    (spoiled,) = (path for path in runs_copy.iterdir() if path.name != "another")
    bag = next(spoiled.glob("bag-*"))
    spoil(bag)
    resealed(bag)
    report_folder = tmp_path / "report"
    report_folder.mkdir()
    (report_folder / "verdict.json").write_text("of other runs")
    assert main(["--runs", str(runs_copy), "--report", str(report_folder)]) == 2
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "cannot be read: " in captured.out
    found = json.loads((report_folder / "verdict.json").read_text())
    assert found["overall"] == "INCONCLUSIVE"
    assert {part["name"]: bool(part.get("unreadable")) for part in found["runs"]} == {"another": False, spoiled.name: True}
    others = [entry for entry in found["claims"] if entry["run"] == "another"]
    judged = [entry for entry in alone["claims"] if entry["run"]]
    assert [entry["verdict"] for entry in others] == [entry["verdict"] for entry in judged]
    assert {entry["verdict"] for entry in found["claims"] if entry["run"] == spoiled.name} <= {"INCONCLUSIVE"}
    assert report.main(["--runs", str(runs_copy), "--report", str(report_folder)]) == 0


def test_a_table_of_absurd_length_is_refused_before_it_is_read(
    runs_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MOST_ROWS, "steps.parquet", 3)
    assert main(["--runs", str(runs_copy), "--report", str(tmp_path)]) == 2
    assert "rows of" in capsys.readouterr().out


def test_a_verdict_of_other_runs_is_not_packed_and_that_is_said(
    packed: Path, runs_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--runs", str(runs_copy), "--report", str(packed.parent / "report"), "--target", str(tmp_path / "x.zip")]
    assert archive.main(options) == 0
    assert "no report in it" not in capsys.readouterr().out
    bag = bag_of(runs_copy)
    (bag / "data" / "figure.yaml").write_text("# changed\n")
    resealed(bag)
    assert archive.main(options) == 0
    assert f"{bag.name} is not what was judged" in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / "x.zip") as file:
        names = file.namelist()
    assert not [name for name in names if name.startswith("report/")]
    assert [name for name in names if name.startswith("runs/")]


def test_bare_bags_are_of_what_their_plans_say(simulated_runs: Path, tmp_path: Path) -> None:
    for testbed in ("a.b-1", "a.b-2"):
        bag = Path(shutil.copytree(bag_of(simulated_runs), tmp_path / "unpacked" / testbed))
        edit_json(bag / "data" / "plan.json", lambda plan, testbed=testbed: plan.update(testbed=testbed))  # type: ignore[misc]
    runs = archive.runs_in(tmp_path / "unpacked")
    assert sorted(path.name for path in runs.iterdir()) == ["fig9a-a.b-1", "fig9a-a.b-2"]


def test_a_broken_bag_fails_the_figure_of_its_plan_and_no_other(runs_copy: Path) -> None:
    bag = bag_of(runs_copy)
    edit_json(bag / "data" / "plan.json", lambda plan: plan.update(figure="fig9b-x"))
    resealed(bag)
    with (bag / "data" / "figure.yaml").open("a") as file:
        file.write("# changed")
    bag.parent.rename(runs_copy / "fig9b-x-a100-sim")
    found = verify(runs_copy)
    assert (found["overall"], found["runs"][0]["figure"]) == ("FAIL", "fig9b-x")
    assert {entry["verdict"] for entry in found["claims"]} == {"NOT-RUN"}


def test_nothing_to_pack_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert archive.main(["--runs", str(tmp_path), "--target", str(tmp_path / "x.zip")]) == 2
    assert "no finished run" in capsys.readouterr().err
    assert not (tmp_path / "x.zip").exists()


def test_no_such_archive_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no bag in this archive"):
        archive.runs_in(tmp_path)
    assert main(["--bag", str(tmp_path / "none"), "--report", str(tmp_path)]) == 2


# -- archives of archives, and what is missing ----------------------------------------------------------------------------


def repacked(packed: Path, target: Path, edit: Callable[[str, bytes], tuple[str, bytes] | None]) -> Path:
    """The archive with every file renamed, changed or (None) left out."""
    with zipfile.ZipFile(packed) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            if kept := edit(entry.filename, old.read(entry)):
                new.writestr(*kept)
    return target


def verdict_of(archive_file: Path, report_folder: Path) -> dict[str, object]:
    main(["--bag", str(archive_file), "--report", str(report_folder)])
    return json.loads((report_folder / "verdict.json").read_text())  # type: ignore[no-any-return]


def test_a_package_that_lacks_a_file_is_incomplete_not_fail(packed: Path, tmp_path: Path) -> None:
    for left_out in ("report/index.html", "runs/fig9a-a100-sim/"):  # of a bag, the first of its trials' steps
        dropped: list[str] = []

        def edit(name: str, data: bytes, start: str = left_out, dropped: list[str] = dropped) -> tuple[str, bytes] | None:
            if not dropped and name.startswith(start) and name.endswith(("html", "steps.parquet")):
                dropped.append(name)
                return None
            return name, data

        found = verdict_of(repacked(packed, tmp_path / "less.zip", edit), tmp_path / "report")
        assert dropped
        assert found["overall"] == "INCONCLUSIVE"
        assert found["archive"]["integrity"] == [f"missing: {dropped[0]}"]  # type: ignore[index]


def test_a_package_in_a_folder_is_checked_against_its_manifest(packed: Path, tmp_path: Path) -> None:
    whole = repacked(packed, tmp_path / "whole.zip", lambda name, data: (f"a/package/{name}", data))
    found = verdict_of(whole, tmp_path / "report")
    assert found["archive"]["integrity"] == []  # type: ignore[index]
    assert found["claims"] == verdict_of(packed, tmp_path / "report")["claims"]
    changed = repacked(
        packed, tmp_path / "new.zip", lambda n, data: (f"package/{n}", data + b" " if n == "report/verdict.json" else data)
    )
    found = verdict_of(changed, tmp_path / "report")
    assert found["overall"] == "FAIL"
    assert found["archive"]["integrity"] == ["changed: report/verdict.json"]  # type: ignore[index]


def test_two_folders_of_runs_in_an_archive_are_refused_by_name(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = repacked(packed, tmp_path / "twice.zip", lambda name, data: (name, data))
    with zipfile.ZipFile(packed) as old, zipfile.ZipFile(twice, "a") as new:
        for entry in (entry for entry in old.infolist() if entry.filename.startswith("runs/")):
            new.writestr(f"second/{entry.filename}", old.read(entry))
    assert main(["--bag", str(twice), "--report", str(tmp_path / "report")]) == 2
    assert "bags in 2 folders of runs: runs, second/runs" in capsys.readouterr().err
