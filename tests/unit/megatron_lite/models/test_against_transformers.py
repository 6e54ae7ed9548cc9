"""The decoder against the library that owns the architectures: same weights, same logits, loss and gradients."""

import pytest
import torch
import torch.nn.functional as F

from megatron_lite.config import ModelConfig
from megatron_lite.distributed.mesh import Axis
from megatron_lite.layers.context import Context
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.head import cross_entropy
from tests.kit.optional import optional

transformers = optional("transformers", "hf")

VOCAB, HIDDEN, LAYERS, HEADS, FFN, LENGTH = 101, 32, 3, 4, 80, 24
SIZES = {"vocab_size": VOCAB, "vocab_multiple": 8, "hidden_size": HIDDEN, "num_layers": LAYERS, "num_heads": HEADS}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def llama(kv_heads=HEADS, qkv_bias=False, tie=False, scaling=None):
    """Their Llama (Qwen2 where q, k and v have biases), its weights under our names, and our config."""
    rope = {"rope_theta": 10000.0, "rope_type": "default"}
    if scaling is not None:
        rope |= {"rope_type": "llama3", **scaling, "original_max_position_embeddings": 16}
        scaling = {"type": "llama3", **scaling, "original_max_seq_len": 16}
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    kind = ("Qwen2" if qkv_bias else "Llama") + "{}"
    config = getattr(transformers, kind.format("Config"))(
        **sizes,
        num_key_value_heads=kv_heads,
        intermediate_size=FFN,
        max_position_embeddings=LENGTH,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        tie_word_embeddings=tie,
        initializer_range=0.2,
    )
    theirs = getattr(transformers, kind.format("ForCausalLM"))(config).double()

    def ours(get):
        weights = {"embedding.weight": get("model.embed_tokens.weight"), "norm.weight": get("model.norm.weight")}
        if not tie:
            weights["head.weight"] = get("lm_head.weight")
        for i in range(LAYERS):
            a, b = f"model.layers.{i}.", f"blocks.{i}."
            weights[b + "attention_norm.weight"] = get(a + "input_layernorm.weight")
            weights[b + "mlp_norm.weight"] = get(a + "post_attention_layernorm.weight")
            for end in ("weight", "bias") if qkv_bias else ("weight",):
                parts = [get(f"{a}self_attn.{x}_proj.{end}") for x in "qkv"]
                weights[b + f"attention.qkv.{end}"] = torch.cat(parts)
            weights[b + "attention.out.weight"] = get(a + "self_attn.o_proj.weight")
            weights[b + "mlp.up.weight"] = torch.cat([get(a + f"mlp.{x}_proj.weight") for x in ("gate", "up")])
            weights[b + "mlp.down.weight"] = get(a + "mlp.down_proj.weight")
        return weights

    model = {"num_kv_heads": kv_heads, "qkv_bias": qkv_bias, "tie_embeddings": tie, "rope_scaling": scaling}
    return theirs, ours, ModelConfig(family="llama", ffn_size=FFN, max_seq_len=LENGTH, **SIZES, **model)


def gpt2():
    """Their GPT-2, its weights under our names, and our config."""
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_inner=FFN, n_positions=LENGTH,
        initializer_range=0.2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).double()
    names = {"attn.c_attn": "attention.qkv", "attn.c_proj": "attention.out", "mlp.c_fc": "mlp.up"}
    names |= {"mlp.c_proj": "mlp.down", "ln_1": "attention_norm", "ln_2": "mlp_norm"}

    def ours(get):
        weights = {"embedding.weight": get("transformer.wte.weight"), "positions.weight": get("transformer.wpe.weight")}
        for end in ("weight", "bias"):
            weights[f"norm.{end}"] = get(f"transformer.ln_f.{end}")
            for i in range(LAYERS):
                for a, b in names.items():
                    value = get(f"transformer.h.{i}.{a}.{end}")
                    weights[f"blocks.{i}.{b}.{end}"] = value.t() if value.dim() == 2 else value
        return weights

    return theirs, ours, ModelConfig(family="gpt2", ffn_size=FFN, max_seq_len=LENGTH, **SIZES)


MODELS = {
    "llama": llama,
    "llama, grouped kv heads, tied": lambda: llama(kv_heads=2, tie=True),
    "llama, qkv bias (Qwen2)": lambda: llama(kv_heads=1, qkv_bias=True),
    "llama, scaled rotation": lambda: llama(scaling=LLAMA3),
    "gpt2": gpt2,
}


def assert_near(ours, theirs, tolerance, what):
    """Within ``tolerance`` of the largest element."""
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max(), what


@pytest.mark.parametrize("name", MODELS)
def test_same_logits_loss_and_gradients(name):
    torch.manual_seed(0)
    theirs, ours, config = MODELS[name]()
    with torch.no_grad():  # norms and biases that are ones and zeros would match whatever they do
        for parameter in theirs.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model = Decoder(config, Axis("tp"), sp=False).double()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        weights = ours(dict(theirs.named_parameters()).__getitem__)
        assert weights.keys() == parameters.keys()
        for key, value in weights.items():
            parameters[key].zero_()[: len(value)] = value

    tokens = torch.randint(0, VOCAB, (2, LENGTH))
    targets = torch.randint(0, VOCAB, (2, LENGTH))
    targets[1, 5] = -100
    tolerance = 1e-12 if name == "gpt2" else 1e-5  # their Llama computes norms and rotation in float32 in any case
    want = theirs(tokens).logits
    assert_near(model(tokens, Context(torch.float64)), want[:, -1], tolerance, "logits")

    want_loss = F.cross_entropy(want.flatten(0, 1), targets.flatten(), reduction="sum")
    loss = model(tokens, Context(torch.float64), cross_entropy(targets))
    assert_near(loss, want_loss, tolerance, "loss")
    want_loss.backward()
    loss.backward()
    for key, value in ours({n: p.grad for n, p in theirs.named_parameters()}.__getitem__).items():
        assert_near(parameters[key].grad[: len(value)], value, tolerance, key)
