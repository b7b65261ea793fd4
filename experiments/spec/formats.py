"""Requests out of the files that people have, read by content: CSV with any separator, JSON, one after another or in lists."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pandas as pd

from experiments.records.errors import SpecError
from experiments.spec.shapes import SHAPES, SUMMED, Columns, pick, plain

ERRORS = {"error", "errors", "errorcode", "errormessage"}
FINE = {"", "none", "null", "nan", "0", "0.0", "false", "ok", "[]", "{}"}  # what they say of a request that went well
UNFINISHED = {"errored", "incomplete"}  # GuideLLM's lists of requests that did not end well
APART = {"cachereadinputtokens", "cachecreationinputtokens"}  # Anthropic's usage counts them beside input_tokens
MEANS = (  # of a summary: prompt tokens, output tokens, of how many requests they are the sum
    ("total_input_tokens", "total_output_tokens", "completed"),  # vllm bench serve, SGLang
    ("Total input tokens", "Total generated tokens", "Successful requests"),  # what they print
    ("input_tokens", "output_tokens", SUMMED),  # OpenAI's usage of an organization
    ("input_sequence_length.avg", "output_sequence_length.avg", ""),  # AIPerf, GenAI-Perf
    ("metrics.prompt_token_count.successful.mean", "metrics.output_token_count.successful.mean", ""),  # GuideLLM
    ("results_number_input_tokens_mean", "results_number_output_tokens_mean", ""),  # LLMPerf
)
TEXTS = {"prompt", "text", "messages", "conversation", "conversations", "question", "instruction", "requestinputs", "payloads"}
NO_TEXT = {  # how a file begins that is none of these
    b"version https://git-lfs": "a pointer of Git LFS in place of the file; git lfs pull fetches it",
    b"PK\x03\x04": "an archive or a workbook; unpack it, or save it as CSV",
    b"\x28\xb5\x2f\xfd": "a zstd archive; unpack it with zstd -d",
    b"BZh": "a bzip2 archive; unpack it with bunzip2",
    b"\xfd7zXZ": "an xz archive; unpack it with unxz",
    b"<": "a web page; fetch the file that it shows",
}
DETAILS = "vllm bench serve --save-result --save-detailed, SGLang's --output-details, AIPerf's profile_export.jsonl, "
DETAILS += "GuideLLM's JSON have them"
COUNTED = "vllm bench serve --dataset-path FILE --save-result --save-detailed counts them, and its result is read here"
REQUEST = ("row", "prompt", "output", "start", "hashes", "trouble", "said")  # one as the file has it, in the columns of a frame
LONE = re.compile(
    r"(\\\\|\\u[dD][89abAB]\w\w\\u[dD][c-fC-F]\w\w)|\\u[dD][89a-fA-F]\w\w"
)  # half of a character, cut off in JSON
MOST_RUNS = 1000  # how far something with requests is looked for in a list of something else
MOST_LINES = 20  # how far a header is looked for, behind a comment or Excel's sep=;
csv.field_size_limit(2**31 - 1)  # a field may hold all texts of a run


class Found(NamedTuple):
    """The requests of a run."""

    requests: pd.DataFrame
    columns: Columns
    node: Any = None  # what else the file tells of the run, such as its `duration` in seconds


def find_requests(data: bytes) -> list[Found]:
    """The requests in a file, a Found for each run. Raises SpecError where there are none: what there is, and the way on."""
    if data.startswith(b"PAR1"):
        found = _from_parquet(data)
    else:
        text = _text(data)
        found = _from_json(text) if text.lstrip()[:1] in ("{", "[") else _from_csv(text)
    if not sum(len(run.requests) for run in found):
        raise SpecError("got no requests; allowed: at least one")
    return found


def _text(data: bytes) -> str:
    """Unpacked and decoded."""
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise SpecError(f"cut off or damaged gzip ({error}); fetch it again") from None
    for start, what in NO_TEXT.items():
        if data[:99].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(start):
            raise SpecError(f"got {what}")
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(f"cannot be read: not text in UTF-8 (byte {error.start}); CSV or JSON in it is expected") from None


def _from_csv(text: str) -> list[Found]:
    """A table with a header. Rows count as lines do, the first is 1."""
    separator, text = _separated(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    lines = ((reader.line_num, fields) for fields in reader if any(fields))
    try:
        header = next(lines, (0, []))[1]
        if not header:
            raise SpecError("got an empty file; allowed: at least one request")
        first = next(lines, (0, header))
        if len(first[1]) == len(header) + 1:  # a separator ends each row, or a name begins it, or a comma parts thousands
            header = [*header, ""] if not first[1][-1] else header if separator == "," else ["", *header]
        columns = pick(header)
        if columns is None:
            if len(header) == 1 and header[0].endswith(":"):
                raise SpecError("got YAML; save it as JSON, as GuideLLM does with --output kind=json")
            seen = [fields for _, fields in chain([first], islice(lines, MOST_LINES))]
            _refuse([*(dict(zip(header, fields, strict=False)) for fields in seen), *_printed(text, header, seen)])
        if not first[0]:
            raise SpecError("got a header without rows; allowed: at least one request")
        prompt, output = header.index(columns.prompt), header.index(columns.output)
        if "".join(first[1][prompt : prompt + 1]).startswith("["):  # a run in each row, as vllm bench sweep has it
            return list(_runs([dict(zip(header, map(_cell, fields), strict=False)) for _, fields in chain([first], lines)]))
        start = header.index(columns.start) if columns.start else None
        rows: list[tuple[object, ...]] = []
        for line, fields in chain([first], lines):
            if len(fields) == len(header):
                rows.append((line, fields[prompt], fields[output], fields[start] if start is not None else None, None, "", ""))
            else:
                rows.append((line, "", "", None, None, f"of other than {len(header)} fields", f"{len(fields)} fields"))
    except csv.Error as error:
        raise SpecError(f"row {reader.line_num}: not valid CSV: {error}; it may be cut off there") from None
    if len(fields) < len(header) and not text.endswith(("\n", "\r")):
        raise SpecError(f"cut off in row {line}: got {len(fields)} of {len(header)} fields; fetch it again, or delete that row")
    return [Found(pd.DataFrame(rows, columns=REQUEST, dtype=object), columns)]


def _separated(text: str) -> tuple[str, str]:
    """What separates the fields of a table, and its text from the header on; the lines before it are empty."""
    for line in islice(re.finditer(r"[^\r\n]+", text), MOST_LINES):
        if marks := [mark for mark in ",;\t| " if pick(line[0].split(mark))]:
            return marks[0], "\n" * len(text[: line.start()].splitlines()) + text[line.start() :]
        if not line[0].startswith(("#", "sep=")):
            break
    return max(",;\t|", key=text.lstrip().partition("\n")[0].count), text


def _cell(text: str) -> Any:
    """A list where a field of a table holds one."""
    with suppress(ValueError):
        return json.loads(text) if text.startswith("[") else text
    return text


def _printed(text: str, header: Sequence[str], seen: Iterable[Sequence[str]]) -> Iterator[dict[str, Any]]:
    """The means that a client printed, as keys; those of AIPerf's and GenAI-Perf's tables, which have a row for each metric."""
    yield dict(re.findall(r"^(Successful requests|Total \w+ tokens):\s+(\d+)\s*$", text, re.M))
    if header[0] == "Metric":
        names = [re.sub(r" \(.*", "", name).lower().replace(" ", "_") for name, *_ in seen]
        values = ((value.replace(",", "") for value in own) for _, *own in seen)
        yield {name: dict(zip(header[1:], own, strict=False)) for name, own in zip(names, values, strict=True)}


def _from_json(text: str) -> list[Found]:
    """JSON, or several of it in turn, such as a line for each request or for each run."""
    decoder, every, position = json.JSONDecoder(), [], 0
    text = LONE.sub(lambda found: found[1] or r"\ufffd", text)
    try:
        while tail := re.compile(r"\S").search(text, position):
            one, position = decoder.raw_decode(text, tail.start())
            every.append(one)
    except json.JSONDecodeError as error:
        if error.msg.startswith("Unterminated") or not re.search(r'["}\],:\n]', text[error.pos :].rstrip()):
            raise SpecError(f"cut off in line {error.lineno}, in the middle of its JSON; fetch it again") from None
        raise SpecError(f"line {error.lineno}: not valid JSON: {error.msg}; CSV or JSON is expected") from None
    except ValueError as error:  # a number of thousands of digits
        raise SpecError(f"not valid JSON: {error}; CSV or JSON is expected") from None
    return list(_runs(every)) or _refuse(every)


def _from_parquet(data: bytes) -> list[Found]:
    try:
        every = pd.read_parquet(io.BytesIO(data)).to_dict("records")
    except Exception as error:  # of any kind: what is damaged may be a type, a key, a codec
        raise SpecError(f"cut off or damaged Parquet ({' '.join(str(error).split())[:60]}); fetch it again") from None
    return list(_runs(every)) or _refuse(every)


def _runs(node: Any, trouble: str = "") -> Iterator[Found]:
    """The runs at any depth of what JSON holds: a list of requests, or lists of equal length, a value for each request."""
    if isinstance(node, list):
        table = pd.json_normalize([one for one in node if isinstance(one, dict)])
        columns = pick(map(str, table.columns))
        if columns and not any(isinstance(one, list) for one in table[columns.prompt]):
            yield Found(_requests(table, columns, trouble), columns)
            return
        some = False
        for number, one in enumerate(node):
            if number == MOST_RUNS and not some:
                return  # a list of something else
            for found in _runs(one, trouble):
                some = True
                yield found
    elif isinstance(node, dict):
        lists = {key: value for key, value in node.items() if isinstance(value, list)}
        if columns := pick(lists):
            counts = [len(lists[name]) for name in columns[:2]]
            if counts[0] != counts[1]:
                told = f"{columns.prompt}, {columns.output}: got {counts[0]} and {counts[1]} values"
                raise SpecError(f"{told}; allowed: as many of each; fetch it again")
            if node.get("request_rate") in ("inf", math.inf):
                columns = columns._replace(start=None)  # all were sent at once: their starts are of no traffic
            even = {key: pd.Series(value, dtype=object) for key, value in lists.items() if len(value) == counts[0]}
            yield Found(_requests(pd.DataFrame(even), columns, trouble), columns, node)
        else:
            for key, value in node.items():
                yield from _runs(value, "failed" if key in UNFINISHED else trouble)


def _requests(table: pd.DataFrame, columns: Columns, trouble: str) -> pd.DataFrame:
    """A run's requests in the columns REQUEST; those of which it tells an error failed."""
    said = pd.Series("", index=table.index, dtype=object)
    for name in table.columns:
        if plain(name.partition(".")[0]) in ERRORS:
            text = table[name].map(str).astype(object)
            said = said.mask((said == "") & ~text.str.strip().str.lower().isin(FINE), text)
    if more := [name for name in table.columns if plain(name) in APART and plain(columns.prompt) == "inputtokens"]:
        whole = table[[columns.prompt, *more]].apply(pd.to_numeric, errors="coerce").sum(axis=1, min_count=1)
        table = table.assign(**{columns.prompt: whole})
    values = (range(1, len(table) + 1), *(table.get(name) for name in (*columns[:3], "hash_ids")))
    troubles = np.where(said == "", trouble, "failed")
    return pd.DataFrame(dict(zip(REQUEST, (*values, troubles, said), strict=True)), index=table.index, dtype=object)


