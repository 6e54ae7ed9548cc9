"""Folders of Hugging Face: the tokens are transformers', every key of theirs counts, is harmless, or is refused."""

import hashlib
import inspect
import json
import re
import shutil

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from megatron_lite.data import hf_tokenizer
from megatron_lite.data.tokenizer import SentencePiece, load_tokenizer, tokenizer_files
from megatron_lite.errors import DataError
from megatron_lite.families.huggingface import MODEL_TYPES
from tests.kit.corpora import write_json_tokenizer, write_tokenizer
from tests.kit.tokenizers import CHAT, WORDS, fast, fast_folder, sentencepiece, slow_folder, token, write


def merges_folder(folder, tokenizer_class=None, **files):
    """As GPT-2 was saved before there was a tokenizer.json."""
    model = json.loads(fast("bytes"))["model"]
    n = len(model["vocab"])
    return write(
        folder,
        vocab_json=model["vocab"],
        merges_txt="\n".join(["#version: 0.2", *map(" ".join, model["merges"])]),
        tokenizer_config_json={"tokenizer_class": tokenizer_class, "eos_token": "<|endoftext|>"},
        added_tokens_json={"<|endoftext|>": n, "<extra>": n + 1},
        **files,
    )


LISTED = {"<|im_end|>": 0, "<|im_start|>": 1, "<extra>": 2}
FOLDERS = {
    "slow": slow_folder,
    "slow, legacy": lambda folder: slow_folder(folder, legacy=True, add_bos_token=True),
    "slow unigram": lambda folder: slow_folder(folder, "unigram", add_eos_token=True),
    "slow, common class": lambda folder: slow_folder(folder, config={"model_type": "mistral"}),
    "slow, own symbols": lambda folder: slow_folder(
        folder, spm=(("user_defined_symbols", "<mask>,<sep>"), ("normalization_rule_name", "identity"))
    ),
    "slow, older files": lambda folder: write(
        folder,
        tokenizer_model=sentencepiece("bpe"),
        tokenizer_config_json={"tokenizer_class": "LlamaTokenizer", "add_bos_token": True},
        added_tokens_json={text: 330 + i for text, i in LISTED.items()},
        special_tokens_map_json={"eos_token": token("<|im_end|>"), "additional_special_tokens": ["<|im_start|>"]},
    ),
    "bytes": fast_folder,
    "bytes, GPT-2": lambda folder: fast_folder(folder, tokenizer_class="GPT2Tokenizer", add_prefix_space=True),
    "bytes, Qwen": lambda folder: fast_folder(folder, tokenizer_class="Qwen2Tokenizer", config={"model_type": "qwen2"}),
    "bytes, by the model": lambda folder: fast_folder(folder, tokenizer_class=None, config={"model_type": "gpt2"}),
    "vocabulary and merges": lambda folder: merges_folder(folder, tokenizer_class="GPT2Tokenizer"),
    "merges, by the model": lambda folder: merges_folder(folder, config_json={"model_type": "qwen2"}),
    "metaspace": lambda folder: fast_folder(folder, "metaspace"),
    "metaspace, Llama": lambda folder: fast_folder(folder, "metaspace", tokenizer_class="LlamaTokenizerFast"),
    "metaspace, Mistral": lambda folder: fast_folder(
        folder, "metaspace", tokenizer_class="LlamaTokenizer", config={"model_type": "mistral"}
    ),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Each folder's tokenizer as transformers has it, and as we do."""
    root = tmp_path_factory.mktemp("folders")
    made = {name: make(root / f"{i}") for i, (name, make) in enumerate(FOLDERS.items())}
    return {name: (transformers.AutoTokenizer.from_pretrained(f), load_tokenizer(f)) for name, f in made.items()}


def same(theirs, ours, text):
    """Without specials, with them, and back. A text that begins with bos gets none from us, which they double."""
    bare = theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text, special=True) == ours.encode_spans(text).tokens.tolist() == bare
    whole = theirs(text)["input_ids"]
    assert [*ours.begin, *bare, *ours.end] == whole
    if bare and bare[0] != ours.bos_id and bare[-1] != ours.eos_id:
        assert ours.encode_prompt(text) == whole
    assert ours.decode(whole) == theirs.decode(whole, skip_special_tokens=True)


