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

trap 'code=$?; [ ${#BASH_SOURCE[@]} -gt 1 ] || { echo "error: launch.slurm.setup: exit code $code: $(sed -n ${LINENO}p "$0")" >&2; exit 2; }' ERR
module load cuda

trap - ERR; set +e

[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || set -- --checkpoint.resume=auto
# On the first node: it starts the ranks with srun, watches them, and has them save when it is told to stop.
/venv/bin/python -m launch run big.yaml \
    --via=slurm \
    --nodes=2 \
    --nproc=2 \
    --optim.lr=1e-4 \
    '--data.note=it'"'"'s' \
    "$@" &
launcher=$! told= expiring= again=
# Once, since a second signal would cut the save short: scancel repeats its own to a task of an array.
stop() { [ "$told" ] || kill -"$1" $launcher; told=yes; }
trap 'expiring=yes; stop USR1' USR1  # 120 s before the time limit
trap 'stop TERM' TERM
while kill -0 $launcher 2>/dev/null; do wait $launcher; done  # a signal ends a wait early
wait $launcher
code=$?
job="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
further() { [ runs/big/checkpoints/latest -nt runs/big/logs/launcher.lock ]; }
case "$code$expiring $(scontrol show job -o "$job")" in
    # Cancelled, by `launch cancel` or by scancel: not again.
    *Requeue=0* | *JobState=C*Reason=None*) ;;
    # Cut off by a preemption: again.
    [15]*PreemptTime=2*) again=yes ;;
    # Its time is over, or a rank or a node was lost: again, if a checkpoint is younger than this start.
    5* | 75yes* | [17]*Reason=TimeLimit*) further && again=yes ;;
    # Saved, as somebody else has asked: again.
    75*) again=yes ;;
esac
[ -z "$again" ] || scontrol requeue "$job"
exit $code
