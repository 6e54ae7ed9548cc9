"""Every tensor of a model folder is used, redundant and equal, or named in an error, whatever an index says."""

import json
import random
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_lite import convert
from megatron_lite.checkpoint.formats.hf import HuggingFaceSource
from megatron_lite.errors import CheckpointError
from megatron_lite.inference.logits import same_as_transformers
from megatron_lite.layers.positions import rope_frequencies
from tests.kit.foreign import assert_read_as_theirs, owner_of, random_folder, small_config
from tests.kit.optional import optional

optional("transformers", "hf")

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PART = "model-00001-of-00002.safetensors"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q = "model.layers.0.self_attn.q_proj"
LLAMA = small_config("llama")
TIED = {**LLAMA, "tie_word_embeddings": True}
LINEAR = {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Folders that transformers wrote, with their models."""
    made = {}

    def get(tree):
        key = json.dumps(tree)
        if key not in made:
            path = tmp_path_factory.mktemp("sound") / "model"
            made[key] = path, random_folder(path, tree)
        return made[key]

    return get


def frequencies(scale=1.0, dtype=torch.float32):
    return (rope_frequencies(8, 10000.0, None) * scale).to(dtype)


def mistral_layout(tensors):
    """The same under Mistral's own names, pairs of neighbours rotated."""
    names = {"embed_tokens": "tok_embeddings", "input_layernorm": "attention_norm", "norm": "norm", "lm_head": "output"}
    names |= {"post_attention_layernorm": "ffn_norm"} | {f"self_attn.{x}_proj": f"attention.w{x}" for x in "qkvo"}
    names |= {"mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3"}
    found = {}
    for name, tensor in tensors.items():
        parts = name.removesuffix(".weight").removeprefix("model.").split(".")
        prefix, stem = (
            (".".join(parts[:2]) + ".", ".".join(parts[2:])) if parts[0] == "layers" else ("", ".".join(parts))
        )
        if stem in ("self_attn.q_proj", "self_attn.k_proj"):
            tensor = tensor.view(-1, 2, 4, 32).transpose(1, 2).reshape(-1, 32)
        found[f"{prefix}{names[stem]}.weight"] = tensor.contiguous()
    return found


def more(folder, extra, file=SINGLE):
    """Put tensors into a file; ``None`` takes one out."""
    path = folder / file
    tensors = {**(load_file(path) if path.exists() else {}), **extra}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}, path)


def write_index(folder, files):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def split(folder, changes=()):
    """Two files and an index instead of one file."""
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    files = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    write_index(folder, {name: file for name, file in {**files, **dict(changes)}.items() if file is not None})
    return tensors, files


def of(name):
    return lambda folder: load_file(folder / SINGLE)[name]