TEXT = st.lists(
    st.one_of(
        st.sampled_from([*WORDS, *CHAT, "<s>", "</s>", "<unk>", " ", "  ", "\n", "\t", "▁", "ﬁ", "<|im_", "words"]),
        st.text(max_size=4),
    ),
    max_size=12,
).map("".join)


@pytest.mark.parametrize("name", FOLDERS)
def test_tokens_are_those_of_transformers(pairs, name):
    theirs, ours = pairs[name]
    assert (ours.bos_id, ours.eos_id) == tuple(
        -1 if each is None else each for each in (theirs.bos_token_id, theirs.eos_token_id)
    )
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1

    @given(text=TEXT)
    @settings(max_examples=80, deadline=None)
    def check(text):
        same(theirs, ours, text)

    check()


VALUES = {
    **dict.fromkeys(hf_tokenizer.FLAGS, True),
    "errors": "ignore",
    "add_prefix_space": False,
    "tokenizer_class": "GPT2Tokenizer",
    "added_tokens_decoder": {"0": token("<unk>", special=True), "330": token("cat sat", special=True)},
    "additional_special_tokens": ["cat"],
    "extra_special_tokens": ["dog"],
    "model_specific_special_tokens": {"image_token": "mat"},
    "bos_token": "cat",
    "eos_token": {"__type": "AddedToken", **token("hello", lstrip=True)},
    **{f"{name}_token": f"<{name}>" for name in ("unk", "pad", "sep", "cls", "mask", "image")},
}
PROBES = [
    "hello cat  sat",
    "<|im_start|> who <|im_end|> naïve",
    "x <image> a <pad>b<sep>",
    "the mat <unk> dog",
    " <s> cat",
]


HONOURED = sorted(hf_tokenizer.HONOURED | {key for key in VALUES if key.endswith("_token")})


@pytest.mark.parametrize(
    ("make", "key"),
    [
        *((slow_folder, key) for key in HONOURED),
        *((fast_folder, key) for key in HONOURED if key != "added_tokens_decoder"),  # which are in tokenizer.json
    ],
)
def test_what_is_honoured_changes_tokens_as_theirs(tmp_path, make, key):
    folder = make(tmp_path / "f", **{key: VALUES[key]})
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for text in PROBES:
        same(theirs, ours, text)


