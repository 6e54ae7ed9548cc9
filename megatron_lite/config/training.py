"""The sections for the run, its data, optimizer, parallelism, training, initialisation and checkpoints."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from megatron_lite.config.model import CHANGEABLE
from megatron_lite.section import (
    Count,
    Integer,
    NonNegativeFloat,
    Number,
    Positive,
    PositiveFloat,
    Probability,
    Section,
    one_of,
)
from megatron_lite.tasks import TASKS


class RunConfig(Section):
    """The run folder is ``dir/name``. ``seed`` determines weights and sample order for all layouts, and dropout masks
    for all layouts with the same tp, sp and micro batch size."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    dir: str = "runs"
    seed: Count = 0


class SourceConfig(Section):
    """One indexed dataset (the prefix of its .bin and .idx) and its weight in the blend."""

    path: str
    weight: PositiveFloat = 1.0


class DataConfig(Section):
    """The data. Without ``validation``, ``split`` divides ``train`` into train, validation and test.

    ``tokenizer``: a sentencepiece .model, a tokenizer.json, or a folder with one of them. ``packing: conversations``,
    for datasets made by ``data_tools chat``: samples are windows of whole conversations, masked from each other; longer
    conversations are truncated at the end or dropped (``long_conversations``).
    ``allow_change``: resume although the data has changed. ``force_tokenizer``: train, or resume, although the data was
    made with another tokenizer, or the run had another, or the tokenizer has more entries than the model.
    """

    tokenizer: str | None = None
    train: Annotated[list[SourceConfig], Field(min_length=1, examples=["[{path: PREFIX}]"])]
    validation: Annotated[list[SourceConfig] | None, Field(examples=["[{path: PREFIX}]"])] = None
    split: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (0.98, 0.01, 0.01)
    seq_len: Positive = 256
    document_mask: bool = False
    packing: Literal["none", "conversations"] = "none"
    long_conversations: Literal["truncate", "drop"] = "truncate"
    prefetch: Annotated[Integer, Field(ge=0, le=64)] = 2
    allow_change: bool = False
    force_tokenizer: bool = False


