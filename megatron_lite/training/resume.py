"""Checks a run against the checkpoint that it resumes: what must be the same, and lines for the log about the rest."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_lite.checkpoint import Checkpoint, CheckpointSource, Source
from megatron_lite.config import Config, ModelConfig, OptimConfig, TrainConfig, parse_section
from megatron_lite.data.dataset import Dataset
from megatron_lite.data.template import find_template
from megatron_lite.data.tokenizer import MAIN, TOKENIZER_FILES, Tokenizer, read_tokenizer
from megatron_lite.engines.optim import learning_rate
from megatron_lite.errors import CheckpointError, ConfigError, DataError

_ALLOW = "checkpoint.allow_change"
_ELSEWHERE = ("launch", "checkpoint", "init", "run.name", "run.dir")  # without effect on what is computed


def check_model(ours: ModelConfig, theirs: ModelConfig, path: Path, allowed: Collection[str]) -> list[str]:
    """Refuse weights of other shapes than our model's, and weights that it would compute something else with, except
    by ``allowed`` keys. Returns a line for each of these. Raises CheckpointError."""

    def told(keys: Collection[str]) -> str:
        return ", ".join(f"model.{key} {getattr(theirs, key)} there, {getattr(ours, key)} here" for key in keys)

    shapes, function = ours.differences(theirs)
    refused = [key for key in function if f"model.{key}" not in allowed]
    if shapes or refused:
        wanted = ",".join(f"model.{key}" for key in refused)
        fix = "" if shapes else f"; {_ALLOW}=[{wanted}] continues with the values of this config"
        raise CheckpointError(f"{path}: {told([*shapes, *refused])}{fix}")
    return [f"{path}: {told([key])}" for key in function]


def check_template(
    theirs: Mapping[str, bytes], ours: Mapping[str, bytes], path: Path, allowed: Collection[str]
) -> list[str]:
    """Refuse another chat template than the one among a checkpoint's small files, unless it is allowed. Returns a line
    for the log for each of the tokenizer's files that has changed. Raises CheckpointError."""
    notes = [f"changed since the checkpoint: {n}" for n in TOKENIZER_FILES if theirs.get(n) != ours.get(n)]
    found = [_template(files) for files in (theirs, ours)]
    if found[0] == found[1]:
        return notes
    there, here = (f"chat template sha {hashlib.sha256(text.encode()).hexdigest()[:8]}" for text in found)
    if "chat_template" in allowed:
        return [*notes, f"changed since the checkpoint: {there} → {here}"]
    raise CheckpointError(
        f"{path}: {there} there, {here} here (data.tokenizer's or data.train's); {_ALLOW}=[chat_template] continues "
        "with the one here"
    )


def _template(files: Mapping[str, bytes]) -> str:
    with contextlib.suppress(DataError):  # an invalid template cannot have been used
        return find_template(files, "")
    return ""


def check_tokenizers(config: Config, datasets: Iterable[Dataset], ours: Tokenizer | None, start: Source | None) -> None:
    """Refuse data that was made with another tokenizer than the run's, or with several, and a tokenizer with more
    entries than the model, unless ``data.force_tokenizer``. ``start``: the source that the run starts from; if no
    tokenizer is configured, the run's is the one in it. Raises DataError."""
    sources = [source for dataset in datasets for source in dataset.sources if source.card.get("tokenizer_sha256")]
    vocab = config.model.vocab_size or 0
    too_large = ours is not None and ours.vocab_size > vocab
    if config.data.force_tokenizer or not (sources or too_large):
        return
    goes_on, theirs = "data.force_tokenizer=true goes on with it", None
    if start is not None and (ours is None or too_large) and (carried := start.extras()).keys() & {*MAIN}:
        with contextlib.suppress(DataError):  # one that cannot be read was not used so far
            theirs = read_tokenizer(carried, str(start.path))
    if ours is not None and too_large and (theirs is None or theirs.sha256 != ours.sha256):
        told = f"{config.data.tokenizer} has {ours.vocab_size} entries, the model's vocabulary {vocab}"
        raise DataError(f"data.tokenizer: {told}; {goes_on}")
    tokenizer, name = ours, f"data.tokenizer={config.data.tokenizer}"
    if tokenizer is None and start is not None:
        tokenizer, name = theirs, f"that of {start.path}"
        goes_on = f"set data.tokenizer to the run's tokenizer; {goes_on}"
    digest = tokenizer.sha256 if tokenizer else None
    for source in sources:
        made, there = f"{source.card.get('tokenizer')!a:.200}", str(source.card["tokenizer_sha256"])
        if digest is None:
            name, digest = f"that of {source.data.prefix}, {made}", there
        elif there != digest:
            raise DataError(
                f"{source.data.prefix} was made with another tokenizer, {made} (sha {there:.8}), than {name} "
                f"(sha {digest:.8}); {goes_on}"
            )


