"""Training speed and memory of one rank against bare PyTorch and transformers, side by side.

    python tests/benchmarks/train.py [--dtype=float32] [--rounds=5] [--prompt=0] [--contenders=ours,bare]
    python tests/benchmarks/train.py --contenders=ours,ours-lora,ours-prefix,transformers,transformers-lora
    python tests/benchmarks/train.py --model=wide --batch=2

Every contender trains the same Llama on the same tokens, in its own process with the same number of threads: ``small``
has 8 layers, ``wide`` is four of TinyLlama 1.1B's 22, ``smollm2-360m`` all of SmolLM2 360M. Processes are prepared
first and then take turns, one step at a time, so that a slow moment of the machine meets all of them; figures are
medians. Peak memory is the process's, less what it held before the model was built. ``prompt``: the percentage of each
sequence whose targets do not count, as in instruction tuning.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from tests.benchmarks.help import answer_help

MODELS: dict[str, dict[str, Any]] = {
    "small": {"vocab_size": 32000, "hidden_size": 512, "num_layers": 8, "num_heads": 8, "ffn_size": 1376},
    "wide": {
        **{"vocab_size": 32000, "hidden_size": 2048, "num_layers": 4, "num_heads": 32, "num_kv_heads": 4},
        **{"ffn_size": 5632},
    },
    "smollm2-360m": {
        **{"vocab_size": 49152, "hidden_size": 960, "num_layers": 32, "num_heads": 15, "num_kv_heads": 5},
        **{"ffn_size": 2560, "tie_embeddings": True},
    },
}
SEQ, THREADS = 512, 2
LR = 1e-4
PEFT = {  # of about the same number of trained parameters, but for the prefix
    "lora": {"method": "lora", "r": 8},
    "dora": {"method": "lora", "r": 8, "dora": True},
    "adapter": {"method": "adapter", "size": 64},
    "prefix": {"method": "prefix", "length": 16},
    "lora-nf4": {"method": "lora", "r": 8, "base_dtype": "nf4"},
    "lora-int8": {"method": "lora", "r": 8, "base_dtype": "int8"},
}


Contender = tuple[Callable[[int], float], Any]  # one step, which returns its loss; the optimizer
Batches = Callable[[], tuple[Any, Any]]  # the next tokens and targets, the same for everybody


def bare(model: dict[str, Any], dtype: str, mode: str, batch: Batches) -> Contender:
    """A hand-written loop: SDPA, fused AdamW, autocast for bfloat16."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    vocab, hidden, heads, ffn = (model[key] for key in ("vocab_size", "hidden_size", "num_heads", "ffn_size"))
    assert "num_kv_heads" not in model and "tie_embeddings" not in model

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.RMSNorm(hidden, eps=1e-5), nn.RMSNorm(hidden, eps=1e-5)
            self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
            self.gate_up, self.down = nn.Linear(hidden, 2 * ffn, bias=False), nn.Linear(ffn, hidden, bias=False)

        def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            b, s, _ = x.shape
            q, k, v = self.qkv(self.norm1(x)).view(b, s, 3, heads, -1).permute(2, 0, 3, 1, 4)

            def rotate(t: torch.Tensor) -> torch.Tensor:
                first, second = t.chunk(2, -1)
                return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(v.dtype)

            y = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(b, s, hidden))
            gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
            return x + self.down(F.silu(gate) * up)

    class Llama(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(vocab, hidden)
            self.blocks = nn.ModuleList(Block() for _ in range(model["num_layers"]))
            self.norm, self.head = nn.RMSNorm(hidden, eps=1e-5), nn.Linear(hidden, vocab, bias=False)
            width = hidden // heads
            angles = torch.outer(torch.arange(SEQ).float(), 10000.0 ** (-torch.arange(0, width, 2).float() / width))
            self.register_buffer("cos", angles.cos())
            self.register_buffer("sin", angles.sin())

        def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            x = self.embedding(tokens)
            for block in self.blocks:
                x = block(x, self.cos, self.sin)
            return F.cross_entropy(self.head(self.norm(x)).view(-1, vocab), targets.view(-1))

    made = Llama()
    run = torch.compile(made) if mode == "compiled" else made
    return _plain_loop(made, run, dtype, batch)


def llama(model: dict[str, Any]) -> Any:
    """transformers' LlamaForCausalLM of the same sizes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=model["vocab_size"],
        hidden_size=model["hidden_size"],
        intermediate_size=model["ffn_size"],
        num_hidden_layers=model["num_layers"],
        num_attention_heads=model["num_heads"],
        num_key_value_heads=model.get("num_kv_heads"),
        max_position_embeddings=SEQ,
        tie_word_embeddings=model.get("tie_embeddings", False),
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def transformers(model: dict[str, Any], dtype: str, mode: str, batch: Batches) -> Contender:
    """The same loop around transformers."""
    import torch

    made = llama(model)
    if mode in ("lora", "dora"):
        made = peft_lora(made, dora=mode == "dora")
    run = torch.compile(made) if mode == "compiled" else made
    # transformers shifts the labels itself; the loss runs over one token less.
    return _plain_loop(
        made,
        lambda tokens, targets: run(input_ids=tokens, labels=tokens.masked_fill(targets == -100, -100)).loss,
        dtype,
        batch,
    )


def peft_lora(model, dora: bool = False):
    """A model of transformers with the peft library's LoRA on every linear of its blocks."""
    from peft import LoraConfig, get_peft_model

    linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=linears, use_dora=dora))