def keys_of_transformers() -> set[str]:
    """Every key that their classes take, by signature or out of what is left."""
    base, backend = PreTrainedTokenizerBase, transformers.TokenizersBackend
    read = (base.__init__, base._from_pretrained, backend.__init__, backend.convert_to_native_format)
    calls = r"kwargs\.(?:pop|get|setdefault)\(\s*\"(\w+)\"|\"(\w+)\" (?:not )?in (?:init_)?kwargs"
    found = {a or b for each in read for a, b in re.findall(calls, inspect.getsource(each))}
    found |= set(re.findall(r"^        (\w+) \(`", base.__init__.__doc__ or base.__doc__ or "", re.MULTILINE))
    for name in ("LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "GemmaTokenizer", "PreTrainedTokenizerFast"):
        found |= set(inspect.signature(getattr(transformers, name).__init__).parameters)
    return found - {"self", "args", "kwargs"}


def test_each_of_their_keys_counts_or_is_harmless_or_refused(tmp_path):
    refused = set()
    for key in keys_of_transformers() - hf_tokenizer.HONOURED - hf_tokenizer.HARMLESS:
        if key.endswith("_token") or key.startswith("_"):
            continue
        with pytest.raises(DataError, match=rf"tokenizer_config\.json: '{key}': unknown, and may change the tokens"):
            load_tokenizer(slow_folder(tmp_path / "f", **{key: "own"}))
        refused.add(key)
    assert {"gguf_file", "tokenizer_object", "fix_mistral_regex", "vocab"} <= refused


@pytest.mark.parametrize("make", [slow_folder, fast_folder])
def test_what_is_harmless_changes_nothing_of_theirs(tmp_path, make):
    plain = transformers.AutoTokenizer.from_pretrained(make(tmp_path / "plain"))
    values = {
        **{"padding_side": "left", "truncation_side": "left", "model_input_names": ["input_ids"]},
        **{"chat_template": "x", "model_max_length": 3, "sp_model_kwargs": {"alpha": 0.1}},
        **{"chat_control_tokens": ["a"], "pad_to_multiple_of": 8, "unsloth_version": "1"},
    }
    not_theirs = {"backend", "processor_class", "auto_map", "model_type"}  # some look for code, some trip over one
    keys = hf_tokenizer.HARMLESS - not_theirs | {"unsloth_version"}
    folder = make(tmp_path / "f", **{key: values.get(key, True) for key in keys})
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for text in PROBES:
        assert theirs(text)["input_ids"] == plain(text)["input_ids"]
        same(theirs, ours, text)


def listed(text, number, **more):
    return {"added_tokens_decoder": {number: token(text, special=True, **more)}}


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (listed("<x>", "335"), "'<x>' is to be token 335, but would be 330"),
        (listed("<x>", "300"), "'<x>' is to be token 300, but would be 330"),
        (listed("<x>", "-1"), "'-1' is not a token id"),
        (listed("<x>", str(2**31)), "2147483648 is not a token id"),
        (listed("<x>", "9" * 40), "'9{40}' is not a token id"),
        (listed("", "330"), "'' is not a valid text of an added token"),
        (listed("\ud800", "330"), r"'\\ud800' is not a valid text of an added token"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder: expected tokens by their numbers"),
        (
            {"added_tokens_decoder": {"330": token("<x>"), "331": token("<x>")}},
            "added token '<x>' has two numbers, 330 and 331",
        ),
        (
            {"added_tokens_decoder": {"330": token("<x>"), "0330": token("<y>")}},
            "two added tokens, '<x>' and '<y>', have the number 330",
        ),
        ({"eos_token": "\ud800"}, "LlamaTokenizer does not read it: .*surrogates not allowed"),
        ({"eos_token": 5}, "'eos_token': expected a token, found 5"),
        ({"legacy": "no"}, "'legacy': expected true or false, found \"no\""),
        ({"do_weird": 1, "so_too": 1}, "'do_weird', 'so_too': unknown, and may change the tokens"),
        ({"tokenizer_class": "Trainer"}, 'tokenizer_class "Trainer" is not one of transformers\' tokenizers'),
        ({"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["o.Own", None]}}, "OwnTokenizer is code"),
        ({"tokenizer_class": "CanineTokenizer"}, "tokenizer_class CanineTokenizer is not supported"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, keys, told):
    with pytest.raises(DataError, match=f"{tmp_path}.*{told}") as raised:
        load_tokenizer(slow_folder(tmp_path / "f", **keys))
    assert "\n" not in str(raised.value)


def changed(**fields):
    tree = json.loads(fast("bytes"))
    for path, value in fields.items():
        *parents, last = path.split("__")
        at = tree
        for name in parents:
            at = at[name]
        at[last] = value
    return tree


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"tokenizer_config_json": '{"eos_token": "a", "eos_token": "b"}'}, "'eos_token' is a duplicate key"),
        ({"tokenizer_config_json": "[]"}, "expected an object"),
        ({"tokenizer_json": "{}"}, "is not a tokenizer.json: Model missing"),
        ({"tokenizer_json": changed(added_tokens=[{"id": 9000, **token("<y>", special=True)}])}, "to be token 9000"),
        ({"tokenizer_json": changed(model__dropout=0.5)}, "leaves out merges at random"),
        (
            {"tokenizer_json": changed(post_processor__single=[{"Sequence": {"id": "A", "type_id": 0}}] * 2)},
            "its post-processor does not only put tokens before and after a text",
        ),
        ({"added_tokens_json": {"<y>": 1.5}}, "added token '<y>': 1.5 is not a token id"),
        (
            {"special_tokens_map_json": {"tokenizer_object": "x"}},
            "special_tokens_map.json: 'tokenizer_object': unknown",
        ),
    ],
)
def test_other_files_that_cannot_be(tmp_path, files, told):
    with pytest.raises(DataError, match=f"{tmp_path}.*{told}"):
        load_tokenizer(write(tmp_path / "f", **{"tokenizer_json": fast("bytes"), **files}))


