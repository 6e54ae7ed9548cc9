"""Boxes on disk: planned once, written as safetensors, read back bit for bit."""

import math
from collections import Counter

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.checkpoint import Piece, open_checkpoint, save
from megatron_lite.checkpoint.manifest import BoxEntry, FileEntry, tiling_problem
from megatron_lite.checkpoint.reading import _share
from megatron_lite.checkpoint.shards import DTYPES, holdings, plan
from megatron_lite.config import parse_model
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.shard import Tile, materialize, pieces_of
from megatron_lite.errors import CheckpointError
from megatron_lite.models.decoder import Decoder
from megatron_lite.training.faults import Faults
from tests.kit.pieces import SOLO, blank, commit, cut, global_tensors, ready


def save_tensors(folder, tensors):
    ready(folder)
    return save(folder, 1, {n: Piece.whole(t) for n, t in tensors.items()}, {}, {}, SOLO, Faults.none())


def test_the_file_is_what_the_safetensors_library_writes_and_reads(tmp_path):
    tensors = {
        name: torch.randint(0, 2, (3, 5), generator=torch.Generator().manual_seed(i)).to(dtype)
        for i, (name, dtype) in enumerate(DTYPES.items())
    }
    tensors |= {"scalar": torch.tensor(2.5), "negative zero and nan": torch.tensor([-0.0, float("nan")])}
    tensors = {name.replace(" ", "_"): tensor for name, tensor in tensors.items()}
    path = save_tensors(tmp_path, tensors)
    again = safetensors.torch.load_file(path / "shard_00000.safetensors")
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype and again[name].shape == tensor.shape
        assert again[name].reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors")
    assert len((tmp_path / "theirs.safetensors").read_bytes()) == len((path / "shard_00000.safetensors").read_bytes())


def test_strided_empty_and_gradient_carrying_tensors_survive(tmp_path):
    tensors = {
        "transposed": torch.arange(12.0).view(3, 4).t(),
        "every_other": torch.arange(12.0)[::2],
        "expanded": torch.tensor([1.0]).expand(4),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }
    path = save_tensors(tmp_path, tensors)
    into = {
        n: Piece.whole(torch.nn.Parameter(torch.zeros_like(t, memory_format=torch.contiguous_format)))
        for n, t in tensors.items()
    }
    open_checkpoint(path).load(into, SOLO)
    for name, tensor in tensors.items():
        assert torch.equal(into[name].tiles[0].data, tensor), name


def test_replicas_are_written_once_and_the_work_is_spread():
    held = [holdings(cut(global_tensors(1), rank % 2, 2)) for rank in range(4)]  # tp 2 × dp 2
    tensors = plan(held)
    assert len(tensors["blocks.0.qkv.weight"].boxes) == 2 * 3
    assert len(tensors["norm.weight"].boxes) == 1
    written = Counter()
    for tensor in tensors.values():
        for box in tensor.boxes:
            written[box.file] += math.prod(box.shape) * tensor.item_size
    assert len(written) == 4 and max(written.values()) < 2 * min(written.values())


def test_a_file_is_hashed_by_who_reads_it_and_the_work_is_spread():
    files = {f"shard_{i}": FileEntry(size=100 + i, sha256="0" * 64) for i in range(4)}
    same = [{f"shard_{3 - rank}": 100} for rank in range(4)]
    assert [list(_share(files, same, rank)) for rank in range(4)] == [[f"shard_{3 - rank}"] for rank in range(4)]
    merged = [dict.fromkeys(files, 50) for _ in range(2)]  # half of each
    assert [len(_share(files, merged, rank)) for rank in range(2)] == [2, 2]
    more = [dict.fromkeys(files, 10) for _ in range(8)]
    assert sorted(len(_share(files, more, rank)) for rank in range(8)) == [0] * 4 + [1] * 4


