"""Files of requests: what a line may be, and every line that is none named at once."""

import json
import math

import pytest

from megatron_lite.__main__ import generate as command
from megatron_lite.errors import ConfigError, DataError
from megatron_lite.inference.requests import Answer, Request, Sampling, read_requests

TURNS = [{"role": "user", "content": "hi"}]


def test_what_a_line_may_be(tmp_path):
    lines = [
        b'\xef\xbb\xbf{"prompt": "a"}\r',
        b"",
        '{"prompt": "one\u2028line", "id": "x", "adapter": null, "top_p": 1}'.encode(),
        b" \t",
        json.dumps({"messages": TURNS, "adapter": "lora", "id": 3, "temperature": 1, "top_k": 10**30}).encode(),
        b'{"prompt": "", "temperature": 1e-320, "max_new_tokens": 5, "seed": 7}',
    ]
    (tmp_path / "r.jsonl").write_bytes(b"\n".join(lines))
    assert read_requests(tmp_path / "r.jsonl", ["lora"]) == [
        Request("a", line=1),
        Request("one\u2028line", own={"top_p": 1.0}, line=3, id="x"),
        Request(TURNS, "lora", {"temperature": 1.0, "top_k": 10**30}, line=5, id=3),
        Request("", own={"temperature": 1e-320, "max_new_tokens": 5, "seed": 7}, line=6),
    ]


WRONG = {
    "{": "Expecting",
    "[" * 9999: "recursion",
    "3": "expected an object with prompt or messages",
    "{}": "expected an object with prompt or messages",
    '{"prompt": 3}': "prompt and adapter must be strings",
    '{"text": "x"}': "expected an object with prompt, .*; 'text' is unknown",
    '{"promt": "x"}': r"'promt' is unknown \(did you mean 'prompt'\?\)",
    '{"prompt": "x", "prompt": "y"}': "duplicate key",
    '{"prompt": "x", "messages": [{"role": "user", "content": "x"}]}': "and not both",
    '{"messages": []}': "messages must be a list of objects with role and content",
    '{"messages": [{"role": "user", "content": null}]}': 'message 1: "content" is missing or null',
    '{"prompt": "x", "adapter": "loro"}': r"no adapter 'loro' \(did you mean 'lora'\?\)",
    '{"prompt": "x", "id": [1]}': "id must be a string or a whole number",
    '{"prompt": "x", "top_k": 1.5}': r"top_k must be a whole number, not 1\.5",
    '{"prompt": "x", "temperature": "1"}': "temperature must be a number, not '1'",
    '{"prompt": "x", "max_new_tokens": true}': "max_new_tokens must be a whole number, not True",
    '{"prompt": "x", "temperature": NaN, "top_k": -1}': "temperature=nan: must be 0 .*; top_k=-1: must be",
    '{"prompt": "x", "temperature": 1' + "0" * 400 + "}": "temperature=inf: must be",
    '{"prompt": "x", "max_new_tokens": 0}': "max_new_tokens=0: must be at least 1",
    '{"prompt": "x", "seed": -1}': "seed=-1: must be from 0",
}


def test_all_lines_that_are_no_requests_are_named(tmp_path):
    (tmp_path / "r.jsonl").write_text("\n".join(['{"prompt": "a"}', *WRONG, *["3"] * 4]) + "\n")
    with pytest.raises(DataError) as caught:
        read_requests(tmp_path / "r.jsonl", ["lora"])
    told = str(caught.value).splitlines()
    for number, (line, problem) in enumerate(WRONG.items(), 2):
        with pytest.raises(DataError, match=rf"r\.jsonl:{number}: .*{problem}"):
            raise DataError(told[number - 2])
        assert len(told[number - 2]) < 400, line
    assert told[20:] == ["and 4 lines more"]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (["hi"], "messages must be a list of objects"),
        ([{"role": "User", "content": "hi"}], "message 1: \"role\" is 'User'"),
        ([*TURNS, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}], 'message 2: "arguments"'),
    ],
)
def test_messages_are_checked_as_those_of_training(tmp_path, messages, problem):
    (tmp_path / "r.jsonl").write_text(json.dumps({"messages": messages}))
    with pytest.raises(DataError, match=rf"r\.jsonl:1: {problem}"):
        read_requests(tmp_path / "r.jsonl")


def test_bytes_that_are_no_text_and_files_without_requests(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(b'\n{"prompt": "\xff"}')
    with pytest.raises(DataError, match=r"r\.jsonl:2: 'utf-8' codec"):
        read_requests(tmp_path / "r.jsonl")
    (tmp_path / "r.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"r\.jsonl holds no requests"):
        read_requests(tmp_path / "r.jsonl")
    with pytest.raises(DataError, match=r"cannot read \S+none\.jsonl: No such file"):
        read_requests(tmp_path / "none.jsonl")


def test_an_answer_is_one_line():
    answer = Answer("lora", "a", "x\u2028\n\x85é", 3, "stop")
    line = answer.to_json(4, Request("a", line=6, id="x"))
    assert len(line.splitlines()) == 1
    told = {"adapter": "lora", "text": "x\u2028\n\x85é", "num_tokens": 3, "finish_reason": "stop"}
    assert json.loads(line) == {"index": 4, "line": 6, "id": "x", **told}
    assert json.loads(Answer(error="no").to_json(0, Request("a", line=1))) == {"index": 0, "line": 1, "error": "no"}


def test_numbers_that_make_no_sense_are_all_named():
    with pytest.raises(ConfigError) as caught:
        Sampling(max_new_tokens=0, temperature=float("nan"), top_k=-1, top_p=0, seed=1 << 64).check()
    told = str(caught.value)
    assert told.count("\n") == 4
    for flag in ("--max_new_tokens=0", "--temperature=nan", "--top_k=-1", "--top_p=0", "--seed=18446744073709551616"):
        assert flag in told


def test_mistaken_flags_are_all_named_before_anything_is_read():
    with pytest.raises(ConfigError) as caught:
        command(
            "none", prompt="x", requests="none", temperature=math.inf, top_k=-1, adapters="a=x,a=y", base_dtype="nf5"
        )
    told = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in told] == [
        "--temperature=inf",
        "--top_k=-1",
        "--base_dtype=nf5 (did you mean 'nf4'?)",
        "--prompt",
        "--adapters=a=x,a=y",
    ]
