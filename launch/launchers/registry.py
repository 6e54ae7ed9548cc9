"""The launchers of --via=NAME: pure functions from a Job to the commands that start its ranks."""

from launch.launchers import deepspeed, mpirun, slurm, torchrun

LAUNCHERS = {
    "torchrun": torchrun.command,
    "deepspeed": deepspeed.command,
    "mpirun": mpirun.command,
    "slurm": slurm.command,
}
