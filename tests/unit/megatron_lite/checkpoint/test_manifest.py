"""A manifest from a stranger: refused by field, without reading outside its folder or allocating what it claims."""

import hashlib
import json
import os
import resource
from pathlib import Path

import pytest

from megatron_lite.checkpoint import open_checkpoint
from megatron_lite.checkpoint.inspect import inspect
from megatron_lite.distributed.spawn import run_ranks
from megatron_lite.errors import CheckpointError
from tests.kit.pieces import SOLO, blank, commit, manifest_tree, ready, sign

EMBEDDING, SHARD = "embedding.weight", "shard_00000.safetensors"
ZEROS = "0" * 64


def first_box(tree):
    return tree["tensors"][EMBEDDING]["boxes"][0]


def entry(tree, **changes):
    tree["tensors"][EMBEDDING].update(changes)


HOSTILE = {
    "a path upwards": (lambda t: first_box(t).update(file="../../etc/passwd"), "tensors.embedding.weight.boxes.0.file"),
    "an absolute path": (lambda t: first_box(t).update(file="/etc/passwd"), "boxes.0.file"),
    "a file name that is a path": (lambda t: t["files"].update({"../x": {"size": 1, "sha256": ZEROS}}), "files.../x"),
    "a file name with an escape": (lambda t: t["files"].update({"a\x1b[2J": {"size": 1, "sha256": ZEROS}}), r"x1b"),
    "a hidden file": (lambda t: t["files"].update({".bashrc": {"size": 1, "sha256": ZEROS}}), r"files..bashrc"),
    "itself": (lambda t: t["files"].update({"manifest.json": {"size": 1, "sha256": ZEROS}}), "cannot list itself"),
    "a file that is not listed": (lambda t: first_box(t).update(file="other"), "other is not among the files"),
    "a huge dim": (lambda t: entry(t, shape=[1 << 60, 6]), "tensors.embedding.weight.shape.0"),
    "a huge product": (lambda t: entry(t, shape=[1 << 40, 1 << 40]), "impossibly large"),
    "a huge integer": (lambda t: entry(t, shape=[1 << 3000, 6]), "embedding.weight.shape.0"),
    "a negative dim": (lambda t: entry(t, shape=[-12, 6]), "shape.0"),
    "a dim that is a float": (lambda t: entry(t, shape=[12.0, 6]), "shape.0"),
    "a dim that is a boolean": (lambda t: entry(t, shape=[True, 6]), "shape.0"),
    "a negative offset": (lambda t: first_box(t).update(offset=[-1, 0]), "boxes.0.offset.0"),
    "a box outside": (lambda t: first_box(t).update(offset=[1, 0]), "is not inside"),
    "a box of other rank": (lambda t: first_box(t).update(offset=[0], shape=[72]), "is not inside"),
    "a missing part": (lambda t: first_box(t).update(shape=[11, 6]), "hold 66 elements, the tensor 72"),
    "no box": (lambda t: entry(t, boxes=[]), "hold 0 elements"),
    "overlapping boxes": (
        lambda t: entry(
            t, boxes=[first_box(t) | {"shape": [6, 6]}, first_box(t) | {"offset": [5, 0], "shape": [6, 6]}]
        ),
        "boxes overlap",
    ),
    "an unknown dtype": (lambda t: entry(t, dtype="OBJECT"), "unknown dtype 'OBJECT'"),
    "another known dtype": (lambda t: entry(t, dtype="F64"), "'embedding.weight' is not what the manifest says"),
    "an unknown field": (lambda t: t.update(loader="os.system"), "loader: Extra inputs"),
    "another version": (lambda t: t.update(version=2), "version"),
    "another format": (lambda t: t.update(format="pickle"), "format"),
    "a negative size": (lambda t: t["files"][SHARD].update(size=-1), r"files.shard_00000.safetensors.size"),
    "a digest that is none": (lambda t: t["files"][SHARD].update(sha256="a"), "sha256"),
    "another step": (lambda t: t.update(step=7), "is of step 7"),
    "no tensors": (lambda t: t.pop("tensors"), "tensors: Field required"),
}


