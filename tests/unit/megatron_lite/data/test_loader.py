"""The loader: every token a target once an epoch, the same samples at every layout and after every restart."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_lite.config import DataConfig, SourceConfig
from megatron_lite.data import loader as module
from megatron_lite.data.batch import IGNORED
from megatron_lite.data.dataset import build_dataset
from megatron_lite.data.indexed import IndexedWriter
from megatron_lite.data.loader import Loader, once
from megatron_lite.errors import DataError

CPU = torch.device("cpu")


def write(prefix, lengths, first=0, dtype=np.uint16):
    """Documents of these lengths; token i of the dataset is ``first`` + i, so that a window tells where it is from."""
    with IndexedWriter(prefix, np.dtype(dtype)) as writer:
        for length in lengths:
            writer.add_document(np.arange(first, first + length).astype(dtype))
            first += length
    return str(prefix)


def data_config(*paths, weights=None, **changes):
    sources = [SourceConfig(path=p, weight=w) for p, w in zip(paths, weights or [1.0] * len(paths), strict=True)]
    return DataConfig(train=sources, **{"seq_len": 8, "split": (1, 0, 0), **changes})


def loader(dataset, *, micro=2, accumulation=1, rank=0, dp=1, consumed=0, prefetch=0):
    return Loader(
        dataset,
        micro_batch_size=micro,
        num_micro_batches=accumulation,
        dp_rank=rank,
        dp_size=dp,
        consumed_samples=consumed,
        prefetch=prefetch,
        device=CPU,
    )


def global_batches(dataset, steps, *, dp, accumulation, batch=8, consumed=0, prefetch=0):
    """The tokens of each step's global batch, rows in the order of their position."""
    micro = batch // dp // accumulation
    ranks = [
        loader(dataset, micro=micro, accumulation=accumulation, rank=r, dp=dp, consumed=consumed, prefetch=prefetch)
        for r in range(dp)
    ]
    found = []
    for _ in range(steps):
        micro_batches = sorted((b for rank in ranks for b in next(rank)), key=lambda b: b.index)
        found.append(torch.cat([b.tokens for b in micro_batches]))
    for rank in ranks:
        rank.close()
    return found


def test_every_token_is_a_target_once_an_epoch(tmp_path):
    dataset = build_dataset(data_config(write(tmp_path / "d", [100, 60, 41])), 0, "train")
    assert dataset.sources[0].num_samples == 25
    batches = loader(dataset, micro=5)
    for _ in range(3):
        epoch = [batch for _ in range(5) for batch in next(batches)]
        targets = torch.cat([batch.targets for batch in epoch]).flatten()
        assert sorted(targets.tolist()) == list(range(1, 201))
        assert all(torch.equal(batch.tokens + 1, batch.targets) for batch in epoch)
        assert all(batch.counted is None for batch in epoch)


def test_epochs_and_seeds_have_orders_of_their_own(tmp_path):
    path = write(tmp_path / "d", [801])
    orders = set()
    for seed in (0, 1):
        batches = loader(build_dataset(data_config(path), seed, "train"), micro=100)
        orders |= {tuple(next(batches)[0].tokens[:, 0].tolist()) for _ in range(3)}
    assert len(orders) == 6


@pytest.mark.parametrize(("dp", "accumulation"), [(2, 1), (4, 1), (1, 4), (2, 2), (8, 1)])
def test_the_global_batch_is_the_same_at_every_layout(tmp_path, dp, accumulation):
    paths = [write(tmp_path / "a", [400, 120]), write(tmp_path / "b", [300], first=1000)]
    dataset = build_dataset(data_config(*paths, weights=[0.7, 0.3]), 3, "train")
    wanted = global_batches(dataset, 40, dp=1, accumulation=1)
    got = global_batches(dataset, 40, dp=dp, accumulation=accumulation, prefetch=2)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_resuming_anywhere_at_another_dp_size_continues_the_same_stream(tmp_path):
    dataset = build_dataset(data_config(write(tmp_path / "d", [700])), 3, "train")
    wanted = global_batches(dataset, 30, dp=1, accumulation=1)
    for step in (1, 7, 29):
        got = global_batches(dataset, 30 - step, dp=2, accumulation=2, consumed=8 * step)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted[step:], strict=True))


def test_it_does_not_matter_how_much_is_worked_out_at_once(tmp_path, monkeypatch):
    dataset = build_dataset(data_config(write(tmp_path / "d", [2000])), 0, "train")
    whole = global_batches(dataset, 40, dp=2, accumulation=2)
    monkeypatch.setattr(module, "_AHEAD", 8)
    assert all(map(torch.equal, whole, global_batches(dataset, 40, dp=2, accumulation=2)))


