"""A huge document passes within bounded memory; long documents are cut as asked; tiny ones are kept."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_tools.encode import cut
from data_tools.tokenize import tokenize
from megatron_lite.data.indexed import IndexedDataset, read_card
from megatron_lite.data.tokenizer import load_tokenizer
from tests.kit.corpora import documents, write_jsonl, write_tokenizer

LIMITED = """
import resource, sys
from data_tools.tokenize import tokenize
limit = int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
tokenize(sys.argv[1], sys.argv[2], sys.argv[3], workers=1, on_error="skip", max_bad="1")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.fixture
def model(tmp_path):
    return write_tokenizer(tmp_path / "t.model", "unigram")


@pytest.mark.parametrize(("megabytes", "limit"), [(8, 512), pytest.param(50, 1024, marks=pytest.mark.slow)])
def test_a_huge_line_passes_within_bounded_memory(tmp_path, model, megabytes, limit):
    text = "\n".join(documents(40)) + "\n"
    with (tmp_path / "x.jsonl").open("w") as file:
        huge = text * (megabytes * 1_000_000 // len(text))
        file.write(json.dumps({"text": huge}) + "\n" + json.dumps({"text": "next"}) + "\n")
        for _ in range(200):  # a line above --max_line_bytes is never held in memory
            file.write("x" * 1_000_000)
        file.write("\n" + json.dumps({"text": "last"}) + "\n")
    arguments = [tmp_path / "x.jsonl", model, tmp_path / "out", limit << 20]
    done = subprocess.run([sys.executable, "-c", LIMITED, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    dataset = IndexedDataset(tmp_path / "out")
    assert dataset.num_documents == 3
    assert dataset.lengths[0] > megabytes * 200_000
    once = load_tokenizer(model).encode(text)
    assert dataset[0][: 5 * len(once)].tolist() == once * 5
    (reject,) = map(json.loads, Path(f"{tmp_path}/out.rejects.jsonl").read_text().splitlines())
    assert (reject["line"], reject["error"]) == (3, "longer than 134217728 bytes (--max_line_bytes)")


def test_memory_does_not_grow_with_the_input(tmp_path, model):
    peaks = []
    for count in (4, 24):
        with (tmp_path / "x.jsonl").open("w") as file:
            for _ in range(count):
                file.writelines(json.dumps({"text": text * 20}) + "\n" for text in documents(200))
        arguments = [tmp_path / "x.jsonl", model, tmp_path / "out", 1 << 30]
        done = subprocess.run([sys.executable, "-c", LIMITED, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        peaks.append(int(done.stdout.splitlines()[-1]))
    assert peaks[1] < peaks[0] + 20_000  # kB; the second input is six times the first


@pytest.mark.parametrize("long_documents", ["split", "truncate"])
def test_long_documents_are_cut_as_asked(tmp_path, model, long_documents):
    texts = documents(30)
    write_jsonl(tmp_path / "x.jsonl", texts)
    arguments = (f"{tmp_path}/x.jsonl", str(model), f"{tmp_path}/out")
    tokenize(*arguments, workers=1, max_document_tokens=10, long_documents=long_documents)
    dataset = IndexedDataset(tmp_path / "out")
    assert dataset.lengths.max() <= 10
    assert all(dataset[i][-1] == 3 for i in range(len(dataset)))
    wanted = [load_tokenizer(model).encode(text) for text in texts]
    if long_documents == "split":
        assert [t for t in dataset.tokens.tolist() if t != 3] == [token for tokens in wanted for token in tokens]
    else:
        assert [dataset[i].tolist() for i in range(len(dataset))] == [[*tokens[:9], 3] for tokens in wanted]
    card = read_card(tmp_path / "out")
    assert card is not None
    assert card["long"] == sum(len(tokens) > 9 for tokens in wanted) > 0


def test_documents_of_one_token_are_kept(tmp_path, model):
    write_jsonl(tmp_path / "x.jsonl", ["a"] * 50)
    tokenize(f"{tmp_path}/x.jsonl", str(model), f"{tmp_path}/out", workers=1, append_eos=False)
    assert np.array_equal(IndexedDataset(tmp_path / "out").lengths, [1] * 50)


@pytest.mark.parametrize("text", ["a\nb\n" * 50, "no newline " * 20, "é語😀" * 30, "", "x"])
@pytest.mark.parametrize("size", [4, 7, 64])
def test_pieces_are_whole_characters_and_add_up(text, size):
    pieces = cut(text.encode(), size)
    assert "".join(piece.decode() for piece in pieces) == text
    assert max(map(len, pieces)) <= size
    if "\n" in text:
        assert all(piece.endswith(b"\n") for piece in pieces[:-1])
