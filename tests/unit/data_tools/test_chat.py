"""The chat command: every form of instruction data, what is trained on of it, and what becomes of what does not fit."""

import gzip
import json
import re
from datetime import datetime

import numpy as np
import pytest

from data_tools import tokenize as building
from data_tools.chat import chat
from data_tools.conversations import conversation
from data_tools.corpus import corpus
from data_tools.inspect import inspect
from megatron_lite.data.indexed import IndexedDataset, read_card
from megatron_lite.data.tokenizer import load_tokenizer
from megatron_lite.errors import ConfigError, DataError
from tests.kit.corpora import CHATML, UNMARKED, data_tools, dataset_bytes, write_json_tokenizer, write_tokenizer
from tests.kit.jobs import PYTHON
from tests.kit.terminal import run_on_terminal
from tests.kit.tokenizers import fast_folder, sentencepiece, slow_folder

USER, ANSWER = {"role": "user", "content": "add 1 2"}, {"role": "assistant", "content": "3 é😀"}
SYSTEM, TOOL = {"role": "system", "content": "Count."}, {"role": "tool", "content": "3"}
TURNS = [SYSTEM, USER, ANSWER, {"role": "user", "content": "again"}, {"role": "assistant", "content": "3"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    write_tokenizer(folder / "t.model")
    write_json_tokenizer(folder / "hf")
    write_json_tokenizer(folder / "unmarked", UNMARKED)
    return folder


def write(path, *lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def stored(prefix, model):
    """Each conversation as its stretches of text, context and trained in turn."""
    dataset = IndexedDataset(prefix)
    pairs = zip(dataset.documents[:-1], dataset.documents[1:], strict=True)
    return [[model.show(dataset[i].tolist()) for i in range(first, last)] for first, last in pairs]


def called(arguments):
    return {"type": "function", "function": {"name": "add", "arguments": arguments}}


ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [called({"a": [1, None]})]}
FORMS = [
    ({"messages": [SYSTEM, USER, ANSWER], "tools": []}, [SYSTEM, USER, ANSWER]),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "add "}, {"type": "text", "text": "1 2"}]}
            ]
        },
        [USER],
    ),
    (
        {
            "system": "Count.",
            "conversations": [{"from": "human", "value": "add 1 2"}, {"from": "gpt", "value": "3 é😀"}],
        },
        [SYSTEM, USER, ANSWER],
    ),
    ({"conversations": [{"from": "observation", "value": "3"}]}, [TOOL]),
    ({"instruction": "add 1 2", "input": "", "output": "3 é😀", "system": "Count."}, [SYSTEM, USER, ANSWER]),
    (
        {"instruction": "add", "input": "1 2", "output": "3 é😀", "history": [["add 1 2", "3 é😀"]]},
        [USER, ANSWER, {"role": "user", "content": "add\n\n1 2"}, ANSWER],
    ),
    ({"prompt": "add 1 2", "completion": "3 é😀"}, [USER, ANSWER]),
    ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [SYSTEM, USER, ANSWER]),
    ({"messages": [{**USER, "name": None, "tool_calls": None}, ANSWER], "prompt": None}, [USER, ANSWER]),
    ({"messages": [USER, ANSWER], "system": "Count."}, [SYSTEM, USER, ANSWER]),
    ({"messages": [{"from": "human", "value": "add 1 2", "role": None}, ANSWER]}, [USER, ANSWER]),
    ({"conversations": [USER, {**ANSWER, "weight": 1.0, "train": True}]}, [USER, ANSWER]),
    ({"messages": [{**CALLS, "content": None, "tool_calls": [called('{"a": [1, null]}')]}]}, [CALLS]),
    ({"messages": [{**CALLS, "tool_calls": json.dumps([called({"a": [1, None]})])}]}, [CALLS]),
    ({"messages": [{"role": "assistant", "function_call": called('{"a": [1, null]}')["function"]}]}, [CALLS]),
    ({"messages": [{"role": "function", "content": "3", "tool_calls": []}]}, [TOOL]),
    (
        {"conversations": [{"from": "function_call", "value": '{"name": "add", "arguments": {"a": [1, null]}}'}]},
        [CALLS],
    ),
    (
        {"messages": [{**CALLS, "tool_calls": [called(" "), {"name": "add", "arguments": {"a": None}}]}]},
        [{**CALLS, "tool_calls": [called({}), {"name": "add", "arguments": {}}]}],
    ),
    ({"instruction": "", "input": "add 1 2", "output": "3 é😀", "history": None, "system": None}, [USER, ANSWER]),
]


