"""Megatron-LM's arguments and files: each is honoured as its core means it, changes nothing, or is refused by name."""

import argparse
import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_lite import convert
from megatron_lite.checkpoint.formats.megatron import open_megatron
from megatron_lite.checkpoint.formats.megatron_args import from_args
from megatron_lite.errors import CheckpointError
from tests.kit.foreign import GPT2, LLAMA, megatron_logits, megatron_model, run_megatron
from tests.kit.optional import optional
from tests.kit.world import run_ranks

optional("megatron")

# What is asked for: arguments; the same of a TransformerConfig and of GPTModel.
HONOURED = {
    "llama": ("llama", {}, {}, {}),
    "gpt2": ("gpt2", {}, {}, {}),
    "rotary_base": ("llama", {"rotary_base": 777}, {}, {"rotary_base": 777}),
    "llama 3 scaling": ("llama", {"use_rope_scaling": True}, {}, {"rope_scaling": True}),
    "llama 3 scaling by 32": (
        "llama",
        {"use_rope_scaling": True, "rope_scaling_factor": 32.0},
        {},
        {"rope_scaling": True, "rope_scaling_factor": 32.0},
    ),
    "interpolation": (
        "llama",
        {"rotary_seq_len_interpolation_factor": 4},
        {},
        {"seq_len_interpolation_factor": 4},
    ),
    "legacy rope": (
        "llama",
        {"position_embedding_type": "learned_absolute", "use_rotary_position_embeddings": True},
        {},
        {},
    ),
    "epsilon": ("llama", {"norm_epsilon": 0.05}, {"layernorm_epsilon": 0.05}, {}),
    "epsilon, new name": ("gpt2", {"norm_epsilon": ..., "layernorm_epsilon": 0.05}, {"layernorm_epsilon": 0.05}, {}),
    "normed queries and keys": ("llama", {"qk_layernorm": True}, {"qk_layernorm": True}, {}),
    "bias of q, k, v": ("llama", {"add_qkv_bias": True}, {"add_qkv_bias": True}, {}),
    "biases": ("llama", {"add_bias_linear": True}, {"add_bias_linear": True}, {}),
    "biases, old name": (
        "llama",
        {"disable_bias_linear": False, "add_bias_linear": ...},
        {"add_bias_linear": True},
        {},
    ),
    "no groups": ("llama", {"group_query_attention": False}, {"num_query_groups": 4}, {}),
    "wide heads": ("llama", {"kv_channels": 16}, {"kv_channels": 16}, {}),
    "tied": (
        "llama",
        {"untie_embeddings_and_output_weights": False},
        {},
        {"share_embeddings_and_output_weights": True},
    ),
}


def changed(args: argparse.Namespace, changes: dict) -> argparse.Namespace:
    return argparse.Namespace(**{name: value for name, value in (vars(args) | changes).items() if value is not ...})


def save_each(rank: int, size: int, folder: str) -> None:
    """Every one of these models in files of Megatron's, with its logits."""
    run_megatron(size)
    for name, (family, changes, settings, others) in HONOURED.items():
        args, model = megatron_model(family, settings, others)
        place = Path(folder) / name / f"mp_rank_{rank:02d}"
        place.mkdir(parents=True)
        saved = {"args": changed(args, changes), "checkpoint_version": 3.0, "model": model.state_dict()}
        torch.save(saved, place / "model_optim_rng.pt")
        logits = megatron_logits(model)[:, -1]
        if rank == 0:
            torch.save(logits, place.parent / "logits")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("megatron")
    run_ranks(save_each, 2, str(folder), timeout=200)
    return folder


def logits(source) -> torch.Tensor:
    with torch.no_grad():
        return convert.load_model(source)(torch.arange(24).unsqueeze(0) * 5 % 99)


