"""Chat templates: render a conversation as text for the model, and find the characters that the assistant wrote.

Templates are Jinja, as shipped with Hugging Face models, and are not trusted. They run in Jinja's immutable sandbox,
which protects Python's attributes, with additional limits on CPU time, memory, numbers and output. Two things differ
from Hugging Face: access to a private attribute is an error rather than an empty string, and the clock
(``strftime_now``) returns a given date, so that the same input always gives the same text.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import date
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_lite.data.tokenizer import SETTINGS, TEMPLATE, Tokenizer, parse_object
from megatron_lite.errors import ConfigError, DataError

Loss = Literal["completions", "last", "all"]
Message = Mapping[str, Any]

# For a tokenizer without a template: roles as plain text; an end-of-sequence token ends each assistant turn.
PLAIN = """
{%- for message in messages -%}
<|{{ message.role }}|>
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
{%- else %}{{ message.content }}{% endif %}

{% endfor -%}
{% if add_generation_prompt %}<|assistant|>
{% endif %}"""

MAX_TEMPLATE = 1 << 20  # characters
MAX_OUTPUT = 16 << 20  # characters of one conversation
_MAX_NUMBER = 1 << 64
_SECONDS = 5.0  # CPU seconds for one conversation; normal is a ten-thousandth of that
_MEMORY = 1 << 30  # additional bytes that one conversation may use
_OPEN, _CLOSE = "\ufdd1", "\ufdd2"  # noncharacters that mark the start and end of a `generation` block
_HERE = "\ufdd3"  # stands for a message's content when its position is searched for
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names that transformers uses in messages


class _RefusedError(ValueError):
    """The template refuses a conversation."""


class _OutOfTimeError(BaseException):
    """Not an Exception, so that Jinja does not treat it as an error of the template."""


class _Generation(Extension):
    """``{% generation %} … {% endgeneration %}``: what the assistant wrote."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, where anything forbidden is an error and numbers stay small."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"access to {attribute!r} of {type(obj).__name__} is not allowed")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        for value, other in ((left, right), (right, left)):
            if isinstance(value, (int, float)) and abs(value) > _MAX_NUMBER:
                raise SecurityError("arithmetic with numbers above 2**64 is not allowed")
            repeats = operator == "*" and isinstance(value, (str, list, tuple)) and isinstance(other, int)
            if repeats and len(value) * other > MAX_OUTPUT:
                raise SecurityError(f"a repetition of more than {MAX_OUTPUT} elements is not allowed")
        if operator == "**" and isinstance(right, (int, float)) and abs(right) > 64:
            raise SecurityError("powers above 64 are not allowed")
        return super().call_binop(context, operator, left, right)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class Rendered(NamedTuple):
    """The text of a conversation, and the spans of characters [start, stop) that are trained on."""

    text: str
    spans: list[tuple[int, int]]