@pytest.mark.parametrize(("line", "messages"), FORMS)
def test_every_form_is_told_by_its_keys(line, messages):
    assert conversation(line).messages == messages


@pytest.mark.parametrize(
    "line",
    [
        {"messages": [USER, ANSWER], "tools": [ADD]},
        {"messages": [USER, ANSWER], "tools": json.dumps([ADD])},
        {"messages": [USER, ANSWER], "tools": [json.dumps(ADD)]},
        {"messages": [USER, ANSWER], "functions": [ADD["function"]], "tools": []},
        {"conversations": [USER, ANSWER], "tools": json.dumps([ADD["function"]])},
        {"instruction": "x", "output": "y", "tools": json.dumps([ADD])},
        {"prompt": [USER], "completion": [ANSWER], "tools": [ADD], "chat_template_kwargs": None},
    ],
)
def test_tools_come_in_every_form(line):
    assert conversation(line).given == {"tools": [ADD]}


def test_what_a_line_says_beside_its_messages():
    line = {"messages": [USER, ANSWER], "chat_template_kwargs": '{"enable_thinking": false}', "id": 0, "tags": []}
    found = conversation({**line, "parallel_tool_calls": True, "loss": None, "context": "", "weight": None})
    assert (found.given, found.unused) == ({"enable_thinking": False}, ("id", "parallel_tool_calls"))
    assert conversation({"prompt": [SYSTEM, USER, ANSWER, USER], "completion": [ANSWER], "system": None}).prompt == 4
    assert conversation({"prompt": [USER, ANSWER, USER], "completion": [ANSWER], "system": "Count."}).prompt == 4


