"""The tables of a trial, read within bounds: a bag may come from anywhere."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from experiments.records.documents import printable
from experiments.records.errors import SpecError
from experiments.records.record import REQUEST_COLUMNS, STEP_COLUMNS, TOKEN_COLUMNS

# Of a table. A simulated trial at the paper's scale has 70,000 steps and half a million tokens; it then takes 100 MB to judge.
MOST_ROWS = {"requests.csv": 200_000, "steps.parquet": 2_000_000, "tokens.parquet": 5_000_000}
ROW_BYTES = 160  # of requests.csv; numbers as we write them take 120


def bag_and_trial(path: Path) -> Path:
    """A trial's directory from its bag on: where an archive was unpacked says nothing."""
    return Path(*path.parts[-5:])


def read_table(path: Path) -> pd.DataFrame:
    """requests.csv, steps.parquet or tokens.parquet of a trial. Raises SpecError, with bag and trial."""
    read = _read_csv if path.suffix == ".csv" else _read_parquet
    try:
        return read(path, MOST_ROWS[path.name])
    except (OSError, ValueError, OverflowError, Warning, pa.ArrowException) as error:
        reason = printable(str(error).split("\n")[0])[:200]
        raise SpecError(
            f"{bag_and_trial(path.parent)}: {path.name}: cannot be read: {reason}; allowed: as we write it"
        ) from None


def rows_of(path: Path) -> int:
    """Rows of a Parquet file as its metadata says; 0 for what is none, which is refused when it is read."""
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, ValueError, pa.ArrowException):
        return 0


def _read_csv(path: Path, most: int) -> pd.DataFrame:
    with path.open("rb") as file:
        data = file.read(most * ROW_BYTES + 1)
    rows, commas = data.count(b"\n") - 1, len(REQUEST_COLUMNS) - 1
    if len(data) > most * ROW_BYTES or rows > most:
        raise ValueError(f"more than {most} rows of {ROW_BYTES} bytes")
    if data.count(b",") != commas * (rows + 1) or not data.startswith(",".join(REQUEST_COLUMNS).encode() + b"\n"):
        raise ValueError(f"not a table of the columns {', '.join(REQUEST_COLUMNS)}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a float in a column of whole numbers is cut with a warning only
        return pd.read_csv(io.BytesIO(data), dtype=REQUEST_COLUMNS)


def _read_parquet(path: Path, most: int) -> pd.DataFrame:
    """Its metadata is read first: a few bytes can stand for billions of rows, and a column could hold anything."""
    columns = STEP_COLUMNS if path.name.startswith("steps") else TOKEN_COLUMNS
    with pq.ParquetFile(path) as file:
        found = file.metadata
        kinds = [(field.name, str(field.type).replace("double", "float64")) for field in file.schema_arrow]
        if found.num_rows > most or kinds != list(columns.items()):
            raise ValueError(f"{found.num_rows} rows of {kinds}; allowed: {most} of {columns}")
        chunks = [found.row_group(g).column(c) for g in range(found.num_row_groups) for c in range(len(columns))]
        size, packed = sum(chunk.total_uncompressed_size for chunk in chunks), {chunk.compression for chunk in chunks}
        if size > 16 * len(columns) * most or packed - {"SNAPPY"}:
            raise ValueError(f"{size} bytes packed with {', '.join(sorted(packed))}; allowed: SNAPPY, 16 bytes a value")
        # Starting threads takes longer than reading a trial's table; split_blocks: the columns are not copied.
        table: pd.DataFrame = file.read(use_threads=False).to_pandas(use_threads=False, split_blocks=True, ignore_metadata=True)
        return table
