"""Windows of ``seq_len`` places out of indexed datasets: of running text, or of whole conversations."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import numpy as np

from megatron_lite.cli import several
from megatron_lite.data.batch import IGNORED
from megatron_lite.data.ends import check_ends
from megatron_lite.data.indexed import IndexedDataset, read_card
from megatron_lite.data.objective import Objective
from megatron_lite.data.packing import CONVERSATIONS, pack
from megatron_lite.errors import DataError


class Rows(NamedTuple):
    """The samples of a micro batch while they are filled in, int64 [batch, seq] each; ``ids`` tell documents apart."""

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    ids: np.ndarray


class Windows:
    """One indexed dataset, of it the documents of one split, as windows that share no place.

    Attributes:
        first, last: its documents.
        start, stop: its tokens in the flat .bin; both lie on document boundaries.
        num_samples: windows of ``seq_len`` places, which overlap by the tokens that the ``objective`` takes more.
        card, ends: its dataset card, if it has one; the tokens that answers end with, as that says.
    """

    def __init__(self, path: str, seq_len: int, fractions: tuple[float, float], objective: Objective) -> None:
        self.data, self.seq_len, self.objective = IndexedDataset(path), seq_len, objective
        self.card = read_card(self.data.prefix) or {}
        self.ends = check_ends(self.card.get("ends", []), f"{self.data.prefix}.card.json: ends")
        self.first, self.last = (self._boundary(fraction) for fraction in fractions)
        self.start, self.stop = (self._document_start(document) for document in (self.first, self.last))
        self.num_samples = max(0, self.stop - self.start - objective.extra) // seq_len
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

    def fill(self, sample: int, rows: Rows, row: int, position: int, *, mask_documents: bool) -> None:
        """Fill in one row with window ``sample``, at ``position`` in the run; positions and ids only where documents
        are masked from each other."""
        self.data.check_unchanged()
        first, extra = self.start + sample * self.seq_len, self.objective.extra
        tokens = self.data.tokens[first : first + self.seq_len + extra]
        rows.tokens[row], rows.targets[row] = self.objective(tokens, None, position)
        if not mask_documents:
            return
        rows.positions[row] = np.arange(self.seq_len)
        for start in self.document_starts(sample):
            if extra:
                rows.targets[row, start - extra] = IGNORED  # no document says how the next one starts
            rows.ids[row, start:] += 1
            rows.positions[row, start:] = np.arange(self.seq_len - start)

    def document_starts(self, sample: int) -> list[int]:
        """The offsets in window ``sample`` at which a document starts, beyond its first token."""
        first = self.start + sample * self.seq_len
        documents = range(self.data.num_documents)
        low = bisect_left(documents, first + 1, key=self._document_start)
        high = bisect_left(documents, first + self.seq_len + self.objective.extra, lo=low, key=self._document_start)
        return sorted({self._document_start(document) - first for document in range(low, high)})


class Conversations(Windows):
    """A dataset that ``data_tools chat`` made: windows of whole conversations, and of longer ones what fits or nothing.

    Its documents' sequences alternate between what is context and what is trained on. A conversation of n tokens takes
    n places of a window less those that the ``objective`` takes more.

    Attributes:
        note: what became of the conversations, for the log.
    """

    def __init__(
        self, path: str, seq_len: int, fractions: tuple[float, float], objective: Objective, *, truncate: bool
    ) -> None:
        super().__init__(path, seq_len, fractions, objective)
        extra = objective.extra
        bounds = self.data.documents[self.first : self.last + 1]
        ends = np.concatenate(([0], np.cumsum(self.data.lengths[bounds[0] : bounds[-1]], dtype=np.int64)))
        lengths = np.diff(ends[bounds - bounds[0]])
        sizes = np.minimum(lengths - extra, seq_len)
        # Where the first target of each stands: its first sequence is context.
        firsts = np.maximum(self.data.lengths[np.minimum(bounds[:-1], self.data.num_sequences - 1)], extra)
        long = lengths > seq_len + extra
        kept = np.flatnonzero((firsts - extra < sizes) & (truncate | ~long))
        order, self._windows = pack(sizes[kept], seq_len)
        self._members = kept[order] + self.first
        self.num_samples = len(self._windows) - 1
        cut, lost = long[kept].sum(), (lengths - extra - sizes)[kept].sum()
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

    def fill(self, sample: int, rows: Rows, row: int, position: int, *, mask_documents: bool) -> None:
        """Fill in one row with window ``sample``: its conversations, and padding that none of them sees."""
        self.data.check_unchanged()
        rows.targets[row] = IGNORED
        at, extra = 0, self.objective.extra
        for number, document in enumerate(self._members[self._windows[sample] : self._windows[sample + 1]].tolist()):
            first, last = self.data.documents[document : document + 2].tolist()
            begin = self._document_start(document)
            end = begin + int(self.data.lengths[first:last].sum(dtype=np.int64))
            end = min(end, begin + self.seq_len + extra)
            trained = np.repeat(np.arange(last - first) % 2 == 1, self.data.lengths[first:last])[: end - begin]
            place = slice(at, at + end - begin - extra)
            found = self.objective(self.data.tokens[begin:end], trained, position)
            rows.tokens[row, place], rows.targets[row, place] = found
            rows.positions[row, place] = np.arange(place.stop - at)
            rows.ids[row, place] = number
            at = place.stop
        rows.positions[row, at:] = np.arange(self.seq_len - at)
        rows.ids[row, at:] = -1
