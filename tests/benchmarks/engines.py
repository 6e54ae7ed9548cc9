"""Throughput of two ranks over one, under every engine, beside a bare fully_shard loop and DeepSpeed's own engine.

    python -m tests.benchmarks.engines [--rounds=3] [--dtype=float32] [--contenders=ours-fsdp-3,bare-fsdp-3]
                                       [--model=small] [--prompt=0]

One rank has two threads, each of two ranks has one; models and prompts are those of train.py, the micro batch of a rank
is the same. ``ours`` is this project's train_step on its own model; ``bare`` a hand-written loop around transformers'
LlamaForCausalLM, autocast for bfloat16; ``lora`` train LoRA on it, ``bare`` through the peft library. A ratio is over
the same model on one rank. Contenders take turns, a world each; figures are medians over the rounds.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from tests.benchmarks.help import answer_help

os.environ["DS_ACCELERATOR"] = "cpu"

import torch

from megatron_lite.distributed.spawn import run_ranks
from tests.benchmarks.train import LR, MODELS, PEFT, SEQ, Batches, batches, counted, llama, peft_lora

BATCH, STEPS = 2, 3
CONTENDERS = {  # whose model, on how many ranks, under which engine and stage
    "ours-one": ("ours", 1, "fsdp", 0),
    "ours-ddp": ("ours", 2, "fsdp", 0),
    "ours-fsdp-2": ("ours", 2, "fsdp", 2),
    "ours-fsdp-3": ("ours", 2, "fsdp", 3),
    "ours-deepspeed-1": ("ours", 2, "deepspeed", 1),
    "ours-deepspeed-3": ("ours", 2, "deepspeed", 3),
    "bare-one": ("bare", 1, "fsdp", 0),
    "bare-fsdp-3": ("bare", 2, "fsdp", 3),
    "bare-deepspeed-1": ("bare", 2, "deepspeed", 1),
    "bare-deepspeed-3": ("bare", 2, "deepspeed", 3),
    "ours-lora-ddp": ("ours-lora", 2, "fsdp", 0),
    "ours-lora-fsdp-3": ("ours-lora", 2, "fsdp", 3),
    "bare-ddp": ("bare", 2, "fsdp", 0),
    "bare-lora-ddp": ("bare-lora", 2, "fsdp", 0),
}


def ours(
    model: dict[str, Any], batch: Batches, size: int, engine: str, stage: int, method: str, dtype: str
) -> Callable[[], None]:
    from megatron_lite.config import parse_config
    from megatron_lite.data.batch import Batch
    from megatron_lite.distributed.mesh import build_mesh
    from megatron_lite.planning.plan import make_plan
    from megatron_lite.training.allocator import keep_freed
    from megatron_lite.training.faults import Faults
    from megatron_lite.training.step import Trainer

    keep_freed()
    config = parse_config(
        {
            "model": {**model, "max_seq_len": SEQ},
            "data": {"train": [{"path": "unused"}], "seq_len": SEQ},
            "train": {"global_batch_size": BATCH * size, "micro_batch_size": BATCH, "precision": dtype},
            "optim": {"lr": LR, "schedule": "constant"},
            "parallel": {"engine": engine, "zero": stage},
            **({"peft": PEFT[method], "init": {"from": "unused"}} if method else {}),
        }
    )
    plan = make_plan(config, size)
    mesh = build_mesh(plan.degrees, torch.device("cpu"))
    assert mesh is not None
    trainer = Trainer(config, mesh, plan, Faults.none())

    def step() -> None:
        tokens, targets = batch()
        trainer.train_step([Batch(tokens, targets, None, None, 0, counted(targets))])

    return step


def bare(
    sizes: dict[str, Any], batch: Batches, size: int, engine: str, stage: int, method: str, dtype: str
) -> Callable[[], None]:
    model = llama(sizes)
    if method == "lora":
        model = peft_lora(model)

    def inputs() -> dict[str, Any]:
        tokens, targets = batch()
        return {"input_ids": tokens, "labels": tokens.masked_fill(targets == -100, -100), "use_cache": False}

    if engine == "deepspeed":
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        settings = {
            "train_micro_batch_size_per_gpu": BATCH,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": stage},
            "optimizer": {"type": "AdamW", "params": {"lr": LR, "torch_adam": True}},
        }
        wrapped, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)

        def deepspeed_step() -> None:
            wrapped.backward(wrapped(**inputs()).loss)
            wrapped.step()

        return deepspeed_step
    if size > 1 and stage == 0:
        model = torch.nn.parallel.DistributedDataParallel(model)
    elif size > 1:
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(**inputs()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def contend(rank: int, size: int, whose: str, engine: str, stage: int, dtype: str, model: str, prompt: int) -> float:
    """Tokens a second of the whole world, the first step apart."""
    torch.set_num_threads(2 // size)
    os.environ["LOCAL_RANK"] = str(rank)
    whose, _, method = whose.partition("-")
    sizes = MODELS[model]
    batch = batches(sizes["vocab_size"], BATCH, prompt, seed=rank)
    step = {"ours": ours, "bare": bare}[whose](sizes, batch, size, engine, stage, method, dtype)
    step()
    began = time.perf_counter()
    for _ in range(STEPS):
        step()
    return size * BATCH * SEQ * STEPS / (time.perf_counter() - began)


def main(rounds: int = 3, contenders: str = "", dtype: str = "float32", model: str = "small", prompt: int = 0) -> None:
    names = contenders.split(",") if contenders else [name for name in CONTENDERS if "-lora" not in name]
    rates: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            whose, size, engine, stage = CONTENDERS[name]
            rates[name].append(min(run_ranks(contend, size, whose, engine, stage, dtype, model, prompt, timeout=300)))
            print(f"{name:<20}{rates[name][-1]:>8.0f} tokens/s", flush=True)
    print(f"\n{'':<20}{'tokens/s':>10}{'over one rank':>15}")
    for name in names:
        one = rates.get(f"{name.split('-')[0]}-one", rates[name])
        ratio = statistics.median(rate / alone for rate, alone in zip(rates[name], one, strict=True))
        print(f"{name:<20}{statistics.median(rates[name]):>10.0f}{ratio:>15.2f}")


if __name__ == "__main__":
    answer_help(__doc__)
    pairs = (argument.lstrip("-").split("=") for argument in sys.argv[1:])
    main(**{key: int(value) if value.isdigit() else value for key, value in pairs})  # type: ignore[arg-type]
