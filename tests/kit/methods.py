"""Every PEFT method by the name that tests give it, and the engines to try it under."""

from __future__ import annotations

from typing import Any

from tests.kit.engines import ENGINES, HYBRID

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "targets": ["*"], "ranks": {"v": 4, "blocks.1.mlp.*": 2}},
    "lora on q and v": {"method": "lora", "targets": ["q", "v"], "rslora": True},
    "dora": {"method": "lora", "targets": ["k", "o", "up", "down"], "dora": True},
    "adapter": {"method": "adapter", "size": 8},
    "parallel adapter": {"method": "adapter", "size": 8, "placement": "parallel", "scale": 4.0},
    "prefix": {"method": "prefix", "length": 5},
    "prefix by an mlp": {"method": "prefix", "length": 5, "reparameterize": 12},
}
ROOM = {"max_seq_len": 32, "num_kv_heads": 2}  # for a prefix, and for ranks that share a kv head
MAIN = {name: ENGINES[name] for name in ("ddp", "fsdp, zero 3", "deepspeed, zero 2", "deepspeed, zero 3")}
OTHERS = {name: keys for name, keys in {**ENGINES, "fsdp, hybrid": HYBRID}.items() if name not in MAIN}
