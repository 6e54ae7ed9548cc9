#!/bin/bash
# big: 4 ranks on 2 nodes. Written by `python -m launch run`; edit it and submit it again as you like.
#SBATCH --job-name=big
#SBATCH --chdir=/tmp
#SBATCH --output=/tmp/runs/big/logs/slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --gres=gpu:2
#SBATCH --constraint="a b"
#SBATCH --time=1:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --mail-type=END

module load cuda

[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || set -- --checkpoint.resume=auto
# On the first node: it starts the ranks with srun, watches them, and has them save when it is told to stop.
/venv/bin/python -m launch run big.yaml \
    --via=slurm \
    --nodes=2 \
    --nproc=2 \
    --optim.lr=1e-4 \
    '--data.note=it'"'"'s' \
    "$@" &
launcher=$! expiring= again=
trap 'expiring=yes; kill -USR1 $launcher' USR1  # 120 s before the time limit
trap 'kill -TERM $launcher' TERM
while kill -0 $launcher 2>/dev/null; do wait $launcher; done  # a signal ends a wait early
wait $launcher
code=$?
case $code in
    # Saved: again, unless it was cancelled.
    75) again=$expiring ;;
    # A rank or a node was lost: again, if there is a checkpoint that is younger than this start.
    5) [ runs/big/checkpoints/latest -nt runs/big/logs/launcher.lock ] && again=yes ;;
esac
if [ "$again" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
