"""``data_tools tokenizer``: trains a sentencepiece model on a sample of a corpus."""

from __future__ import annotations

import heapq
import io
import random
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from data_tools.corpus import texts
from megatron_lite.cli import nearest
from megatron_lite.data.files import storage_errors, sync
from megatron_lite.errors import ConfigError, DataError

SPECIAL = {"<pad>": 0, "<unk>": 1, "<s>": 2, "</s>": 3, "<mask>": 4}
_MODEL_TYPES = {"bpe": 2000, "unigram": 500}  # bytes of sample for each vocabulary entry; keeps training to seconds
_CHUNK = 4096

# sentencepiece writes a space as U+2581, so a real U+2581 would be decoded as a space. It is escaped with U+FDD0, a
# noncharacter reserved for internal use, which also escapes itself: any text round-trips.
_ESCAPE = "2581\tFDD0 30\nFDD0\tFDD0 31\n"
_UNESCAPE = "FDD0 30\t2581\nFDD0 31\tFDD0\n"
_NOT_IN_SYMBOLS = " \u2581\ufdd0\0"  # symbols are matched in the text before it is escaped


def tokenizer(
    input: str,
    out: str,
    vocab_size: int = 8192,
    model_type: str = "bpe",
    user_symbols: str = "",
    sample_bytes: int = 0,
    character_coverage: float = 0.9995,
    split_digits: bool = False,
    seed: int = 0,
    text_key: str = "text",
) -> None:
    """Train a sentencepiece tokenizer on a sample of a corpus and write it to OUT.model.

    Any text comes back exactly from its tokens: no normalisation, and bytes for what the vocabulary lacks. No token
    spans a line end or, but for runs of spaces, a word end. The first ids are fixed: <pad> 0, <unk> 1, <s> 2, </s> 3,
    <mask> 4, then the user symbols (separated by commas), which are never split. The same input and flags give the same
    file. --model_type is bpe (the usual choice) or unigram (trains slower, encodes some four times faster).
    --sample_bytes=0 samples 2,000 bytes for each entry of the vocabulary, for unigram 500.
    """
    symbols = [symbol for symbol in user_symbols.split(",") if symbol]
    mistakes = []
    if model_type not in _MODEL_TYPES:
        hint = nearest(model_type, _MODEL_TYPES)
        mistakes.append(f"--model_type={model_type}: expected {' or '.join(_MODEL_TYPES)}{hint}")
    if not 0 < character_coverage <= 1:
        mistakes.append(f"--character_coverage={character_coverage}: expected a number above 0 and up to 1")
    if sample_bytes < 0:
        mistakes.append(f"--sample_bytes={sample_bytes}: expected 0 or more")
    taken = {*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))}
    for symbol in symbols:
        if symbol in taken:
            mistakes.append(f"--user_symbols: {symbol} is there already")
        elif set(symbol) & set(_NOT_IN_SYMBOLS):
            mistakes.append(f"--user_symbols: {symbol!r}: expected no space, U+2581, U+FDD0 or NUL in a symbol")
        taken.add(symbol)
    if vocab_size <= (least := len(SPECIAL) + len(symbols) + 256):
        mistakes.append(f"--vocab_size={vocab_size}: 256 bytes and {least - 256} symbols need more than {least}")
    path = Path(out.removesuffix(".model") + ".model")
    if path.name == ".model" or path.is_dir():
        mistakes.append(f"--out={out}: expected a file name, to which .model is added")
    if mistakes:
        raise ConfigError("\n".join(mistakes))

    documents = (document.text for document in texts(input, text_key))
    chunks = sample(documents, sample_bytes or vocab_size * _MODEL_TYPES[model_type], seed)
    if not chunks:
        raise DataError(f"{input}: no documents")
    temporary = path.with_name(f"{path.name}.tmp")
    with storage_errors(path):
        if not path.parent.exists():
            path.parent.mkdir(parents=True)
        try:
            temporary.touch()  # fail before the training if it cannot be written
            model = train(chunks, vocab_size, model_type, symbols, character_coverage, split_digits)
            temporary.write_bytes(model)
            sync(temporary)
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    size = sum(len(chunk.encode()) for chunk in chunks)
    print(f"{vocab_size:,} entries from {size:,} bytes of text: {path}")


def sample(documents: Iterable[str], size: int, seed: int) -> list[str]:
    """Chunks of whole lines in their original order, sampled uniformly without replacement up to ``size`` bytes in
    total. Keeps the chunks with the lowest random keys: one pass, and memory for the sample only."""
    draw = random.Random(seed)
    kept: list[tuple[float, int, int, str]] = []  # a heap, highest key first
    total = 0
    for number, chunk in enumerate(_chunks(documents)):
        key = draw.random()
        if total >= size and -kept[0][0] <= key:
            continue
        weight = len(chunk.encode())
        heapq.heappush(kept, (-key, number, weight, chunk))
        total += weight
        while total - kept[0][2] >= size:
            total -= heapq.heappop(kept)[2]
    return [chunk for _, chunk in sorted((number, chunk) for _, number, _, chunk in kept)]


def _chunks(documents: Iterable[str]) -> Iterator[str]:
    """Cut documents at line ends into chunks of up to 4,096 characters; longer lines are cut, too."""
    for text in documents:
        start = 0
        while start < len(text):
            stop = start + _CHUNK
            if stop < len(text):
                stop = text.rfind("\n", start, stop) + 1 or stop
            yield text[start:stop]
            start = stop


def train(
    chunks: list[str],
    vocab_size: int,
    model_type: str = "bpe",
    symbols: Iterable[str] = (),
    character_coverage: float = 0.9995,
    split_digits: bool = False,
) -> bytes:
    """The serialised sentencepiece model for this text; its vocabulary has exactly ``vocab_size`` entries.

    Raises ConfigError, with sentencepiece's reason, if the text is too small for such a vocabulary.
    """
    from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2

    result = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        escape, unescape = Path(folder, "escape.tsv"), Path(folder, "unescape.tsv")
        escape.write_text(_ESCAPE, encoding="utf-8")
        unescape.write_text(_UNESCAPE, encoding="utf-8")
        try:
            SentencePieceTrainer.train(
                sentence_iterator=(line for chunk in chunks for line in chunk.split("\n") if line),
                model_writer=result,
                model_type=model_type,
                vocab_size=vocab_size,
                character_coverage=character_coverage,
                byte_fallback=True,
                normalization_rule_tsv=str(escape),
                denormalization_rule_tsv=str(unescape),
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                split_digits=split_digits,
                user_defined_symbols=["<mask>", *symbols],
                pad_id=SPECIAL["<pad>"],
                unk_id=SPECIAL["<unk>"],
                bos_id=SPECIAL["<s>"],
                eos_id=SPECIAL["</s>"],
                max_sentence_length=8 * _CHUNK,
                num_threads=16,  # constant: unigram sums per thread, so the result depends on the number of threads
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ConfigError(f"--vocab_size={vocab_size}: {_reason(str(error))}") from None
    model = sentencepiece_model_pb2.ModelProto.FromString(result.getvalue())  # type: ignore[attr-defined]
    model.normalizer_spec.normalization_rule_tsv = model.denormalizer_spec.normalization_rule_tsv = ""  # a random path
    return model.SerializeToString(deterministic=True)


def _reason(message: str) -> str:
    """The reason within sentencepiece's ``Internal: file.cc(123) [condition] Vocabulary size too high (…)…``."""
    return " ".join(re.sub(r"^.*?\] ?", "", message, flags=re.DOTALL).split()) or message
