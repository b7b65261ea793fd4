"""Record -> metrics. Pure functions; seconds and tokens throughout."""

from __future__ import annotations

import pandas as pd

from experiments.engine import Record


def prefill_seconds(record: Record) -> pd.Series:
    """Prefill time of each request, seconds, indexed by phase: the summed time of the steps that process its prompt.

    For records in which one request runs at a time and asks for one token, as in Figure 9a, these are the steps from its
    first to its last; the original sums the steps that hold no decode token, which are the same. NaN if it did not finish.
    """
    cumulative = record.steps["seconds"].cumsum()
    before = cumulative.shift(1, fill_value=0.0)
    requests = record.requests.set_index("phase")
    finished = requests[requests["last_step"] >= 0]
    spent = cumulative.to_numpy()[finished["last_step"]] - before.to_numpy()[finished["first_step"]]
    return pd.Series(spent, index=finished.index).reindex(requests.index)