ACCEPTED = {
    "a head equal to the embedding": (TIED, lambda f: more(f, {HEAD: of(EMBEDDING)(f).clone()})),
    "wider, and equal": (TIED, lambda f: more(f, {HEAD: of(EMBEDDING)(f).double()})),
    "frequencies": (LLAMA, lambda f: more(f, {"model.layers.1.self_attn.rotary_emb.inv_freq": frequencies()})),
    "rounded frequencies": (LLAMA, lambda f: more(f, {"model.rotary_emb.inv_freq": frequencies(dtype=torch.float16)})),
    "frequencies before the scaling": (LINEAR, lambda f: more(f, {"model.rotary_emb.inv_freq": frequencies()})),
    "frequencies after the scaling": (LINEAR, lambda f: more(f, {"model.rotary_emb.inv_freq": frequencies(0.5)})),
    "masks": (
        small_config("gpt2"),
        lambda f: more(
            f,
            {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64).tril().bool()}
            | {"transformer.h.1.attn.masked_bias": torch.tensor(-1e9)},
        ),
    ),
    "an index": (LLAMA, split),
    "an index that lacks a tensor": (LLAMA, lambda f: split(f, {HEAD: None})),
    "an equal copy in a file beside": (LLAMA, lambda f: more(f, {HEAD: of(HEAD)(f)}, "other.safetensors")),
    "the base saved alone": (
        TIED,
        lambda f: save_file({n.removeprefix("model."): t for n, t in load_file(f / SINGLE).items()}, f / SINGLE),
    ),
    "all of it in one file beside an index": (
        LLAMA,
        lambda f: save_file(split(f)[0], f / SINGLE),
    ),
    "Mistral's own file": (
        small_config("mistral"),
        lambda f: save_file(mistral_layout(load_file(f / SINGLE)), f / "consolidated.safetensors"),
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_says_the_same_is_redundant(sound, tmp_path, name):
    tree, change = ACCEPTED[name]
    path, theirs = sound(tree)
    folder = shutil.copytree(path, tmp_path / "model")
    change(folder)
    assert_read_as_theirs(folder, theirs)


def altered_mistral(folder):
    tensors = mistral_layout(load_file(folder / SINGLE))
    tensors["layers.1.attention.wq.weight"][5, 5] += 1e-3
    save_file(tensors, folder / "consolidated.safetensors")


NAMED = {
    "a head of its own": (TIED, lambda f: more(f, {HEAD: torch.rand(101, 32)}), "tie_word_embeddings=true, but"),
    "a head of another size": (TIED, lambda f: more(f, {HEAD: torch.rand(9, 32)}), "tie_word_embeddings=true, but"),
    "no head": (LLAMA, lambda f: more(f, {HEAD: None}), "lacks lm_head.weight"),
    "no tensor": (LLAMA, lambda f: more(f, {f"{Q}.weight": None}), f"lacks {Q}.weight"),
    "a bias": (LLAMA, lambda f: more(f, {f"{Q}.bias": torch.rand(32)}), f"no use for {Q}.bias"),
    "a norm of queries": (LLAMA, lambda f: more(f, {f"{Q[:-6]}q_norm.weight": torch.rand(8)}), "no use for .*q_norm"),
    "an adapter inside": (LLAMA, lambda f: more(f, {f"{Q}.lora_A.weight": torch.rand(2, 32)}), "no use for .*lora_A"),
    "a layer too many": (
        LLAMA,
        lambda f: more(f, {"model.layers.2.input_layernorm.weight": torch.rand(32)}),
        r"no use for model\.layers\.2",
    ),
    "scales": (LLAMA, lambda f: more(f, {f"{Q}.weight_scale": torch.rand(1)}), "no use for .*weight_scale"),
    "packed": (
        LLAMA,
        lambda f: more(f, {f"{Q}.weight": None, f"{Q}.qweight": torch.ones(4, 32, dtype=torch.int32)}),
        f"lacks {Q}.weight; it has {Q}.qweight",
    ),
    "8 bits": (
        LLAMA,
        lambda f: more(f, {f"{Q}.weight": of(f"{Q}.weight")(f).to(torch.float8_e4m3fn)}),
        "float8_e4m3fn: quantised weights are not read",
    ),
    "other frequencies": (
        LLAMA,
        lambda f: more(f, {"model.rotary_emb.inv_freq": frequencies(0.5)}),
        r"inv_freq holds other frequencies than config\.json implies",
    ),
    "frequencies that are none": (
        LLAMA,
        lambda f: more(f, {"model.rotary_emb.inv_freq": torch.ones(4, dtype=torch.int32)}),
        "holds other frequencies",
    ),
    "another mask": (
        small_config("gpt2"),
        lambda f: more(f, {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64)}),
        "is not a causal mask",
    ),
    "an index of what is missing": (LLAMA, lambda f: split(f, {"x": PART}), "lacks 'x'"),
    "a tensor moved in the index": (
        LLAMA,
        lambda f: split(f, {HEAD: "model-00002-of-00002.safetensors"}),
        "lacks 'lm_head.weight', which the index says is there",
    ),
    "two of a name": (
        LLAMA,
        lambda f: more(f, {HEAD: of(HEAD)(f) + 1}, "other.safetensors"),
        r"lm_head.weight differs between model.safetensors and other.safetensors",
    ),
    "an older file beside an index": (
        LLAMA,
        lambda f: save_file({n: t * 2 for n, t in split(f)[0].items()}, f / SINGLE),
        r"differs between model-0000\d-of-00002.safetensors and model.safetensors",
    ),
    "a file that no index names": (
        LLAMA,
        lambda f: (split(f), save_file({"extra": torch.rand(2)}, f / "extra.safetensors")),
        "no use for extra",
    ),
    "half with a prefix": (
        LLAMA,
        lambda f: more(f, {"norm.weight": of("model.norm.weight")(f), "model.norm.weight": None}),
        "norm.weight lacks the prefix that other",
    ),
    "Mistral's own file with other numbers": (
        small_config("mistral"),
        altered_mistral,
        r"layers\.1\.attention\.wq\.weight differs from model\.layers\.1\.self_attn\.q_proj\.weight",
    ),
    "an adapter beside": (LLAMA, lambda f: (f / "adapter_config.json").write_text("{}"), "adapter_config.json be"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_what_says_something_else_is_named(sound, tmp_path, name):
    tree, change, said = NAMED[name]
    folder = shutil.copytree(sound(tree)[0], tmp_path / "model")
    change(folder)
    with pytest.raises(CheckpointError, match=said):
        HuggingFaceSource(folder)
    with pytest.raises(CheckpointError, match=said):
        convert.import_hf(folder, tmp_path / "ours", 1, 128)
    assert not (tmp_path / "ours").exists()


def test_layers_without_number_are_no_wait(sound, tmp_path):
    """A config's count is not believed before the files are seen to hold so many."""
    folder = shutil.copytree(sound(LLAMA)[0], tmp_path / "llama")
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | {"num_hidden_layers": 10**7}))
    with pytest.raises(CheckpointError, match="its config has 10000000 layers, its files hold"):
        HuggingFaceSource(folder)


