"""The ``ckpt`` commands: inspect, verify, compare, rewrite, import, export and merge checkpoints."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_lite import checkpoint, peft
from megatron_lite.checkpoint import inspect as look
from megatron_lite.checkpoint.adapters.peft_folder import adapter_state
from megatron_lite.checkpoint.formats.deepspeed import DeepSpeedSource, is_deepspeed
from megatron_lite.checkpoint.formats.hf import HuggingFaceSource, export, is_hugging_face, read_model
from megatron_lite.checkpoint.formats.megatron import open_megatron
from megatron_lite.checkpoint.opening import open_peft, open_source
from megatron_lite.checkpoint.rewrite import Advance, rewrite
from megatron_lite.checkpoint.rewrite import diff as compare
from megatron_lite.checkpoint.source import Average, CheckpointSource, Source
from megatron_lite.checkpoint.storage import amount
from megatron_lite.config import PeftConfig, model_section, parse_model, yaml_text
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.shard import materialize, pieces_of
from megatron_lite.errors import CheckpointError, ConfigError, MegatronLiteError
from megatron_lite.inference.loading import load_model, trained_shapes
from megatron_lite.inference.logits import (
    cannot_read,
    in_silence,
    relative_gap,
    same_as_transformers,
    some_tokens,
    too_large,
)
from megatron_lite.models.decoder import Decoder
from megatron_lite.training import allocator

BLOCK_BYTES = 32 << 20
EXPORT_DTYPES = {"stored": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CheckpointsDifferError(MegatronLiteError):
    """Two checkpoints differ."""

    exit_code = 1


def inspect(path: Path) -> None:
    """Print the tensors and state of a checkpoint."""
    with _opened(path, trust=True) as source:
        if isinstance(source, CheckpointSource):
            look.inspect(source.path)
        else:
            look.inspect_source(source)


def verify(path: Path) -> None:
    """Check every byte. A Hugging Face folder has no digests: check that all tensors exist with the right shapes."""
    if is_hugging_face(path):
        with _opened(path, trust=False) as source:
            print(f"{path}: {len(source.tensors)} tensors, {amount(_size(source))}, all present; no digests to verify")
        return
    print(look.verify(checkpoint.find(path)))


def diff(a: Path, b: Path, tolerance: float, *, trust: bool) -> None:
    """Compare two checkpoints. Raises CheckpointsDifferError."""
    with contextlib.ExitStack() as stack:
        if is_deepspeed(a):  # a DeepSpeed checkpoint does not describe its model
            right = stack.enter_context(_opened(b, trust=trust))
            left = stack.enter_context(_opened(a, trust=trust, like=right))
        else:
            left = stack.enter_context(_opened(a, trust=trust))
            right = stack.enter_context(_opened(b, trust=trust, like=left))
        if not all(any(n.startswith("optimizer.") for n in source.tensors) for source in (left, right)):
            for source in (left, right):
                source.tensors = {n: info for n, info in source.tensors.items() if n.startswith("model.")}
        with progress("comparing", _size(left) + _size(right)) as advance:
            odd, differences = compare(left, right, BLOCK_BYTES, advance)
        count = len(left.tensors.keys() | right.tensors.keys())
    beyond = [d for d in differences if not d.relative <= tolerance]
    for line in odd[:20]:
        print(line)
    for d in beyond[:20]:
        print(f"{d.name}: {d.elements:,} elements differ, by up to {d.absolute:.3g} ({d.relative:.3g} of the largest)")
    hidden = len(odd[20:]) + len(beyond[20:])
    if hidden:
        print(f"and {hidden} more")
    if odd or beyond:
        raise CheckpointsDifferError(f"{a} and {b} differ in {len(odd) + len(beyond)} of {count} tensors")
    close = f" within {tolerance:g}" if differences else ", bit for bit"
    print(f"{count} tensors are equal{close}")


def reshard(source: Path, destination: Path, files: int, max_ram: int, *, trust: bool) -> None:
    """Rewrite a checkpoint of ours."""
    _positive(files)
    with _opened(source, trust=trust) as opened:
        if not isinstance(opened, CheckpointSource):
            raise CheckpointError(f"{source} is not a checkpoint of ours; convert it with ckpt import_…")
        _write(opened, destination, opened.step, opened.checkpoint.state(), opened.extras(), files, max_ram // 8)


def import_hf(source: Path, destination: Path, files: int, vocab_multiple: int, *, strict: bool = False) -> None:
    """Convert a Hugging Face folder to a checkpoint of ours."""
    _positive(files)
    if not is_hugging_face(source):
        what = "no Hugging Face folder: it has no config.json" if source.is_dir() else "no such folder"
        raise CheckpointError(f"{source}: {what}")
    with contextlib.closing(HuggingFaceSource(source, vocab_multiple, strict=strict)) as opened:
        checked = same_as_transformers(opened, source)
        _write(opened, destination, 0, *weights_only(opened), files, BLOCK_BYTES)
        print(f"{source}: {checked}")


def import_megatron(source: Path, destination: Path, files: int, vocab_size: int | None) -> None:
    """Convert a Megatron-LM checkpoint to a checkpoint of ours."""
    _positive(files)
    with contextlib.closing(open_megatron(source, vocab_size)) as opened:
        _write(opened, destination, opened.step, *weights_only(opened), files, BLOCK_BYTES)


def import_deepspeed(source: Path, destination: Path, config: Path, files: int) -> None:
    """Convert a DeepSpeed ZeRO checkpoint to a checkpoint of ours."""
    _positive(files)
    model = read_model(config)[0] if is_hugging_face(config) else parse_model(model_section(str(config)), str(config))
    with contextlib.closing(DeepSpeedSource(source, model)) as opened:
        _write(opened, destination, opened.step, *weights_only(opened), files, BLOCK_BYTES)


def average(paths: Sequence[Path], destination: Path, last: int, *, trust: bool) -> None:
    """Average the weights of several checkpoints of ours into a new one."""
    if last and len(paths) > 1:
        raise ConfigError("--last takes one run")
    if last:
        latest = checkpoint.find(paths[0])
        steps = list(checkpoint.committed(latest.parent).values())
        steps = steps[steps.index(latest) :] if latest in steps else []  # later ones belong to an abandoned branch
        if len(steps) < last:
            raise CheckpointError(f"{latest.parent}: holds {len(steps)} checkpoints up to {latest.name}, not {last}")
        paths = steps[:last][::-1]
    if len(paths) < 2:
        raise ConfigError("ckpt average needs at least two checkpoints, separated by commas, or --last=N")
    with contextlib.ExitStack() as stack:
        mean = Average([stack.enter_context(_opened(path, trust=trust)) for path in paths[::-1]])
        _write(mean, destination, mean.step, *weights_only(mean), 1, BLOCK_BYTES)


def merge_adapter(
    adapter: Path, destination: Path, base: Path | None, to: str, dtype: str, *, unmerge: bool, trust: bool
) -> None:
    """Merge an adapter into its base, or take it out again; write a checkpoint of ours or a Hugging Face folder. The
    result is read back, and its logits are compared with those of the base with the adapter beside it."""
    if to not in ("ours", "hf"):
        raise ConfigError(f"--to={to}: expected ours or hf")
    if dtype not in EXPORT_DTYPES or (to == "ours" and dtype not in ("stored", "float32")):
        raise ConfigError(f"--dtype={dtype}: expected {', '.join(EXPORT_DTYPES)}; float32 for a checkpoint of ours")
    with _with_base(adapter, base, trust=trust) as (opened, under, other):
        for key, there in other.items():
            print(
                f"note: model.{key} is {getattr(opened.model, key)}, as {opened.path} was trained; its base has {there}"
            )
        assert opened.peft is not None
        merged = opened.peft.merged(under, opened, sign=-1 if unmerge else 1)
        if to == "ours":
            _write(merged, destination, 0, *weights_only(merged), 1, BLOCK_BYTES)
        else:
            export(merged, destination, EXPORT_DTYPES[dtype] or torch.float32, 5 << 30)
        with _opened(destination, trust=trust, like=opened) as written:
            told = "" if unmerge else f": {_same_as_beside(written, under, opened)}"
            if to == "hf":
                told += f"; {same_as_transformers(written, destination)}"
        print(f"{destination}: {opened.path} {'taken out of' if unmerge else 'merged into'} {under.path}{told}")


def _same_as_beside(written: Source, base: Source, adapter: CheckpointSource) -> str:
    """Compare the logits of the written model with those of the base on disk with the adapter beside it. Raises
    CheckpointError if they differ."""
    if reason := too_large(base):
        return reason
    tokens = some_tokens(base.model, base.model.max_seq_len)
    with torch.no_grad():
        ours, want = load_model(written)(tokens), _beside(base, adapter)(tokens)
    gap = relative_gap(ours, want)
    exact = all(info.dtype == torch.float32 for info in written.tensors.values())
    if not gap < (1e-4 if exact else 0.1):
        raise CheckpointError(f"{written.path}: logits differ from base and adapter by {gap:.2g} of the largest")
    return f"its logits equal those of base and adapter within {gap:.1g}"


def _as_peft_computes(folder: Path, base: Source, adapter: Source) -> str:
    """Compare the logits of ``adapter`` on its base with those that the peft library computes from ``folder``, if that
    is installed and can read the base. Raises CheckpointError if they differ."""
    if reason := too_large(base):
        return reason
    if not isinstance(base, HuggingFaceSource):
        return "its logits were not compared with the peft library's: the base is no Hugging Face folder"
    if importlib.util.find_spec("peft") is None:
        return "its logits were not compared: the peft library is not installed"
    assert adapter.peft is not None
    tokens = some_tokens(base.model, base.model.max_seq_len - adapter.peft.num_positions)
    with torch.no_grad(), in_silence():
        try:
            from peft import PeftModel
            from transformers import AutoModelForCausalLM

            theirs = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
            want = PeftModel.from_pretrained(theirs, folder).eval()(tokens).logits[:, -1]
        except Exception as error:
            return cannot_read("the peft library", error)
        ours = _beside(base, adapter)(tokens)
    gap = relative_gap(ours, want)
    if not gap < 1e-4:
        raise CheckpointError(f"{folder}: the peft library's logits differ from ours by {gap:.2g} of the largest")
    return f"the peft library's logits equal ours within {gap:.1g}"


def _beside(base: Source, adapter: Source) -> Decoder:
    """A model: the base on disk with an adapter beside it."""
    assert adapter.peft is not None
    model = _adapted(base, adapter.peft)
    materialize(model, torch.device("cpu"))
    trained = trained_shapes(model)
    pieces = {f"model.{name}": piece for name, piece in pieces_of(model, Axis("tp")).items()}
    model.requires_grad_(False)
    base.load({name: piece for name, piece in pieces.items() if name not in trained})
    adapter.load({name: piece for name, piece in pieces.items() if name in trained})
    return model


def _adapted(base: Source, config: PeftConfig) -> Decoder:
    """A base model with a PEFT method's modules, in float32, on the meta device."""
    with torch.device("meta"):
        model = Decoder(base.model, Axis("tp"), sp=False)
        peft.apply(model, config.model_copy(update={"base_dtype": None}), torch.float32)
    return model


