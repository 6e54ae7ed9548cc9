"""Degrees → batch arithmetic, checked before any process group exists. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec

from megatron_lite import cli
from megatron_lite.config import PACKED_BLOCK, PACKED_BYTES, Config, ModelConfig, apply_overrides, parse_config
from megatron_lite.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """A layout that works. ``accumulation``: micro batches of a step on each data-parallel rank."""

    tp: int
    dp: int
    sp: bool
    accumulation: int
    dp_shard: int = 1

    @property
    def degrees(self) -> dict[str, int]:
        """The mesh's axes, for ``build_mesh``."""
        return {"dp_replicate": self.dp // self.dp_shard, "dp_shard": self.dp_shard, "tp": self.tp}

    def describe(self, config: Config) -> str:
        """One line for the log: how the ranks and the global batch are divided."""
        size, micro = config.train.global_batch_size, config.train.micro_batch_size
        sp = " with sequence parallelism" if self.sp else ""
        sharded = ""
        if self.dp_shard > 1:
            sharded = f" (ZeRO {config.parallel.zero} over {self.dp_shard})"
        elif config.parallel.zero > 0 or (config.parallel.engine == "deepspeed" and self.dp == 1):
            sharded = " (nothing to divide: trained as engine=fsdp, zero=0)"
        return (
            f"{cli.several(self.tp * self.dp, 'rank')} = dp {self.dp}{sharded} × tp {self.tp}{sp}; "
            f"global batch {size} = dp {self.dp} × {self.accumulation} × micro {micro} "
            f"({size * config.data.seq_len:,} tokens)"
        )


def bytes_per_parameter(config: Config, plan: Plan) -> dict[str, float]:
    """What a rank keeps from step to step, in bytes for each parameter of its tp shard; activations, buckets and what
    is gathered for a moment come on top, and with Muon the moments of what AdamW updates. After Rajbhandari et al. 2020
    (ZeRO), but with gradients in float32."""
    deepspeed, zero, shards = config.parallel.engine == "deepspeed", config.parallel.zero, plan.dp_shard
    master = 8.0 if config.train.precision == "float64" else 4.0
    compute = 2.0 if config.train.precision == "bfloat16" else master
    moments = {"adamw": 2 * master / shards, "muon": master / plan.dp, "adafactor": 0.0}[config.optim.name]
    if shards == 1:
        return {"weights": master, "gradients": master, "moments": moments}
    parts = {"masters": master / shards, "gradients": master / shards, "moments": moments}
    if deepspeed:
        if zero == 1:
            parts["gradients"] = master
        return {"weights": compute / shards if zero == 3 else compute, **parts}
    return {"weights": compute, **parts} if zero == 2 else parts


def bytes_per_frozen_parameter(config: Config, plan: Plan, packing: str | None = None) -> float:
    """What a rank keeps of each parameter of its tp shard that stays as it is, and is packed or not: nothing but the
    weight."""
    parallel, train, peft = config.parallel, config.train, config.peft
    sizes = {"float64": 8.0, "float32": 4.0, "bfloat16": 2.0}
    if packing is not None:
        held = used = PACKED_BYTES[packing] / PACKED_BLOCK
    else:
        held, used = sizes.get((peft and peft.base_dtype) or "", sizes[train.precision]), sizes[train.precision]
    if plan.dp_shard == 1 or (parallel.engine == "deepspeed" and parallel.zero < 3):
        return held
    return held / plan.dp_shard + (used if parallel.zero == 2 else 0.0)


def checkpoint_bytes(config: Config) -> int:
    """What a checkpoint takes on disk, within some percent: weights and moments; small tensors are left out,
    and so is an adapter, which has but a few MB."""
    if config.peft is not None:
        return 0
    model = config.model
    assert model.num_kv_heads and model.head_dim and model.ffn_size
    attention = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
    mlp = (3 if model.family == "llama" else 2) * model.ffn_size
    vocabulary = model.padded_vocab_size * (1 if model.tie_embeddings else 2)
    positions = model.max_seq_len if model.family == "gpt2" else 0
    weights = model.hidden_size * (model.num_layers * (attention + mlp) + vocabulary + positions)
    moments = {"adamw": 2, "muon": 1, "adafactor": 0}[config.optim.name]
    return weights * (1 + moments) * (8 if config.train.precision == "float64" else 4)


def picture(plan: Plan, limit: int = 8) -> str:
    """Which rank stands where on the mesh: a line for each data-parallel rank, tensor-parallel peers side by side."""

    def some(count: int) -> list[int | None]:
        return list(range(count)) if count <= limit else [*range(limit - 2), None, count - 1]

    def row(name: str, cells: Iterable[object]) -> str:
        return name.ljust(24) + "".join(str(cell).rjust(7) for cell in cells)

    columns = some(plan.tp)
    lines = [row("", ("…" if tp is None else f"tp {tp}" for tp in columns))]
    for dp in some(plan.dp):
        if dp is None:
            lines.append("…")
            continue
        copy, part = divmod(dp, plan.dp_shard)
        name = f"dp {dp}"
        if plan.dp_shard > 1:
            name += f" (part {part + 1}/{plan.dp_shard}" + (f", copy {copy + 1})" if plan.dp_shard < plan.dp else ")")
        lines.append(row(name, ("…" if tp is None else dp * plan.tp + tp for tp in columns)))
    return "\n".join(lines)


def degrees_that_fit(model: ModelConfig, limit: int = 64) -> list[int]:
    """Every tensor-parallel degree up to ``limit`` that this model can be split by."""
    return [tp for tp in range(1, limit + 1) if not _tp_mistakes(model, tp)]


def _tp_mistakes(model: ModelConfig, tp: int) -> list[str]:
    assert model.num_kv_heads and model.head_dim and model.ffn_size
    mistakes = []
    if model.num_heads % tp:
        mistakes.append(f"model.num_heads={model.num_heads}")
    kv_width = model.num_kv_heads * model.head_dim
    if model.num_kv_heads % tp and (tp % model.num_kv_heads or kv_width % tp):
        mistakes.append(f"model.num_kv_heads={model.num_kv_heads}")
    if model.ffn_size % tp:
        mistakes.append(f"model.ffn_size={model.ffn_size}")
    if model.vocab_size is not None and model.padded_vocab_size % tp:
        mistakes.append(
            f"the vocabulary of {model.vocab_size} padded to {model.padded_vocab_size} (model.vocab_multiple)"
        )
    return mistakes


def check_tp(model: ModelConfig, tp: int) -> None:
    """Raises ConfigError when this model cannot be split over ``tp`` ranks."""
    if unfit := _tp_mistakes(model, tp):
        fits = ", ".join(map(str, degrees_that_fit(model)))
        raise ConfigError(f"parallel.tp={tp} does not divide {' nor '.join(unfit)}; this model can use tp {fits}")


def _engine_mistakes(config: Config, dp: int) -> list[str]:
    mistakes, parallel = [], config.parallel
    offload, keys = f"parallel.offload={parallel.offload}", parallel.deepspeed
    if parallel.engine == "fsdp":
        if parallel.offload != "none":
            mistakes.append(f"{offload} takes parallel.engine=deepspeed")
        if parallel.reduce_once and parallel.zero == 0:
            mistakes.append("parallel.reduce_once: with parallel.zero=0 gradients are reduced once a step anyway")
        if keys:
            mistakes.append("parallel.deepspeed: these keys take parallel.engine=deepspeed")
        return mistakes
    if config.optim.name != "adamw":
        mistakes.append(
            f"optim.name={config.optim.name} updates whole matrices, and DeepSpeed's parts begin and end anywhere in "
            "them; use engine=fsdp"
        )
    if parallel.reduce_once:
        mistakes.append("parallel.reduce_once is FSDP2's; DeepSpeed does so at zero 0 and 1, and never at 2 and 3")
    if find_spec("deepspeed") is None:
        mistakes.append("parallel.engine=deepspeed: not installed here; pip install 'megatron_lite[deepspeed]'")
    if parallel.dp_replicate > 1:
        mistakes.append("parallel.dp_replicate: hybrid sharding is FSDP2's; it takes parallel.engine=fsdp")
    if parallel.offload != "none" and dp == 1:
        mistakes.append(f"{offload}: a single data-parallel rank has nothing divided; start more ranks")
    if parallel.offload != "none" and parallel.zero < (least := 3 if parallel.offload == "all" else 1):
        mistakes.append(f"{offload} takes parallel.zero={least} or more")
    if parallel.zero == 3 and config.train.compile:
        mistakes.append("train.compile: DeepSpeed's ZeRO 3 hooks are compiled anew at every module; use engine=fsdp")
    ours = sorted(keys.keys() & _OURS) + ["zero_optimization.stage"] * (
        "stage" in (keys.get("zero_optimization") or {})
    )
    if ours:
        mistakes.append(f"parallel.deepspeed: {', '.join(ours)} follows from this config and cannot be given there")
    return mistakes


_OURS = {  # what DeepSpeed's config says twice
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("gradient_allreduce_op", "optimizer", "scheduler", "fp16", "bf16", "data_types", "communication_data_type"),
}


def _linears(model: ModelConfig) -> dict[str, tuple[int, int, bool]]:
    """A block's linears: rows, columns, and whether tensor parallelism splits the columns."""
    assert model.num_kv_heads and model.head_dim and model.ffn_size
    hidden, ffn, heads = model.hidden_size, model.ffn_size, model.num_heads * model.head_dim
    return {
        "attention.qkv": (heads + 2 * model.num_kv_heads * model.head_dim, hidden, False),
        "attention.o": (hidden, heads, True),
        "mlp.up": ((2 if model.family == "llama" else 1) * ffn, hidden, False),
        "mlp.down": (hidden, ffn, True),
    }


def packing_mistakes(model: ModelConfig, tp: int, packing: str | None) -> list[str]:
    """The linears whose rows, or this rank's parts of them, are no whole blocks."""
    if packing is None:
        return []
    mistakes = []
    for name, (_, columns, split) in _linears(model).items():
        parts = tp if split else 1
        if columns % (parts * PACKED_BLOCK):
            fits = [str(n) for n in degrees_that_fit(model) if n < tp and not packing_mistakes(model, n, packing)]
            fix = f"use tp {' or '.join(fits)}" if fits else "use bfloat16"
            over = f" over parallel.tp={tp}" if parts > 1 else ""
            mistakes.append(
                f"peft.base_dtype={packing}: {name} has {columns} input features{over}, which are no whole blocks of "
                f"{PACKED_BLOCK}; {fix}"
            )
    return mistakes


def _cut_blocks(config: Config, dp: int) -> list[str]:
    """DeepSpeed's stage 3 divides bytes, wherever that cuts."""
    tp, model = config.parallel.tp, config.model
    blocks = {name: rows * columns // tp // PACKED_BLOCK for name, (rows, columns, _) in _linears(model).items()}
    cut = [name for name, count in blocks.items() if count % dp]
    common = math.gcd(*blocks.values())
    near = max((n for n in range(1, dp + 1) if common % n == 0), default=1)
    return [
        f"peft.base_dtype={config.peft and config.peft.packing}: dp {dp} does not divide the {blocks[name]} blocks of "
        f"{PACKED_BLOCK} numbers in {name}, and DeepSpeed's ZeRO 3 would cut within one; use dp {near}, zero 2, or "
        "engine=fsdp"
        for name in cut[:1]
    ]


def _peft_mistakes(config: Config, dp: int) -> list[str]:
    mistakes, peft = [], config.peft
    if peft is None:
        return []
    if config.optim.name != "adamw":
        mistakes.append(
            f"optim.name={config.optim.name} is for a model's own matrices, not for what peft adds to them; use adamw"
        )
    computed = config.train.precision
    mistakes += packing_mistakes(config.model, config.parallel.tp, peft.packing)
    if config.parallel.engine == "deepspeed" and config.parallel.zero == 3 and peft.packing:
        mistakes += _cut_blocks(config, dp)
    if config.parallel.engine == "deepspeed" and dp > 1 and peft.base_dtype not in (None, computed, peft.packing):
        mistakes.append(
            f"peft.base_dtype={peft.base_dtype}: DeepSpeed holds all weights in what is computed in, "
            f"train.precision={computed}; leave it out, or use engine=fsdp"
        )
    return mistakes


def make_plan(config: Config, world_size: int) -> Plan:
    """Check the degrees against the model and the number of ranks. Raises ConfigError with every mistake."""
    tp, train = config.parallel.tp, config.train
    mistakes = []
    if world_size % tp:
        mistakes.append(f"parallel.tp={tp} does not divide the {cli.several(world_size, 'rank')} of this job")
    try:
        check_tp(config.model, tp)
    except ConfigError as error:
        mistakes.append(str(error))
    tokens = train.micro_batch_size * config.data.seq_len
    if config.parallel.sp and tokens % tp:
        mistakes.append(f"parallel.sp: micro batch × seq_len = {tokens} tokens cannot be split over tp={tp}")
    if config.parallel.offload_activations and train.compile:
        mistakes.append(
            "parallel.offload_activations: a compiled block keeps what it wants; use parallel.recompute with "
            "train.compile, or no compilation"
        )
    zero, replicate = config.parallel.zero, config.parallel.dp_replicate
    mistakes += _engine_mistakes(config, -(-world_size // tp)) + _peft_mistakes(config, -(-world_size // tp))
    if zero == 1 and config.parallel.engine == "fsdp":
        mistakes.append(
            "parallel.zero=1: FSDP2 divides gradients wherever it divides optimizer state; parallel.zero=2 does both, "
            "sends as many bytes and needs less memory; or parallel.engine=deepspeed"
        )
    if zero == 0 and replicate > 1:
        mistakes.append(
            f"parallel.dp_replicate={replicate}: with parallel.zero=0 every rank holds everything; it takes zero 2 or 3"
        )
    if world_size % tp == 0 and world_size // tp % replicate:
        mistakes.append(f"parallel.dp_replicate={replicate} does not divide dp {world_size // tp}")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    dp = world_size // tp
    if train.global_batch_size % (dp * train.micro_batch_size):
        step = dp * train.micro_batch_size
        below = train.global_batch_size // step * step
        near = f"{below} or {below + step}" if below else str(step)
        raise ConfigError(
            f"train.global_batch_size={train.global_batch_size} must be a multiple of dp {dp} × "
            f"train.micro_batch_size {train.micro_batch_size} = {step}; nearest: {near}"
        )
    accumulation = train.global_batch_size // (dp * train.micro_batch_size)
    return Plan(tp, dp, config.parallel.sp and tp > 1, accumulation, dp // replicate if zero else 1)


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
