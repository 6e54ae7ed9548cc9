"""Chat templates: what transformers makes of them, and that a hostile one is refused in one line."""

import json
from datetime import date

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.chat import check_template, tokenized
from data_tools.conversations import FORMATS, Conversation, conversation
from megatron_lite.data import template as module
from megatron_lite.data.template import PLAIN, ChatTemplate, find_template
from megatron_lite.data.tokenizer import load_tokenizer, tokenizer_files
from megatron_lite.errors import ConfigError, DataError
from tests.kit.corpora import CHATML, UNMARKED, data_tools, write_json_tokenizer

CONVERSATIONS = [
    [("user", "hi"), ("assistant", "yo")],
    [
        ("system", "Be brief."),
        ("user", " leading\n\n"),
        ("assistant", "\n\nnaïve 語😀 "),
        ("user", "x"),
        ("assistant", ""),
    ],
    [
        ("user", "a<|im_end|>b"),
        ("assistant", "  def main(args):\n    return 'x'\n"),
        ("tool", "{}"),
        ("assistant", "done"),
    ],
    [("user", "only a question")],
]
LLAMA = (
    "{{- bos_token }}{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\\n\\n' }}"
    "{%- if m.role == 'assistant' %}{% generation %}{{ m['content'] | trim }}<|im_end|>{% endgeneration %}"
    "{%- else %}{{ m['content'] | trim + '<|im_end|>' }}{% endif %}{% endfor %}"
)

