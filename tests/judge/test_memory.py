"""What verify takes at most, whatever an archive holds: 1 GB."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import bagit
import numpy as np
import pandas as pd
import pytest

from experiments.records.provenance import ROOT
from experiments.records.record import REQUEST_COLUMNS, STEP_COLUMNS, TOKEN_COLUMNS
from experiments.records.tables import MOST_ROWS

PEAK_BYTES = 10**9
VERIFY = """
import re, sys
from pathlib import Path
from analysis.judge.verify import main
status = main(sys.argv[1:])
# Not ru_maxrss: that begins with what the process had that started this one.
print(status, 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
"""


def constant(columns: Mapping[str, str], rows: int) -> pd.DataFrame:
    return pd.DataFrame({name: np.zeros(rows, dtype=kind) + (name == "budget") for name, kind in columns.items()}, copy=False)


@pytest.mark.parametrize("share", [1, 5])
def test_the_longest_tables_in_a_small_archive_take_less_than_the_stated_peak(
    share: int, simulated_runs: Path, tmp_path: Path
) -> None:
    """At the bound, where they are read and refused; beyond it, where they are not read."""
    whole, bag = next(simulated_runs.glob("*/bag-*")), tmp_path / "bag"
    shutil.copytree(whole / "data", bag)
    steps, tokens = (share * MOST_ROWS[f"{name}.parquet"] for name in ("steps", "tokens"))
    for trial in sorted(bag.glob("trials/*/*"))[:2]:
        constant(STEP_COLUMNS, steps).to_parquet(trial / "steps.parquet", index=False)
        constant(TOKEN_COLUMNS, tokens).to_parquet(trial / "tokens.parquet", index=False)
        requests = constant(REQUEST_COLUMNS, MOST_ROWS["requests.csv"])
        ones = dict.fromkeys(("prompt_tokens", "output_tokens", "generated_tokens"), 1)
        requests.assign(request=range(len(requests)), **ones).to_csv(trial / "requests.csv", index=False)
    bagit.make_bag(str(bag), checksums=["sha256"])
    packed = shutil.make_archive(str(tmp_path / "small"), "xztar", bag)
    assert Path(packed).stat().st_size < 2_000_000
    command = [sys.executable, "-c", VERIFY, "--bag", packed, "--report", str(tmp_path / "report"), "--quiet"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    status, peak = map(int, done.stdout.split())
    assert status == 2, done.stderr
    assert peak < PEAK_BYTES
