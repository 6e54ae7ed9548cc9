"""Finds the input files and cuts them into spans for the workers."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_tools import parquet
from megatron_lite.cli import nearest
from megatron_lite.errors import DataError

_KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".jsonl.gz": "gzip",
    ".ndjson.gz": "gzip",
    ".json.gz": "gzip",
    ".parquet": "parquet",
}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip")
_NOT_TEXT = (".rejects.jsonl", ".card.json", ".bin", ".idx", ".tmp", ".model")  # written by the data tools


@dataclass(frozen=True)
class Source:
    """One input file. ``groups``: the number of row groups of a parquet file."""

    path: str
    kind: str  # jsonl, gzip, parquet or text
    size: int
    mtime_ns: int
    groups: int = 0

    def check_unchanged(self) -> None:
        """Raise DataError if the file has changed since it was found."""
        status = os.stat(self.path) if os.path.exists(self.path) else None  # noqa: PTH110, PTH116
        if status is None or (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise DataError(f"{self.path}: changed while it was being read")


class Span(NamedTuple):
    """A part of a source that can be read independently: the lines that start within bytes [start, stop) of a jsonl
    file, the row group ``start`` of a parquet file, or the whole of any other file."""

    source: Source
    start: int
    stop: int
    size: int  # approximate bytes, for load balance and progress


def find_sources(pattern: str) -> list[Source]:
    """The files named by a file name, a folder or a glob, sorted; several are separated by commas.

    Suffixes identify jsonl (``.jsonl``, ``.json``, ``.ndjson``, each also with ``.gz``) and parquet; any other file is
    plain text and one document. Folders and globs skip hidden files and files that the data tools write. Raises
    DataError if nothing matches.
    """
    paths: dict[Path, None] = {}
    for part in filter(None, pattern.split(",")):
        path = Path(part)
        if path.is_dir():
            found = [p for p in sorted(path.rglob("*")) if not _left_out(p.relative_to(path)) and p.is_file()]
        elif path.exists():
            found = [path] if path.is_file() else []
        else:
            matches = map(Path, sorted(glob.glob(part, recursive=True)))  # noqa: PTH207 (absolute patterns)
            found = [p for p in matches if not _left_out(Path(p.name)) and p.is_file()]
        if not found and path.exists():
            raise DataError(f"{part}: {'no files in this folder' if path.is_dir() else 'not a regular file'}")
        if not found:
            raise DataError(f"no file matches {part!r}{similar(path)}")
        paths.update(dict.fromkeys(found))
    if not paths:
        raise DataError(f"no file matches {pattern!r}")
    return [_source(path) for path in paths]


def similar(path: Path) -> str:
    """`` (did you mean 'x'?)`` for the file in the same folder with the closest name, or an empty string."""
    names = [p.name for p in path.parent.iterdir() if p.name != path.name] if path.parent.is_dir() else []
    return nearest(path.name, names)


def _left_out(path: Path) -> bool:
    return any(part.startswith(".") or part.endswith(_NOT_TEXT) for part in path.parts)


def _source(path: Path) -> Source:
    kind = next((kind for suffix, kind in _KINDS.items() if path.name.endswith(suffix)), "text")
    if kind == "text" and path.suffix in _COMPRESSED:
        raise DataError(f"{path}: compressed text is read only as .jsonl.gz; decompress it first")
    status = path.stat()
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: permission denied")
    groups = parquet.num_row_groups(str(path)) if kind == "parquet" else 0
    return Source(str(path), kind, status.st_size, status.st_mtime_ns, groups)


def spans(source: Source, size: int) -> Iterator[Span]:
    """Cut a source into spans of about ``size`` bytes, in order, always at the same places."""
    if source.kind == "jsonl":
        for start in range(0, max(source.size, 1), size):
            stop = min(start + size, source.size)
            yield Span(source, start, stop, stop - start)
    elif source.kind == "parquet":
        for group in range(source.groups):
            yield Span(source, group, group + 1, source.size // source.groups)
    else:
        yield Span(source, 0, source.size, source.size)


def units(sources: list[Source], size: int) -> Iterator[list[Span]]:
    """Group spans, in order, into units of work of about ``size`` bytes (many small files make one unit)."""
    unit: list[Span] = []
    weight = 0
    for source in sources:
        for span in spans(source, size):
            if unit and weight + span.size > size:
                yield unit
                unit, weight = [], 0
            unit.append(span)
            weight += span.size
    if unit:
        yield unit
