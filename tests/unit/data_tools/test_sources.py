"""What a command line means by its input, and that cutting it into spans loses and doubles nothing."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.documents import read
from data_tools.sources import find_sources, spans, units
from megatron_lite.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    kept = ("b.jsonl", "a.txt", "sub/c.jsonl.gz", "sub/d.json")
    left_out = (".hidden.jsonl", ".git/x.txt", "old.rejects.jsonl", "old.bin", "old.idx", "old.card.json", "t.model")
    for name in (*kept, *left_out, "old.tmp/part_000000001.bin", "old.tmp/lock"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("{}", ["a.txt", "b.jsonl", "sub/c.jsonl.gz", "sub/d.json"]),  # without what the data tools wrote there
        ("{}/*", ["a.txt", "b.jsonl"]),
        ("{}/**/*.jsonl*", ["b.jsonl", "sub/c.jsonl.gz"]),
        ("{}/sub,{}/a.txt,{}/sub/d.json,", ["sub/c.jsonl.gz", "sub/d.json", "a.txt"]),  # each once
        ("{}/old.rejects.jsonl", ["old.rejects.jsonl"]),  # named in full: meant
        ("{}/[ab].*", ["a.txt", "b.jsonl"]),
    ],
)
def test_what_a_pattern_means(folder, pattern, wanted):
    found = find_sources(pattern.replace("{}", str(folder)))
    assert [Path(source.path).relative_to(folder).as_posix() for source in found] == wanted
    kinds = {".txt": "text", ".jsonl": "jsonl", ".json": "jsonl", ".gz": "gzip"}
    assert [source.kind for source in found] == [kinds[Path(name).suffix] for name in wanted]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "no file matches ''"),
        (",", "no file matches ','"),
        ("*.none", r"no file matches '.*/\*\.none'$"),
        ("b.json", r"no file matches '.*/b\.json' \(did you mean 'b\.jsonl'\?\)"),
        ("dangling.txt", r"no file matches '.*/dangling\.txt'$"),
        ("nothing", "/nothing: no files in this folder"),
        ("x.jsonl.zst", r"/x\.jsonl\.zst: compressed text is read only as \.jsonl\.gz"),
    ],
)
def test_what_matches_nothing_is_named(folder, name, message):
    (folder / "nothing").mkdir()
    (folder / "x.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(DataError, match=message):
        find_sources(name if len(name) < 2 else f"{folder}/{name}")


def test_a_source_that_changes_is_found_out(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("one")
    (source,) = find_sources(str(path))
    source.check_unchanged()
    path.write_text("more")
    with pytest.raises(DataError, match=r"x\.txt: changed while it was being read"):
        source.check_unchanged()
    path.unlink()
    with pytest.raises(DataError, match=r"x\.txt: changed while it was being read"):
        source.check_unchanged()


@given(
    lines=st.lists(st.sampled_from(["", " ", '{"text": "é"}', '{"text": "x"}\r', "[]", '{"text": "long ' + "z" * 60]),
                   max_size=12),
    end=st.sampled_from(["", "\n"]),
    size=st.integers(1, 80),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_spans_of_any_size_hold_the_same_lines(tmp_path_factory, lines, end, size):
    path = tmp_path_factory.mktemp("spans") / "x.jsonl"
    path.write_bytes("\n".join(lines).encode() + end.encode())
    (source,) = find_sources(str(path))
    whole = [record[1:] for span in spans(source, 1 << 30) for record in read(span, max_line_bytes=50)]
    cut = [list(read(span, max_line_bytes=50)) for span in spans(source, size)]
    assert [record[1:] for span in cut for record in span] == whole
    for span in cut:
        assert [record.line for record in span] == list(range(1, len(span) + 1))


@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=8), size=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_units_hold_every_span_once_and_in_order(tmp_path_factory, sizes, size):
    folder = tmp_path_factory.mktemp("units")
    for i, length in enumerate(sizes):
        (folder / f"{i}.{'jsonl' if i % 2 else 'txt'}").write_text("x" * length)
    sources = find_sources(str(folder))
    found = list(units(sources, size))
    assert [span for unit in found for span in unit] == [span for source in sources for span in spans(source, size)]
    assert all(len(unit) == 1 or sum(span.size for span in unit) <= size for unit in found)
