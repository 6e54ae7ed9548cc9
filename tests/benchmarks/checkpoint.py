"""Checkpoints against the disk they lie on, and against torch.distributed.checkpoint.

    python -m tests.benchmarks.checkpoint [--gigabytes=1] [--rounds=3] [--folder=DIR]

Two ranks hold so much float32 state, divided by rows. ``save`` and ``load`` are this project's (hashed, fsynced,
committed; verified as it is read), ``dcp`` are ``dcp.save`` (with fsync) and ``dcp.load``, ``raw`` is the disk: each
rank writes its half and fsyncs, or reads it. ``stall`` is what training waits for when saving is asynchronous, there
where the save begins and before the next update; between them is a stand-in for forward and backward, about a second of
products of matrices (``step``; ``step beside a save``, which shares its cores with copying, hashing and writing).
Contenders take turns; reads are from a warm cache, and (``cold``) from the disk. Then, once each: ``reshard``
rewrites a checkpoint of twice the size into two files within 256 MiB, its memory seen from outside; two tensor-
parallel ranks read a Hugging Face folder by slices, and by one rank that scatters; a ZeRO 2 checkpoint is converted
by ``import_deepspeed``, and by DeepSpeed into its universal form.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from megatron_lite.checkpoint import BackgroundSaver, open_checkpoint, open_source, prepare, save
from megatron_lite.config import parse_model
from megatron_lite.distributed.mesh import Axis
from megatron_lite.distributed.shard import Piece, Tile, materialize, pieces_of
from megatron_lite.distributed.spawn import run_ranks
from megatron_lite.families.huggingface import config_json, tensor_parts
from megatron_lite.models.decoder import Decoder
from megatron_lite.training.faults import Faults
from tests.benchmarks.help import answer_help

TENSORS, COLUMNS = 32, 1024
EXTRAS = {"config.yaml": b"model: {vocab_size: 64}\n"}


def measure(rank: int, size: int, folder: str, gigabytes: float, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in each round."""
    torch.set_num_threads(1)
    world = Axis("world", rank, size, torch_dist.group.WORLD)
    rows = int(gigabytes * 1e9 / 4 / TENSORS / COLUMNS) // size
    parts = {f"t{i}": torch.randn(rows, COLUMNS) for i in range(TENSORS)}
    pieces = {
        f"model.{n}": Piece((rows * size, COLUMNS), p.dtype, [Tile(p, (rank * rows, 0))]) for n, p in parts.items()
    }
    mesh = init_device_mesh("cpu", (size,))
    views: dict[str, Any] = {n: DTensor.from_local(p, mesh, [Shard(0)], run_check=False) for n, p in parts.items()}
    saver = BackgroundSaver(world, torch.device("cpu"))
    matrix = torch.randn(1024, 1024)
    found: dict[str, list[float]] = {}
    root = Path(folder)

    def timed(name: str, action: Callable[[], Any]) -> Any:
        torch_dist.barrier()
        began = time.perf_counter()
        value = action()
        torch_dist.barrier()
        found.setdefault(name, []).append(time.perf_counter() - began)
        return value

    def raw_write(path: Path) -> None:
        with path.open("xb", buffering=0) as file:  # a new file, as the others': a virtual disk is slow where it is new
            for part in parts.values():
                file.write(part.numpy().data)
            os.fsync(file.fileno())

    def raw_read(path: Path) -> None:
        with path.open("rb", buffering=0) as file:
            for part in parts.values():
                file.readinto(part.numpy().data)

    def load(path: Path, trust: bool) -> None:
        open_checkpoint(path, world, trust=trust, lazy=True).load(pieces, world)

    def forget() -> None:
        """Let the next reads come from the disk."""
        if rank == 0:
            for path in (p for p in root.rglob("*") if p.is_file()):
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        torch_dist.barrier()

    def step() -> None:
        for _ in range(40):
            torch.mm(matrix, matrix)

    def save_behind(folder: Path, number: int) -> None:
        torch_dist.barrier()
        began = time.perf_counter()
        saver.save(folder, number, pieces, {}, EXTRAS, Faults.none(), lambda path: None)
        stall = time.perf_counter() - began
        timed("step beside a save", step)
        began = time.perf_counter()
        saver.wait_for_copy()
        found.setdefault("stall", []).append(stall + time.perf_counter() - began)
        timed("saved behind", saver.wait)

    for i in range(rounds):
        ours, raw = root / f"ours.{i}", root / f"raw.{i}.{rank}"
        prepare(ours, world)
        timed("raw write", lambda: raw_write(raw))  # noqa: B023
        path = timed("save", lambda: save(ours, i, pieces, {}, EXTRAS, world, Faults.none()))  # noqa: B023
        timed("dcp write", lambda: dcp.save(views, checkpoint_id=str(root / f"dcp.{i}")))  # noqa: B023
        timed("raw read", lambda: raw_read(raw))  # noqa: B023
        timed("load", lambda: load(path, False))  # noqa: B023
        timed("load, trusted", lambda: load(path, True))  # noqa: B023
        timed("dcp read", lambda: dcp.load(views, checkpoint_id=str(root / f"dcp.{i}")))  # noqa: B023
        for name, read in (
            ("raw read, cold", lambda: raw_read(raw)),  # noqa: B023
            ("load, cold", lambda: load(path, False)),  # noqa: B023
            ("dcp read, cold", lambda: dcp.load(views, checkpoint_id=str(root / f"dcp.{i}"))),  # noqa: B023
        ):
            forget()
            timed(name, read)
        timed("step", step)
        save_behind(ours, i + 100)
        torch_dist.barrier()
        raw.unlink()
        if rank == 0:
            for old in [*ours.glob("step_*")][: None if i < rounds - 1 else 1]:
                shutil.rmtree(old)
            shutil.rmtree(root / f"dcp.{i}")
    return found


