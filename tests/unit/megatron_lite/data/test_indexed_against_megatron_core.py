"""Datasets written by megatron-core's own builder and ours are the same bytes, and each side reads the other's."""

import numpy as np
import pytest

from megatron_lite.data.indexed import DTYPES, IndexedDataset, IndexedWriter, token_dtype
from tests.kit.corpora import dataset_bytes

theirs = pytest.importorskip(
    "megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed (pip install megatron-core)"
)

DOCUMENTS = [[[1, 2, 3]], [[], [4]], [], [[5, 6], [7], [8, 9]], [[]]]


def write_with_megatron(prefix: str, documents: list[list[list[int]]], dtype: np.dtype) -> None:
    builder = theirs.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype.type)
    for sequences in documents:
        flat = [token for sequence in sequences for token in sequence]
        builder.add_document(np.array(flat), [len(sequence) for sequence in sequences])
    builder.finalize(f"{prefix}.idx")


def write_ours(prefix: str, documents: list[list[list[int]]], dtype: np.dtype) -> None:
    with IndexedWriter(prefix, dtype) as writer:
        for sequences in documents:
            flat = [token for sequence in sequences for token in sequence]
            writer.add_document(np.array(flat, np.int64), [len(sequence) for sequence in sequences])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_both_write_the_same_bytes_and_read_each_other(tmp_path, dtype):
    a, b = f"{tmp_path}/theirs", f"{tmp_path}/ours"
    write_with_megatron(a, DOCUMENTS, dtype)
    write_ours(b, DOCUMENTS, dtype)
    assert dataset_bytes(a) == dataset_bytes(b)

    ours, reference = IndexedDataset(a), theirs.IndexedDataset(b)
    assert [ours[i].tolist() for i in range(len(ours))] == [sequence.tolist() for sequence in reference[:]]
    assert np.array_equal(ours.documents, reference.document_indices)
    assert ours.tokens.dtype == reference[0].dtype


def test_merging_gives_the_same_bytes(tmp_path):
    dtype = np.dtype(np.uint16)
    for name, documents in (("a", DOCUMENTS), ("b", DOCUMENTS[::-1])):
        write_ours(f"{tmp_path}/{name}", documents, dtype)
    builder = theirs.IndexedDatasetBuilder(f"{tmp_path}/theirs.bin", dtype=dtype.type)
    with IndexedWriter(tmp_path / "ours", dtype) as writer:
        for name in "ab":
            builder.add_index(f"{tmp_path}/{name}")
            writer.add_dataset(f"{tmp_path}/{name}")
    builder.finalize(f"{tmp_path}/theirs.idx")
    assert dataset_bytes(tmp_path / "theirs") == dataset_bytes(tmp_path / "ours")


@pytest.mark.parametrize("vocabulary", [100, 65499, 65500, 65535, 65536, 200_000])
def test_the_same_vocabulary_gives_the_same_dtype(vocabulary):
    assert token_dtype(vocabulary) == theirs.DType.optimal_dtype(vocabulary)
