"""``data_tools chat``: turns conversations into an indexed dataset, through a chat template and a tokenizer.

A conversation is a document whose sequences alternate: the first is context, the second is trained on, the third is
context again, and so on. So the loss mask is part of the index, a dataset remains two files, and Megatron can read its
tokens like those of any other dataset.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import date as Date
from functools import lru_cache
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from data_tools import tokenize as building
from data_tools.conversations import FORMATS, Conversation, conversation
from data_tools.documents import MAX_LINE_BYTES, check_text, read_objects
from data_tools.encode import Part, cached_tokenizer, named_tokenizer
from data_tools.sources import Span, similar
from megatron_lite.cli import nearest, several
from megatron_lite.data.indexed import IndexedWriter, token_dtype
from megatron_lite.data.packing import CONVERSATIONS
from megatron_lite.data.template import MAX_TEMPLATE, ChatTemplate, Loss, Rendered, find_template
from megatron_lite.data.tokenizer import Tokenizer, led, tokenizer_files
from megatron_lite.errors import ConfigError

_LOSSES = ("completions", "last", "all")


@dataclass(frozen=True)
class ChatOptions:
    """Options that determine the output; recorded in the dataset card."""

    chat_template: str
    add_bos: bool | None = None
    format: str = "auto"
    loss: Loss = "completions"
    on_error: str = "stop"
    max_document_tokens: int = 0
    long_documents: str = "truncate"
    max_line_bytes: int = MAX_LINE_BYTES
    date: str = ""

    def encode(self, spans: list[Span], prefix: str, tokenizer: str) -> Part:
        """Write the conversations of ``spans`` as a dataset at ``prefix``, and refused lines to PREFIX.rejects."""
        return encode(spans, prefix, tokenizer, self)


def chat(
    input: str,
    tokenizer: str,
    out: str,
    format: str = "auto",
    loss: str = "completions",
    template: str = "",
    add_bos: bool | None = None,
    workers: int = 0,
    on_error: str = "stop",
    max_bad: str = "0.1%",
    max_document_tokens: int = 0,
    long_documents: str = "truncate",
    max_line_bytes: int = MAX_LINE_BYTES,
    date: str = "",
) -> None:
    """Tokenize conversations for instruction tuning: OUT.bin, OUT.idx and OUT.card.json, with what to train on.

    INPUT: jsonl, jsonl.gz or parquet, as for tokenize. --format: messages ({"messages": [{"role", "content"}]}),
    sharegpt ({"conversations": [{"from", "value"}]}), alpaca ({"instruction", "input", "output"}) or completion
    ({"prompt", "completion"}); auto tells each line by its keys. A prompt and completion that are texts are joined as
    they are, with the end-of-sequence token after them; everything else goes through the chat template: that of
    --template=FILE, or the one that comes with the tokenizer (a folder, tokenizer.json or .model), or a plain one.
    The tokenizer's bos, if it adds one, precedes these texts and those of the plain template; other templates write
    their own. --add_bos=true puts bos before each conversation that does not begin with it, false before none.

    Tools, tool calls, reasoning and chat_template_kwargs are read as in the files of OpenAI, ShareGPT and TRL. Null
    means absent. --date=YYYY-MM-DD is today for templates that ask (strftime_now); else they get no date.

    --loss=completions trains on what the assistant wrote, end markers included; last only on its last turn; neither on
    the messages of a "prompt". all trains on everything. None trains on a message with "weight" 0 or "train" false.
    Conversations longer than --max_document_tokens=N are cut (--long_documents=truncate) or left out (drop). Those with
    nothing to train on are left out and counted. If an answer begins with the very first token, that token is not
    trained on, since none precedes it; such answers are counted, too. The tokens that answers end with (such as
    <|im_end|>) are kept in the card: they end generated text. --on_error, --max_bad, --workers: as for tokenize.
    Train on the dataset with data.packing=conversations.
    """

    def prepare() -> tuple[ChatOptions, dict[str, Any]]:
        mistakes = building.mistaken_flags(on_error, workers, max_bad, max_document_tokens, max_line_bytes, out)
        for flag, value, allowed in (
            ("format", format, ("auto", *FORMATS)),
            ("loss", loss, _LOSSES),
            ("long_documents", long_documents, ("truncate", "drop")),
        ):
            if value not in allowed:
                mistakes.append(f"--{flag}={value}: expected {', '.join(allowed)}{nearest(value, allowed)}")
        try:
            _day(date)
        except ValueError:
            mistakes.append(f"--date={date}: expected YYYY-MM-DD")
        if template and not Path(template).is_file():
            mistakes.append(f"--template={template}: no such file{similar(Path(template))}")
        if mistakes:
            raise ConfigError("\n".join(mistakes))
        model = named_tokenizer(tokenizer)
        facts = building.describe_tokenizer(tokenizer, model, append_eos=False) | {"content": CONVERSATIONS}
        source = _read_template(template) if template else find_template(tokenizer_files(tokenizer), tokenizer)
        model.around(add_bos)
        check_template(source, model, template or "chat template")
        limits = max_document_tokens, long_documents, max_line_bytes
        return ChatOptions(source, add_bos, format, loss, on_error, *limits, date), facts  # type: ignore[arg-type]

    merger = building.build(input, tokenizer, out, workers, max_bad, prepare)
    if merger is not None:
        tally = merger.tally
        share = tally["trained_tokens"] / max(merger.writer.num_tokens, 1)
        print(f"{tally['trained_tokens']:,} tokens to train on ({share:.1%})")
        if merger.long:
            lost = f"{tally['lost_tokens']:,} tokens lost"
            done = "truncated to" if long_documents == "truncate" else "left out, longer than"
            print(f"{several(merger.long, 'conversation')} {done} {max_document_tokens:,} tokens: {lost}")
        if tally["without_target"]:
            print(f"{several(tally['without_target'], 'conversation')} left out: nothing to train on")
        if tally["first_untrained"]:
            those = several(tally["first_untrained"], "conversation")
            print(f"not trained on, since no token precedes it: the first token of {those}; see --add_bos=true")
        if not merger.ends:
            print("no answer ends with a token of its own: a model trained on them will not know where to stop")
        if merger.unused:
            named = [f"{key} ({count:,})" for key, count in merger.unused.most_common(8)]
            more = f" and {len(merger.unused) - len(named):,} more" if len(merger.unused) > len(named) else ""
            print(f"ignored keys, with the number of conversations that have them: {', '.join(named)}{more}")


def _read_template(path: str) -> str:
    try:
        if Path(path).stat().st_size > 4 * MAX_TEMPLATE:
            raise ConfigError(f"--template={path}: too large for a template")
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--template={path}: {error}") from None


def check_template(source: str, tokenizer: Tokenizer, name: str) -> None:
    """Compile a template and try it on two turns, before any worker starts. Raises ConfigError for a template that is
    not allowed; a template that merely rejects this conversation is accepted."""
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    compiled = ChatTemplate(source, tokenizer, name)
    with suppress(ValueError):
        compiled.render(turn)


@lru_cache(maxsize=1)  # a worker process encodes many units with one template
def _template(source: str, tokenizer: str, date: str) -> ChatTemplate:
    return ChatTemplate(source, cached_tokenizer(tokenizer), day=_day(date))


def _day(date: str) -> Date | None:
    return Date.fromisoformat(date) if date else None


def encode(spans: list[Span], prefix: str, tokenizer: str, options: ChatOptions) -> Part:
    """See ``ChatOptions.encode``. With ``on_error="stop"`` it stops at the first refused line."""
    model, part = (
        cached_tokenizer(tokenizer),
        Part(prefix, spans, tally=Counter(trained_tokens=0, lost_tokens=0, without_target=0, first_untrained=0)),
    )
    dtype, template = token_dtype(model.vocab_size), _template(options.chat_template, tokenizer, options.date)
    named = {token for text, token in model.special.items() if text in template.source}
    ends = {*named, template.end(), model.eos_id}
    with (
        IndexedWriter(prefix, dtype, durable=False) as writer,
        Path(f"{prefix}.rejects").open("w", encoding="utf-8") as rejects,
    ):
        for tokens, mask in _encoded(part, model, template, options, rejects):
            part.ends.update(_ends(tokens, mask, ends, model))
            if options.max_document_tokens and len(tokens) > options.max_document_tokens:
                kept = options.max_document_tokens if options.long_documents == "truncate" else 0
                part.long += 1
                part.tally["lost_tokens"] += len(tokens) - kept
                if not kept:
                    continue
                tokens, mask = tokens[:kept], mask[:kept]
            if not len(tokens):
                part.empty += 1
                continue
            first = bool(mask[0]) and options.loss != "all"
            mask[0] = False  # the first token of a document is never a target
            if not mask.any():
                part.tally["without_target"] += 1
                continue
            part.documents += 1
            part.tally["first_untrained"] += first
            part.tally["trained_tokens"] += int(mask.sum())
            writer.add_document(tokens.astype(dtype), alternating(mask))
    return part


def _ends(tokens: np.ndarray, mask: np.ndarray, known: Collection[int], model: Tokenizer) -> Iterator[int]:
    """Which of the ``known`` end tokens end a trained stretch, ignoring white space after them."""
    for last in np.flatnonzero(mask & ~np.append(mask[1:], False)).tolist():
        while last >= 0 and mask[last]:
            token = int(tokens[last])
            if token in known:
                yield token
            if token in known or model.decode([token]).strip():
                break
            last -= 1


def alternating(mask: np.ndarray) -> list[int]:
    """Lengths of the runs of equal values in a mask; the first run is False."""
    return np.diff([0, *(np.flatnonzero(np.diff(mask)) + 1), len(mask)]).tolist()


def _encoded(
    part: Part, model: Tokenizer, template: ChatTemplate, options: ChatOptions, rejects: TextIO
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each conversation, [n] tokens and a bool [n] loss mask. Counts lines and writes refused ones to
    ``rejects``."""
    for number, span in enumerate(part.spans):
        part.lines.append(0)
        for line, found, error, excerpt in read_objects(span, options.max_line_bytes):
            part.lines[-1] = line
            try:
                if error:
                    raise ValueError(error)
                if found is None:
                    part.empty += 1
                    continue
                excerpt = json.dumps(found, default=str)[:80]  # parquet has dates and bytes
                read = conversation(found, options.format, template.calls)
                yield tokenized(read, model, template, options.loss, options.add_bos)
                part.unused.update({*read.unused, *unread(read, template)})
            except ValueError as reason:
                rejects.write(json.dumps([number, line, str(reason), excerpt]) + "\n")
                if options.on_error == "stop":
                    return