def _refuse(every: list[Any]) -> NoReturn:
    """Raises SpecError for what holds no requests: what it is instead, and the way on."""
    names: dict[str, str] = {}
    for one in islice(_objects(every), MOST_RUNS):
        names |= {plain(name): name for name in one}
        for prompt, output, count in MEANS:
            tokens = [number_at(one, prompt), number_at(one, output)]
            many = number_at(one, count) if count else 1.0
            if many == 0:
                raise all_failed()
            if all(0 < number < math.inf for number in (*tokens, many)):
                means = [max(round(number / many), 1) for number in tokens]
                told = f"got a summary, {means[0]} and {means[1]} tokens at the mean, without its requests: {DETAILS}"
                raise SpecError(f"{told}; or have all alike: TRACE={means[0]}/{means[1]}")
    requests = every[0] if len(every) == 1 and isinstance(every[0], list) else every
    if all(said := [_said(one) if isinstance(one, dict) else "" for one in requests]) and said:
        raise all_failed(said[0])
    if texts := [name for key, name in names.items() if key in TEXTS]:
        raise SpecError(f"got texts ({', '.join(texts)[:60]}) without both numbers of tokens: {COUNTED}")
    if {"avg", "mean", "p50", "p99", "tokenmetrics"} & set(names):  # the last as in GuideLLM's table
        raise SpecError(f"got a summary without its requests: {DETAILS}")
    found = [[names.get(plain(name), "") for name in needed.split()] for needed, _, _ in SHAPES]
    if both := next(filter(all, found), None):
        raise SpecError(f"got {' and '.join(both)}, but in no request both; allowed: a list of requests, or a list of each")
    for (needed, _, _), there in zip(SHAPES, found, strict=True):
        if len(there) == 2 and any(there):
            lacks = needed.split()[1 if there[0] else 0]
            raise SpecError(f"got {''.join(there)} without {lacks}; allowed: both, a number of tokens in each request")
    told = ", ".join(names.values())[:60] or "nothing with a name"
    allowed = "columns or keys such as num_prefill_tokens and num_decode_tokens; docs/workload.md has all"
    raise SpecError(f"got {told!r}; allowed: {allowed}; or have all requests alike: TRACE=512/128")


def _said(request: dict[str, Any]) -> str:
    """The error that it tells, if any."""
    told = (str(value) for key, value in request.items() if plain(key) in ERRORS and not isinstance(value, int | list))
    return next((text for text in told if text.strip().lower() not in FINE), "")


def all_failed(said: str = "") -> SpecError:
    """The error for a run without any request that ended well, and what was said of the first."""
    first = f", the first with {said[:60]!r}" if said else ""
    return SpecError(f"got a run in which every request failed{first}; its server's log says why; run it again")


def _objects(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    for one in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _objects(one)


def number_at(node: Any, path: str = "") -> float:
    """The number under these keys of what JSON holds, NaN where there is none."""
    try:
        for key in filter(None, path.split(".")):
            node = node[key]
        return float(node)
    except (KeyError, TypeError, ValueError, OverflowError):
        return math.nan
