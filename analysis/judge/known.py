"""Our own figures, testbeds and calibrations, past and present, by their sha256: what is theirs is not taken from a bag's word.

`python -m analysis.judge.known` renews artifacts/reference/known.yaml: the files at hand are added, and those of every commit.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import yaml

from experiments.records.errors import SpecError
from experiments.records.provenance import ROOT
from experiments.records.store import write_whole
from experiments.records.terminal import arguments, command, console, parse, result, written
from experiments.simulator.calibration import CALIBRATIONS
from experiments.spec.spec import FIGURES, TESTBEDS, read_yaml

KNOWN = ROOT / "artifacts" / "reference" / "known.yaml"
FOLDERS = {"figures": FIGURES, "testbeds": TESTBEDS, "calibrations": CALIBRATIONS}
KEPT = {"figures": ("figure",), "testbeds": ("testbed", "platform", "scale"), "calibrations": ("calibration", "title")}
OURS = re.compile(r"(?:experiments/(?:spec/)?(figures|testbeds)|artifacts/(calibration))/[^/]+\.yaml")  # past places, too
HEAD = """\
# The files of this artifact, past and present, by their sha256: a verdict takes from here what a bag may only say of itself.
# python -m analysis.judge.known renews it. error: relative; step: of step times, held out; prefill, ttft_p50, tbt_p99: of these
# where that is known, else they are taken to be off as the steps are.
"""
Known = dict[str, dict[str, dict[str, Any]]]  # figures, testbeds or calibrations -> sha256 of a file -> what it is


@cache
def load_known() -> Known:
    """artifacts/reference/known.yaml. Raises SpecError."""
    return read_yaml(KNOWN)


def calibration_of(engine: Mapping[str, Any], identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The calibration that a simulated engine names (its facts), by the hash in the run's identity; None if it is not ours."""
    name = str(engine.get("calibration"))
    found = load_known()["calibrations"].get(str(identity.get(name)))
    return found if found and found["calibration"] == name else None


def error_of(calibration: Mapping[str, Any], quantity: str) -> float:
    """Relative error of prefill, ttft_p50 or tbt_p99 as a calibration of ours predicts it; of a step where it is not known."""
    return float(calibration["error"].get(quantity, calibration["error"]["step"]))


def _entry(kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
    entry = {key: data[key] for key in KEPT[kind]}
    if kind == "calibrations":
        own = {name: data["error"][name] for name in ("prefill", "ttft_p50", "tbt_p99") if name in data["error"]}
        entry["error"] = {"step": data["error"]["held_out"]} | own
    return entry


def at_hand() -> Iterator[tuple[str, bytes]]:
    """Kind and content of our files in the tree."""
    for kind, folder in FOLDERS.items():
        yield from ((kind, path.read_bytes()) for path in sorted(folder.glob("*.yaml")))


def in_history() -> Iterator[tuple[str, bytes]]:
    """The same of every commit. Raises SpecError where there is no history."""

    def git(*words: str) -> bytes:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, check=True).stdout

    try:
        listed = git("log", "--raw", "--no-renames", "--no-abbrev", "--format=", "--", "experiments", "artifacts").decode()
        for blob, path in dict.fromkeys(re.findall(r"^:\S+ \S+ \S+ (\S+) [AM]\t(.+)$", listed, re.M)):
            if found := OURS.fullmatch(path):
                yield found[1] or "calibrations", git("cat-file", "blob", blob)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SpecError(f"{ROOT}: its history cannot be read ({error}); git and a clone are needed") from None


def collect(known: Known, files: Iterable[tuple[str, bytes]]) -> Known:
    """What is known, with these files added, in the order of their names. What is known of a file already stays."""
    found = {kind: dict(known.get(kind, {})) for kind in FOLDERS}
    for kind, content in files:
        found[kind].setdefault(hashlib.sha256(content).hexdigest(), _entry(kind, yaml.safe_load(content)))
    return {
        kind: dict(sorted(own.items(), key=lambda item: (*map(str, item[1].values()), item[0]))) for kind, own in found.items()
    }


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 where there is no history to read."""
    parse(arguments("analysis.judge.known", __doc__), argv)
    found = collect(read_yaml(KNOWN) if KNOWN.is_file() else {}, [*at_hand(), *in_history()])
    write_whole(KNOWN, HEAD + yaml.safe_dump(found, sort_keys=False, default_flow_style=None, width=130))
    console.print(written(KNOWN))
    result(known={kind: len(own) for kind, own in found.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
