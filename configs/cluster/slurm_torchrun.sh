#!/bin/bash
# A run on Slurm by torchrun itself: sbatch --nodes 4 configs/cluster/slurm_torchrun.sh CONFIG [key.sub=value ...]
#
# Without what configs/cluster/slurm.sh adds: torchrun ends with status 1 for a run that was stopped
# and has saved (which slurm.sh puts into the queue again), counts its restarts whether or not
# checkpoints get newer, and finds a host that is cut off by the watch of the ranks alone.
#SBATCH --job-name=megagrow
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
set -euo pipefail

config=${1:?usage: sbatch configs/cluster/slurm_torchrun.sh CONFIG [key.sub=value ...]}
shift
cd "${SLURM_SUBMIT_DIR:?is set by sbatch}"
if [ -f .venv/bin/activate ]; then
  set +u
  source .venv/bin/activate
  set -u
fi
ranks=${RANKS:-${SLURM_GPUS_ON_NODE:?set RANKS to the number of ranks on each node}}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${hosts%%$'\n'*}

srun --ntasks-per-node=1 --kill-on-bad-exit=0 \
  torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$ranks" --max-restarts 3 \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" \
  --rdzv-endpoint "$first:$((20000 + SLURM_JOB_ID % 10000))" \
  launch/pretrain.py --config "$config" "$@"
