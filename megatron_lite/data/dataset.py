"""What a split is read from: datasets blended and shuffled, so that the n-th sample is a function of (seed, n)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from megatron_lite.config import DataConfig, SourceConfig
from megatron_lite.data.batch import IGNORED, Batch
from megatron_lite.data.objective import NEXT_TOKEN, Objective
from megatron_lite.data.order import Blend, permute
from megatron_lite.data.windows import Conversations, Rows, Windows
from megatron_lite.distributed.random import mix
from megatron_lite.errors import DataError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Dataset:
    """Everything one split is read from, in the order of the run with ``seed``."""

    sources: list[Windows]
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
            source.fill(sample, rows, row, index + row, mask_documents=self.document_mask)
        self._check_tokens(rows, [source for source, _ in origins])
        tokens, targets, positions, ids = map(torch.from_numpy, rows)
        masked = self.document_mask or self.packing
        counts = rows.targets != IGNORED
        counted = None if counts.all() else torch.from_numpy(np.flatnonzero(counts))
        return Batch(tokens, targets, positions if masked else None, ids if masked else None, index, counted)

    def _check_tokens(self, rows: Rows, sources: list[Windows]) -> None:
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


def build_dataset(
    data: DataConfig,
    seed: int,
    split: Split,
    vocab_size: int | None = None,
    objective: Objective = NEXT_TOKEN,
) -> Dataset:
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
    sources: list[Windows] = []
    for config in configs:
        try:
            if packing is None:
                sources.append(Windows(config.path, data.seq_len, fractions, objective))
            else:
                truncate = packing == "truncate"
                sources.append(Conversations(config.path, data.seq_len, fractions, objective, truncate=truncate))
        except DataError as error:
            raise DataError(f"data.{'train' if configs is data.train else 'validation'}: {error}") from None
    for source in sources:
        if source.num_samples:
            continue
        cut = "" if own else f" (data.split={list(data.split)})"
        more = "" if own else "; raise its share of data.split, or set data.validation"
        without = f"{more}; train.eval_every=0 trains without validation" if split == "validation" else ""
        if isinstance(source, Conversations):
            raise DataError(f"nothing in the {split} split{cut}: {source.note}{without}")
        raise DataError(
            f"{source.data.prefix}: its {split} split has {source.stop - source.start} tokens in whole documents, "
            f"fewer than one sample of data.seq_len + {objective.extra} = {data.seq_len + objective.extra}{cut}"
            f"{without}"
        )
    return Dataset(sources, [config.weight for config in configs], seed, data.document_mask, vocab_size, packing)
