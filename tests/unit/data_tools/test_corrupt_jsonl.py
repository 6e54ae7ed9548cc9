"""Every kind of corrupt jsonl line is found, named by file and line, and stops the work or is set aside."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.documents import parse
from data_tools.tokenize import tokenize
from megatron_lite.data.indexed import read_card
from megatron_lite.errors import DataError
from tests.kit.corpora import data_tools, dataset_bytes, documents, write_jsonl, write_tokenizer

REFUSED = {
    b'{"text": "cut': "invalid JSON at column 10: Unterminated string",
    b'{"text": "caf\xe9"}': "invalid UTF-8 at byte 14",
    b'\xff\xfe{\x00"\x00': "invalid UTF-8 at byte 1",  # UTF-16
    b'\xef\xbb\xbf{"text": "x"}': "a byte order mark that is not at the start of the file",
    b"[]": "expected an object, not a list",
    b'"text"': "expected an object, not a string",
    b"null": "expected an object, not null",
    b"{}": 'no key "text" (--text_key); its keys are: none',
    b'{"txt": "x", "id": 1}': 'no key "text" (--text_key); its keys are: "txt", "id"',
    b'{"text": null}': '"text" is null, expected a string',
    b'{"text": 7}': '"text" is a number, expected a string',
    b'{"text": true}': '"text" is a boolean, expected a string',
    b'{"text": ["x"]}': '"text" is a list, expected a string',
    b'{"text": {"text": "x"}}': '"text" is an object, expected a string',
    b'{"text": NaN}': "NaN is not JSON",
    b'{"text": "x", "score": -Infinity}': "-Infinity is not JSON",
    b'{"text": "x", "text": "y"}': 'duplicate key "text"',
    b'{"text": "x", "meta": {"a": 1, "a": 2}}': 'duplicate key "a"',
    b'{"text": "a\\ud800b"}': "lone surrogate \\ud800 at character 2 of the text",
    b'{"text": "a\x00b"}': "invalid JSON at column 12: Invalid control character",
    b'{"text": "a\tb"}': "invalid JSON at column 12: Invalid control character",
    b'{"text": "x"} {"text": "y"}': "invalid JSON at column 15: Extra data",
    b"{'text': 'x'}": "invalid JSON at column 2: Expecting property name",
    b"[" * 100_000: "nested too deeply",
    b'{"text": "x", "n": ' + b"9" * 5000 + b"}": "4300",
}
ACCEPTED = {
    b'{"text": "x"}\r': "x",
    b'  {"text":"x"}  ': "x",
    b'{"text": "a\\u0000b"}': "a\0b",
    b'{"text": "\\ud83d\\ude00"}': "\U0001f600",
    '{"text": "a\u2028b\u0085c"}'.encode(): "a\u2028b\u0085c",
    b'{"text": "x", "score": 1e999, "lone": "\\udc00"}': "x",
    b"": "",
    b" \t ": "",
}


@pytest.mark.parametrize(("line", "reason"), REFUSED.items(), ids=[line[:24] for line in REFUSED])
def test_a_corrupt_line_is_refused_with_its_reason(line, reason):
    with pytest.raises(ValueError) as caught:
        parse(line)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("line", "text"), ACCEPTED.items(), ids=[line[:24] for line in ACCEPTED])
def test_an_odd_but_valid_line_is_read(line, text):
    assert parse(line) == text


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t.model")


def test_the_default_is_to_stop_at_the_first_bad_line(tmp_path, model):
    lines = [json.dumps({"text": text}).encode() for text in documents(1500)]
    lines[1233] = b'{"text": "0123456\xff"}'
    lines[1300] = b"[]"
    (tmp_path / "file.jsonl").write_bytes(b"\n".join(lines))
    result = data_tools("tokenize", f"--input={tmp_path}/file.jsonl", f"--tokenizer={model}", f"--out={tmp_path}/out")
    result.expect(exit_code=3, stderr=r"^error: .*file\.jsonl:1234: invalid UTF-8 at byte 18\n$")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.jsonl"]


@given(corruptions=st.dictionaries(st.integers(0, 59), st.sampled_from(list(REFUSED)), max_size=8), data=st.data())
@settings(max_examples=25, deadline=None)
def test_skipping_gives_the_clean_file_minus_the_rejects(tmp_path_factory, model, corruptions, data):
    folder = tmp_path_factory.mktemp("skip")
    split = data.draw(st.integers(0, 60))
    for start in {0, split} & set(corruptions):
        if corruptions[start].startswith(b"\xef\xbb\xbf"):
            del corruptions[start]  # at the start of a file the mark is welcome
    lines = [json.dumps({"text": text}).encode() for text in documents(60)]
    for i in corruptions:
        lines[i] = corruptions[i]
    for name, part in (("a", lines[:split]), ("b", lines[split:])):
        (folder / f"{name}.jsonl").write_bytes(b"".join(line + b"\n" for line in part))
    clean = [line for i, line in enumerate(lines) if i not in corruptions]
    (folder / "clean").mkdir()
    (folder / "clean" / "c.jsonl").write_bytes(b"\n".join(clean))

    tokenize(f"{folder}/?.jsonl", str(model), f"{folder}/out", workers=1, on_error="skip", max_bad="100")
    tokenize(f"{folder}/clean", str(model), f"{folder}/wanted", workers=1)

    assert dataset_bytes(folder / "out") == dataset_bytes(folder / "wanted")
    card = read_card(folder / "out")
    assert card is not None
    assert (card["lines"], card["rejected"], card["documents"]) == (60, len(corruptions), 60 - len(corruptions))
    rejects = folder / "out.rejects.jsonl"
    found = [json.loads(line) for line in rejects.read_text().splitlines()] if corruptions else []
    assert [(Path(r["file"]).name, r["line"]) for r in found] == [
        ("a.jsonl", i + 1) if i < split else ("b.jsonl", i + 1 - split) for i in sorted(corruptions)
    ]
    assert rejects.exists() == bool(corruptions)


@pytest.mark.parametrize(
    ("max_bad", "passes"), [("2", True), ("1", False), ("2%", True), ("1.9%", False), ("0", False)]
)
def test_more_bad_lines_than_allowed_fail(tmp_path, model, max_bad, passes):
    path = write_jsonl(tmp_path / "x.jsonl", documents(98))
    path.write_bytes(path.read_bytes() + b"[]\n{}\n")
    arguments = (str(path), str(model), f"{tmp_path}/out")
    if passes:
        tokenize(*arguments, workers=1, on_error="skip", max_bad=max_bad)
        return
    with pytest.raises(DataError, match=rf"2 of 100 lines \(2\.00%\) were refused, more than --max_bad={max_bad}"):
        tokenize(*arguments, workers=1, on_error="skip", max_bad=max_bad)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.rejects.jsonl", "x.jsonl"]


def test_parquet_and_text_are_checked_as_well(tmp_path, model):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed (the parquet extra)")
    import pyarrow.parquet as pq

    values = pa.array([b"fine", b"caf\xe9", None, b"also fine"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": values}), tmp_path / "x.parquet", row_group_size=2)
    (tmp_path / "y.txt").write_bytes(b"one\ntwo \xff three")
    tokenize(str(tmp_path), str(model), f"{tmp_path}/out", workers=1, on_error="skip", max_bad="50%", append_eos=False)
    found = [json.loads(line) for line in (tmp_path / "out.rejects.jsonl").read_text().splitlines()]
    assert [(Path(r["file"]).name, r["line"], r["error"]) for r in found] == [
        ("x.parquet", 2, "invalid UTF-8 at byte 4"),
        ("x.parquet", 3, '"text" is null, expected a string'),
        ("y.txt", 2, "invalid UTF-8 at byte 5"),
    ]


def test_a_cut_off_gzip_file_is_refused(tmp_path, model):
    import gzip

    whole = gzip.compress(write_jsonl(tmp_path / "x.jsonl", documents(2000)).read_bytes())
    (tmp_path / "y.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"y\.jsonl\.gz: damaged gzip file: Compressed file ended"):
        tokenize(f"{tmp_path}/y.jsonl.gz", str(model), f"{tmp_path}/out", workers=1, on_error="skip")
    assert not list(tmp_path.glob("out*"))