def test_blends_keep_their_proportions(tmp_path):
    paths = [write(tmp_path / "a", [400]), write(tmp_path / "b", [300], first=1000)]
    batches = loader(build_dataset(data_config(*paths, weights=[0.75, 0.25]), 0, "train"), micro=4)
    for _ in range(50):
        assert int((next(batches)[0].tokens[:, 0] >= 1000).sum()) == 1


@pytest.mark.parametrize(("dp", "micro"), [(1, 1), (1, 4), (2, 3), (3, 8)])
@pytest.mark.parametrize("limit", [1, 7, 20, 62, 1000])
def test_a_pass_has_each_window_once_and_as_many_batches_on_every_rank(tmp_path, dp, micro, limit):
    paths = [write(tmp_path / "a", [400]), write(tmp_path / "b", [100], first=1000)]  # 49 and 12 windows
    dataset = build_dataset(data_config(*paths, weights=[0.5, 0.5]), 0, "train")
    ranks = [list(once(dataset, limit, micro_batch_size=micro, dp_rank=r, dp_size=dp, device=CPU)) for r in range(dp)]
    assert {len(steps) for steps in ranks} == {-(-min(limit, 61) // (micro * dp))}
    batches = sorted((batch for steps in ranks for (batch,) in steps), key=lambda batch: batch.index)
    assert all(batch.tokens.shape == (micro, 8) for batch in batches)
    targets = torch.cat([batch.targets for batch in batches])
    kept = targets[(targets != IGNORED).all(1)]
    assert len(kept) == len(kept.unique(dim=0)) == min(limit, 61) and (targets[len(kept) :] == IGNORED).all()
    first = (kept[:20, 0] < 1000).tolist()  # of the shorter one, its share until it has no more
    assert all(abs(sum(first[:n]) - n / 2) <= 1 for n in range(len(first)))


def test_the_splits_are_disjoint_whole_documents(tmp_path):
    lengths = [40, 30, 50, 20, 60, 45, 25, 30]
    path = write(tmp_path / "d", lengths)
    config = data_config(path, split=(0.5, 0.3, 0.2))
    sources = [build_dataset(config, 0, split).sources[0] for split in ("train", "validation", "test")]
    edges = [(source.start, source.stop) for source in sources]
    assert edges[0][0] == 0 and edges[-1][1] == sum(lengths)
    assert edges[0][1] == edges[1][0] and edges[1][1] == edges[2][0]
    assert {edge for pair in edges for edge in pair} <= {0, *np.cumsum(lengths).tolist()}


def test_validation_files_of_their_own(tmp_path):
    config = data_config(write(tmp_path / "a", [100]), validation=[SourceConfig(path=write(tmp_path / "b", [50], 500))])
    train, validation = (build_dataset(config, 0, split) for split in ("train", "validation"))
    assert next(loader(train))[0].tokens.max() < 500 <= next(loader(validation))[0].tokens.min()


def test_the_document_mask_restarts_positions_and_drops_the_targets_across(tmp_path):
    path = write(tmp_path / "d", [5, 0, 3, 20, 1, 1, 30])
    dataset = build_dataset(data_config(path, document_mask=True), 0, "train")
    starts = {5, 8, 28, 29, 30}
    for _, (batch,) in zip(range(7), loader(dataset, micro=1), strict=False):
        tokens, targets = batch.tokens[0].tolist(), batch.targets[0].tolist()
        document, position = 0, 0
        for i, token in enumerate(tokens):
            if i and token in starts:
                document, position = document + 1, 0
            assert (batch.document_ids[0, i], batch.positions[0, i]) == (document, position)
            assert targets[i] == (IGNORED if token + 1 in starts else token + 1)
            position += 1


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path):
    dataset = build_dataset(data_config(write(tmp_path / "d", [100])), 0, "train", vocab_size=90)
    with pytest.raises(DataError, match=r"token 9\d, but the vocabulary has 90 entries"):
        for _, batches in zip(range(10), loader(dataset), strict=False):
            assert len(batches) == 1
    (tmp_path / "d.card.json").write_text('{"tokenizer": "hf/", "vocab_size": 100}')
    with pytest.raises(DataError, match="the vocabulary has 5 entries; the data's tokenizer, hf/, has 100"):
        next(loader(build_dataset(data_config(str(tmp_path / "d")), 0, "train", vocab_size=5)))


def test_answers_end_as_the_cards_of_all_data_say(tmp_path):
    paths = [write(tmp_path / name, [100]) for name in "abc"]
    for path, ends in zip(paths[:2], ([7, 2], [2, 9]), strict=True):
        Path(f"{path}.card.json").write_text(json.dumps({"ends": ends}))
    assert build_dataset(data_config(*paths), 0, "train").ends == [2, 7, 9]
    Path(f"{paths[0]}.card.json").write_text('{"ends": "</s>"}')
    with pytest.raises(DataError, match=r"a\.card\.json: ends: expected token ids, found '</s>'"):
        build_dataset(data_config(*paths), 0, "train")


def test_tokens_below_zero_are_refused(tmp_path):
    with IndexedWriter(tmp_path / "d", np.int32) as writer:
        writer.add_document(np.array([*range(30), -7, *range(60)]))
    with pytest.raises(DataError, match="token -7, but the vocabulary has 90 entries; the data has no card"):
        for _, batches in zip(
            range(10), loader(build_dataset(data_config(str(tmp_path / "d")), 0, "train", 90)), strict=False
        ):
            assert len(batches) == 1


def test_an_error_while_reading_ahead_arrives_and_stays(tmp_path):
    dataset = build_dataset(data_config(write(tmp_path / "d", [100])), 0, "train", vocab_size=5)
    reading = loader(dataset, prefetch=2)
    for _ in range(2):
        with pytest.raises(DataError, match="vocabulary"):
            next(reading)
    reading.close()


def test_too_little_data_is_named(tmp_path):
    path = write(tmp_path / "d", [6])
    with pytest.raises(DataError, match=r"train split has 6 tokens .* fewer than one sample of data.seq_len \+ 1 = 9"):
        build_dataset(data_config(path), 0, "train")


@pytest.mark.parametrize("key", ["train", "validation"])
def test_a_dataset_that_is_none_is_named_by_its_key(tmp_path, key):
    (tmp_path / "raw.jsonl").write_text("{}")
    for name, said in (("none", r"none\.idx: no such file"), ("raw.jsonl", r"raw\.jsonl: no dataset, .*tokenize")):
        config = data_config("d").model_copy(update={key: [SourceConfig(path=str(tmp_path / name))]})
        with pytest.raises(DataError, match=rf"^data\.{key}: .*{said}"):
            build_dataset(config, 0, key)


def test_validation_without_a_window_says_what_to_do(tmp_path):
    path = write(tmp_path / "d", [100])
    fix = r"raise its share of data\.split, or set data\.validation; train\.eval_every=0 trains without validation\Z"
    with pytest.raises(DataError, match=rf"\(data\.split=\[0\.9, 0\.1, 0\.0\]\); {fix}"):
        build_dataset(data_config(path, split=(0.9, 0.1, 0)), 0, "validation")
    own = data_config(path, validation=[SourceConfig(path=write(tmp_path / "v", [5]))])
    with pytest.raises(DataError, match=r"v: its validation split has 5 tokens .* = 9; train\.eval_every=0 trains"):
        build_dataset(own, 0, "validation")


def test_the_fingerprint_tells_what_changes_the_stream(tmp_path):
    a, b = write(tmp_path / "a", [100]), write(tmp_path / "b", [100], first=1)
    moved = write(tmp_path / "elsewhere", [100])
    same = build_dataset(data_config(a), 0, "train").fingerprint
    assert build_dataset(data_config(moved), 0, "train").fingerprint == same
    others = [
        build_dataset(data_config(b), 0, "train"),
        build_dataset(data_config(a), 1, "train"),
        build_dataset(data_config(a, seq_len=9), 0, "train"),
        build_dataset(data_config(a, b), 0, "train"),
        build_dataset(data_config(a, b, weights=[1, 2]), 0, "train"),
        build_dataset(data_config(write(tmp_path / "c", [101])), 0, "train"),
    ]
    assert len({same, *(other.fingerprint for other in others)}) == 7


def test_a_run_starts_and_resumes_anywhere_without_a_pass_over_the_data(tmp_path):
    """A quarter of a billion tokens in a sparse file: opening and the ten-billionth sample take milliseconds."""
    path = tmp_path / "d"
    with IndexedWriter(path, np.dtype(np.uint16)) as writer:
        writer.add_document(np.zeros(1, np.uint16))
    documents, length = 200_000, 1250
    total = documents * length
    with path.with_suffix(".bin").open("r+b") as file:
        file.truncate(2 * total)
    with path.with_suffix(".idx").open("r+b") as file:
        file.seek(18)
        file.write(np.array([documents, documents + 1], "<u8").tobytes())
        file.write(np.full(documents, length, "<i4").tobytes())
        file.write((2 * length * np.arange(documents)).astype("<i8").tobytes())
        file.write(np.arange(documents + 1).astype("<i8").tobytes())
    began = time.process_time()
    dataset = build_dataset(data_config(str(path), seq_len=1024, split=(0.98, 0.01, 0.01)), 0, "train")
    next(loader(dataset, consumed=10**10))
    assert time.process_time() - began < 0.5  # tests/benchmarks/loader.py has the exact figure
