#!/bin/bash
# Train on several nodes under SLURM: sbatch docs/slurm.sh [more flags of train_ac.py]
#
# A rank or node that dies costs the steps since the last checkpoint. Five minutes before the time
# limit the run saves and stops, and the job goes back into the queue; --resume continues it there.
#SBATCH --job-name=nanojepa
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

# srun passes SIGTERM on to every node, where train_ac.py saves a checkpoint
trap 'kill -TERM $!; wait $!; scontrol requeue "$SLURM_JOB_ID"' USR1

# the first node is the meeting point
HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# without this, a node that comes back waits for ever
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="${SLURM_GPUS_ON_NODE:-8}" --max_restarts=3 --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID" --rdzv_endpoint="$HOST:29500" train_ac.py --data "VPT/*.tar" --resume "$@" & wait $!
