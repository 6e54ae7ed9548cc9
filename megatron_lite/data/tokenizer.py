"""Tokenizers: sentencepiece's ``.model`` and Hugging Face's folders behind one interface.

Both are loaded with care, because a user may hand us any file. No torch: the data tools start without it.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sentencepiece import SentencePieceProcessor

from megatron_lite.cli import of_the_hub
from megatron_lite.errors import CheckpointError, ConfigError, DataError

MODEL, JSON, SETTINGS, TEMPLATE = "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
SPECIAL_MAP, ADDED, GENERATION = "special_tokens_map.json", "added_tokens.json", "generation_config.json"
VOCAB, MERGES = "vocab.json", "merges.txt"  # GPT-2's, before there was a tokenizer.json
MAIN = (JSON, MODEL, VOCAB)  # one of them makes a tokenizer, the first that is there
TOKENIZER_FILES = (  # what belongs to a model beside its weights
    *(MODEL, JSON, SETTINGS, SPECIAL_MAP, ADDED),
    *(VOCAB, MERGES, GENERATION, TEMPLATE, "chat_template.json"),
)
_CONFIG = "config.json"  # the model's, which has a say in what its tokenizer is
_MAX_FILE_BYTES = 256 << 20


class Encoded(NamedTuple):
    """int64 [n] tokens, and for each the characters [starts, stops) of the text it stands for.

    Of the tokens that share a character, each covers it or (sentencepiece) covers nothing at its beginning.
    """

    tokens: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    def within(self, spans: Iterable[tuple[int, int]]) -> np.ndarray:
        """bool [n]: which tokens stand for a character of one of ``spans``."""
        found = np.zeros(len(self.tokens), bool)
        for start, stop in spans:
            found |= (self.starts < stop) & (np.maximum(self.stops, self.starts + 1) > start)
        return found


class Tokenizer(ABC):
    """Text to tokens and back.

    Attributes:
        vocab_size: the largest token id and one.
        bos_id, eos_id, pad_id: begin and end of a sequence, and what fills it up; -1 where there is none.
        special: the control tokens, text to id. Text that spells one is that token only where it is asked for
            (``special=True``), as of what a chat template has written.
        begin, end: what it puts before and after a text by itself, such as bos.
        sha256: of the file it was loaded from, with the settings beside it where these change its tokens.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    special: Mapping[str, int]
    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()
    sha256: str

    @abstractmethod
    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The tokens of a text; nothing is added to them."""

    @abstractmethod
    def encode_documents(self, texts: list[bytes], *, special: bool = False) -> list[np.ndarray]:
        """int32 [n] tokens of each UTF-8 text, in one thread; nothing is added to them."""

    @abstractmethod
    def encode_spans(self, text: str, *, special: bool = True) -> Encoded:
        """The tokens of a text in which control tokens count, and where each comes from."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without control tokens."""

    def show(self, tokens: Sequence[int]) -> str:
        """The text of tokens, control tokens spelled out."""
        names = {token: text for text, token in self.special.items()}
        parts: list[str] = []
        run: list[int] = []
        for token in tokens:
            if token in names:
                parts += [self.decode(run), names[token]]
                run = []
            else:
                run.append(token)
        return "".join([*parts, self.decode(run)])

    def names(self) -> dict[str, str]:
        """Its control tokens as chat templates call them; without one to fill up with, that is the last of a text."""
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        ids["pad_token"] = self.eos_id if self.pad_id < 0 else self.pad_id
        return {name: self.token(token) for name, token in ids.items()}

    def around(self, bos: bool | None = None, eos: bool | None = None) -> tuple[list[int], list[int]]:
        """The tokens that go before and after a text: what it puts there by itself (None), or bos and eos, or nothing.
        Raises ConfigError where it has no such token."""
        sides = []
        for name, wanted, own, token in (("bos", bos, self.begin, self.bos_id), ("eos", eos, self.end, self.eos_id)):
            if wanted and token < 0 and not own:
                raise ConfigError(f"--add_{name}=true: the tokenizer has no {name} token")
            sides.append(list(own) if wanted is None or (wanted and token < 0) else [token] * wanted)
        return sides[0], sides[1]

    def encode_prompt(self, text: str, bos: bool | None = None, eos: bool | None = None) -> list[int]:
        """The tokens of a text to go on from, in which control tokens count, with what is ``around`` it, which is not
        doubled; never none at all."""
        before, after = self.around(bos, eos)
        tokens = led(before, self.encode(text, special=True))
        return (tokens if after and tokens[-len(after) :] == after else [*tokens, *after]) or [self.eos_id]

    def token(self, token: int) -> str:
        """The text of a control token, "" of another one or of -1."""
        return next((text for text, known in self.special.items() if known == token), "")


def led(begin: list[int], tokens: list[int]) -> list[int]:
    """``tokens`` with ``begin`` before them, once."""
    return tokens if tokens[: len(begin)] == begin else [*begin, *tokens]