def test_a_function_call_stays_text_where_the_template_knows_none():
    line = {"conversations": [{"from": "function_call", "value": "add(1, 2)"}]}
    assert conversation(line, calls="none").messages == [{"role": "assistant", "content": "add(1, 2)"}]
    written = conversation({"messages": [{**CALLS, "tool_calls": [called({"é": 1}), called('{"b":2}')]}]}, calls="text")
    calls = written.messages[0]["tool_calls"]
    assert [call["function"]["arguments"] for call in calls] == ['{"é": 1}', '{"b":2}']


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "x"}, r'expected "messages"; or "conversations"; or .*; its keys are: "text"'),
        ({"messages": [], "prompt": "", "completion": ""}, r"messages and completion both fit \(--format\)"),
        ({"messages": []}, '"messages" is empty'),
        ({"messages": "x"}, '"messages" is a string, expected a list'),
        ({"messages": [1]}, "message 1 is a number, expected an object"),
        ({"messages": [USER, {"content": "x"}]}, 'message 2: "role" is missing'),
        ({"messages": [{"role": "user", "content": None}]}, 'message 1: "content" is missing or null'),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "message 1: a part of its content is not text",
        ),
        (
            {"conversations": [{"from": "gpt4", "value": "x"}]},
            r"message 1: \"from\" is 'gpt4' \(did you mean 'gpt'\?\); known",
        ),
        (
            {"messages": [USER, {"role": "Assistant", "content": "x"}]},
            r"message 2: \"role\" is 'Assistant' \(did you mean 'assistant'\?\)",
        ),
        ({"instruction": "x", "output": 3}, '"output" is a number, expected a string'),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, '"history": expected pairs'),
        ({"prompt": "x", "completion": None}, 'its keys are: "prompt"'),
        ({"messages": [USER, ANSWER], "tools": '[{"name": '}, '"tools": invalid JSON at column 11'),
        ({"messages": [USER, ANSWER], "tools": {"name": "f"}}, '"tools" is an object, expected a list'),
        ({"messages": [USER, ANSWER], "tools": ["[]"]}, '"tools": a tool is not an object'),
        ({"messages": [USER, ANSWER], "tools": [ADD], "functions": [ADD]}, '"tools" and "functions" are both given'),
        ({"messages": [{**CALLS, "tool_calls": [called("add")]}]}, 'message 1: "arguments": invalid JSON'),
        ({"messages": [{**CALLS, "tool_calls": [called("[1]")]}]}, 'message 1: "arguments" are a list'),
        ({"messages": [{**CALLS, "tool_calls": [{"id": "x"}]}]}, "message 1: a tool call is"),
        ({"messages": [{**CALLS, "tool_calls": "x"}]}, 'message 1: "tool_calls": invalid JSON'),
        ({"messages": [{**CALLS, "function_call": {"name": "f"}}]}, '"tool_calls" and "function_call" are both given'),
        ({"messages": [{**CALLS, "role": "user"}]}, "message 1: tool calls in a message of role 'user'"),
        ({"conversations": [{"from": "function_call", "value": "add(1)"}]}, 'message 1: "value" of a function_call'),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, 'message 2: "weight" is 0.5, expected 0 or 1'),
        ({"messages": [USER, {**ANSWER, "train": "no"}]}, 'message 2: "train" is "no", expected true or false'),
        ({"messages": [USER, {**ANSWER, "weight": 0, "training": True}]}, '"weight" and "training" differ'),
        ({"messages": [{**USER, "train": True}]}, 'message 1: "train" is true, but only what the assistant says'),
        ({"messages": [{**ANSWER, "training_detail": [{"train": True}]}]}, 'message 1: "training_detail" is not read'),
        ({"messages": [{**ANSWER, "refusal": "No."}]}, 'message 1: "refusal" is not read'),
        ({"messages": [{**ANSWER, "audio": {"id": "x"}}]}, 'message 1: "audio" is not read: only text'),
        ({"messages": [{**USER, "from": "gpt"}]}, 'message 1: "role" and "from" differ'),
        ({"messages": [SYSTEM, USER], "system": "Be."}, '"system" is not what the first message'),
        ({"prompt": "x", "completion": "y", "system": "z"}, '"system" has no place'),
        ({"messages": [USER], "images": ["x.png"]}, '"images" is not read: only text is trained on'),
        ({"messages": [USER], "chat_template_kwargs": {"messages": []}}, '"messages" cannot be given by a line'),
        ({"messages": [USER], "chat_template_kwargs": [1]}, '"chat_template_kwargs" is a list, expected an object'),
        ({"prompt": "x", "chosen": "y", "rejected": "z"}, '"chosen", "rejected": preference data'),
        ({"prompt": "x", "completion": "y", "label": False}, '"label": preference data'),
        *(
            ({"messages": [USER, {**ANSWER, key: value}]}, f'message 2: "{key}" is not read; "weight" 0 or "train"')
            for key, value in (("loss", False), ("loss_weight", 0), ("masked", True), ("trainable", False))
        ),
        *(
            ({"messages": [USER, ANSWER], key: value}, f'^"{key}" is not read on a line; "weight" 0')
            for key, value in (("mask", [0, 1]), ("ignore", True), ("train", False), ("weight", 0))
        ),
        ({"instruction": "x", "output": "y", "system_prompt": "z"}, '"system_prompt" is not read; "system" is'),
        ({"messages": [USER], "system_message": "z"}, '"system_message" is not read; "system" is'),
        ({"messages": [USER], "documents": [{"text": "z"}]}, '"documents" is not read; what the model is to see'),
        ({"instruction": "x", "output": "y", "context": "z"}, '"context" is not read; what the model is to see'),
    ],
)
def test_what_is_wrong_with_a_line_is_said(line, message):
    with pytest.raises(ValueError, match=message):
        conversation(line)


def test_what_is_stored_is_text_by_text_context_and_completion(tmp_path, folder, capsys):
    source = write(
        tmp_path / "x.jsonl", {"messages": TURNS}, {"prompt": "1+1=", "completion": "2"}, "", {"messages": [USER]}
    )
    for name in ("hf", "unmarked"):
        chat(str(source), str(folder / name), f"{tmp_path}/{name}", workers=1)
        model = load_tokenizer(folder / name)
        assert stored(tmp_path / name, model) == [
            [
                "<|im_start|>system\nCount.<|im_end|>\n<|im_start|>user\nadd 1 2<|im_end|>\n<|im_start|>assistant\n",
                "3 é😀<|im_end|>",
                "\n<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n",
                "3<|im_end|>",
                "\n",
            ],
            ["1+1=", "2<|im_end|>"],
        ]
        card = read_card(tmp_path / name)
        assert (card["content"], card["lines"], card["empty"], card["without_target"]) == ("conversations", 4, 1, 1)
        assert card["trained_tokens"] == sum(IndexedDataset(tmp_path / name).lengths[[1, 3, 6]])
        assert card["options"]["chat_template"] == (CHATML if name == "hf" else UNMARKED)
        assert "1 conversation left out: nothing to train on" in capsys.readouterr().out


