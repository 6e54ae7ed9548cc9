"""Every engine by the name that tests give it: what it takes under ``parallel``."""

from __future__ import annotations

from typing import Any

# DeepSpeed keeps small tensors whole on every rank, and here all are small.
DIVIDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
# And it keeps what it has gathered, as long as there is room.
AT_ONCE = {
    "zero_optimization": {
        f"stage3_{limit}": 0 for limit in ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
    }
}
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp, zero 2": {"zero": 2},
    "fsdp, zero 3": {"zero": 3},
    **{f"deepspeed, zero {stage}": {"engine": "deepspeed", "zero": stage} for stage in range(3)},
    "deepspeed, zero 3": {"engine": "deepspeed", "zero": 3, "deepspeed": DIVIDED},
}
HYBRID: dict[str, Any] = {"zero": 3, "dp_replicate": 2}
