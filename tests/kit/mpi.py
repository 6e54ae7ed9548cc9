"""The MPIs that tests start ranks with: Open MPI from the environment; MPICH, which `make test` puts beside it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Mpi:
    mpiexec: str
    env: Mapping[str, str]  # what mpi4py and root need to run under it


def open_mpi() -> Mpi:
    """Open MPI; skips the test where there is none."""
    path = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if path is None:
        pytest.skip("there is no mpirun (the mpi extra)")
    return Mpi(path, {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"})


def mpich() -> Mpi:
    """MPICH; skips the test where there is none. mpi4py takes the library it is told."""
    folder = Path(sys.prefix) / "mpich"
    library = folder / "lib/libmpi.so.12"
    if not library.exists():
        pytest.skip("there is no MPICH in .venv/mpich: pip install --no-deps --prefix .venv/mpich mpich")
    return Mpi(str(folder / "bin/mpiexec"), {"MPI4PY_LIBMPI": str(library)})
