"""``data_tools inspect``: shows the contents of a tokenized dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_tools.encode import named_tokenizer
from megatron_lite.data.indexed import IndexedDataset, dataset_file, read_card
from megatron_lite.data.packing import CONVERSATIONS
from megatron_lite.data.tokenizer import load_tokenizer
from megatron_lite.errors import ConfigError, DataError

_BAR = 40  # columns
_SHOWN = 60  # tokens at the start of each sample
_SHOWN_OF_CONVERSATION = 400
_CHUNK = 1 << 24  # tokens counted at once


def inspect(prefix: str, samples: int = 3, tokenizer: str = "") -> None:
    """Show a dataset: its size, its card, how long its documents are, and the beginnings of some of them.

    PREFIX.bin and PREFIX.idx are checked in full. The samples are spread evenly from the first document to the last;
    they are decoded with the tokenizer that the dataset card names, or --tokenizer, and shown as token ids without one.
    Of conversations, what is trained on is green on a terminal, and between ⟦ and ⟧ elsewhere.
    """
    if samples < 0:
        raise ConfigError(f"--samples={samples}: expected 0 or more")
    dataset = IndexedDataset(prefix)
    dataset.verify()
    card = read_card(prefix)
    model, note = _find_tokenizer(prefix, card, tokenizer)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(_facts(dataset, card), end="\n\n")
    lengths = _document_lengths(dataset)
    if len(lengths):
        console.print(_histogram(lengths))
    if note and samples:
        console.print(note)
    for i in np.unique(np.linspace(0, dataset.num_documents - 1, samples).astype(int)) if len(lengths) else ():
        if (card or {}).get("content") == CONVERSATIONS:
            console.print(Text(f"\ndocument {i} ({lengths[i]:,} tokens)", style="bold"))
            console.print(_conversation(dataset, i, model, console.is_terminal))
            continue
        first, last = dataset.documents[i], dataset.documents[i + 1]
        tokens = [token for s in range(first, min(last, first + _SHOWN)) for token in dataset[s][:_SHOWN].tolist()]
        console.print(Text(f"\ndocument {i} ({lengths[i]:,} tokens)", style="bold"))
        console.print(Text(_printable(_decode(model, tokens[:_SHOWN])) if model else str(tokens[:_SHOWN])))


def _conversation(dataset: IndexedDataset, document: int, model: Any, colour: bool) -> Text:
    """The beginning of a conversation, with trained parts marked."""
    text, room = Text(), _SHOWN_OF_CONVERSATION
    first, last = dataset.documents[document : document + 2]
    for i, sequence in enumerate(range(first, last)):
        tokens = dataset[sequence][:room].tolist()
        room -= len(tokens)
        if not tokens:
            break
        _check_vocabulary(model, tokens)
        shown = _printable(model.show(tokens) if model else f"{tokens} ")
        if i % 2 == 0:
            text.append(shown, style="dim")
        else:
            text.append(shown if colour else f"⟦{shown}⟧", style="bold green")
    return text


def _facts(dataset: IndexedDataset, card: dict[str, Any] | None) -> str:
    facts: dict[str, Any] = {
        "dataset": dataset.prefix,
        "tokens": f"{dataset.num_tokens:,} ({dataset.dtype})",
        "documents": f"{dataset.num_documents:,}",
        "sequences": f"{dataset.num_sequences:,}",
        "unigram entropy": f"{_unigram_entropy(dataset):.3f} nats per token, the loss of knowing only frequencies",
        "fingerprint": dataset.fingerprint(),
        "card": "none" if card is None else dataset_file(dataset.prefix, ".card.json"),
    }
    for key, value in (card or {}).items():
        if key == "sources" and isinstance(value, list):
            value = f"{len(value):,} files"
        if key == "options" and isinstance(value, dict):
            value = {name: option for name, option in value.items() if name != "chat_template"}
        if key not in ("documents", "sequences", "tokens", "dtype"):
            facts[key] = value
    return "\n".join(f"{key:<17} {_printable(str(value))}" for key, value in facts.items())


def _unigram_entropy(dataset: IndexedDataset) -> float:
    """The entropy of the token frequencies in nats, which a model should beat. Reads all tokens in bounded memory."""
    counts = np.zeros(0, np.int64)
    for start in range(0, dataset.num_tokens, _CHUNK):
        dataset.check_unchanged()
        more = np.bincount(dataset.tokens[start : start + _CHUNK])
        counts = np.pad(counts, (0, max(0, len(more) - len(counts))))
        counts[: len(more)] += more
    shares = counts[counts > 0] / max(dataset.num_tokens, 1)
    return float(-(shares * np.log(shares)).sum())


def _document_lengths(dataset: IndexedDataset) -> np.ndarray:
    """int64 [num_documents], tokens in each document."""
    ends = np.concatenate(([0], np.cumsum(dataset.lengths, dtype=np.int64)))
    return np.diff(ends[dataset.documents])


def _histogram(lengths: np.ndarray) -> Table:
    """Documents by length, in powers of two."""
    table = Table(box=None, title="length of documents in tokens", title_justify="left")
    for name, justify in (("from", "right"), ("to", "right"), ("documents", "right"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    bins = np.bincount(np.frexp(lengths)[1])  # bin b: 2**(b-1) <= length < 2**b
    first = int(np.flatnonzero(bins)[0])
    for b in range(first, len(bins)):
        bar = "█" * int(np.ceil(_BAR * bins[b] / bins.max()))
        table.add_row(f"{int(2**b // 2):,}", f"{2**b - 1:,}", f"{bins[b]:,}", bar)
    table.caption = f"shortest {lengths.min():,}, median {int(np.median(lengths)):,}, longest {lengths.max():,}"
    return table


def _find_tokenizer(prefix: str, card: dict[str, Any] | None, given: str) -> tuple[Any, str]:
    """The tokenizer to decode with, or None and the reason."""
    if given:
        return named_tokenizer(given), ""
    if not card or not card.get("tokenizer"):
        return None, "no dataset card names the tokenizer: samples are token ids (--tokenizer=… decodes them)"
    named = Path(str(card["tokenizer"]))
    for path in (named, dataset_file(prefix, "").parent / named.name):
        if path.exists():
            found = load_tokenizer(path)
            if found.sha256 != card.get("tokenizer_sha256"):
                return None, f"{path} is not the tokenizer this dataset was made with: samples are token ids"
            return found, ""
    return None, f"{named} is not there: samples are token ids (--tokenizer=… decodes them)"


def _check_vocabulary(model: Any, tokens: list[int]) -> None:
    if model and tokens and not 0 <= min(tokens) <= max(tokens) < model.vocab_size:
        raise DataError(f"token {max(tokens)} is not in the tokenizer's vocabulary of {model.vocab_size}")


def _decode(model: Any, tokens: list[int]) -> str:
    _check_vocabulary(model, tokens)
    return model.decode(tokens)


def _printable(text: str) -> str:
    """The text with control characters escaped, because a terminal would execute them."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)