def tokenized(
    found: Conversation, model: Tokenizer, template: ChatTemplate, loss: Loss, add_bos: bool | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """[n] tokens of a conversation and its bool [n] loss mask. Raises ValueError to refuse the conversation.

    A prompt and its completion are encoded as one text; encoded separately, the space between them could be lost or
    doubled.
    """
    if found.plain:
        prompt, completion = (message["content"] for message in found.messages)
        rendered = Rendered(prompt + completion, [(0 if loss == "all" else len(prompt), len(prompt + completion))])
    else:
        untrained = found.untrained | (frozenset() if loss == "all" else frozenset(range(found.prompt)))
        rendered = template.render(found.messages, loss, found.given, untrained)
    check_text(rendered.text)
    encoded = model.encode_spans(rendered.text)
    tokens = encoded.tokens.tolist()
    written = add_bos is None and not (found.plain or template.plain)
    begin = [] if written else model.around(add_bos)[0]
    before = len(led(begin, tokens)) - len(tokens)
    # An end token that the text already has is not added again.
    after = int(found.plain and model.eos_id >= 0 and tokens[-1:] != [model.eos_id])
    mask = np.concatenate((np.zeros(before, bool), encoded.within(rendered.spans), np.ones(after, bool)))
    return np.array([*begin[:before], *tokens, *[model.eos_id] * after], np.int64), mask


def unread(found: Conversation, template: ChatTemplate) -> Iterator[str]:
    """The keys of a conversation that this template does not read."""
    if found.plain:
        yield from found.given
        return
    yield from (
        key if key == "tools" else f"chat_template_kwargs.{key}" for key in found.given if not template.reads(key)
    )
    more = {key for message in found.messages for key in message} - {"role", "content"}
    yield from (f"messages.{key}" for key in more if not template.reads(key))
