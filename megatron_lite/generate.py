"""Text from a checkpoint: greedy or sampled, with a key-value cache, on one rank or under tensor parallelism."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_lite import checkpoint, peft
from megatron_lite.checkpoint import CheckpointSource, Source
from megatron_lite.cli import nearest
from megatron_lite.config import PrefixConfig
from megatron_lite.data.template import ChatTemplate, find_template
from megatron_lite.data.tokenizer import Tokenizer, carried_tokenizer, parse_object
from megatron_lite.distributed import random
from megatron_lite.distributed.env import read_rank
from megatron_lite.distributed.mesh import Mesh, build_mesh, pick_device, process_group
from megatron_lite.distributed.shard import materialize, pieces_of, spec_of
from megatron_lite.errors import CheckpointError, ConfigError, DataError
from megatron_lite.layers.attention import KeyValueCache
from megatron_lite.models.decoder import Decoder
from megatron_lite.parallel.plan import check_tp, packing_mistakes
from megatron_lite.peft.prefix import fold
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
def generate(
    model: Decoder, prompt: list[int], sampling: Sampling, stop: Collection[int], dtype: torch.dtype
) -> list[int]:
    """The tokens that follow ``prompt``, up to ``max_new_tokens``, the model's length, or one of the tokens ``stop``.

    Under tensor parallelism every rank calls this and gets the same tokens: logits are gathered, and all draw alike.
    """
    with model.whole_tokens():
        return _generate(model, prompt, sampling, stop, dtype)


def _generate(
    model: Decoder, prompt: list[int], sampling: Sampling, stop: Collection[int], dtype: torch.dtype
) -> list[int]:
    device = model.embedding.weight.device
    caches = [KeyValueCache() for _ in model.blocks]
    tokens = torch.tensor([prompt], device=device)
    produced: list[int] = []
    room = longest_prompt(model) + 1 - len(prompt)
    for _ in range(min(sampling.max_new_tokens, room)):
        logits = model(tokens, caches=caches, dtype=dtype)
        token = int(choose(logits, sampling, len(prompt) + len(produced)))
        if token in stop:
            break
        produced.append(token)
        tokens = torch.tensor([[token]], device=device)
    return produced


def ends(tokenizer: Tokenizer, extras: Mapping[str, bytes]) -> set[int]:
    """The tokens that end a text: the tokenizer's own, and those that the model's ``generation_config.json`` names."""
    named = parse_object(extras, "generation_config.json").get("eos_token_id", [])
    return {tokenizer.eos_id, *(named if isinstance(named, list) else [named])}


def longest_prompt(model: Decoder) -> int:
    """How many tokens a prompt may have so that there is room for one more."""
    return model.config.max_seq_len - (0 if model.prefix is None else model.prefix.length) - 1


@dataclass(frozen=True)
class Request:
    """A text to be continued, by the model as it is or with one of its adapters."""

    prompt: str
    adapter: str | None = None


def read_requests(path: Path) -> list[Request]:
    """One JSON object a line: ``prompt`` and, perhaps, ``adapter``. Raises DataError naming the line."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            tree = json.loads(line)
            if not isinstance(tree, dict) or not tree.keys() <= {"prompt", "adapter"}:
                raise ValueError("expected an object with prompt and, perhaps, adapter")
            prompt, adapter = tree.get("prompt"), tree.get("adapter")
            if not isinstance(prompt, str) or not isinstance(adapter, str | None):
                raise ValueError("prompt and adapter are texts")
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: {error}") from None
        found.append(Request(prompt, adapter))
    return found


class Models:
    """A base in memory once and, by name, the adapters on it, each a model of its own whose frozen weights are the
    base's very tensors. So every request may name another adapter, which costs nothing; what is computed together, in
    one call of a model, has one adapter. ``packing``: of the base in memory, whatever they were trained on.
    """

    def __init__(
        self,
        base: Source,
        mesh: Mesh,
        compute: torch.dtype,
        adapters: Mapping[str, CheckpointSource],
        packing: str | None = None,
    ) -> None:
        check_tp(base.model, mesh.tp.size)
        if mistakes := packing_mistakes(base.model, mesh.tp.size, packing):
            raise ConfigError("\n".join(mistakes))
        self.mesh, self.compute, self.packing = mesh, compute, packing
        model = self._build(base)
        if adapters or packing:
            model.requires_grad_(False).to(compute)  # as it was when they were trained on it
            peft.pack_base(model, packing)
        else:
            peft.apply(model, None, compute)
        materialize(model, mesh.device)
        self.by_name: dict[str | None, Decoder] = {None: model}
        pieces = {f"model.{name}": piece for name, piece in pieces_of(model, mesh.tp).items()}
        model.requires_grad_(False)
        if not adapters:
            checkpoint.agree(mesh.world, lambda: base.load(pieces), base.path)
            return
        fingerprint = checkpoint.load_base(base, pieces, mesh.world)
        for name, adapter in adapters.items():
            checkpoint.check_base(adapter.checkpoint, fingerprint, base.path)
            self.by_name[name] = self._adapted(base, adapter)

    def _build(self, base: Source) -> Decoder:
        with torch.device("meta"):
            return Decoder(base.model, self.mesh.tp, sp=False)

    def _adapted(self, base: Source, adapter: CheckpointSource) -> Decoder:
        assert adapter.peft is not None
        model = self._build(base)
        peft.apply(model, adapter.peft.model_copy(update={"base_dtype": self.packing}), self.compute)
        adapter.check_adapter(trained_shapes(model))
        materialize(model, self.mesh.device, dict(self.by_name[None].named_parameters()))
        self._load(adapter, model, [name for name, p in model.named_parameters() if p.requires_grad])
        if isinstance(adapter.peft, PrefixConfig):
            fold(model, self.compute)
        return model

    def _load(self, source: Source, model: Decoder, names: Collection[str]) -> None:
        pieces = {f"model.{n}": piece for n, piece in pieces_of(model, self.mesh.tp).items() if n in names}
        model.requires_grad_(False)
        checkpoint.agree(self.mesh.world, lambda: source.load(pieces), source.path)

    def __getitem__(self, adapter: str | None) -> Decoder:
        if adapter not in self.by_name:
            known = [name for name in self.by_name if name is not None]
            raise ConfigError(
                f"no adapter {adapter!r}{nearest(str(adapter), known)}; loaded: {', '.join(known) or 'none'}"
            )
        return self.by_name[adapter]


