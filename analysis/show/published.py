"""What a simulated run's calibrations predict of what is published beside Figure 9: artifacts/reference/end_to_end.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from analysis.judge.load import REFERENCE, Run
from experiments.records.metrics import NAMES
from experiments.records.provenance import sha256
from experiments.simulator.calibration import CALIBRATIONS
from experiments.spec.spec import read_yaml

WORDS = {"step": "one step, ms", **{name: f"{word}, s" for name, word in NAMES.items()}}
OF_KIND = {"prefill": ("step",), "serving": tuple(NAMES)}  # Figure 9a's own values stand in its table


def against_published(run: Run) -> pd.DataFrame:
    """calibration, quantity, source, at, predicted, published, off: relative; NaN where nothing is published.

    Empty for a run that was not simulated, and for one with calibrations that are not those at hand.
    """
    known, used = read_yaml(REFERENCE / "end_to_end.yaml"), {str(t.facts["engine"].get("calibration")) for t in run.trials}
    at_hand = {name for name in used & known.keys() if run.plan["identity"].get(name) == sha256(CALIBRATIONS / f"{name}.yaml")}
    rows = [{"calibration": name} | value for name in sorted(at_hand) for value in known[name].get("values", ())]
    table = pd.DataFrame(rows, columns=["calibration", "quantity", "source", "at", "predicted", "published"])
    table["published"] = table["published"].astype(float)
    table = table[table["quantity"].isin(OF_KIND[run.kind])]
    return table.assign(off=(table["predicted"] / table["published"] - 1).round(4) + 0.0).reset_index(drop=True)


def published_lines(table: pd.DataFrame) -> list[str]:
    """A line for each calibration and quantity of against_published."""
    return [
        f"{name} against published, {WORDS[str(quantity)]}: {'; '.join(map(_said, rows.to_dict('records')))}"
        for (name, quantity), rows in table.groupby(["calibration", "quantity"], sort=False)
    ]


def _said(row: Mapping[Any, Any]) -> str:
    beside = f" ({row['source']}: {row['published']:.4g}, {row['off']:+.0%})" if row["published"] > 0 else " (not published)"
    return f"{row['at']} {row['predicted']:.4g}{beside}"
