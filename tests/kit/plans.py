"""The table of what goes with what, asked of ``make_plan`` itself: ``python -m tests.kit.plans > docs/plans.md``."""

from __future__ import annotations

from typing import Any

from megatron_lite.config import parse_config
from megatron_lite.errors import ConfigError
from megatron_lite.planning.memory import bytes_per_parameter
from megatron_lite.planning.plan import make_plan

ENGINES = [("fsdp", zero) for zero in range(4)] + [("deepspeed", zero) for zero in range(4)]
FEATURES: dict[str, dict[str, dict[str, Any]]] = {
    "as it is": {},
    "tp and sp": {"parallel": {"tp": 2, "sp": True}},
    "recomputation": {"parallel": {"recompute": "full"}},
    "offload_activations": {"parallel": {"offload_activations": True}},
    "compile": {"train": {"compile": True}},
    "hybrid (dp_replicate)": {"parallel": {"dp_replicate": 2}},
    "offload=optimizer": {"parallel": {"offload": "optimizer"}},
    "offload=all": {"parallel": {"offload": "all"}},
    "Muon, Adafactor": {"optim": {"name": "muon"}},
    "peft": {"peft": {"method": "lora"}},
    "peft, base in float32": {"peft": {"method": "lora", "base_dtype": "float32"}},
    "peft, base in 8 or 4 bits": {"peft": {"method": "lora", "base_dtype": "nf4"}},
    "peft, compile": {"peft": {"method": "lora"}, "train": {"compile": True}},
    "peft, Muon, Adafactor": {"peft": {"method": "lora"}, "optim": {"name": "muon"}},
}
HEAD = """\
# What goes with what

Made by asking the check that every run passes before it starts (`python -m tests.kit.plans > docs/plans.md`); a test
holds it to that. What says yes is proved equal to one process in float64 (`tests/multi`). Bytes: what a rank keeps of
each parameter of its tp shard from step to step, with bfloat16 and AdamW, on 4 data-parallel ranks.
"""


def config(engine: str, zero: int, changes: dict[str, dict[str, Any]]) -> Any:
    train = {"global_batch_size": 8, "micro_batch_size": 1, "precision": "bfloat16", **changes.get("train", {})}
    return parse_config(
        {
            "model": {"vocab_size": 128},
            "data": {"train": [{"path": "x"}]},
            "parallel": {"engine": engine, "zero": zero, **changes.get("parallel", {})},
            "train": train,
            "optim": changes.get("optim", {}),
            "peft": changes.get("peft"),
        }
    )


def table() -> str:
    """The page, reasons as footnotes."""
    reasons: list[str] = []
    lines = [HEAD, "| engine | zero | bytes | " + " | ".join(FEATURES) + " |", "|---" * (3 + len(FEATURES)) + "|"]
    for engine, zero in ENGINES:
        cells = []
        for changes in FEATURES.values():
            asked = config(engine, zero, changes)
            try:
                make_plan(asked, 4 * asked.parallel.tp)
                cells.append("yes")
            except ConfigError as error:
                for reason in str(error).splitlines():
                    if reason not in reasons:
                        reasons.append(reason)
                cells.append("no " + ", ".join(f"[{reasons.index(reason) + 1}]" for reason in str(error).splitlines()))
        size = "–"
        if cells[0] == "yes":
            asked = config(engine, zero, {})
            size = f"{sum(bytes_per_parameter(asked, make_plan(asked, 4)).values()):g}"
        lines.append(f"| {engine} | {zero} | {size} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))]) + "\n"


if __name__ == "__main__":
    print(table(), end="")