def import_peft(source: Path, destination: Path, base: Path, *, trust: bool) -> None:
    """Convert a folder of the peft library to a checkpoint of ours."""
    with _opened(base, trust=trust) as under, contextlib.closing(open_peft(source, under)) as adapter:
        told = _as_peft_computes(source, under, adapter)
        _write(adapter, destination, 0, *adapter_state(adapter, base), 1, BLOCK_BYTES)
        print(told)


def export_peft(adapter: Path, destination: Path, base: Path | None, *, trust: bool) -> None:
    """Write an adapter of ours as a folder of the peft library; it is read back and compared."""
    with _with_base(adapter, base, trust=trust) as (opened, under, other):
        if other:
            told = ", ".join(f"model.{key}={getattr(opened.model, key)} (its base: {other[key]})" for key in other)
            raise CheckpointError(
                f"{opened.path} was trained with {told}, which their format cannot express; use ckpt merge_adapter"
            )
        assert opened.peft is not None
        form = opened.peft.peft_folder()
        if form is None:
            known = ", ".join(name for name, method in peft.METHODS.items() if method.peft_folder() is not None)
            raise CheckpointError(f"{opened.path}: peft.method={opened.peft.method} cannot be exported, only {known}")
        written = form.write(opened, under, destination)
        with contextlib.closing(open_peft(destination, under)) as again:
            again.compare(written)
        size, told = sum(tensor.nbytes for tensor in written.values()), _as_peft_computes(destination, under, opened)
        print(f"{destination}: {amount(size)}, {len(written)} tensors, read back; {told}")