def test_pieces_that_do_not_make_a_whole_are_our_own_bug():
    halves = [holdings(cut(global_tensors(1), rank, 2)) for rank in range(2)]
    with pytest.raises(AssertionError, match=r"elements, the tensor"):
        plan(halves[:1])
    with pytest.raises(AssertionError, match=r"elements, the tensor"):
        plan([*halves, holdings(cut(global_tensors(1)))])
    other = {name: Piece.whole(torch.zeros(2)) for name in halves[0]}
    with pytest.raises(AssertionError, match="elsewhere"):
        plan([halves[0], holdings(other)])


@st.composite
def tilings(draw):
    """A tensor and a random way to cut it into boxes."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    boxes = [([0] * len(shape), shape)]
    for _ in range(draw(st.integers(0, 6))):
        offset, size = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, size[dim]))
        for start, length in ((0, at), (at, size[dim] - at)):
            if length:
                boxes.append(
                    (
                        [o + start * (d == dim) for d, o in enumerate(offset)],
                        [length if d == dim else n for d, n in enumerate(size)],
                    )
                )
    return shape, boxes


def tiled(whole, boxes):
    """``whole`` as a piece of these boxes (offset, shape), views of it."""
    places = [(tuple(slice(o, o + n) for o, n in zip(*box, strict=True)), tuple(box[0])) for box in boxes]
    return Piece(tuple(whole.shape), whole.dtype, [Tile(whole[place], offset) for place, offset in places])


@settings(deadline=None, max_examples=60)
@given(tilings(), st.data())
def test_any_tiling_is_read_by_any_other(tmp_path_factory, stored, data):
    shape, boxes = stored
    folder = ready(tmp_path_factory.mktemp("tiling"))
    whole = torch.randn(shape)
    path = save(folder, 1, {"x": tiled(whole, boxes)}, {}, {}, SOLO, Faults.none())
    asked = [([0] * len(shape), shape)]
    for _ in range(data.draw(st.integers(0, 3))):
        offset = [data.draw(st.integers(0, n - 1)) for n in shape]
        asked.append((offset, [data.draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True)]))
    for box in asked:
        into = torch.full(shape, float("nan"))
        piece = tiled(into, [box])
        open_checkpoint(path, lazy=data.draw(st.booleans())).load({"x": piece}, SOLO)
        place = piece.tiles[0].place
        assert torch.equal(into[place], whole[place])
        into[place] = float("nan")
        assert into.isnan().all()  # nothing beside what was asked for


@settings(deadline=None)
@given(tilings(), st.data())
def test_a_tiling_with_one_box_moved_dropped_or_doubled_is_noticed(tiling, data):
    shape, boxes = tiling
    entries = [BoxEntry(file="f", offset=offset, shape=size) for offset, size in boxes]
    assert not tiling_problem(shape, entries)
    at = data.draw(st.integers(0, len(entries) - 1))
    dim = data.draw(st.integers(0, len(shape) - 1))
    moved = [o + (d == dim) for d, o in enumerate(entries[at].offset)]
    changed = entries[at].model_copy(update={"offset": moved})
    for wrong in (
        [*entries[:at], *entries[at + 1 :]],
        [*entries, entries[at]],
        [*entries[:at], changed, *entries[at + 1 :]],
    ):
        assert tiling_problem(shape, wrong)


@st.composite
def decoders(draw):
    """A small decoder of odd sizes, and two degrees of tensor parallelism that it can be split by."""
    degrees = draw(st.tuples(st.sampled_from((1, 2, 3, 4)), st.sampled_from((1, 2, 3, 4))))
    unit = math.lcm(*degrees)
    kv_heads = draw(st.sampled_from((1, unit)))
    sizes = {"family": draw(st.sampled_from(("llama", "gpt2"))), "num_layers": 1, "num_heads": unit}
    sizes |= {
        "num_kv_heads": kv_heads,
        "head_dim": 2 * unit // kv_heads,
        "hidden_size": draw(st.integers(3, 11)),
        "max_seq_len": 4,
    }
    sizes |= {"ffn_size": unit * draw(st.integers(1, 3)), "vocab_size": draw(st.integers(2, 40))}
    sizes |= {"vocab_multiple": unit * draw(st.integers(1, 3)), "tie_embeddings": draw(st.booleans())}
    return parse_model(sizes, "here"), degrees


def decoder_pieces(config, size, fill):
    """The pieces of every tensor-parallel rank, by rank."""
    found = []
    for rank in range(size):
        axis = Axis("tp", rank, size)
        with torch.device("meta"):
            model = Decoder(config, axis, sp=False)
        materialize(model, torch.device("cpu"))
        found.append(pieces_of(model, axis))
        for name, piece in found[-1].items():
            for tile in piece.tiles:
                tile.data.detach().copy_(fill(name, piece)[tile.place])
    return found


@settings(deadline=None, max_examples=25)
@given(decoders(), st.data())
def test_a_decoder_of_any_size_goes_from_any_split_to_any_other(tmp_path_factory, drawn, data):
    """Padded vocabularies, tied weights, heads shared by ranks; and each rank's rows divided once more, unevenly."""
    config, (before, after) = drawn
    whole = {}

    def fill(name, piece):
        return whole.setdefault(name, torch.randn(piece.shape))

    held = decoder_pieces(config, before, fill)
    merged = {}
    for name, piece in held[0].items():
        tiles = []
        for tile in (tile for rank in held for tile in rank[name].tiles):
            at = data.draw(st.integers(0, tile.shape[0])) if before == 1 else 0
            for start, part in ((0, tile.data[:at]), (at, tile.data[at:])):
                tiles.append(Tile(part.detach(), (tile.offset[0] + start, *tile.offset[1:])))
        merged[name] = Piece(piece.shape, piece.dtype, tiles)
    path = save(ready(tmp_path_factory.mktemp("decoder")), 1, merged, {}, {}, SOLO, Faults.none())
    for rank in decoder_pieces(config, after, lambda name, piece: torch.full(piece.shape, float("nan"))):
        open_checkpoint(path).load(rank, SOLO)
        for name, piece in rank.items():
            assert all(torch.equal(tile.data, whole[name][tile.place]) for tile in piece.tiles), name