def test_an_import_that_is_read_otherwise_than_theirs_is_not_committed(sound, tmp_path, monkeypatch, capsys):
    folder, theirs = sound(LLAMA)
    convert.import_hf(folder, tmp_path / "ours", 1, 128)
    assert "transformers' logits equal ours within " in capsys.readouterr().out
    load = type(theirs).from_pretrained

    def other(*args, **keys):
        model = load(*args, **keys)
        model.model.norm.weight.data[3] += 0.1
        return model

    monkeypatch.setattr(type(theirs), "from_pretrained", other)
    with pytest.raises(CheckpointError, match="transformers' logits differ from ours by 0"):
        convert.import_hf(folder, tmp_path / "other", 1, 128)
    assert not (tmp_path / "other").exists()
    monkeypatch.setattr(type(theirs), "from_pretrained", lambda *_, **__: 1 / 0)
    told = same_as_transformers(HuggingFaceSource(folder), folder)
    assert told.endswith("cannot read it: division by zero")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert same_as_transformers(HuggingFaceSource(folder), folder).endswith(
        "not compared: transformers is not installed"
    )


# Folders that nobody made by hand: some changes after each other to what is in one, in its files, index or config.
KEYS = {
    "rope_theta": (500.0, 10000.0, None),
    "rope_scaling": ({"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 1.0}, None, {}),
    "rope_parameters": ({"rope_theta": 500.0}, {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}, None),
    "tie_word_embeddings": (True, False),
    "attention_bias": (True, False),
    "mlp_bias": (True, False),
    "sliding_window": (8, None, 64),
    "use_sliding_window": (True, False),
    "max_window_layers": (0, 1, 2),
    "layer_types": (["full_attention"] * 2, ["sliding_attention"] * 2, None),
    "num_key_value_heads": (2, 4, None),
    "head_dim": (8, 16, None),
    "partial_rotary_factor": (0.5, 1.0),
    "original_max_position_embeddings": (16,),
    "rms_norm_eps": (1e-6, 1e-2),
    "layer_norm_epsilon": (1e-2,),
    "hidden_size": (32, 64),
    "num_hidden_layers": (1, 2),
    "n_layer": (1, 2),
    "max_position_embeddings": (64, 32),
    "torch_dtype": ("float16",),
    "dtype": ("float32",),
    "is_causal": (False, True),
    "logit_scale": (2.0, 1.0),
    "use_mrope": (True, False),
    "unsloth_version": ("2025",),
    "architectures": (["X"],),
}
KINDS = ("llama", "qwen2", "qwen3", "mistral", "gpt2")
CHANGES = ("drop", "double", "rename", "bare", "equal", "other file", "index", "index", "key", "key", "no key")


def change(folder, kind, rng):
    """One change to a folder."""
    what, tree = rng.choice(CHANGES), json.loads((folder / "config.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    file = rng.choice(files)
    tensors = load_file(folder / file)
    name = rng.choice(sorted(tensors)) if tensors else "none"
    tensor = tensors.get(name, torch.zeros(1))
    if what in ("key", "no key"):
        key = rng.choice(sorted(KEYS if what == "key" else tree.keys() - {"model_type"}))
        tree.pop(key, None)
        if what == "key":
            tree[key] = rng.choice(KEYS[key])
        (folder / "config.json").write_text(json.dumps(tree))
    elif what == "index":
        if INDEX not in {path.name for path in folder.iterdir()}:
            if files == [SINGLE]:
                split(folder)
            return
        index = json.loads((folder / INDEX).read_text())["weight_map"]
        key = rng.choice(sorted(index))
        index[key] = rng.choice(files)
        if rng.random() < 0.5:
            del index[key]
        write_index(folder, index)
    elif what == "other file":
        other = rng.choice([x for x in (SINGLE, "z.safetensors", *files) if x != file])
        more(folder, {name: tensor if rng.random() < 0.5 else tensor * 2}, other)
    else:
        changes = {
            "drop": {name: None},
            "double": {rng.choice(["", "copy.", "model."]) + name: tensor},
            "rename": {
                name: None,
                name.replace("layers.0", "layers.1").replace("h.0", "h.1") + "x" * (rng.random() < 0.3): tensor,
            },
            "bare": dict.fromkeys(tensors) | {n.partition(".")[2]: t for n, t in tensors.items()},
            "equal": {HEAD: tensors.get(EMBEDDING if kind != "gpt2" else "transformer.wte.weight", tensor).clone()},
        }
        more(folder, changes[what], file)


def never_silently_wrong(rng, sound, tmp_path_factory):
    """Whether a folder is read, and then as transformers reads it; what that does not find is what was saved."""
    kind = rng.choice(KINDS)
    path, saved = sound({**small_config(kind), "tie_word_embeddings": rng.random() < 0.5})
    folder = shutil.copytree(path, tmp_path_factory.mktemp("made") / "model")
    for _ in range(rng.randint(1, 3)):
        change(folder, kind, rng)
    try:
        HuggingFaceSource(folder)
    except CheckpointError as error:
        assert str(folder) in str(error)
        return False
    theirs, info = owner_of(kind)[1].from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    theirs.config.return_dict = True
    assert_read_as_theirs(folder, saved if info["missing_keys"] else theirs.eval())
    return True


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.randoms())
def test_folders_that_nobody_made_are_never_silently_wrong(sound, tmp_path_factory, rng):
    never_silently_wrong(rng, sound, tmp_path_factory)


@pytest.mark.slow
def test_more_of_them(sound, tmp_path_factory):
    read = sum(never_silently_wrong(random.Random(seed), sound, tmp_path_factory) for seed in range(1000))
    assert 200 < read < 900
