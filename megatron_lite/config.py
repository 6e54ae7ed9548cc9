"""The config: one pydantic tree, read from YAML with ``--section.key=value`` overrides on top.

No torch here: a mistake is reported in well under a second, every mistake at once, each with its key and the nearest
valid one. OmegaConf reads the YAML, because it knows ``1e-4`` as a number and refuses duplicate keys.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from omegaconf import OmegaConf
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from megatron_lite import targets
from megatron_lite.cli import nearest
from megatron_lite.errors import ConfigError


def _number(value: Any) -> Any:
    """A number as typed: ``1e3`` may stand for a whole one, and ``true`` for none."""
    if isinstance(value, bool):
        raise ValueError("expected a number")
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return value
    return int(number) if isinstance(number, float) and number.is_integer() else number


Integer = Annotated[int, BeforeValidator(_number)]
Number = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[Integer, Field(gt=0, lt=2**48)]
Count = Annotated[Integer, Field(ge=0, lt=2**48)]
Width = Annotated[Integer, Field(gt=0, le=2**16)]  # of what peft adds: a stranger's file cannot ask for any amount
Probability = Annotated[Number, Field(ge=0, lt=1)]
PositiveFloat = Annotated[Number, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[Number, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A section of the config: unknown keys are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, serialize_by_alias=True)


class RunConfig(Section):
    """Where the run lives: ``dir/name``. ``seed`` fixes weights, sample order and dropout at every layout."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "run"
    dir: str = "runs"
    seed: Count = 0


class RopeScaling(Section):
    """Rotary frequency scaling: ``linear`` divides positions; ``llama3`` rescales only long wavelengths."""

    type: Literal["linear", "llama3"]
    factor: PositiveFloat
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_max_seq_len: Positive = 8192


