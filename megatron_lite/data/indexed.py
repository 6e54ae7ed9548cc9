"""Megatron's indexed dataset format: ``PREFIX.bin`` holds the tokens, ``PREFIX.idx`` the position of each sequence.

The layout of the index is fixed by megatron-core (``megatron/core/datasets/indexed_dataset.py``), little-endian:

    9 bytes  b"MMIDIDX\\x00\\x00"
    uint64   version, 1
    uint8    dtype code, a key of ``DTYPES``
    uint64   number of sequences S
    uint64   number of document boundaries D, one more than there are documents
    int32    [S] tokens in each sequence
    int64    [S] byte offset of each sequence in the .bin
    int64    [D] boundaries of the documents, counted in sequences: 0 first, S last

numpy only: data tools and tests read and write datasets without loading torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from megatron_lite.data.files import MappedFile, storage_errors, sync
from megatron_lite.errors import DataError, StorageError

DTYPES: dict[int, np.dtype] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.float64),
    7: np.dtype(np.float32),
    8: np.dtype(np.uint16),
}
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CHECKED_AT_OPEN = 1 << 20  # index entries: some 20 MB of index, a few milliseconds


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype in which Megatron stores tokens of such a vocabulary: uint16 below 65,500 entries, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def dataset_file(prefix: str | Path, suffix: str) -> Path:
    """``PREFIX`` + ``suffix``; a ``.bin`` or ``.idx`` at the end of the prefix is ignored."""
    text = os.fspath(prefix)
    return Path((text[:-4] if text.endswith((".bin", ".idx")) else text) + suffix)


def read_card(prefix: str | Path) -> dict[str, Any] | None:
    """The dataset card ``PREFIX.card.json`` beside the dataset, or None if there is none."""
    path = dataset_file(prefix, ".card.json")
    try:
        card = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: unreadable dataset card: {error}") from None
    if not isinstance(card, dict):
        raise DataError(f"{path}: unreadable dataset card: expected an object")
    return card


class IndexedDataset:
    """A tokenized dataset, memory-mapped and read-only.

    Everything that can be checked in a few milliseconds is checked here: the header, the sizes of both files against
    its counts, the last sequence against the end of the .bin, and every entry of an index of up to a million. Entries
    of a larger index are checked as they are read through ``[]``, or all at once by ``verify``.

    Attributes:
        dtype: of the tokens.
        tokens: [num_tokens] the whole .bin as one flat read-only array over the mapping. Call ``check_unchanged``
            before touching it where the files may be cut short while in use; ``[]`` does so itself.
        lengths: int32 [num_sequences], tokens.    pointers: int64 [num_sequences], bytes.
        documents: int64 [num_documents + 1], boundaries counted in sequences.

    Raises:
        DataError: for a missing, truncated or inconsistent file; here, or when a bad entry is read.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(dataset_file(prefix, ""))
        if Path(prefix).is_file() and not dataset_file(prefix, ".idx").exists():
            raise DataError(f"{prefix}: no dataset, which is PREFIX.idx and PREFIX.bin; data_tools tokenize makes one")
        self._idx = MappedFile(dataset_file(prefix, ".idx"))
        self._bin = MappedFile(dataset_file(prefix, ".bin"))
        if self._idx.size < _HEADER.size:
            self._refuse(f"truncated header, {self._idx.size} of {_HEADER.size} bytes")
        magic, version, code, sequences, boundaries = _HEADER.unpack(self._idx.read(0, _HEADER.size))
        if magic != _MAGIC:
            self._refuse("not a Megatron index (bad magic bytes)")
        if version != 1:
            self._refuse(f"unknown version {version}; 1 is supported")
        if code not in DTYPES:
            self._refuse(f"unknown dtype code {code}; known are {min(DTYPES)} to {max(DTYPES)}")
        # Python integers: counts near 2**63 must not wrap around into something plausible.
        size = _HEADER.size + 12 * sequences + 8 * boundaries
        if self._idx.size not in (size, size + sequences):  # a multimodal index: one more byte each
            self._refuse(
                f"{sequences} sequences and {boundaries} boundaries need {size} bytes, it has {self._idx.size}"
            )
        self.dtype = DTYPES[code]
        self.lengths = self._idx.array(np.dtype("<i4"), sequences, _HEADER.size)
        self.pointers = self._idx.array(np.dtype("<i8"), sequences, _HEADER.size + 4 * sequences)
        self.documents = self._idx.array(np.dtype("<i8"), boundaries, _HEADER.size + 12 * sequences)
        if boundaries == 0 or self.documents[0] != 0 or self.documents[-1] != sequences:
            self._refuse(f"the document boundaries do not run from 0 to {sequences}")
        end = int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if sequences else 0
        if end != self._bin.size:
            self._refuse(f"its last sequence ends at byte {end} of {self._bin.path.name}, which has {self._bin.size}")
        edge = _CHECKED_AT_OPEN // 2
        self._check_entries(0, min(sequences, edge))
        self._check_entries(max(sequences - edge, edge, 0), sequences)
        self._check_boundaries(0, min(boundaries, edge))
        self._check_boundaries(max(boundaries - edge, edge, 0), boundaries)
        self.tokens = self._bin.array(self.dtype, self._bin.size // self.dtype.itemsize)
        self.num_sequences, self.num_documents, self.num_tokens = sequences, boundaries - 1, len(self.tokens)

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[str]]:
        return IndexedDataset, (self.prefix,)  # a worker process maps the files itself

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, i: int) -> np.ndarray:
        """A copy of sequence ``i``: [lengths[i]] tokens. Negative ``i`` counts from the end."""
        if not -self.num_sequences <= i < self.num_sequences:
            raise IndexError(f"sequence {i} of {self.num_sequences} in {self.prefix}")
        self.check_unchanged()
        start, length, itemsize = int(self.pointers[i]), int(self.lengths[i]), self.dtype.itemsize
        if start < 0 or length < 0 or start % itemsize or start + length * itemsize > self._bin.size:
            self._refuse(f"sequence {i}: {length} tokens at byte {start} lie outside {self._bin.path.name}")
        return self.tokens[start // itemsize : start // itemsize + length].copy()

    def check_unchanged(self) -> None:
        """Raise DataError if a file was truncated after opening (two ``fstat`` calls, under a microsecond)."""
        self._idx.check()
        self._bin.check()

    def verify(self) -> None:
        """Check every entry of an index of any size; reads the whole .idx, in bounded memory."""
        self.check_unchanged()
        for start in range(0, self.num_sequences, _CHECKED_AT_OPEN):
            self._check_entries(start, min(start + _CHECKED_AT_OPEN, self.num_sequences))
        for start in range(0, len(self.documents), _CHECKED_AT_OPEN):
            self._check_boundaries(start, min(start + _CHECKED_AT_OPEN, len(self.documents)))

    def fingerprint(self) -> str:
        """64 hex digits that change with the content: SHA-256 over both files and the digest in the dataset card.

        Of a file above 32 MiB only that much is read, in evenly spaced blocks, so it takes milliseconds at any size. A
        regenerated dataset is then recognised by its card, which records the SHA-256 of the whole .bin. An appended
        document always changes the fingerprint, through the sizes.
        """
        digest = hashlib.sha256()
        for file in (self._idx, self._bin):
            digest.update(struct.pack("<Q", file.size))
            for block in file.sample():
                digest.update(block)
        digest.update(str((read_card(self.prefix) or {}).get("bin_sha256")).encode())
        return digest.hexdigest()

    def _check_entries(self, start: int, stop: int) -> None:
        """Sequences [start, stop) have lengths >= 0 and lie one after another, from byte 0 on."""
        if stop <= start:
            return
        lengths, first = self.lengths[start:stop], max(start - 1, 0)
        if lengths.min() < 0:
            bad = start + int(np.argmax(lengths < 0))
            self._refuse(f"sequence {bad} has the negative length {self.lengths[bad]}")
        steps = self.lengths[first : stop - 1].astype(np.int64) * self.dtype.itemsize
        wrong = np.flatnonzero(np.diff(self.pointers[first:stop]) != steps)
        if start == 0 and self.pointers[0] != 0:
            self._refuse(f"sequence 0 starts at byte {self.pointers[0]}, expected 0")
        if len(wrong):
            bad = first + 1 + int(wrong[0])
            self._refuse(f"sequence {bad} starts at byte {self.pointers[bad]}, not where the one before it ends")

    def _check_boundaries(self, start: int, stop: int) -> None:
        """Document boundaries [start, stop) never decrease (their ends are checked at open)."""
        first = max(start - 1, 0)
        wrong = np.flatnonzero(self.documents[first + 1 : stop] < self.documents[first : max(stop - 1, first)])
        if len(wrong):
            bad = first + 1 + int(wrong[0])
            self._refuse(f"document boundary {bad} is {self.documents[bad]}, less than the one before it")

    def _refuse(self, reason: str) -> None:
        raise DataError(f"{self._idx.path}: {reason}")


class IndexedWriter:
    """Writes a dataset: ``with IndexedWriter(prefix, dtype) as writer: writer.add_document(tokens)``.

    All of it is written inside ``PREFIX.tmp/``. Leaving the block without an error writes the index, syncs to disk and
    moves the files to their names, the .idx last, so a dataset that can be opened is complete; an existing one is
    replaced. After an error, or Ctrl-C, nothing is left; a killed process leaves ``PREFIX.tmp/``, which the next writer
    of that prefix clears. Lengths go to disk as they come: memory does not grow with the dataset.

    Args:
        prefix: where the files go; missing parent folders are made.
        dtype: of the tokens, see ``token_dtype``.
        durable: False leaves out the syncs, for parts that are merged and deleted.

    Attributes:
        folder: ``PREFIX.tmp/``, where the caller may keep its own temporary files.
        card: what to write as the dataset card; the writer adds the counts, the dtype and the SHA-256 of the .bin.

    Raises:
        StorageError: the disk is full or read-only, or another process is writing the same prefix.
    """

    def __init__(self, prefix: str | Path, dtype: Any, durable: bool = True) -> None:
        self.prefix, self.dtype, self.durable = str(dataset_file(prefix, "")), np.dtype(dtype), durable
        self.folder = dataset_file(prefix, ".tmp")
        self.card: dict[str, Any] | None = None
        self.num_sequences = self.num_documents = self.num_tokens = 0
        self._code = {known: code for code, known in DTYPES.items()}[self.dtype]
        self._digest = hashlib.sha256()
        self._files = ExitStack()

    def __enter__(self) -> Self:
        with storage_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = self._files.enter_context((self.folder / "lock").open("wb"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StorageError(f"{self.folder}: another process is writing this dataset") from None
            for stale in self.folder.iterdir():
                if stale.is_dir():
                    shutil.rmtree(stale)
                elif stale.name != "lock":
                    stale.unlink()
            self._bin, self._idx, self._lengths, self._documents = map(
                self._create, ("bin", "idx", "lengths", "documents")
            )
        return self

    def _create(self, name: str) -> BinaryIO:
        return self._files.enter_context((self.folder / name).open("w+b"))

    def add_document(self, tokens: Any, lengths: Sequence[int] | None = None) -> None:
        """Append one document: [n] tokens, as one sequence or as several whose ``lengths`` add up to n."""
        tokens = np.asarray(tokens)
        stored = tokens.astype(self.dtype, copy=False)
        if stored is not tokens and not np.array_equal(stored, tokens):
            raise ValueError(f"tokens from {tokens.min()} to {tokens.max()} do not fit {self.dtype}")
        sizes = np.array([len(stored)] if lengths is None else lengths, "<i4")
        self.add_documents(stored, sizes, np.array([len(sizes)]))

    def add_documents(self, tokens: np.ndarray, lengths: np.ndarray, ends: np.ndarray) -> None:
        """Append many documents: [n] tokens, the lengths of their sequences, and the sequence at which each document
        ends."""
        if tokens.dtype != self.dtype or tokens.ndim != 1:
            raise ValueError(f"expected one dimension of {self.dtype}, not {tokens.ndim} of {tokens.dtype}")
        if lengths.sum(dtype=np.int64) != len(tokens) or (lengths < 0).any():
            raise ValueError(f"the lengths of {len(lengths)} sequences do not add up to {len(tokens)} tokens")
        data = np.ascontiguousarray(tokens).data.cast("B") if len(tokens) else b""
        with storage_errors(self.folder):
            self._bin.write(data)
            self._lengths.write(lengths.astype("<i4").tobytes())
            self._documents.write((ends + self.num_sequences).astype("<i8").tobytes())
        self._digest.update(data)
        self.num_tokens += len(tokens)
        self.num_sequences += len(lengths)
        self.num_documents += len(ends)

    def add_dataset(self, prefix: str | Path) -> None:
        """Append all documents of another dataset of the same dtype."""
        part = IndexedDataset(prefix)
        self.add_documents(part.tokens, part.lengths, part.documents[1:])

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        try:
            if kind is None:
                with storage_errors(self.folder):
                    self._write_index()
                    self._publish()
        finally:
            with suppress(OSError):  # a full disk is no reason to keep the temporary files
                self._files.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _write_index(self) -> None:
        header = _HEADER.pack(_MAGIC, 1, self._code, self.num_sequences, self.num_documents + 1)
        self._idx.write(header)
        self._lengths.seek(0)
        shutil.copyfileobj(self._lengths, self._idx)
        self._lengths.seek(0)
        offset = 0
        while chunk := self._lengths.read(4 * _CHECKED_AT_OPEN):
            ends = offset + np.cumsum(np.frombuffer(chunk, "<i4"), dtype=np.int64) * self.dtype.itemsize
            self._idx.write(np.concatenate(([offset], ends[:-1])).astype("<i8").tobytes())
            offset = int(ends[-1])
        self._idx.write(struct.pack("<q", 0))
        self._documents.seek(0)
        shutil.copyfileobj(self._documents, self._idx)

    def _publish(self) -> None:
        """Move the files to their final names. The old .idx is removed first and the new one put in place last, so
        that an index never exists beside tokens of another dataset."""
        names = {".bin": "bin", ".idx": "idx"}
        if self.card is not None:
            counts = {"documents": self.num_documents, "sequences": self.num_sequences, "tokens": self.num_tokens}
            card = {**counts, "dtype": self.dtype.name, "bin_sha256": self._digest.hexdigest(), **self.card}
            (self.folder / "card").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            names = {".bin": "bin", ".card.json": "card", ".idx": "idx"}
        self._files.close()
        for name in names.values() if self.durable else ():
            sync(self.folder / name)
        for stale in (".idx", ".card.json"):
            dataset_file(self.prefix, stale).unlink(missing_ok=True)
        for suffix, name in names.items():
            (self.folder / name).replace(dataset_file(self.prefix, suffix))
        if self.durable:
            sync(self.folder.parent)