def check_optimizer(source: Source, wanted: Collection[str], name: str) -> None:
    """Refuse ``init.optimizer`` if the source lacks some of the ``wanted`` state. Raises CheckpointError."""
    if not any(tensor.startswith("optimizer.") for tensor in source.tensors):
        raise CheckpointError(f"init.optimizer: {source.path} has no optimizer state")
    if missing := next((tensor for tensor in wanted if tensor not in source.tensors), None):
        raise CheckpointError(f"init.optimizer: {source.path} lacks {missing}: its optimizer is not optim.name={name}")


def check_run(
    config: Config, found: Checkpoint, fingerprint: str, tokenizer: str | None, validation: str | None = None
) -> list[str]:
    """Refuse a checkpoint of another model, vocabulary, tokenizer, adapter, optimizer or of other training data
    (``fingerprint``). Returns a line for the log for every other difference, also of the ``validation`` data. Raises
    CheckpointError, DataError, and ConfigError for a schedule that does not fit the remaining steps."""
    path, content, vocab = found.path, found.state(), config.model.vocab_size
    if "train" not in content:
        raise CheckpointError(f"{path} holds only weights, not a run; start a new run with --init.from={path}")
    theirs, size = content.get("tokenizer_sha256"), content.get("vocab_size")
    if size != vocab or (theirs != tokenizer and not config.data.force_tokenizer):
        raise CheckpointError(
            f"{path}: checkpoint vocab {size} (tokenizer sha {str(theirs)[:8]}) "
            f"vs config {vocab} (tokenizer sha {str(tokenizer)[:8]})"
            + ("; data.force_tokenizer=true goes on with it" if size == vocab else "")
        )
    saved, peft = CheckpointSource(found), config.peft
    allowed = config.checkpoint.allow_change
    check_model(config.model, saved.model, path, allowed)
    if saved.model.padded_vocab_size != config.model.padded_vocab_size:
        told = f"model.vocab_multiple {saved.model.vocab_multiple} there, {config.model.vocab_multiple} here"
        raise CheckpointError(
            f"{path}: {told}: a run cannot change its padding; start a new run with --init.from={path}"
        )
    if saved.peft != peft:
        there, here = ({} if p is None else p.model_dump() for p in (saved.peft, peft))
        keys = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
        told = ", ".join(f"peft.{key} {there.get(key)} there, {here.get(key)} here" for key in keys)
        raise CheckpointError(f"{path}: {told}")
    if content.get("dataset") != fingerprint and not config.data.allow_change:
        raise DataError(
            f"the training data (files, weights, split, seq_len or seed) changed since {path}: "
            f"fingerprint {content.get('dataset')} then, {fingerprint} now; data.allow_change=true goes on with it"
        )
    changed = dict(_changes({**saved.config, "model": saved.model.model_dump(mode="json")}, config))
    if "optim.name" in changed:
        there, here = changed["optim.name"]
        raise CheckpointError(
            f"{path}: optim.name {there} there, {here} here: their optimizer states are incompatible; start a new "
            f"run with --init.from={path}"
        )
    notes = [f"changed since the checkpoint: {key} {a!s:.200} → {b!s:.200}" for key, (a, b) in changed.items()]
    if validation is not None and content.get("validation") not in (None, validation):
        notes.append("changed since the checkpoint: the validation data (files, weights, split, seq_len or seed)")
    notes += [f"{_ALLOW}: {k} has not changed" for k in allowed if k.startswith("model.") and k not in changed]
    if any(key.startswith("optim.") or key == "train.steps" for key in changed):
        notes += _schedule(config, saved, found.step)
    return notes


def _changes(saved: Mapping[str, Any], config: Config) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Each key with another value in the saved config: the key, and both values (saved, ours)."""
    for name, section in config.model_dump(mode="json").items():
        there = saved.get(name)
        if name in _ELSEWHERE or not isinstance(section, dict) or not isinstance(there, dict):
            continue
        for key, value in section.items():
            if key in there and there[key] != value and f"{name}.{key}" not in _ELSEWHERE:
                yield f"{name}.{key}", (there[key], value)


def _schedule(config: Config, saved: CheckpointSource, step: int) -> list[str]:
    """A line for the log if another schedule or length changes the learning rate after ``step`` by more than 1 %.
    Raises ConfigError if the decay does not fit the remaining steps."""
    where, optim, steps = f"{saved.path}/config.yaml", config.optim, config.train.steps
    try:
        old: OptimConfig = parse_section(OptimConfig, "optim", saved.config.get("optim"), where)
        old_steps: int = parse_section(TrainConfig, "train", saved.config.get("train"), where).steps
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if (left := steps - step) <= 0:
        return []
    if optim.decaying(step, steps) and not old.decaying(step, old_steps):
        raise ConfigError(
            f"optim.decay_steps={optim.decay(steps)} exceeds the {left} steps of train.steps={steps} that remain "
            f"after {saved.path}; at most {left}"
        )
    before, now = learning_rate(old, step, old_steps), learning_rate(optim, step, steps)
    if math.isclose(before, now, rel_tol=0.01):
        return []
    return [f"the learning rate of step {step + 1} is {now:.3g}; by the schedule of the checkpoint it was {before:.3g}"]
