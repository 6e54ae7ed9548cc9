"""The trained tokenizer: fixed ids, any text back from its tokens, the same file from the same input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from data_tools import tokenizer as module
from data_tools.tokenizer import SPECIAL, sample, tokenizer, train
from megatron_lite.errors import ConfigError
from tests.kit.corpora import data_tools, documents, write_jsonl, write_tokenizer

KINDS = ("bpe", "unigram")
SYMBOLS = ["<call>", "über\nalles"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, SentencePieceProcessor]:
    folder = tmp_path_factory.mktemp("models")
    return {k: SentencePieceProcessor(model_file=str(write_tokenizer(folder / f"{k}.model", k))) for k in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_special_ids_and_user_symbols_are_fixed(kind):
    model = SentencePieceProcessor(model_proto=train(documents(300), 350, kind, SYMBOLS))
    assert model.vocab_size() == 350
    assert [model.id_to_piece(i) for i in range(7)] == [*SPECIAL, *SYMBOLS]
    assert list(SPECIAL.values()) == [0, 1, 2, 3, 4]
    assert (model.pad_id(), model.unk_id(), model.bos_id(), model.eos_id()) == (0, 1, 2, 3)
    assert [i for i in range(350) if model.is_byte(i)] == list(range(7, 263))
    assert [i for i in range(350) if model.is_control(i)] == [0, 2, 3]
    text = "x<call>über\nalles<mask>"
    assert model.encode(text)[-3:] == [5, 6, 4]
    assert model.decode(model.encode(text)) == text
    assert not {0, 1, 2, 3} & set(model.encode("<pad><unk><s></s>"))  # typed, they are plain text


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.one_of(st.text(), st.text("\u2581\ufdd0\ufdd1 \n\t\r\0ab<>/⁇\ufeff\u0301é語😀")))
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back(models, kind, text):
    model = models[kind]
    assert model.decode(model.encode(text)) == text
    (tokens,) = model.encode([text.encode()], out_type="numpy", num_threads=1)
    assert model.decode(tokens.tolist()) == text
    assert 1 not in tokens


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_spans_a_line_end_or_a_word_end(models, kind):
    pieces = [models[kind].id_to_piece(i) for i in range(400)]
    assert not [piece for piece in pieces if "\n" in piece]
    assert not [piece for piece in pieces if "▁" in piece.lstrip("▁")]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_input_gives_the_same_file(tmp_path, kind):
    texts = write_jsonl(tmp_path / "x.jsonl", documents(400))
    flags = [f"--input={texts}", "--vocab_size=330", f"--model_type={kind}", "--sample_bytes=20000", "--seed=7"]
    for i in (1, 2):
        done = data_tools("tokenizer", *flags, f"--out={tmp_path}/new/{i}", env={"PYTHONHASHSEED": str(i)})
        done.expect(exit_code=0, stdout=rf"^330 entries from 2\d,\d{{3}} bytes of text: .*/new/{i}\.model\n$")
    assert (tmp_path / "new" / "1.model").read_bytes() == (tmp_path / "new" / "2.model").read_bytes()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["1.model", "2.model"]


@given(
    texts=st.lists(st.text("ab\né", max_size=40), max_size=30), size=st.integers(1, 200), seed=st.integers(0, 3),
    chunk=st.integers(1, 16),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_a_sample_is_as_large_as_asked_and_in_order(texts, size, seed, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", chunk)
        pieces = list(module._chunks(texts))
        drawn = sample(iter(texts), size, seed)
        assert drawn == sample(iter(texts), size, seed)
    assert "".join(pieces) == "".join(texts)
    assert max(map(len, pieces), default=0) <= chunk
    remaining = iter(pieces)
    assert all(piece in remaining for piece in drawn)  # a subsequence
    sizes = [len(piece.encode()) for piece in drawn]
    if sum(len(piece.encode()) for piece in pieces) <= size:
        assert drawn == pieces
    else:  # no more than one chunk too large
        assert size <= sum(sizes) < size + max(sizes)


def test_a_sample_of_much_text_is_spread_over_all_of_it():
    def corpus():
        return (f"{i:08d}\n" * 400 for i in range(20_000))  # 3,600 bytes each, 72 MB in all

    drawn = sample(corpus(), 2_000_000, seed=0)
    assert len(drawn) == -(-2_000_000 // 3600)
    counts, _ = np.histogram([int(text[:8]) for text in drawn], 10, (0, 20_000))
    assert counts.min() > 30  # 56 are expected in each tenth
    assert drawn == sample(corpus(), 2_000_000, seed=0)
    assert drawn != sample(corpus(), 2_000_000, seed=1)


@pytest.mark.parametrize("kind", KINDS)
def test_more_entries_than_the_text_supports_is_one_line(kind):
    with pytest.raises(ConfigError, match=r"^--vocab_size=900: Vocabulary size (is )?too high.*\d") as caught:
        train(["a few words only"], 900, kind)
    assert "\n" not in str(caught.value)


def test_all_mistakes_are_told_at_once(tmp_path):
    flags = {"vocab_size": 261, "model_type": "unigramm", "character_coverage": 0, "sample_bytes": -1}
    with pytest.raises(ConfigError) as caught:
        tokenizer("x.jsonl", f"{tmp_path}/", user_symbols="<a>,<mask>,<a>,<0x41>,a b,a\u2581b", **flags)
    assert str(caught.value).splitlines() == [
        "--model_type=unigramm: expected bpe or unigram (did you mean 'unigram'?)",
        "--character_coverage=0: expected a number above 0 and up to 1",
        "--sample_bytes=-1: expected 0 or more",
        "--user_symbols: <mask> is there already",
        "--user_symbols: <a> is there already",
        "--user_symbols: <0x41> is there already",
        "--user_symbols: 'a b': expected no space, U+2581, U+FDD0 or NUL in a symbol",
        "--user_symbols: 'a▁b': expected no space, U+2581, U+FDD0 or NUL in a symbol",
        "--vocab_size=261: 256 bytes and 11 symbols need more than 267",
        f"--out={tmp_path}/: expected a file name, to which .model is added",
    ]
    assert not list(tmp_path.iterdir())