def test_a_completion_that_begins_in_the_first_token_is_counted(tmp_path, folder, capsys):
    source = write(tmp_path / "x.jsonl", {"prompt": "i", "completion": "n"}, {"prompt": "def i", "completion": "n"})
    model = load_tokenizer(folder / "hf")
    assert [len(model.encode(text)) for text in ("in", "def in")] == [1, 2]  # tokens across the seams
    for loss, count in (("completions", 1), ("all", 0)):
        chat(str(source), str(folder / "hf"), f"{tmp_path}/out", workers=1, loss=loss)
        assert read_card(tmp_path / "out")["first_untrained"] == count
        said = "not trained on, since no token precedes it: the first token of 1 conversation; see --add_bos=true"
        assert (said in capsys.readouterr().out) == bool(count)
    chat(str(source), str(folder / "hf"), f"{tmp_path}/out", workers=1)
    assert stored(tmp_path / "out", model) == [["in", "<|im_end|>"], ["def", " in<|im_end|>"]]


@pytest.mark.parametrize(
    ("line", "flags", "counts"),
    [
        ({"messages": [USER]}, {}, "1 with nothing to train on, such as a message of the assistant"),
        (
            {"messages": [USER, ANSWER]},
            {"max_document_tokens": 2, "long_documents": "drop"},
            "1 longer than --max_document_tokens",
        ),
        ("{", {"on_error": "skip", "max_bad": "100%"}, "1 refused"),
    ],
)
def test_where_nothing_is_left_it_is_said_why(tmp_path, folder, line, flags, counts):
    source = write(tmp_path / "x.jsonl", line, "")
    with pytest.raises(DataError, match=rf"no documents in 2 lines of 1 file \(1 empty; {counts}\)$"):
        chat(str(source), str(folder / "hf"), f"{tmp_path}/out", workers=1, **flags)


def test_golden_tokens_of_a_sentencepiece_model(tmp_path, folder):
    source = write(tmp_path / "x.jsonl", {"messages": [USER, ANSWER]})
    chat(str(source), f"{folder}/t.model", f"{tmp_path}/out", workers=1)
    dataset, model = IndexedDataset(tmp_path / "out"), load_tokenizer(folder / "t.model")
    assert stored(tmp_path / "out", model) == [["<|user|>\nadd 1 2\n<|assistant|>\n", "3 é😀</s>", "\n"]]
    plain = ["<|user|>\nadd 1 2\n<|assistant|>\n3 é😀", "\n"]
    assert dataset.tokens.tolist() == [*model.encode(plain[0]), model.eos_id, *model.encode(plain[1])]
    assert dataset[1].tolist()[-5:] == [*(5 + byte for byte in "😀".encode()), 3]  # the bytes of what no piece covers


ENDS = {  # what is written after a turn, and which of it ends an answer, with every --loss
    "<|im_end|>\n": ["<|im_end|>"],
    "{{ '<|im_end|>' if message.content == '3' else '<|im_start|>' }}": ["<|im_end|>", "<|im_start|>"],
    "{{ eos_token }}": ["<|endoftext|>"],
    "\n\n### ": [],
}


@pytest.mark.parametrize("after", ENDS)
def test_the_card_says_what_ends_an_answer(tmp_path, after, capsys):
    turn = "{{ message.role + ': ' + message.content }}" + after
    asked = "{% if add_generation_prompt %}assistant: {% endif %}"
    template = "{% for message in messages %}" + turn + "{% endfor %}" + asked
    write_json_tokenizer(tmp_path / "hf", template, eos="<|endoftext|>")
    special, source = load_tokenizer(tmp_path / "hf").special, write(tmp_path / "x.jsonl", {"messages": TURNS})
    for loss in ("completions", "last", "all"):
        chat(str(source), f"{tmp_path}/hf", f"{tmp_path}/{loss}", workers=1, loss=loss)
        wanted = ENDS[after] if loss == "completions" else ENDS[after][:1]
        card = read_card(tmp_path / loss)
        assert card.get("ends", []) == sorted(special[text] for text in wanted)
        assert ("no answer ends with a token of its own" in capsys.readouterr().out) == (not wanted)