class ModelConfig(Section):
    """The shape of a decoder. ``preset`` names a file of ``configs/models`` whose keys the others override.

    ``vocab_size`` comes from ``data.tokenizer`` when it is not given; it is padded to a multiple of
    ``vocab_multiple``, so that tp can split it, and the true size is kept. ``qk_norm``: an RMS norm of each head's
    queries and keys before they are rotated (Qwen3).
    """

    preset: str | None = None
    family: Literal["llama", "gpt2"] = "llama"
    vocab_size: Positive | None = None
    vocab_multiple: Positive = 128
    hidden_size: Positive = 256
    num_layers: Positive = 4
    num_heads: Positive = 4
    num_kv_heads: Positive | None = None
    head_dim: Positive | None = None
    ffn_size: Positive | None = None
    max_seq_len: Positive = 2048
    norm_eps: PositiveFloat = 1e-5
    rope_theta: PositiveFloat = 10000.0
    rope_scaling: RopeScaling | None = None
    bias: bool | None = None
    qkv_bias: bool | None = None
    qk_norm: bool = False
    tie_embeddings: bool | None = None
    dropout: Probability = 0.0
    attention_dropout: Probability = 0.0
    init_std: PositiveFloat = 0.02

    @model_validator(mode="before")
    @classmethod
    def _family_defaults(cls, values: Any) -> Any:
        """Fill in what follows from the family and the other sizes."""
        if not isinstance(values, dict):
            return values
        gpt2 = values.get("family") == "gpt2"
        filled = {"bias": gpt2, "tie_embeddings": gpt2, **{k: v for k, v in values.items() if v is not None}}
        filled.setdefault("qkv_bias", filled["bias"])
        hidden, heads = _number(filled.get("hidden_size", 256)), _number(filled.get("num_heads", 4))
        if isinstance(heads, int) and heads > 0:
            filled.setdefault("num_kv_heads", heads)
            if isinstance(hidden, int) and "head_dim" not in filled:
                if hidden % heads:
                    fits = sorted((n for n in range(1, 257) if hidden % n == 0), key=lambda n: abs(n - heads))[:3]
                    nearby = ", ".join(map(str, sorted(fits)))
                    raise ValueError(
                        f"num_heads={heads} must divide hidden_size={hidden}, for example {nearby}; or set head_dim"
                    )
                filled["head_dim"] = hidden // heads
        if isinstance(hidden, int):
            filled.setdefault("ffn_size", 4 * hidden if gpt2 else -(-8 * hidden // 3 // 32) * 32)
        return filled

    @model_validator(mode="after")
    def _shapes_fit(self) -> ModelConfig:
        assert self.num_kv_heads and self.head_dim
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")
        if self.family == "llama" and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary positions")
        return self

    @property
    def padded_vocab_size(self) -> int:
        """``vocab_size`` rounded up to a multiple of ``vocab_multiple``."""
        assert self.vocab_size is not None
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple


class SourceConfig(Section):
    """One indexed dataset (the prefix of its .bin and .idx) and its weight in the blend."""

    path: str
    weight: PositiveFloat = 1.0


class DataConfig(Section):
    """What is trained on. Without ``validation``, ``split`` cuts train, validation and test out of ``train``.

    ``tokenizer``: a sentencepiece .model, a tokenizer.json, or a folder with one of them. ``packing``: of datasets that
    ``data_tools chat`` made, samples are windows of whole conversations, masked from each other, and of longer ones the
    beginning (``long_conversations: truncate``) or nothing (``drop``).
    ``allow_change``, ``force_tokenizer``: resume although the data, or the tokenizer, is not what it was.
    """

    tokenizer: str | None = None
    train: Annotated[list[SourceConfig], Field(min_length=1)]
    validation: list[SourceConfig] | None = None
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

    ``adafactor`` keeps a row and a column of state for each matrix (Shazeer and Stern 2018); ``lr`` is relative to the
    size of the weights there, and it takes neither ``betas`` nor ``eps``. ``muon`` updates the blocks' matrices by
    their orthogonalised ``momentum`` (Jordan et al. 2024), scaled so that AdamW's ``lr`` fits, and the rest by AdamW.
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


class ParallelConfig(Section):
    """Degrees of parallelism; data parallelism follows from the number of ranks.

    ``zero``: what is divided over data-parallel ranks: 0 nothing, 1 the optimizer state, 2 gradients, 3 weights, too.
    ``offload``: what DeepSpeed keeps in CPU memory: the optimizer's part, or the weights, too. ``deepspeed``: keys laid
    over the DeepSpeed config that is made from this one.
    ``bucket_mb``: gradients that are reduced together, under ddp and DeepSpeed. ``prefetch``: blocks that FSDP2 gathers
    ahead of the one at work. ``reduce_once``: FSDP2 keeps gradients whole until the last micro batch and reduces once a
    step, where it otherwise reduces, and divides, those of every micro batch.
    ``dp_replicate`` groups of ranks each hold everything, divided among themselves (hybrid sharding).
    ``offload_activations``: what backward needs of each block waits in CPU memory; with ``recompute: full`` its input.
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
    """How long and how much at a time. The gradient accumulation follows: global batch ÷ (micro batch × dp)."""

    steps: Positive = 100
    global_batch_size: Positive = 8
    micro_batch_size: Positive = 8
    precision: Precision = "float32"
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

    Its ``model`` section is this run's, too, where the config does not say otherwise. ``optimizer``: go on with its
    optimizer, too. ``adapter``: what ``peft`` adds starts as this adapter, a checkpoint, a run or a folder of the peft
    library's, of the same method, modules and sizes.
    """

    source: str | None = Field(default=None, alias="from")
    optimizer: bool = False
    adapter: str | None = None


class CheckpointConfig(Section):
    """When to save (``every`` 0: only at the end), what to keep, and where to resume from: ``auto`` (the newest that
    verifies, if there is one), ``none``, or a path. ``trust``: what is read is not hashed first. ``async``: a step
    waits for a copy only, which is written while training goes on.
    """

    every: Count = 0
    keep: Positive = 2
    keep_every: Positive | None = None
    resume: str = "auto"
    trust: bool = False
    background: bool = Field(default=False, alias="async")


# Frozen weights in 8 or 4 bits (``dist/packing.py``): so many numbers of a row share a float32 scale, and take so many
# bytes with it.
PACKED_BLOCK = 64
PACKED_BYTES = {"int8": 64 + 4, "nf4": 32 + 4}


class PeftSection(Section):
    """Parameter-efficient fine-tuning of the model that ``init.from`` names, which stays as it is.

    ``base_dtype``: what the base is stored in; None: what is computed in (``train.precision``). ``int8``, ``nf4``: the
    linears inside the blocks in 8 or 4 bits (QLoRA, Dettmers et al. 2023), the rest in what is computed in.
    """

    base_dtype: Literal["float32", "bfloat16", "int8", "nf4"] | None = None

    @property
    def packing(self) -> str | None:
        """How the base's linears are packed, if they are."""
        return self.base_dtype if self.base_dtype in PACKED_BYTES else None

    def differences(self, there: PeftSection, model: ModelConfig) -> list[str]:
        """By key, why the adapter of another section could not be this one's."""
        keys = ["method"] if type(there) is not type(self) else type(self).model_fields.keys() - {"base_dtype"}
        return _unlike(sorted(keys), there, self)


def _unlike(keys: Iterable[str], there: PeftSection, here: PeftSection) -> list[str]:
    values = {key: (getattr(there, key), getattr(here, key)) for key in keys}
    return [f"peft.{key} {a} there, {b} here" for key, (a, b) in values.items() if a != b]


class LoRAConfig(PeftSection):
    """Low-rank updates of linears (Hu et al. 2021): W + alpha / r · B A, and with ``rslora`` alpha / √r (Kalajdzievski
    2023).

    ``targets``: q, k, v, o, gate, up, down, embedding, head, or globs over whole names (``blocks.[0-3].mlp.*``).
    ``ranks``, ``alphas``: another r or alpha for what a pattern matches; the first that matches counts. ``dropout``: of
    what A sees. ``dora``: direction and magnitude apart (Liu et al. 2024).
    """

    method: Literal["lora"]
    targets: Annotated[list[str], Field(min_length=1)] = ["q", "k", "v", "o", "gate", "up", "down"]
    r: Width = 8
    alpha: PositiveFloat = 16.0
    ranks: dict[str, Width] = {}
    alphas: dict[str, PositiveFloat] = {}
    dropout: Probability = 0.0
    rslora: bool = False
    dora: bool = False

    def rank_of(self, name: str) -> int:
        """r of one linear."""
        return next((r for pattern, r in self.ranks.items() if targets.matches(pattern, name)), self.r)

    def alpha_of(self, name: str) -> float:
        """alpha of one linear."""
        return next((a for pattern, a in self.alphas.items() if targets.matches(pattern, name)), self.alpha)

    def scale_of(self, name: str) -> float:
        """What B A is multiplied by there."""
        r = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(r) if self.rslora else r)

    def matched(self, model: ModelConfig) -> list[str]:
        """The linears of this model that are adapted."""
        names = targets.linear_names(model.num_layers, gated=model.family == "llama")
        return [name for name in names if any(targets.matches(pattern, name) for pattern in self.targets)]

    def differences(self, there: PeftSection, model: ModelConfig) -> list[str]:
        """Of two that name their modules otherwise, in what they come to; dropout is training's."""
        if not isinstance(there, LoRAConfig):
            return super().differences(there, model)
        found = _unlike(("dora", "rslora"), there, self)
        here, other = self.matched(model), there.matched(model)
        for where, some, rest in (("there", other, here), ("here", here, other)):
            if only := [name for name in some if name not in rest]:
                found.append(f"peft.targets: {', '.join(targets.summary(only))} only {where}")
        both = [name for name in here if name in other]
        for key, ours, theirs in (("r", self.rank_of, there.rank_of), ("alpha", self.alpha_of, there.alpha_of)):
            if odd := [name for name in both if not math.isclose(ours(name), theirs(name))]:
                told = ", ".join(targets.summary(odd))
                found.append(f"peft.{key} of {told} {theirs(odd[0])} there, {ours(odd[0])} here")
        return found

    def mistakes(self, config: Config) -> list[str]:
        """What does not fit the rest of the config."""
        return self.unfit(config.model)

    def unfit(self, model: ModelConfig) -> list[str]:
        """What does not fit a model."""
        names = targets.linear_names(model.num_layers, gated=model.family == "llama")
        listed = self.targets
        if model.family == "gpt2" and "targets" not in self.model_fields_set:
            listed = [name for name in listed if name != "gate"]
        found, matched = targets.mistakes("peft.targets", listed, names), self.matched(model)
        if matched:
            for key in ("ranks", "alphas"):
                found += targets.mistakes(f"peft.{key}", getattr(self, key), matched)
        ends = [name for name in targets.ENDS if name in matched]
        if ends and model.tie_embeddings:
            found.append(
                f"peft.targets: {' and '.join(ends)}: model.tie_embeddings makes one tensor of both, and an update of "
                "one could never be merged into it"
            )
        elif ends and self.dora:
            found.append(f"peft.dora: {' and '.join(ends)}: only linears inside the blocks have magnitudes")
        return found


class AdapterConfig(PeftSection):
    """Bottlenecks of ``size`` units between the frozen layers, which start as the identity.

    ``placement``: ``houlsby`` after attention and after the MLP (Houlsby et al. 2019), ``pfeiffer`` after the MLP alone
    (Pfeiffer et al. 2021), ``parallel`` beside the MLP (He et al. 2022). ``scale``: of what they add.
    """

    method: Literal["adapter"]
    size: Width = 64
    placement: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    scale: PositiveFloat = 1.0

    def matched(self, model: ModelConfig) -> list[str]:
        """What is followed, or accompanied, by a bottleneck."""
        halves = ("attention", "mlp") if self.placement == "houlsby" else ("mlp",)
        return [f"blocks.{i}.{half}" for i in range(model.num_layers) for half in halves]

    def mistakes(self, config: Config) -> list[str]:
        """What does not fit the rest of the config."""
        tp = config.parallel.tp
        return [f"peft.size={self.size} is not a multiple of parallel.tp={tp}"] if self.size % tp else []


class PrefixConfig(PeftSection):
    """``length`` trained keys and values ahead of the tokens in every layer (Li and Liang 2021), which take the first
    ``length`` positions. ``reparameterize``: train them as an MLP's output, of so many hidden units, which is left out
    of what is exported.
    """

    method: Literal["prefix"]
    length: Width = 16
    reparameterize: Width | None = None

    def matched(self, model: ModelConfig) -> list[str]:
        """What has a prefix."""
        return [f"blocks.{i}.attention" for i in range(model.num_layers)]

    def mistakes(self, config: Config) -> list[str]:
        """What does not fit the rest of the config."""
        return self.unfit(config.model, config.data.seq_len, "data.seq_len")

    def unfit(self, model: ModelConfig, tokens: int = 1, called: str = "a token") -> list[str]:
        """What does not fit a model that reads so many tokens."""
        needed, limit = self.length + tokens, model.max_seq_len
        if needed <= limit:
            return []
        return [
            f"peft.length={self.length} + {called}={tokens} = {needed} positions exceed model.max_seq_len={limit}; "
            "the prefix takes the first"
        ]


METHODS: dict[str, type[PeftSection]] = {"lora": LoRAConfig, "adapter": AdapterConfig, "prefix": PrefixConfig}
PeftConfig = Annotated[LoRAConfig | AdapterConfig | PrefixConfig, Field(discriminator="method")]


_Line = Annotated[str, Field(pattern=r"^[^\n\r\x00]*$")]  # what becomes a line of a script, or a word of a command


class SshConfig(Section):
    """How ``launch`` reaches other hosts, beyond the user's ssh config; ``options`` as in ``ssh -o``."""

    port: Annotated[Integer, Field(gt=0, lt=65536)] | None = None
    options: list[_Line] = []


class SlurmConfig(Section):
    """The job that ``launch --via=slurm`` submits. ``srun``: a task for each rank, or a torchrun on each node.

    ``signal_seconds`` before the time limit the run saves, ends with 75 and, with ``requeue``, is queued again; also
    after a lost rank or node, if there is a new checkpoint. ``chain``: this many jobs, each of which goes on where
    those before it have stopped. ``array``: as in ``sbatch --array``; with ``%1`` its tasks are parts of one run, else
    runs of their own, ``NAME-I`` with seed I. ``setup``: lines of shell before the run (modules, environments),
    without ``${…}``. ``extra``: further options of sbatch, as in ``--mail-type=END``. ``container``: as in
    ``srun --container-image`` (enroot with pyxis).
    """

    srun: Literal["tasks", "torchrun"] = "tasks"
    partition: _Line | None = None
    account: _Line | None = None
    qos: _Line | None = None
    time: _Line | None = None
    gres: _Line | None = None
    constraint: _Line | None = None
    cpus_per_task: Positive | None = None
    mem: _Line | None = None
    exclusive: bool = False
    container: _Line | None = None
    container_mounts: _Line | None = None
    array: _Line | None = None
    chain: Positive = 1
    signal_seconds: Count = 120
    requeue: bool = True
    setup: list[_Line] = []
    extra: list[_Line] = []


class KubernetesConfig(Section):
    """The manifest that ``launch k8s`` prints. ``kind``: an indexed Job, or a PyTorchJob of the training operator.

    ``volumes``: persistent volume claims and where they are mounted. ``resources``: of each pod. ``shm``: the size of
    its /dev/shm. ``secrets``: Secrets whose keys become variables of the ranks.
    """

    kind: Literal["Job", "PyTorchJob"] = "Job"
    image: str | None = None
    namespace: str | None = None
    volumes: dict[str, str] = {}
    resources: dict[str, str] = {}
    shm: str = "8Gi"
    secrets: list[str] = []


class LaunchConfig(Section):
    """What ``python -m launch`` starts ranks with. ``env``: variables of every rank. ``forward``: names (or prefixes
    with a ``*``) of this machine's variables that ranks on other hosts get, beside the usual ones.

    ``tp_across_hosts`` allows tensor-parallel groups that span hosts, whose network is slow for them.
    """

    env: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = {}
    forward: list[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*\*?$")]] = []
    tp_across_hosts: bool = False
    ssh: SshConfig = SshConfig()
    slurm: SlurmConfig = SlurmConfig()
    k8s: KubernetesConfig = KubernetesConfig()


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    init: InitConfig = InitConfig()
    peft: PeftConfig | None = None
    launch: LaunchConfig = LaunchConfig()

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run.dir) / self.run.name

    @model_validator(mode="after")
    def _sections_fit(self) -> Config:
        if self.data.seq_len > self.model.max_seq_len:
            raise ValueError(f"data.seq_len={self.data.seq_len} exceeds model.max_seq_len={self.model.max_seq_len}")
        if self.train.global_batch_size % self.train.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size={self.train.global_batch_size} must be a multiple of "
                f"train.micro_batch_size={self.train.micro_batch_size}"
            )
        if self.peft is not None and (mistakes := self.peft.mistakes(self)):
            raise ValueError("\n".join(mistakes))
        return self


