"""Batches for training: windows of ``seq_len`` + 1 tokens out of indexed datasets, shuffled, blended, cut by dp rank.

The n-th sample of a run is a function of (seed, epoch, n) alone (``order.py``). A loader is that function, read at the
positions that belong to its data-parallel rank, with a thread that reads ahead; its whole state is one number, the
samples consumed. All ranks of one tensor-parallel group have the same dp rank and so read the same batches.
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_lite.cli import several
from megatron_lite.config import DataConfig, SourceConfig
from megatron_lite.data.ends import check_ends
from megatron_lite.data.indexed import IndexedDataset, read_card
from megatron_lite.data.order import Blend, permute
from megatron_lite.data.packing import CONVERSATIONS, pack
from megatron_lite.distributed.random import mix
from megatron_lite.errors import DataError
from megatron_lite.layers.loss import IGNORED

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_AHEAD = 1024  # positions whose order is worked out at once: the cost a sample falls with it


@dataclass(frozen=True)
class Batch:
    """One micro batch.

    tokens, targets: int64 [batch, seq]; a target of ``IGNORED`` does not count. positions, document_ids: int64 [batch,
    seq] where documents are masked from each other, else None. index: the position of its first sample in the run.
    counted: int64, where the flattened targets count; None: not looked for, or everywhere.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor | None
    document_ids: Tensor | None
    index: int
    counted: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on ``device``; to a GPU it is copied from pinned memory, without waiting."""
        if device.type == "cpu":
            return self

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.pin_memory().to(device, non_blocking=True)

        tokens, targets = move(self.tokens), move(self.targets)
        assert tokens is not None and targets is not None
        return Batch(tokens, targets, move(self.positions), move(self.document_ids), self.index, move(self.counted))


class Rows(NamedTuple):
    """The samples of a micro batch while they are filled in, int64 [batch, seq] each; ``ids`` tell documents apart."""

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    ids: np.ndarray


class Source:
    """One indexed dataset, of it the documents of one split, as windows that overlap by one token.

    Attributes:
        first, last: its documents.
        start, stop: its tokens in the flat .bin; both lie on document boundaries.
        num_samples: windows, each of whose ``seq_len`` targets no other window has.
        card, ends: its dataset card, if it has one; the tokens that answers end with, as that says.
    """

    def __init__(self, path: str, seq_len: int, fractions: tuple[float, float]) -> None:
        self.data, self.seq_len = IndexedDataset(path), seq_len
        self.card = read_card(self.data.prefix) or {}
        self.ends = check_ends(self.card.get("ends", []), f"{self.data.prefix}.card.json: ends")
        self.first, self.last = (self._boundary(fraction) for fraction in fractions)
        self.start, self.stop = (self._document_start(document) for document in (self.first, self.last))
        self.num_samples = max(0, self.stop - self.start - 1) // seq_len
        self._check_content()

    def _check_content(self) -> None:
        if self.card.get("content") == CONVERSATIONS:
            raise DataError(f"{self.data.prefix} holds conversations: set data.packing=conversations")

    def _document_start(self, document: int) -> int:
        """The first token of a document (of the one after the last: the number of tokens)."""
        sequence = int(self.data.documents[document])
        if sequence == self.data.num_sequences:
            return self.data.num_tokens
        return int(self.data.pointers[sequence]) // self.data.dtype.itemsize

    def _boundary(self, fraction: float) -> int:
        """The first document to start at or after this fraction of the tokens: a bisection, no pass over the index."""
        wanted = round(fraction * self.data.num_tokens)
        documents = range(self.data.num_documents + 1)
        return bisect_left(documents, wanted, hi=len(documents) - 1, key=self._document_start)

    def fill(self, sample: int, rows: Rows, row: int, *, mask_documents: bool) -> None:
        """Fill in one row with window ``sample``; positions and ids only where documents are masked from each other."""
        self.data.check_unchanged()
        first = self.start + sample * self.seq_len
        rows.tokens[row] = self.data.tokens[first : first + self.seq_len]
        rows.targets[row] = self.data.tokens[first + 1 : first + self.seq_len + 1]
        if not mask_documents:
            return
        rows.positions[row] = np.arange(self.seq_len)
        for start in self.document_starts(sample):
            rows.targets[row, start - 1] = IGNORED  # no document says how the next one starts
            rows.ids[row, start:] += 1
            rows.positions[row, start:] = np.arange(self.seq_len - start)

    def document_starts(self, sample: int) -> list[int]:
        """The offsets in window ``sample`` at which a document starts, beyond its first token."""
        first = self.start + sample * self.seq_len
        documents = range(self.data.num_documents)
        low = bisect_left(documents, first + 1, key=self._document_start)
        high = bisect_left(documents, first + self.seq_len + 1, lo=low, key=self._document_start)
        return sorted({self._document_start(document) - first for document in range(low, high)})


class Conversations(Source):
    """A dataset that ``data_tools chat`` made: windows of whole conversations, and of longer ones what fits or nothing.

    Its documents' sequences alternate between what is context and what is trained on. A conversation of n tokens takes
    n - 1 places of a window, one for each of its targets.

    Attributes:
        note: what became of the conversations, for the log.
    """

    def __init__(self, path: str, seq_len: int, fractions: tuple[float, float], *, truncate: bool) -> None:
        super().__init__(path, seq_len, fractions)
        bounds = self.data.documents[self.first : self.last + 1]
        ends = np.concatenate(([0], np.cumsum(self.data.lengths[bounds[0] : bounds[-1]], dtype=np.int64)))
        lengths = np.diff(ends[bounds - bounds[0]])
        sizes = np.minimum(lengths - 1, seq_len)
        # Where the first target of each stands: its first sequence is context.
        firsts = np.maximum(self.data.lengths[np.minimum(bounds[:-1], self.data.num_sequences - 1)], 1)
        long = lengths > seq_len + 1
        kept = np.flatnonzero((firsts <= sizes) & (truncate | ~long))
        order, self._windows = pack(sizes[kept], seq_len)
        self._members = kept[order] + self.first
        self.num_samples = len(self._windows) - 1
        cut, lost = long[kept].sum(), (lengths - 1 - sizes)[kept].sum()
        filled = sizes[kept].sum() / max(self.num_samples * seq_len, 1)
        dropped = [
            f"{(long & ~truncate).sum():,} too long left out"
            if not truncate
            else f"{cut:,} truncated, {lost:,} tokens lost",
            f"{len(lengths) - len(kept) - (0 if truncate else long.sum()):,} without a target left out",
        ]
        self.note = (
            f"{self.data.prefix}: {several(len(kept), 'conversation')} in "
            f"{several(self.num_samples, 'window')} of {seq_len:,}, "
            f"{filled:.1%} filled; {', '.join(dropped)}"
            + ("; its card names no token that ends an answer" if self.card.get("options") and not self.ends else "")
        )

    def _check_content(self) -> None:
        if self.card.get("content") != CONVERSATIONS:
            raise DataError(
                f"{self.data.prefix}: its card does not say that it holds conversations; make it with data_tools chat, "
                "or set data.packing=none"
            )

    def fill(self, sample: int, rows: Rows, row: int, *, mask_documents: bool) -> None:
        """Fill in one row with window ``sample``: its conversations, and padding that none of them sees."""
        self.data.check_unchanged()
        rows.targets[row] = IGNORED
        at = 0
        for number, document in enumerate(self._members[self._windows[sample] : self._windows[sample + 1]].tolist()):
            first, last = self.data.documents[document : document + 2].tolist()
            begin = self._document_start(document)
            end = begin + int(self.data.lengths[first:last].sum(dtype=np.int64))
            end = min(end, begin + self.seq_len + 1)
            trained = np.repeat(np.arange(last - first) % 2 == 1, self.data.lengths[first:last])[: end - begin]
            place = slice(at, at + end - begin - 1)
            rows.tokens[row, place] = self.data.tokens[begin : end - 1]
            rows.targets[row, place] = np.where(
                trained[1:], self.data.tokens[begin + 1 : end].astype(np.int64), IGNORED
            )
            rows.positions[row, place] = np.arange(end - begin - 1)
            rows.ids[row, place] = number
            at = place.stop
        rows.positions[row, at:] = np.arange(self.seq_len - at)
        rows.ids[row, at:] = -1


@dataclass(frozen=True)
class Dataset:
    """Everything one split is read from, in the order of the run with ``seed``."""

    sources: list[Source]
    weights: list[float]
    seed: int
    document_mask: bool
    vocab_size: int | None
    packing: str | None = None  # how long conversations are dealt with, where conversations are packed
    blend: Blend = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "blend", Blend.of(self.weights))

    @property
    def seq_len(self) -> int:
        """Tokens in a sample."""
        return self.sources[0].seq_len

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits over all that decides which tokens come at which position: files, weights, split, seq_len,
        packing."""
        parts = [
            (source.data.fingerprint(), weight, source.start, source.stop)
            for source, weight in zip(self.sources, self.blend.weights, strict=True)
        ]
        packing = [self.packing] if self.packing else []
        whole = [self.seed, self.seq_len, self.document_mask, parts, *packing]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()

    @property
    def notes(self) -> list[str]:
        """What a user should know of how it is read."""
        return [source.note for source in self.sources if isinstance(source, Conversations)]

    @property
    def chat_template(self) -> str | None:
        """What its conversations were written with; None where it has none, or several. What is generated from a model
        trained on it takes the same."""
        found = {(source.card.get("options") or {}).get("chat_template") for source in self.sources}
        return found.pop() if len(found) == 1 else None

    @property
    def ends(self) -> list[int]:
        """The tokens that the answers in its conversations end with."""
        return sorted({token for source in self.sources for token in source.ends})

    def order(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source, and the window of that source, of each of the int64 ``positions``."""
        which, count = self.blend.deal(positions)
        window = np.empty_like(count)
        for number, source in enumerate(self.sources):
            rows = np.flatnonzero(which == number)
            epochs = count[rows] // source.num_samples
            for epoch in np.unique(epochs):
                of_epoch = rows[epochs == epoch]
                key = mix(self.seed, number, int(epoch))
                window[of_epoch] = permute(count[of_epoch] % source.num_samples, source.num_samples, key)
        return which, window

    def once(self, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """The first ``limit`` windows, or all where there are fewer: no window twice, each dataset's in the order of
        the run, and of any first ones its share by weight until it has no more. As ``order`` returns them."""
        counts = [min(source.num_samples, limit) for source in self.sources]
        which = np.repeat(np.arange(len(counts)), counts)
        turn = [(np.arange(n) + 0.5) / weight for n, weight in zip(counts, self.blend.weights, strict=True)]
        window = [
            permute(np.arange(n), source.num_samples, mix(self.seed, number, 0))
            for number, (source, n) in enumerate(zip(self.sources, counts, strict=True))
        ]
        first = np.argsort(np.concatenate(turn), kind="stable")[:limit]
        return which[first], np.concatenate(window)[first]

    def batch(self, index: int, which: np.ndarray, window: np.ndarray, size: int | None = None) -> Batch:
        """The micro batch of the given windows; ``index`` is the position of its first. ``size``: with rows without a
        target up to so many."""
        rows = Rows(*(np.zeros((size or len(window), self.seq_len), np.int64) for _ in Rows._fields))
        rows.targets[len(window) :] = IGNORED
        origins = [
            (self.sources[number], sample) for number, sample in zip(which.tolist(), window.tolist(), strict=True)
        ]
        for row, (source, sample) in enumerate(origins):
            source.fill(sample, rows, row, mask_documents=self.document_mask)
        self._check_tokens(rows, [source for source, _ in origins])
        tokens, targets, positions, ids = map(torch.from_numpy, rows)
        masked = self.document_mask or self.packing
        counts = rows.targets != IGNORED
        counted = None if counts.all() else torch.from_numpy(np.flatnonzero(counts))
        return Batch(tokens, targets, positions if masked else None, ids if masked else None, index, counted)

    def _check_tokens(self, rows: Rows, sources: list[Source]) -> None:
        """Refuse tokens that are none of the model's."""
        if self.vocab_size is None:
            return
        largest = np.maximum(rows.tokens, rows.targets)  # a target that does not count is below 0
        wrong = np.where(rows.tokens < 0, rows.tokens, largest)
        found = np.argwhere((wrong < 0) | (wrong >= self.vocab_size))
        if len(found):
            row, column = found[0]
            prefix, card = sources[row].data.prefix, sources[row].card
            made = f"the data's tokenizer, {card.get('tokenizer')}, has {card.get('vocab_size')}"
            told = f"token {wrong[row, column]}, but the vocabulary has {self.vocab_size} entries"
            raise DataError(f"{prefix}: {told}; {made if card else 'the data has no card'}")


def build_dataset(data: DataConfig, seed: int, split: Split, vocab_size: int | None = None) -> Dataset:
    """Open what ``data`` names for ``split``. Raises DataError for files that cannot be read or hold too little.

    Train, validation and test are cut out of ``data.train`` at document boundaries, in file order, in the proportions
    of ``data.split``; with ``data.validation``, those files are the validation split and ``data.train`` is all train.
    """
    own = data.validation is not None
    configs: list[SourceConfig] = data.validation if split == "validation" and data.validation else data.train
    shares = (1.0, 0.0, 0.0) if own and split != "validation" else (0.0, 1.0, 0.0) if own else data.split
    edges = np.concatenate(([0.0], np.cumsum(shares) / max(sum(shares), 1e-30)))
    part = SPLITS.index(split)
    fractions = (float(edges[part]), float(edges[part + 1]))
    packing = data.long_conversations if data.packing == "conversations" else None
    sources: list[Source] = []
    for config in configs:
        try:
            if packing is None:
                sources.append(Source(config.path, data.seq_len, fractions))
            else:
                sources.append(Conversations(config.path, data.seq_len, fractions, truncate=packing == "truncate"))
        except DataError as error:
            raise DataError(f"data.{'train' if configs is data.train else 'validation'}: {error}") from None
    for source in sources:
        if source.num_samples:
            continue
        cut = "" if own else f" (data.split={list(data.split)})"
        more = "" if own else "; give it more of data.split, or data.validation"
        without = f"{more}; train.eval_every=0 goes without" if split == "validation" else ""
        if isinstance(source, Conversations):
            raise DataError(f"nothing in the {split} split{cut}: {source.note}{without}")
        raise DataError(
            f"{source.data.prefix}: its {split} split has {source.stop - source.start} tokens in whole documents, "
            f"fewer than one sample of data.seq_len + 1 = {data.seq_len + 1}{cut}{without}"
        )
    return Dataset(sources, [config.weight for config in configs], seed, data.document_mask, vocab_size, packing)


def once(
    dataset: Dataset, limit: int, *, micro_batch_size: int, dp_rank: int, dp_size: int, device: torch.device
) -> Iterator[list[Batch]]:
    """One dp rank's part of the first ``limit`` windows, each once (``Dataset.once``), in steps of one micro batch. As
    many on every rank: the last ones are filled up with rows that have no target."""
    which, window = dataset.once(limit)
    stride = micro_batch_size * dp_size
    for start in range(0, len(which), stride):
        first = start + dp_rank * micro_batch_size
        own = slice(first, first + micro_batch_size)
        yield [dataset.batch(first, which[own], window[own], micro_batch_size).to(device)]


class Loader:
    """Endless steps of micro batches for one dp rank: ``next(loader)`` is a list of ``num_micro_batches`` batches.

    Micro batch i of dp rank r takes the positions from ``consumed + (i × dp_size + r) × micro_batch_size`` on, so a
    global batch holds the same samples however it is cut. ``prefetch`` steps are read ahead in a thread (0: none).
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        micro_batch_size: int,
        num_micro_batches: int,
        dp_rank: int,
        dp_size: int,
        consumed_samples: int,
        prefetch: int,
        device: torch.device,
    ) -> None:
        self.dataset, self.device = dataset, device
        self._micro, self._count, self._dp_rank, self._dp_size = micro_batch_size, num_micro_batches, dp_rank, dp_size
        self._consumed = consumed_samples
        self._planned: list[tuple[int, np.ndarray, np.ndarray]] = []  # micro batches worked out, the next one last
        self._queue: queue.Queue[Any] | None = None
        if prefetch:
            self._queue = queue.Queue(prefetch)
            self._closing = threading.Event()
            self._thread = threading.Thread(target=self._read_ahead, name="loader", daemon=True)
            self._thread.start()

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> list[Batch]:
        found = self._read() if self._queue is None else self._queue.get()
        if isinstance(found, BaseException):
            if self._queue is not None:
                self._queue.put(found)  # whoever asks again gets the same answer, not silence
            raise found
        return [batch.to(self.device) for batch in found]

    def _plan(self) -> None:
        """Work out which windows the next micro batches of this rank hold, many at once."""
        stride = self._micro * self._dp_size
        number = max(self._count, _AHEAD // self._micro // self._count * self._count)
        firsts = self._consumed + stride * np.arange(number, dtype=np.int64) + self._dp_rank * self._micro
        self._consumed += stride * number
        positions = firsts[:, None] + np.arange(self._micro)
        which, window = (x.reshape(positions.shape) for x in self.dataset.order(positions.reshape(-1)))
        self._planned = list(zip(firsts.tolist(), which, window, strict=True))[::-1]

    def _read(self) -> list[Batch]:
        if not self._planned:
            self._plan()
        return [self.dataset.batch(*self._planned.pop()) for _ in range(self._count)]

    def _read_ahead(self) -> None:
        assert self._queue is not None
        found: Any = None
        while not self._closing.is_set() and not isinstance(found, BaseException):
            try:
                found = self._read()
            except BaseException as error:  # handed to whoever asks for this step
                found = error
            while not self._closing.is_set():
                try:
                    self._queue.put(found, timeout=0.1)
                    break
                except queue.Full:
                    continue

    def close(self) -> None:
        """Stop reading ahead."""
        if self._queue is not None:
            self._closing.set()
            self._thread.join()
