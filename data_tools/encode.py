"""The work of one worker: tokenizes the documents of some spans into a small dataset of their own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TextIO

import numpy as np

from data_tools.documents import MAX_LINE_BYTES, read
from data_tools.sources import Span, similar
from megatron_lite.cli import of_the_hub
from megatron_lite.data.indexed import IndexedWriter, token_dtype
from megatron_lite.data.tokenizer import JSON, MAIN, MODEL, Tokenizer, load_tokenizer
from megatron_lite.errors import ConfigError

_BATCH_BYTES = 256 << 10  # size of a batch of texts for sentencepiece
PIECE_BYTES = 1 << 20  # longer documents are encoded in pieces, to bound sentencepiece's memory and time


@dataclass(frozen=True)
class Options:
    """Options that determine the output; recorded in the dataset card."""

    append_eos: bool = True
    add_bos: bool | None = None
    parse_special: bool = False
    text_key: str = "text"
    on_error: str = "stop"
    max_document_tokens: int = 0
    long_documents: str = "split"
    max_line_bytes: int = MAX_LINE_BYTES

    def encode(self, spans: list[Span], prefix: str, tokenizer: str) -> Part:
        """Write the documents of ``spans`` as a dataset at ``prefix``, and refused lines to PREFIX.rejects."""
        return encode(spans, prefix, tokenizer, self)


@dataclass
class Part:
    """A finished unit: the dataset at ``prefix``, the refused lines in ``prefix``.rejects, and the counts."""

    prefix: str
    spans: list[Span]
    lines: list[int] = field(default_factory=list)  # lines read in each span; fewer spans if it stopped early
    documents: int = 0
    empty: int = 0
    long: int = 0  # documents that were split or truncated
    tally: Counter[str] = field(default_factory=Counter)  # other counts, for the dataset card
    ends: Counter[int] = field(default_factory=Counter)  # tokens that end answers
    unused: Counter[str] = field(default_factory=Counter)  # keys without a meaning here: number of lines that have them


def cut(text: bytes, size: int = PIECE_BYTES) -> list[bytes]:
    """Cut a text into pieces of up to ``size`` bytes, after a newline if possible, else between two characters."""
    pieces, start = [], 0
    while len(text) - start > size:
        stop = text.rfind(b"\n", start, start + size) + 1
        if not stop:
            stop = start + size
            while text[stop] & 0xC0 == 0x80:  # inside a UTF-8 sequence
                stop -= 1
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]]


def named_tokenizer(path: str) -> Tokenizer:
    """The tokenizer that --tokenizer names: a .model, a tokenizer.json, or a folder with one of them. Raises
    ConfigError if there is none, DataError if it does not load."""
    if not Path(path).exists():
        raise ConfigError(f"--tokenizer={path}: no such file{similar(Path(path)) or of_the_hub(path)}")
    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in MAIN):
        raise ConfigError(f"--tokenizer={path}: a folder without {JSON} or {MODEL}")
    return load_tokenizer(path)


@lru_cache(maxsize=1)  # a worker process encodes many units with one model
def cached_tokenizer(path: str) -> Tokenizer:
    """The tokenizer at ``path``."""
    return load_tokenizer(path)


def encode(spans: list[Span], prefix: str, tokenizer: str, options: Options) -> Part:
    """Write the documents of ``spans`` as a dataset at ``prefix``. With ``on_error="stop"`` it stops at a refused line.

    Each refused line becomes a line of PREFIX.rejects: number of the span, line within the span, reason, excerpt.
    """
    model, part = cached_tokenizer(tokenizer), Part(prefix, spans)
    dtype = token_dtype(model.vocab_size)
    with (
        IndexedWriter(prefix, dtype, durable=False) as writer,
        Path(f"{prefix}.rejects").open("w", encoding="utf-8") as rejects,
    ):
        for batch in _batches(part, options, rejects):
            documents = _limited(_encode(model, batch, options.parse_special), around(model, options), part, options)
            if documents:
                lengths = np.array([len(tokens) for tokens in documents], np.int32)
                tokens = np.concatenate(documents, dtype=dtype, casting="unsafe")
                writer.add_documents(tokens, lengths, np.arange(1, len(lengths) + 1))
    return part


def _batches(part: Part, options: Options, rejects: TextIO) -> Iterator[list[bytes]]:
    """The texts of the part in batches of about 256 KiB. Counts lines and empty documents, records refused lines."""
    batch: list[bytes] = []
    size = 0
    for number, span in enumerate(part.spans):
        part.lines.append(0)
        for line, text, error, excerpt in read(span, options.text_key, options.max_line_bytes):
            part.lines[-1] = line
            if error:
                rejects.write(json.dumps([number, line, error, excerpt]) + "\n")
                if options.on_error == "stop":
                    return
            elif not text or text.isspace():
                part.empty += 1
            else:
                batch.append(text.encode())
                size += len(batch[-1])
                if size >= _BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
    if batch:
        yield batch


def _encode(model: Tokenizer, texts: list[bytes], special: bool) -> list[np.ndarray]:
    """[n] int32 tokens of each text."""
    if max(map(len, texts)) <= PIECE_BYTES:
        return model.encode_documents(texts, special=special)
    documents = []
    for head, *rest in map(cut, texts):
        parts = model.encode_documents([head], special=special)
        documents.append(np.concatenate(parts + [_continued(model, piece, special) for piece in rest]))
    return documents


def _continued(model: Tokenizer, piece: bytes, special: bool) -> np.ndarray:
    """[n] int32 tokens of a piece that follows a newline: without the space that some tokenizers put before a text."""
    tokens, starts, stops = model.encode_spans("\n" + piece.decode(), special=special)
    if ((starts < 1) & (stops > 1)).any():  # no token boundary at the end of the line
        return model.encode_documents([piece], special=special)[0]
    return tokens[starts >= 1].astype(np.int32)


def around(model: Tokenizer, options: Options) -> tuple[list[int], list[int]]:
    """The tokens to put before and after each document. Raises ConfigError if the tokenizer lacks one."""
    return model.around(options.add_bos)[0], [model.eos_id] if options.append_eos else []


def _limited(
    documents: list[np.ndarray], ends: tuple[list[int], list[int]], part: Part, options: Options
) -> list[np.ndarray]:
    """The documents as they are stored: with begin and end tokens, without empty ones, and cut to
    ``max_document_tokens``."""
    before, after = (np.array(tokens, np.int32) for tokens in ends)
    room = options.max_document_tokens - len(before) - len(after)
    limited = []
    for body in documents:
        if options.parse_special:  # begin and end tokens that the text spells out are not added twice
            body = body[len(before) * np.array_equal(body[: len(before)], before) :]
            body = body[: len(body) - len(after) * np.array_equal(body[-len(after) :], after)]
        if len(body) == 0:  # a normaliser may remove the whole text
            part.empty += 1
            continue
        part.documents += 1
        pieces = [body]
        if options.max_document_tokens and len(body) > room:
            part.long += 1
            stop = room if options.long_documents == "truncate" else len(body)
            pieces = [body[start : start + room] for start in range(0, stop, room)]
        limited += [np.concatenate((before, piece, after)) for piece in pieces]
    return limited