class OptimConfig(Section):
    """The optimizer and its learning-rate schedule. ``decay_steps`` is the length of WSD's final decay.

    ``adafactor`` keeps a row and a column of state for each matrix (Shazeer and Stern 2018); its ``lr`` is relative to
    the size of the weights, and it uses neither ``betas`` nor ``eps``. ``muon`` updates the blocks' matrices by their
    orthogonalised ``momentum`` (Jordan et al. 2024), scaled so that AdamW's ``lr`` fits, and the rest by AdamW.
    """

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    lr: PositiveFloat = 3e-4
    betas: tuple[Probability, Probability] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    momentum: Probability = 0.95
    weight_decay: NonNegativeFloat = 0.1
    clip: NonNegativeFloat = 1.0
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_steps: Count = 0
    decay_steps: Count | None = None
    min_lr_ratio: Annotated[Number, Field(ge=0, le=1)] = 0.1

    def decay(self, steps: int) -> int:
        """The length of WSD's decay in a run of ``steps``: by default a tenth of it, or what warm-up leaves if less."""
        if self.decay_steps is not None:
            return self.decay_steps
        return max(1, min(steps // 10, steps - self.warmup_steps))

    def decaying(self, step: int, steps: int) -> bool:
        """Whether WSD's decay has begun before ``step`` (from 0) of ``steps``."""
        return self.schedule == "wsd" and step > steps - self.decay(steps)

    def mistakes(self, steps: int) -> list[str]:
        """A line for each setting that does not fit a run of ``steps``."""
        warmup, decay, left = self.warmup_steps, self.decay_steps, steps - self.warmup_steps
        if left < 0:
            return [f"optim.warmup_steps={warmup} is longer than train.steps={steps}; at most {steps}"]
        if decay is not None and self.schedule != "wsd":
            return [f"optim.decay_steps={decay}: optim.schedule={self.schedule} has no separate decay; wsd has"]
        if decay is not None and decay > left:
            return [
                f"optim.decay_steps={decay} exceeds the {left} steps of train.steps={steps} that remain after "
                f"optim.warmup_steps={warmup}; at most {left}"
            ]
        return []


class ParallelConfig(Section):
    """Degrees of parallelism; data parallelism follows from the number of ranks.

    ``zero``: what is divided over data-parallel ranks: 0 nothing, 1 the optimizer state, 2 gradients, 3 weights, too.
    ``offload``: what DeepSpeed keeps in CPU memory: the optimizer's part, or the weights, too. ``deepspeed``: keys of
    DeepSpeed's config, which override those that follow from this one.
    ``bucket_mb``: the size in MiB of gradients that are reduced together, under ddp and DeepSpeed. ``prefetch``: how
    many blocks ahead FSDP2 gathers weights. ``reduce_once``: FSDP2 keeps whole gradients until the last micro batch and
    reduces them once a step; otherwise it reduce-scatters those of every micro batch.
    ``dp_replicate``: the number of replicas, each divided over its own group of ranks (hybrid sharding).
    ``offload_activations``: keep what is saved for backward in CPU memory; with ``recompute: full``, blocks' inputs.
    """

    tp: Positive = 1
    sp: bool = False
    engine: Literal["fsdp", "deepspeed"] = "fsdp"
    zero: Annotated[Integer, Field(ge=0, le=3)] = 0
    dp_replicate: Positive = 1
    offload: Literal["none", "optimizer", "all"] = "none"
    deepspeed: dict[str, Any] = {}
    recompute: Literal["none", "selective", "full"] = "none"
    offload_activations: bool = False
    bucket_mb: PositiveFloat = 25.0
    prefetch: Annotated[Integer, Field(ge=0, le=64)] = 1
    reduce_once: bool = False


class ProfileConfig(Section):
    """Steps to record with the torch profiler, as a trace in the run folder."""

    start: Positive = 3
    steps: Positive = 2


Precision = Literal["float32", "bfloat16", "float64"]
PRECISIONS = get_args(Precision)


class TrainConfig(Section):
    """Length, batch sizes, precision, evaluation. Gradient accumulation follows: global batch ÷ (micro batch × dp).

    ``task``: what is learnt. ``eval_every``: validate after every so many steps (0: never) on ``eval_steps`` global
    batches, or all of the data if it is less, each window once.
    """

    steps: Positive = 100
    global_batch_size: Positive = 8
    micro_batch_size: Positive = 8
    precision: Precision = "float32"
    task: Annotated[str, one_of(TASKS)] = "causal_lm"
    compile: bool = False
    log_every: Positive = 10
    eval_every: Count = 0
    eval_steps: Positive = 10
    sample_every: Count = 0
    sample_prompt: str = ""
    hang_timeout: PositiveFloat = 600.0
    skip_bad_batches: Count = 0
    peak_tflops: PositiveFloat | None = None
    profile: ProfileConfig | None = None


class InitConfig(Section):
    """What a new run starts from (``from``): weights of a checkpoint, a run or a Hugging Face folder.

    Its ``model`` section holds wherever the config does not set a key. ``optimizer``: load its optimizer state, too.
    ``adapter``: the adapter that ``peft`` starts from, of the same method, modules and sizes: a checkpoint, a run or a
    folder of the peft library.
    """

    source: str | None = Field(default=None, alias="from")
    optimizer: bool = False
    adapter: str | None = None


class CheckpointConfig(Section):
    """When to save (``every`` 0: only at the end), what to keep, and where to resume from: ``auto`` (the newest that
    verifies, if there is one), ``none``, or a path. ``trust``: read without verifying hashes. ``async``: copy the state
    while the next step computes, and write it in the background. ``allow_change``: keys of the model (and
    ``chat_template``) that may differ from the checkpoint's; otherwise, a difference is an error.
    """

    every: Count = 0
    keep: Positive = 2
    keep_every: Positive | None = None
    resume: str = "auto"
    trust: bool = False
    allow_change: list[Annotated[str, one_of((*CHANGEABLE, "chat_template"))]] = []
    background: bool = Field(default=False, alias="async")
