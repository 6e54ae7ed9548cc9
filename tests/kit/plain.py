"""A family as a newcomer adds it, one file and one line: RMS norms, learned positions, an MLP without a gate. Import it
before the config."""

from megatron_lite.families import FAMILIES
from megatron_lite.families.family import Family, ModelType, TensorNames

PLAIN = Family(
    norm="rms",
    gated=False,
    rotary=False,
    bias=False,
    tied=False,
    ffn_size=lambda hidden: 3 * hidden,
    names=TensorNames(
        "plain",
        "layers",
        "words",
        "places",
        norms={"attention_norm": "norm_1", "mlp_norm": "norm_2", "norm": "last_norm"},
        linears={
            "attention.qkv": ("q", "k", "v"),
            "attention.out": ("o",),
            "mlp.up": ("fc_1",),
            "mlp.down": ("fc_2",),
        },
    ),
    model_types={
        "plain": ModelType(
            "PlainForCausalLM",
            {"vocab_size": "vocab_size", "width": "hidden_size", "depth": "num_layers", "heads": "num_heads"}
            | {"kv_heads": "num_kv_heads", "ffn": "ffn_size", "length": "max_seq_len"},
            {"vocab_size": 100, "width": 64, "depth": 2, "heads": 4, "kv_heads": 4, "ffn": 192, "length": 128},
            {"act": ("gelu_tanh",)},
        )
    },
    model_type=lambda config: "plain",
    written=lambda config: {"act": "gelu_tanh"},
    buffers="",
)

FAMILIES["plain"] = PLAIN