@contextlib.contextmanager
def _with_base(
    adapter: Path, base: Path | None, *, trust: bool
) -> Iterator[tuple[CheckpointSource, Source, dict[str, Any]]]:
    """Open an adapter and its base, which is where it was at training or at ``base``. The base computes as the adapter
    was trained; also yields the base's own values of the model keys that were changed for that."""
    with _opened(adapter, trust=trust) as opened:
        if not isinstance(opened, CheckpointSource) or opened.peft is None:
            raise CheckpointError(f"{opened.path} holds no adapter of ours")
        where = base or (Path(opened.base) if opened.base else None)
        if where is None or not where.exists():
            raise CheckpointError(
                f"{adapter} is an adapter of {where}, which does not exist; give its path with --base=PATH"
            )
        with _opened(where, trust=trust, like=opened) as under:
            opened.check_adapter(trained_shapes(_adapted(under, opened.peft)))
            found, (under.model, keys) = under.model, under.model.computing_as(opened.model)
            yield opened, under, {key: getattr(found, key) for key in keys}


def export_hf(source: Path, destination: Path, dtype: str, shard_bytes: int, *, trust: bool) -> None:
    """Write a checkpoint of ours as a Hugging Face folder; it is read back and compared."""
    if dtype not in EXPORT_DTYPES:
        raise ConfigError(f"--dtype={dtype}: expected {', '.join(EXPORT_DTYPES)}")
    with _opened(source, trust=trust) as opened:
        if opened.peft is not None:
            raise CheckpointError(
                f"{opened.path} holds a {opened.peft.method} adapter, no model: ckpt merge_adapter --to=hf writes it "
                "into its base, ckpt export_peft beside it"
            )
        digests = export(opened, destination, EXPORT_DTYPES[dtype], shard_bytes)
        with contextlib.closing(HuggingFaceSource(destination, opened.model.vocab_multiple)) as written:
            for name, digest in digests.items():
                with (destination / name).open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                        raise CheckpointError(f"{destination / name} reads back other than written (faulty disk?)")
            checked = same_as_transformers(opened, destination, EXPORT_DTYPES[dtype])
            print(f"{destination}: {amount(_size(written))}, read back; {checked}")


