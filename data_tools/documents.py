"""Reads documents from jsonl, jsonl.gz, parquet and plain text, checking every line.

A line of jsonl must be UTF-8 and one JSON object whose text is a string. Some things that ``json.loads`` accepts are
refused, too, with file, line and reason: NaN and Infinity, duplicate keys, and lone surrogates (which UTF-8 cannot
encode). Accepted are a byte order mark at the start of a file, CRLF line ends, blank lines (counted as empty) and
``\\u0000`` in a text (it round-trips). Only ``\\n`` ends a line. Lines, rows and bytes count from 1.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar

from data_tools import parquet
from data_tools.sources import Span
from megatron_lite.data.messages import decode, kind
from megatron_lite.errors import DataError

T = TypeVar("T")
MAX_LINE_BYTES = 128 << 20


class Record(NamedTuple, Generic[T]):
    """One line (row, text file) of a span, numbered within the span: its content, or the error that refuses it."""

    line: int
    content: T
    error: str = ""
    excerpt: str = ""


def read(span: Span, text_key: str = "text", max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Record[str]]:
    """Every line of the span as a text, good or refused. A blank line or an empty document is an empty text.

    Raises DataError if a file cannot be read any further: missing, truncated gzip, not parquet, no such column.
    """
    if span.source.kind == "parquet":
        yield from _read_parquet(span, text_key)
    elif span.source.kind == "text":
        with _file_errors(span):
            yield _read_text(Path(span.source.path), max_line_bytes)
    else:
        yield from _read_lines(span, lambda raw: parse(raw, text_key), "", max_line_bytes)


def read_objects(span: Span, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Record[dict[str, Any] | None]]:
    """Every line of the span as an object, good or refused; a blank line is None. Raises as ``read`` does."""
    if span.source.kind == "parquet":
        for line, row in enumerate(parquet.objects(span.source.path, span.start), 1):
            yield Record(line, row, "invalid UTF-8 in a string" if row is None else "")
    elif span.source.kind == "text":
        raise DataError(
            f"{span.source.path}: plain text holds no conversations; expected .jsonl, .jsonl.gz or .parquet"
        )
    else:
        yield from _read_lines(span, parse_object, None, max_line_bytes)


def _read_lines(span: Span, parse: Callable[[bytes], T], nothing: T, limit: int) -> Iterator[Record[T]]:
    with _file_errors(span):
        if span.source.kind == "gzip":
            with gzip.open(span.source.path) as file:
                # Faster than GzipFile.readline, which runs Python code for each line.
                yield from _read_jsonl(io.BufferedReader(file, 1 << 20), 0, 1 << 63, parse, nothing, limit)  # type: ignore[arg-type]
        else:
            with Path(span.source.path).open("rb", buffering=1 << 20) as file:
                yield from _read_jsonl(file, span.start, span.stop, parse, nothing, limit)


@contextmanager
def _file_errors(span: Span) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{span.source.path}: damaged gzip file: {error}") from None
    except OSError as error:
        raise DataError(f"{span.source.path}: {error.strerror or error}") from None


def _read_jsonl(
    file: BinaryIO, start: int, stop: int, parse: Callable[[bytes], T], nothing: T, limit: int
) -> Iterator[Record[T]]:
    position = start
    if start:  # a line that crosses `start` belongs to the span before
        file.seek(start - 1)
        position = start - 1 + _skip_line(file)
    line = 0
    while position < stop and (raw := file.readline(limit + 1)):
        first = position == 0
        position += len(raw)
        line += 1
        if len(raw) > limit and not raw.endswith(b"\n"):
            position += _skip_line(file)
            yield _refused(line, nothing, f"longer than {limit} bytes (--max_line_bytes)", raw)
            continue
        try:
            yield Record(line, parse(raw.removeprefix(codecs.BOM_UTF8) if first else raw))
        except ValueError as error:
            yield _refused(line, nothing, str(error), raw)


def _skip_line(file: BinaryIO) -> int:
    """Read to the end of the line in bounded memory; returns the number of bytes."""
    skipped = 0
    while chunk := file.readline(1 << 20):
        skipped += len(chunk)
        if chunk.endswith(b"\n"):
            break
    return skipped


def _refused(line: int, nothing: T, error: str, raw: bytes) -> Record[T]:
    return Record(line, nothing, error, raw[:80].decode("utf-8", "backslashreplace"))


def parse_object(raw: bytes) -> dict[str, Any] | None:
    """The object in one line of jsonl, None for a blank line. Raises ValueError with the reason to refuse it."""
    try:
        line = raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"invalid UTF-8 at byte {error.start + 1}") from None
    if not line or line.isspace():
        return None
    if line[0] == "\ufeff":
        raise ValueError("a byte order mark that is not at the start of the file")
    found = decode(line)
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, not {kind(found)}")
    return found


def parse(raw: bytes, text_key: str = "text") -> str:
    """The text of one line of jsonl, ``""`` for a blank line. Raises ValueError with the reason to refuse it."""
    found = parse_object(raw)
    if found is None:
        return ""
    if text_key not in found:
        keys = ", ".join(json.dumps(key) for key in list(found)[:5]) or "none"
        raise ValueError(f"no key {json.dumps(text_key)} (--text_key); its keys are: {keys}")
    text = found[text_key]
    if not isinstance(text, str):
        raise ValueError(f"{json.dumps(text_key)} is {kind(text)}, expected a string")
    check_text(text)
    return text


def check_text(text: str) -> None:
    """Raise ValueError for a text that UTF-8 cannot encode."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise ValueError(f"lone surrogate \\u{code:04x} at character {error.start + 1} of the text") from None


def _read_text(path: Path, limit: int) -> Record[str]:
    if path.stat().st_size > limit:
        with path.open("rb") as file:
            return _refused(1, "", f"longer than {limit} bytes (--max_line_bytes)", file.read(80))
    raw = path.read_bytes()
    try:
        return Record(1, raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line, column = raw.count(b"\n", 0, error.start) + 1, error.start - raw.rfind(b"\n", 0, error.start)
        return _refused(line, "", f"invalid UTF-8 at byte {column}", raw[error.start - column + 1 :])


def _read_parquet(span: Span, text_key: str) -> Iterator[Record[str]]:
    for line, raw in enumerate(parquet.rows(span.source.path, span.start, text_key), 1):
        if raw is None:
            yield _refused(line, "", f"{json.dumps(text_key)} is null, expected a string", b"")
            continue
        try:
            yield Record(line, raw.decode())
        except UnicodeDecodeError as error:
            yield _refused(line, "", f"invalid UTF-8 at byte {error.start + 1}", raw)
