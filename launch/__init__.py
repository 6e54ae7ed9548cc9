"""Starts the ranks of a training job, watches them, and ends them. Imports neither torch nor ``megatron_lite``."""

from launch import deepspeed, mpirun, slurm, torchrun
from launch.job import Job, Launch

# --via=NAME; each entry is a pure function from a Job to the commands that start its ranks.
LAUNCHERS = {
    "torchrun": torchrun.command,
    "deepspeed": deepspeed.command,
    "mpirun": mpirun.command,
    "slurm": slurm.command,
}

__all__ = ["LAUNCHERS", "Job", "Launch"]