def batches(vocab: int, size: int, prompt: int, seed: int = 0) -> Batches:
    """Random tokens; the targets of a prompt do not count."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.randint(0, vocab, (size, SEQ + 1), generator=generator)
        targets = tokens[:, 1:].clone()
        targets[:, : SEQ * prompt // 100] = -100
        return tokens[:, :-1].contiguous(), targets

    return batch


def _plain_loop(model, loss_of, dtype: str, batch: Batches) -> Contender:
    import torch

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, fused=True)

    def step(_: int) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = loss_of(*batch())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step, optimizer


def counted(targets: Any) -> Any:
    """Where targets count, as our loader says it."""
    counts = targets.view(-1) != -100
    return None if counts.all() else counts.nonzero().squeeze(1)


def ours(model: dict[str, Any], dtype: str, mode: str, batch: Batches) -> Contender:
    """This project's train_step, in a process as ``train`` prepares it."""
    from megatron_lite.config import parse_config
    from megatron_lite.data.batch import Batch
    from megatron_lite.distributed.mesh import solo_mesh
    from megatron_lite.planning.plan import make_plan
    from megatron_lite.training.allocator import keep_freed
    from megatron_lite.training.faults import Faults
    from megatron_lite.training.step import Trainer

    keep_freed()
    model = {**model, "max_seq_len": SEQ}
    train = {"global_batch_size": 1, "micro_batch_size": 1, "precision": dtype, "compile": mode == "compiled"}
    data = {"train": [{"path": "unused"}], "seq_len": SEQ}
    tree = {"model": model, "data": data, "train": train, "optim": {"lr": LR, "schedule": "constant"}}
    if mode in PEFT:
        model["max_seq_len"] += 16
        tree |= {"peft": PEFT[mode], "init": {"from": "unused"}}
        if "base_dtype" in PEFT[mode]:
            model["ffn_size"] = -(-model["ffn_size"] // 64) * 64  # whole blocks: 2 % more
    config = parse_config(tree)
    trainer = Trainer(config, solo_mesh(), make_plan(config, 1), Faults.none())

    def step(number: int) -> float:
        tokens, targets = batch()
        return trainer.train_step([Batch(tokens, targets, None, None, number, counted(targets))]).loss

    return step, trainer.engine.optimizer


MAKERS = {"ours": ours, "bare": bare, "transformers": transformers}


def _contender(pipe, name: str, model: str, batch: int, dtype: str, prompt: int) -> None:
    import torch

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    torch.ones(8, 8) @ torch.ones(8, 8)
    maker, _, mode = name.partition("-")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sizes = MODELS[model]
    step, optimizer = MAKERS[maker](sizes, dtype, mode, batches(sizes["vocab_size"], batch, prompt))
    while (number := pipe.recv()) is not None:
        began = time.perf_counter()
        loss = step(number)
        taken = time.perf_counter() - began
        state = sum(held.nbytes for states in optimizer.state.values() for held in states.values())
        pipe.send((taken, loss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, state))
    os._exit(0)


def main(
    dtype: str = "float32",
    rounds: int = 5,
    contenders: str = "",
    prompt: int = 0,
    model: str = "small",
    batch: int = 4,
) -> None:
    names = contenders.split(",") if contenders else ["ours", "bare", "transformers", "ours-compiled", "bare-compiled"]
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name in names:
        pipes[name], theirs = context.Pipe()
        context.Process(target=_contender, args=(theirs, name, model, batch, dtype, prompt), daemon=True).start()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    memory, losses, states = {}, {}, {}
    for number in range(rounds + 2):  # two to warm up and compile
        for name, pipe in pipes.items():
            pipe.send(number)
            taken, losses[name], memory[name], states[name] = pipe.recv()
            if number >= 2:
                seconds[name].append(taken)
    print(f"{model}, {batch} × {SEQ} tokens, {dtype}, {THREADS} threads, prompts of {prompt} %, {rounds} rounds;")
    print("medians, of paired ratios")
    print(f"{'':<16}{'tokens/s':>10}{'ratio':>8}{'peak MiB':>10}{'ratio':>8}{'optimizer MiB':>15}{'loss':>9}")
    reference = "bare" if "bare" in names else names[0]
    for name in names:
        rate = batch * SEQ / statistics.median(seconds[name])
        ratio = statistics.median(r / s for r, s in zip(seconds[reference], seconds[name], strict=True))
        print(
            f"{name:<16}{rate:>10.0f}{ratio:>8.2f}{memory[name] / 1024:>10.0f}"
            f"{memory[name] / memory[reference]:>8.2f}{states[name] / 2**20:>15.2f}{losses[name]:>9.4f}"
        )
        pipes[name].send(None)


if __name__ == "__main__":
    answer_help(__doc__)
    pairs = (argument.lstrip("-").split("=") for argument in sys.argv[1:])
    main(**{key: int(value) if value.isdigit() else value for key, value in pairs})
