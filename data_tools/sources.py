"""The input files a command line means, and how they are cut into spans for the workers."""

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
_NOT_TEXT = (".rejects.jsonl", ".card.json", ".bin", ".idx", ".tmp", ".model")  # what the data tools write


@dataclass(frozen=True)
class Source:
    """One input file. ``groups``: how many row groups a parquet file has."""

    path: str
    kind: str  # jsonl, gzip, parquet or text
    size: int
    mtime_ns: int
    groups: int = 0

    def check_unchanged(self) -> None:
        """Raise DataError if the file is no longer the one that was found at the start."""
        status = os.stat(self.path) if os.path.exists(self.path) else None  # noqa: PTH110, PTH116
        if status is None or (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
            raise DataError(f"{self.path}: changed while it was being read")


class Span(NamedTuple):
    """What one worker reads of a source without looking left or right: the lines that start in the bytes
    [start, stop) of a jsonl file, the row group ``start`` of a parquet file, or the whole of another file."""

    source: Source
    start: int
    stop: int
    size: int  # bytes, about, for balance and progress


def find_sources(pattern: str) -> list[Source]:
    """The files that a file name, a folder or a glob means, sorted; commas separate several of these.

    The suffix tells jsonl (``.jsonl``, ``.json``, ``.ndjson``, each also ``.gz``) and parquet; any other file is plain
    text, one document. In folders and globs, hidden files and what the data tools themselves write are left out. Raises
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
    """`` (did you mean 'x'?)`` for the file beside ``path`` with the closest name, or an empty string."""
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
    """Cut a source into spans of about ``size`` bytes, in order; the same cuts whoever reads them."""
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
    """Spans in order, gathered into units of work of about ``size`` bytes (many small files make one)."""
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
