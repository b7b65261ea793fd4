"""Our own figures, testbeds and calibrations, past and present, by their sha256: what is theirs is not taken from a bag's word.

`python -m analysis.judge.known` renews artifacts/reference/known.yaml: the files at hand are added, and those of every commit.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any

import yaml
from pydantic import Field
from pydantic.dataclasses import dataclass

from experiments.records.errors import SpecError
from experiments.records.provenance import ROOT
from experiments.records.store import write_whole
from experiments.records.terminal import arguments, command, console, parse, result, written
from experiments.simulator.calibration import CALIBRATIONS
from experiments.spec.spec import FIGURES, STRICT, TESTBEDS, Count, Name, read_spec

KNOWN = ROOT / "artifacts" / "reference" / "known.yaml"
FOLDERS = {"figures": FIGURES, "testbeds": TESTBEDS, "calibrations": CALIBRATIONS}
OURS = re.compile(r"(?:experiments/(?:spec/)?(figures|testbeds)|artifacts/(calibration))/[^/]+\.yaml")  # past places, too
HEAD = """\
# The files of this artifact, past and present, by their sha256: a verdict takes from here what a bag may only say of itself.
# python -m analysis.judge.known renews it. error: relative; step: of step times, held out; prefill, ttft_p50, tbt_p99: of these
# where that is known, else they are taken to be off as the steps are.
"""
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Error = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)]


@dataclass(frozen=True, config=STRICT)
class KnownFigure:
    """A figure of ours."""

    figure: Name


@dataclass(frozen=True, config=STRICT)
class KnownTestbed:
    """A testbed of ours and what its name stands for."""

    testbed: Name
    platform: str
    scale: Count


@dataclass(frozen=True, config=STRICT)
class KnownError:
    """Relative errors of what a calibration predicts."""

    step: Error
    prefill: Error | None = None
    ttft_p50: Error | None = None
    tbt_p99: Error | None = None

    def of(self, quantity: str) -> float:
        """Of prefill, ttft_p50 or tbt_p99; of a step where it is not known of them."""
        found: float | None = getattr(self, quantity)
        return self.step if found is None else found


@dataclass(frozen=True, config=STRICT)
class KnownCalibration:
    """A calibration of ours: what it simulates, and how wrong that is."""

    calibration: Name
    title: str
    error: KnownError


@dataclass(frozen=True, config=STRICT)
class Known:
    """Everything of ours; sha256 of the file -> what it is."""

    figures: dict[Digest, KnownFigure]
    testbeds: dict[Digest, KnownTestbed]
    calibrations: dict[Digest, KnownCalibration]


@cache
def load_known() -> Known:
    """artifacts/reference/known.yaml. Raises SpecError."""
    return read_spec(KNOWN, Known)


def calibration_of(engine: Mapping[str, Any], identity: Mapping[str, Any]) -> KnownCalibration | None:
    """The calibration that a simulated engine names (its facts), by the hash in the run's identity; None if it is not ours."""
    name = str(engine.get("calibration"))
    found = load_known().calibrations.get(str(identity.get(name)))
    return found if found and found.calibration == name else None


def _entry(kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
    if kind == "calibrations":
        errors = {"step": data["error"]["held_out"]}
        errors |= {name: data["error"][name] for name in ("prefill", "ttft_p50", "tbt_p99") if name in data["error"]}
        return {"calibration": data["calibration"], "title": data["title"], "error": errors}
    return {key: data[key] for key in (("figure",) if kind == "figures" else ("testbed", "platform", "scale"))}


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


def collect(known: Mapping[str, Any], files: Iterator[tuple[str, bytes]]) -> dict[str, Any]:
    """What is known, with these files added, in the order of their names. What is known of a file already stays."""
    found = {kind: dict(known.get(kind, {})) for kind in FOLDERS}
    for kind, content in files:
        found[kind].setdefault(hashlib.sha256(content).hexdigest(), _entry(kind, yaml.safe_load(content)))
    for kind, own in found.items():
        found[kind] = dict(sorted(own.items(), key=lambda item: (*map(str, item[1].values()), item[0])))
    return found


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 where there is no history to read."""
    parse(arguments("analysis.judge.known", __doc__), argv)
    known = yaml.safe_load(KNOWN.read_text()) if KNOWN.is_file() else {}
    found = collect(collect(known, at_hand()), in_history())
    write_whole(KNOWN, HEAD + yaml.safe_dump(found, sort_keys=False, default_flow_style=None, width=130))
    console.print(written(KNOWN))
    result(known={kind: len(own) for kind, own in found.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