@contextlib.contextmanager
def open_models(
    path: Path,
    mesh: Mesh,
    dtype: torch.dtype | None,
    adapters: Mapping[str, Path],
    base: Path | None,
    packing: str | None = None,
) -> Iterator[tuple[Models, dict[str, bytes], str | None]]:
    """The models of a checkpoint, its small files, and the adapter that is meant where none is named.

    ``path`` may be an adapter's: then its base is loaded, from where it was at training or from ``base``, and itself as
    the adapter ``default``. Raises CheckpointError, also for adapters of another base.
    """
    with contextlib.ExitStack() as stack:

        def opened(where: Path) -> Source:
            return stack.enter_context(contextlib.closing(checkpoint.open_source(where, mesh.world)))

        first, default = opened(path), None
        found = {name: opened(where) for name, where in adapters.items()}
        source = first
        if first.peft is not None:
            assert isinstance(first, CheckpointSource)
            default, found = "default", {**found, "default": first}
            where = base or (Path(first.base) if first.base else None)
            if where is None or not where.exists():
                raise CheckpointError(
                    f"{first.path} is an adapter of {where}, which is not there; --base=PATH says where"
                )
            source = opened(where)
        sources: dict[str, CheckpointSource] = {}
        for name, adapter in found.items():
            if not isinstance(adapter, CheckpointSource) or adapter.peft is None:
                raise CheckpointError(f"{adapter.path} holds no adapter")
            sources[name] = adapter
        precision = next((adapter.precision for adapter in sources.values()), source.precision)
        models = Models(source, mesh, dtype or DTYPES[precision], sources, packing)
        yield models, {**source.extras(), **first.extras()}, default


def trained_shapes(model: Decoder) -> dict[str, tuple[int, ...]]:
    """The global shapes of what a PEFT method has put into a model, under their names in a checkpoint."""
    return {f"model.{name}": spec_of(p).shape for name, p in model.named_parameters() if p.requires_grad}


def read_prompt(
    prompt: str,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    add: tuple[bool | None, bool | None] = (None, None),
) -> list[int]:
    """The tokens of a prompt or, with a template, of a conversation that it begins as the user's message. ``add``: bos
    and eos, None what the tokenizer puts around a text, which is nothing in a model's own template. Raises
    ConfigError."""
    add_bos, add_eos = add
    if template is None:
        return tokenizer.encode_prompt(prompt, add_bos, add_eos)
    try:
        text = template.prompt([{"role": "user", "content": prompt}])
    except ValueError as error:
        raise ConfigError(f"--prompt: {error}") from None
    if add_bos is None and not template.plain:
        add_bos = False
    return tokenizer.encode_prompt(text, add_bos, bool(add_eos))


def generate_text(
    path: Path,
    requests: Sequence[Request],
    sampling: Sampling,
    dtype: torch.dtype | None = None,
    *,
    chat: bool = False,
    adapters: Mapping[str, Path] | None = None,
    base: Path | None = None,
    packing: str | None = None,
    add: tuple[bool | None, bool | None] = (None, None),
) -> Iterator[str]:
    """Load a checkpoint and adapters on it, split over as many ranks as were started, and continue each prompt; nothing
    but on rank 0.

    ``chat``: answer it as a user's message, through the chat template that the checkpoint has, with the answer alone.
    ``packing``: the model's own linears in memory in 8 or 4 bits. ``add``: as ``read_prompt`` has it.
    Raises CheckpointError for a checkpoint that does not verify or has no tokenizer, ConfigError for bad numbers.
    """
    sampling.check()
    rank = read_rank()
    device = pick_device(rank)
    with process_group(rank, device, timeout_seconds=600.0):
        mesh = build_mesh({"tp": rank.size}, device)
        assert mesh is not None
        with open_models(path, mesh, dtype, adapters or {}, base, packing) as (models, extras, default):
            tokenizer = carried_tokenizer(extras, path)
            stop = ends(tokenizer, extras)
            template = (
                ChatTemplate(find_template(extras, str(path)), tokenizer, f"{path}'s chat template") if chat else None
            )
            for request in requests:
                model = models[request.adapter or default]
                tokens = read_prompt(request.prompt, tokenizer, template, add)
                if len(tokens) > (limit := longest_prompt(model)):
                    raise ConfigError(f"the prompt has {len(tokens)} tokens; this model takes {limit}")
                produced = generate(model, tokens, sampling, stop, models.compute)
                if rank.rank == 0:
                    yield tokenizer.decode(produced if chat else [*tokens, *produced])
