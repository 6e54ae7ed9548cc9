"""Text from a checkpoint: greedy or sampled, with a key-value cache, on one rank or under tensor parallelism."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_lite import checkpoint
from megatron_lite.data.tokenizer import parse_tokenizer
from megatron_lite.dist import random
from megatron_lite.dist.env import read_rank
from megatron_lite.dist.mesh import build_mesh, pick_device, process_group
from megatron_lite.dist.shard import materialize, pieces_of
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.layers.attention import KeyValueCache
from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.plan import check_tp
from megatron_lite.trainer import DTYPES


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 leave the distribution whole."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError with every number that makes no sense."""
        mistakes = []
        if self.max_new_tokens < 1:
            mistakes.append(f"--max_new_tokens={self.max_new_tokens}: must be at least 1")
        if not 0 <= self.temperature < math.inf:
            mistakes.append(f"--temperature={self.temperature}: must be 0 (greedy) or more")
        if self.top_k < 0:
            mistakes.append(f"--top_k={self.top_k}: must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            mistakes.append(f"--top_p={self.top_p}: must be above 0 and at most 1 (off)")
        if mistakes:
            raise ConfigError("\n".join(mistakes))


def choose(logits: Tensor, sampling: Sampling, position: int) -> Tensor:
    """The next token of each row of ``logits`` [batch, vocab]. The draw depends on (seed, position) alone.

    Nucleus sampling is Holtzman et al. 2020: the smallest set of tokens whose probability reaches ``top_p``.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    scaled = logits.double().cpu() / sampling.temperature
    if 0 < sampling.top_k < scaled.shape[-1]:
        limit = scaled.topk(sampling.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < limit, float("-inf"))
    probabilities = scaled.softmax(dim=-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= sampling.top_p
        probabilities = probabilities.scatter(1, order, ordered.masked_fill(beyond, 0))
    generator = torch.Generator().manual_seed(random.mix(sampling.seed, position))
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1).to(logits.device)


@torch.no_grad()
def generate(model: Decoder, prompt: list[int], sampling: Sampling, stop: int | None, dtype: torch.dtype) -> list[int]:
    """The tokens that follow ``prompt``, up to ``max_new_tokens``, the model's length, or the token ``stop``.

    Under tensor parallelism every rank calls this and gets the same tokens: logits are gathered, and all draw alike.
    """
    with model.whole_tokens():
        return _generate(model, prompt, sampling, stop, dtype)


def _generate(model: Decoder, prompt: list[int], sampling: Sampling, stop: int | None, dtype: torch.dtype) -> list[int]:
    device = model.embedding.weight.device
    caches = [KeyValueCache() for _ in model.blocks]
    tokens = torch.tensor([prompt], device=device)
    produced: list[int] = []
    room = model.config.max_seq_len - len(prompt)
    for _ in range(min(sampling.max_new_tokens, room)):
        logits = model(tokens, caches=caches, dtype=dtype)
        token = int(choose(logits, sampling, len(prompt) + len(produced)))
        if token == stop:
            break
        produced.append(token)
        tokens = torch.tensor([[token]], device=device)
    return produced


def generate_text(path: Path, prompt: str, sampling: Sampling, dtype: torch.dtype | None = None) -> str | None:
    """Load a checkpoint, split over as many ranks as were started, and continue ``prompt``; None but on rank 0.

    Raises CheckpointError for a checkpoint that does not verify or has no tokenizer, ConfigError for bad numbers.
    """
    sampling.check()
    rank = read_rank()
    device = pick_device(rank)
    with process_group(rank, device, timeout_seconds=600.0):
        mesh = build_mesh({"tp": rank.size}, device)
        assert mesh is not None
        with contextlib.closing(checkpoint.open_source(path, mesh.world)) as source:
            check_tp(source.model, rank.size)
            extras = source.extras()
            if "tokenizer.model" not in extras:
                raise CheckpointError(f"{path} has no tokenizer.model, to read a prompt with")
            tokenizer = parse_tokenizer(extras["tokenizer.model"], path)
            compute = dtype or DTYPES[source.precision]
            with torch.device("meta"):
                model = Decoder(source.model, mesh.tp, sp=False).to(torch.promote_types(compute, torch.float32))
            materialize(model, device)
            weights = {f"model.{name}": piece for name, piece in pieces_of(model, mesh.tp).items()}
            checkpoint.agree(mesh.world, lambda: source.load(weights), path)
        tokens = tokenizer.encode(prompt) or [tokenizer.eos_id()]
        if len(tokens) >= source.model.max_seq_len:
            raise ConfigError(f"the prompt has {len(tokens)} tokens; this model holds {source.model.max_seq_len}")
        produced = generate(model, tokens, sampling, tokenizer.eos_id(), compute)
    return tokenizer.decode([*tokens, *produced]) if rank.rank == 0 else None