def find_file(name: str, folder: str = "") -> Path:
    """A config by path, or by name among those that come with the package (``demo`` finds ``configs/demo.yaml``)."""
    here = Path(__file__).parent
    for root in (Path(), here / "configs" / folder, here.parent / "configs" / folder):
        for suffix in ("", ".yaml"):
            if (path := root / f"{name}{suffix}").is_file():
                return path
    shipped = [p.stem for root in (here, here.parent) for p in sorted((root / "configs" / folder).glob("*.yaml"))]
    raise ConfigError(f"no config {name!r}{nearest(name, shipped)}; shipped with the package: {', '.join(shipped)}")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping as plain dictionaries. Raises ConfigError with file and line for anything else."""
    try:
        if path.stat().st_size > 1_000_000:
            raise ConfigError(f"{path} is over 1 MB: not a config")
        return parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """The mapping in a YAML text that comes from ``name``. Raises ConfigError."""
    if re.search(r"[\s\[{,:-][&*]\w", text):  # no config needs aliases, and nested ones can fill the memory
        raise ConfigError(f"{name}: YAML anchors and aliases (& and *) are not allowed in a config")
    if "${" in text:
        raise ConfigError(f"{name}: ${{…}} is not filled in; write the value, or give it as --section.key=value")
    try:
        tree = OmegaConf.to_container(OmegaConf.create(text))
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None
    except Exception as error:  # the YAML reader raises many kinds; each means the text is wrong
        mark = getattr(error, "problem_mark", None)
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        said = [getattr(error, "context", None), getattr(error, "problem", None)] if mark else [str(error)]
        problem = " ".join(" ".join(filter(None, said)).split()).replace(' in "<unicode string>",', " at")
        raise ConfigError(f"{place}: {problem or _NO_SECTIONS}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{name}: {_NO_SECTIONS}")
    return tree  # type: ignore[return-value]


_NO_SECTIONS = "expected sections such as 'model:' and 'train:'"


def apply_overrides(tree: dict[str, Any], overrides: Mapping[str, str]) -> list[str]:
    """Set dotted keys in ``tree``. Returns the mistakes found."""
    mistakes = []
    for dotted, text in overrides.items():
        node, parts = tree, dotted.split(".")
        for part in parts[:-1]:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
            if not isinstance(node, dict):
                mistakes.append(f"{dotted}: {part} is not a section")
                break
        else:
            try:
                node[parts[-1]] = _typed(text)
            except ConfigError as error:
                mistakes.append(f"{dotted}: {error}")
    return mistakes


def _typed(text: str) -> Any:
    """What was typed for a key: a YAML list or mapping, true, false or null, and otherwise the text as it stands (which
    a key that wants a number reads as one)."""
    if text.startswith(("[", "{")):
        return parse_yaml(f"value: {text}", text)["value"]
    return {"true": True, "false": False, "null": None}.get(text.lower(), text)


def parse_config(tree: dict[str, Any]) -> Config:
    """Validate a tree. Raises ConfigError with one line for every mistake in it."""
    try:
        return Config.model_validate({name: section for name, section in tree.items() if section is not None})
    except ValidationError as error:
        raise ConfigError("\n".join(_describe(e) for e in error.errors(include_url=False))) from None


def parse_model(tree: Any, where: str) -> ModelConfig:
    """Validate the ``model`` section that was found in ``where``. Raises ConfigError."""
    return _parse_section(ModelConfig, "model", tree, where)


def parse_peft(tree: Any, where: str) -> PeftConfig | None:
    """Validate the ``peft`` section that was found in ``where``, if there is one. Raises ConfigError."""
    return None if tree is None else _parse_section(PeftConfig, "peft", tree, where)


def _parse_section(section: Any, name: str, tree: Any, where: str) -> Any:
    try:
        return TypeAdapter(section).validate_python(tree)
    except ValidationError as error:
        lines = (_describe({**e, "loc": (name, *e["loc"])}) for e in error.errors(include_url=False))
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines)) from None


def load_config(name: str, overrides: Mapping[str, str]) -> Config:
    """Read, override, fill in the preset and the vocabulary, validate."""
    tree = read_yaml(find_file(name))
    mistakes = apply_overrides(tree, overrides)
    model = tree.get("model")
    if isinstance(model, dict) and isinstance(model.get("preset"), str):
        tree["model"] = model = {**read_yaml(find_file(model["preset"], "models")), **model}
    init = tree.get("init")
    if isinstance(init, dict) and isinstance(init.get("from"), str) and isinstance(model, (dict, type(None))):
        tree["model"] = {**model_section(init["from"]), **(model or {})}
    try:
        config = parse_config(tree)
    except ConfigError as error:
        raise ConfigError("\n".join([*mistakes, str(error)])) from None
    if config.peft is not None and config.init.source is None:
        mistakes.append("peft: init.from is missing: the model that is to be adapted")
    if config.peft is not None and config.init.optimizer:
        mistakes.append("init.optimizer: what peft trains is new, and that optimizer knows nothing of it")
    if config.peft is None and config.init.adapter is not None:
        mistakes.append("init.adapter: peft is missing: the method that it is of")
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    if config.model.vocab_size is None:
        size = _tokenizer_size(config.data.tokenizer)
        config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})
    return config


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that ``load_config`` reads back to the same config."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))


def model_section(source: str) -> dict[str, Any]:
    """The ``model`` section of a checkpoint of ours, a run, or a Hugging Face folder. Raises ConfigError."""
    path = Path(source)
    if (path / "config.json").is_file():
        from megatron_lite.models import huggingface

        try:
            return huggingface.model_section(
                json.loads((path / "config.json").read_text(encoding="utf-8")), f"{path}/config.json"
            )[0]
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}/config.json: {error}") from None
    latest = (path / "latest", path / "checkpoints" / "latest")
    names = (file.parent / file.read_text(encoding="utf-8").strip()[:100] for file in latest if file.is_file())
    for folder in (path, *names):
        if (folder / "config.yaml").is_file() and isinstance(
            found := read_yaml(folder / "config.yaml").get("model"), dict
        ):
            return found
    raise ConfigError(f"{source}: no checkpoint and no Hugging Face folder")


def _tokenizer_size(path: str | None) -> int:
    if path is None:
        raise ConfigError("model.vocab_size is unknown: set data.tokenizer (its size is used) or model.vocab_size")
    from megatron_lite.data.tokenizer import load_tokenizer

    return load_tokenizer(path).vocab_size


def _describe(error: Any) -> str:
    """One line for one pydantic error: key, problem, what was given, nearest valid."""
    location = [str(part) for part in error["loc"]] or ["config"]
    if location[0] == "peft":  # the method is named in between
        location[1:2] = []
    key = ".".join(location)
    given, message = error["input"], error["msg"].removeprefix("Value error, ")
    match error["type"]:
        case "union_tag_not_found":
            return f"{key}.method: missing; one of {', '.join(METHODS)}"
        case "union_tag_invalid":
            tag = error["ctx"]["tag"]
            return f"{key}.method: expected {', '.join(METHODS)}, not {tag!r}{nearest(tag, METHODS)}"
        case "extra_forbidden":
            known = _keys(error["loc"][:-1])
            return f"{key}: unknown key{nearest(location[-1], known)}; known: {', '.join(known)}"
        case "missing":
            return f"{key}: missing"
        case "model_type" | "dict_type":
            message = "expected a section"
        case "literal_error":
            message = f"expected {error['ctx']['expected']}"
            given_text = nearest(str(given), re.findall(r"'(.*?)'", message))
            return f"{key}: {message}, not {given!r:.200}{given_text}"
    message = message[0].lower() + message[1:]
    return f"{key}: {message}" if isinstance(given, (dict, BaseModel)) else f"{key}: {message}, not {given!r:.200}"


def _keys(location: tuple[str | int, ...]) -> Mapping[str, Any]:
    """The keys of the section at ``location``."""
    section: Any = Config
    if location[:1] == ("peft",):
        section, location = METHODS[str(location[1])], location[2:]
    for part in location:
        if isinstance(part, str):
            section = section.model_fields[part].annotation
        while not hasattr(section, "model_fields"):  # a list of sections, or one that may be missing
            section = get_args(section)[0]
    return {field.alias or name: field for name, field in section.model_fields.items()}