@pytest.mark.parametrize("name", HONOURED)
def test_what_is_honoured_is_what_its_core_computes(saved, name):
    want = torch.load(saved / name / "logits")
    assert (logits(open_megatron(saved / name)) - want).abs().max() <= 1e-5 * want.abs().max()


def test_each_of_these_changes_the_logits(saved):
    """Else nothing would be shown."""
    base = {family: torch.load(saved / family / "logits") for family in ("llama", "gpt2")}
    for name, (family, *_) in HONOURED.items():
        moved = not torch.allclose(torch.load(saved / name / "logits"), base[family], atol=1e-6)
        assert moved == (name not in (*base, "legacy rope")), name


def staged(saved: Path, to: Path, stages: list[list[list[int]]], edit=lambda tree, rank, stage: None) -> Path:
    """The llama's files as if it had four layers, by pipeline stage and virtual stage the layers that each holds.
    ``edit`` may then spoil a rank's tree."""
    for rank in range(2):
        tree = torch.load(saved / "llama" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt", weights_only=False)
        whole = {name: value for name, value in tree["model"].items() if torch.is_tensor(value)}
        for pp, chunks in enumerate(stages):
            stage = {"args": changed(tree["args"], {"num_layers": 4}), "checkpoint_version": 3.0}
            for virtual, layers in enumerate(chunks):
                part = {}
                for name, value in whole.items():
                    if name.startswith("decoder.layers."):
                        _, _, theirs, rest = name.split(".", 3)
                        own = {i: layer for i, layer in enumerate(layers) if layer % 2 == int(theirs)}
                        part |= {f"decoder.layers.{i}.{rest}": value * (1 + layer / 10) for i, layer in own.items()}
                    elif (0 if name.startswith("embedding") else 3) in layers:
                        part[name] = value
                stage["model" if len(chunks) == 1 else f"model{virtual}"] = part
            edit(stage, rank, pp)
            folder = to / f"mp_rank_{rank:02d}_{pp:03d}"
            folder.mkdir(parents=True)
            torch.save(stage, folder / "model_optim_rng.pt")
    return to


STAGES = {
    "one": [[[0, 1, 2, 3]]],
    "two": [[[0, 1]], [[2, 3]]],
    "first short": [[[0]], [[1, 2, 3]]],
    "last short": [[[0, 1, 2]], [[3]]],
    "ends alone": [[[0]], [[1, 2]], [[3]]],
    "an empty one": [[[0, 1, 2]], [[]], [[3]]],
    "virtual": [[[0], [2]], [[1], [3]]],
    "virtual, uneven": [[[0], [2]], [[1], []], [[], [3]]],
}


@pytest.mark.parametrize("stages", STAGES)
def test_layers_are_counted_stage_by_stage(saved, tmp_path, stages):
    whole = logits(open_megatron(staged(saved, tmp_path / "one", STAGES["one"])))
    assert torch.equal(logits(open_megatron(staged(saved, tmp_path / "two", STAGES[stages]))), whole)


def unfit(saved, tmp_path, edit, told, stages="two"):
    """A spoiled checkpoint is refused before anything is written."""
    folder = staged(saved, tmp_path / "spoiled", STAGES[stages], edit)
    with pytest.raises(CheckpointError, match=told):
        convert.import_megatron(folder, tmp_path / "ours", files=1, vocab_size=99)
    assert not (tmp_path / "ours").exists()


def test_a_layer_too_few_is_refused(saved, tmp_path):
    def edit(tree, rank, stage):
        tree["args"].num_layers = 5

    unfit(saved, tmp_path, edit, "its stages hold 4 layers, its args say 5")


def test_a_layer_in_the_middle_is_missed(saved, tmp_path):
    def edit(tree, rank, stage):
        if stage == 1:
            tree["model"] = {n: v for n, v in tree["model"].items() if not n.startswith("decoder.layers.0.")}

    unfit(saved, tmp_path, edit, r"a pipeline stage holds the layers \[1\], not all from 0 on")


def test_a_tensor_too_few_or_too_many_is_named(saved, tmp_path):
    def lacking(tree, rank, stage):
        tree["model"].pop("decoder.layers.1.mlp.linear_fc2.weight", None)

    unfit(saved, tmp_path / "a", lacking, "lacks decoder.layers.1.mlp.linear_fc2.weight")

    def surplus(tree, rank, stage):
        tree["model"]["decoder.layers.0.self_attention.core_attention.softmax_offset"] = torch.zeros(2)

    unfit(saved, tmp_path / "b", surplus, "no use for decoder.layers.0.self_attention.core_attention.softmax_offset")


def test_ranks_that_disagree_are_named(saved, tmp_path):
    def norms(tree, rank, stage):
        if rank and "decoder.final_layernorm.weight" in tree["model"]:
            tree["model"]["decoder.final_layernorm.weight"][3] += 1

    unfit(saved, tmp_path / "a", norms, "final_layernorm.weight differs between the tensor-parallel ranks")

    def names(tree, rank, stage):
        if rank == 1:
            tree["model"].pop("decoder.layers.1.mlp.linear_fc2.weight")

    unfit(saved, tmp_path / "b", names, "tensor-parallel ranks of a pipeline stage hold different tensors")


def test_ranks_of_two_checkpoints_are_told_apart(saved, tmp_path):
    def later(tree, rank, stage):
        tree["iteration"] = 9 if (rank, stage) == (1, 0) else 7

    unfit(saved, tmp_path / "a", later, "rank 1 of stage 0 has other args or another iteration than rank 0")

    def otherwise(tree, rank, stage):
        if stage:
            tree["args"].rotary_base = 5000

    unfit(saved, tmp_path / "b", otherwise, "rank 0 of stage 1 has other args")


def test_a_model_in_a_wrapper_is_refused(saved, tmp_path):
    def wrapped(tree, rank, stage):
        tree["model"] = {f"module.{name}": value for name, value in tree["model"].items()}

    unfit(saved, tmp_path, wrapped, "only plain Megatron Core models")


def test_an_embedding_that_the_last_stage_has_too_is_the_same(saved, tmp_path):
    def tied(tree, rank, stage):
        tree["args"].untie_embeddings_and_output_weights = False
        if stage == 0:
            first[rank] = tree["model"]["embedding.word_embeddings.weight"]
        else:
            tree["model"]["output_layer.weight"] = first[rank] + (rank == unequal)

    first: dict[int, torch.Tensor] = {}
    unequal = None
    assert open_megatron(staged(saved, tmp_path / "equal", STAGES["two"], tied)).model.tie_embeddings
    unequal = 1
    unfit(saved, tmp_path, tied, "output_layer.weight differs from the embedding, though tied by its args")


def test_other_layouts_are_refused(saved, tmp_path):
    folder = staged(saved, tmp_path / "experts", STAGES["two"])
    (folder / "mp_rank_00_000").rename(folder / "mp_rank_00_000_000")
    with pytest.raises(CheckpointError, match="mp_rank_00_000_000: expert parallelism"):
        open_megatron(folder)

    def old(tree, rank, stage):
        tree["checkpoint_version"] = 1.0

    unfit(saved, tmp_path / "a", old, "checkpoint_version 1.0 orders queries and keys")


BASE = {
    **LLAMA,
    **{"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "padded_vocab_size": 112, "ffn_hidden_size": 48},
    **{"kv_channels": 8, "norm_epsilon": 1e-5, "max_position_embeddings": 64, "tensor_model_parallel_size": 8},
}
OF_OTHER_MODELS = {
    **{"no_rope_freq": 4, "softmax_type": "learnable", "attention_output_gate": True, "qk_l2_norm": True},
    **{"glu_linear_offset": 1.0, "activation_func_clamp_value": 7.0, "quick_geglu": True, "window_attn_skip_freq": 2},
    **{"window_size": (127, 0), "softmax_scale": 0.5, "rotary_percent": 0.25, "rotary_interleaved": True},
    **{"experimental_attention_variant": "dsa", "heterogeneous_layers_config_path": "x.json", "num_experts": 8},
    **{"multi_latent_attention": True, "mtp_num_layers": 1, "spec": ["a", "b"], "yaml_cfg": "x.yaml"},
    **{"position_embedding_type": "yarn", "normalization": "LayerNorm", "gated_linear_unit": True, "use_mup": True},
    **{"apply_layernorm_1p": True, "layernorm_zero_centered_gamma": True, "squared_relu": True},
    **{"final_logit_softcapping": 30.0, "attention_logit_multiplier": 2.0, "rope_of_tomorrow": "x"},
    **{"logits_scaling": 2.0, "linear_scale": 2.0, "no_bias": True, "hidden_act": "gelu", "head_dim": 4},
    **{"share_embeddings_and_output_weights": True},
}


@pytest.mark.parametrize("name", OF_OTHER_MODELS)
def test_an_argument_of_another_model_is_refused_by_name(name):
    base = {**BASE, "swiglu": name != "gated_linear_unit", "untie_embeddings_and_output_weights": True}
    with pytest.raises(CheckpointError, match=name):
        from_args({**base, name: OF_OTHER_MODELS[name]}, Path("x"), None)


def test_two_spellings_that_disagree_are_refused():
    with pytest.raises(CheckpointError, match="norm_epsilon=1e-05 but layernorm_epsilon=1e-06"):
        from_args({**BASE, "layernorm_epsilon": 1e-6}, Path("x"), None)
    with pytest.raises(CheckpointError, match="interpolation_factor=2 with use_rope_scaling"):
        both = {"use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 2}
        from_args({**BASE, **both}, Path("x"), None)


def test_gelu_is_the_one_that_is_computed():
    """Megatron's core knows nothing of openai_gelu, and without the fusion its gelu is exact."""
    with pytest.raises(CheckpointError, match="gelu without the tanh approximation"):
        exact = {"bias_gelu_fusion": False, "openai_gelu": True}
        from_args({**BASE, "gated_linear_unit": False, **GPT2, **exact}, Path("x"), None)


def test_dropout_is_honoured_or_said():
    section, _ = from_args({**BASE, **GPT2, "hidden_dropout": 0.1, "attention_dropout": 0.2}, Path("x"), None)
    assert (section["dropout"], section["attention_dropout"]) == (0.1, 0.2)
    section, notes = from_args({**BASE, "hidden_dropout": 0.1}, Path("x"), None)
    assert section["dropout"] == 0.0
    assert notes == ["trained with hidden_dropout=0.1; to go on with it, set model.dropout=0.1"]


def test_every_setting_of_their_config_is_honoured_harmless_or_refused():
    """One that their next release adds, about the model, is refused until it is known here."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    plain, found = from_args(BASE, Path("x"), None), {}
    for field in dataclasses.fields(MLATransformerConfig):
        own = {int: 7, float: 0.3, bool: field.default is False, str: "x"}.get(type(field.default), 3)
        try:
            section = from_args({**BASE, field.name: own}, Path("x"), None)
            found.setdefault("harmless" if section == plain else "honoured", set()).add(field.name)
        except CheckpointError as error:
            assert field.name in str(error)
            assert not str(error).endswith("unknown"), f"{field.name}: not known yet"
            found.setdefault("refused", set()).add(field.name)
    assert found["honoured"] >= {"num_layers", "kv_channels", "qk_layernorm", "rotary_base", "attention_dropout"}
    assert found["refused"] >= {"no_rope_freq", "softmax_type", "layernorm_epsilon", "window_size"}
    assert found["harmless"] >= {"apply_rope_fusion", "tensor_model_parallel_size", "moe_router_topk", "fp8_margin"}