def test_float_dtypes_are_converted_and_others_refused(tmp_path):
    source = torch.randn(4, 4)
    path = save_tensors(tmp_path, {"w": source, "i": torch.arange(3)})
    for dtype in (torch.bfloat16, torch.float64):
        into = {"w": Piece.whole(torch.zeros(4, 4, dtype=dtype)), "i": Piece.whole(torch.zeros(3, dtype=torch.int64))}
        open_checkpoint(path).load(into, SOLO)
        assert torch.equal(into["w"].tiles[0].data, source.to(dtype))
    for wrong in (torch.int32, torch.float32):
        with pytest.raises(CheckpointError, match=r"i has dtype torch.int64, wanted"):
            open_checkpoint(path).load({"i": Piece.whole(torch.zeros(3, dtype=wrong))}, SOLO, partial=True)


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path):
    checkpoint = open_checkpoint(commit(ready(tmp_path), 1))
    pieces = blank()
    less = {name: piece for name, piece in pieces.items() if name != "norm.weight"}
    with pytest.raises(CheckpointError, match=r"has unexpected norm.weight"):
        checkpoint.load(less, SOLO)
    checkpoint.load(less, SOLO, partial=True)
    more = {f"blocks.{i}.new": Piece.whole(torch.zeros(1)) for i in range(5)}
    with pytest.raises(CheckpointError, match=r"lacks blocks.0.new, blocks.1.new, blocks.2.new and 2 more"):
        checkpoint.load({**pieces, **more}, SOLO)
    other = {"embedding.weight": Piece.whole(torch.zeros(50, 6))}
    with pytest.raises(CheckpointError, match=r"embedding.weight has shape \(12, 6\), wanted \(50, 6\)"):
        checkpoint.load({**pieces, **other}, SOLO)
