#!/usr/bin/env bash
#SBATCH --job-name=sft_8b
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
##SBATCH --partition=gpu
##SBATCH --account=project
##SBATCH --qos=normal
##SBATCH --constraint=h100
##SBATCH --chdir=.
#SBATCH --output=%x-%j.log
#
# Whole nodes. srun below sets the number of tasks: set here, --nodes=4-8 would never get more than four.
#SBATCH --exclusive
#SBATCH --mem=0
#
# Slurm sends USR1 to this script ten to eleven minutes before the time limit: the run saves and is queued again.
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# ---------------------------------------------------------------- edit the lines above and these
recipe=${RECIPE:-recipes/sft_8b.yaml}
keep=yes                                # train a copy, made at the job's first start; empty: read the recipe at each start
overrides=()                            # changes to the recipe, as (optim.lr=1e-5); sbatch SCRIPT KEY=VALUE... adds to them
packhorse=${PACKHORSE:-packhorse}       # as .venv/bin/packhorse, in a folder that all nodes share
container=${CONTAINER:-}                # empty: none; a .sif file runs in Apptainer, any other image in Pyxis (enroot)
mounts=${MOUNTS:-$PWD}                  # folders to mount in the container, separated by commas

# If nodes have several networks, NCCL and gloo must use the right one. Without these lines NCCL chooses by itself, and
# gloo uses the network of the host's name. `ip -br address` on a node lists the interfaces.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# Only if some InfiniBand adapters are not for training, as those of the storage:
# export NCCL_IB_HCA=mlx5_0,mlx5_1
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}   # NCCL reports problems only

# ---------------------------------------------------------------- nothing to edit below
# The copy lies beside the log. sbatch copies this script alone: an edit of the recipe before the first start counts.
log=$(readlink -f "/proc/$$/fd/1")
[ -f "$log" ] || log=$PWD/log
kept=${log%/*}/slurm-$SLURM_JOB_ID.yaml
if [ -n "$keep" ] && [ -f "$recipe" ]; then
  if [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] && [ -e "$kept" ] && ! cmp -s "$recipe" "$kept"; then
    echo "slurm: $kept exists, and is not of this job; move it away" >&2
    exit 2
  fi
  [ -e "$kept" ] || { cp "$recipe" "$kept.part" && mv "$kept.part" "$kept"; }
  recipe=$kept
fi

train=("$packhorse" train "$recipe" ${overrides[@]+"${overrides[@]}"} "$@")

# When a node dies, Slurm notices it and queues the job again. The launchers of the other nodes miss it sooner and exit:
# with --kill-on-bad-exit=1 that would end the job as failed before Slurm noticed.
step=(--nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=0)
step+=(--cpu-bind=none)                 # the one task of a node uses all its cores; Slurm would bind it to one
case $container in
  '') ;;
  *.sif) train=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$container" "${train[@]}") ;;
  *) step+=(--container-image="$container" --container-workdir="$PWD"
            --container-mounts="$(sed -E 's/[^,]+/&:&/g' <<<"$mounts")") ;;
esac

say() { echo "slurm: $(date +%FT%T) job $SLURM_JOB_ID: $*"; }
say "start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NUM_NODES nodes: $SLURM_JOB_NODELIST"
say "NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-} NCCL_IB_HCA=${NCCL_IB_HCA:-}"

# A signal ends `wait`, but not the run. srun passes the signal to all nodes.
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
if [ "$code" -eq 75 ]; then             # saved; no other exit code is worth another start
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