def test_of_cut_and_of_plain_answers_too(tmp_path):
    write_json_tokenizer(tmp_path / "hf", eos="<|endoftext|>")
    special = load_tokenizer(tmp_path / "hf").special
    source = write(tmp_path / "x.jsonl", {"messages": TURNS})
    chat(str(source), f"{tmp_path}/hf", f"{tmp_path}/cut", workers=1, max_document_tokens=45)
    assert read_card(tmp_path / "cut")["ends"] == [special["<|im_end|>"]]
    write(source, {"prompt": "1+1=", "completion": "2"})
    chat(str(source), f"{tmp_path}/hf", f"{tmp_path}/plain", workers=1)
    assert read_card(tmp_path / "plain")["ends"] == [special["<|endoftext|>"]]


@pytest.mark.parametrize(("loss", "wanted"), [("last", ["3<|im_end|>"]), ("all", ["<|im_start|>"])])
def test_what_is_trained_on_is_a_flag(tmp_path, folder, loss, wanted):
    source = write(tmp_path / "x.jsonl", {"messages": TURNS})
    for name in ("hf", "unmarked"):
        chat(str(source), str(folder / name), f"{tmp_path}/{name}", workers=1, loss=loss)
        (found,) = stored(tmp_path / name, load_tokenizer(folder / name))
        assert found[1::2] == wanted if loss == "last" else (found[0] == wanted[0] and len(found) == 2)


@pytest.mark.parametrize("loss", ["completions", "last", "all"])
def test_what_the_data_holds_back_is_not_trained_on(tmp_path, folder, loss):
    held = {**ANSWER, "weight": 0}
    lines = [
        {"messages": [USER, held, {"role": "user", "content": "again"}, {"role": "assistant", "content": "3"}]},
        {"prompt": [USER, ANSWER, USER], "completion": [{"role": "assistant", "content": "yes"}]},
        {"messages": [USER, {**ANSWER, "train": False}]},
    ]
    source = write(tmp_path / "x.jsonl", *lines)
    for name in ("hf", "unmarked"):
        chat(str(source), str(folder / name), f"{tmp_path}/{name}", workers=1, loss=loss)
        found = [conversation[1::2] for conversation in stored(tmp_path / name, load_tokenizer(folder / name))]
        if loss == "all":
            assert len(found) == 3 and "3 é😀" not in "".join(found[0] + found[2]) and "3 é😀" in found[1][0]
        else:
            assert found == [["3<|im_end|>"], ["yes<|im_end|>"]]


def test_keys_without_a_use_are_said_once(tmp_path, folder, capsys):
    answer = {**ANSWER, "name": "x"}
    line = {"messages": [USER, answer, USER, answer], "id": 7, "tools": [ADD], "chat_template_kwargs": {"k": 1}}
    source = write(tmp_path / "x.jsonl", line, line, {**line, "id": None}, {"prompt": "x", "completion": "y", "id": 3})
    chat(str(source), str(folder / "hf"), f"{tmp_path}/out", workers=1)
    said = r"ignored keys, .*: (?=.*\bid \(3\))(?=.*tools \(3\))(?=.*messages.name \(3\))"
    assert re.search(said + r"(?=.*chat_template_kwargs.k \(3\)).*\n\Z", capsys.readouterr().out)


def test_a_template_that_rewrites_earlier_turns_needs_marks_or_the_last_turn(tmp_path, folder):
    rewriting = "{% for m in messages %}{{ m.content if loop.last else 'old' }}{% endfor %}"
    write(tmp_path / "t.jinja", rewriting)
    source = write(tmp_path / "x.jsonl", {"messages": TURNS})
    flags = {"template": f"{tmp_path}/t.jinja", "workers": 1}
    with pytest.raises(DataError, match=r"x\.jsonl:1: the template rewrites message 3, .*--loss=last"):
        chat(str(source), str(folder / "hf"), f"{tmp_path}/out", **flags)


