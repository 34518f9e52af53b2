#!/bin/bash
# A run on Slurm: sbatch --nodes 4 configs/cluster/slurm.sh CONFIG [key.sub=value ...]
#
# One supervisor a node, started by srun; no ssh.  Submit it from the repository's directory.
# With NNODES=2:4 the run starts with two nodes and goes on with as many as there are, up to four.
# run.dir, the data and the repository must be on a file system that all nodes share.
#SBATCH --job-name=megagrow
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# To every task, five minutes before the time limit: the run saves and ends with status 75.
#SBATCH --signal=USR1@300
set -euo pipefail

config=${1:?usage: sbatch configs/cluster/slurm.sh CONFIG [key.sub=value ...]}
shift
cd "${SLURM_SUBMIT_DIR:?is set by sbatch}"
if [ -f .venv/bin/activate ]; then
  set +u
  source .venv/bin/activate
  set -u
fi
# By which the nodes of this job know each other; srun hands it on in the environment.
MEGAGROW_SECRET=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export MEGAGROW_SECRET
# Ranks on each node; RANKS=8 sbatch ... where Slurm does not tell the number of GPUs.
ranks=${RANKS:-${SLURM_GPUS_ON_NODE:?set RANKS to the number of ranks on each node}}

# A preempted job's SIGTERM comes here as well; the tasks have their own, and need their time.
trap : TERM
status=0
srun --ntasks-per-node=1 --kill-on-bad-exit=0 \
  python launch/supervise.py --scheduler slurm ${NNODES:+--nnodes "$NNODES"} \
  --ranks "$ranks" --stop 240 \
  launch/pretrain.py --config "$config" "$@" || status=$?

# 75: stopped by a signal, and saved.  The job goes to the queue again and on from there.
if [ "$status" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
