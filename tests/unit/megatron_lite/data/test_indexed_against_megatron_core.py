"""Datasets written by megatron-core's own builder and ours are the same bytes, and each side reads the other's."""

from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from data_tools.tokenize import tokenize
from megatron_lite.data.indexed import DTYPES, IndexedDataset, IndexedWriter, token_dtype
from tests.kit.corpora import dataset_bytes, documents, write_jsonl, write_tokenizer

if find_spec("megatron") is None:
    pytest.skip("megatron-core is not installed (pip install megatron-core)", allow_module_level=True)

Documents = list[list[list[int]]]  # documents of sequences of tokens
DOCUMENTS: Documents = [[[1, 2, 3]], [[], [4]], [], [[5, 6], [7], [8, 9]], [[]]]


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    return pytest.importorskip("megatron.core.datasets.indexed_dataset")  # takes seconds: not at collection


def write_with_megatron(theirs: ModuleType, prefix: str, documents: Documents, dtype: np.dtype) -> None:
    builder = theirs.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype.type)
    for sequences in documents:
        flat = [token for sequence in sequences for token in sequence]
        builder.add_document(np.array(flat), [len(sequence) for sequence in sequences])
    builder.finalize(f"{prefix}.idx")


def write_ours(prefix: str, documents: Documents, dtype: np.dtype) -> None:
    with IndexedWriter(prefix, dtype, durable=False) as writer:
        for sequences in documents:
            flat = [token for sequence in sequences for token in sequence]
            writer.add_document(np.array(flat, np.int64), [len(sequence) for sequence in sequences])


@given(
    documents=st.lists(st.lists(st.lists(st.integers(0, 127), max_size=6), max_size=4), max_size=10),
    dtype=st.sampled_from(list(DTYPES.values())),
)
@settings(max_examples=100, deadline=None)
def test_both_write_the_same_bytes(theirs, tmp_path_factory, documents, dtype):
    folder = tmp_path_factory.mktemp("same")
    write_with_megatron(theirs, f"{folder}/theirs", documents, dtype)
    write_ours(f"{folder}/ours", documents, dtype)
    assert dataset_bytes(folder / "theirs") == dataset_bytes(folder / "ours")


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_each_reads_what_the_other_wrote(theirs, tmp_path, dtype, mmap):
    a, b = f"{tmp_path}/theirs", f"{tmp_path}/ours"
    write_with_megatron(theirs, a, DOCUMENTS, dtype)
    write_ours(b, DOCUMENTS, dtype)
    ours, reference = IndexedDataset(a), theirs.IndexedDataset(b, mmap=mmap)
    ours.verify()
    sequences = [sequence for document in DOCUMENTS for sequence in document]
    assert [ours[i].tolist() for i in range(len(ours))] == sequences
    assert [reference[i].tolist() for i in range(len(reference))] == sequences
    assert reference.get(0, offset=1, length=2).tolist() == [2, 3]
    assert np.array_equal(ours.documents, reference.document_indices)
    assert ours.tokens.dtype == reference[0].dtype


def test_the_tokenize_command_writes_what_megatrons_preprocessing_would(theirs, tmp_path):
    texts = documents(500)
    model = write_tokenizer(tmp_path / "t.model")
    tokenize(str(write_jsonl(tmp_path / "x.jsonl", texts)), str(model), f"{tmp_path}/ours", workers=1)

    encoder = SentencePieceProcessor(model_file=str(model))
    dtype = theirs.DType.optimal_dtype(encoder.vocab_size())
    builder = theirs.IndexedDatasetBuilder(f"{tmp_path}/theirs.bin", dtype=dtype)
    for text in texts:  # tools/preprocess_data.py with --append-eod, without --split-sentences
        tokens = [*encoder.encode(text), encoder.eos_id()]
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(f"{tmp_path}/theirs.idx")
    assert dataset_bytes(tmp_path / "theirs") == dataset_bytes(tmp_path / "ours")


def test_merging_gives_the_same_bytes(theirs, tmp_path):
    dtype = np.dtype(np.uint16)
    for name, content in (("a", DOCUMENTS), ("b", DOCUMENTS[::-1])):
        write_ours(f"{tmp_path}/{name}", content, dtype)
    builder = theirs.IndexedDatasetBuilder(f"{tmp_path}/theirs.bin", dtype=dtype.type)
    with IndexedWriter(tmp_path / "ours", dtype) as writer:
        for name in "ab":
            builder.add_index(f"{tmp_path}/{name}")
            writer.add_dataset(f"{tmp_path}/{name}")
    builder.finalize(f"{tmp_path}/theirs.idx")
    assert dataset_bytes(tmp_path / "theirs") == dataset_bytes(tmp_path / "ours")


def test_a_multimodal_index_is_read_without_its_modes(theirs, tmp_path: Path):
    builder = theirs.IndexedDatasetBuilder(f"{tmp_path}/x.bin", dtype=np.uint16, multimodal=True)
    builder.add_document([1, 2, 3, 4], [3, 1], modes=[0, 1])
    builder.finalize(f"{tmp_path}/x.idx")
    dataset = IndexedDataset(tmp_path / "x")
    dataset.verify()
    assert [dataset[i].tolist() for i in range(2)] == [[1, 2, 3], [4]]
    assert dataset.documents.tolist() == [0, 2]


@pytest.mark.parametrize("vocabulary", [100, 65499, 65500, 65535, 65536, 200_000])
def test_the_same_vocabulary_gives_the_same_dtype(theirs, vocabulary):
    assert token_dtype(vocabulary) == theirs.DType.optimal_dtype(vocabulary)