def test_a_digest_covers_what_changes_tokens_and_is_otherwise_the_files(tmp_path):
    plain = load_tokenizer(write_tokenizer(tmp_path / "tokenizer.model"))
    assert isinstance(plain, SentencePiece)
    assert plain.sha256 == hashlib.sha256((tmp_path / "tokenizer.model").read_bytes()).hexdigest()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert load_tokenizer(tmp_path).sha256 == plain.sha256
    gpt2 = write(  # built anew, it is what its file says
        tmp_path / "gpt2",
        tokenizer_json=fast("bytes").replace('"</s>"', '"<|endoftext|>"'),
        tokenizer_config_json={"tokenizer_class": "GPT2Tokenizer"},
    )
    for folder in (write_json_tokenizer(tmp_path / "hf"), fast_folder(tmp_path / "f"), gpt2):
        assert load_tokenizer(folder).sha256 == hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    seen = {
        load_tokenizer(make(tmp_path / "f", **keys)).sha256
        for make, keys in (
            *((slow_folder, keys) for keys in ({}, {"legacy": True}, {"pad_token": "<new>"})),
            *((fast_folder, keys) for keys in ({}, {"pad_token": "<new>"}, {"tokenizer_class": "Qwen2Tokenizer"})),
        )
    }
    assert len(seen) == 6


def test_the_class_is_the_one_that_transformers_takes_by_the_model():
    for kind in MODEL_TYPES:
        theirs = TOKENIZER_MAPPING_NAMES.get(kind)
        theirs = "TokenizersBackend" if theirs == "MistralCommonBackend" else theirs
        assert hf_tokenizer.REGISTERED.get(kind) == theirs
        assert (kind in hf_tokenizer._OWN_CLASS_WINS) == (kind in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS)


def test_what_lies_beside_a_file_named_as_theirs_counts(tmp_path):
    folder = slow_folder(tmp_path / "f")
    assert load_tokenizer(folder / "tokenizer.model").vocab_size == load_tokenizer(folder).vocab_size == 334
    shutil.copy(folder / "tokenizer.model", tmp_path / "f" / "own.model")
    assert load_tokenizer(folder / "own.model").vocab_size == 330
    assert tokenizer_files(slow_folder(folder, config={"model_type": "mistral"})).keys() == {
        *("tokenizer.model", "tokenizer_config.json")
    }


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_a_tokenizer_json_by_itself_stays_what_it_is_beside_a_model(tmp_path, kind):
    ours = load_tokenizer(write(tmp_path / "own", tokenizer_json=fast("metaspace")))
    files = hf_tokenizer.named(tokenizer_files(tmp_path / "own"), kind)
    exported = write(tmp_path / "out", config_json={"model_type": kind})
    for name, content in files.items():
        (exported / name).write_bytes(content)
    theirs, back = transformers.AutoTokenizer.from_pretrained(exported), load_tokenizer(exported)
    for text in PROBES:
        assert theirs(text)["input_ids"] == ours.encode_prompt(text) == back.encode_prompt(text)
    assert back.sha256 == ours.sha256


def test_what_is_around_a_text_is_what_the_post_processor_adds_or_is_asked_for(tmp_path):
    ours = load_tokenizer(write(tmp_path / "own", tokenizer_json=fast("bytes")))
    bos, eos = ours.special["<s>"], ours.special["</s>"]
    assert (ours.bos_id, ours.eos_id) == (-1, eos)  # nothing names a bos, but one is added
    assert ours.around() == ours.around(bos=True) == ([bos], [])
    assert ours.around(False, True) == ([], [eos])
    assert ours.names() == {"bos_token": "", "eos_token": "</s>", "pad_token": "</s>"}
    theirs = load_tokenizer(fast_folder(tmp_path / "f", pad_token="<|im_start|>", cls_token="<extra>"))
    assert theirs.names() == {
        **{"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|im_start|>", "cls_token": "<extra>"}
    }


def test_a_vocabulary_that_belongs_to_no_class_is_refused(tmp_path):
    with pytest.raises(DataError, match="nothing says which tokenizer it belongs to"):
        load_tokenizer(write(tmp_path / "f", vocab_json={"a": 0}, merges_txt=""))
