"""Reading documents: jsonl, jsonl.gz, parquet and plain text, every line checked before anything is made of it.

What a line of jsonl must be: UTF-8, one JSON object, its text a string. Refused, with file, line and reason, are also
what ``json.loads`` lets pass: NaN and Infinity, a key given twice (which one is meant?) and lone surrogates (which no
UTF-8 can carry). Accepted: a byte order mark at the start of a file, CRLF line ends, blank lines (counted as empty) and
``\\u0000`` in a text (it round-trips). A line ends at ``\\n`` and nowhere else. Lines, rows and bytes count from 1.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from data_tools import parquet
from data_tools.sources import Span
from megatron_lite.errors import DataError

MAX_LINE_BYTES = 128 << 20
_TYPES = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}


class Record(NamedTuple):
    """One line (row, text file) of a span, numbered within the span: its text, or why it is refused."""

    line: int
    text: str
    error: str = ""
    excerpt: str = ""


def read(span: Span, text_key: str = "text", max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Record]:
    """Every line of the span as one Record, good or bad. An empty text stands for a blank line or an empty document.

    Raises DataError where a file cannot be read on: gone, cut-off gzip, not parquet, no such column.
    """
    path = span.source.path
    try:
        if span.source.kind == "parquet":
            yield from _read_parquet(span, text_key)
        elif span.source.kind == "text":
            yield _read_text(Path(path), max_line_bytes)
        elif span.source.kind == "gzip":
            with gzip.open(path) as file:
                # GzipFile is a BufferedIOBase; its own readline goes through Python for each line.
                yield from _read_jsonl(io.BufferedReader(file, 1 << 20), 0, 1 << 63, text_key, max_line_bytes)  # type: ignore[arg-type]
        else:
            with Path(path).open("rb", buffering=1 << 20) as file:
                yield from _read_jsonl(file, span.start, span.stop, text_key, max_line_bytes)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: damaged gzip file: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def _read_jsonl(file: BinaryIO, start: int, stop: int, text_key: str, limit: int) -> Iterator[Record]:
    position = start
    if start:  # the line that runs across `start` belongs to the span before
        file.seek(start - 1)
        position = start - 1 + _skip_line(file)
    line = 0
    while position < stop and (raw := file.readline(limit + 1)):
        first = position == 0
        position += len(raw)
        line += 1
        if len(raw) > limit and not raw.endswith(b"\n"):
            position += _skip_line(file)
            yield _refused(line, f"longer than {limit} bytes (--max_line_bytes)", raw)
            continue
        try:
            yield Record(line, parse(raw.removeprefix(codecs.BOM_UTF8) if first else raw, text_key))
        except ValueError as error:
            yield _refused(line, str(error), raw)


def _skip_line(file: BinaryIO) -> int:
    """Read to the end of the line in bounded memory; how many bytes that was."""
    skipped = 0
    while chunk := file.readline(1 << 20):
        skipped += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return skipped


def _refused(line: int, error: str, raw: bytes) -> Record:
    return Record(line, "", error, raw[:80].decode("utf-8", "backslashreplace"))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {json.dumps(next(key for key in found if keys.count(key) > 1))}")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def parse(raw: bytes, text_key: str = "text") -> str:
    """The text of one line of jsonl; ``""`` for a blank one. Raises ValueError with the reason to refuse it."""
    try:
        line = raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start + 1}") from None
    if not line or line.isspace():
        return ""
    if line[0] == "\ufeff":
        raise ValueError("a byte order mark that is not at the start of the file")
    try:
        found = _DECODER.decode(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON at column {error.pos + 1}: {error.msg}") from None
    except RecursionError:
        raise ValueError("invalid JSON: nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, not {_TYPES.get(type(found), 'null')}")
    if text_key not in found:
        keys = ", ".join(json.dumps(key) for key in list(found)[:5]) or "none"
        raise ValueError(f"no key {json.dumps(text_key)} (--text_key); its keys are: {keys}")
    text = found[text_key]
    if not isinstance(text, str):
        raise ValueError(f"{json.dumps(text_key)} is {_TYPES.get(type(text), 'null')}, expected a string")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise ValueError(f"lone surrogate \\u{code:04x} at character {error.start + 1} of the text") from None
    return text


def _read_text(path: Path, limit: int) -> Record:
    if path.stat().st_size > limit:
        with path.open("rb") as file:
            return _refused(1, f"longer than {limit} bytes (--max_line_bytes)", file.read(80))
    raw = path.read_bytes()
    try:
        return Record(1, raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line, column = raw.count(b"\n", 0, error.start) + 1, error.start - raw.rfind(b"\n", 0, error.start)
        return _refused(line, f"invalid UTF-8 at byte {column}", raw[error.start - column + 1 :])


def _read_parquet(span: Span, text_key: str) -> Iterator[Record]:
    for line, raw in enumerate(parquet.rows(span.source.path, span.start, text_key), 1):
        if raw is None:
            yield _refused(line, f"{json.dumps(text_key)} is null, expected a string", b"")
            continue
        try:
            yield Record(line, raw.decode())
        except UnicodeDecodeError as error:
            yield _refused(line, f"invalid UTF-8 at byte {error.start + 1}", raw)
