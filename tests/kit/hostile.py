"""Pickles that run a command, and a program that damages a folder at random and reads it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch

FUZZ = """
import random, resource, sys
from pathlib import Path
from megatron_lite.checkpoint.formats.hf import HuggingFaceSource
from megatron_lite.convert import load_model
from megatron_lite.errors import MegatronLiteError
folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
originals = {path: path.read_bytes() for path in sorted(folder.iterdir())}
rng, refused = random.Random(5), 0
for i in range(int(sys.argv[2])):
    path = rng.choice(list(originals))
    data = bytearray(originals[path])
    for _ in range(rng.choice((1, 1, 4))):
        kind, at = rng.randrange(4), rng.randrange(min(len(data), 1200))  # headers rather than weights
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + 1] = b"9" * rng.randrange(1, 25)
        elif kind == 2:
            data[at : at + rng.randrange(1, 30)] = b" "
        else:
            data = data[: rng.randrange(len(data))] or bytearray(b"x")
    path.write_bytes(data)
    try:
        load_model(HuggingFaceSource(folder))
    except MegatronLiteError as error:
        assert str(error) and str(folder) in str(error), error
        refused += 1
    path.write_bytes(originals[path])
print(refused)
"""


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def malicious(path: Path, canary: Path, raw: bool = False) -> None:
    """A file that torch.load would fall for; ``raw``: a bare pickle, as torch.distributed.checkpoint's metadata is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if raw:
        path.write_bytes(pickle.dumps({"x": Attack(canary)}))
    else:
        torch.save({"model": {}, "args": Attack(canary), "param_shapes": [Attack(canary)]}, path)