class ChatTemplate:
    """A compiled chat template with the special tokens of a tokenizer. ``day``: today's date, for templates that ask.

    Raises ConfigError for a template that does not compile or does something forbidden, here and in ``render``.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, name: str = "chat template", day: date | None = None) -> None:
        self.source, self.name, self._tokenizer = source, name, tokenizer
        self.plain = source == PLAIN  # all other templates write the begin token themselves
        self._given: Mapping[str, Any] = {name: text for name, text in tokenizer.names().items() if text}
        self._ends = tuple(tokenizer.special)
        if len(source) > MAX_TEMPLATE:
            raise ConfigError(f"{name}: {len(source)} characters, more than {MAX_TEMPLATE}")
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        if day:
            environment.globals["strftime_now"] = day.strftime
        try:
            with self._limits():
                tree = environment.parse(source)
                self._template: Template = environment.from_string(tree)
        except (TemplateError, RecursionError) as error:
            line = f", line {error.lineno}" if hasattr(error, "lineno") else ""
            raise ConfigError(f"{name}{line}: {_one_line(error)}") from None
        self.marks_generation = any(
            isinstance(node.call, nodes.Call)
            and isinstance(node.call.node, nodes.ExtensionAttribute)
            and node.call.node.identifier == _Generation.identifier
            for node in tree.find_all(nodes.CallBlock)
        )

        self._words = {
            word
            for kind, field in ((nodes.Name, "name"), (nodes.Getattr, "attr"), (nodes.Const, "value"))
            for node in tree.find_all(kind)
            if isinstance(word := getattr(node, field), str)
        }

    def reads(self, key: str) -> bool:
        """Whether the template mentions a key of a message or another input of this name."""
        return key in self._words or (key in _REASONING and not self._words.isdisjoint(_REASONING))

    @cached_property
    def calls(self) -> Literal["objects", "text", "none"]:
        """How the template takes the arguments of ``tool_calls``: as objects, as JSON text, or not at all."""
        user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": ""}
        forms: tuple[tuple[Literal["objects", "text"], Any], ...] = (("objects", {"a": 1}), ("text", '{"a": 1}'))
        for form, arguments in forms:
            call = {"id": "000000000", "type": "function", "function": {"name": "f", "arguments": arguments}}
            with suppress(ValueError):
                text = self._render([user, {**answer, "tool_calls": [call]}]).text
                if repr(arguments) in text and form == "objects":  # Python's repr is never intended
                    continue
                return "none" if text == self._render([user, answer]).text else form
        return "objects"

    @cached_property
    def _prompts_always(self) -> bool:
        """Whether the template writes a generation prompt even if none was requested."""
        user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": _HERE}
        with suppress(ValueError):
            before, _, after = self._render([user, answer]).text.partition(_HERE)
            going_on = self._render([user, answer, user]).text.partition(_HERE)[2]
            header = after[_shared(after, going_on) :].rstrip()
            return bool(header) and before.rstrip().endswith(header)
        return False

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text from which the assistant continues. Raises ValueError if the template refuses the conversation or
        leaves out a message."""
        _check_marks(messages)
        text = self._render(messages, prompt=True).text
        self._check_complete(messages, {}, text, prompt=True)
        return text

    def end(self) -> int:
        """The single token that the template writes after an answer (a control token, or one such as ``<end>``), or
        -1."""
        question, answer = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Certainly"}
        try:
            text = self._render([question, answer]).text.rstrip()
        except ValueError:
            return -1
        _, found, after = text.rpartition(answer["content"])
        start = len(text) - len(after.lstrip())
        tokens, starts, _ = self._tokenizer.encode_spans(text)
        written = tokens[starts >= start].tolist()
        if not found or not written:
            return -1
        marker = len(written) == 1 and re.fullmatch(r"\W+\w.*\W", text[start:])
        return written[0] if marker or written[0] in self._tokenizer.special.values() else -1

    def render(
        self,
        messages: Sequence[Message],
        loss: Loss = "completions",
        given: Mapping[str, Any] = MappingProxyType({}),
        untrained: Collection[int] = (),
    ) -> Rendered:
        """Render the conversation as text, with the spans of the assistant's turns, including their end markers.

        ``given``: further inputs of the template. ``loss``: ``completions`` trains on all turns of the assistant,
        ``last`` on its last turn only, ``all`` on the whole text, always without the messages ``untrained``. The spans
        are those of the template's ``generation`` blocks; without such blocks, a turn is the text after the header that
        the generation prompt would write. Raises ValueError if the template refuses the conversation or leaves out a
        message, or if a turn cannot be found in the text.
        """
        _check_marks(messages, dict(given))
        whole, spans = self._render(messages, given)
        if self._prompts_always and (loss == "all" or not self.marks_generation):
            raise ValueError(
                "the chat template writes the header of the next answer after every conversation: give, as "
                "--template=FILE, a copy that writes it only {% if add_generation_prompt %}"
            )
        self._check_complete(messages, given, whole)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if loss == "all":
            return Rendered(whole, _outside([self._turn(whole, messages, i, given) for i in sorted(untrained)], whole))
        if self.marks_generation:
            if untrained and len(spans) != len(turns):
                raise ValueError(
                    f"the template marks {len(spans)} spans for {len(turns)} turns, so that none can be left out"
                )
            kept = [span for i, span in zip(turns, spans, strict=True) if i not in untrained] if untrained else spans
            last = loss == "last"
            return Rendered(whole, [span for span in spans[-1:] if span in kept] if last else kept)
        wanted = [i for i in (turns[-1:] if loss == "last" else turns) if i not in untrained]
        return Rendered(whole, [self._turn(whole, messages, i, given) for i in wanted])

    def _check_complete(
        self, messages: Sequence[Message], given: Mapping[str, Any], whole: str, *, prompt: bool = False
    ) -> None:
        """Raise ValueError for a message that the template ignores (such as one with an unknown role), and for text
        beside tool calls that the template leaves out."""
        for i, message in enumerate(messages):
            if message.get("tool_calls") and message["content"].rpartition("</think>")[2].strip() not in whole:
                raise ValueError(f"the chat template leaves out what message {i + 1} says beside its tool calls")
            if message["role"] in ("user", "assistant") or not message["content"].strip() or len(messages) == 1:
                continue
            with suppress(_RefusedError):
                if self._render([*messages[:i], *messages[i + 1 :]], given, prompt=prompt).text == whole:
                    raise ValueError(f"the chat template leaves out message {i + 1}, of role {message['role']!a}")

    def _turn(self, whole: str, messages: Sequence[Message], i: int, given: Mapping[str, Any]) -> tuple[int, int]:
        """The span of message ``i`` in ``whole``; for the assistant, without the header."""
        answers = messages[i]["role"] == "assistant"
        with suppress(_RefusedError):
            before = self._render(messages[:i], given, prompt=answers).text
            after = whole if i == len(messages) - 1 else self._render(messages[: i + 1], given).text
            if whole.startswith(after) and after.startswith(before):
                return len(before), max(self._end(after), len(before))
        # The first message, or the earlier text depends on later messages: locate it with a stand-in content.
        stand_in = _stand_in(messages[i])
        probe = self._render([*messages[:i], stand_in, *messages[i + 1 :]], given).text
        start, stop = probe.find(_HERE), probe.rfind(_HERE) + 1
        header, lead, end = self._around(stand_in, messages[:i], given, answers)
        if probe[:start].endswith(header + lead):
            start -= len(lead)
        if probe.startswith(end, stop):
            stop += len(end)
        tail = probe[stop:]
        if start < 0 or probe[:start] != whole[:start] or not whole[start:].endswith(tail):
            raise ValueError(
                f"the template rewrites message {i + 1}, or what precedes it, as the conversation goes on, and marks "
                "no {% generation %}: give a copy that marks it as --template=FILE, or --loss=last"
            )
        return start, len(whole) - len(tail)

    def _around(
        self, stand_in: Message, context: Sequence[Message], given: Mapping[str, Any], answers: bool
    ) -> tuple[str, str, str]:
        """For the last message of a conversation: the header (as in a generation prompt), the text between header and
        content, and the text after the content. Empty if that cannot be determined."""
        for before in (context, [{"role": "user", "content": "?"}]):
            with suppress(_RefusedError):
                past = self._render(before, given).text
                prompt = self._render(before, given, prompt=answers).text
                text = self._render([*before, stand_in], given).text
                same, place = _shared(prompt, text), text.find(_HERE)
                header, lead = (text[len(past) : same], text[same:place]) if len(past) <= same <= place else ("", "")
                end = text[text.rfind(_HERE) + 1 :]
                return header, lead, end[: self._end(end)]
        return "", "", ""

    def _end(self, text: str) -> int:
        """The end of a text, without a newline that follows an end marker."""
        shorter = text.rstrip()
        return len(shorter) if shorter.endswith(self._ends) else len(text)

    def _render(
        self, messages: Sequence[Message], given: Mapping[str, Any] = MappingProxyType({}), *, prompt: bool = False
    ) -> Rendered:
        text: list[str] = []
        spans: list[tuple[int, int]] = []
        size = open_at = 0
        values = {**self._given, "tools": None, "documents": None, **given}
        try:
            with self._limits():
                values |= {"messages": [_reasoned(message) for message in messages], "add_generation_prompt": prompt}
                for chunk in self._template.generate(values):
                    for mark in _marked(chunk):
                        if mark == _OPEN:
                            open_at = size
                        elif mark == _CLOSE:
                            spans.append((open_at, size))
                        else:
                            text.append(mark)
                            size += len(mark)
                    if size > MAX_OUTPUT:
                        raise _RefusedError(f"the template made more than {MAX_OUTPUT} characters of it")
        except TemplateError as error:
            hint = " (data_tools chat --date=YYYY-MM-DD)" if "'strftime_now' is undefined" in str(error) else ""
            raise _RefusedError(f"the chat template refuses it: {_one_line(error)}{hint}") from None
        except (TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError) as error:
            raise _RefusedError(f"the chat template fails on it: {_one_line(error)}") from None
        return Rendered("".join(text), spans)

    @contextmanager
    def _limits(self) -> Iterator[None]:
        """Limit CPU time and memory inside the ``with`` block. Raises ConfigError if a limit is exceeded or the sandbox
        refuses something. Time is limited only in the main thread, because signals arrive there."""

        def out_of_time(*_: object) -> NoReturn:
            raise _OutOfTimeError

        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
        timed = threading.current_thread() is threading.main_thread()
        try:
            resource.setrlimit(resource.RLIMIT_AS, (min([used + _MEMORY, *limits]), hard))
            if timed:
                before = signal.signal(signal.SIGVTALRM, out_of_time)
                signal.setitimer(signal.ITIMER_VIRTUAL, _SECONDS, 0.1)
            try:
                yield
            finally:
                if timed:
                    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
                    signal.signal(signal.SIGVTALRM, before)
        except SecurityError as error:
            raise ConfigError(f"{self.name}: refused: {_one_line(error)}") from None
        except _OutOfTimeError:
            raise ConfigError(f"{self.name}: refused: one conversation took more than {_SECONDS:g} s") from None
        except MemoryError:
            raise ConfigError(f"{self.name}: refused: one conversation took more than {_MEMORY >> 20} MiB") from None
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _marked(chunk: str) -> Iterator[str]:
    """A piece of output, split at the marks."""
    start = 0
    for i, character in enumerate(chunk) if _OPEN in chunk or _CLOSE in chunk else ():
        if character in (_OPEN, _CLOSE):
            yield chunk[start:i]
            yield character
            start = i + 1
    yield chunk[start:]