def weights_only(source: Source) -> tuple[dict[str, Any], dict[str, bytes]]:
    """State and small files of a converted checkpoint: runs can start from it (``init.from``), but not resume it."""
    extras = source.extras()
    tokenizer = extras.get("tokenizer.json", extras.get("tokenizer.model"))
    config = {"model": source.model.model_dump(mode="json"), "train": {"precision": source.precision}}
    state = {
        "from": str(source.path),
        "vocab_size": source.model.vocab_size,
        "padded_vocab_size": source.model.padded_vocab_size,
        "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest() if tokenizer is not None else None,
    }
    return state, {**extras, "config.yaml": yaml_text.dump(config).encode()}


def _write(
    source: Source,
    destination: Path,
    step: int,
    state: dict[str, Any],
    extras: dict[str, bytes],
    files: int,
    block_bytes: int,
) -> None:
    for note in source.notes:
        print(f"note: {note}")
    with progress("writing", _size(source)) as advance:
        path = rewrite(source, destination, step, state, extras, files=files, block_bytes=block_bytes, advance=advance)
    print(f"{path}: {len(source.tensors)} tensors, {amount(_size(source))}")


@contextlib.contextmanager
def _opened(path: Path, *, trust: bool, like: Source | None = None) -> Iterator[Source]:
    """Open a source; if its format does not describe the model, it is assumed to be that of ``like``."""
    allocator.return_freed(1 << 20)
    with contextlib.closing(open_source(path, trust=trust, like=like.model if like is not None else None)) as source:
        yield source


def _size(source: Source) -> int:
    return sum(math.prod(info.shape) * info.dtype.itemsize for info in source.tensors.values())


def _positive(files: int) -> None:
    if files < 1:
        raise ConfigError(f"--files={files}: expected at least 1")


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Advance]:
    """A progress bar on a terminal; nothing elsewhere, since the final line is enough for a log."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)
