"""The task base class: the samples, the loss, the metrics of an evaluation, and a sample to show."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

from torch import Tensor

from megatron_lite.config import Config
from megatron_lite.data.batch import IGNORED, Batch
from megatron_lite.data.dataset import Dataset, Split, build_dataset
from megatron_lite.data.objective import Objective
from megatron_lite.data.tokenizer import Tokenizer
from megatron_lite.layers.context import Context
from megatron_lite.models.decoder import Decoder

Forward = Callable[..., Tensor]  # a model, or the engine's call of it: (tokens, context, output)


class Task(ABC):
    """What a model is trained to do. Losses are sums over targets; the training step divides by the global count."""

    objective: Objective

    def __init__(self, config: Config) -> None:
        self.config = config

    def dataset(self, split: Split) -> Dataset:
        """The samples of a split."""
        config = self.config
        return build_dataset(config.data, config.run.seed, split, config.model.vocab_size, self.objective)

    def count(self, batch: Batch) -> Tensor:
        """How many targets a micro batch has, an integer scalar."""
        return (batch.targets != IGNORED).sum()

    @abstractmethod
    def loss(self, forward: Forward, batch: Batch, context: Context) -> Tensor:
        """The sum of the losses of a micro batch's targets, a scalar, the same on every tp rank."""

    @abstractmethod
    def metrics(self, loss: float) -> dict[str, float]:
        """The metrics of an evaluation by name, from the mean loss per target."""

    @abstractmethod
    def describe(self, metrics: Mapping[str, float]) -> str:
        """The metrics as one line for the log."""

    def sample(self, model: Decoder, tokenizer: Tokenizer, files: Mapping[str, bytes], context: Context) -> str | None:
        """A text that shows what the model has learnt, or None. Called on every rank. ``files``: the tokenizer's."""
        return None
