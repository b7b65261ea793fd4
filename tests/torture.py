"""`make torture`: SIGKILL to a random process of a real run's tree, at a random time, again and again.

The run is the smoke figure with the real engine under the real Ray. After every kill that ends the driver, and at the end:
no finished trial lost or changed, no partial trial accepted, no process left, no lock held.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from analysis.judge import integrity
from experiments.records.provenance import ROOT, sha256
from experiments.records.store import trial_is_whole
from experiments.records.terminal import arguments, command, console, parse, result, took

SPAN_S = 25.0  # a kill comes so long after the last one at most; a whole run takes about as long
PATIENCE_S = 300.0  # a driver that is still there so long after the last kill hangs
SWEEP_S = 20.0  # the time that processes have to go after the driver
TRIALS = 3


class TortureError(AssertionError):
    """What must not happen, happened."""


def tree(home: Path) -> list[psutil.Process]:
    """Every process of the run: by its environment, or where its title has overwritten that by the log that it writes."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            logs = any(file.path.startswith(str(home)) for file in process.open_files())
            if logs or process.environ().get("TMPDIR") == str(home):
                found.append(process)
    return found


def left_after(home: Path, seconds: float) -> list[psutil.Process]:
    """What is left of the run once all have gone, or the seconds are over."""
    until = time.monotonic() + seconds
    while (left := tree(home)) and time.monotonic() < until:
        time.sleep(0.2)
    return left


def finished(out: Path) -> dict[str, str]:
    """File -> digest of every trial that counts as finished. Raises TortureError for one that is not whole."""
    found = {}
    for folder in (*out.glob("*/open-*/trials"), *out.glob("*/bag-*/data/trials")):
        for trial in folder.glob("*/*"):
            if not trial_is_whole(trial):
                raise TortureError(f"a partial trial is accepted: {trial}")
            found |= {file.relative_to(folder).as_posix(): sha256(file) for file in trial.iterdir()}
    return found


def check(home: Path, out: Path, before: dict[str, str]) -> dict[str, str]:
    """What must hold once the driver is gone; returns the finished trials."""
    if left := left_after(home, SWEEP_S):
        raise TortureError(f"{SWEEP_S:.0f} s after the driver there are still: {[p.name() for p in left if p.is_running()]}")
    after = finished(out)
    if not before.items() <= after.items():
        raise TortureError(f"lost or changed: {sorted(set(before.items()) - set(after.items()))[:3]}")
    for folder in out.glob("*"):
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TortureError(f"a lock is left: {folder}") from None
        finally:
            os.close(handle)
    for bag in out.glob("*/bag-*"):
        if found := integrity.problems(bag):
            raise TortureError(f"{bag}: {found[0]}")
        if len(after) != 5 * TRIALS:
            raise TortureError(f"{bag}: sealed with {len(after) // 5} of {TRIALS} trials")
    return after


def life(home: Path, out: Path, order: random.Random, kills: int) -> Counter[str]:
    """One driver from start to end, with at most so many kills; returns whom they hit."""
    hit: Counter[str] = Counter()
    environment = {**os.environ, "TMPDIR": str(home)}
    run = [sys.executable, "-m", "experiments.run", "smoke", "--testbed", "cpu", "--out", str(out)]
    with (home / "log").open("a") as log:
        driver = subprocess.Popen(run, cwd=ROOT, env=environment, stdout=log, stderr=log)
    while driver.poll() is None:
        try:
            driver.wait(order.uniform(0.0, SPAN_S) if hit.total() < kills else PATIENCE_S)
            break
        except subprocess.TimeoutExpired:
            if hit.total() == kills:
                raise TortureError(f"the driver hangs, {PATIENCE_S:.0f} s after the last kill") from None
        victims = tree(home)
        if victims and driver.poll() is None:
            victim = order.choice(victims)
            with contextlib.suppress(psutil.Error):
                name = "driver" if victim.pid == driver.pid else victim.name()
                victim.kill()
                hit[name] += 1
    return hit


def torture(kills: int, seed: int) -> Counter[str]:
    """Runs, killed `kills` times in all, each resumed until it is sealed. Raises TortureError."""
    order, hit, runs = random.Random(seed), Counter[str](), 0
    home = Path(tempfile.mkdtemp(prefix="t-"))  # short: Ray's sockets lie in it
    try:
        before: dict[str, str] = {}
        sealed = False
        while hit.total() < kills or not sealed:
            out, began = home / f"runs-{runs}", time.monotonic()
            whom = life(home, out, order, kills - hit.total())
            hit += whom
            before = check(home, out, before)
            sealed, seconds = bool(list(out.glob("*/bag-*"))), time.monotonic() - began
            console.print(f"{hit.total()} kills; {seconds:.0f} s; now {dict(whom)}; {len(before) // 5} of {TRIALS} trials")
            if sealed:
                before, runs = {}, runs + 1
        console.print(f"{hit.total()} kills over {runs} runs, all sealed, in {took()}: {dict(hit.most_common())}")
    except TortureError:
        print((home / "log").read_text()[-3000:], file=sys.stderr)
        raise
    finally:
        for process in tree(home):
            with contextlib.suppress(psutil.Error):
                process.kill()
        shutil.rmtree(home, ignore_errors=True)
    return hit


@command
def main() -> int:
    """Exit status 0 if nothing that must not happen happened, else 1."""
    parser = arguments("tests.torture", __doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parse(parser, None)
    try:
        result(kills=torture(options.kills, options.seed))
    except TortureError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