def _reasoned(message: Message) -> Message:
    """The message with its reasoning under every name that a template may read, as transformers does."""
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _stand_in(message: Message) -> Message:
    """A message of the same kind whose texts and tool names can be found in the output."""
    texts = dict.fromkeys(("content", *(key for key in _REASONING if key in message)), _HERE)
    if "tool_calls" not in message:
        return {**message, **texts}
    calls = [
        {**call, "function": {**call["function"], "name": _HERE}} if "function" in call else {**call, "name": _HERE}
        for call in message["tool_calls"]
    ]
    return {**message, **texts, "tool_calls": calls}


def _shared(one: str, other: str) -> int:
    """The length of the common prefix of two texts."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _outside(spans: Sequence[tuple[int, int]], text: str) -> list[tuple[int, int]]:
    """The parts of a text between ``spans``, which are in order."""
    starts = [0, *(stop for _, stop in spans)]
    stops = [*(start for start, _ in spans), len(text)]
    return [(start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop]


def _check_marks(*given: object) -> None:
    text = json.dumps(given, ensure_ascii=False, default=str)
    if any(mark in text for mark in (_OPEN, _CLOSE, _HERE)):
        raise ValueError("it holds U+FDD1 or U+FDD2 or U+FDD3, which are noncharacters")


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def find_template(files: Mapping[str, bytes], name: str) -> str:
    """The template among a tokenizer's files, or ``PLAIN``."""
    if TEMPLATE in files:
        try:
            return files[TEMPLATE].decode()
        except UnicodeDecodeError:
            raise DataError(f"{name}: {TEMPLATE} is not UTF-8") from None
    found = parse_object(files, "chat_template.json").get("chat_template")
    found = found or parse_object(files, SETTINGS).get("chat_template") or PLAIN
    if isinstance(found, list):  # several named templates
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    if not isinstance(found, str):
        raise DataError(f"{name}: its chat template is not a string, or none of several is named default")
    return found
