"""Text to a model's tokens and back."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from megatron_lite.data.ends import ends
from megatron_lite.data.messages import present, read_message
from megatron_lite.data.template import ChatTemplate, Message, find_template
from megatron_lite.data.tokenizer import carried_tokenizer
from megatron_lite.errors import CheckpointError, ConfigError, DataError

logger = logging.getLogger("megatron_lite")


class Codec:
    """Text to a model's tokens and back: its tokenizer, chat template and end tokens, from its small files.

    ``vocab_size``: of the model. ``add``: whether to put bos and eos around a prompt; None: as the tokenizer does, but
    neither around the text of a model's own chat template. ``ends``: the tokens that end a text. Raises
    CheckpointError.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        where: Path,
        vocab_size: int,
        add: tuple[bool | None, bool | None] = (None, None),
    ) -> None:
        self.files, self.where, self.vocab_size, self.add = files, where, vocab_size, add
        self.tokenizer = carried_tokenizer(files, where)
        try:
            self.ends = ends(self.tokenizer, files)
        except DataError as error:
            raise CheckpointError(f"{where}: {error}") from None
        if beyond := sorted(token for token in self.ends if token >= vocab_size):
            named = ", ".join(f"{token} {self.tokenizer.token(token)!a}" for token in beyond)
            told = "%s: no text can end with token %s: the model's vocabulary has %d entries"
            logger.warning(told, where, named, vocab_size)

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template, ``PLAIN`` if the model has none. Raises ConfigError, DataError."""
        return ChatTemplate(find_template(self.files, str(self.where)), self.tokenizer, f"{self.where}'s chat template")

    @cached_property
    def answer_ends(self) -> set[int]:
        """The tokens that end an answer: those that end any text, and what the template writes after one."""
        return {*self.ends, self.template.end()} - {-1}

    def read(self, prompt: str | Sequence[Message], *, chat: bool) -> list[int]:
        """The tokens of a prompt or, in a ``chat``, of a conversation; a text is then the user's first message. Raises
        ConfigError, and CheckpointError for tokens that the model does not have."""
        try:
            text = self.template.prompt(self._messages(prompt)) if chat else str(prompt)
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError("the prompt cannot be encoded as UTF-8") from None
        except ValueError as error:
            raise ConfigError(f"the prompt: {error}") from None
        bos, eos = self.add
        if chat:
            bos, eos = False if bos is None and not self.template.plain else bos, bool(eos)
        tokens = self.tokenizer.encode_prompt(text, bos, eos)
        if min(tokens) < 0:
            raise ConfigError("the prompt is empty, and the tokenizer has no end-of-sequence token to begin with")
        if (last := max(tokens)) >= self.vocab_size:
            raise CheckpointError(
                f"{self.where}: the prompt has token {last} {self.tokenizer.show([last])!a:.100}, but the model's "
                f"vocabulary has {self.vocab_size} entries; its tokenizer has {self.tokenizer.vocab_size}"
            )
        return tokens

    def _messages(self, prompt: str | Sequence[Message]) -> list[Message]:
        """The messages in the form that the template takes, the same as in training."""
        given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        calls = self.template.calls
        return [read_message(present(each), f"message {i}: ", calls)[0] for i, each in enumerate(given, 1)]

    def write(self, prompt: list[int], produced: list[int], *, chat: bool) -> tuple[str, str]:
        """The text of a prompt and the text that continues it; in a ``chat``, an empty text and the answer."""
        if chat:
            return "", self.tokenizer.decode(produced)
        before, whole = self.tokenizer.decode(prompt), self.tokenizer.decode([*prompt, *produced])
        after = whole.removeprefix(before) if whole.startswith(before) else self.tokenizer.decode(produced)
        return before, after
