"""Empty files and documents are counted, and a dataset of nothing is an error."""

import gzip
import json

import pytest

from data_tools.tokenize import tokenize
from megatron_lite.data.indexed import IndexedDataset, read_card
from tests.kit.corpora import data_tools, write_tokenizer


@pytest.fixture
def model(tmp_path):
    return write_tokenizer(tmp_path / "t.model")


@pytest.mark.parametrize(
    ("name", "content", "empty"),
    [
        ("x.jsonl", b"", 0),
        ("x.jsonl", b"\n\n \t\n", 3),
        ("x.jsonl", b'{"text": ""}\n{"text": " \\n\\t "}\n', 2),
        ("x.jsonl", b"\xef\xbb\xbf", 1),
        ("x.jsonl.gz", gzip.compress(b"", mtime=0), 0),
        ("x.txt", b"", 1),
        ("x.txt", b" \n", 1),
    ],
)
def test_nothing_at_all_is_an_error(tmp_path, model, name, content, empty):
    (tmp_path / name).write_bytes(content)
    result = data_tools("tokenize", f"--input={tmp_path / name}", f"--tokenizer={model}", f"--out={tmp_path}/out")
    result.expect(exit_code=3, stderr=rf"^error: no documents in \d lines? of 1 file \({empty} empty\)\n$")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "t.model"])


def test_empty_documents_are_counted_and_left_out(tmp_path, model):
    texts = ["one", "", "two", " ", "\n\n", "three"]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "", ""]))
    (tmp_path / "b.jsonl").write_text("")
    tokenize(f"{tmp_path}/*.jsonl", str(model), f"{tmp_path}/out", workers=1)
    card = read_card(tmp_path / "out")
    assert card is not None
    assert (card["lines"], card["documents"], card["empty"]) == (7, 3, 4)
    assert [source["size"] for source in card["sources"]] == [len("\n".join(lines)) + 2, 0]
    assert IndexedDataset(tmp_path / "out").num_documents == 3


def test_an_empty_dataset_can_be_inspected(tmp_path):
    from megatron_lite.data.indexed import IndexedWriter

    with IndexedWriter(tmp_path / "x", "uint16"):
        pass
    data_tools("inspect", tmp_path / "x").expect(exit_code=0, stdout=r"documents +0")
