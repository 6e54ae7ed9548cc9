"""The corpus command: every document with its origin, whatever the source, in the same order each time."""

import gzip
import json
import sysconfig
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.corpus import Text, corpus, standard_library, texts
from megatron_lite.errors import ConfigError, DataError
from tests.kit.corpora import write_jsonl

TEXT = st.text().filter(lambda text: text and not text.isspace())


def shards(folder: Path) -> list[list[dict]]:
    paths = sorted(folder.iterdir())
    return [[json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]] for path in paths]


def test_the_standard_library_comes_whole_and_in_order():
    documents = list(standard_library())
    paths = [document.path for document in documents]
    assert paths == sorted(paths, key=lambda path: PurePosixPath(path).parts)
    assert len(paths) == len(set(paths)) > 500
    assert not [path for path in paths if path.startswith(("site-packages/", "dist-packages/"))]
    (found,) = [document for document in documents if document.path == "json/decoder.py"]
    assert found.text == Path(json.decoder.__file__).read_bytes().decode()
    assert documents == list(standard_library())


def test_a_file_is_decoded_as_its_coding_line_says(tmp_path, monkeypatch):
    files = {
        "latin.py": b"# -*- coding: latin-1 -*-\n'\xe9'\n",
        "mark.py": b"\xef\xbb\xbfx = 1\n",
        "crlf.py": b"x = 1\r\n",
        "unknown.py": b"# -*- coding: klingon -*-\n",
        "wrong.py": b"x = '\xe9'\n",
        "surrogate.py": b"# coding: utf-7\n# +2AA-\n",
        "empty.py": b"",
        "blank.py": b"\n \n",
        "data.txt": b"not Python",
        "site-packages/other.py": b"x = 1\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert list(standard_library()) == [
        Text("x = 1\r\n", "crlf.py"),
        Text("# -*- coding: latin-1 -*-\n'é'\n", "latin.py"),
        Text("x = 1\n", "mark.py"),
    ]


def test_the_command_deals_the_documents_out_with_path_and_licence(tmp_path, monkeypatch, capsys):
    (tmp_path / "lib").mkdir()
    for i in range(5):
        (tmp_path / "lib" / f"m{i}.py").write_text(f"x = {i}\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "lib"))
    for _ in range(2):  # the second replaces the first
        corpus("python-stdlib", f"{tmp_path}/out/", shards=2)
        assert capsys.readouterr().out == f"5 documents, 30 characters in 2 shards: {tmp_path}/out\n"
    names = [f"python-stdlib-0000{i}-of-00002.jsonl" for i in range(2)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    lines = [{"text": f"x = {i}\n", "path": f"m{i}.py", "license": "PSF-2.0"} for i in range(5)]
    assert shards(tmp_path / "out") == [lines[0::2], lines[1::2]]


def test_every_kind_of_source_gives_the_same_documents(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed (the parquet extra)")
    import pyarrow.parquet as pq

    wanted = ["one\n", "zwei \u2028 \0", "三 \U0001f600"]
    for name in ("text", "jsonl", "gz", "parquet"):
        (tmp_path / name).mkdir()
    for i, text in enumerate(wanted):
        (tmp_path / "text" / f"{i}.md").write_bytes(text.encode())
    (tmp_path / "text" / "3.txt").write_bytes(b" \n")  # empty: left out
    plain = write_jsonl(tmp_path / "jsonl" / "x.jsonl", [*wanted, " "]).read_bytes()
    (tmp_path / "gz" / "x.jsonl.gz").write_bytes(gzip.compress(plain))
    pq.write_table(pa.table({"text": [*wanted, ""]}), tmp_path / "parquet" / "x.parquet", row_group_size=2)
    paths = {
        "text": [f"{i}.md" for i in range(3)],
        "jsonl": [f"x.jsonl:{i}" for i in (1, 2, 3)],
        "gz": [f"x.jsonl.gz:{i}" for i in (1, 2, 3)],
        "parquet": [f"x.parquet:{i}" for i in (1, 2, 3)],
    }
    for name, places in paths.items():
        assert list(texts(str(tmp_path / name))) == [
            Text(text, f"{tmp_path}/{name}/{place}") for text, place in zip(wanted, places, strict=True)
        ]
        corpus(str(tmp_path / name), f"{tmp_path}/out", license="CC0-1.0")
        ((*lines,),) = shards(tmp_path / "out")
        assert [line["text"] for line in lines] == wanted
        assert {line["license"] for line in lines} == {"CC0-1.0"}


@given(documents=st.lists(TEXT, min_size=1, max_size=8), shards=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_any_text_comes_back_from_the_shards(tmp_path_factory, documents, shards):
    folder = tmp_path_factory.mktemp("corpus")
    source = write_jsonl(folder / "x.jsonl", documents)
    corpus(str(source), f"{folder}/out", shards=shards)
    found = list(texts(f"{folder}/out"))
    assert [text.text for text in found] == [text for s in range(shards) for text in documents[s::shards]]


def test_a_failure_keeps_the_older_corpus_and_leaves_nothing_else(tmp_path):
    source = write_jsonl(tmp_path / "x.jsonl", ["fine"])
    corpus(str(source), f"{tmp_path}/out")
    before = shards(tmp_path / "out")
    source.write_text('{"text": "new"}\n[]\n')
    with pytest.raises(DataError, match=r"x\.jsonl:2: expected an object, not a list"):
        corpus(str(source), f"{tmp_path}/out")
    assert shards(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "x.jsonl"]


def test_a_folder_of_other_files_is_not_replaced(tmp_path):
    source = write_jsonl(tmp_path / "x.jsonl", ["fine"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="a folder of other files"):
        corpus(str(source), f"{tmp_path}/out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
