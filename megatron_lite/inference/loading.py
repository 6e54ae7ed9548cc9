"""Models from checkpoints: a base in memory once, and adapters on it."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch

from megatron_lite import checkpoint, peft
from megatron_lite.checkpoint import CheckpointSource, Source
from megatron_lite.cli import nearest
from megatron_lite.config import ModelConfig
from megatron_lite.data.ends import named_ends, with_ends
from megatron_lite.data.tokenizer import MAIN
from megatron_lite.distributed.mesh import Axis, Mesh
from megatron_lite.distributed.shard import materialize, pieces_of, spec_of
from megatron_lite.errors import CheckpointError, ConfigError
from megatron_lite.layers.context import DTYPES
from megatron_lite.models.decoder import Decoder
from megatron_lite.planning.checks import check_tp, packing_mistakes


class Models:
    """A base and, by name, the adapters on it: each is a model of its own that shares the frozen weights of the base.
    So every request may name another adapter at no cost, but one call of a model uses one adapter. ``packing``: of the
    base in memory, whatever the adapters were trained on. Raises ConfigError, CheckpointError.
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
            model.requires_grad_(False).to(compute)  # as when the adapters were trained on it
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
        model = self._build(base.model.computing_as(adapter.model)[0])  # as when the adapter was trained
        peft.apply(model, adapter.peft.model_copy(update={"base_dtype": self.packing}), self.compute)
        adapter.check_adapter(trained_shapes(model))
        materialize(model, self.mesh.device, dict(self.by_name[None].named_parameters()))
        self._load(adapter, model, [name for name, p in model.named_parameters() if p.requires_grad])
        adapter.peft.fold(model, self.compute)
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
    """The models of a checkpoint, the small files of each, and the name of the adapter for requests that name none.

    ``path`` may be an adapter: then its base is loaded, from ``base`` or from its path in training, and the adapter is
    named ``default``. Raises ConfigError, and CheckpointError, also for adapters of another base.
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
                    f"{first.path} is an adapter of {where}, which does not exist; give its path with --base=PATH"
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
            if not own.keys() & {*MAIN}:  # it has no tokenizer: use the base's
                files[name] = with_ends(files[None] | own, named_ends(files[None]))
        yield models, files, default


def trained_shapes(model: Decoder) -> dict[str, tuple[int, ...]]:
    """The global shapes of a model's trained parameters, by their names in a checkpoint."""
    return {f"model.{name}": spec_of(p).shape for name, p in model.named_parameters() if p.requires_grad}


def load_model(source: Source) -> Decoder:
    """The whole model on the CPU, in float32."""
    with torch.device("meta"):
        model = Decoder(source.model, Axis("tp"), sp=False)
    materialize(model, torch.device("cpu"))
    source.load({f"model.{name}": piece for name, piece in pieces_of(model, Axis("tp")).items()})
    return model
