"""Text from a checkpoint: greedy or sampled, with a key-value cache, on one rank or under tensor parallelism."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lite import checkpoint, peft
from megatron_lite.checkpoint import CheckpointSource, Source
from megatron_lite.cli import nearest
from megatron_lite.config import ModelConfig, PrefixConfig
from megatron_lite.data.ends import ends, named_ends, with_ends
from megatron_lite.data.messages import present, read_message
from megatron_lite.data.template import ChatTemplate, Message, find_template
from megatron_lite.data.tokenizer import MAIN, carried_tokenizer
from megatron_lite.distributed import random
from megatron_lite.distributed.env import read_rank
from megatron_lite.distributed.mesh import Mesh, build_mesh, pick_device, process_group
from megatron_lite.distributed.shard import materialize, pieces_of, spec_of
from megatron_lite.errors import CheckpointError, ConfigError, DataError, MegatronLiteError, NonFiniteError
from megatron_lite.inference.requests import Answer, Request, Sampling
from megatron_lite.layers.cache import KeyValueCache
from megatron_lite.layers.context import Context
from megatron_lite.models.decoder import Decoder
from megatron_lite.peft.prefix import fold
from megatron_lite.planning.plan import check_tp, packing_mistakes
from megatron_lite.training.step import DTYPES

logger = logging.getLogger("megatron_lite")


def choose(logits: Tensor, sampling: Sampling, position: int) -> Tensor:
    """The next token of each row of ``logits`` [batch, vocab]. The draw depends on (seed, position) alone.

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
    """That of request number ``index``, which draws unlike the others, the first of them as one alone. What it has of
    its ``own`` counts; with a seed of its own it draws as one alone."""
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
    tokens: logits are gathered, and all draw alike.
    """
    assert all(0 <= token < (model.config.vocab_size or 0) for token in prompt)  # beyond are rows that only pad
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
    """How many tokens a prompt may have so that there is room for one more."""
    return model.config.max_seq_len - (0 if model.prefix is None else model.prefix.length) - 1


def most_tokens(model: Decoder, prompt: Sequence[int], sampling: Sampling) -> int:
    """How many tokens may follow a prompt."""
    return min(sampling.max_new_tokens, longest_prompt(model) + 1 - len(prompt))


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
        model = self._build(base.model)
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

    def _build(self, model: ModelConfig) -> Decoder:
        with torch.device("meta"):
            return Decoder(model, self.mesh.tp, sp=False)

    def _adapted(self, base: Source, adapter: CheckpointSource) -> Decoder:
        assert adapter.peft is not None
        model = self._build(base.model.computing_as(adapter.model)[0])  # which it was trained with
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
) -> Iterator[tuple[Models, dict[str | None, dict[str, bytes]], str | None]]:
    """The models of a checkpoint, the small files of each, and the adapter that is meant where none is named.

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
            if "default" in found:
                raise ConfigError(f"--adapters: default is the name of {path} itself")
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
        files: dict[str | None, dict[str, bytes]] = {None: source.extras()}
        for name, adapter in sources.items():
            files[name] = own = adapter.extras()
            if not own.keys() & {*MAIN}:  # its texts are the base's
                files[name] = with_ends(files[None] | own, named_ends(files[None]))
        yield models, files, default


def trained_shapes(model: Decoder) -> dict[str, tuple[int, ...]]:
    """The global shapes of what a PEFT method has put into a model, under their names in a checkpoint."""
    return {f"model.{name}": spec_of(p).shape for name, p in model.named_parameters() if p.requires_grad}


