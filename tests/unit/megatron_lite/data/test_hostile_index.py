"""A truncated or hostile .idx or .bin is refused in one line with exit code 3, never with a crash."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.data import indexed
from megatron_lite.data.indexed import IndexedDataset, IndexedWriter
from megatron_lite.errors import DataError
from tests.kit.corpora import data_tools

HEADER = struct.Struct("<9sQBQQ")


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        for n in (3, 0, 5, 1):
            writer.add_document(np.arange(n), [n])
    return tmp_path / "x"


def patch(prefix: Path, offset: int, data: bytes) -> None:
    with Path(f"{prefix}.idx").open("r+b") as index:
        index.seek(offset)
        index.write(data)


HOSTILE = {
    "magic": (0, b"X", "bad magic"),
    "version": (9, struct.pack("<Q", 2), "unknown version 2"),
    "dtype": (17, b"\x09", "unknown dtype code 9"),
    "no sequences": (18, struct.pack("<Q", 0), "need 74 bytes"),
    "2**63 sequences": (18, struct.pack("<Q", 1 << 63), "9223372036854775808 sequences"),
    "2**64-1 boundaries": (26, struct.pack("<Q", (1 << 64) - 1), "18446744073709551615 boundaries"),
    "negative length": (34, struct.pack("<i", -3), "sequence 0 has the negative length -3"),
    "long length": (34, struct.pack("<i", 2**31 - 1), "sequence 1 starts at byte 6"),
    "last too long": (34 + 12, struct.pack("<i", 2), "ends at byte 20 of x.bin, which has 18"),
    "negative pointer": (34 + 16, struct.pack("<q", -6), "sequence 0 starts at byte -6"),
    "pointer past the end": (34 + 16 + 8, struct.pack("<q", 1 << 62), "sequence 1 starts at byte 4611686018427387904"),
    "pointer of 2**63-1": (34 + 16 + 24, struct.pack("<q", 2**63 - 1), "ends at byte 9223372036854775809"),
    "first boundary": (34 + 48, struct.pack("<q", 1), "do not run from 0 to 4"),
    "last boundary": (34 + 48 + 32, struct.pack("<q", 9), "do not run from 0 to 4"),
    "falling boundary": (34 + 48 + 16, struct.pack("<q", -7), "document boundary 2 is -7"),
}


@pytest.mark.parametrize(("offset", "data", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_index_is_refused_at_open(prefix, offset, data, message):
    patch(prefix, offset, data)
    with pytest.raises(DataError, match=message) as caught:
        IndexedDataset(prefix)
    assert "\n" not in str(caught.value)
    assert str(prefix) in str(caught.value)


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_every_truncation_is_refused_at_open(prefix, suffix):
    path = Path(f"{prefix}{suffix}")
    for size in range(path.stat().st_size - 1, -1, -1):
        os.truncate(path, size)
        with pytest.raises(DataError, match=r"x\.(idx|bin)"):
            IndexedDataset(prefix)


@given(st.binary(max_size=200))
@settings(max_examples=150, deadline=None)
def test_any_bytes_at_all_are_read_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    counts = HEADER.pack(b"MMIDIDX\0\0", 1, 8, len(data) // 20, 1 + len(data) // 20)
    (folder / "x.bin").write_bytes(data[:20])
    for index in (data, HEADER.pack(b"MMIDIDX\0\0", 1, 8, 0, 0)[:18] + data, counts + data):
        (folder / "x.idx").write_bytes(index)
        try:
            dataset = IndexedDataset(folder / "x")
            for i in range(len(dataset)):
                dataset[i]
        except DataError as error:
            assert "\n" not in str(error)


def test_entries_that_open_skips_are_checked_when_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(indexed, "_CHECKED_AT_OPEN", 2)
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        for _ in range(8):
            writer.add_document(np.arange(5))
    patch(tmp_path / "x", 34 + 32 + 8 * 4, struct.pack("<q", 1 << 40))  # of sequence 4
    dataset = IndexedDataset(tmp_path / "x")
    with pytest.raises(DataError, match=r"sequence 4: 5 tokens at byte 1099511627776 lie outside x\.bin"):
        dataset[4]
    with pytest.raises(DataError, match="sequence 4 starts at byte 1099511627776"):
        dataset.verify()


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_truncation_after_opening_is_an_error_and_no_sigbus(tmp_path, suffix):
    script = """
import os, sys
import numpy as np
from megatron_lite.data.indexed import IndexedDataset, IndexedWriter
from megatron_lite.errors import DataError
prefix, suffix = sys.argv[1:]
with IndexedWriter(prefix, np.uint16) as writer:
    for _ in range(5000):
        writer.add_document(np.arange(20))
dataset = IndexedDataset(prefix)
os.truncate(prefix + suffix, 10)
for action in (lambda: dataset[4000], dataset.check_unchanged, dataset.verify, dataset.fingerprint):
    try:
        action()
        sys.exit("no error")
    except DataError as error:
        assert "truncated while in use" in str(error), error
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "x"), suffix], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)


def test_the_command_says_it_in_one_line(prefix):
    os.truncate(f"{prefix}.bin", 10)
    result = data_tools("inspect", prefix)
    result.expect(exit_code=3, stderr=r"^error: .*x\.idx: its last sequence ends at byte 18 of x\.bin, which has 10\n$")


def test_a_folder_or_a_device_is_no_dataset(tmp_path):
    (tmp_path / "x.idx").mkdir()
    with pytest.raises(DataError, match="Is a directory"):
        IndexedDataset(tmp_path / "x")
