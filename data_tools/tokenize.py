"""``data_tools tokenize``: turns documents into an indexed dataset, with many processes in parallel.

The input is cut into units by its bytes alone. Each unit becomes a small dataset, and one process appends these in
order. So the result is bit-identical for any number of workers or MPI ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

from data_tools import workers as processes
from data_tools.documents import MAX_LINE_BYTES
from data_tools.encode import Options, Part, around, named_tokenizer
from data_tools.progress import Progress
from data_tools.sources import Source, Span, find_sources, units
from megatron_lite.cli import nearest, several
from megatron_lite.data.files import storage_errors
from megatron_lite.data.indexed import IndexedWriter, dataset_file, token_dtype
from megatron_lite.data.tokenizer import Tokenizer
from megatron_lite.distributed.env import started_by_mpi
from megatron_lite.errors import ConfigError, DataError, StorageError

_UNIT_BYTES = 4 << 20


def tokenize(
    input: str,
    tokenizer: str,
    out: str,
    workers: int = 0,
    append_eos: bool = True,
    add_bos: bool | None = None,
    parse_special: bool = False,
    text_key: str = "text",
    on_error: str = "stop",
    max_bad: str = "0.1%",
    max_document_tokens: int = 0,
    long_documents: str = "split",
    max_line_bytes: int = MAX_LINE_BYTES,
) -> None:
    """Tokenize text into Megatron's indexed format: OUT.bin, OUT.idx and the dataset card OUT.card.json.

    INPUT is a file, a folder, a glob, or several with commas: jsonl, jsonl.gz, parquet or plain text. --workers=0
    takes one process for each CPU; under mpirun every rank is a worker, on any number of machines that share OUT.
    Each document ends with the end-of-sequence token unless --append_eos=false, and begins with bos if the tokenizer
    itself adds it (as Llama's does), or as --add_bos=true or false says. Text that spells a special token stays text
    unless --parse_special=true. Empty documents are left out.

    A line that is not a document (bad UTF-8, bad JSON, no text, …) stops the work, naming file and line. With
    --on_error=skip it goes to OUT.rejects.jsonl instead, as long as no more lines are bad than --max_bad: a share, such
    as 0.1%, or a number. --max_document_tokens=N cuts longer documents, eos included, into several
    (--long_documents=split) or keeps their beginning (truncate); 0 means no limit. Tokens are uint16 where the
    vocabulary has fewer than 65,500 entries, else int32. The dataset appears when it is complete; an older one at OUT
    is replaced.
    """

    def prepare() -> tuple[Options, dict[str, Any]]:
        mistakes = mistaken_flags(on_error, workers, max_bad, max_document_tokens, max_line_bytes, out)
        if long_documents not in ("split", "truncate"):
            hint = nearest(long_documents, ("split", "truncate"))
            mistakes.append(f"--long_documents={long_documents}: expected split or truncate{hint}")
        if mistakes:
            raise ConfigError("\n".join(mistakes))
        limits = max_document_tokens, long_documents, max_line_bytes
        options = Options(append_eos, add_bos, parse_special, text_key, on_error, *limits)
        model = named_tokenizer(tokenizer)
        facts = describe_tokenizer(tokenizer, model, append_eos)
        if 0 < max_document_tokens <= (taken := sum(map(len, around(model, options)))):
            raise ConfigError(f"--max_document_tokens={max_document_tokens}: bos and eos alone are {taken}")
        return options, facts

    build(input, tokenizer, out, workers, max_bad, prepare)


class Encoding(Protocol):
    """An encoding of the input with its options: a dataclass that is sent to the workers."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def on_error(self) -> str:
        """``stop`` at a refused line, or ``skip`` it."""

    def encode(self, spans: list[Span], prefix: str, tokenizer: str) -> Part:
        """Write the content of ``spans`` as a dataset at ``prefix``."""


def build(
    input: str,
    tokenizer: str,
    out: str,
    workers: int,
    max_bad: str,
    prepare: Callable[[], tuple[Encoding, dict[str, Any]]],
) -> Merger | None:
    """Find the input, encode it with ``workers`` processes or the ranks of an MPI job, write the dataset, report.

    ``prepare``: checks the flags, on one rank; returns the options and further entries of the dataset card. Returns the
    merger with its counts; None on ranks other than 0."""

    def begin_with() -> tuple[Encoding, dict[str, Any], list[Source]]:
        return *prepare(), find_sources(input)

    comm = processes.world() if started_by_mpi() else None
    options, facts, sources = processes.on_root(comm, begin_with)
    writer = IndexedWriter(out, token_dtype(facts["vocab_size"]))
    work = partial(_work, folder=writer.folder, tokenizer=tokenizer, options=options)
    todo = enumerate(units(sources, _UNIT_BYTES))
    with ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(writer)

        processes.on_root(comm, begin)  # from here on, its folder exists
        if comm and comm.rank > 0:
            processes.run_ranks(comm, todo, work, lambda part: None)
            return None
        total = sum(source.size for source in sources)
        merger = Merger(writer, options, stack.enter_context(Progress(total)))
        if comm:
            processes.run_ranks(comm, todo, work, merger.add)
        else:
            count = workers or len(os.sched_getaffinity(0))
            processes.run(todo, work, merger.add, max(1, min(count, total // _UNIT_BYTES + 1)))
        found = merger.finish(sources, max_bad)
        writer.card = facts | found | {"options": asdict(options) | {"max_bad": max_bad}}
    documents = several(writer.num_documents, "document")
    print(f"{documents}, {writer.num_tokens:,} tokens ({writer.dtype}): {writer.prefix}.bin")
    if merger.rejected:
        print(f"{merger.rejected:,} of {several(merger.lines, 'line')} refused: {merger.rejects}")
    return merger


def _work(unit: tuple[int, list[Span]], folder: Path, tokenizer: str, options: Encoding) -> Part:
    number, spans = unit
    if not folder.is_dir():
        raise StorageError(
            f"{folder}: not there on {socket.gethostname()}; --out must be on storage that all hosts share"
        )
    return options.encode(spans, str(folder / f"part_{number:09d}"), tokenizer)


def mistaken_flags(
    on_error: str, workers: int, max_bad: str, max_document_tokens: int, max_line_bytes: int, out: str
) -> list[str]:
    """Mistakes in the flags that all encodings share."""
    mistakes = []
    if workers < 0:
        mistakes.append(f"--workers={workers}: expected 0 (one for each CPU) or more")
    if on_error not in ("stop", "skip"):
        mistakes.append(f"--on_error={on_error}: expected stop or skip{nearest(on_error, ('stop', 'skip'))}")
    if max_document_tokens < 0 or max_document_tokens == 1:
        mistakes.append(f"--max_document_tokens={max_document_tokens}: expected 0 (no limit), or 2 or more")
    if max_line_bytes < 1:
        mistakes.append(f"--max_line_bytes={max_line_bytes}: expected at least 1")
    if not out or out.endswith("/"):
        mistakes.append(f"--out={out}: expected the beginning of the file names, such as data/web")
    try:
        _allowed(max_bad, 1)
    except ValueError:
        mistakes.append(f"--max_bad={max_bad}: expected a share of the lines such as 0.1% or a number of lines")
    return mistakes


def _allowed(max_bad: str, lines: int) -> float:
    """How many of ``lines`` may be refused under --max_bad."""
    number = float(max_bad.removesuffix("%")) * lines / 100 if max_bad.endswith("%") else int(max_bad)
    if not 0 <= number < float("inf"):
        raise ValueError(max_bad)
    return number


def describe_tokenizer(path: str, model: Tokenizer, append_eos: bool) -> dict[str, Any]:
    """The entries of the dataset card about the tokenizer. Raises ConfigError if it has no eos."""
    if append_eos and model.eos_id < 0:
        raise ConfigError(f"{path}: has no end-of-sequence token; give --append_eos=false")
    return {
        "tokenizer": path,
        "tokenizer_sha256": model.sha256,
        "vocab_size": model.vocab_size,
        "eos_id": model.eos_id,
    }


class Merger:
    """Appends the parts in order, numbers refused lines within their files, and hashes the sources."""

    def __init__(self, writer: IndexedWriter, options: Encoding, progress: Progress) -> None:
        self.writer, self.options, self.progress = writer, options, progress
        self.rejects = dataset_file(writer.prefix, ".rejects.jsonl")
        self.lines = self.kept = self.empty = self.long = self.rejected = 0
        self.tally: Counter[str] = Counter()
        self.ends: Counter[int] = Counter()
        self.unused: Counter[str] = Counter()
        self._lines_of: Counter[str] = Counter()
        self._digests: dict[str, Any] = {}

    def add(self, part: Part) -> None:
        """Append one part and delete its files. Raises DataError for a refused line if ``on_error="stop"``."""
        starts = []
        for span, lines in zip(part.spans, part.lines, strict=False):
            starts.append(self._lines_of[span.source.path])
            self._lines_of[span.source.path] += lines
            self._hash(span)
        with storage_errors(self.writer.folder):
            self._add_rejects(part, starts)
            before = self.writer.num_tokens
            self.writer.add_dataset(part.prefix)
            for suffix in (".bin", ".idx", ".rejects"):
                Path(part.prefix + suffix).unlink()
        self.lines += sum(part.lines)
        self.kept += part.documents
        self.empty += part.empty
        self.long += part.long
        self.tally.update(part.tally)
        self.ends.update(part.ends)
        self.unused.update(part.unused)
        self.progress.update(sum(span.size for span in part.spans), self.writer.num_tokens - before)

    def _hash(self, span: Span) -> None:
        """Hash a jsonl file span by span, just after each was read; other files are hashed as a whole at the end."""
        path = span.source.path
        if span.source.kind == "jsonl":
            with storage_errors(Path(path)), Path(path).open("rb") as file:
                file.seek(span.start)
                self._digests.setdefault(path, hashlib.sha256()).update(file.read(span.stop - span.start))

    def _add_rejects(self, part: Part, starts: list[int]) -> None:
        with (
            Path(f"{part.prefix}.rejects").open(encoding="utf-8") as found,
            (self.writer.folder / "rejects").open("a", encoding="utf-8") as rejects,
        ):
            for entry in map(json.loads, found):
                number, line, error, excerpt = entry
                path, line = part.spans[number].source.path, starts[number] + line
                if self.options.on_error == "stop":
                    raise DataError(f"{path}:{line}: {error}")
                self.rejected += 1
                rejects.write(json.dumps({"file": path, "line": line, "error": error, "excerpt": excerpt}) + "\n")

    def finish(self, sources: list[Source], max_bad: str) -> dict[str, Any]:
        """Check the outcome, move OUT.rejects.jsonl to its place, and return the card's entries about the input.

        Raises DataError if too many lines were refused, nothing is left, or a source has changed.
        """
        with storage_errors(self.rejects):
            if self.rejected:
                (self.writer.folder / "rejects").replace(self.rejects)
            else:
                self.rejects.unlink(missing_ok=True)
        if self.rejected > _allowed(max_bad, self.lines):
            share = f"{self.rejected:,} of {several(self.lines, 'line')} ({self.rejected / self.lines:.2%})"
            raise DataError(f"{share} were refused, more than --max_bad={max_bad}; see {self.rejects}")
        if not self.kept:
            where = f"{several(self.lines, 'line')} of {several(len(sources), 'file')}"
            left_out = {
                "refused": self.rejected,
                "longer than --max_document_tokens": self.long,
                "with nothing to train on, such as a message of the assistant": self.tally["without_target"],
            }
            told = [f"{self.empty:,} empty", *(f"{count:,} {why}" for why, count in left_out.items() if count)]
            raise DataError(f"no documents in {where} ({'; '.join(told)})")
        for source in sources:
            source.check_unchanged()
        files = [{"file": s.path, "size": s.size, "sha256": self._digest(s.path)} for s in sources]
        counts = {"lines": self.lines, "empty": self.empty, "rejected": self.rejected, "long": self.long}
        ends = {"ends": sorted(self.ends)} if self.ends else {}
        return {**counts, **self.tally, **ends, "sources": files}

    def _digest(self, path: str) -> str:
        if path in self._digests:
            return self._digests[path].hexdigest()
        with storage_errors(Path(path)), Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
