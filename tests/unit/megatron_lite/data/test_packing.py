"""Packing: every conversation once an epoch, whole and unseen by the others, the same windows at every layout."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.config import DataConfig
from megatron_lite.data.batch import IGNORED
from megatron_lite.data.dataset import build_dataset
from megatron_lite.data.indexed import IndexedWriter
from megatron_lite.data.loader import Loader, once
from megatron_lite.data.packing import pack
from megatron_lite.errors import DataError


def write(prefix: Path, conversations: list[list[int]]) -> str:
    """Conversations of alternating stretches of these lengths; token i of the dataset is i + 1."""
    at = 1
    with IndexedWriter(prefix, np.int32, durable=False) as writer:
        writer.card = {"content": "conversations"}
        for lengths in conversations:
            writer.add_document(np.arange(at, at + sum(lengths)), lengths)
            at += sum(lengths)
    return str(prefix)


def dataset(path: str, seq_len: int = 16, policy: str = "truncate", **changes):
    config = {"seq_len": seq_len, "split": (1, 0, 0), "packing": "conversations", "long_conversations": policy}
    return build_dataset(DataConfig(train=[{"path": path}], **{**config, **changes}), 0, "train")


def loader(data, *, micro=2, count=1, rank=0, dp=1, consumed=0):
    sizes = {"micro_batch_size": micro, "num_micro_batches": count, "dp_rank": rank, "dp_size": dp}
    return Loader(data, **sizes, consumed_samples=consumed, prefetch=0, device=torch.device("cpu"))


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=200), extra=st.integers(0, 30))
@settings(max_examples=200, deadline=None)
def test_every_item_lies_in_one_window_that_holds_it(sizes, extra):
    capacity = max(sizes) + extra
    order, starts = pack(np.array(sizes), capacity)
    assert sorted(order.tolist()) == list(range(len(sizes)))
    filled = [sum(sizes[i] for i in order[a:b]) for a, b in pairwise(starts.tolist())]
    assert all(0 < size <= capacity for size in filled)
    assert sorted(filled) == sorted(best_fit(sizes, capacity))


def best_fit(sizes: list[int], capacity: int) -> list[int]:
    """How full the windows are, by the book: one item at a time."""
    windows: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [i for i, used in enumerate(windows) if used + size <= capacity]
        if fitting:
            windows[max(fitting, key=lambda i: windows[i])] += size
        else:
            windows.append(size)
    return windows


@pytest.mark.parametrize("micro", [1, 2, 5])
def test_a_pass_has_every_trained_token_once(tmp_path, micro):
    data = dataset(write(tmp_path / "d", [[2, 5], [3, 4, 1, 2], [6, 3], [1, 1], [2, 11]]))
    ranks = [once(data, 99, micro_batch_size=micro, dp_rank=r, dp_size=2, device=torch.device("cpu")) for r in range(2)]
    targets = torch.cat([batch.targets.flatten() for steps in ranks for (batch,) in steps])
    trained = [*range(3, 8), *range(11, 15), *range(16, 18), *range(24, 27), 28, *range(31, 42)]
    assert sorted(targets[targets != IGNORED].tolist()) == trained


LENGTHS = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=6), min_size=1, max_size=25)


@given(conversations=LENGTHS, policy=st.sampled_from(["truncate", "drop"]), seq_len=st.integers(6, 24))
@settings(max_examples=80, deadline=None)
def test_targets_positions_and_ids_are_those_of_whole_conversations(tmp_path_factory, conversations, policy, seq_len):
    wanted = {}  # targets of each conversation that is kept, by its first token
    at = 1
    for lengths in conversations:
        mask = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)[: seq_len + 1]
        tokens = np.arange(at, at + len(mask))
        if mask[1:].any() and (policy == "truncate" or sum(lengths) <= seq_len + 1):
            wanted[at] = (tokens[:-1].tolist(), np.where(mask[1:], tokens[1:], IGNORED).tolist())
        at += sum(lengths)
    path = write(tmp_path_factory.mktemp("pack") / "d", conversations)
    if not wanted:
        with pytest.raises(DataError, match="nothing in the train split"):
            dataset(path, seq_len, policy)
        return
    data = dataset(path, seq_len, policy)
    windows = data.sources[0].num_samples
    batches = loader(data, micro=windows)
    for _ in range(2):  # epochs
        (batch,) = next(batches)
        found = {}
        for row in range(windows):
            for number in sorted(set(batch.document_ids[row].tolist()) - {-1}):
                at = batch.document_ids[row] == number
                tokens, targets, positions = (
                    x[row][at].tolist() for x in (batch.tokens, batch.targets, batch.positions)
                )
                assert positions == list(range(len(positions)))
                assert tokens[0] not in found
                found[tokens[0]] = (tokens, targets)
            assert (batch.targets[row][batch.document_ids[row] == -1] == IGNORED).all()
        assert found == wanted
        counted = [i for i, target in enumerate(batch.targets.flatten().tolist()) if target != IGNORED]
        every = len(counted) == batch.targets.numel()
        assert (None if batch.counted is None else batch.counted.tolist()) == (None if every else counted)


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(0)
    return dataset(write(tmp_path / "d", rng.integers(1, 7, size=(60, 4)).tolist()))


def global_batches(data, steps, dp, consumed=0):
    ranks = [loader(data, micro=8 // dp // 2, count=2, rank=r, dp=dp, consumed=consumed) for r in range(dp)]
    found = []
    for _ in range(steps):
        batches = sorted((batch for rank in ranks for batch in next(rank)), key=lambda batch: batch.index)
        columns = zip(*[(b.tokens, b.targets, b.positions, b.document_ids) for b in batches], strict=True)
        found.append(torch.stack([torch.cat(column) for column in columns]))
    return torch.stack(found)


def test_the_same_batches_at_every_dp_size_and_after_every_resume(data):
    whole = global_batches(data, 20, dp=1)  # several epochs
    assert 2 * data.sources[0].num_samples < 8 * 20
    for dp in (2, 4):
        assert torch.equal(global_batches(data, 20, dp), whole)
    assert torch.equal(global_batches(data, 5, dp=2, consumed=120), whole[15:20])


def test_the_note_counts(tmp_path):
    conversations = [[4, 20], [3, 6], [20, 3], [2, 5], [4]]
    truncated = dataset(write(tmp_path / "d", conversations)).notes
    assert truncated == [
        f"{tmp_path}/d: 3 conversations in 2 windows of 16, 93.8% filled; 1 truncated, 7 tokens lost, 2 without a "
        "target left out"
    ]
    (dropped,) = dataset(f"{tmp_path}/d", policy="drop").notes
    assert dropped.endswith(
        "2 conversations in 1 window of 16, 87.5% filled; 2 too long left out, 1 without a target left out"
    )


def test_the_note_says_where_no_answer_ends(tmp_path):
    path = write(tmp_path / "d", [[4, 8]])
    for ends, told in (([], True), ([9], False)):
        card = {"content": "conversations", "options": {"loss": "all"}, "ends": ends}
        Path(f"{path}.card.json").write_text(json.dumps(card))
        (note,) = dataset(path).notes
        assert note.endswith("; its card names no token that ends an answer") == told


def test_the_fingerprint_sees_data_mask_and_packing(tmp_path):
    prints = {dataset(write(tmp_path / "a", [[4, 4], [8, 8]])).fingerprint}
    prints.add(dataset(f"{tmp_path}/a", policy="drop").fingerprint)
    prints.add(dataset(f"{tmp_path}/a", seq_len=17).fingerprint)
    prints.add(dataset(write(tmp_path / "b", [[4, 4], [7, 9]])).fingerprint)  # the same tokens, another mask
    assert len(prints) == 4


def test_a_dataset_is_read_as_what_it_is(tmp_path):
    path = write(tmp_path / "d", [[4, 4], [8, 8]])
    with pytest.raises(DataError, match=r"/d holds conversations: set data\.packing=conversations"):
        dataset(path, seq_len=4, packing="none")
    Path(f"{path}.card.json").write_text(json.dumps({}))
    with pytest.raises(DataError, match="its card does not say that it holds conversations"):
        dataset(path)
    assert dataset(path, seq_len=4, packing="none").sources[0].num_samples == 5