@pytest.mark.parametrize(("policy", "lengths"), [("truncate", [12, 9]), ("drop", [9])])
def test_what_is_too_long_is_counted(tmp_path, folder, capsys, policy, lengths):
    lines = [{"prompt": "p" * 4, "completion": "c" * 40}, {"prompt": "p" * 4, "completion": "c" * 4}]
    hidden = {"prompt": "p" * 40, "completion": "c"}  # cut before anything to train on
    source = write(tmp_path / "x.jsonl", *lines, hidden)
    chat(str(source), str(folder / "hf"), f"{tmp_path}/out", workers=1, max_document_tokens=12, long_documents=policy)
    dataset = IndexedDataset(tmp_path / "out")
    whole = [len(load_tokenizer(folder / "hf").encode(line["prompt"] + " " + line["completion"])) for line in lines]
    assert [len(dataset) // 2, whole[0] > 12 > whole[1]] == [len(lengths), True]
    card, out = read_card(tmp_path / "out"), capsys.readouterr().out
    assert card["long"] == 2 and card["without_target"] == (1 if policy == "truncate" else 0)
    said = "truncated to" if policy == "truncate" else "left out, longer than"
    assert f"2 conversations {said} 12 tokens: {card['lost_tokens']:,} tokens lost" in out


def test_bad_lines_are_named_or_set_aside(tmp_path, folder):
    good = {"messages": [USER, ANSWER]}
    bad = ["{", {"messages": [{"role": "user"}]}, {"messages": [{"role": "user", "content": "\ud800"}, ANSWER]}]
    marked = {"messages": [USER, {"role": "assistant", "content": "\ufdd1"}]}
    source = write(tmp_path / "x.jsonl", good, *bad, marked, good)
    arguments = (f"--input={source}", f"--tokenizer={folder}/hf", f"--out={tmp_path}/out")
    data_tools("chat", *arguments).expect(3, stderr=r"\Aerror: .*x\.jsonl:2: invalid JSON at column 3: .+\n\Z")
    assert not list(tmp_path.glob("out*"))
    chat(str(source), f"{folder}/hf", f"{tmp_path}/out", workers=1, on_error="skip", max_bad="4")
    rejects = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").read_text().splitlines()]
    assert [(reject["line"], reject["error"][:20]) for reject in rejects] == [
        (2, "invalid JSON at colu"),
        (3, 'message 1: "content"'),
        (4, "lone surrogate \\ud80"),
        (5, "it holds U+FDD1 or U"),
    ]
    assert IndexedDataset(tmp_path / "out").num_documents == 2


def test_gzip_parquet_and_several_workers_give_the_same(tmp_path, folder, monkeypatch):
    lines = [
        {"messages": [{"role": "user", "content": f"add {i}"}, {**ANSWER, "name": "x"} if i % 2 else ANSWER], "id": i}
        for i in range(40)
    ]
    source = write(tmp_path / "x.jsonl", *lines)
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(source.read_bytes()))
    chat(str(source), f"{folder}/hf", f"{tmp_path}/one", workers=1)
    chat(f"{source}.gz", f"{folder}/hf", f"{tmp_path}/gzip", workers=1)
    monkeypatch.setattr(building, "_UNIT_BYTES", 1500)
    chat(str(source), f"{folder}/hf", f"{tmp_path}/two", workers=2)
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (the parquet extra)")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(lines), tmp_path / "x.parquet")
    chat(f"{tmp_path}/x.parquet", f"{folder}/hf", f"{tmp_path}/parquet", workers=1)
    dated = pyarrow.Table.from_pylist([{**line, "at": datetime(2026, 1, 2)} for line in lines])
    pytest.importorskip("pyarrow.parquet").write_table(dated, tmp_path / "y.parquet")
    chat(f"{tmp_path}/y.parquet", f"{folder}/hf", f"{tmp_path}/dated", workers=1)
    for name in ("gzip", "two", "parquet", "dated"):
        assert dataset_bytes(tmp_path / name) == dataset_bytes(tmp_path / "one")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"format": "mesages"}, r"--format=mesages: expected auto, messages, .* \(did you mean 'messages'\?\)"),
        ({"loss": "none"}, "--loss=none: expected completions, last, all"),
        ({"long_documents": "split"}, "--long_documents=split: expected truncate, drop"),
        ({"template": "none.jinja"}, "--template=none.jinja: no such file"),
        ({"date": "1 May"}, "--date=1 May: expected YYYY-MM-DD"),
    ],
)
def test_a_wrong_flag_is_named(tmp_path, folder, flags, message):
    with pytest.raises(ConfigError, match=message):
        chat("x.jsonl", f"{folder}/hf", f"{tmp_path}/out", **flags)