class Codec:
    """Text to a model's tokens and back: its tokenizer, its chat template and what ends a text, from its small files.

    ``vocab_size``: of the model. ``add``: bos and eos around a prompt, None what the tokenizer puts there, which is
    nothing around what a model's own template writes. ``ends``: the tokens that end a text. Raises CheckpointError.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        where: Path,
        vocab_size: int,
        add: tuple[bool | None, bool | None] = (None, None),
    ) -> None:
        self.files, self.where, self.vocab_size, self.add = files, where, vocab_size, add
        self.tokenizer = carried_tokenizer(files, where)
        try:
            self.ends = ends(self.tokenizer, files)
        except DataError as error:
            raise CheckpointError(f"{where}: {error}") from None
        if beyond := sorted(token for token in self.ends if token >= vocab_size):
            named = ", ".join(f"{token} {self.tokenizer.token(token)!a}" for token in beyond)
            logger.warning("%s: no text will end with token %s: the model has %d", where, named, vocab_size)

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template, with ``PLAIN`` for none. Raises ConfigError, DataError."""
        return ChatTemplate(find_template(self.files, str(self.where)), self.tokenizer, f"{self.where}'s chat template")

    @cached_property
    def answer_ends(self) -> set[int]:
        """The tokens that end an answer: those that end any text, and what the template writes after one."""
        return {*self.ends, self.template.end()} - {-1}

    def read(self, prompt: str | Sequence[Message], *, chat: bool) -> list[int]:
        """The tokens of a prompt or, in a ``chat``, of a conversation, perhaps one that the prompt begins as the user's
        message. Raises ConfigError, and CheckpointError for tokens that the model does not have."""
        try:
            text = self.template.prompt(self._messages(prompt)) if chat else str(prompt)
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError("the prompt is no text that UTF-8 can carry") from None
        except ValueError as error:
            raise ConfigError(f"the prompt: {error}") from None
        bos, eos = self.add
        if chat:
            bos, eos = False if bos is None and not self.template.plain else bos, bool(eos)
        tokens = self.tokenizer.encode_prompt(text, bos, eos)
        if min(tokens) < 0:
            raise ConfigError("the prompt is empty, and the tokenizer has no end-of-sequence token to begin with")
        if (last := max(tokens)) >= self.vocab_size:
            raise CheckpointError(
                f"{self.where}: the prompt has token {last} {self.tokenizer.show([last])!a:.100}, but the model's "
                f"vocabulary has {self.vocab_size} entries; its tokenizer has {self.tokenizer.vocab_size}"
            )
        return tokens

    def _messages(self, prompt: str | Sequence[Message]) -> list[Message]:
        """As the template takes them, and as training has them."""
        given = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        calls = self.template.calls
        return [read_message(present(each), f"message {i}: ", calls)[0] for i, each in enumerate(given, 1)]

    def write(self, prompt: list[int], produced: list[int], *, chat: bool) -> tuple[str, str]:
        """The text of a prompt and the text that follows it, which join into one; in a ``chat`` the latter alone."""
        if chat:
            return "", self.tokenizer.decode(produced)
        before, whole = self.tokenizer.decode(prompt), self.tokenizer.decode([*prompt, *produced])
        after = whole.removeprefix(before) if whole.startswith(before) else self.tokenizer.decode(produced)
        return before, after


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
) -> Iterator[Answer]:
    """Load a checkpoint and adapters on it, split over as many ranks as were started, and answer each request, on every
    rank. A request in a file that cannot be answered is answered with its error.

    ``chat``: take a prompt for a user's message, through the chat template that the checkpoint has.
    ``packing``: the model's own linears in memory in 8 or 4 bits. ``add``: as ``Codec`` has it.
    Raises CheckpointError for a checkpoint that does not verify or has no tokenizer, ConfigError for bad numbers, an
    adapter that there is not, or a prompt that is too long.
    """
    sampling.check()
    rank = read_rank()
    device = pick_device(rank)
    with process_group(rank, device, timeout_seconds=600.0):
        mesh = build_mesh({"tp": rank.size}, device)
        assert mesh is not None
        with open_models(path, mesh, dtype, adapters or {}, base, packing) as (models, files, default):
            asked = [(request.adapter or default, chat or not isinstance(request.prompt, str)) for request in requests]
            found = {name: models[name] for name, _ in asked}
            size = models[None].config.vocab_size
            assert size
            codecs = {name: Codec(files[name], path, size, add) for name in found}
            stops = {(name, talk): codecs[name].answer_ends if talk else codecs[name].ends for name, talk in asked}
            for index, (request, (name, talk)) in enumerate(zip(requests, asked, strict=True)):
                model, codec, stop = found[name], codecs[name], stops[name, talk]
                try:
                    prompt = codec.read(request.prompt, chat=talk)
                    if len(prompt) > (limit := longest_prompt(model)):
                        raise ConfigError(f"the prompt has {len(prompt)} tokens; this model takes {limit}")
                except MegatronLiteError as error:
                    if request.line is None:
                        raise
                    yield Answer(error=str(error))
                    continue
                own = of_request(sampling, index, request.own)
                known = max([codec.tokenizer.vocab_size, *(token + 1 for token in stop)])
                produced = generate(model, prompt, own, stop, models.compute, known=known)
                ended = len(produced) < most_tokens(model, prompt, own)
                read, text = codec.write(prompt, produced, chat=talk)
                yield Answer(name, read, text, len(produced), "stop" if ended else "length")
