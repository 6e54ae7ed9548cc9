"""One side of a proof, from the command line: ``tp=2,sp=true,dp=2``. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lite import cli
from megatron_lite.config import Config, apply_overrides, parse_config
from megatron_lite.errors import ConfigError
from megatron_lite.planning.plan import make_plan


@dataclass(frozen=True)
class Side:
    """One layout to compare: the config it runs with and its number of ranks."""

    name: str
    config: Config
    ranks: int


_SIDE_KEYS = (
    "tp",
    "sp",
    "engine",
    "zero",
    "dp_replicate",
    "recompute",
    "offload_activations",
    "dp",
    "accumulation",
    "compile",
)


def parse_side(text: str, config: Config, dtype: str) -> Side:
    """Read ``tp=2,sp=true,dp=2,accumulation=4``. Raises ConfigError.

    ``accumulation`` (micro batches a step on each rank) changes the micro batch; the global batch stays.
    """
    settings: dict[str, str] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise ConfigError(f"layout {text!r}: expected KEY=VALUE such as tp=2, not {part!r}")
        if key not in _SIDE_KEYS:
            hint = cli.nearest(key, _SIDE_KEYS)
            raise ConfigError(f"layout {text!r}: unknown key {key!r}{hint}; known: {', '.join(_SIDE_KEYS)}")
        settings[key] = value
    dp, accumulation = (cli.convert(k, settings.pop(k, "1"), int) for k in ("dp", "accumulation"))
    overrides = {f"train.{k}" if k == "compile" else f"parallel.{k}": v for k, v in settings.items()}
    batch = config.train.global_batch_size
    if dp < 1 or accumulation < 1 or batch % (dp * accumulation):
        product = f"dp {dp} × accumulation {accumulation}"
        raise ConfigError(f"layout {text!r}: {product} must divide train.global_batch_size={batch}")
    tree = config.model_dump()
    tree["train"].update(micro_batch_size=batch // (dp * accumulation), precision=dtype)
    apply_overrides(tree, overrides)
    side = parse_config(tree)
    ranks = dp * side.parallel.tp
    make_plan(side, ranks)
    return Side(text, side, ranks)