def outside(code: str, *arguments: str) -> tuple[float, float]:
    """Run ``code`` in a process of its own: the seconds it says it took, and the peak of its memory in MB as the system
    counted it."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        took = next(line for line in process.stdout if line.startswith("took "))
        status = Path(f"/proc/{process.pid}/status").read_text()
        process.communicate("\n")
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return float(took.split()[1]), int(peak.split()[1]) * 1024 / 1e6


TIMED = """
import sys, time
{imports}
began = time.perf_counter()
{action}
print("took", time.perf_counter() - began, flush=True)
sys.stdin.readline()  # its memory is looked at meanwhile
"""
LITE = TIMED.format(
    imports="import megatron_lite.convert\nfrom megatron_lite.__main__ import main",
    action="sys.argv = ['mlite', 'ckpt', *sys.argv[1:]]\nmain()",
)
UNIVERSAL = TIMED.format(
    imports="from deepspeed.checkpoint.ds_to_universal import main, parse_arguments", action="main(parse_arguments())"
)


def reshard(root: Path, gigabytes: float) -> None:
    """A checkpoint of one file into two."""
    rows = int(gigabytes * 1e9 / 4 / TENSORS / COLUMNS)
    pieces = {f"model.t{i}": Piece.whole(torch.randn(rows, COLUMNS)) for i in range(TENSORS)}
    prepare(root / "source", Axis("world"))
    save(root / "source", 1, pieces, {}, EXTRAS, Axis("world"), Faults.none())
    _, idle = outside(LITE, "--help")
    flags = ["--files=2", "--max_ram=256M"]
    for name, extra in (("reshard", []), ("reshard, trusted", ["--trust=true"])):
        took, peak = outside(LITE, "reshard", str(root / "source"), str(root / "again"), *flags, *extra)
        print(f"{name:<18}{took:>7.2f} s {gigabytes * 1e3 / took:>7.0f} MB/s, {peak - idle:.0f} MB over the baseline")
        shutil.rmtree(root / "again")
    shutil.rmtree(root / "source")


MODEL = {"vocab_size": 32000, "hidden_size": 1024, "ffn_size": 2816, "num_layers": 14, "num_heads": 16}  # 0.98 GB


def write_folder(folder: Path) -> float:
    """A Hugging Face folder in two files; its size in GB."""
    folder.mkdir()
    model = parse_model(MODEL, "here")
    (folder / "config.json").write_text(json.dumps(config_json(model, "float32", {})))
    parts = [part for some in tensor_parts(model).values() for part in some]
    where = {part.name: f"{i * 2 // len(parts)}.safetensors" for i, part in enumerate(parts)}
    for name in set(where.values()):
        save_file({p.name: torch.rand(p.stored) for p in parts if where[p.name] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e9


def slices(rank: int, size: int, folder: str, rounds: int) -> dict[str, float]:
    """Seconds to read it into tensor-parallel shards, by slices and through rank 0; medians."""
    torch.set_num_threads(1)
    axis, path = Axis("tp", rank, size), Path(folder)
    with torch.device("meta"):
        model = Decoder(parse_model(MODEL, "here"), axis, sp=False)
    materialize(model, torch.device("cpu"))
    pieces = {f"model.{name}": piece for name, piece in pieces_of(model, axis).items()}
    where = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]

    def by_slices() -> None:
        with contextlib.closing(open_source(path)) as source:
            source.load(pieces)

    def scattered() -> None:
        for file in sorted(set(where.values())):
            with safe_open(path / file, "pt") as opened:
                for name in sorted(n for n in where if where[n] == file):
                    shape = opened.get_slice(name).get_shape()
                    own = torch.empty(shape[0] // size, *shape[1:])
                    whole = opened.get_tensor(name) if rank == 0 else None
                    torch_dist.scatter(own, list(whole.chunk(size)) if whole is not None else None, src=0)

    found: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        for read in (by_slices, scattered):
            torch_dist.barrier()
            began = time.perf_counter()
            read()
            torch_dist.barrier()
            found.setdefault(read.__name__, []).append(time.perf_counter() - began)
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}  # the first warms the cache


def train_zero(rank: int, size: int, folder: str) -> None:
    """A step of a transformers' Llama of 44 M parameters under DeepSpeed's own engine, and its checkpoint."""
    os.environ["LOCAL_RANK"] = str(rank)
    import deepspeed
    from transformers import LlamaConfig, LlamaForCausalLM

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    sizes = {"vocab_size": 16000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8))
    if rank == 0:
        model.save_pretrained(Path(folder) / "model")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    tokens = torch.arange(16).unsqueeze(0)
    engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
    engine.step()
    engine.save_checkpoint(f"{folder}/zero", tag="global_step1")


def conversion(root: Path, rounds: int) -> None:
    """DeepSpeed's checkpoint into ours, and into DeepSpeed's universal form."""
    run_ranks(train_zero, 2, str(root), timeout=300)
    source = root / "zero" / "global_step1"
    size = sum(path.stat().st_size for path in source.glob("*_optim_states.pt")) / 1e9
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(outside(LITE, "import_deepspeed", str(source), str(root / "ours"), str(root / "model"))[0])
        flags = [f"--input_folder={source}", f"--output_folder={root}/universal", "--inject_missing_state"]
        theirs.append(outside(UNIVERSAL, *flags)[0])
        for folder in ("ours", "universal"):
            shutil.rmtree(root / folder)
    for name, found in (("import_deepspeed", ours), ("ds_to_universal", theirs)):
        rate = size * 1e3 / statistics.median(found)
        ratio = statistics.median(b / a for a, b in zip(found, theirs, strict=True))
        print(f"{name:<18}{statistics.median(found):>7.2f} s {rate:>7.0f} MB/s {ratio:>6.2f} × ds_to_universal")


def main(gigabytes: float = 1.0, rounds: int = 3, folder: str = "") -> None:
    root = Path(tempfile.mkdtemp(prefix="mlite-ckpt-", dir=folder or None))
    try:
        found = run_ranks(measure, 2, str(root), gigabytes, rounds, timeout=1500)[0]
        for name, against in (
            *((name, "raw write") for name in ("raw write", "save", "dcp write")),
            *((name, "save") for name in ("stall", "saved behind")),
            ("step beside a save", "step"),
            *((name, "raw read") for name in ("raw read", "load", "load, trusted", "dcp read")),
            *((name, "raw read, cold") for name in ("raw read, cold", "load, cold", "dcp read, cold")),
        ):
            rate = gigabytes * 1e3 / statistics.median(found[name])
            ratio = statistics.median(b / a for a, b in zip(found[name], found[against], strict=True))
            print(f"{name:<18}{statistics.median(found[name]):>7.3f} s {rate:>7.0f} MB/s {ratio:>6.2f} × {against}")
        for path in root.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        reshard(root, 2 * gigabytes)
        size = write_folder(root / "folder")
        for name, seconds in run_ranks(slices, 2, str(root / "folder"), rounds, timeout=300)[0].items():
            print(f"{name:<18}{seconds:>7.2f} s {size * 1e3 / seconds:>7.0f} MB/s, of a Hugging Face folder")
        conversion(root, rounds)
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    answer_help(__doc__)
    pairs = (argument.lstrip("-").split("=") for argument in sys.argv[1:])
    kinds = {"gigabytes": float, "rounds": int, "folder": str}
    main(**{key: kinds[key](value) for key, value in pairs})
