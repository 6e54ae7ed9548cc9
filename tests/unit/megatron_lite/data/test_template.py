"""Chat templates: what transformers makes of them, and that a hostile one is refused in one line."""

import json

import numpy as np
import pytest

from data_tools.chat import check_template, tokenized
from data_tools.conversations import Conversation
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_json_tokenizer(tmp_path_factory.mktemp("template") / "hf")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def messages(pairs):
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.mark.parametrize("source", [CHATML, LLAMA])
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


def test_without_marks_a_turn_is_what_the_text_gains_by_it(tokenizer):
    marked, unmarked = ChatTemplate(CHATML, tokenizer), ChatTemplate(UNMARKED, tokenizer)
    for pairs in CONVERSATIONS:
        for loss in ("completions", "last", "all"):
            assert unmarked.render(messages(pairs), loss) == marked.render(messages(pairs), loss)


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
