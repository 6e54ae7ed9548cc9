"""The indexed dataset format: what is written is read back, and nothing half-written looks like a dataset."""

import pickle
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.data.indexed import DTYPES, IndexedDataset, IndexedWriter, read_card, token_dtype
from megatron_lite.errors import DataError, StorageError

DOCUMENTS = st.lists(st.lists(st.lists(st.integers(0, 100), max_size=5), max_size=4), max_size=12)


def write(prefix: Path, documents: list[list[list[int]]], dtype: object = np.uint16) -> Path:
    with IndexedWriter(prefix, dtype) as writer:
        for sequences in documents:
            flat = [token for sequence in sequences for token in sequence]
            writer.add_document(np.array(flat, np.int64), [len(sequence) for sequence in sequences])
    return prefix


@given(documents=DOCUMENTS, dtype=st.sampled_from(list(DTYPES.values())))
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read_back(tmp_path_factory, documents, dtype):
    dataset = IndexedDataset(write(tmp_path_factory.mktemp("d") / "x", documents, dtype))
    sequences = [sequence for document in documents for sequence in document]
    assert [dataset[i].tolist() for i in range(len(dataset))] == sequences
    assert dataset.tokens.tolist() == [token for sequence in sequences for token in sequence]
    assert np.diff(dataset.documents).tolist() == [len(document) for document in documents]
    assert dataset.dtype == dataset.tokens.dtype == dtype
    assert (dataset.num_documents, dataset.num_sequences) == (len(documents), len(sequences))
    dataset.verify()


def test_the_index_has_megatrons_layout(tmp_path):
    prefix = write(tmp_path / "x", [[[1, 2, 3]], [[4], [5, 6]]], np.int32)
    wanted = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 4, 3, 3) + struct.pack("<3i3q3q", 3, 1, 2, 0, 12, 16, 0, 1, 3)
    assert Path(f"{prefix}.idx").read_bytes() == wanted
    assert Path(f"{prefix}.bin").read_bytes() == struct.pack("<6i", *range(1, 7))


@pytest.mark.parametrize(
    ("vocabulary", "dtype"), [(2, "uint16"), (65499, "uint16"), (65500, "int32"), (1 << 20, "int32")]
)
def test_the_dtype_is_megatrons_choice(vocabulary, dtype):
    assert token_dtype(vocabulary) == dtype


def test_merged_datasets_read_like_one(tmp_path):
    first, second = [[[1], [2, 3]], []], [[[4]], [[]], [[5, 6]]]
    prefixes = [write(tmp_path / "a", first), write(tmp_path / "b", second)]
    with IndexedWriter(tmp_path / "both", np.uint16) as writer:
        for prefix in prefixes:
            writer.add_dataset(prefix)
    whole = write(tmp_path / "whole", first + second)
    for suffix in (".idx", ".bin"):
        assert Path(f"{tmp_path}/both{suffix}").read_bytes() == Path(f"{whole}{suffix}").read_bytes()


def test_a_failed_writer_leaves_nothing_and_keeps_what_was_there(tmp_path):
    prefix = write(tmp_path / "x", [[[1]]])
    with pytest.raises(RuntimeError, match="boom"), IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document([2, 3])
        raise RuntimeError("boom")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]
    assert IndexedDataset(prefix).tokens.tolist() == [1]


def test_an_open_dataset_survives_being_replaced(tmp_path):
    before = IndexedDataset(write(tmp_path / "x", [[[1, 2]]]))
    write(tmp_path / "x", [[[7]]])
    assert before[0].tolist() == [1, 2]
    assert IndexedDataset(tmp_path / "x")[0].tolist() == [7]


def test_two_writers_of_one_prefix_do_not_mix(tmp_path):
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        with pytest.raises(StorageError, match="another process is writing"), IndexedWriter(tmp_path / "x", np.uint16):
            pass
        writer.add_document([1])
    assert IndexedDataset(tmp_path / "x").tokens.tolist() == [1]


def test_tokens_that_do_not_fit_are_refused(tmp_path):
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        for tokens in ([-1], [65536], [1.5]):
            with pytest.raises(ValueError, match="do not fit uint16"):
                writer.add_document(tokens)
        with pytest.raises(ValueError, match="do not add up"):
            writer.add_document([1, 2], [1])


def test_the_card_carries_counts_and_a_digest(tmp_path):
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1, 2])
        writer.card = {"vocab_size": 9}
    card = read_card(tmp_path / "x")
    assert card is not None
    assert (card["documents"], card["tokens"], card["dtype"], card["vocab_size"]) == (1, 2, "uint16", 9)
    assert len(card["bin_sha256"]) == 64
    write(tmp_path / "x", [[[1]]])
    assert read_card(tmp_path / "x") is None  # it belonged to the dataset that was replaced


def test_the_fingerprint_follows_the_content(tmp_path):
    prints = {name: IndexedDataset(write(tmp_path / name, documents)).fingerprint() for name, documents in {
        "x": [[[1, 2]], [[3]]], "same": [[[1, 2]], [[3]]], "edited": [[[1, 2]], [[4]]],
        "appended": [[[1, 2]], [[3]], [[4]]], "moved": [[[1]], [[2, 3]]],
    }.items()}  # fmt: skip
    assert prints["x"] == prints["same"]
    assert len(set(prints.values())) == 4


def test_indexing_is_bounded_and_pickles_reopen(tmp_path):
    dataset = IndexedDataset(write(tmp_path / "x", [[[1, 2]], [[3]]]))
    assert dataset[-1].tolist() == [3]
    for i in (2, -3):
        with pytest.raises(IndexError, match=f"sequence {i} of 2"):
            dataset[i]
    assert pickle.loads(pickle.dumps(dataset))[0].tolist() == [1, 2]  # noqa: S301


def test_a_billion_tokens_open_in_milliseconds(tmp_path):
    lengths = np.full(1 << 20, 1000, "<i4")
    pointers = np.arange(len(lengths), dtype="<i8") * 2000
    with (tmp_path / "x.idx").open("wb") as index:
        index.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(lengths), len(lengths) + 1))
        for array in (lengths, pointers, np.arange(len(lengths) + 1, dtype="<i8")):
            index.write(array.tobytes())
    with (tmp_path / "x.bin").open("wb") as tokens:
        tokens.truncate(2000 * len(lengths))  # sparse
    IndexedDataset(tmp_path / "x")
    began = time.perf_counter()
    assert IndexedDataset(tmp_path / "x").num_tokens > 1e9
    assert time.perf_counter() - began < 0.05


def test_a_missing_dataset_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.idx: no such file"):
        IndexedDataset(tmp_path / "nothing")