class SentencePiece(Tokenizer):
    """A sentencepiece model. Raises DataError where ``content`` is not one."""

    def __init__(self, content: bytes, name: str) -> None:
        try:
            if not content:  # which the library takes for no model at all, and answers when it is used
                raise ValueError("an empty file")
            self._model = SentencePieceProcessor(model_proto=content)
        except (RuntimeError, OSError, ValueError, TypeError) as error:
            raise DataError(f"{name} is not a sentencepiece model: {' '.join(str(error).split())}") from None
        self.vocab_size, self.sha256 = self._model.vocab_size(), hashlib.sha256(content).hexdigest()
        self.bos_id, self.eos_id, self.pad_id = self._model.bos_id(), self._model.eos_id(), self._model.pad_id()

    @cached_property
    def special(self) -> Mapping[str, int]:  # type: ignore[override]
        model = self._model
        return {model.id_to_piece(i): i for i in range(self.vocab_size) if model.is_control(i)}

    @cached_property
    def _control(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) or r"(?!)")

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        return self.encode_spans(text).tokens.tolist() if special else self._model.encode(text)

    def encode_documents(self, texts: list[bytes], *, special: bool = False) -> list[np.ndarray]:
        if special:
            return [self.encode_spans(text.decode()).tokens.astype(np.int32) for text in texts]
        return self._model.encode(texts, out_type="numpy", num_threads=1)

    def encode_spans(self, text: str, *, special: bool = True) -> Encoded:
        found: list[tuple[int, int, int]] = []
        start = 0
        for match in self._control.finditer(text) if special else ():
            found += self._pieces(text[start : match.start()], start)
            found.append((self.special[match[0]], *match.span()))
            start = match.end()
        found += self._pieces(text[start:], start)
        return Encoded(*np.array(found, np.int64).reshape(-1, 3).T)

    def _pieces(self, text: str, offset: int) -> list[tuple[int, int, int]]:
        if not text:
            return []
        from sentencepiece import sentencepiece_pb2

        raw = self._model.encode(text, out_type="serialized_proto")
        pieces = sentencepiece_pb2.SentencePieceText.FromString(raw).pieces  # type: ignore[attr-defined]
        if text.isascii():
            return [(piece.id, piece.begin + offset, piece.end + offset) for piece in pieces]
        # Its offsets count bytes: characters before each of them are the bytes that start one.
        firsts = (np.frombuffer(text.encode(), np.uint8) & 0xC0) != 0x80
        where = np.concatenate(([0], np.cumsum(firsts))) + offset
        return [(piece.id, int(where[piece.begin]), int(where[piece.end])) for piece in pieces]

    def decode(self, tokens: Sequence[int]) -> str:
        return self._model.decode(list(tokens))


def parse_object(files: Mapping[str, bytes], name: str, where: str = "") -> dict[str, Any]:
    """The object in a small JSON file, empty where there is none. Raises DataError, which begins with ``where``, for
    anything else."""
    if name not in files:
        return {}
    try:
        found = json.loads(files[name], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}{name}: {error}") from None
    if not isinstance(found, dict):
        raise DataError(f"{where}{name}: expected an object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{Counter(key for key, _ in pairs).most_common(1)[0][0]!a} is there twice")
    return found


def tokenizer_path(path: str | Path) -> Path:
    """The file that a name means: itself, or of a folder its tokenizer.json, else its tokenizer.model or vocab.json."""
    path = Path(path)
    found = next((path / name for name in MAIN if (path / name).is_file()), None) if path.is_dir() else path
    if found is None or not found.is_file():
        raise ConfigError(
            f"data.tokenizer: no {'tokenizer' if path.is_dir() else 'file'} {path}{of_the_hub(str(path))}"
        )
    return found


def tokenizer_files(path: str | Path) -> dict[str, bytes]:
    """What makes up the tokenizer at ``path``, by the names a model folder has for it: a sentencepiece model of another
    name by itself, what has the name it has in such a folder with what lies beside it, a folder whole."""
    file = tokenizer_path(path)
    whole = file.suffix == ".json" or file.name == MODEL
    beside = [file.parent / name for name in (*TOKENIZER_FILES, _CONFIG) if whole]
    for each in (file, *beside):
        if each.is_file() and each.stat().st_size > _MAX_FILE_BYTES:
            raise DataError(f"{each}: {each.stat().st_size} bytes are too many for a tokenizer")
    try:
        files = {each.name: each.read_bytes() for each in beside if each.is_file()}
        files |= {VOCAB if file.name == VOCAB else JSON if file.suffix == ".json" else MODEL: file.read_bytes()}
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}") from None
    if file.name in (MODEL, VOCAB):
        files.pop(JSON, None)
    from megatron_lite.data.hf_tokenizer import settled  # which imports this module

    return settled(files, parse_object({_CONFIG: files.pop(_CONFIG, b"{}")}, _CONFIG, f"{path}: "), str(path))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a sentencepiece ``.model``, a ``tokenizer.json``, or a folder that has one.

    Raises ConfigError where there is none, DataError where it does not load.
    """
    return read_tokenizer(tokenizer_files(path), str(tokenizer_path(path)))


def read_tokenizer(files: Mapping[str, bytes], name: str) -> Tokenizer:
    """The tokenizer in ``files``, tokenizer.json before tokenizer.model. Raises as ``load_tokenizer`` does."""
    if not files.keys() & {*MAIN}:
        raise ConfigError(f"{name} has no {MODEL} and no {JSON}")
    from megatron_lite.data.hf_tokenizer import HuggingFace, is_hugging_face

    return HuggingFace(files, name) if is_hugging_face(files, name) else SentencePiece(files[MODEL], name)


def carried_tokenizer(files: Mapping[str, bytes], where: Path) -> Tokenizer:
    """The tokenizer that a model at ``where`` has among its small files. Raises CheckpointError."""
    if not files.keys() & {*MAIN}:
        raise CheckpointError(f"{where} has no {MODEL} and no {JSON}, to read a prompt with")
    try:
        return read_tokenizer(files, f"{where}: its tokenizer")
    except DataError as error:
        raise CheckpointError(str(error)) from None
