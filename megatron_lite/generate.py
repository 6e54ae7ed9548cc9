"""Text from a checkpoint: greedy or sampled, with a key-value cache, on one rank or under tensor parallelism."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_lite.dist import random
from megatron_lite.layers.attention import KeyValueCache
from megatron_lite.models.decoder import Decoder


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy. ``top_k`` 0 and ``top_p`` 1 leave the distribution whole."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


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
