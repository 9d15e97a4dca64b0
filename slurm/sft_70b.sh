#!/usr/bin/env bash
#SBATCH --job-name=sft_70b
#SBATCH --nodes=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
##SBATCH --partition=gpu
##SBATCH --account=project
##SBATCH --chdir=.
#SBATCH --output=%x-%j.log
#
# Whole nodes. The number of tasks is srun's, below: given here, --nodes=4-8 would never get more than four.
#SBATCH --exclusive
#SBATCH --mem=0
#
# Ten minutes before the time limit (up to one earlier) this script is told; the run saves and asks to be queued again.
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# ---------------------------------------------------------------- edit the lines above and these
recipe=${RECIPE:-recipes/sft_70b.yaml}
overrides=()                            # of the recipe, as (optim.lr=1e-5); sbatch SCRIPT KEY=VALUE... adds to them
packhorse=${PACKHORSE:-packhorse}       # as .venv/bin/packhorse, in a folder that all nodes see
container=${CONTAINER:-}                # empty: none; a .sif file runs in Apptainer, any other image in Pyxis (enroot)
mounts=${MOUNTS:-$PWD}                  # folders that the container sees, parted by commas

# Where nodes have several networks, NCCL and gloo must take the right one. Nothing is guessed here: where these are not
# set, NCCL chooses by itself, and gloo takes the network of the host's name. `ip -br address` on a node lists them.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# Only where some InfiniBand adapters are not for computing, as storage's:
# export NCCL_IB_HCA=mlx5_0,mlx5_1
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}   # NCCL says what went wrong, and nothing else

# ---------------------------------------------------------------- nothing to edit below
train=("$packhorse" train "$recipe" ${overrides[@]+"${overrides[@]}"} "$@")

# A node that dies is Slurm's to find: it queues the job again. Ended before that with the launchers of the other nodes,
# which miss it sooner, the job would have failed.
step=(--nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0)
step+=(--cpu-bind=none)                 # a node's one task has all of its cores: Slurm would bind it to one
case $container in
  '') ;;
  *.sif) train=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$container" "${train[@]}") ;;
  *) step+=(--container-image="$container" --container-workdir="$PWD"
            --container-mounts="$(sed -E 's/[^,]+/&:&/g' <<<"$mounts")") ;;
esac

say() { echo "slurm: $(date +%FT%T) job $SLURM_JOB_ID: $*"; }
say "start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NUM_NODES nodes: $SLURM_JOB_NODELIST"
say "NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-} NCCL_IB_HCA=${NCCL_IB_HCA:-}"

# `wait` ends with a signal, and the run does not. srun passes the signal to all nodes.
trap 'interrupted=yes; say "USR1: the run saves and stops"; kill -USR1 "$srun" || true' USR1
srun "${step[@]}" "${train[@]}" &
srun=$!
interrupted=yes
while [ "$interrupted" = yes ]; do
  interrupted=no
  code=0
  wait "$srun" || code=$?
done
say "exit code $code"
if [ "$code" -eq 75 ]; then             # saved, run me again; nothing else is worth another start
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
