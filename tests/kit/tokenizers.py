"""Folders with tokenizers as Hugging Face's models have them, small."""

from __future__ import annotations

import io
import json
import shutil
from functools import lru_cache
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = ["the", "a", "cat", "dog", "sat", "on", "mat", "who", "are", "you", "hello", "world", "naïve", "①"]
CORPUS = [" ".join(WORDS[(i * i + k) % len(WORDS)] for i in range(k, k + 9)) for k in range(400)]
CHAT = ["<|im_end|>", "<|im_start|>", "<extra>", "wordy"]


def token(text, **more):
    return {"content": text, **dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False), **more}


@lru_cache
def sentencepiece(kind: str, *more: tuple[str, object]) -> bytes:
    """As people train one: text is normalised, and a space begins it."""
    written = io.BytesIO()
    SentencePieceTrainer.train(
        **{"sentence_iterator": iter(CORPUS), "model_writer": written, "model_type": kind, "vocab_size": 330},
        **{"byte_fallback": True, "hard_vocab_limit": False, "minloglevel": 2, **dict(more)},
    )
    return written.getvalue()


@lru_cache
def fast(kind: str) -> str:
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    if kind == "bytes":
        model = Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    else:
        model = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        model.decoder = decoders.Sequence(steps)
        trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=special)
    model.train_from_iterator(CORPUS, trainer)
    tree = json.loads(model.to_str())
    tree["added_tokens"] = [each for each in tree["added_tokens"] if not each["content"].startswith("<0x")]  # pieces
    model = Tokenizer.from_str(json.dumps(tree))
    model.add_special_tokens(["<s>", "</s>", "<|im_end|>", AddedToken("<|im_start|>", lstrip=True)])
    model.add_tokens([AddedToken("<extra>", rstrip=True), AddedToken("wordy", single_word=True)])
    begin = ("<s>", model.token_to_id("<s>"))
    model.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[begin])
    return model.to_str()


def write(folder: Path, **files) -> Path:
    """A folder of these files, of which the name's last _ is its dot."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        path = folder / ".".join(name.rsplit("_", 1))
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def slow_folder(folder: Path, kind: str = "bpe", spm=(), config=None, **keys) -> Path:
    """A sentencepiece model with added tokens, as fine-tunes of Llama 2 have them."""
    content = sentencepiece(kind, *spm)
    n = SentencePieceProcessor(model_proto=content).vocab_size()
    added = {
        **{"0": token("<unk>", special=True), "1": token("<s>", special=True), "2": token("</s>", special=True)},
        **{str(n): token("<|im_end|>", special=True), str(n + 1): token("<|im_start|>", special=True, lstrip=True)},
        **{str(n + 2): token("<extra>", rstrip=True, normalized=True), str(n + 3): token("wordy", single_word=True)},
    }
    tree = {
        **{"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": added},
        **{"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"},
    }
    more = {} if config is None else {"config_json": config}
    return write(folder, tokenizer_model=content, tokenizer_config_json={**tree, **keys}, **more)


def fast_folder(folder: Path, kind: str = "bytes", config=None, **keys) -> Path:
    tree = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>"}
    more = {} if config is None else {"config_json": config}
    return write(folder, tokenizer_json=fast(kind), tokenizer_config_json={**tree, **keys}, **more)