@pytest.fixture
def path(tmp_path):
    return commit(ready(tmp_path / "checkpoints"), 1)


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path).load(blank(), SOLO)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_refused_by_field(name, path):
    change, complaint = HOSTILE[name]
    tree = manifest_tree(path)
    change(tree)
    sign(path, json.dumps(tree))
    assert complaint in refused(path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[1]", "Extra data"),
        ('{"step":NaN}', "NaN is not a number"),
        ('{"step":Infinity}', "Infinity is not a number"),
        ('{"step":1e999}', "step: Input should be a valid integer"),
        ('{"step":1,"step":2}', "duplicate key 'step'"),
        ('{"files":{"a":{"size":1,"size":2}}}', "duplicate key 'size'"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
        ('{"step":' + "9" * 5000 + "}", "digits"),
        ('{"step":"\\ud800"}', "step: Input should be a valid integer"),
    ],
    ids=range(9),
)
def test_json_traps_are_refused(text, complaint, path):
    sign(path, text)
    assert complaint in refused(path)


def test_an_unsigned_or_empty_manifest_is_refused(path):
    for content in (b"", b"{}", b"\0" * 200, (path / "manifest.json").read_bytes()[:-1]):
        (path / "manifest.json").write_bytes(content)
        assert "damaged" in refused(path)


def test_links_pipes_and_folders_in_place_of_files_are_refused_untouched(path, tmp_path):
    shard = path / SHARD
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    assert f"{SHARD} is not a regular file" in refused(path)
    shard.unlink()
    os.mkfifo(shard)  # opening it would wait forever
    assert f"{SHARD} is not a regular file" in refused(path)
    shard.unlink()
    shard.mkdir()
    assert f"{SHARD} is not a regular file" in refused(path)
    (path / "manifest.json").unlink()
    (path / "manifest.json").symlink_to("/dev/zero")
    assert "not a regular file" in refused(path)


def resign_shard(path: Path, content: bytes) -> None:
    (path / SHARD).write_bytes(content)
    tree = manifest_tree(path)
    tree["files"][SHARD] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    sign(path, json.dumps(tree))


def load_in_little_memory(rank: int, size: int, path: Path, shards: list[bytes]) -> list[str]:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)
    messages = []
    for content in shards:
        resign_shard(path, content)
        messages.append(refused(path))
    return messages


def hostile_shards(good: bytes):
    length = int.from_bytes(good[:8], "little")
    header, data = json.loads(good[8 : 8 + length]), good[8 + length :]

    def made(header, data=data):
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data

    return {
        "a header of 1 GB": (1 << 30).to_bytes(8, "little") + good[8:],
        "a header of 2^64 - 1": b"\xff" * 8 + good[8:],
        "nothing": b"",
        "three bytes": b"\0\0\0",
        "no tensor": made({}, b""),
        "a huge shape": made(header | {EMBEDDING: header[EMBEDDING] | {"shape": [1 << 40, 1 << 20]}}),
        "another shape": made(header | {EMBEDDING: header[EMBEDDING] | {"shape": [6, 12]}}),
        "offsets past the end": made(header | {EMBEDDING: header[EMBEDDING] | {"data_offsets": [0, 1 << 62]}}),
        "not JSON": (8).to_bytes(8, "little") + b"\xff" * 8 + data,
    }


def test_a_hostile_shard_with_a_good_signature_is_refused_in_little_memory(path):
    shards = hostile_shards((path / SHARD).read_bytes())
    (messages,) = run_ranks(load_in_little_memory, 1, path, list(shards.values()))
    for name, message in zip(shards, messages, strict=True):
        assert SHARD in message, name


def test_inspect_says_no_more_than_the_manifest_allows(path, capsys):
    inspect(path)
    assert "step 1: 6 tensors" in capsys.readouterr().out
    (path / "state.json").write_text('{"step": 2}')
    with pytest.raises(CheckpointError, match=r"state.json is damaged"):
        inspect(path)
