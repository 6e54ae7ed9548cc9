"""Tokens from a model: greedy or sampled, with a key-value cache; the same under tensor parallelism."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_lite.distributed import random
from megatron_lite.errors import NonFiniteError
from megatron_lite.inference.requests import Sampling
from megatron_lite.layers.cache import KeyValueCache
from megatron_lite.layers.context import Context
from megatron_lite.models.decoder import Decoder


def choose(logits: Tensor, sampling: Sampling, position: int) -> Tensor:
    """The next token, int64 [batch], for each row of ``logits`` [batch, vocab]. Draws depend only on (seed, position).

    Nucleus sampling is Holtzman et al. 2020: the smallest set of tokens whose probability reaches ``top_p``.
    Raises NonFiniteError.
    """
    if not logits.isfinite().all():
        raise NonFiniteError("the model's logits are not finite")
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    scaled = logits.double().cpu()
    scaled = (scaled - scaled.amax(dim=-1, keepdim=True)) / sampling.temperature  # never above 0, however small that is
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


def of_request(sampling: Sampling, index: int, own: Mapping[str, Any]) -> Sampling:
    """The settings of request number ``index``: its ``own`` values, else those of ``sampling``. Requests get different
    seeds; the first one, and one with its own seed, draw the same tokens as a single prompt would."""
    seed = random.mix(sampling.seed, index) if index else sampling.seed
    return replace(sampling, **{"seed": seed, **own})


@torch.no_grad()
def generate(
    model: Decoder,
    prompt: list[int],
    sampling: Sampling,
    stop: Collection[int],
    dtype: torch.dtype,
    *,
    known: int | None = None,
) -> list[int]:
    """The tokens that follow ``prompt``, up to ``max_new_tokens``, the model's length, or one of the tokens ``stop``.

    ``known``: only tokens below it are produced. Under tensor parallelism every rank calls this and gets the same
    tokens: logits are gathered, and all ranks draw with the same seed.
    """
    assert all(0 <= token < (model.config.vocab_size or 0) for token in prompt)  # rows beyond are padding
    device, most = model.projection.weight.device, most_tokens(model, prompt, sampling)
    context = Context(dtype=dtype, cache=KeyValueCache(1, len(prompt) + most))
    tokens = torch.tensor([prompt], device=device)
    produced: list[int] = []
    with model.whole_tokens():
        for _ in range(most):
            logits = model(tokens, context)[:, :known]
            token = int(choose(logits, sampling, len(prompt) + len(produced)))
            if token in stop:
                break
            produced.append(token)
            tokens = torch.tensor([[token]], device=device)
    return produced


def longest_prompt(model: Decoder) -> int:
    """The most tokens that a prompt may have so that there is room for one more."""
    return model.config.max_seq_len - (0 if model.prefix is None else model.prefix.length) - 1


def most_tokens(model: Decoder, prompt: Sequence[int], sampling: Sampling) -> int:
    """How many tokens may follow a prompt."""
    return min(sampling.max_new_tokens, longest_prompt(model) + 1 - len(prompt))