# The structure of templates in use; ⟦ ⟧ are where each would mark what the assistant says.
_LLAMA3 = """{{- bos_token }}
{%- if strftime_now is defined %}{%- set day = strftime_now('%d %b %Y') %}{%- else %}{%- set day = '26 Jul 2024' %}
{%- endif %}{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}
{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|im_start|>system<|im_end|>\n\nToday: ' + day + '\n' + system }}
{%- if tools is not none %}{%- for t in tools %}{{- t | tojson(indent=4) }}{%- endfor %}{%- endif %}{{- '<|im_end|>' }}
{%- for m in messages %}{%- if 'tool_calls' in m %}
{%- if not m.tool_calls|length == 1 %}{{- raise_exception('one call at once') }}{%- endif %}
{%- set call = m.tool_calls[0].function %}{{- '<|im_start|>assistant\n\n' }}⟦
{{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}' }}{{- '<|im_end|>' }}⟧
{%- elif m.role == 'tool' %}{{- '<|im_start|>ipython\n\n' }}{{- m.content | tojson }}{{- '<|im_end|>' }}
{%- elif m.role == 'assistant' %}{{- '<|im_start|>assistant\n\n' }}⟦{{- m['content'] | trim + '<|im_end|>' }}⟧
{%- else %}{{- '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|im_end|>' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n\n' }}{%- endif %}"""
_QWEN3 = """{%- if tools %}{{- '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}{{- '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}{%- set ns = namespace(last=messages|length - 1, open=true) %}
{%- for m in messages[::-1] %}{%- set i = (messages|length - 1) - loop.index0 %}
{%- if ns.open and m.role == 'user' %}{%- set ns.open = false %}{%- set ns.last = i %}{%- endif %}{%- endfor %}
{%- for m in messages %}{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}
{%- elif m.role == 'assistant' %}{%- set reasoning = '' %}{%- set content = m.content %}
{%- if m.reasoning_content is string %}{%- set reasoning = m.reasoning_content %}
{%- elif '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}{{- '<|im_start|>assistant\n' }}⟦
{%- if loop.index0 > ns.last and (loop.last or reasoning) %}
{{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}{{- content }}{%- endif %}
{%- for c in m.tool_calls or [] %}{%- if c.function %}{%- set c = c.function %}{%- endif %}
{{- '\n<tool_call>\n{"name": "' ~ c.name ~ '", "arguments": ' ~ (c.arguments | tojson) ~ '}\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>' }}⟧{{- '\n' }}
{%- elif m.role == 'tool' %}{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
_R1 = """{{- bos_token }}{%- for m in messages %}{%- if m.role == 'system' %}{{- m.content }}
{%- elif m.role == 'user' %}{{- '<|im_start|>' + m.content }}
{%- elif m.role == 'tool' %}{{- '<tool_output>' + m.content }}
{%- else %}{{- '<|endoftext|>' }}⟦{{- m.content.split('</think>')[-1] }}
{%- for c in m.tool_calls or [] %}{{- '<call>' + c.function.name + '\n' + c.function.arguments }}{%- endfor %}
{{- '<|im_end|>' }}⟧{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|endoftext|><think>\n' }}{%- endif %}"""
_MISTRAL = """{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}{{- bos_token }}
{%- for m in messages %}{%- if m.role == 'user' %}{%- if tools and m == users[-1] %}
{{- '[TOOLS]' }}{{- tools | tojson }}
{%- endif %}{{- '[INST] ' + m.content + '[/INST]' }}
{%- elif m.role == 'assistant' %}⟦{{- ' ' + m.content }}
{%- for c in m.tool_calls or [] %}{{- '[CALL]' }}{{- c.function | tojson }}{%- endfor %}{{- '<|im_end|>' }}⟧
{%- elif m.role == 'tool' %}{{- '[RESULT] ' ~ m.content ~ '[/RESULT]' }}
{%- else %}{{- '[SYSTEM] ' ~ m.content }}{%- endif %}{%- endfor %}"""
_GEMMA = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}{{- raise_exception('no system role') }}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}{{- '<|im_start|>model\n' }}⟦{{- m.content | trim + '<|im_end|>' }}⟧{{- '\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>model\n' }}{%- endif %}"""
IN_USE = {"llama3": _LLAMA3, "qwen3": _QWEN3, "r1": _R1, "mistral": _MISTRAL, "gemma": _GEMMA}


def marked(source):
    return source.replace("⟦", "{% generation %}").replace("⟧", "{% endgeneration %}")


def unmarked(source):
    return source.replace("⟦", "").replace("⟧", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_json_tokenizer(tmp_path_factory.mktemp("template") / "hf")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def messages(pairs):
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.mark.parametrize("source", [CHATML, LLAMA, marked(_QWEN3)], ids=["chatml", "llama", "qwen3"])
def test_tokens_and_mask_are_those_of_transformers(folder, tokenizer, source):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (the hf extra)")
    # Where offsets leave out leading spaces, transformers finds no token for a turn that begins with one and stops.
    whole = (folder / "tokenizer.json").read_text().replace('"trim_offsets":true', '"trim_offsets":false')
    (folder / "whole.json").write_text(whole)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=f"{folder}/whole.json", bos_token="<|endoftext|>")
    ours = ChatTemplate(source.replace("{{- bos_token }}", "<|endoftext|>"), tokenizer)
    for pairs in CONVERSATIONS:
        wanted = theirs.apply_chat_template(
            messages(pairs), chat_template=source, return_assistant_tokens_mask=True, return_dict=True
        )
        tokens, mask = tokenized(Conversation(messages(pairs)), tokenizer, ours, "completions")
        assert tokens.tolist() == wanted["input_ids"]
        assert mask.astype(int).tolist() == wanted["assistant_masks"]


@pytest.fixture(scope="module")
def transformers(folder):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (the hf extra)")
    return transformers.PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json", eos_token="<|im_end|>")


CALL = {"id": "call00001", "type": "function", "function": {"name": "get", "arguments": {"city": "Zürich", "n": None}}}
TOOL = {"type": "function", "function": {"name": "get", "parameters": {"type": "object", "properties": {}}}}
_word = st.sampled_from(
    ["a", "two three", " x\n", "naïve 😀", "<thin", "<|endoftext|>", "</think>b", "None", '{"a": 1}']
)


@st.composite
def dialogues(draw):
    """Messages as templates know them, and tools."""
    found = [{"role": "system", "content": draw(_word)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        found.append({"role": "user", "content": draw(_word)})
        if draw(st.booleans()):
            found.append({"role": "assistant", "content": "", "tool_calls": [CALL]})
            found.append({"role": "tool", "content": draw(_word), "tool_call_id": "call00001", "name": "get"})
        found.append({"role": "assistant", "content": draw(_word)})
        if draw(st.booleans()):
            found[-1]["reasoning_content"] = draw(_word)
    start = draw(st.booleans()) and found[0]["role"] != "system"
    return found[start:], draw(st.sampled_from([None, [TOOL]]))


def as_line(draw, dialogue, tools):
    """A line that says a dialogue in one of the forms, with nulls where it has nothing to say."""
    form = draw(st.sampled_from(["messages", "sharegpt", "completion"]))
    lines = []
    for message in dialogue:
        line = dict(message)
        if "tool_calls" in line and draw(st.booleans()):
            called = {**CALL, "function": {**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"])}}
            line |= {"content": None, "tool_calls": [called]}
        if form == "sharegpt":
            names = {"user": "human", "assistant": "gpt"}
            line["from"], line["value"] = names.get(line.pop("role"), message["role"]), line.pop("content")
        absent = draw(st.sampled_from(["weight", "name", "tool_calls", "refusal", "train", "reasoning_content"]))
        lines.append({absent: None, **line})
    beside = {
        "tools": draw(st.sampled_from([tools, json.dumps(tools)])) if tools else draw(st.sampled_from([None, ""]))
    }
    if form == "completion":
        cut = draw(st.integers(1, max(len(lines) - 1, 1)))
        return beside | {"prompt": lines[:cut], "completion": lines[cut:]}
    return beside | {FORMATS[form].keys[0]: lines, "source": draw(st.sampled_from([None, "web"]))}


def written(model, source, found):
    """A conversation as transformers writes it; None where the template refuses it."""
    tools = found.given.get("tools")
    try:
        return model.apply_chat_template(found.messages, tools=tools, chat_template=source, tokenize=False)
    except Exception:  # whatever the template raises
        return None


@pytest.mark.parametrize("name", IN_USE)
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_lines_of_every_form_are_written_as_transformers_does(tokenizer, transformers, name, data):
    dialogue, tools = data.draw(dialogues())
    source = IN_USE[name].replace("strftime_now", "no_clock")
    template, other = ChatTemplate(unmarked(source), tokenizer), ChatTemplate(marked(source), tokenizer)
    called = [m for m in dialogue if "tool_calls" in m]
    try:
        found = conversation(as_line(data.draw, dialogue, tools), calls=template.calls)
    except ValueError as error:
        assert "tool calls" in str(error) if template.calls == "none" and called else "is empty" in str(error)
        return
    for message, meant in zip(found.messages, dialogue, strict=True):
        assert (message["role"], message["content"]) == (meant["role"], meant["content"])
    assert found.given.get("tools") == tools
    wanted = written(transformers, unmarked(source), found)
    try:
        text, spans = template.render(found.messages, "completions", found.given)
    except ValueError as error:
        assert wanted is None or "leaves out" in str(error)
        return
    assert text == wanted
    assert [text[a:b] for a, b in spans] == [text[a:b] for a, b in other.render(found.messages, given=found.given)[1]]


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_lines_are_refused_or_written_as_transformers_does(tokenizer, transformers, data):
    line = as_line(data.draw, *data.draw(dialogues()))
    key = next(key for key in ("messages", "conversations", "completion") if key in line)
    place = data.draw(st.sampled_from([line, *line[key]]))
    field = data.draw(st.sampled_from([*place, "role", "value", "tool_calls", "function_call"]))
    broken = [None, "", "x", "[", 0, {}, [], [{}], {"name": "f"}, [{"type": "text", "text": "x"}]]
    place[field] = data.draw(st.sampled_from(broken))
    source = unmarked(_QWEN3)
    template = ChatTemplate(source, tokenizer)
    try:
        found = conversation(line, calls=template.calls)
        text, _ = template.render(found.messages, "completions", found.given)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    assert text == written(transformers, source, found)


def test_a_turn_is_found_though_earlier_ones_lose_their_reasoning(tokenizer):
    turns = messages([("user", "a"), ("assistant", "<think>\nr\n</think>\n\nb"), ("user", "c"), ("assistant", "d")])
    text, spans = ChatTemplate(unmarked(_QWEN3), tokenizer).render(turns)
    assert [text[a:b] for a, b in spans] == ["b<|im_end|>", "<think>\n\n</think>\n\nd<|im_end|>"]
    ended = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ (eos_token if loop.last else '') }} {% endfor %}"
    text, spans = ChatTemplate(ended, tokenizer).render(turns[2:] * 2)
    assert text == "user: c assistant: d user: c assistant: d<|im_end|> "
    assert [text[a:b] for a, b in spans] == ["d", "d<|im_end|>"]
    text, spans = ChatTemplate(unmarked(_R1), tokenizer).render(turns)
    assert [text[a:b] for a, b in spans] == ["\n\nb<|im_end|>", "d<|im_end|>"]


@pytest.mark.parametrize("name", IN_USE)
def test_messages_that_are_not_to_be_trained_on_are_left_out(tokenizer, name):
    turns = messages([("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")])
    for source in (marked(IN_USE[name]), unmarked(IN_USE[name])):
        template = ChatTemplate(source, tokenizer)
        text, (_, last) = template.render(turns)
        assert template.render(turns, untrained={1}).spans == [last] == template.render(turns, "last").spans
        assert template.render(turns, "last", untrained={3}).spans == []
        kept = [text[a:b] for a, b in template.render(turns, "all", untrained={1}).spans]
        assert len(kept) == 2 and "a" in kept[0] and "b" not in "".join(kept).replace("<|im_", "") and "d" in kept[1]


def test_a_message_that_a_template_ignores_is_refused(tokenizer):
    with pytest.raises(ValueError, match="leaves out message 1, of role 'developer'"):
        ChatTemplate(unmarked(_QWEN3), tokenizer).render(messages([("developer", "x"), ("user", "a")]))


def test_words_beside_a_call_that_a_template_leaves_out_are_refused(tokenizer):
    calls_alone = (
        "{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}"
        "{% endif %}{% endfor %}"
    )
    call = [{"type": "function", "function": {"name": "get", "arguments": {}}}]
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "let me see", "tool_calls": call}]
    with pytest.raises(ValueError, match="leaves out what message 2 says beside its tool calls"):
        ChatTemplate(calls_alone, tokenizer).render(said)
    ChatTemplate(calls_alone, tokenizer).render([said[0], {**said[1], "content": ""}])


def test_what_a_template_takes_of_tool_calls(tokenizer):
    called = {"llama3": "objects", "qwen3": "objects", "r1": "text", "mistral": "objects", "gemma": "none"}
    assert {name: ChatTemplate(unmarked(source), tokenizer).calls for name, source in IN_USE.items()} == called
    printed = (
        "{% for m in messages %}{{ m.tool_calls[0].function.arguments if m.tool_calls else m.content }}{% endfor %}"
    )
    assert ChatTemplate(printed, tokenizer).calls == "text"  # not Python's spelling of an object


def test_today_is_given_or_unknown(tokenizer):
    turns = messages([("user", "a")])
    assert "Today: 26 Jul 2024\n" in ChatTemplate(unmarked(_LLAMA3), tokenizer).render(turns).text
    dated = ChatTemplate(unmarked(_LLAMA3), tokenizer, day=date(2026, 1, 2))
    assert "Today: 02 Jan 2026\n" in dated.render(turns).text
    with pytest.raises(ValueError, match="--date=YYYY-MM-DD"):
        ChatTemplate("{{ strftime_now('%Y') }}", tokenizer).render(turns)


def test_without_marks_a_turn_is_what_the_text_gains_by_it(tokenizer):
    marked, unmarked = ChatTemplate(CHATML, tokenizer), ChatTemplate(UNMARKED, tokenizer)
    for pairs in CONVERSATIONS:
        for loss in ("completions", "last", "all"):
            assert unmarked.render(messages(pairs), loss) == marked.render(messages(pairs), loss)


@pytest.mark.parametrize("header", ["assistant> ", "<|im_start|>assistant\n"])
def test_a_header_after_every_conversation_is_refused(tokenizer, header):
    turn = "{{ '" + header.replace("assistant", "' + m.role + '").replace("\n", "\\n") + "' + m.content + '\\n' }}"
    source = "{% for m in messages %}" + turn + "{% endfor %}"
    always, asked = source + header, source + "{% if add_generation_prompt %}" + header + "{% endif %}"
    for loss in ("completions", "last", "all"):
        with pytest.raises(ValueError, match="writes the header of the next answer after every conversation"):
            ChatTemplate(always, tokenizer).render(messages(CONVERSATIONS[0]), loss)
        ChatTemplate(asked, tokenizer).render(messages(CONVERSATIONS[0]), loss)
    for source in IN_USE.values():
        assert not ChatTemplate(unmarked(source), tokenizer)._prompts_always


def test_the_prompt_is_what_training_has_before_the_answer(tokenizer):
    for source in (CHATML, UNMARKED, PLAIN):
        compiled = ChatTemplate(source, tokenizer)
        text, spans = compiled.render(messages(CONVERSATIONS[0]))
        assert compiled.prompt(messages(CONVERSATIONS[0][:1])) == text[: spans[0][0]]


HOSTILE = {
    "{{ ''.__class__ }}": "access to '__class__' of str",
    "{{ ''|attr('__class__') }}": "access to '__class__' of str",
    "{{ '{0.__class__}'.format(1) }}": "access to '__class__' of int",
    "{{ messages.append(1) }}": "access to 'append' of list",
    "{{ cycler.__init__.__globals__ }}": "access to '__init__' of type",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "took more than 0.2 s",
    "{{ 'a' * 1000000000 }}": "a repetition of more than",
    "{{ 'a'|center(2000000000) }}": "took more than 1024 MiB",
    "{{ (9 ** 64) ** 64 ** 64 }}": "powers above 64|numbers above",
    "{% set n = namespace(s='a' * 9999) %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}": "took more",
    "{% for %}": "line 1: Expected an expression",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}": "recursion",
}


@pytest.mark.parametrize(("source", "message"), HOSTILE.items(), ids=lambda text: text[:30])
def test_a_hostile_template_is_refused(tokenizer, monkeypatch, source, message):
    monkeypatch.setattr(module, "_SECONDS", 0.2)
    with pytest.raises(ConfigError, match=message) as refused:
        check_template(source, tokenizer, "t.jinja")
    assert str(refused.value).startswith("t.jinja") and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "made more than 16777216 characters"),
        ("{{ raise_exception('roles must\\nalternate') }}", "refuses it: roles must alternate"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails on it: maximum recursion"),
        ("{{ 1 + 'a' }}", "fails on it"),
        ("{% include '/etc/passwd' %}", "fails on it: no loader"),
    ],
)
def test_what_a_template_refuses_is_the_conversations_fault(tokenizer, source, message):
    with pytest.raises(ValueError, match=message):
        ChatTemplate(source, tokenizer).render(messages(CONVERSATIONS[0]))


def test_the_command_says_it_in_one_line(tmp_path, folder):
    (tmp_path / "t.jinja").write_text("{{ messages.__class__.__base__.__subclasses__() }}")
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": messages(CONVERSATIONS[0])}))
    result = data_tools(
        *("chat", f"--input={tmp_path}/x.jsonl", f"--tokenizer={folder}"),
        *(f"--out={tmp_path}/out", f"--template={tmp_path}/t.jinja"),
    )
    result.expect(2, stderr=r"\Aerror: .*/t\.jinja: refused: access to '__class__' of list is not allowed\n\Z")


def test_where_a_template_comes_from(tmp_path):
    folder = write_json_tokenizer(tmp_path / "hf")
    assert find_template(tokenizer_files(folder), "x") == CHATML
    (folder / "chat_template.jinja").write_text("own file")
    assert find_template(tokenizer_files(folder), "x") == "own file"
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    assert find_template({"tokenizer_config.json": json.dumps({"chat_template": named}).encode()}, "x") == "b"
    assert find_template({}, "x") == PLAIN
    with pytest.raises(DataError, match="none of several is named default"):
        find_template({"tokenizer_config.json": json.dumps({"chat_template": named[:1]}).encode()}, "x")


def test_every_character_of_a_text_belongs_to_a_token(tokenizer):
    text = "  a  b\n\n naïve 語😀<|im_end|> \t x"
    tokens, starts, stops = tokenizer.encode_spans(text)
    assert tokens.tolist() == tokenizer.encode(text, special=True)
    assert tokenizer.show(tokens.tolist()) == text
    covered = np.zeros(len(text), bool)
    for start, stop in zip(starts, stops, strict=True):
        covered[start:stop] = True
    assert covered.all()
    assert "<|im_end|>" not in tokenizer.show(tokenizer.encode("<|im_end|>")[:-1])  # as plain text it is several tokens