def test_inspect_shows_what_is_trained_on(tmp_path, folder, capsys):
    source = write(tmp_path / "x.jsonl", {"messages": [USER, ANSWER]})
    chat(str(source), f"{folder}/hf", f"{tmp_path}/out", workers=1)
    capsys.readouterr()
    inspect(f"{tmp_path}/out")
    assert "<|im_start|>assistant\n⟦3 é😀<|im_end|>⟧\n" in capsys.readouterr().out
    shown = run_on_terminal([PYTHON, "-m", "data_tools", "inspect", f"{tmp_path}/out"], [], timeout=60).expect(0)
    assert re.search("\x1b\\[1;32m3 é😀<\\|im_end\\|>\x1b\\[0m", shown.stdout.replace("\r", ""))


def test_the_standard_library_answers_with_its_docstrings(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "lib"))
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "a.py").write_text('def f(x):\n    """Double\n    it."""\n    return 2 * x\n\ndef g(): pass\n')
    corpus("python-stdlib-instructions", f"{tmp_path}/out")
    (line,) = map(json.loads, next((tmp_path / "out").iterdir()).read_text().splitlines())
    question = "Write the docstring of this function.\n\ndef f(x):\n    return 2 * x"
    assert [m["content"] for m in line["messages"]] == [question, "Double\nit."]
    assert (line["path"], line["license"]) == ("a.py:1", "PSF-2.0")
    chat(f"{tmp_path}/out", f"{folder}/t.model", f"{tmp_path}/data", workers=1)
    assert np.array_equal(IndexedDataset(tmp_path / "data").documents, [0, 3])


SEAMS = [
    ("the cat ", "sat on"),
    ("the cat", " sat on"),
    ("the cat", "sat"),
    ("a\n", "mat"),
    ("the  cat ", " sat"),
]
FAST = {"fast": fast_folder, "metaspace": lambda path: fast_folder(path, "metaspace"), "slow": slow_folder}


@pytest.mark.parametrize("name", [*FAST, "legacy", "own", "own with a space"])
def test_a_space_between_prompt_and_completion_is_one_space(tmp_path, folder, name):
    where = tmp_path / "t"
    if name in FAST:
        FAST[name](where)
    elif name == "legacy":
        slow_folder(where, legacy=True)
    else:
        where = tmp_path / "t.model"
        identity = (("normalization_rule_name", "identity"), ("remove_extra_whitespaces", False))
        content = (folder / "t.model").read_bytes() if name == "own" else sentencepiece("bpe", *identity)
        where.write_bytes(content)
    source = write(tmp_path / "x.jsonl", *({"prompt": a, "completion": b} for a, b in SEAMS))
    chat(str(source), str(where), f"{tmp_path}/out", workers=1)
    model, dataset = load_tokenizer(where), IndexedDataset(tmp_path / "out")
    for i, (prompt, completion) in enumerate(SEAMS):
        first, last = dataset.documents[i], dataset.documents[i + 1]
        tokens = [dataset[j].tolist() for j in range(first, last)]
        flat = [token for some in tokens for token in some]
        assert model.decode(flat) == prompt + completion
        assert flat[-1] == model.eos_id and flat.count(model.eos_id) == 1
        # What is trained on is the completion, and what of the prompt is in its first token.
        assert prompt.startswith(model.decode(tokens[0]))


def test_bos_begins_texts_and_is_left_to_templates(tmp_path):
    where = slow_folder(tmp_path / "t", add_bos_token=True, chat_template="{{ bos_token }}" + CHATML)
    source = write(
        *(tmp_path / "x.jsonl", {"messages": [USER, ANSWER]}, {"prompt": "a", "completion": " cat"}),
        {"prompt": "<s>a", "completion": " cat<|im_end|>"},
    )
    model = load_tokenizer(where)

    def begins(**flags):
        chat(str(source), str(where), f"{tmp_path}/out", workers=1, **flags)
        dataset = IndexedDataset(tmp_path / "out")
        documents = [
            [token for j in range(*dataset.documents[i : i + 2]) for token in dataset[j].tolist()] for i in range(3)
        ]
        assert all(tokens.count(model.eos_id) == (2, 1, 1)[i] for i, tokens in enumerate(documents))
        return [tokens[: tokens.count(model.bos_id) + 1].count(model.bos_id) for tokens in documents]

    assert begins() == begins(add_bos=True) == [1, 1, 1]
    assert begins(add_bos=False) == [1, 0, 1]
    slow_folder(where, add_bos_token=True, chat_template=CHATML)
    assert begins() == [0, 1, 1]  # as transformers has it
    assert begins(add_bos=True) == [1, 1, 1]
