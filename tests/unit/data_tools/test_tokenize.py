"""The tokenize command: the tokens sentencepiece gives, whatever the units of work, and a card that says what is in."""

import hashlib
import json
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from data_tools import encode, workers
from data_tools import tokenize as module
from data_tools.tokenize import tokenize
from megatron_lite.data.indexed import IndexedDataset, read_card
from megatron_lite.data.tokenizer import load_tokenizer
from megatron_lite.errors import ConfigError, DataError, PeerError
from tests.kit.corpora import dataset_bytes, documents, write_jsonl, write_tokenizer
from tests.kit.tokenizers import slow_folder

TEXTS = st.lists(st.text(max_size=30), max_size=12)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t.model", "unigram")


def changed(model: Path, path: Path, change) -> Path:
    """A copy of the tokenizer with something changed in it."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
    change(proto)
    path.write_bytes(proto.SerializeToString())
    return path


def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@given(texts=TEXTS, eos=st.booleans(), piece=st.sampled_from([1 << 20, 8]))
@settings(max_examples=60, deadline=None)
def test_the_tokens_are_those_of_sentencepiece(tmp_path_factory, model, texts, eos, piece):
    folder = tmp_path_factory.mktemp("tokenize")
    source = write_jsonl(folder / "x.jsonl", [*texts, "last"])
    with mock.patch.object(encode, "PIECE_BYTES", piece):
        tokenize(str(source), str(model), f"{folder}/out", workers=1, append_eos=eos)
    plain = SentencePieceProcessor(model_file=str(model))
    kept = [text for text in [*texts, "last"] if text and not text.isspace()]
    dataset = IndexedDataset(folder / "out")
    assert dataset.num_documents == dataset.num_sequences == len(kept)
    stored = [dataset[i].tolist() for i in range(len(kept))]
    if eos:
        assert {tokens.pop() for tokens in stored} == {plain.eos_id()}
    assert [plain.decode(tokens) for tokens in stored] == kept
    if piece > 1000:
        assert stored == plain.encode(kept)


@given(
    lines=st.lists(st.sampled_from(["", "[]", '{"text": ""}', *(json.dumps({"text": t}) for t in documents(6))])),
    newline=st.sampled_from(["\n", "\r\n"]),
    unit=st.integers(20, 3000),
    batch=st.integers(1, 300),
)
@settings(max_examples=60, deadline=None)
def test_the_units_of_work_do_not_show(tmp_path_factory, model, lines, newline, unit, batch):
    folder = tmp_path_factory.mktemp("units")
    for name, part in (("a.jsonl", lines[::2]), ("b.jsonl", [*lines[1::2], '{"text": "last"}'])):
        (folder / name).write_bytes(newline.join(part).encode())
    flags = {"workers": 1, "on_error": "skip", "max_bad": "100%"}
    tokenize(f"{folder}/?.jsonl", str(model), f"{folder}/whole", **flags)
    with mock.patch.object(module, "_UNIT_BYTES", unit), mock.patch.object(encode, "_BATCH_BYTES", batch):
        tokenize(f"{folder}/?.jsonl", str(model), f"{folder}/cut", **flags)
    assert dataset_bytes(folder / "cut") == dataset_bytes(folder / "whole")
    for suffix in (".card.json", ".rejects.jsonl"):
        whole, cut = (folder / f"{name}{suffix}" for name in ("whole", "cut"))
        assert whole.exists() == cut.exists() == (suffix == ".card.json" or "[]" in lines)
        assert not whole.exists() or whole.read_bytes() == cut.read_bytes()


def test_several_processes_give_the_bytes_of_one(tmp_path, model):
    source = write_jsonl(tmp_path / "x.jsonl", documents(60))
    with mock.patch.object(module, "_UNIT_BYTES", 700):
        for count in (1, 3):
            tokenize(str(source), str(model), f"{tmp_path}/{count}", workers=count)
    assert dataset_bytes(tmp_path / "1") == dataset_bytes(tmp_path / "3")
    assert (tmp_path / "1.card.json").read_bytes() == (tmp_path / "3.card.json").read_bytes()


@pytest.mark.parametrize(("size", "dtype"), [(65499, np.uint16), (65500, np.int32)])
def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path, model, size, dtype):
    def grow(proto) -> None:
        for i in range(size - len(proto.pieces)):
            proto.pieces.add(piece=f"word{i}", score=10.0)

    large = changed(model, tmp_path / "large.model", grow)
    source = write_jsonl(tmp_path / "x.jsonl", ["a", f"word{size - 401}"])
    tokenize(str(source), str(large), f"{tmp_path}/out", workers=1)
    dataset = IndexedDataset(tmp_path / "out")
    assert dataset.dtype == dtype
    assert dataset[1].tolist() == [size - 1, 3]  # the last of the vocabulary fits
    assert read_card(tmp_path / "out")["dtype"] == np.dtype(dtype).name


def test_the_card_says_what_is_in_and_from_where(tmp_path, model):
    source = write_jsonl(tmp_path / "x.jsonl", ["one", " ", *documents(20)])
    (tmp_path / "y.txt").write_text("some text")
    flags = {"on_error": "skip", "max_bad": "5", "max_document_tokens": 12, "long_documents": "truncate"}
    tokenize(f"{source},{tmp_path}/y.txt", str(model), f"{tmp_path}/deep/er/out", workers=1, **flags)
    dataset, card = IndexedDataset(tmp_path / "deep" / "er" / "out"), read_card(tmp_path / "deep" / "er" / "out")
    lengths = [len(SentencePieceProcessor(model_file=str(model)).encode(text)) for text in documents(20)]
    assert card == {
        "documents": 22,
        "sequences": 22,
        "tokens": dataset.num_tokens,
        "dtype": "uint16",
        "bin_sha256": sha256(tmp_path / "deep" / "er" / "out.bin"),
        "tokenizer": str(model),
        "tokenizer_sha256": sha256(model),
        "vocab_size": 400,
        "eos_id": 3,
        "lines": 23,
        "empty": 1,
        "rejected": 0,
        "long": sum(length > 11 for length in lengths),
        "sources": [
            {"file": str(path), "size": path.stat().st_size, "sha256": sha256(path)}
            for path in (source, tmp_path / "y.txt")
        ],
        "options": {
            **{"append_eos": True, "add_bos": None, "parse_special": False, "text_key": "text"},
            "max_line_bytes": 128 << 20,
            **flags,
        },
    }


def test_earlier_rejects_do_not_stay_beside_a_clean_dataset(tmp_path, model):
    source = write_jsonl(tmp_path / "x.jsonl", documents(3))
    (tmp_path / "out.rejects.jsonl").write_text("{}\n")
    tokenize(str(source), str(model), f"{tmp_path}/out", workers=1)
    assert not (tmp_path / "out.rejects.jsonl").exists()


def test_a_source_that_grows_meanwhile_is_found_out(tmp_path, model, monkeypatch):
    source = write_jsonl(tmp_path / "x.jsonl", documents(3))

    encoded = encode.encode

    def work(*args, **kwargs):
        with source.open("a") as file:
            file.write('{"text": "late"}\n')
        return encoded(*args, **kwargs)

    monkeypatch.setattr(encode, "encode", work)
    with pytest.raises(DataError, match=r"x\.jsonl: changed while it was being read"):
        tokenize(str(source), str(model), f"{tmp_path}/out", workers=1)
    assert not list(tmp_path.glob("out*"))


def test_a_tokenizer_without_an_end_of_sequence_is_refused_where_one_is_needed(tmp_path, model):
    def rename(proto) -> None:
        proto.trainer_spec.eos_piece = "<none>"

    other = changed(model, tmp_path / "other.model", rename)
    source = write_jsonl(tmp_path / "x.jsonl", ["one"])
    with pytest.raises(ConfigError, match=r"other\.model: has no end-of-sequence token; give --append_eos=false"):
        tokenize(str(source), str(other), f"{tmp_path}/out", workers=1)
    tokenize(str(source), str(other), f"{tmp_path}/out", workers=1, append_eos=False)


def test_what_a_normaliser_makes_empty_is_counted_as_empty(tmp_path, model):
    def strip(proto) -> None:
        proto.normalizer_spec.remove_extra_whitespaces = True
        proto.normalizer_spec.precompiled_charsmap = b""

    other = changed(model, tmp_path / "other.model", strip)
    source = write_jsonl(tmp_path / "x.jsonl", ["one", "\u2581", "two"])
    tokenize(str(source), str(other), f"{tmp_path}/out", workers=1)
    card = read_card(tmp_path / "out")
    assert (card["documents"], card["empty"], card["lines"]) == (2, 1, 3)


def test_all_mistakes_are_told_at_once(tmp_path):
    flags = {"on_error": "halt", "max_bad": "few", "max_document_tokens": 1, "long_documents": "cut", "workers": -1}
    with pytest.raises(ConfigError) as caught:
        tokenize("x.jsonl", "t.model", f"{tmp_path}/", max_line_bytes=0, **flags)
    assert str(caught.value).splitlines() == [
        "--workers=-1: expected 0 (one for each CPU) or more",
        "--on_error=halt: expected stop or skip",
        "--max_document_tokens=1: expected 0 (no limit), or 2 or more",
        "--max_line_bytes=0: expected at least 1",
        f"--out={tmp_path}/: expected the beginning of the file names, such as data/web",
        "--max_bad=few: expected a share of the lines such as 0.1% or a number of lines",
        "--long_documents=cut: expected split or truncate",
    ]


@pytest.mark.parametrize("max_bad", ["-1", "-1%", "nan%", "inf%", "1.5", "%", ""])
def test_a_share_that_is_none_is_refused(max_bad, tmp_path):
    with pytest.raises(ConfigError, match="--max_bad="):
        tokenize("x.jsonl", "t.model", f"{tmp_path}/out", max_bad=max_bad)


def square(i: int) -> int:
    if i == 7:
        raise DataError("seven")
    if i == 9:
        os.kill(os.getpid(), 9)
    return i * i


@pytest.mark.parametrize("count", [1, 3])
def test_workers_merge_in_order_and_raise_the_first_error(count):
    merged: list[int] = []
    workers.run(iter(range(6)), square, merged.append, count)
    assert merged == [0, 1, 4, 9, 16, 25]
    with pytest.raises(DataError, match="seven"):
        workers.run(iter([3, 7, 4, 7]), square, merged.append, count)
    assert merged[6:] == [9]


def test_a_killed_worker_is_an_error_of_a_peer():
    with pytest.raises(PeerError, match="a worker process was killed"):
        workers.run(iter([1, 9, 2, 3, 4, 5, 6, 8]), square, lambda result: None, 2)


@pytest.fixture
def llama(tmp_path) -> Path:
    """A tokenizer that begins a text with bos, and with a space."""
    return slow_folder(tmp_path / "llama", add_bos_token=True)


def test_bos_is_what_the_tokenizer_adds_or_the_flag_says(tmp_path, llama):
    source = write_jsonl(tmp_path / "x.jsonl", ["hello world", "<s>the cat<|im_end|>"])
    theirs = transformers.AutoTokenizer.from_pretrained(llama)
    text, spelled = theirs("hello world", add_special_tokens=False)["input_ids"], "<s>the cat<|im_end|>"
    bos, eos = theirs.bos_token_id, theirs.eos_token_id
    for flags, want in (
        ({}, [bos, *text, eos]),
        ({"append_eos": False}, theirs("hello world")["input_ids"]),
        ({"add_bos": False}, [*text, eos]),
        ({"add_bos": False, "append_eos": False}, text),
    ):
        tokenize(str(source), str(llama), f"{tmp_path}/out", workers=1, **flags)
        assert IndexedDataset(tmp_path / "out")[0].tolist() == want
    assert read_card(tmp_path / "out")["vocab_size"] == len(theirs)
    tokenize(str(source), str(llama), f"{tmp_path}/out", workers=1, parse_special=True)
    assert IndexedDataset(tmp_path / "out")[1].tolist() == theirs(spelled, add_special_tokens=False)["input_ids"]
    slow_folder(llama)
    tokenize(str(source), str(llama), f"{tmp_path}/out", workers=1, add_bos=True)
    assert IndexedDataset(tmp_path / "out")[0].tolist() == [bos, *text, eos]


def test_pieces_of_a_document_have_its_ends_and_no_more_spaces(tmp_path, llama):
    source = write_jsonl(tmp_path / "x.jsonl", [text := "\n".join(["the cat sat on", "a mat"] * 9)])
    whole = load_tokenizer(llama).encode(text)
    with mock.patch.object(encode, "PIECE_BYTES", 40):
        tokenize(str(source), str(llama), f"{tmp_path}/out", workers=1)
    dataset = IndexedDataset(tmp_path / "out")
    assert dataset[0].tolist() == [1, *whole, 330]
    tokenize(str(source), str(llama), f"{tmp_path}/out", workers=1, max_document_tokens=12)
    dataset = IndexedDataset(tmp_path / "out")
    pieces = [dataset[i].tolist() for i in range(dataset.num_documents)]
    assert {(piece[0], piece[-1]) for piece in pieces} == {(1, 330)} and max(map(len, pieces)) == 12
    assert [token for piece in pieces for token in piece[1:-1]] == whole
    with pytest.raises(ConfigError, match="--max_document_tokens=2: bos and eos alone are 2"):
        tokenize(str(source), str(llama), f"{tmp_path}/out", workers=1, max_document_tokens=2)


def test_a_tokenizer_without_bos_cannot_add_it(tmp_path, llama):
    slow_folder(llama, bos_token=None)
    source = write_jsonl(tmp_path / "x.jsonl", ["a"])
    with pytest.raises(ConfigError, match="--add_bos=true: the tokenizer has no bos token"):
        tokenize(str(source), str(llama), f"{tmp_path}/out", workers=1, add_bos=True)
    assert not list(tmp_path.glob("out*"))
