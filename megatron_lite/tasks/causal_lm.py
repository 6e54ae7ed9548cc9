"""Causal language modelling: every token is predicted from those before it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from torch import Tensor

from megatron_lite.data.batch import Batch
from megatron_lite.data.ends import ends
from megatron_lite.data.objective import NEXT_TOKEN
from megatron_lite.data.tokenizer import Tokenizer
from megatron_lite.inference.requests import Sampling
from megatron_lite.inference.sampling import generate
from megatron_lite.layers.context import Context
from megatron_lite.models.decoder import Decoder
from megatron_lite.models.head import cross_entropy
from megatron_lite.tasks.task import Forward, Task

logger = logging.getLogger("megatron_lite")


class CausalLM(Task):
    """Next-token prediction; reports perplexity, and continues ``train.sample_prompt`` greedily."""

    objective = NEXT_TOKEN

    def loss(self, forward: Forward, batch: Batch, context: Context) -> Tensor:
        return forward(batch.tokens, context, cross_entropy(batch.targets, batch.counted))

    def metrics(self, loss: float) -> dict[str, float]:
        return {"validation_loss": loss, "validation_perplexity": math.exp(min(loss, 700.0))}

    def describe(self, metrics: Mapping[str, float]) -> str:
        return f"validation loss {metrics['validation_loss']:.4f}  perplexity {metrics['validation_perplexity']:.2f}"

    def sample(self, model: Decoder, tokenizer: Tokenizer, files: Mapping[str, bytes], context: Context) -> str | None:
        prompt = tokenizer.encode_prompt(self.config.train.sample_prompt)
        if any(not 0 <= token < model.vocab_size for token in prompt):
            logger.warning("no sample: train.sample_prompt has tokens that the model does not")
            return None
        tokens = generate(model, prompt, Sampling(max_new_tokens=64), ends(tokenizer, files), context.dtype)
        return tokenizer.decode([*prompt, *tokens])
