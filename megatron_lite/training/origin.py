"""What a run starts from: its last checkpoint, else ``init.from``; with PEFT always a base, and perhaps an adapter.

All of it is found and checked against the config before the model is built; then each rank reads only its own parts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_lite import checkpoint
from megatron_lite.config import CHANGEABLE, Config
from megatron_lite.data.dataset import Dataset
from megatron_lite.data.ends import with_ends
from megatron_lite.data.tokenizer import GENERATION, TEMPLATE, Tokenizer, tokenizer_files
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.shard import Piece
from megatron_lite.engines.engine import Engine
from megatron_lite.errors import CheckpointError
from megatron_lite.training import resume
from megatron_lite.training.step import TrainState

logger = logging.getLogger("megatron_lite")


class Origin:
    """The sources that a run starts from. Raises CheckpointError, ConfigError or DataError if they do not fit the run.

    ``resumed``: the checkpoint of this run. ``source``: the weights of ``init.from``, if they are needed.
    ``base_fingerprint``: that of an adapter's base, after loading. ``extras``: the small files that a checkpoint of
    this run contains.
    """

    def __init__(
        self,
        config: Config,
        world: Axis,
        folder: Path,
        train_data: Dataset,
        validation_data: Dataset | None,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.config, self.world, self.folder = config, world, folder
        self.train_data, self.validation_data, self.tokenizer = train_data, validation_data, tokenizer
        self.resumed = self._find(lazy=True)
        self.source: checkpoint.Source | None = None
        self.base_fingerprint: str | None = None
        if config.init.source is not None and (self.resumed is None or config.peft is not None):
            self.source = checkpoint.open_source(Path(config.init.source), world, trust=config.checkpoint.trust)
            # Differences that allow_change would have to permit in a resume are intended here: they are only logged.
            note(resume.check_model(config.model, self.source.model, self.source.path, CHANGEABLE))
        self.adapter = self._open_adapter() if self.resumed is None else None
        self.extras = self._extras()
        datasets = [data for data in (train_data, validation_data) if data is not None]
        start = self.source or (checkpoint.CheckpointSource(self.resumed) if self.resumed is not None else None)
        resume.check_tokenizers(config, datasets, tokenizer, start)

    def _find(self, *, lazy: bool) -> checkpoint.Checkpoint | None:
        """The checkpoint to resume from. ``lazy``: its tensors are verified when they are loaded."""
        wanted, trust = self.config.checkpoint.resume, self.config.checkpoint.trust
        resumed = None
        if wanted == "auto":
            resumed = checkpoint.newest(self.folder, self.world, trust=trust, lazy=lazy)
        elif wanted != "none":
            resumed = checkpoint.open_checkpoint(checkpoint.find(Path(wanted)), self.world, trust=trust, lazy=lazy)
        if resumed is not None:
            self.changes = resume.check_run(
                self.config,
                resumed,
                self.train_data.fingerprint,
                self.tokenizer.sha256 if self.tokenizer else None,
                self.validation_data.fingerprint if self.validation_data is not None else None,
            )
        return resumed

    def _open_adapter(self) -> checkpoint.Source | None:
        """The adapter that ``peft`` starts from, if any."""
        config = self.config
        if config.init.adapter is None or config.peft is None:
            return None
        assert self.source is not None
        path, trust = Path(config.init.adapter), config.checkpoint.trust
        adapter = checkpoint.open_adapter(path, self.source, self.world, trust=trust)
        assert adapter.peft is not None
        allowed = [*config.checkpoint.allow_change, "model.dropout", "model.attention_dropout"]  # only used in training
        note(resume.check_model(config.model, adapter.model, adapter.path, allowed))
        if told := config.peft.differences(adapter.peft, config.model):
            raise CheckpointError(f"{adapter.path}: {'; '.join(told)}")
        return adapter

    def _extras(self) -> dict[str, bytes]:
        """The tokenizer's files and, if the checkpoint or folder that this run starts from has the same tokenizer, the
        files beside it, such as a chat template. Tokens that end answers in the data become end tokens."""
        name = self.config.data.tokenizer
        own = tokenizer_files(name) if name else {}
        source = checkpoint.CheckpointSource(self.resumed) if self.resumed is not None else self.source
        there = source.extras() if source is not None else {}
        there |= self.adapter.extras() if self.adapter is not None else {}
        template = self.train_data.chat_template
        written = {} if template is None else {TEMPLATE: template.encode()}
        same = all(there.get(name) == content for name, content in own.items() if name != GENERATION)
        extras = with_ends((own | there if same else own) | written, self.train_data.ends)
        if self.resumed is not None:
            allowed = self.config.checkpoint.allow_change
            note(resume.check_template(there, extras, self.resumed.path, allowed))
        return extras

    def load(self, engine: Engine) -> TrainState:
        """Load the engine's weights and optimizer state, unless they are new; returns the run's state. Collective."""
        state = TrainState()
        if self.config.peft is not None:
            self._load_base(engine)
        if self.resumed is not None:
            self._load_checkpoint(engine)
            state = _state(self.resumed)
            engine.loaded(state.updates)
            logger.info("resumed %s: step %d", self.resumed.path, state.step)
            note(self.changes)
        elif self.source is not None and self.config.peft is None:
            state.updates = self._load_weights(engine, self.source)
            engine.loaded(state.updates)
            note([f"started from the weights of {self.source.path}", *self.source.notes])
        return state

    def _load_weights(self, engine: Engine, opened: checkpoint.Source) -> int:
        """Load the weights that a new run starts from. Returns the updates of their optimizer, or 0 if it is new."""
        optimizer = self.config.init.optimizer
        wanted = {n: p for n, p in engine.pieces().items() if optimizer or n.startswith("model.")}
        with contextlib.closing(opened) as source:

            def load() -> None:
                if optimizer:
                    resume.check_optimizer(source, wanted, self.config.optim.name)
                source.load(wanted)

            checkpoint.agree(self.world, load, source.path)
        return source.num_updates if optimizer else 0

    def _load_checkpoint(self, engine: Engine) -> None:
        """Load this run's checkpoint; if it is damaged, load the newest valid one instead, with a warning."""
        assert self.resumed is not None
        pieces = engine.pieces()
        self.resumed.check(pieces, self.world)
        try:
            self.resumed.load(pieces, self.world)
        except CheckpointError:
            self.resumed = self._find(lazy=False)
            assert self.resumed is not None
            self.resumed.load(pieces, self.world)
            self.extras = self._extras()

    def _load_base(self, engine: Engine) -> None:
        """Load an adapter's base, and refuse another one than it was trained on so far."""
        assert self.source is not None
        path = self.source.path
        with contextlib.closing(self.source) as source:
            self.base_fingerprint = checkpoint.load_base(source, engine.frozen(), self.world)
            if self.adapter is not None:
                self._load_adapter(self.adapter, engine.pieces(), path)
        if self.resumed is not None:
            checkpoint.check_base(self.resumed, self.base_fingerprint, path)
        engine.loaded(0)
        note([f"adapting {path} ({self.base_fingerprint[:12]})", *self.source.notes])

    def _load_adapter(self, adapter: checkpoint.Source, pieces: Mapping[str, Piece], base: Path) -> None:
        """Load the adapter to start from, and refuse one of another base."""
        assert self.base_fingerprint is not None
        if isinstance(adapter, checkpoint.CheckpointSource):
            checkpoint.check_base(adapter.checkpoint, self.base_fingerprint, base)
        wanted = {name: piece for name, piece in pieces.items() if name.startswith("model.")}

        def load() -> None:
            adapter.load(wanted)
            if any(not tile.data.isfinite().all() for piece in wanted.values() for tile in piece.tiles):
                raise CheckpointError(f"{adapter.path} holds numbers that are not finite")

        with contextlib.closing(adapter):
            checkpoint.agree(self.world, load, adapter.path)
        logger.info("started from the adapter in %s", adapter.path)


def _state(resumed: checkpoint.Checkpoint) -> TrainState:
    """The training state in a checkpoint. Raises CheckpointError."""
    tree = resumed.state().get("train")
    known = [field.name for field in dataclasses.fields(TrainState)]
    if not isinstance(tree, dict) or any(type(tree.get(name)) is not int or tree[name] < 0 for name in known):
        raise CheckpointError(f"{resumed.path}/state.json: train: expected {', '.join(known)}, found {tree!a:.200}")
    return TrainState(**{name: tree[name] for name in known})


def note(lines: Sequence[str]) -> None:
    """Log lines for the user; only rank 0 logs at this level."""
    for line in lines:
        logger.info("%s", line)
